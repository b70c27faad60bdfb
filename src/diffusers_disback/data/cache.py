"""The conditions of many prompts on disk: encoded once, in half precision, read row by row."""

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..models.batch import Condition
from ..models.weights import open_weights, save_weights


logger = logging.getLogger(__name__)
_SMALL = 64  # numbers a row, such as an image's size: kept as they are


@dataclass(eq=False)
class ConditionCache:
    """Row i is the condition of prompt i. Shards are written whole or not at all: what was cut off is resumed.

    Args:
        root (`str` or `Path`): Of all caches; each has a folder of its own in it, named by what its rows depend on.
        prompts (`Sequence[str]`): Random access.
        encode (`Callable`): A list of prompts -> a condition, batch first.
        encoder_id (`Callable`): What `encode` depends on, as a text; asked when the cache is looked for on disk.
        shard_size (`int`): Rows of a file.
        batch_size (`int`): Prompts that are encoded at once.
    """

    root: str | Path
    prompts: Sequence[str]
    encode: Callable[[list[str]], Condition]
    encoder_id: Callable[[], str]
    shard_size: int = 512
    batch_size: int = 32

    @cached_property
    def folder(self) -> Path:
        """Of this cache."""
        key = hashlib.sha256(f"{self.encoder_id()} {digest(self.prompts)} {self.shard_size}".encode()).hexdigest()
        return Path(self.root, key[:16])

    @cached_property
    def bytes_per_prompt(self) -> int:
        """That a row takes on disk: 118 kB for SD 1.5, 318 kB for SDXL."""
        row = _stored(self.encode([self.prompts[0]]))
        return sum(tensor.numel() * tensor.element_size() for tensor in row.values())

    @property
    def missing(self) -> int:
        """Bytes that are still to be written."""
        rows = sum(len(rows) for shard, rows in self._shards() if not self._is_whole(shard))
        return rows * self.bytes_per_prompt

    def build(self, show_progress: bool = True) -> None:
        """Writes the shards that are not there yet, or not whole.

        Raises:
            ValueError: If a condition has values beyond half precision, or nothing can be written there.
        """
        shards = list(self._shards())
        if all(self._is_whole(shard) for shard, _ in shards):
            return  # it may lie where nothing can be written
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"Conditions cannot be written to {self.folder} ({error.strerror or error}). Pass a folder that can be "
                "written to with --cache_dir, or --cache_conditions off."
            ) from error
        for shard, rows in tqdm(shards, desc="conditions", unit="shard", disable=not show_progress):
            file = self._file(shard)
            if self._is_whole(shard):
                continue
            if file.exists():
                logger.warning(f"{file} is damaged; its conditions are encoded anew.")
            parts = []
            for first in range(rows.start, rows.stop, self.batch_size):
                batch = range(first, min(first + self.batch_size, rows.stop))
                parts.append(_stored(self.encode([self.prompts[row] for row in batch])))
            draft = file.with_name(f"{file.name}.{os.getpid()}.draft")
            save_weights({key: torch.cat([part[key] for part in parts]) for key in parts[0]}, draft)
            os.replace(draft, file)

    def read(self, rows: list[int]) -> Condition:
        """The conditions of rows, batch first, on the CPU, in float32; whole numbers as they are."""
        found: dict[str, list[torch.Tensor]] = {}
        for row in rows:
            shard, place = divmod(row, self.shard_size)
            stream = _open(str(self._file(shard)))
            for key in stream.keys():  # noqa: SIM118, it is no dictionary
                value = stream.get_slice(key)[place : place + 1]
                found.setdefault(key, []).append(value.float() if value.is_floating_point() else value)
        return {key: torch.cat(values) for key, values in found.items()}

    def _shards(self) -> Iterator[tuple[int, range]]:
        for shard, first in enumerate(range(0, len(self.prompts), self.shard_size)):
            yield shard, range(first, min(first + self.shard_size, len(self.prompts)))

    def _is_whole(self, shard: int) -> bool:
        """Whether a shard is there and can be read: of one that was cut off, the header says another size."""
        try:
            with open_weights(self._file(shard)):
                return True
        except ValueError:
            return False

    def _file(self, shard: int) -> Path:
        return self.folder / f"conditions-{shard:06d}.safetensors"


def choose_cache(cache: ConditionCache, wanted: str, in_memory: int) -> tuple[bool, str]:
    """Whether conditions are to be cached on disk, and why, in words.

    Args:
        cache (`ConditionCache`): Not built yet, or in part.
        wanted (`str`): `auto`, `disk` or `off`.
        in_memory (`int`): The number of prompts up to which `auto` keeps them in memory.

    Raises:
        ValueError: If `disk` is wanted and there is too little of it.
    """
    number = len(cache.prompts)
    if wanted == "off":
        return False, f"conditions of {number:,} prompts are encoded on the fly"
    each = f"{number:,} prompts x {cache.bytes_per_prompt / 1e3:.0f} kB"
    if wanted == "auto" and number <= in_memory:
        return False, f"conditions ({each} in half precision) are kept in memory, in float32"
    place = cache.folder
    while not place.exists():
        place = place.parent
    missing, free = cache.missing, shutil.disk_usage(place).free
    size = f"{each}, {missing / 1e9:.3g} GB of it still to be written"
    if wanted == "auto" and missing > free / 2:
        return False, f"conditions ({size}) would take more than half of the free disk: they are encoded on the fly"
    if missing > free:
        raise ValueError(f"Conditions ({size}) do not fit into the {free / 1e9:.3g} GB that are free at {place}.")
    return True, f"conditions ({size}) are cached in {cache.folder}"


def digest(prompts: Sequence[str]) -> str:
    """A SHA-256 of prompts in their order."""
    own: Any = getattr(prompts, "digest", None)
    if own is not None:
        return own()
    content = hashlib.sha256()
    for prompt in prompts:
        content.update(prompt.encode() + b"\n")
    return content.hexdigest()


def is_kept_whole(tensor: torch.Tensor) -> bool:
    """Whether a condition's values, a row each, lie on disk in their own precision."""
    return tensor.numel() <= _SMALL * len(tensor) or not tensor.is_floating_point()


def _stored(condition: Condition) -> Condition:
    """A condition as it lies on disk."""
    stored = {}
    for key, tensor in condition.items():
        tensor = tensor.detach().cpu()
        stored[key] = tensor.contiguous() if is_kept_whole(tensor) else tensor.half().contiguous()
        if not stored[key].isfinite().all():
            raise ValueError(f"{key} has values beyond half precision; pass --cache_conditions off.")
    return stored


@lru_cache(maxsize=64)
def _open(file: str) -> Any:
    return open_weights(file)
