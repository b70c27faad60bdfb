"""A discriminator: a small head on what a score model's network computes at its bottleneck."""

from typing import Any

import torch
from torch import Tensor, nn

from .batch import Condition
from .score_model import ScoreModel


class DiscriminatorHead(nn.Module):
    """One logit for each sample, from features of a denoiser's bottleneck.

    Each position is normalised and projected, the mean over positions is projected again, so that features of any size
    serve. The last layer is zero at first: a density ratio of 1, and no gradient for who is judged.

    Args:
        channels (`int`): Of the features.
        seed (`int`): Of the other layers. The CPU's global random state is left as it is.
    """

    def __init__(self, channels: int, seed: int = 0):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.positions = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, channels), nn.SiLU())
            last = nn.Linear(channels, 1)
            self.sample = nn.Sequential(nn.Linear(channels, channels), nn.SiLU(), last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Logits, `[B]`, of features, `[B, N, C]`."""
        return self.sample(self.positions(features).mean(dim=1)).squeeze(-1).float()


class Discriminator:
    """Judges noisy samples by the features of a score model's bottleneck; a value of `ScoreModel.discriminator`.

    Args:
        head (`nn.Module`): Features -> logits, possibly wrapped for distributed training.
        bottleneck (`nn.Module`): The part of the network whose output is looked at, see `ModelFamily.bottleneck`.
    """

    def __init__(self, head: nn.Module, bottleneck: nn.Module):
        self.head = head
        self.bottleneck = bottleneck

    def __call__(self, score_model: ScoreModel, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Logits, `[B]`, float32. The arguments are those of `ScoreModel.predict`."""
        return self.head(bottleneck_features(score_model, self.bottleneck, x_t, t, condition))


def bottleneck_features(
    score_model: ScoreModel, bottleneck: nn.Module, x_t: Tensor, t: Tensor, condition: Condition
) -> Tensor:
    """What a part of a score model's network gives when the network is asked, `[B, N, C]` in float32, with its graph.

    The whole network is run, by the score model's own way of asking it: wrappers, precision and adapters are as ever.

    Args:
        score_model (`ScoreModel`): Whose network holds the bottleneck.
        bottleneck (`nn.Module`): It gives `[B, C, H, W]` or `[B, N, C]`, or several tensors, of which this is the last.
        x_t, t, condition: As of `ScoreModel.predict`.
    """
    found: list[Any] = []
    hook = bottleneck.register_forward_hook(lambda module, inputs, output: found.append(output))
    try:
        score_model.predict(x_t, t, condition)
    finally:
        hook.remove()
    output = found[0][-1] if isinstance(found[0], tuple) else found[0]
    return (output.flatten(2).transpose(1, 2) if output.ndim == 4 else output).float()
