"""What differs between diffusers pipelines."""

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import nn

from ..hub.repository import HubError
from ..models.components import check_whole, pipeline_class_of
from ..models.pipeline_folder import UNREADABLE
from ..models.reference import ModelReference
from ..models.teacher_lora import fuse_lora
from ..models.weights import owned
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
    try:
        index = reference.index(cache_dir)
    except HubError as error:
        raise ValueError(
            f"The teacher {name!r} cannot be loaded: it is neither a folder with a diffusers pipeline in safetensors "
            f"nor such a model on the Hub (revision {reference.revision}). {error}{source.whereabouts()}"
        ) from error
    _family_class(str(index.get("_class_name")))  # before all of another family's weights are downloaded
    folder = reference.check_files(cache_dir)  # after which the Hub is not needed for the teacher's files any more
    try:
        pipeline = pipeline_class_of(index).from_pretrained(
            folder,
            variant=source.variant,
            dtype=torch.float32,
            use_safetensors=True,
            **reference.left_out(index, cache_dir),
        )
    except UNREADABLE as error:
        raise ValueError(
            f"The teacher {name!r} cannot be loaded (revision {reference.revision}, variant {reference.variant}): it has to "
            f"be a whole diffusers pipeline in safetensors. {error}{source.other_variants()}"
        ) from error
    pipeline.register_to_config(_name_or_path=name)
    if reference.vae is not None:
        vae = reference.load_vae(cache_dir)
        check_same_latents(pipeline.vae, vae, reference.vae)
        pipeline.vae = vae
    if reference.lora is not None:
        fuse_lora(pipeline.unet, reference.lora, cache_dir)
    pipeline.scheduler = reference.scheduler_as_said(pipeline.scheduler)
    family = family_of(pipeline, reference)
    _own_weights(family)
    # What the student's folder takes of the teacher's: so that nothing is lacking, nor the Hub needed, when training is over.
    check_whole(reference.component_files("float32", cache_dir), f"The teacher {reference.name_or_path!r}", ("unet",))
    return family


def _own_weights(family: ModelFamily) -> None:
    """Takes a loaded teacher's weights into memory of their own, and sees that they are finite."""
    teacher = family.reference
    for name in family.needed:
        part = family.pipeline.components[name]
        if name == "vae" and teacher.vae is not None:
            owned(part, f"the autoencoder {teacher.vae!r}")
        elif isinstance(part, nn.Module):
            owned(part, f"the {name} of {teacher.name_or_path!r}{teacher.with_lora if name == 'unet' else ''}")


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
