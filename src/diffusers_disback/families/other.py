"""Pipelines of diffusers that are only sampled, to compare with: no family has to be made for their class."""

import inspect
from typing import Any

import torch
from torch import Tensor

from ..models.components import pipeline_class_of
from ..models.pipeline_folder import UNREADABLE, components_of
from ..models.reference import LocalModel


def is_text_to_image(pipeline_class: str) -> bool:
    """Whether diffusers has a text-to-image pipeline of a name."""
    from diffusers.pipelines.auto_pipeline import AUTO_TEXT2IMAGE_PIPELINES_MAPPING

    return pipeline_class in {made.__name__ for made in AUTO_TEXT2IMAGE_PIPELINES_MAPPING.values()}


def embeds_guidance(model: LocalModel) -> bool:
    """Whether a denoiser is told the guidance scale, as latent consistency models are. As a teacher it is refused."""
    return model.meta_network().config.get("time_cond_proj_dim") is not None


class OtherPipeline:
    """A stock pipeline with its own scheduler, in one precision, safetensors only.

    Args:
        model (`LocalModel`): Of a class that `is_text_to_image`.
        device (`torch.device`): Where it is sampled.
        dtype (`torch.dtype`): Of all components.

    Raises:
        ValueError: If it cannot be loaded.
    """

    def __init__(self, model: LocalModel, device: torch.device, dtype: torch.dtype):
        self.model = model
        try:
            self.pipeline = pipeline_class_of(model.index).from_pretrained(
                model.folder, variant=model.reference.variant, dtype=dtype, use_safetensors=True, **model.left_out
            )
        except UNREADABLE as error:
            raise ValueError(
                f"The model {model.name_or_path!r} cannot be loaded{model.reference.said}: it has to "
                f"be a whole diffusers pipeline in safetensors. {error}"
            ) from error
        model.fuse_lora(self.denoiser)
        self.pipeline.scheduler = model.overridden_scheduler(self.pipeline.scheduler)
        if model.reference.vae is not None:
            self.pipeline.vae = model.load_vae().to(dtype)
        if "safety_checker" in self.pipeline.components:
            self.pipeline.safety_checker = None
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.to(device)

    @property
    def denoiser(self) -> Any:
        """Its UNet or transformer."""
        names = components_of(self.model.index)
        return getattr(self.pipeline, "unet" if "unet" in names else "transformer")

    def latent_shape(self, resolution: int | None = None) -> tuple[int, ...]:
        """`(C, H, W)` of a UNet's latents, of which the noise is passed to the pipeline; `(0,)` of other denoisers, whose
        pipelines pack latents in ways of their own, and draw their noise themselves."""
        config = self.denoiser.config
        if "unet" not in components_of(self.model.index) or not isinstance(config.sample_size, int):
            return (0,)
        side = config.sample_size if resolution is None else resolution // self.pipeline.vae_scale_factor
        return config.in_channels, side, side

    @torch.no_grad()
    def sample(self, prompts: list[str], noise: Tensor, resolution: int | None, **arguments: Any) -> Tensor:
        """Images in 0..1, `[N, 3, H, W]`.

        Args:
            prompts (`list[str]`): N.
            noise (`Tensor`): Standard normal, `[N, *latent_shape]`.
            resolution (`int`, *optional*): The images' side in pixels; by default the pipeline's own.
            arguments: Of the pipeline's call, such as `num_inference_steps`; by default its own.

        Raises:
            ValueError: If its call does not take one of them.
        """
        given: dict[str, Any] = {"prompt": prompts, "output_type": "pt", **arguments}
        if noise.numel():
            given["latents"] = noise.to(self.denoiser.dtype)
        if resolution is not None:
            given |= {"height": resolution, "width": resolution}
        if unknown := given.keys() - inspect.signature(self.pipeline.__call__).parameters.keys():
            raise ValueError(f"A {type(self.pipeline).__name__} takes no {' and no '.join(sorted(unknown))}.")
        return self.pipeline(**given).images
