"""f-distill: distribution matching with the gradient of other f-divergences than the reverse KL divergence."""

from typing import Literal

import torch
from torch import Tensor

from ..models.batch import Condition
from ..models.score_model import ScoreModel
from .variational import DistributionMatching


class FDivergence(DistributionMatching):
    """Weights each sample's difference of scores by the density ratio `r = p_target(x_t) / p_fake(x_t)`.

    The gradient of an f-divergence is that of the reverse KL divergence times `h(r) = f''(r) r**2` (f-distill, arXiv 2502.15681,
    Theorem 1): 1 for the reverse KL divergence, `r` for the forward one, `2 r / (1 + r)` for Jensen-Shannon, each scaled so
    that `h(1) = 1`. The ratio is that of a discriminator, `exp(logit)` (its section 3.3). There is no normalisation over a batch, which
    would make a sample's weight depend on how a batch is sliced; instead the ratio is bounded.

    Args:
        divergence (`str`): `jensen_shannon`, `forward_kl`, or `reverse_kl`, which is `dmd`.
        max_ratio (`float`): The bound of `r` from above.

    Raises:
        ValueError: If the divergence is none of them, or the bound is below 1.
    """

    def __init__(
        self,
        divergence: Literal["jensen_shannon", "forward_kl", "reverse_kl"] = "jensen_shannon",
        max_ratio: float = 10.0,
    ):
        if divergence not in ("jensen_shannon", "forward_kl", "reverse_kl"):
            raise ValueError(f"divergence={divergence!r} is none of jensen_shannon, forward_kl, reverse_kl.")
        if max_ratio < 1:
            raise ValueError(f"max_ratio={max_ratio} has to be at least 1.")
        self.divergence = divergence
        self.max_ratio = max_ratio
        self.needs_discriminator = divergence != "reverse_kl"

    def density_weight(self, fake_score: ScoreModel, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        if not self.needs_discriminator:
            return super().density_weight(fake_score, x_t, t, condition)
        ratio = fake_score.logits(x_t, t, condition).exp().clamp_max(self.max_ratio)  # [B]
        weight = ratio if self.divergence == "forward_kl" else 2 * ratio / (1 + ratio)
        return weight.view(-1, *[1] * (x_t.ndim - 1)).to(torch.float32)
