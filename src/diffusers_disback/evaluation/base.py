"""What an evaluator is, and how the numbers that it returns are to be read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

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

    def is_worse(self, value: float, other: float) -> bool:
        """Whether a value is worse than another."""
        if self.direction == "zero":
            return abs(value) > abs(other)
        return value < other if self.direction == "higher" else value > other


class Evaluator(Protocol):
    """Measures images. It is constructed without arguments when it is chosen by name; what it compares with is given to
    `prepare`, once, before anything is measured.

    Attributes:
        metrics (`dict[str, Metric]`): All that it measures, by name.
    """

    metrics: dict[str, Metric]

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
