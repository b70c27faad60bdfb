"""What differs between diffusers pipelines."""

import os

import torch
from diffusers import AutoencoderKL, DiffusionPipeline

from ..model_reference import ModelReference, fuse_lora
from .stable_diffusion import ModelFamily
from .stable_diffusion_xl import StableDiffusionXL


FAMILIES: dict[str, type[ModelFamily]] = {
    "stable_diffusion": ModelFamily,
    "stable_diffusion_xl": StableDiffusionXL,
}


def family_of(pipeline: DiffusionPipeline, reference: ModelReference | None = None) -> ModelFamily:
    """The family of a teacher's pipeline.

    Raises:
        ValueError: If no family is made for its class, or its denoiser takes more than latents.
    """
    for family in FAMILIES.values():
        if type(pipeline).__name__ in family.pipeline_classes:
            return family(pipeline, reference)
    supported = ", ".join(name for family in FAMILIES.values() for name in family.pipeline_classes)
    raise ValueError(f"The teacher is a {type(pipeline).__name__}; supported are {supported}.")


def load_family(reference: ModelReference, cache_dir: str | None = None) -> ModelFamily:
    """Loads a teacher's pipeline in float32, safetensors only.

    Args:
        reference (`ModelReference`): A folder, a model on the Hub, or a checkpoint in one file.
        cache_dir (`str`, *optional*): Where downloads are kept.

    Raises:
        ValueError: If there is no such teacher, or it is of no supported family.
    """
    source = reference.source(cache_dir)
    name = source.name_or_path
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "model_index.json")):
        raise ValueError(f"{name} has no model_index.json: it is no diffusers pipeline's folder.")
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            name,
            revision=source.revision,
            variant=source.variant,
            cache_dir=cache_dir,
            dtype=torch.float32,
            use_safetensors=True,
        )
    except OSError as error:
        raise ValueError(
            f"The teacher {name!r} cannot be loaded: it is neither a folder with a diffusers pipeline in safetensors "
            f"nor such a model on the Hub (revision {reference.revision}, variant {reference.variant}). {error}"
        ) from error
    if reference.vae is not None:
        pipeline.vae = AutoencoderKL.from_pretrained(reference.vae_folder(cache_dir), torch_dtype=torch.float32)
    if reference.lora is not None:
        fuse_lora(pipeline.unet, reference.lora, cache_dir)
    if reference.prediction_type is not None:
        scheduler = pipeline.scheduler
        pipeline.scheduler = type(scheduler).from_config(scheduler.config, prediction_type=reference.prediction_type)
    family = family_of(pipeline, reference)
    reference.folder(cache_dir)  # so that the Hub is not needed for the teacher's files when training is over
    return family


__all__ = ["FAMILIES", "ModelFamily", "family_of", "load_family"]
