"""What differs between diffusers pipelines."""

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import nn

from ..hub.repository import HubError
from ..models.components import check_whole, pipeline_class_of
from ..models.pipeline_folder import UNREADABLE
from ..models.reference import LocalModel, ModelReference
from ..models.weights import owned
from .stable_diffusion import ModelFamily
from .stable_diffusion_xl import StableDiffusionXL


FAMILIES: dict[str, type[ModelFamily]] = {
    "stable_diffusion": ModelFamily,
    "stable_diffusion_xl": StableDiffusionXL,
}


def family_of(pipeline: DiffusionPipeline, model: LocalModel | None = None) -> ModelFamily:
    """The family of a teacher's pipeline.

    Raises:
        ValueError: If no family is made for its class, or its denoiser takes more than latents.
    """
    return _family_class(type(pipeline).__name__)(pipeline, model)


def _family_class(pipeline_class: str) -> type[ModelFamily]:
    for family in FAMILIES.values():
        if pipeline_class in family.pipeline_classes:
            return family
    supported = ", ".join(name for family in FAMILIES.values() for name in family.pipeline_classes)
    raise ValueError(f"The teacher is a {pipeline_class}; supported are {supported}.")


def load_family(reference: str | ModelReference | LocalModel, cache_dir: str | None = None) -> ModelFamily:
    """Loads a teacher's pipeline in float32, safetensors only.

    Args:
        reference (`str`, `ModelReference` or `LocalModel`): A folder, a model on the Hub, or a checkpoint in one file.
        cache_dir (`str`, *optional*): Where downloads are kept, if it is not on this machine yet.

    Raises:
        ValueError: If there is no such teacher, or it is of no supported family.
    """
    model = ModelReference(reference) if isinstance(reference, str) else reference
    name = model.name_or_path
    if isinstance(model, ModelReference):
        try:
            model = model.resolve(cache_dir, check_class=_family_class)
        except HubError as error:
            raise ValueError(
                f"The teacher {name!r} cannot be loaded: it is neither a folder with a diffusers pipeline in safetensors "
                f"nor such a model on the Hub (revision {model.revision}). {error}"
            ) from error
    variant = model.reference.variant
    try:
        pipeline = pipeline_class_of(model.index).from_pretrained(
            model.folder, variant=variant, dtype=torch.float32, use_safetensors=True, **model.left_out
        )
    except UNREADABLE as error:
        raise ValueError(
            f"The teacher {name!r} cannot be loaded (revision {model.reference.revision}, variant {variant}): it has to be a "
            f"whole diffusers pipeline in safetensors. {error}"
        ) from error
    pipeline.register_to_config(_name_or_path=name)
    if model.vae_folder is not None:
        vae = model.load_vae()
        check_same_latents(pipeline.vae, vae, model.reference.vae)
        pipeline.vae = vae
    model.fuse_lora(pipeline.unet)
    pipeline.scheduler = model.scheduler_as_said(pipeline.scheduler)
    family = family_of(pipeline, model)
    _own_weights(family)
    # What the student's folder takes of the teacher's: so that nothing is lacking when training is over.
    check_whole(model.files, f"The teacher {name!r}", ("unet",))
    return family


def _own_weights(family: ModelFamily) -> None:
    """Takes a loaded teacher's weights into memory of their own, and sees that they are finite."""
    model = family.model
    for name in family.needed:
        part = family.pipeline.components[name]
        if name == "vae" and model.vae_folder is not None:
            owned(part, f"the autoencoder {model.reference.vae!r}")
        elif isinstance(part, nn.Module):
            owned(part, f"the {name} of {model.name_or_path!r}{model.with_lora if name == 'unet' else ''}")


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
