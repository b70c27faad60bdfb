"""Prompts: the lines of a file, or a column of a data set."""

import hashlib
import io
import itertools
import os
import re
import stat
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..hub.files import parse_json, printable, read_json, write_json, written_whole


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
    b"\x89PNG": "a image",
    b"\xff\xd8\xff": "a image",
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
    told = os.fstat(stream.fileno())
    return told.st_ino, told.st_size, told.st_mtime_ns


class Captions(Sequence[str]):
    """The captions of a stored data set, row by row as they are needed. Rows without one are left out.

    Args:
        rows (`datasets.Dataset`): With the column.
        column (`str`): Its name.

    Raises:
        ValueError: If a value is no text, or there is none.
    """

    def __init__(self, rows: Any, column: str):
        self.rows = rows.select_columns(column)
        self.column = column
        kept, content = array("q"), hashlib.sha256()
        batches = self.rows.with_format("arrow").iter(batch_size=1000)
        values = itertools.chain.from_iterable(batch.column(column).to_pylist() for batch in batches)
        for row, caption in _captions(values, column):
            kept.append(row)
            content.update(caption.encode() + b"\n")
        self.kept = np.array(kept, np.int64)
        self._digest = content.hexdigest()

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # no slices are asked for
        row = int(self.kept[index])
        caption = caption_of(self.rows[row][self.column], f"Row {row} of column {self.column!r}")
        assert caption is not None, "a row without one is not kept"
        return caption

    def digest(self) -> str:
        """A SHA-256 of the captions, in their order."""
        return self._digest


def _captions(values: Iterable[Any], column: str) -> Iterator[tuple[int, str]]:
    """The captions of a column with their rows, counted from 0.

    Raises:
        ValueError: If a value is no text, or, at the end, if there is no caption.
    """
    row, found = -1, False
    for row, value in enumerate(values):
        caption = caption_of(value, f"Row {row} of column {column!r}")
        if caption is not None:
            found = True
            yield row, caption
    if row < 0:
        raise ValueError("The data set is empty; it needs one prompt per row.")
    if not found:
        raise ValueError(
            f"Column {column!r} of the data set holds no captions: all of its {row + 1:,} rows are null or blank. Name another "
            "by --caption_column."
        )


def given_prompts(dataset: Any, column: str) -> Sequence[str]:
    """The prompts of a data set that is in memory; null and blank ones are left out.

    Args:
        dataset (`Sequence[str]` or `datasets.Dataset`): Prompts, or rows with a column of captions.
        column (`str`): Of a `datasets.Dataset`.

    Raises:
        ValueError: If a value is no text, or there is none.
    """
    import datasets

    if isinstance(dataset, datasets.Dataset):
        _check_column(dataset.column_names, column)
        return Captions(dataset, column)
    captions = (caption_of(value, f"Row {row} of train_dataset") for row, value in enumerate(dataset))
    prompts = [caption for caption in captions if caption is not None]
    if not prompts:
        raise ValueError("train_dataset holds no prompts.")
    return prompts


def dataset_prompts(
    caption_column: str,
    dataset_name: str | None = None,
    train_data_dir: str | None = None,
    cache_dir: str | None = None,
    max_samples: int | None = None,
    config_name: str | None = None,
    split: str = "train",
) -> Captions:
    """The caption column of a data set; other columns, such as images, are not read.

    Args:
        caption_column (`str`): Its name.
        dataset_name (`str`, *optional*): A Hub id or a folder, as of `datasets.load_dataset`.
        train_data_dir (`str`, *optional*): An image folder with a `metadata.jsonl`, in place of `dataset_name`.
        cache_dir (`str`, *optional*): Where downloads are kept.
        max_samples (`int`, *optional*): The number of rows to take, from the top.
        config_name (`str`, *optional*): Of a data set with several configs.
        split (`str`): Of the data set.

    Raises:
        ValueError: If it has no such config, split or column, is empty, or a value is no text.
    """
    rows = _load(dataset_name, train_data_dir, config_name, split, cache_dir=cache_dir)
    _check_column(rows.column_names, caption_column)
    if max_samples is not None:
        rows = rows.select(range(min(max_samples, len(rows))))
    return Captions(rows, caption_column)


def spool_captions(
    file: Path,
    caption_column: str,
    dataset_name: str | None = None,
    train_data_dir: str | None = None,
    max_samples: int | None = None,
    config_name: str | None = None,
    split: str = "train",
) -> None:
    """Writes the captions of a data set that is streamed, and never stored, into a file with one a line.

    The captions are those of `dataset_prompts`. The file is written whole or not at all, and left alone if it is there and
    is of the same data set: what it was made of is written beside it.

    Args:
        file (`Path`): To be written.
        caption_column (`str`), and the others: As of `dataset_prompts`.

    Raises:
        ValueError: As of `dataset_prompts`.
    """
    origin = file.with_suffix(".json")
    source: dict[str, Any] = {"dataset": dataset_name or train_data_dir, "config": config_name, "split": split}
    source |= {"column": caption_column, "max_samples": max_samples}
    if file.exists() and origin.exists() and read_json(origin) == source:
        return
    rows = _load(dataset_name, train_data_dir, config_name, split, streaming=True)
    rows = rows.select_columns(caption_column) if rows.column_names and caption_column in rows.column_names else rows

    def values() -> Iterator[Any]:
        for row in _streamed(itertools.islice(rows, max_samples), dataset_name or train_data_dir):
            _check_column(list(row), caption_column)
            yield row[caption_column]

    file.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(file) as draft:
        with open(draft, "w", encoding="utf-8") as stream:
            for _, caption in _captions(values(), caption_column):
                stream.write(caption + "\n")
        file.unlink(missing_ok=True)  # of another data set: it must never stand beside what this one says of itself
        write_json(origin, source)


def _load(
    dataset_name: str | None, train_data_dir: str | None, config_name: str | None, split: str, **arguments: Any
) -> Any:
    import datasets

    for flag, place in (("dataset_name", dataset_name), ("train_data_dir", train_data_dir)):
        if place is not None and os.path.exists(place) and not os.path.isdir(place):
            raise ValueError(
                f"--{flag} {place} is a file, but a folder is needed. Put it into a folder of its own and name that."
            )
    if train_data_dir is not None and not os.path.isdir(train_data_dir):
        raise ValueError(f"--train_data_dir {train_data_dir} cannot be read: there is no such folder.")
    try:
        if dataset_name is not None:
            return datasets.load_dataset(dataset_name, config_name, split=split, **arguments)
        return datasets.load_dataset("imagefolder", data_dir=train_data_dir, split=split, **arguments)
    except (ValueError, TypeError, OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(_unreadable(dataset_name or train_data_dir, error)) from error


def _streamed(rows: Iterable[Any], name: str | None) -> Iterator[Any]:
    """Rows as they come, and what goes wrong with them as our error."""
    import datasets

    rows = iter(rows)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except (ValueError, TypeError, OSError, datasets.exceptions.DatasetsError) as error:
            raise ValueError(_unreadable(name, error)) from error
        yield row


def _unreadable(name: str | None, error: Exception) -> str:
    """What is wrong with a data set: the library's own words, and what they are due to."""
    cause = f" {error.__cause__}" if error.__cause__ is not None else ""
    return f"The data set {name!r} cannot be read. {error}{cause}"


def _check_column(names: Sequence[str], wanted: str) -> None:
    if wanted not in names:
        raise ValueError(f"The data set has no column {wanted!r}; it has {list(names)}. Name one by --caption_column.")
