"""What families have in common whose pipelines take prompts: text encoders, tokenizers, and an autoencoder."""

import copy
import hashlib
import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..data.conditions import ConditionSource, PromptConditions
from ..data.truncation import told_once
from ..hub.cards import Usage
from ..models.weights import fingerprint
from .base import ModelFamily
from .latents import encode_to_latents, stride_of_autoencoder


TOKENS = 77  # of a prompt, for CLIP
_ENCODED: tuple[str, ...] = (
    "prompt_embeds",
    "negative_prompt_embeds",
    "pooled_prompt_embeds",
    "negative_pooled_prompt_embeds",
)


class TextFamily(ModelFamily):
    """A teacher whose conditions are encoded prompts, and whose denoiser works on an autoencoder's latents.

    A family of these has to say how prompts are encoded for its denoiser (`encode`), and how it is called with them
    (`call`). Images are sampled by the stock pipeline, from embeddings that were encoded before.
    """

    takes_prompts = True
    usage = Usage()
    encoding = "text"  # a name of what `encode` does, by which caches of conditions are told apart
    encoders: tuple[str, ...] = ("text_encoder",)
    encoded_as = _ENCODED  # the stock pipeline's arguments, in the order of what its encode_prompt gives
    call_settings: dict[str, Any] = {}  # what its call is given besides, so that it draws at the size that it is given
    most_tokens: dict[
        str, int
    ] = {}  # of a prompt, by tokenizer, where the stock call reads fewer than the tokenizer gives
    needed: tuple[str, ...] = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")

    def conditions(self, prompts: Sequence[str] | None = None, resolution: int | None = None) -> ConditionSource:
        return PromptConditions([] if prompts is None else prompts, partial(self.encode, resolution=resolution))

    @property
    def stride(self) -> int:
        return self.pipeline.vae_scale_factor

    @classmethod
    def stride_of(cls, others: dict[str, nn.Module]) -> int:
        return stride_of_autoencoder(others["vae"])

    @property
    def text_encoders(self) -> list[Any]:
        """Whose outputs condition the denoiser."""
        encoders = [self.pipeline.components.get(name) for name in self.encoders]
        return [encoder for encoder in encoders if encoder is not None]

    @property
    def tokenizers(self) -> list[Any]:
        """Of the text encoders, in their order, and with the number of tokens that the stock call reads."""
        names = [name for name in (*self.needed, *self.may_be_absent) if name.startswith("tokenizer")]
        found = {name: self.pipeline.components[name] for name in names}
        return [self._reading(name, one) for name, one in found.items() if one is not None]

    def _reading(self, name: str, tokenizer: Any) -> Any:
        most = self.most_tokens.get(name)
        if most is None:
            return tokenizer
        tokenizer = copy.copy(tokenizer)
        tokenizer.model_max_length = min(tokenizer.model_max_length, most)
        return tokenizer

    def encoder_id(self, resolution: int | None = None) -> str:
        """What `encode` depends on: a text that is equal for equal conditions."""
        zeros = self.pipeline.config.get("force_zeros_for_empty_prompt")
        words = json.dumps([[one.model_max_length, one.get_vocab()] for one in self.tokenizers], sort_keys=True)
        return f"{self.encoding} {zeros} {self.resolution(resolution)} " + " ".join(
            [hashlib.sha256(words.encode()).hexdigest(), *(fingerprint(encoder) for encoder in self.text_encoders)]
        )

    def inputs(self, resolution: int | None = None) -> dict[str, str]:
        return {
            "text_encoders": hashlib.sha256(self.encoder_id(resolution).encode()).hexdigest(),
            "autoencoder": fingerprint(self.pipeline.vae),
        }

    def encode_prompt(self, prompts: list[str], guided: bool = False) -> tuple[Tensor, ...]:
        """What the stock pipeline makes of prompts, in float32 whatever the encoders compute in; with the negative embeddings
        where they are to be guided, which are `None` elsewhere."""
        with told_once():
            encoded = self.stock_encode_prompt(prompts, guided)
        return tuple(part.float() if part is not None and part.is_floating_point() else part for part in encoded)

    def stock_encode_prompt(self, prompts: list[str], guided: bool) -> tuple[Tensor, ...]:
        """The stock pipeline's own call, in the encoders' precision."""
        device = self.text_encoders[0].device
        return self.pipeline.encode_prompt(
            prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=guided
        )

    @torch.no_grad()
    def arguments(self, captions: list[str]) -> dict[str, Tensor]:
        """The arguments of the stock pipeline's call, on the CPU, with the negative ones of guidance among them."""
        encoded = self.encode_prompt(captions, guided=True)
        return dict(zip(self.encoded_as, (tensor.cpu() for tensor in encoded), strict=False))

    def sample(
        self,
        pipeline: DiffusionPipeline,
        given: dict[str, Tensor],
        noise: Tensor,
        num_inference_steps: int = 1,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """As of `ModelFamily`, by the stock pipeline's own call."""
        if guidance_scale <= 1:
            given = {name: tensor for name, tensor in given.items() if not name.startswith("negative")}
        height, width = (side * self.stride for side in noise.shape[-2:])
        return pipeline(
            **given,
            height=height,
            width=width,
            latents=noise,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            output_type="pt",
            **self.call_settings,
        ).images

    def encode_images(self, pixels: Tensor) -> Tensor:
        """As of `ModelFamily`: the mode of the autoencoder's distribution, scaled as the stock pipelines scale latents. The
        autoencoder is moved to where the pixels are."""
        return encode_to_latents(self.pipeline.vae, pixels)

    def undecorated(self, pipeline: DiffusionPipeline) -> DiffusionPipeline:
        """Without its safety checker, too, and without text encoders: it is given embeddings, which stock calls would cast to
        the encoders' precision."""
        pipeline = super().undecorated(pipeline)
        self.release_encoders(pipeline)
        if "safety_checker" in pipeline.components:
            pipeline.safety_checker = None
        return pipeline
