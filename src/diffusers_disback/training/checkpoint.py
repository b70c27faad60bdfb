"""What tells a whole checkpoint from a damaged one: the size and the hash of each of its files, written down last."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..hub.files import inside, read_json, sha256_of, write_json


STATE = "stage.json"
SEAL = "files.json"
_SEALED = "sealed"
_READERS = 4  # hashing is faster than one disk reads, but hardly than one core hashes


def seal(folder: Path, state: dict[str, Any]) -> None:
    """Makes a written folder a checkpoint: writes its state and, last, the size and hash of every file. All of it is on
    the disk then.

    Args:
        folder (`Path`): With all that learners saved.
        state (`dict`): The content of `stage.json`.
    """
    write_json(folder / STATE, {**state, _SEALED: True})
    write_json(folder / SEAL, {"format_version": 1, "files": files_of(folder)})


def files_of(folder: Path) -> dict[str, dict[str, Any]]:
    """The size and hash of every file of a folder, all of which are on the disk then."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    with ThreadPoolExecutor(_READERS) as readers:
        hashes = list(readers.map(_stored, files))
    return {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "sha256": sha256}
        for file, sha256 in zip(files, hashes, strict=True)
    }


def is_sealed(folder: Path) -> bool:
    """Whether a checkpoint says what its files are; those of older versions do not."""
    return (folder / SEAL).is_file()


def damage(folder: Path, sizes_only: bool = False) -> str | None:
    """What is wrong with a checkpoint, in words that name the file; `None` if it is whole.

    Args:
        folder (`Path`): Of the checkpoint.
        sizes_only (`bool`): Do not read the files.
    """
    if not is_sealed(folder):
        try:
            if not (folder / STATE).is_file():
                return f"{STATE} is missing"
            return f"{SEAL} is missing" if _SEALED in read_json(folder / STATE, STATE) else None
        except ValueError as error:
            return f"{SEAL} was changed ({error})"

    def told() -> Any:
        files = read_json(folder / SEAL, SEAL).get("files")
        return files if isinstance(files, dict) and STATE in files else None

    return damage_of(folder, told, SEAL, sizes_only)


def damage_of(folder: Path, told: Callable[[], Any], where: str, sizes_only: bool = False) -> str | None:
    """What is wrong with a folder whose files were written down by `files_of`, in words that name the file; `None` if it is
    whole.

    Args:
        folder (`Path`): Of the files.
        told (`Callable`): Reads what was written down.
        where (`str`): The name of the file in which that was.
        sizes_only (`bool`): Do not read the files.
    """
    try:
        files = told()
        if not isinstance(files, dict):
            return f"{where} does not say what belongs to it"
        expected = {inside(folder, name, where): file for name, file in files.items()}
        for file, known in expected.items():
            if not file.is_file():
                return f"{file.relative_to(folder)} is missing"
            size = file.stat().st_size
            if size != known["size"]:
                return f"{file.relative_to(folder)} has {size} bytes in place of {known['size']}"
        if sizes_only:
            return None
        with ThreadPoolExecutor(_READERS) as readers:
            for (file, known), sha256 in zip(expected.items(), readers.map(sha256_of, expected), strict=True):
                if sha256 != known["sha256"]:
                    return f"{file.relative_to(folder)} was changed (its SHA-256 differs)"
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read ({error.strerror})"
    except (ValueError, TypeError, KeyError) as error:
        return f"{where} was changed ({error})"
    return None


def read_state(folder: Path) -> dict[str, Any]:
    """A stage's state at a checkpoint.

    Raises:
        ValueError: If it cannot be read.
    """
    return read_json(folder / STATE)


def _stored(file: Path) -> str:
    """The SHA-256 of a file that is on the disk when this returns."""
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())
    return sha256_of(file)
