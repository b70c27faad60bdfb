"""The Frechet distance between images and reference images, in the features of any network."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import Evaluator, Metric


class FrechetDistance(Evaluator):
    """torchmetrics' Frechet distance (FID, arXiv 1706.08500, with features of your choice) to reference images.

    Args:
        features (`nn.Module` or `int`): RGB in 0..1, `[B, 3, H, W]` -> features, `[B, F]`; has `num_features`, F. Or how many
            features of Inception v3 (64, 192, 768 or 2048), which needs `torch-fidelity`, and its download of the weights.
        reference (`Tensor`, *optional*): Real images, RGB in 0..255, `[N, 3, H, W]` uint8, N well above F; by default the
            teacher's, of `prepare`.
        batch_size (`int`): Images per forward pass.

    Raises:
        ModuleNotFoundError: If features of Inception are wanted, and `torch-fidelity` is not installed.
        ValueError: If there are no more reference images than features.
    """

    metrics = {"distance": Metric("distance", "distance", "lower")}

    def __init__(self, features: nn.Module | int = 2048, reference: Tensor | None = None, batch_size: int = 100):
        from torchmetrics.image.fid import FrechetInceptionDistance

        self.batch_size = batch_size
        # Of a network torchmetrics asks for this attribute, which nn.Module does not declare.
        self.num_features: int = features if isinstance(features, int) else features.num_features  # type: ignore[assignment]
        self.metric = FrechetInceptionDistance(features, reset_real_features=False, normalize=True)
        self.has_reference = reference is not None
        if reference is not None:
            self._take(reference)

    def prepare(self, teacher_images: Tensor, prompts: Sequence[str]) -> None:
        """Takes the teacher's images as the reference, unless there is one."""
        if not self.has_reference:
            self._take(teacher_images)

    def __call__(self, images: Tensor, prompts: Sequence[str] = ()) -> dict[str, float]:
        """`{"distance": ...}`; prompts are not looked at."""
        self.metric.reset()
        self._update(images, real=False)
        return {"distance": self.metric.compute().item()}

    def _take(self, reference: Tensor) -> None:
        if len(reference) <= self.num_features:
            raise ValueError(
                f"A Frechet distance in {self.num_features} features needs more reference images than that, but has "
                f"{len(reference)}: raise --num_validation_images."
            )
        self._update(reference, real=True)

    @torch.no_grad()
    def _update(self, images: Tensor, real: bool) -> None:
        for part in images.split(self.batch_size):
            # With a custom network torchmetrics passes floats through as they are; 0..1 is what ours take.
            self.metric.update(part.to(self.metric.device).float() / 255, real=real)
