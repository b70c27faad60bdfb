"""What families of transformers on an autoencoder's latents have in common."""

from typing import Any

from torch import Tensor, nn

from .base import ModelFamily


class TransformerFamily(ModelFamily):
    """A teacher whose denoiser is a transformer, in blocks one after the other."""

    network_name = "transformer"

    @staticmethod
    def bottleneck(network: nn.Module) -> nn.Module:
        blocks: Any = network.transformer_blocks
        return blocks[len(blocks) // 2]


class LearnedVarianceFamily(TransformerFamily):
    """A transformer of DiT's kind (arXiv 2212.09748). Of twice as many channels as it is given the first half are its prediction, as
    the stock pipelines take them; the others, a variance, are not trained. Positions are made for one size of images.

    Attributes:
        noun (`str`): What the denoiser is called in messages.
    """

    noun = "transformer"

    def check(self) -> None:
        super().check()
        channels, latents = self.network.config.in_channels, self.pipeline.vae.config.latent_channels
        if channels != latents:
            raise ValueError(
                f"The teacher's transformer takes {channels} channels, but its autoencoder makes {latents}: they belong to "
                "different models."
            )

    @classmethod
    def check_network(cls, config: Any, what: str) -> None:
        given, made = config["in_channels"], config["out_channels"]
        if made not in (None, given, 2 * given):
            raise ValueError(
                f"{what} takes {given} channels and gives {made}: as many, or twice as many, are a prediction, or one with a "
                "variance."
            )

    def resolution(self, resolution: int | None = None) -> int:
        """As of `ModelFamily`.

        Raises:
            ValueError: If it is not the teacher's own: positions of patches are made for that one, and for another one would be
                others when the student is loaded again.
        """
        own = super().resolution()
        if resolution not in (None, own):
            raise ValueError(
                f"--resolution {resolution}: the positions of this {self.noun} are made for {own} pixels. Leave it out."
            )
        return own


def prediction_of(output: Tensor, x_t: Tensor) -> Tensor:
    """A network's output without the variance that may follow, `[B, C, H, W]` as `x_t`."""
    return output[:, : x_t.shape[1]]
