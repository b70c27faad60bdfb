"""A small classifier of digits, and the features in which images are compared."""

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from .dataset import NUM_CLASSES


def _stage(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1),
        nn.GroupNorm(8, channels_out),
        nn.SiLU(),
        nn.Conv2d(channels_out, channels_out, 3, padding=1),
        nn.GroupNorm(8, channels_out),
        nn.SiLU(),
    )


class DigitsClassifier(ModelMixin, ConfigMixin):
    """Images -> features; `classify` puts a linear head on them.

    Args:
        channels (`tuple[int, int]`): Of the two stages, each of which halves the side.
        num_features (`int`): Of an image.
    """

    @register_to_config
    def __init__(self, channels: tuple[int, int] = (32, 64), num_features: int = 64):
        super().__init__()
        self.stages = nn.Sequential(_stage(1, channels[0]), _stage(*channels))
        self.project = nn.Linear(channels[1] * 16, num_features)
        self.head = nn.Linear(num_features, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Features.

        Args:
            images (`Tensor`): In 0..1, `[B, 1, 16, 16]`.

        Returns:
            `Tensor`: `[B, num_features]`.
        """
        return nn.functional.silu(self.project(self.stages(images * 2 - 1).flatten(1)))

    def classify(self, features: Tensor) -> Tensor:
        """Logits of the ten digits, `[B, 10]`, of features, `[B, num_features]`."""
        return self.head(features)
