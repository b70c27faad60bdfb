"""How the statistics of colours differ from the teacher's: what collapse and oversaturation show in first."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import FeatureEvaluator, Metric


class DriftEvaluator(FeatureEvaluator):
    """Differences to the teacher's many-step images of the same prompts. 0 is best; values are in 0..1 of full scale.

    `drift_mean` and `drift_std` are absolute differences of the mean and of the standard deviation over all pixels,
    averaged over the colour channels; `drift_saturation` is the signed difference of the mean of max - min over the
    channels of a pixel (above 0: more saturated than the teacher).
    """

    metrics = {
        "drift_mean": Metric("drift mean", "drift", "zero"),
        "drift_std": Metric("drift std", "drift", "zero"),
        "drift_saturation": Metric("drift saturation", "drift", "zero"),
    }

    compares_with_teacher = True

    def prepare(self, teacher_images: Tensor, prompts: Sequence[str] = ()) -> None:
        """As of `Evaluator`; prompts are not looked at."""
        super().prepare(teacher_images, prompts)

    def compare_with(self, features: Tensor) -> None:
        """Takes the statistics of the teacher's images."""
        self.mean, self.std, self.saturation = _statistics(features)

    def __call__(self, images: Tensor, prompts: Sequence[str] = ()) -> dict[str, float]:
        """As of `Evaluator`; prompts are not looked at."""
        return super().__call__(images, prompts)

    def features(self, images: Tensor, prompts: Sequence[str] = ()) -> Tensor:
        """Sums over an image's pixels, `[N, 8]` float64: of the channels, of their squares, of max - min, and of 1."""
        return torch.cat([_sums(part.double()) for part in images.split(50)])

    def measure(self, features: Tensor, groups: Tensor) -> dict[str, float]:
        """The three differences; groups are not looked at."""
        mean, std, saturation = _statistics(features)
        return {
            "drift_mean": (mean - self.mean).abs().mean().item(),
            "drift_std": (std - self.std).abs().mean().item(),
            "drift_saturation": (saturation - self.saturation).item(),
        }


def _sums(values: Tensor) -> Tensor:
    saturation, ones = values.amax(1) - values.amin(1), torch.ones_like(values[:, 0])
    single = torch.stack([each.sum((1, 2)) for each in (saturation, ones)], 1)
    return torch.cat([values.sum((2, 3)), values.square().sum((2, 3)), single], 1)


def _statistics(sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    total = sums.sum(0)
    pixels, mean = total[7], total[:3] / total[7]
    variance = (total[3:6] - pixels * mean.square()).clamp_min(0) / (pixels - 1)
    return mean / 255, variance.sqrt() / 255, total[6] / pixels / 255
