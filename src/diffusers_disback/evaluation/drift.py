"""How the statistics of colours differ from the teacher's: what collapse and oversaturation show in first."""

from collections.abc import Sequence

from torch import Tensor

from .base import Evaluator, Metric


class DriftEvaluator(Evaluator):
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

    def prepare(self, teacher_images: Tensor, prompts: Sequence[str] = ()) -> None:
        """Takes the statistics of the teacher's images; prompts are not looked at."""
        self.mean, self.std, self.saturation = _statistics(teacher_images)

    def __call__(self, images: Tensor, prompts: Sequence[str] = ()) -> dict[str, float]:
        mean, std, saturation = _statistics(images)
        return {
            "drift_mean": (mean - self.mean).abs().mean().item(),
            "drift_std": (std - self.std).abs().mean().item(),
            "drift_saturation": (saturation - self.saturation).item(),
        }


def _statistics(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    values = images.float() / 255
    saturation = (values.amax(1) - values.amin(1)).mean()
    return values.mean((0, 2, 3)), values.std((0, 2, 3)), saturation
