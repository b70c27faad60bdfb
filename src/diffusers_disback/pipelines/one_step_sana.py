"""`DisBackOneStepSanaPipeline`: SANA with one network evaluation.

This file travels with every saved model, as its `pipeline.py`: it imports torch and diffusers alone.
"""

import inspect
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import SanaPipeline
from diffusers.utils import logging


logger = logging.get_logger(__name__)


class DisBackOneStepSanaPipeline(SanaPipeline):
    """Text-to-image generation by a student that was distilled into one step (DisBack, arXiv 2408.15991).

    The stock pipeline, but that a call is one step without guidance by default, at the size that the student is made for, and
    several steps or guidance are refused. What `save_pretrained` writes is a folder of the *stock* pipeline, so that it loads
    without this class: call the stock pipeline with `num_inference_steps=1, guidance_scale=0` and `height` and `width`.
    """

    def encode_prompt(
        self,
        prompt: Any,
        do_classifier_free_guidance: bool = True,
        negative_prompt: Any = "",
        num_images_per_prompt: int = 1,
        *arguments: Any,
        **keywords: Any,
    ) -> tuple:
        """As of the stock pipeline, which in diffusers 0.42 gives images of several prompts each other's masks."""
        encoded = super().encode_prompt(
            prompt, do_classifier_free_guidance, negative_prompt, 1, *arguments, **keywords
        )
        return tuple(None if one is None else one.repeat_interleave(num_images_per_prompt, 0) for one in encoded)

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Writes `model_index.json` in the stock pipeline's name, and this file beside it as `pipeline.py`."""
        super().save_config(save_directory)
        file = Path(save_directory, self.config_name)
        index = {**json.loads(file.read_text()), "_class_name": SanaPipeline.__name__}
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
            prompt (`str` or `list[str]`, *optional*): What to generate; or pass `prompt_embeds` and
                `prompt_attention_mask`.
            num_inference_steps (`int`): 1; anything else is an error.
            guidance_scale (`float`): At most 1, that is no guidance; anything else is an error.
            height, width (`int`, *optional*): In pixels; by default what the student is made for.
            use_resolution_binning (`bool`): Draw at the nearest size that SANA was trained at, and resize.
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
        call = {
            "num_inference_steps": 1,
            "guidance_scale": guidance_scale,
            "height": side if height is None else height,
            "width": side if width is None else width,
            "use_resolution_binning": use_resolution_binning,
            **arguments,
        }
        return super().__call__(prompt, **call)
