"""Captions: a column of a data set, stored, streamed or in memory."""

import hashlib
import itertools
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..hub.files import inside, read_json, write_json, written_whole
from .prompts import caption_of


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


def image_files(
    train_data_dir: str,
    captions: Sequence[str],
    cache_dir: str | None = None,
    max_samples: int | None = None,
    split: str = "train",
) -> list[Path]:
    """The files of an image folder, not read yet.

    Args:
        train_data_dir (`str`): The folder.
        captions (`Sequence[str]`): Its `dataset_prompts`, to whose rows the files belong; or none, for all files.
        cache_dir, max_samples, split: As of `dataset_prompts`.

    Raises:
        ValueError: If the folder holds no images, a row names none, or one that is not there or lies elsewhere.
    """
    import datasets

    rows = _load(None, train_data_dir, None, split, cache_dir=cache_dir)
    if "image" not in rows.column_names:
        raise ValueError(f"--train_data_dir {train_data_dir} holds no images; it has {rows.column_names}.")
    if max_samples is not None:
        rows = rows.select(range(min(max_samples, len(rows))))
    rows = rows.select_columns("image").cast_column("image", datasets.Image(decode=False))
    if isinstance(captions, Captions):
        rows = rows.select(captions.kept)
    folder, files = Path(train_data_dir).absolute(), []
    for number, row in enumerate(rows):
        named = None if row["image"] is None else row["image"]["path"]
        if named is None:
            raise ValueError(f"--train_data_dir {train_data_dir}: row {number} with a caption has no image.")
        file = inside(folder, os.path.relpath(named, folder), f"metadata of {train_data_dir}")
        if not file.is_file():
            raise ValueError(f"The image {file} is not there, though the metadata of {train_data_dir} names it.")
        files.append(file)
    return files


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

    try:
        yield from rows
    except (ValueError, TypeError, OSError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(_unreadable(name, error)) from error


def _unreadable(name: str | None, error: Exception) -> str:
    """What is wrong with a data set: the library's own words, and what they are due to."""
    cause = f" {error.__cause__}" if error.__cause__ is not None else ""
    return f"The data set {name!r} cannot be read. {error}{cause}"


def _check_column(names: Sequence[str], wanted: str) -> None:
    if wanted not in names:
        raise ValueError(f"The data set has no column {wanted!r}; it has {list(names)}. Name one by --caption_column.")
