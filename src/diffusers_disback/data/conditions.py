"""What samples are conditioned on, and what every sample of every batch is made of."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..models.batch import NO_LABEL, Batch, Condition, to_device
from ..training.signals import leave_signals_to_the_parent
from .cache import ConditionCache


CAPACITY = 4096  # prompts whose conditions are kept in memory


class ConditionSource(Protocol):
    """Conditions by number. What a sample's condition is depends on its row, and on whether it was dropped, alone.

    Attributes:
        captions (`Sequence[str]`): What each row is called: its prompt, or its label. Equal rows have equal captions.
        empty (`Condition`): The negative one, which also stands for those that were dropped; one row.
        is_encoded (`bool`): Whether every condition is there already, so that encoders are not asked again.
    """

    @property
    def captions(self) -> Sequence[str]: ...

    @property
    def empty(self) -> Condition: ...

    @property
    def is_encoded(self) -> bool: ...

    def __len__(self) -> int:
        """The number of rows."""

    def condition(self, rows: list[int], dropped: list[bool]) -> Condition:
        """Conditions, batch first.

        Args:
            rows (`list[int]`): Their numbers.
            dropped (`list[bool]`): In whose place the empty one is given.
        """


class PromptConditions:
    """The conditions of prompts.

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
        self.captions = prompts
        self.encode = encode
        self.empty = encode([""])
        self.places: dict[str, int] = {}  # in the table
        self.table: Condition | None = None
        if cache is None and len(prompts) <= capacity:
            distinct = list(dict.fromkeys(["", *prompts]))
            parts = [encode(distinct[first : first + 32]) for first in range(0, len(distinct), 32)]
            self.places = {prompt: place for place, prompt in enumerate(distinct)}
            self.table = {key: torch.cat([part[key].cpu() for part in parts]) for key in parts[0]}

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def is_encoded(self) -> bool:
        """Whether every condition is there already, so that text encoders are not asked again."""
        return self.cache is not None or self.table is not None

    def condition(self, rows: list[int], dropped: list[bool]) -> Condition:
        """Batch first, on the CPU or on the text encoder's device; see `ConditionSource`."""
        if self.cache is not None:
            return _with_empty(self.cache.read(rows), dropped, self.empty)
        prompts = ["" if without else self.captions[row] for row, without in zip(rows, dropped, strict=True)]
        if self.table is None:
            return self.encode(prompts)
        places = torch.tensor([self.places[prompt] for prompt in prompts])
        return {key: values[places] for key, values in self.table.items()}


class ClassLabels:
    """Class labels as conditions, each as often as the others. Without a label for none there is no guidance.

    Args:
        num_classes (`int`): Labels are 0..`num_classes` - 1, without the one for none.
        null_label (`int`, *optional*): That stands for no class, where the network was trained with one.
        key (`str`): The network's argument.
    """

    is_encoded = True

    def __init__(self, num_classes: int, null_label: int | None = None, key: str = "class_labels"):
        self.labels = [label for label in range(num_classes) if label != null_label]
        self.captions = [str(label) for label in self.labels]
        self.key = key
        self.empty: Condition = {} if null_label is None else {key: torch.tensor([null_label])}

    def __len__(self) -> int:
        return len(self.captions)

    def condition(self, rows: list[int], dropped: list[bool]) -> Condition:
        """The labels, `[B]`; see `ConditionSource`.

        Raises:
            ValueError: If one is dropped, and no label stands for none.
        """
        if any(dropped) and not self.empty:
            raise ValueError(
                "Labels cannot be dropped: no label stands for no class. Pass --proportion_empty_prompts 0."
            )
        return _with_empty({self.key: torch.tensor([self.labels[row] for row in rows])}, dropped, self.empty)


def labels_of(captions: list[str], number: int) -> Tensor:
    """Class labels that are written as texts, `[N]`.

    Raises:
        ValueError: If one is no number in 0..`number` - 1.
    """
    for caption in captions:
        if not (caption.isascii() and caption.isdigit() and int(caption) < number):
            raise ValueError(f"{caption!r} is no class label of the teacher: these are the numbers 0..{number - 1}.")
    return torch.tensor([int(caption) for caption in captions])


class NoCondition:
    """No condition: every sample is of the same distribution."""

    is_encoded = True

    def __init__(self) -> None:
        self.captions = [NO_LABEL]
        self.empty: Condition = {}

    def __len__(self) -> int:
        return 1

    def condition(self, rows: list[int], dropped: list[bool]) -> Condition:
        """Nothing; see `ConditionSource`."""
        return {}


def _with_empty(condition: Condition, dropped: list[bool], empty: Condition) -> Condition:
    """A condition with the empty one in the place of rows that are dropped."""
    for place, without in enumerate(dropped):
        if without:
            for key, values in condition.items():
                values[place] = empty[key][0]
    return condition


def batch_of(draw: "Draw", source: ConditionSource, device: torch.device) -> Batch:
    """The batch of a draw, on a device."""
    found = source.condition(draw.rows, draw.dropped)
    condition = {key: to_device(value, device) for key, value in found.items()}
    negative = {
        key: to_device(value, device).expand(len(draw.rows), *value.shape[1:]) for key, value in source.empty.items()
    }
    return Batch(to_device(draw.noise, device), condition, negative, draw.generators)


@dataclass
class Draw:
    """What a slice of a global batch is made of, before its conditions are looked up.

    Args:
        noise (`Tensor`): Standard normal, `[B, C, H, W]`.
        rows (`list[int]`): Of the conditions.
        dropped (`list[bool]`): Whose condition is the empty one.
        generators (`list[torch.Generator]`): One per sample.
    """

    noise: Tensor
    rows: list[int]
    dropped: list[bool]
    generators: list[torch.Generator]


@dataclass(eq=False)
class Batches(Dataset):
    """Global batch n of a stage, as this process's slices, one per accumulated gradient.

    Sample j of global batch n is a pure function of (seed, stage, n, j): a resumed run needs no loader state, and any
    number of processes and accumulated gradients see the same samples.

    Args:
        num_conditions (`int`): The length of the source of conditions.
        latent_shape (`tuple[int, int, int]`): `(C, H, W)`.
        seed (`int`): Of the run.
        stage (`int`): 1 or 2.
        batch_size (`int`): Samples of one slice.
        slices (`int`): Accumulated gradients.
        process_index, num_processes (`int`): Of this process.
        proportion_empty (`float`): The share of samples whose condition is dropped.
    """

    num_conditions: int
    latent_shape: tuple[int, int, int]
    seed: int
    stage: int
    batch_size: int
    slices: int = 1
    process_index: int = 0
    num_processes: int = 1
    proportion_empty: float = 0.0

    def __getitem__(self, n: int) -> list[Draw]:
        share = self.batch_size * self.slices
        first = share * self.process_index
        return [
            self._draw(n, range(start, start + self.batch_size))
            for start in range(first, first + share, self.batch_size)
        ]

    def _draw(self, n: int, samples: range) -> Draw:
        noise, rows, dropped, generators = [], [], [], []
        for j in samples:
            state = np.random.SeedSequence([self.seed, self.stage, n, j]).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))
            rows.append(int(torch.randint(self.num_conditions, (), generator=generator)))
            dropped.append(torch.rand((), generator=generator).item() < self.proportion_empty)
            noise.append(torch.randn(self.latent_shape, generator=generator))
            generators.append(generator)
        return Draw(torch.stack(noise), rows, dropped, generators)

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
