"""Prompts: the lines of a text file, and what every caption is held to."""

import hashlib
import io
import os
import re
import stat
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..hub.files import parse_json, printable


LONGEST = 1_000_000  # characters of a line; what is longer is no prompt
_MARKS = {  # byte order marks; those that begin like another come first
    b"\xff\xfe\0\0": "utf-32-le",
    b"\0\0\xfe\xff": "utf-32-be",
    b"\xff\xfe": "utf-16-le",
    b"\xfe\xff": "utf-16-be",
    b"\xef\xbb\xbf": "utf-8",
}
_OTHERS = {  # how files begin that hold no lines of text
    b"\x1f\x8b": "a gzip archive; unpack it first",
    b"PK\x03\x04": "a zip archive, or a spreadsheet or document of that form; unpack it, or save it as plain text",
    b"\xfd7zXZ\0": "an xz archive; unpack it first",
    b"\x28\xb5\x2f\xfd": "a zstd archive; unpack it first",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it first",
    b"BZh91AY&SY": "a bzip2 archive; unpack it first",
    b"PAR1\x15": "a Parquet file; put it into a folder and pass that as --dataset_name",
    b"ARROW1\0\0": "an Arrow file; put it into a folder and pass that as --dataset_name",
    b"%PDF-": "a PDF; save its text as plain text",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
}
_NUL = (
    "holds a NUL character: it is no text, or text in UTF-16 without a byte order mark. Save it as UTF-8, as by "
    "`iconv -f UTF-16LE -t UTF-8 old.txt > new.txt`."
)
_TABLES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow")
_HEADER = re.compile(r'"?[A-Za-z_]\w*"?(?:[,;\t]"?[A-Za-z_]\w*"?)+')
_COLUMNS = {"text", "caption", "captions", "prompt", "prompts", "file_name", "image", "url"}


def caption_of(value: Any, where: str) -> str | None:
    """A caption as it is used, wherever it was read: one line, without byte order marks; `None` where there is none, or
    only blanks.

    Args:
        value (`Any`): As it was read.
        where (`str`): File and line, or row and column, for messages.

    Raises:
        ValueError: If it is no text, or holds NULs.
    """
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(
            f"{where} is a {type(value).__name__}, not a text. Name a column with one text a row by --caption_column."
        )
    if "\0" in value:
        raise ValueError(f"{where} {_NUL}")
    return " ".join(value.replace("\ufeff", "").split()) or None


class PromptFile(Sequence[str]):
    """The lines of a text file, by offsets: never held in memory. Blank lines do not count.

    Lines end as on any system. The file is read for as long as the prompts are used, and must not change meanwhile.

    Args:
        file (`str` or `Path`): UTF-8, or UTF-16 or UTF-32 with a byte order mark; one prompt a line.
        max_samples (`int`, *optional*): The number of prompts to take, from the top.

    Raises:
        ValueError: If it is no regular file, cannot be read, is no text or in another encoding, is a table, or has no
            prompts; later, when a prompt is asked for, if the file has changed.
    """

    offsets: np.ndarray

    def __init__(self, file: str | Path, max_samples: int | None = None):
        self.file = str(file)
        try:
            kind = os.stat(file).st_mode
            if stat.S_ISDIR(kind):
                raise ValueError(
                    f"The prompts file {file} cannot be read: it is a folder. Name a text file, or pass the folder as "
                    "--train_data_dir (images with a metadata.jsonl) or --dataset_name."
                )
            if not stat.S_ISREG(kind):
                raise ValueError(
                    f"The prompts file {file} is no regular file (a pipe, a socket or a device), but it is read many "
                    "times. Write the prompts to a file first."
                )
            with open(file, "rb") as stream:
                self._read(stream)
        except OSError as error:
            raise ValueError(f"The prompts file {file} cannot be read: {error.strerror}.") from error
        if not len(self.offsets):
            raise ValueError(f"The prompts file {file} is empty; it needs one prompt per line.")
        self.offsets = self.offsets[:max_samples]

    def _read(self, stream: io.BufferedReader) -> None:
        """Finds where the prompts begin, and hashes the file on the way."""
        head = stream.read(64)
        for beginning, what in _OTHERS.items():
            if head.startswith(beginning):
                raise ValueError(f"The prompts file {self.file} is {what}.")
        mark = next((mark for mark in _MARKS if head.startswith(mark)), b"")
        self.encoding = _MARKS.get(mark, "utf-8")
        self._is = _identity(stream)
        stream.seek(len(mark))
        content, offsets, offset = hashlib.sha256(mark), array("q"), len(mark)
        lines = io.TextIOWrapper(stream, self.encoding, newline="")
        try:
            for number, line in enumerate(iter(lambda: lines.readline(LONGEST + 1), ""), 1):
                if len(line) > LONGEST:
                    raise ValueError(
                        f"{self.file}, line {number} has more than {LONGEST:,} characters: it is no prompt."
                    )
                prompt = caption_of(line, f"{self.file}, line {number}")
                if prompt is not None:
                    if not offsets:
                        self._check_no_table(line.strip("\ufeff \r\n"))
                    offsets.append(offset)
                raw = line.encode(self.encoding)
                content.update(raw)
                offset += len(raw)
        except UnicodeDecodeError as error:
            raise ValueError(self._not_text(error)) from error
        self.offsets = np.array(offsets, np.int64)
        self._sha256 = content.hexdigest()

    def _not_text(self, error: UnicodeDecodeError) -> str:
        """Which line is in another encoding."""
        if self.encoding != "utf-8":
            return f"{self.file} begins as {self.encoding.upper()}, but is none ({error}). Save it as UTF-8."
        before = 0
        with open(self.file, "rb") as stream:
            for line in stream:
                try:
                    line.decode()
                except UnicodeDecodeError as found:
                    error, before = found, before + len((line[: found.start] + b".").splitlines())
                    break
                before += len(line.splitlines())
        if b"\0" in line:
            return f"{self.file}, line {before} {_NUL}"
        return (
            f"{self.file}, line {before} is not UTF-8 ({error}). Save the file as UTF-8; if it is Latin-1 or Windows-1252: "
            "`iconv -f WINDOWS-1252 -t UTF-8 old.txt > new.txt`."
        )

    def _check_no_table(self, first: str) -> None:
        """Sees by its name and its first line that a file is none of a data set's."""
        is_json = first in ("[", "{")
        if first[0] + first[-1] in ("{}", "[]"):
            try:
                is_json = bool(parse_json(first, "", kind=dict if first[0] == "{" else list))
            except ValueError:
                is_json = False
        columns = set(re.split(r"[,;\t]", first.replace('"', "").lower())) & _COLUMNS
        if is_json or (_HEADER.fullmatch(first) and columns) or Path(self.file).suffix.lower() in _TABLES:
            raise ValueError(
                f"The prompts file {self.file} is a table or JSON, not one prompt a line (it begins {printable(first[:60])!r}). "
                "Put it into a folder of its own and pass that as --dataset_name, or, if it is the metadata.jsonl of "
                "images, pass their folder as --train_data_dir; --caption_column names the column."
            )

    def __len__(self) -> int:
        return len(self.offsets)

    def digest(self) -> str:
        """A SHA-256 of the file and of how many of its prompts are taken."""
        return f"{self._sha256} {len(self)}"

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # no slices are asked for
        try:
            with open(self.file, "rb") as stream:
                self._check_unchanged(stream)
                stream.seek(self.offsets[index])
                line = io.TextIOWrapper(stream, self.encoding, newline="").readline()
        except OSError as error:
            raise ValueError(f"The prompts file {self.file} cannot be read any more: {error.strerror}.") from error
        caption = caption_of(line, self.file)
        assert caption is not None, "a blank line has no offset"
        return caption

    def _check_unchanged(self, stream: io.BufferedReader) -> None:
        """Sees that the file is still the one whose lines were counted; one that was only touched is."""
        is_ = _identity(stream)
        if is_ == self._is:
            return
        if hashlib.file_digest(stream, "sha256").hexdigest() != self._sha256:
            raise ValueError(
                f"The prompts file {self.file} has changed since it was read. A run reads prompts from it throughout: put "
                "the old content back, and resume; other prompts are another run."
            )
        self._is = is_


def _identity(stream: io.BufferedReader) -> tuple[int, int, int]:
    """What changes with a file, as a rule: its place on the disk, its size and its time."""
    status = os.fstat(stream.fileno())
    return status.st_ino, status.st_size, status.st_mtime_ns
