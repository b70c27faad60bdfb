"""Prompts, and what every sample of every batch is made of."""

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .batch import Batch, Condition, to_device
from .condition_cache import ConditionCache
from .signals import leave_signals_to_the_parent


CAPACITY = 4096  # prompts whose conditions are kept in memory


class PromptFile(Sequence[str]):
    """The lines of a text file, by offsets: never held in memory. Blank lines do not count.

    Args:
        file (`str` or `Path`): UTF-8, one prompt a line.
        max_samples (`int`, *optional*): The number of prompts to take, from the top.

    Raises:
        ValueError: If the file cannot be read, is not UTF-8, or has no prompts.
    """

    def __init__(self, file: str | Path, max_samples: int | None = None):
        self.file = str(file)
        try:
            with open(file, "rb") as stream:
                offset, offsets = 0, []
                for number, line in enumerate(stream, 1):
                    if line.strip():
                        try:
                            line.decode()
                        except UnicodeDecodeError as error:
                            raise ValueError(f"{file}, line {number} is not UTF-8 ({error}).") from error
                        offsets.append(offset)
                    offset += len(line)
        except OSError as error:
            raise ValueError(f"The prompts file {file} cannot be read: {error.strerror}.") from error
        if not offsets:
            raise ValueError(f"The prompts file {file} is empty; it needs one prompt per line.")
        self.offsets = np.array(offsets[:max_samples], np.int64)

    def __len__(self) -> int:
        return len(self.offsets)

    def digest(self) -> str:
        """A SHA-256 of the file and of how many of its prompts are taken."""
        with open(self.file, "rb") as stream:
            return f"{hashlib.file_digest(stream, 'sha256').hexdigest()} {len(self)}"

    def __getitem__(self, index: int) -> str:
        with open(self.file, "rb") as stream:
            stream.seek(self.offsets[index])
            return stream.readline().decode().strip()


def dataset_prompts(
    caption_column: str,
    dataset_name: str | None = None,
    train_data_dir: str | None = None,
    cache_dir: str | None = None,
    max_samples: int | None = None,
    config_name: str | None = None,
    split: str = "train",
) -> Sequence[str]:
    """The caption column of a data set; other columns, such as pictures, are not read.

    Args:
        caption_column (`str`): Its name.
        dataset_name (`str`, *optional*): A Hub id or a folder, as of `datasets.load_dataset`.
        train_data_dir (`str`, *optional*): An image folder with a `metadata.jsonl`, in place of `dataset_name`.
        cache_dir (`str`, *optional*): Where downloads are kept.
        max_samples (`int`, *optional*): The number of rows to take, from the top.
        config_name (`str`, *optional*): Of a data set with several configs.
        split (`str`): Of the data set.

    Raises:
        ValueError: If it has no such config, split or column, or is empty.
    """
    rows = _load(dataset_name, train_data_dir, config_name, split, cache_dir=cache_dir)
    _check_column(rows.column_names, caption_column)
    if max_samples is not None:
        rows = rows.select(range(min(max_samples, len(rows))))
    if len(rows) == 0:
        raise ValueError("The data set is empty; it needs one prompt per row.")
    return rows[caption_column]


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

    Line breaks in a caption become spaces; rows without a caption are left out. The file is written whole or not at all,
    and left alone if it is there.

    Args:
        file (`Path`): To be written.
        caption_column (`str`), and the others: As of `dataset_prompts`.

    Raises:
        ValueError: If it has no such config, split or column, or a value is no text.
    """
    if file.exists():
        return
    rows = _load(dataset_name, train_data_dir, config_name, split, streaming=True)
    rows = rows.select_columns(caption_column) if rows.column_names and caption_column in rows.column_names else rows
    draft = file.with_name(file.name + ".draft")
    draft.parent.mkdir(parents=True, exist_ok=True)
    with open(draft, "w") as stream:
        for number, row in enumerate(itertools.islice(rows, max_samples)):
            _check_column(list(row), caption_column)
            caption = row[caption_column]
            if caption is not None and not isinstance(caption, str):
                raise ValueError(
                    f"Row {number} of column {caption_column!r} is a {type(caption).__name__}, not a text."
                )
            if caption and caption.strip():
                stream.write(" ".join(caption.split()) + "\n")
    os.replace(draft, file)


def _load(dataset_name: str | None, train_data_dir: str | None, config_name: str | None, split: str, **arguments):
    import datasets

    try:
        if dataset_name is not None:
            return datasets.load_dataset(dataset_name, config_name, split=split, **arguments)
        return datasets.load_dataset("imagefolder", data_dir=train_data_dir, split=split, **arguments)
    except (ValueError, FileNotFoundError, datasets.exceptions.DatasetNotFoundError) as error:
        raise ValueError(f"The data set {dataset_name or train_data_dir!r} cannot be read. {error}") from error


def _check_column(names: Sequence[str], wanted: str) -> None:
    if wanted not in names:
        raise ValueError(f"The data set has no column {wanted!r}; it has {list(names)}. Name one by --caption_column.")


class PromptData:
    """Prompts by number, and their conditions, a pure function of the list of prompts that is asked for.

    If there are few prompts, each is encoded once, beforehand, and kept in CPU memory; or they are read from a cache on
    disk; otherwise every batch is encoded when it is needed.

    Args:
        prompts (`Sequence[str]`): Random access.
        encode (`Callable`): A list of prompts -> a condition, batch first.
        capacity (`int`): The number of prompts up to which they are kept (118 kB each for SD 1.5 in half precision).
        cache (`ConditionCache`, *optional*): A complete one of the same prompts.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        encode: Callable[[list[str]], Condition],
        capacity: int = CAPACITY,
        cache: ConditionCache | None = None,
    ):
        self.cache = cache
        self.prompts = prompts
        self.encode = encode
        self.empty = encode([""])
        self.rows: dict[str, int] = {}
        self.table: Condition | None = None
        if cache is None and len(prompts) <= capacity:
            distinct = list(dict.fromkeys(["", *prompts]))
            parts = [encode(distinct[first : first + 32]) for first in range(0, len(distinct), 32)]
            self.rows = {prompt: row for row, prompt in enumerate(distinct)}
            self.table = {key: torch.cat([part[key].cpu() for part in parts]) for key in parts[0]}

    @property
    def is_encoded(self) -> bool:
        """Whether every condition is there already, so that text encoders are not asked again."""
        return self.cache is not None or self.table is not None

    def conditions(self, prompts: list[str], rows: list[int] | None = None) -> Condition:
        """Batch first, on the CPU or on the text encoder's device.

        Args:
            prompts (`list[str]`): Dropped ones are empty.
            rows (`list[int]`, *optional*): Their numbers, needed if there is a cache; any for dropped ones.
        """
        if self.cache is not None:
            found = self.cache.read(rows)
            for place, prompt in enumerate(prompts):
                if prompt == "":
                    for key, values in found.items():
                        values[place] = self.empty[key][0]
            return found
        if self.table is None:
            return self.encode(prompts)
        rows = torch.tensor([self.rows[prompt] for prompt in prompts])
        return {key: values[rows] for key, values in self.table.items()}

    def batch(self, draw: "Draw", device: torch.device) -> Batch:
        """The batch of a draw, on a device."""
        found = self.conditions(draw.prompts, draw.rows)
        condition = {key: to_device(value, device) for key, value in found.items()}
        negative = {
            key: to_device(value, device).expand(len(draw.prompts), *value.shape[1:])
            for key, value in self.empty.items()
        }
        return Batch(to_device(draw.noise, device), condition, negative, draw.generators)


@dataclass
class Draw:
    """What a slice of a global batch is made of, before its prompts are encoded."""

    noise: Tensor
    prompts: list[str]
    generators: list[torch.Generator]
    rows: list[int]


class PromptBatches(Dataset):
    """Global batch n of a stage, as this process's slices, one per accumulated gradient.

    Sample j of global batch n is a pure function of (seed, stage, n, j): a resumed run needs no loader state, and any
    number of processes and accumulated gradients see the same samples.

    Args:
        prompts (`Sequence[str]`): Random access.
        latent_shape (`tuple[int, int, int]`): `(C, H, W)`.
        seed (`int`): Of the run.
        stage (`int`): 1 or 2.
        batch_size (`int`): Samples of one slice.
        slices (`int`): Accumulated gradients.
        process_index, num_processes (`int`): Of this process.
        proportion_empty_prompts (`float`): The share of samples whose prompt is dropped.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        latent_shape: tuple[int, int, int],
        seed: int,
        stage: int,
        batch_size: int,
        slices: int = 1,
        process_index: int = 0,
        num_processes: int = 1,
        proportion_empty_prompts: float = 0.0,
    ):
        self.prompts = prompts
        self.latent_shape = latent_shape
        self.seed = seed
        self.stage = stage
        self.batch_size = batch_size
        self.slices = slices
        self.process_index = process_index
        self.num_processes = num_processes
        self.proportion_empty_prompts = proportion_empty_prompts

    def __getitem__(self, n: int) -> list[Draw]:
        share = self.batch_size * self.slices
        first = share * self.process_index
        return [
            self._draw(n, range(start, start + self.batch_size))
            for start in range(first, first + share, self.batch_size)
        ]

    def _draw(self, n: int, samples: range) -> Draw:
        noise, prompts, generators, rows = [], [], [], []
        for j in samples:
            state = np.random.SeedSequence([self.seed, self.stage, n, j]).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))
            row = torch.randint(len(self.prompts), (), generator=generator).item()
            dropped = torch.rand((), generator=generator).item() < self.proportion_empty_prompts
            prompts.append("" if dropped else self.prompts[row])
            noise.append(torch.randn(self.latent_shape, generator=generator))
            generators.append(generator)
            rows.append(row)
        return Draw(torch.stack(noise), prompts, generators, rows)

    def loader(self, batches: Iterator[int] | range, num_workers: int = 0) -> torch.utils.data.DataLoader:
        """The given global batches, in order, drawn ahead by `num_workers` processes."""
        return torch.utils.data.DataLoader(
            self,
            sampler=batches,
            batch_size=None,
            num_workers=num_workers,
            persistent_workers=False,
            worker_init_fn=leave_signals_to_the_parent,
        )
