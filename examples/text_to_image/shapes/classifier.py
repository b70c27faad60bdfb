"""A small classifier of shape, colour and background, and the features of the Frechet distance."""

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from .dataset import BACKGROUNDS, COLOURS, SHAPES


ATTRIBUTES = {"shape": SHAPES, "colour": tuple(COLOURS), "background": tuple(BACKGROUNDS)}


def _stage(channels_in: int, channels_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1),
        nn.GroupNorm(8, channels_out),
        nn.SiLU(),
        nn.Conv2d(channels_out, channels_out, 3, padding=1),
        nn.GroupNorm(8, channels_out),
        nn.SiLU(),
    )


class ShapesClassifier(ModelMixin, ConfigMixin):
    """Images -> features; `classify` puts one linear head per attribute on them.

    The features are pooled over the image, so they are made for what an image shows, not for where.
    """

    @register_to_config
    def __init__(self, channels: tuple[int, ...] = (16, 32, 64), num_features: int = 64):
        super().__init__()
        widths = (3, *channels)
        self.stages = nn.Sequential(*(_stage(a, b) for a, b in zip(widths, widths[1:], strict=False)))
        self.project = nn.Linear(channels[-1] * 16, num_features)
        self.heads = nn.ModuleDict({name: nn.Linear(num_features, len(words)) for name, words in ATTRIBUTES.items()})
        self.num_features = num_features

    def forward(self, images: Tensor) -> Tensor:
        """Penultimate features.

        Args:
            images (`Tensor`): RGB in 0..1, `[B, 3, 64, 64]`.

        Returns:
            `Tensor`: `[B, num_features]`.
        """
        maps = self.stages(images * 2 - 1)
        pooled = nn.functional.adaptive_avg_pool2d(maps, 4).flatten(1)
        return nn.functional.silu(self.project(pooled))

    def classify(self, images: Tensor) -> dict[str, Tensor]:
        """Logits of every attribute, `[B, number of words]` each."""
        features = self(images)
        return {name: head(features) for name, head in self.heads.items()}
