"""How the statistics of colours differ from the teacher's: what collapse and oversaturation show in first."""

from collections.abc import Sequence

from torch import Tensor


class DriftEvaluator:
    """Differences to the teacher's many-step pictures of the same prompts. 0 is best; values are in 0..1 of full scale.

    `drift_mean` and `drift_std` are absolute differences of the mean and of the standard deviation over all pixels,
    averaged over the colour channels; `drift_saturation` is the signed difference of the mean of max - min over the
    channels of a pixel (above 0: more saturated than the teacher).

    Args:
        reference (`Tensor`): The teacher's pictures, RGB in 0..255, `[N, 3, H, W]` uint8.
    """

    def __init__(self, reference: Tensor):
        self.mean, self.std, self.saturation = _statistics(reference)

    def __call__(self, pictures: Tensor, prompts: Sequence[str] = ()) -> dict[str, float]:
        mean, std, saturation = _statistics(pictures)
        return {
            "drift_mean": (mean - self.mean).abs().mean().item(),
            "drift_std": (std - self.std).abs().mean().item(),
            "drift_saturation": (saturation - self.saturation).item(),
        }


def _statistics(pictures: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    values = pictures.float() / 255
    saturation = (values.amax(1) - values.amin(1)).mean()
    return values.mean((0, 2, 3)), values.std((0, 2, 3)), saturation
