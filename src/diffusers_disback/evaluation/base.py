"""What an evaluator is, and how the numbers that it returns are to be read."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Metric:
    """How a number that an evaluator returns is to be read.

    Args:
        label (`str`): Its name in words.
        panel (`str`): The plot on which it is drawn, beside others of its kind; also its type in a card's metadata.
        direction (`str`): Which is better, `higher` or `lower`; or `zero`: it is a difference to the teacher's images, and
            better the nearer it is to 0, where the teacher is.
    """

    label: str
    panel: str
    direction: Literal["higher", "lower", "zero"]

    def loss(self, value: float) -> float:
        """A value as a number of which less is better."""
        if self.direction == "zero":
            return abs(value)
        return -value if self.direction == "higher" else value

    def is_worse(self, value: float, other: float) -> bool:
        """Whether a value is worse than another."""
        return self.loss(value) > self.loss(other)


class Evaluator(Protocol):
    """Measures images. One that is chosen by name is constructed with those of `--evaluator_args` that it takes; what it
    compares with is given to `prepare`, once, before anything is measured.

    Attributes:
        metrics (`dict[str, Metric]`): All that it measures, by name.
        compares_with_teacher (`bool`): Whether it measures nothing before `prepare` gave it the teacher's images.
        compares_distributions (`bool`): Whether it does so without pairing images. The teacher's images that it is given are then
            others than those that the teacher itself is measured by, whose distance would be 0 otherwise.
    """

    metrics: dict[str, Metric]
    compares_with_teacher: bool = False
    compares_distributions: bool = False

    def prepare(self, teacher_images: Tensor, prompts: Sequence[str]) -> None:
        """Takes what the run has of the teacher; by default nothing is needed.

        Args:
            teacher_images (`Tensor`): The teacher's many-step images, RGB in 0..255, `[N, 3, H, W]` uint8.
            prompts (`Sequence[str]`): Their prompts, N; those of all images that are measured.
        """

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        """Measures images.

        Args:
            images (`Tensor`): RGB in 0..255, `[N, 3, H, W]` uint8.
            prompts (`Sequence[str]`): What they were sampled for, N.

        Returns:
            `dict[str, float]`: A number for each of `metrics`.
        """
        ...


class FeatureEvaluator(Evaluator, ABC):
    """An evaluator in two steps: features of each image by itself, then numbers from all of them. The first is the costly one;
    the second is repeated to estimate how certain the numbers are (`confidence_intervals`).

    Attributes:
        teacher_features (`Tensor`, *optional*): Of the teacher's images, after `prepare`, if it `compares_with_teacher`.
    """

    teacher_features: Tensor | None = None

    @abstractmethod
    def features(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Features, `[N, ...]` on the CPU, a row for each image, that depends on it and on its prompt alone. Arguments as of
        `__call__`."""

    @abstractmethod
    def measure(self, features: Tensor, groups: Tensor) -> dict[str, float]:
        """Numbers from features.

        Args:
            features (`Tensor`): `[N, ...]`.
            groups (`Tensor`): Which images are of one prompt: equal numbers, `[N]` int64.

        Returns:
            `dict[str, float]`: A number for each of `metrics`.
        """

    def compare_with(self, features: Tensor) -> None:
        """Takes the features of what images are compared with. Called if it `compares_with_teacher`, also for intervals, on a
        copy: it assigns attributes, and changes none in place.

        Args:
            features (`Tensor`): Of the teacher's images of the same prompts, in their order, `[N, ...]`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what it takes of the teacher.")

    def prepare(self, teacher_images: Tensor, prompts: Sequence[str]) -> None:
        """As of `Evaluator`: features of the teacher's images go to `compare_with`, if it `compares_with_teacher`."""
        if self.compares_with_teacher:
            self.teacher_features = self.features(teacher_images, prompts)
            self.compare_with(self.teacher_features)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> dict[str, float]:
        """As of `Evaluator`."""
        return self.measure(self.features(images, prompts), groups_of(prompts))


def check_measures(evaluator: Evaluator, measures: dict[str, float]) -> None:
    """Raises a `ValueError` unless an evaluator has measured what it says that it measures."""
    if measures.keys() != evaluator.metrics.keys():
        raise ValueError(
            f"{type(evaluator).__name__} measures {', '.join(measures)}, but its metrics are {', '.join(evaluator.metrics)}."
        )


def groups_of(prompts: Sequence[str]) -> Tensor:
    """The number of each prompt among the distinct ones, in the order of their first occurrence, `[N]` int64."""
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    return torch.tensor([numbers[prompt] for prompt in prompts], dtype=torch.int64)
