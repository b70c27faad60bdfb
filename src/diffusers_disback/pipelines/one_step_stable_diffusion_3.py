"""`DisBackOneStepStableDiffusion3Pipeline`: Stable Diffusion 3 with one network evaluation.

This file travels with every saved model, as its `pipeline.py`: it imports torch and diffusers alone.
"""

import inspect
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
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


class DisBackOneStepStableDiffusion3Pipeline(StableDiffusion3Pipeline):
    """Text-to-image generation by a student that was distilled into one step (DisBack, arXiv 2408.15991).

    The stock pipeline, but that a call is one step without guidance by default, and anything else is refused. What
    `save_pretrained` writes is a folder of the *stock* pipeline, so that it loads without this class: call the stock pipeline with
    `num_inference_steps=1, guidance_scale=0`.
    """

    _optional_components = [*StableDiffusion3Pipeline._optional_components, "text_encoder_3", "tokenizer_3"]

    def encode_prompt(self, *arguments: Any, **keywords: Any) -> tuple:
        """As of the stock pipeline, in the transformer's precision: where parts are of different ones, each computes in its own."""
        encoded = super().encode_prompt(*arguments, **keywords)
        return tuple(None if tensor is None else tensor.to(self.transformer.dtype) for tensor in encoded)

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Writes `model_index.json` in the stock pipeline's name, and this file beside it as `pipeline.py`."""
        super().save_config(save_directory)
        file = Path(save_directory, self.config_name)
        index = {**json.loads(file.read_text()), "_class_name": StableDiffusion3Pipeline.__name__}
        file.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        source, copy = inspect.getfile(type(self)), os.path.join(save_directory, "pipeline.py")
        if not (os.path.exists(copy) and os.path.samefile(source, copy)):
            shutil.copyfile(source, copy)
        if push_to_hub:
            raise ValueError("save_config does not push; call `pipeline.push_to_hub(repo_id)`.")

    @property
    def conditioning_timestep(self) -> int:
        """The timestep at which the student is evaluated."""
        return self.scheduler.config.num_train_timesteps - 1

    @torch.no_grad()
    def __call__(
        self, prompt: Any = None, *, num_inference_steps: int = 1, guidance_scale: float = 0.0, **arguments: Any
    ) -> Any:
        """Generates images in one step, by the stock pipeline's call.

        Args:
            prompt (`str` or `list[str]`, *optional*): What to generate; or pass `prompt_embeds` and `pooled_prompt_embeds`.
            num_inference_steps (`int`): 1; anything else is an error.
            guidance_scale (`float`): At most 1, that is no guidance; anything else is an error.
            **arguments: All else that the stock pipeline takes.

        Raises:
            ValueError: If an argument asks for several steps or for guidance.
        """
        for name in ("sigmas", "skip_guidance_layers"):
            if arguments.get(name) is not None:
                raise ValueError(
                    f"`{name}`: a one-step student has one noise level and no guidance; leave the argument out."
                )
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
        call = {"num_inference_steps": 1, "guidance_scale": guidance_scale, **arguments}
        with _decoding_in_its_own_precision(self.vae):
            return super().__call__(prompt, **call)
