"""Files: names of others stay inside their folder, JSON is read with its shape checked, and results are written whole."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any


def inside(folder: str | Path, name: Any, source: str) -> Path:
    """Resolves a file's or a folder's name that somebody else wrote, which has to lie inside of its folder.

    Every name that is read from a JSON file or a listing of others goes through here before it is used as a path. Links
    are followed: a snapshot in the Hub client's cache may link to the blobs of its own repository, nothing else may leave
    the folder. What is named does not have to exist.

    Args:
        folder (`str` or `Path`): That the name is relative to.
        name (`Any`): As it was read; anything but a `str` is an error.
        source (`str`): Who wrote the name, for the message, such as `"model_index.json of user/model"`.

    Returns:
        `Path`: `folder / name`, not resolved, so that a link in the Hub's cache keeps the name of its file.

    Raises:
        ValueError: If the name is empty, absolute, holds `..`, a drive, a backslash or a control character, or leads out
            of the folder by a link.
    """
    folder = Path(folder)
    if not isinstance(name, str) or not name:
        raise ValueError(f"{source} names {name!r}, which is no file's name.")
    if (
        not name.isprintable()
        or "\\" in name
        or PurePosixPath(name).is_absolute()
        or PureWindowsPath(name).drive
        or ".." in PurePosixPath(name).parts
        or not PurePosixPath(name).parts
        or any(len(os.fsencode(part)) > 255 for part in PurePosixPath(name).parts)
    ):
        raise ValueError(
            f"{source} names {name!r}, which is no place inside of its folder. Nothing of it was read or written; do not "
            "use this model unless you know who made it."
        )
    path = folder / name
    try:
        target = path.resolve()
    except (OSError, RuntimeError) as error:  # a link to itself, or a name that is too long
        raise ValueError(f"{source} names {name!r}, which cannot be followed ({error}).") from error
    if not any(target.is_relative_to(root) for root in _roots(folder)):
        raise ValueError(
            f"{source} names {name!r}, a link that leads out of its folder, to {target}. Nothing of it was read or "
            "written; put the file itself there if it is yours."
        )
    return path


def _roots(folder: Path) -> list[Path]:
    """Where the files of a folder may lie: in it, or, for a snapshot in the Hub's cache, among its repository's blobs."""
    root = folder.resolve()
    for snapshot in (root, *root.parents):
        if snapshot.parent.name == "snapshots" and snapshot.parent.parent.name.startswith("models--"):
            return [root, snapshot.parent.parent / "blobs"]
    return [root]


POINTER = "version https://git-lfs.github.com/spec/"
"""How a file begins that stands for another in Git LFS."""

FETCH = (
    "it is a pointer of Git LFS in place of the file. Fetch it: `git lfs install`, then `git lfs pull` in the folder of the "
    "clone; or `hf download` the model."
)


def check_no_pointer(file: Path, what: str | None = None) -> None:
    """Raises a `ValueError` with the remedy if a file is a pointer of Git LFS."""
    with open(file, "rb") as stream:
        if stream.read(len(POINTER)) == POINTER.encode():
            raise ValueError(f"{what or file} cannot be read: {FETCH}")


def read_text(file: Path, what: str | None = None) -> str:
    """Reads a text file of somebody else.

    Args:
        file (`Path`): UTF-8.
        what (`str`, *optional*): What it is, for messages; by default its path.

    Raises:
        ValueError: If it cannot be read, or is not UTF-8.
    """
    what = what or str(file)
    try:
        return file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} is not UTF-8 ({error}).") from error
    except OSError as error:
        raise ValueError(f"{what} cannot be read: {error.strerror or error}.") from error


def read_json(file: Path, what: str | None = None, kind: type = dict) -> Any:
    """Reads a JSON file of somebody else.

    Args:
        file (`Path`): UTF-8.
        what (`str`, *optional*): What it is, for messages; by default its path.
        kind (`type`): What the whole has to be: `dict` or `list`.

    Raises:
        ValueError: If it cannot be read, or is no JSON of this kind.
    """
    return parse_json(read_text(file, what), what or str(file), kind)


def parse_json(text: str | bytes, what: str, kind: type = dict) -> Any:
    """Parses JSON of somebody else; see `read_json`."""
    try:
        content = json.loads(text)
    except ValueError as error:  # no JSON, no UTF-8, or a whole number of thousands of digits
        beginning = text if isinstance(text, str) else text[: len(POINTER)].decode(errors="replace")
        if beginning.startswith(POINTER):
            raise ValueError(f"{what} cannot be read: {FETCH}") from error
        raise ValueError(f"{what} is no valid JSON ({error}).") from error
    except RecursionError as error:
        raise ValueError(f"{what} is no valid JSON (it is nested too deeply).") from error
    if not isinstance(content, kind):
        raise ValueError(f"{what} holds a {type(content).__name__}, where a {kind.__name__} has to be.")
    return content


@contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """Gives a draft to write in place of a file, and puts it in the file's place when all went well.

    On an error the file is as it was, and the draft is gone. The draft keeps the file's suffix, by which writers know
    their format.
    """
    draft = file.with_name(f"{file.stem}.draft{file.suffix}")
    try:
        yield draft
        with open(draft, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(draft, file)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


_FULL_DISK_OF_TORCH = "inline_container|PytorchStreamWriter|basic_ios"  # as `torch.save` tells that it cannot write


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """What the writers of weights raise when a file cannot be written becomes what Python raises: an `OSError` that says
    why, and where.

    Args:
        place (`Path`): The file or folder that is written.

    Raises:
        OSError: Such as of a full disk.
    """
    try:
        yield
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)|\bcode: (\d+), kind", str(error))
        if number is not None and type(error).__name__ == "SafetensorError":
            code = int(number[1] or number[2])
        elif isinstance(error, RuntimeError) and re.search(_FULL_DISK_OF_TORCH, str(error)):
            code = errno.ENOSPC if shutil.disk_usage(_existing(place)).free < 2**24 else errno.EIO
        else:
            raise
        raise OSError(code, os.strerror(code), str(place)) from error


def _existing(place: Path) -> Path:
    return next(folder for folder in (place, *place.absolute().parents) if folder.exists())


def write_text(file: Path, text: str) -> None:
    """Writes a text file, UTF-8, whole or not at all."""
    with written_whole(file) as draft:
        draft.write_bytes(text.encode())


def write_json(file: Path, content: Any) -> None:
    """Writes a JSON file whole or not at all."""
    with written_whole(file) as draft:
        draft.write_bytes(to_bytes(content))


def to_bytes(content: Any) -> bytes:
    """JSON as all of the project's files have it."""
    return (json.dumps(content, indent=2) + "\n").encode()


_CONTROL = re.compile(r"[^\x20-\x7e\xa0-\U0010ffff]|[\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """Makes a hard link to a file into which nothing is ever written; or a copy, on disks that have none.

    Raises:
        FileExistsError: If the target is there.
    """
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        shutil.copy2(source, target)


def printable(text: Any) -> str:
    """A text of somebody else for a terminal or a page: control characters, among them terminal escapes and marks that
    reverse the direction, are shown as escapes; line breaks and tabs, too."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), str(text))


def sha256_of(file: Path) -> str:
    """Of a file's content."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def known_sha256(file: Path) -> str:
    """Of a file's content, which is read once in a process, and again only if its size or time of change is another."""
    stat = file.stat()
    return _known_sha256(file.resolve(), stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=512)
def _known_sha256(file: Path, mtime_ns: int, size: int) -> str:
    return sha256_of(file)
