"""The commands of the docs' snippets, as forks of this process, which has imported all: an import costs more than a tiny run.

In a folder that `PATH` begins with each command is a shell script that asks for a fork and waits for its end. Forks run the real entry
points, with the caller's folder, environment, output and exit code.
"""

import multiprocessing
import os
import sys
import threading
from pathlib import Path

from accelerate.commands.launch import (
    _validate_launch_command,
    launch_command_parser,
    prepare_simple_launcher_cmd_env,
)

from processes import run_python


ROOT = Path(__file__).parent.parent
SHIM = """#!/bin/bash
request=$(mktemp -d -p {folder})
printf '%s\\0' {name} "$@" > $request/line
env -0 > $request/environment
mkfifo $request/code
echo $request $$ "$PWD" > {folder}/requests
read code < $request/code
exit $code
"""


class Commands:
    """A context in which snippets find the commands.

    Args:
        folder (`Path`): Becomes that of the commands.
    """

    names = ("accelerate", "diffusers-disback", "python")

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        for name in self.names:
            (folder / name).write_text(SHIM.format(folder=folder, name=name))
            (folder / name).chmod(0o755)
        os.mkfifo(folder / "requests")
        self._requests = os.open(folder / "requests", os.O_RDWR)

    def __enter__(self) -> "Commands":
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        (self.folder / "requests").write_text("end\n")

    def _serve(self) -> None:
        with open(self._requests) as requests:
            while (line := requests.readline()) != "end\n":
                request, pid, place = line.rstrip("\n").split(" ", 2)
                process = multiprocessing.get_context("fork").Process(target=become, args=(Path(request), pid, place))
                process.start()
                process.join()
                Path(request, "code").write_text(f"{process.exitcode}\n")


def become(request: Path, pid: str, place: str) -> None:
    """What a fork does: it is the command that a shell, of this number and in this folder, asks for."""
    for stream in (1, 2):
        os.dup2(os.open(f"/proc/{pid}/fd/{stream}", os.O_WRONLY | os.O_APPEND), stream)
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))  # noqa: SIM115
    name, *line = (request / "line").read_text().split("\0")[:-1]
    os.environ.clear()
    os.environ.update(one.split("=", 1) for one in (request / "environment").read_text().split("\0")[:-1])
    os.chdir(place)
    forget_the_repository()
    if name == "accelerate":
        assert line[0] == "launch", line
        settings, *_ = _validate_launch_command(launch_command_parser().parse_args(line[1:]))
        (_, *line), environment = prepare_simple_launcher_cmd_env(settings)
        os.environ.update({key: str(value) for key, value in environment.items()})
    elif name == "diffusers-disback":
        line = ["-m", "diffusers_disback.commands.cli", *line]
    sys.path.insert(0, place)  # where Python finds a module; a script's folder comes before it
    run_python(line)


def forget_the_repository() -> None:
    """Snippets import examples and benchmarks from where they run, not from where the tests have them."""
    places = [str(ROOT / name) for name in ("examples", "benchmarks", "tests")]
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(tuple(places)):
            del sys.modules[name]
    sys.path = [entry for entry in sys.path if not entry.startswith(tuple(places))]
