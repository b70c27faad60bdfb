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
    return _family_class(type(pipeline).__name__)(pipeline, reference)


def _family_class(pipeline_class: str) -> type[ModelFamily]:
    for family in FAMILIES.values():
        if pipeline_class in family.pipeline_classes:
            return family
    supported = ", ".join(name for family in FAMILIES.values() for name in family.pipeline_classes)
    raise ValueError(f"The teacher is a {pipeline_class}; supported are {supported}.")


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
        index = DiffusionPipeline.load_config(name, revision=source.revision, cache_dir=cache_dir)
        _family_class(str(index.get("_class_name")))  # before all of another family's weights are downloaded
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
            f"{source.other_variants()}{source.whereabouts()}"
        ) from error
    if reference.vae is not None:
        vae = AutoencoderKL.from_pretrained(reference.vae_folder(cache_dir), torch_dtype=torch.float32)
        check_same_latents(pipeline.vae, vae, reference.vae)
        pipeline.vae = vae
    if reference.lora is not None:
        fuse_lora(pipeline.unet, reference.lora, cache_dir)
    if reference.prediction_type is not None:
        scheduler = pipeline.scheduler
        pipeline.scheduler = type(scheduler).from_config(scheduler.config, prediction_type=reference.prediction_type)
    family = family_of(pipeline, reference)
    reference.folder(cache_dir)  # so that the Hub is not needed for the teacher's files when training is over
    return family


def check_same_latents(own: AutoencoderKL, other: AutoencoderKL, name: str) -> None:
    """Raises a `ValueError` unless an autoencoder makes latents as a teacher's own does."""
    for key in ("latent_channels", "scaling_factor", "shift_factor", "latents_mean", "latents_std"):
        if own.config[key] != other.config[key]:
            raise ValueError(
                f"The autoencoder {name} has {key} {other.config[key]}, the teacher's own has {own.config[key]}: it belongs to "
                "another family of models. (SD 1.x and 2.x have 4 channels and 0.18215, SDXL 4 and 0.13025, SD3 and Flux 16.)"
            )
    strides = [2 ** (len(vae.config.block_out_channels) - 1) for vae in (own, other)]
    if strides[0] != strides[1]:
        raise ValueError(
            f"The autoencoder {name} makes one latent of {strides[1]} x {strides[1]} pixels, the teacher's own of {strides[0]} x "
            f"{strides[0]}: it belongs to another family of models."
        )


__all__ = ["FAMILIES", "ModelFamily", "family_of", "load_family"]
