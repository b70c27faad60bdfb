"""A server that has imported everything and forks a process for each attempt: an import costs seconds, a fork does not.

As a module it is the client, `ForkServer`; as a program it is the server, which reads requests as lines of JSON. A child is a
group of processes of its own and runs the real entry point, `examples/text_to_image/train_disback.py` or
`python -m diffusers_disback.commands.cli`, as `__main__`, with its output in a file. Nothing is patched in it but two sizes (the
teacher draws in two steps, mismatch is measured on 8 samples), as in all tests, and what an attempt asks for (`hooks.py`).
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any


HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SCRIPT = ROOT / "examples" / "text_to_image" / "train_disback.py"
SOURCES = [ROOT / "src", SCRIPT.parent, HERE.parent, HERE]
DRAWN_IN, SAMPLES = 2, 8
sys.path[:0] = [path for path in map(str, SOURCES) if path not in sys.path]  # of `python tests/reliability/x.py`


@dataclass
class Ended:
    """How an attempt ended.

    Args:
        code (`int`): Its exit status; negative if a signal killed it, as of `subprocess`.
        seconds (`float`): From the fork to the end.
        output (`str`): Both its streams.
    """

    code: int
    seconds: float
    output: str

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL

    @property
    def told(self) -> list[str]:
        """The lines of its output that are no progress and no warning of a library."""
        lines = [line.strip() for line in self.output.replace("\r", "\n").splitlines()]
        return [line for line in lines if line and "it/s" not in line and "s/it" not in line and "step/s" not in line]


class ForkServer:
    """The client's side. A context; several may be there at once.

    Args:
        folder (`Path`): For the output of the children, and their Hub's cache.
        hash_seed (`int`): `PYTHONHASHSEED` of the server and all of its children.
        environment (`dict[str, str]`): On top of this process's.
    """

    def __init__(self, folder: Path, hash_seed: int = 0, **environment: str):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_", "TRANSFORMERS_"))}
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **kept,
                "PYTHONPATH": os.pathsep.join(map(str, SOURCES)),
                "PYTHONHASHSEED": str(hash_seed),
                "OMP_NUM_THREADS": "1",
                "ACCELERATE_USE_CPU": "true",
                "HF_HOME": str(folder / "hf-home"),
                "HF_HUB_OFFLINE": "1",
                "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                "MPLBACKEND": "agg",
                **environment,
            },
        )
        self._number = 0
        self._ask()  # until it has imported everything

    def start(self, arguments: list[str], program: str = "script", **hooks: Any) -> "Attempt":
        """Forks a child.

        Args:
            arguments (`list[str]`): Of its command line.
            program (`str`): `script` or `cli`.
            hooks: Names of functions of `hooks.py` -> their arguments; called in the child before anything else. `cwd` is
                the folder that it runs in.
        """
        self._number += 1
        log = self.folder / f"attempt-{os.getpid()}-{self.process.pid}-{self._number}.log"
        pid = self._ask(arguments=arguments, program=program, hooks=hooks, log=str(log))
        return Attempt(self, pid, log)

    def run(self, arguments: list[str], seconds: float | None = None, program: str = "script", **hooks: Any) -> Ended:
        """Runs an attempt to its end, or kills it (SIGKILL, its whole group) after some seconds."""
        return self.start(arguments, program, **hooks).wait(seconds)

    def _ask(self, **request: Any) -> Any:
        if request:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("The fork server is gone; its error stands above.")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def __enter__(self) -> "ForkServer":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


class Attempt:
    """A child that runs."""

    def __init__(self, server: ForkServer, pid: int, log: Path):
        self.server = server
        self.pid = pid
        self.log = log
        self.started = time.monotonic()

    def wait(self, seconds: float | None = None, then: int = signal.SIGKILL) -> Ended:
        """Waits for its end, and sends a signal to its group when some seconds have passed."""
        if not self.ends_within(seconds):
            with contextlib.suppress(ProcessLookupError):  # it has ended in this moment
                os.killpg(self.pid, then)
            self.ends_within(None)
        elapsed = time.monotonic() - self.started
        code = self.server._ask(wait=self.pid)
        output = self.log.read_text(errors="replace")
        self.log.unlink()
        return Ended(code, elapsed, output)

    def ends_within(self, seconds: float | None) -> bool:
        """Whether it ends within some seconds of its start."""
        handle = os.pidfd_open(self.pid)  # until it is waited for its number is its own
        try:
            left = None if seconds is None else max(0.0, self.started + seconds - time.monotonic())
            return bool(select.select([handle], [], [], left)[0])
        finally:
            os.close(handle)


# The server --------------------------------------------------------------------------------------------------------


def serve() -> None:
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)

    def answer(content: Any) -> None:
        print(json.dumps(content), file=answers, flush=True)

    import_everything()
    answer("ready")
    for line in requests:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            answer(os.waitstatus_to_exitcode(status))
            continue
        pid = os.fork()
        if pid == 0:
            child(**request)
        answer(pid)


def import_everything() -> None:
    """What a run imports, with what it imports late: a first child that runs to its end tells."""
    import tiny
    import torch
    import train_disback  # noqa: F401
    from script import arguments

    import diffusers_disback.commands.cli  # noqa: F401
    import diffusers_disback.evaluation.report as report
    from diffusers_disback.training import probe as mismatch

    torch.set_num_threads(1)
    report.TEACHER_STEPS, mismatch.SAMPLES = DRAWN_IN, SAMPLES
    folder = Path(tempfile.mkdtemp())  # no TemporaryDirectory, which a child's end would delete
    pid = os.fork()
    if pid == 0:
        teacher, prompts = tiny.save_teacher(folder / "teacher"), tiny.write_prompts(folder)
        lines = arguments(folder / "run", teacher, prompts, lora_rank=2)
        child(lines, "script", {"note_modules": str(folder / "modules.json")}, str(folder / "log"))
    _, status = os.waitpid(pid, 0)
    if status:
        output = (folder / "log").read_text() if (folder / "log").exists() else ""
        raise RuntimeError(f"The first run failed ({os.waitstatus_to_exitcode(status)}):\n{output}")
    for name in json.loads((folder / "modules.json").read_text()):
        if name not in sys.modules:
            with contextlib.suppress(Exception):  # of parts of libraries that cannot be had by their names
                importlib.import_module(name)
    shutil.rmtree(folder)
    started = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    if started:
        raise RuntimeError(f"Importing started threads, which do not live on in a fork: {started}.")
    gc.collect()
    gc.freeze()


def child(arguments: list[str], program: str, hooks: dict[str, Any], log: str) -> None:
    """Runs a program to its end as Python does, in a group of its own, and never returns."""
    code = 1
    try:
        os.setsid()
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        for handled in (signal.SIGINT, signal.SIGTERM):
            signal.signal(handled, signal.default_int_handler if handled == signal.SIGINT else signal.SIG_DFL)
        code = ended_with(run, arguments, program, hooks)
        with contextlib.suppress(Exception):
            threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # of this function itself
        traceback.print_exc()
    finally:
        os._exit(code)


def run(arguments: list[str], program: str, hooks: dict[str, Any]) -> None:
    import hooks as module

    os.chdir(hooks.pop("cwd", "/"))
    for name, given in hooks.items():
        getattr(module, name)(given)
    if program == "cli":
        sys.argv = ["diffusers-disback", *arguments]
        runpy.run_module("diffusers_disback.commands.cli", run_name="__main__")
    else:
        sys.argv = [str(SCRIPT), *arguments]
        runpy.run_path(str(SCRIPT), run_name="__main__")


def ended_with(function: Any, *arguments: Any) -> int:
    """The exit status of a program, as Python makes it."""
    try:
        function(*arguments)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        return 130
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    serve()
