"""`DisBackOneStepPixArtAlphaPipeline` and `...SigmaPipeline`: PixArt with one network evaluation."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline
from diffusers.utils import logging


logger = logging.get_logger(__name__)


@contextmanager
def _decoding_in_its_own_precision(vae: Any) -> Iterator[None]:
    """Casts what the autoencoder decodes to its own precision, where the transformer computes in another."""
    first = getattr(vae, "post_quant_conv", None) or vae.decoder
    hook = first.register_forward_pre_hook(lambda _, given: (given[0].to(vae.dtype), *given[1:]))
    try:
        yield
    finally:
        hook.remove()


class _OneStep:
    """The call of a student, before that of the stock pipeline of which it is a mixin."""

    scheduler: Any
    transformer: Any
    vae: Any
    vae_scale_factor: int

    def encode_prompt(self, *arguments: Any, **keywords: Any) -> tuple:
        """As of the stock pipeline, with embeddings in the transformer's precision: parts may be of different ones."""
        embeds, mask, negative, negative_mask = super().encode_prompt(*arguments, **keywords)  # type: ignore[misc]
        dtype = self.transformer.dtype
        return embeds.to(dtype), mask, None if negative is None else negative.to(dtype), negative_mask

    def prepare_latents(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        """As of the stock pipeline, in the transformer's precision."""
        return super().prepare_latents(*arguments, **keywords).to(self.transformer.dtype)  # type: ignore[misc]

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Writes `model_index.json` in the stock pipeline's name."""
        super().save_config(save_directory)  # type: ignore[misc]
        file = Path(save_directory, "model_index.json")
        stock = next(one for one in type(self).__mro__ if one.__module__.startswith("diffusers."))
        index = {**json.loads(file.read_text()), "_class_name": stock.__name__}
        file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        if push_to_hub:
            raise ValueError("save_config does not push; call `pipeline.push_to_hub(repo_id)`.")

    @property
    def conditioning_timestep(self) -> int:
        """The timestep at which the student is evaluated."""
        self.scheduler.set_timesteps(1)
        return int(self.scheduler.timesteps[0])

    @torch.no_grad()
    def __call__(
        self,
        prompt: Any = None,
        *,
        num_inference_steps: int = 1,
        guidance_scale: float = 0.0,
        height: int | None = None,
        width: int | None = None,
        use_resolution_binning: bool = False,
        **arguments: Any,
    ) -> Any:
        """Generates images in one step, by the stock pipeline's call.

        Args:
            prompt (`str` or `list[str]`, *optional*): What to generate; or pass `prompt_embeds` and `prompt_attention_mask`.
            num_inference_steps (`int`): 1; anything else is an error.
            guidance_scale (`float`): At most 1, that is no guidance; anything else is an error.
            height, width (`int`, *optional*): In pixels; by default what the student is made for.
            use_resolution_binning (`bool`): Draw at the nearest size that PixArt was trained at, and resize.
            **arguments: All else that the stock pipeline takes.

        Raises:
            ValueError: If an argument asks for several steps or for guidance.
        """
        for name in ("sigmas", "timesteps"):
            if arguments.get(name) is not None:
                raise ValueError(f"`{name}`: a one-step student has one noise level; leave the argument out.")
        if num_inference_steps != 1:
            raise ValueError(
                f"num_inference_steps={num_inference_steps}: a one-step student makes an image in one step; leave "
                "the argument out."
            )
        if guidance_scale > 1:
            raise ValueError(
                f"guidance_scale={guidance_scale}: the student has the teacher's guidance built in and takes none; "
                "leave the argument out."
            )
        for name, value in arguments.items():
            if name.startswith("negative_") and value not in (None, ""):
                logger.warning(f"`{name}` has no effect: no guidance is used.")
        side = self.transformer.config.sample_size * self.vae_scale_factor
        with _decoding_in_its_own_precision(self.vae):
            return super().__call__(  # type: ignore[misc]
                prompt,
                num_inference_steps=1,
                guidance_scale=guidance_scale,
                height=side if height is None else height,
                width=side if width is None else width,
                use_resolution_binning=use_resolution_binning,
                **arguments,
            )


class DisBackOneStepPixArtAlphaPipeline(_OneStep, PixArtAlphaPipeline):
    """PixArt-alpha by a student that was distilled into one step (DisBack, arXiv 2408.15991).

    The stock pipeline, but that a call is one step without guidance by default, at the size that the student is made for, and
    several steps or guidance are refused. What `save_pretrained` writes is a folder of the *stock* pipeline: call that with
    `num_inference_steps=1, guidance_scale=0, use_resolution_binning=False`.
    """


class DisBackOneStepPixArtSigmaPipeline(_OneStep, PixArtSigmaPipeline):
    """PixArt-Sigma by a student that was distilled into one step, as `DisBackOneStepPixArtAlphaPipeline` is PixArt-alpha."""
