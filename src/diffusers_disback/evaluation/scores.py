"""How well an image goes with its prompt, and how much people would like it: scores of CLIPs."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from .base import FeatureEvaluator, Metric
from .networks import FeatureNetwork, FeatureNetworks


VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""Whose preprocessor and tokenizer PickScore and HPS v2 were trained with. MIT."""


class _TextImageScore(FeatureEvaluator):
    """The mean over images of a number that follows from the cosine of the features of image and prompt.

    Args:
        model (`str`): A CLIP: see `FeatureNetwork`.
        processor (`str`, *optional*): Where its preprocessor and tokenizer lie, if not beside it.
        networks (`FeatureNetworks`, *optional*): Where it is loaded, once for all who use it; by default for the CPU.

    Raises:
        ValueError: If the network cannot be loaded, or has no text encoder.
    """

    def __init__(self, model: str, processor: str | None, networks: FeatureNetworks | None):
        self.network: FeatureNetwork = (networks or FeatureNetworks()).load(model, processor)
        self.network.check_takes_text()

    def features(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The score of each image, `[N]`."""
        cosines = cosine_similarity(self.network.image_features(images), self.network.text_features(prompts))
        return self.score(cosines)

    def measure(self, features: Tensor, groups: Tensor) -> dict[str, float]:
        """The mean score; groups are not looked at."""
        (name,) = self.metrics
        return {name: features.mean(dtype=torch.float64).item()}

    def score(self, cosines: Tensor) -> Tensor:
        """The number of each image that is averaged, `[N]`, by default a hundred times the cosine."""
        return 100 * cosines


class ClipScore(_TextImageScore):
    """100 max(cos, 0), averaged over the images (CLIPScore, arXiv 2104.08718, with 100 in place of its 2.5, as torchmetrics has
    it).

    Args:
        clip_model (`str`): A CLIP; by default OpenAI's ViT-L/14.
        networks (`FeatureNetworks`, *optional*): Where it is loaded.
    """

    def __init__(self, clip_model: str = "openai/clip-vit-large-patch14", networks: FeatureNetworks | None = None):
        super().__init__(clip_model, None, networks)
        self.metrics = {"clip_score": Metric(f"CLIP score ({self.network.label})", "clip_score", "higher")}

    def score(self, cosines: Tensor) -> Tensor:
        """100 max(cos, 0)."""
        return 100 * cosines.clamp_min(0)


class PickScore(_TextImageScore):
    """exp(logit scale) cos, averaged over the images (PickScore, arXiv 2305.01569).

    Args:
        pick_model (`str`): A CLIP that was trained on preferences.
        pick_processor (`str`): Where its preprocessor and tokenizer lie.
        networks (`FeatureNetworks`, *optional*): Where it is loaded.
    """

    def __init__(
        self,
        pick_model: str = "yuvalkirstain/PickScore_v1",
        pick_processor: str = VIT_H,
        networks: FeatureNetworks | None = None,
    ):
        super().__init__(pick_model, pick_processor, networks)
        self.metrics = {"pick_score": Metric(f"PickScore ({self.network.label})", "pick_score", "higher")}

    def score(self, cosines: Tensor) -> Tensor:
        """exp(logit scale) cos."""
        return self.network.logit_scale * cosines


class HumanPreferenceScore(_TextImageScore):
    """100 cos, averaged over the images (HPS v2, arXiv 2306.09341).

    Args:
        hps_model (`str`): A CLIP that was trained on preferences, in transformers' layout.
        hps_processor (`str`): Where its preprocessor and tokenizer lie.
        networks (`FeatureNetworks`, *optional*): Where it is loaded.
    """

    def __init__(
        self,
        hps_model: str = "adams-story/HPSv2-hf",
        hps_processor: str = VIT_H,
        networks: FeatureNetworks | None = None,
    ):
        super().__init__(hps_model, hps_processor, networks)
        self.metrics = {"hps_v2": Metric(f"HPS v2 ({self.network.label})", "hps_v2", "higher")}
