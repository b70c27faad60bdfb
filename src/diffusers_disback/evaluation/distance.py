"""The Frechet distance between pictures and reference pictures, in the features of any network."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class FrechetDistance:
    """torchmetrics' Frechet distance (FID, arXiv 1706.08500, with features of your choice) to reference pictures.

    Args:
        features (`nn.Module`): RGB in 0..1, `[B, 3, H, W]` -> features, `[B, F]`; has `num_features`, F.
        reference (`Tensor`): Real pictures, RGB in 0..255, `[N, 3, H, W]` uint8; N well above F.
        batch_size (`int`): Pictures per forward pass.
    """

    def __init__(self, features: nn.Module, reference: Tensor, batch_size: int = 100):
        from torchmetrics.image.fid import FrechetInceptionDistance

        self.batch_size = batch_size
        self.metric = FrechetInceptionDistance(features, reset_real_features=False, normalize=True)
        self._update(reference, real=True)

    def __call__(self, pictures: Tensor, prompts: Sequence[str] = ()) -> dict[str, float]:
        """`{"distance": ...}`; prompts are not looked at."""
        self.metric.reset()
        self._update(pictures, real=False)
        return {"distance": self.metric.compute().item()}

    @torch.no_grad()
    def _update(self, pictures: Tensor, real: bool) -> None:
        for part in pictures.split(self.batch_size):
            # With a custom network torchmetrics passes floats through as they are; 0..1 is what ours take.
            self.metric.update(part.to(self.metric.device).float() / 255, real=real)
