"""One run writes to an output folder at a time.

A file and not the kernel's lock: those of network folders differ, are seen by one container and not by the other, and live on
in workers that were forked.
"""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from ..hub.files import printable, read_json


LOCK = "run.lock"
_TOLERANCE = 5.0  # seconds: the clock by which a process began may be set meanwhile
_PATIENCE = 1.0  # seconds for another process to write what it has just made


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other runs out of a folder, which is made if need be, and removed again if nothing was put there.

    Raises:
        ValueError: If another process holds it, or may hold it on another machine.
        OSError: If the folder cannot be written to.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    file, own = folder / LOCK, _own()
    while not _take(file, own):
        _remove_if_stale(file)
    try:
        yield
    finally:
        if _content(file) == own:
            file.unlink()
        for place in made:
            if place.is_dir() and not any(place.iterdir()):
                place.rmdir()


def _own() -> dict[str, Any]:
    import psutil

    now = datetime.now().astimezone().isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "began": psutil.Process().create_time(), "since": now}


def _take(file: Path, own: dict[str, Any]) -> bool:
    """Makes the file if it is not there. Returns whether it was not."""
    try:
        stream = open(file, "x")  # noqa: SIM115, a file that cannot be written is removed first
    except FileExistsError:
        return False
    try:
        with stream:
            json.dump(own, stream)
    except BaseException:
        file.unlink(missing_ok=True)
        raise
    return True


def _remove_if_stale(file: Path) -> None:
    """Removes the file of a process that is gone.

    Raises:
        ValueError: If it is not, or that cannot be seen from here.
    """
    content = _content(file)
    remedy = f"If no run writes to {file.parent} any more, remove {file}, and start again."
    if content is None:
        if not file.exists():
            return
        raise ValueError(f"{file} says that {file.parent} is in use, but not by whom. {remedy}")
    who = f"process {content['pid']} on {printable(content['host'])}, since {printable(content['since'])}"
    if content["host"] != socket.gethostname():
        raise ValueError(f"{file.parent} is in use by {who}, another machine than this one. {remedy}")
    if _is_alive(content["pid"], content["began"]):
        raise ValueError(
            f"{file.parent} is in use by {who}. Wait for its end, or stop it: two runs would spoil each other's results."
        )
    # Whoever renames it removes it: of two that saw the stale one, the second may find the first one's own in its place.
    aside = file.with_name(f"{LOCK}.{os.getpid()}")
    try:
        os.rename(file, aside)
    except FileNotFoundError:
        return
    if _content(aside) != content:
        os.rename(aside, file)
    aside.unlink(missing_ok=True)


def _content(file: Path) -> dict[str, Any] | None:
    """What a lock says; `None` if it is gone, or says nothing."""
    end = time.monotonic() + _PATIENCE
    while file.exists():
        try:
            content = read_json(file)
            if isinstance(content.get("pid"), int) and isinstance(content.get("began"), (int, float)):
                return {"host": "", "since": "", **content}
        except ValueError:
            pass  # it was made a moment ago, or is damaged
        if time.monotonic() > end:
            return None
        time.sleep(0.05)
    return None


def _is_alive(pid: int, began: float) -> bool:
    """Whether a process of this machine still runs, and is not another one that has got its number."""
    import psutil

    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - began) < _TOLERANCE and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, ValueError, OverflowError):
        return False
    except psutil.AccessDenied:
        return True
