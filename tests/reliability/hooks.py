"""What an attempt asks of the process that it runs in: to note, to fail or to die at a chosen operation on files.

Operations are seen by an audit hook, which Python calls before each of them, whoever asks for it. Weights and tensors are
written by native code: their writers are wrapped, so that they count, too.
"""

import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


# Events of changes -> which of its arguments is the folder that a name is relative to, if any may be.
_CHANGES = {
    "os.rename": 2,
    "os.remove": 1,
    "os.rmdir": 1,
    "os.mkdir": 2,
    "os.link": 2,
    "os.symlink": 2,
    "os.truncate": 0,
}
_FAULTS = {"full": errno.ENOSPC, "read-only": errno.EROFS, "forbidden": errno.EACCES, "broken": errno.EIO}


def note_modules(file: str) -> None:
    """Writes the names of all that was imported, at the end."""
    import atexit

    atexit.register(lambda: Path(file).write_text(json.dumps(sorted(sys.modules))))


def before_each_change(folder: Path, act: Callable[[str, Path, bool], None]) -> None:
    """Calls a function before each operation that changes something in a folder: its name, the file, and whether it opens
    the file to write it anew."""
    import safetensors.torch
    import torch

    folder = Path(os.path.abspath(folder))
    busy = False

    @contextmanager
    def alone() -> Iterator[None]:
        nonlocal busy
        busy = True
        try:
            yield
        finally:
            busy = False

    def told(name: str, file: Any, writes: bool = False) -> None:
        if busy or not isinstance(file, (str, bytes, os.PathLike)):
            return
        path = Path(os.path.abspath(os.fsdecode(file)))
        if path == folder or folder in path.parents:
            with alone():
                act(name, path, writes)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            file, _, flags = arguments
            if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR):
                told("open", file, writes=True)
        elif event in _CHANGES:
            file, parent = arguments[0], arguments[_CHANGES[event]] if _CHANGES[event] else -1
            if parent != -1 and isinstance(file, (str, bytes)):  # as `shutil.rmtree` names what it removes
                file = os.path.join(os.readlink(f"/proc/self/fd/{parent}"), os.fsdecode(file))
            told(event, file)

    def wrapped(function: Callable[..., Any], place: int, name: str) -> Callable[..., Any]:
        def called(*arguments: Any, **named: Any) -> Any:
            file = arguments[place] if len(arguments) > place else next(iter(named.values()))
            told(name, file, writes=True)
            return function(*arguments, **named)

        return called

    safetensors.torch.serialize_file = wrapped(safetensors.torch.serialize_file, 1, "safetensors")
    torch.save = wrapped(torch.save, 1, "torch.save")
    sys.addaudithook(audit)


def snapshots(given: dict[str, str]) -> None:
    """Copies a folder before each operation that changes it: what a SIGKILL there would leave. Where a file is opened to be
    written, there is a second copy with the file emptied: killed after the first moment of writing."""
    folder, copies = Path(given["folder"]), Path(given["copies"])
    copies.mkdir()
    number = 0

    def copy(name: str, file: Path, torn: bool) -> None:
        nonlocal number
        if not folder.is_dir():
            return
        place = copies / f"{number:05d}"
        shutil.copytree(folder, place, symlinks=True)
        if torn:
            (place / file.relative_to(folder)).write_bytes(b"")
        where = str(file.relative_to(folder))
        (copies / f"{number:05d}.json").write_text(json.dumps({"operation": name, "file": where, "torn": torn}))
        number += 1

    def act(name: str, file: Path, writes: bool) -> None:
        copy(name, file, torn=False)
        if writes and file.parent.is_dir():
            copy(name, file, torn=True)

    before_each_change(folder, act)


def fail_at(given: dict[str, Any]) -> None:
    """Makes the operation of a number fail, and all after it that write: `folder`, `number`, `fault`; the count of operations
    goes into `count`, if that file is named."""
    number = 0

    def act(name: str, file: Path, writes: bool) -> None:
        nonlocal number
        number += 1
        if given.get("count"):
            Path(given["count"]).write_text(str(number))
        spared = given["fault"] == "full" and name in ("os.remove", "os.rmdir", "os.rename")
        if number >= given["number"] and not spared:
            code = _FAULTS[given["fault"]]
            raise OSError(code, os.strerror(code), str(file))

    before_each_change(Path(given["folder"]), act)


def die_at(given: dict[str, Any]) -> None:
    """Kills the process before the operation of a number: `folder`, `number`."""
    number = 0

    def act(name: str, file: Path, writes: bool) -> None:
        nonlocal number
        number += 1
        if number == given["number"]:
            os.kill(os.getpid(), signal.SIGKILL)

    before_each_change(Path(given["folder"]), act)


def signal_at_step(given: dict[str, Any]) -> None:
    """Sends the process a signal before a step of a stage: `stage`, `step`, `signal`."""
    _before_step(given["stage"], given["step"], lambda: os.kill(os.getpid(), given["signal"]))


def _before_step(stage: str, number: int, act: Callable[[], Any]) -> None:
    from diffusers_disback.backtracking import BacktrackingTrainer
    from diffusers_disback.degradation import DegradationRecorder

    for kind in (DegradationRecorder, BacktrackingTrainer):

        def train_step(self, step, batches, original=kind.train_step):
            if self.name == stage and step == number:
                act()
            return original(self, step, batches)

        kind.train_step = train_step


def note_memory(given: dict[str, Any]) -> None:
    """Appends a line of JSON for every so many steps: stage, step, resident memory, open files, threads."""
    from diffusers_disback.training.stage import Stage

    original = Stage._watch

    def watch(self, step, losses):
        original(self, step, losses)
        if (step + 1) % given["every"] == 0:
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
            row = {
                "stage": self.name,
                "step": step + 1,
                "resident_mb": round(resident / 1e6, 2),
                "open_files": len(os.listdir("/proc/self/fd")),
                "threads": len(os.listdir("/proc/self/task")),
            }
            with open(given["file"], "a") as stream:
                stream.write(json.dumps(row) + "\n")

    Stage._watch = watch


def delete_at_step(given: dict[str, Any]) -> None:
    """Deletes a folder before a step of a stage: `stage`, `step`, `folder`."""
    _before_step(given["stage"], given["step"], lambda: shutil.rmtree(given["folder"]))
