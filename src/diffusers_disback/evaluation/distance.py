"""The Frechet distance between images and reference images, in the features of a module of yours."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import FeatureEvaluator, Metric


class FrechetDistance(FeatureEvaluator):
    """torchmetrics' Frechet distance (FID, arXiv 1706.08500, with features of your choice) to reference images. By name there
    are `fid_to_teacher` and `fid`, in features of a network on the Hub.

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
        whole = FrechetInceptionDistance(features, normalize=True)
        self.network, self.takes_bytes = whole.inception, not whole.used_custom_model
        self.compares_with_teacher = reference is None
        if reference is not None:
            self.compare_with(self.features(reference))

    def compare_with(self, features: Tensor) -> None:
        """Takes the features of the reference images."""
        from torchmetrics.image.fid import FrechetInceptionDistance

        if len(features) <= self.num_features:
            raise ValueError(
                f"A Frechet distance in {self.num_features} features needs more reference images than that, but has "
                f"{len(features)}: raise --num_validation_images."
            )
        self.metric = FrechetInceptionDistance(
            _Given(self.num_features),
            reset_real_features=False,
            sync_on_compute=False,  # one process has all images and measures them alone
        )
        self.metric.update(features, real=True)

    def __call__(self, images: Tensor, prompts: Sequence[str] = ()) -> dict[str, float]:
        """`{"distance": ...}`; prompts are not looked at."""
        return super().__call__(images, prompts)

    @torch.no_grad()
    def features(self, images: Tensor, prompts: Sequence[str] = ()) -> Tensor:
        """The network's, `[N, F]`; prompts are not looked at."""
        device = next((parameter.device for parameter in self.network.parameters()), torch.device("cpu"))
        return torch.cat([self._embed(part.to(device)).cpu() for part in images.split(self.batch_size)])

    def measure(self, features: Tensor, groups: Tensor) -> dict[str, float]:
        """`{"distance": ...}`; groups are not looked at."""
        self.metric.reset()
        self.metric.update(features, real=False)
        return {"distance": self.metric.compute().item()}

    def _embed(self, images: Tensor) -> Tensor:
        made: Tensor = self.network(images if self.takes_bytes else images.float() / 255)
        return made


class _Given(nn.Identity):
    """Features that are there already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features
