"""What differs between diffusers pipelines."""

from dataclasses import replace
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import nn

from ..hub.cards import Usage
from ..hub.repository import HubError
from ..models.components import check_whole, pipeline_class_of
from ..models.pipeline_folder import UNREADABLE, components_of
from ..models.reference import LocalModel, ModelReference
from ..models.weights import owned
from .base import ModelFamily
from .dit import Dit
from .edm import Edm, RescaledEdm
from .flow import FlowFamily
from .latents import stride_of_autoencoder
from .pixart import PixArt
from .pixels import Pixels
from .sana import Sana
from .stable_diffusion import StableDiffusion
from .stable_diffusion_3 import StableDiffusion3
from .stable_diffusion_xl import StableDiffusionXL
from .text import TextFamily


FAMILIES: dict[str, type[ModelFamily]] = {
    "stable_diffusion": StableDiffusion,
    "stable_diffusion_xl": StableDiffusionXL,
    "stable_diffusion_3": StableDiffusion3,
    "sana": Sana,
    "pixart": PixArt,
    "pixels": Pixels,
    "dit": Dit,
    "edm": Edm,
    "rescaled_edm": RescaledEdm,
}


def family_of(pipeline: DiffusionPipeline, model: LocalModel | None = None) -> ModelFamily:
    """The family of a teacher's pipeline.

    Raises:
        ValueError: If no family is made for its class, or its denoiser takes more than latents.
    """
    return family_class(type(pipeline).__name__, type(pipeline.components.get("scheduler")).__name__)(pipeline, model)


def family_class(pipeline_class: str, scheduler_class: str | None = None) -> type[ModelFamily]:
    """The family of a class of pipelines.

    Args:
        pipeline_class (`str`): Its name.
        scheduler_class (`str`, *optional*): That of the pipeline's scheduler, by which families of the same pipelines are told
            apart.

    Raises:
        ValueError: If there is none.
    """
    found = [family for family in FAMILIES.values() if pipeline_class in family.pipeline_classes]
    for family in sorted(found, key=lambda family: not family.scheduler_classes):
        if not family.scheduler_classes or scheduler_class in family.scheduler_classes:
            return family
    supported = "; ".join(f"{name}: {', '.join(family.pipeline_classes)}" for name, family in FAMILIES.items())
    raise ValueError(
        f"The teacher is a {pipeline_class}; supported are {supported}. A new family is a subclass of ModelFamily, added to "
        "FAMILIES: it names its pipeline_classes and the network_name of its denoiser, and answers, where they are not those of "
        "a pipeline of pixels without prompts, its noise_schedule, conditions, call, schedulers, one_step and sample "
        "(docs/how_to_add.md)."
    )


def family_of_index(index: dict[str, Any]) -> type[ModelFamily]:
    """The family of a pipeline, by the content of its `model_index.json`.

    Raises:
        ValueError: If there is none.
    """
    return family_class(str(index["_class_name"]), scheduler_class_of(index))


def scheduler_class_of(index: dict[str, Any]) -> str | None:
    """The class of a pipeline's scheduler, by the content of its `model_index.json`; `None` if it has none."""
    return components_of(index).get("scheduler", [None, None])[1]


def network_name_of(pipeline_class: str) -> str:
    """The denoiser's component of a class of pipelines.

    Raises:
        ValueError: If no family is made for it.
    """
    return family_class(pipeline_class).network_name


def usage_of(
    pipeline_class: str | None,
    config: Any = None,
    scheduler_class: str | None = None,
    index: dict[str, Any] | None = None,
) -> Usage:
    """How pipelines of a class are used, as their family says; as little as can be said, if none is known here.

    Args:
        pipeline_class (`str`, *optional*): Its name.
        config (`FrozenDict`, *optional*): Of the denoiser, if it is known.
        scheduler_class (`str`, *optional*): As of `family_class`.
        index (`dict`, *optional*): The content of the pipeline's `model_index.json`, if it is known.
    """
    try:
        family = family_class(str(pipeline_class), scheduler_class)
    except ValueError:
        return Usage(condition="", takes_guidance=False, takes_lora=False)
    usage = family.usage if config is None else family.usage_with(config)
    usage = replace(usage, own_pipeline=family.own_pipelines.get(str(pipeline_class), usage.own_pipeline))
    absent = _absent(family, index) if index is not None else []
    return replace(usage, loading="".join(f", {name}=None" for name in absent))


def _absent(family: type[ModelFamily], index: dict[str, Any]) -> list[str]:
    """The components of a family's `may_be_absent` that a `model_index.json` does not name."""
    return [name for name in family.may_be_absent if name not in components_of(index)]


def to_pipeline(network: nn.Module, timestep: int, teacher: DiffusionPipeline) -> DiffusionPipeline:
    """The deployed student of a teacher's pipeline; see `ModelFamily.one_step`."""
    return family_of(teacher).one_step(network, timestep)


def load_family(
    reference: str | ModelReference | LocalModel,
    cache_dir: str | None = None,
    text_encoder_dtype: torch.dtype = torch.float32,
) -> ModelFamily:
    """Loads a teacher's pipeline in float32, safetensors only.

    Args:
        reference (`str`, `ModelReference` or `LocalModel`): A folder, a model on the Hub, or a checkpoint in one file.
        cache_dir (`str`, *optional*): Where downloads are kept.
        text_encoder_dtype (`torch.dtype`): Of the text encoders, whose embeddings are float32 in any case.

    Raises:
        ValueError: If there is no such teacher, or it is of no supported family.
    """
    teacher = ModelReference(reference) if isinstance(reference, str) else reference
    model = resolve_teacher(teacher, cache_dir) if isinstance(teacher, ModelReference) else teacher
    name, variant, kind = model.name_or_path, model.reference.variant, family_of_index(model.index)
    try:
        pipeline = pipeline_class_of(model.index).from_pretrained(
            model.folder,
            variant=variant,
            dtype={"default": torch.float32, **dict.fromkeys(kind.encoders, text_encoder_dtype)},
            use_safetensors=True,
            **{**dict.fromkeys(_absent(kind, model.index)), **model.left_out},
        )
    except UNREADABLE as error:
        raise ValueError(
            f"The teacher {name!r} cannot be loaded{model.reference.said}: it has to be a "
            f"whole diffusers pipeline in safetensors. {error}"
        ) from error
    pipeline.register_to_config(_name_or_path=name)
    if model.reference.vae is not None:
        vae = model.load_vae()
        check_same_latents(pipeline.vae, vae, model.reference.vae)
        pipeline.vae = vae
    model.fuse_lora(getattr(pipeline, kind.network_name))
    pipeline.scheduler = model.overridden_scheduler(pipeline.scheduler)
    family = kind(pipeline, model)
    _own_weights(family, model)
    # What the student's folder takes of the teacher's: so that nothing is lacking when training is over.
    check_whole(model.files, f"The teacher {name!r}", (kind.network_name,))
    return family


def resolve_teacher(teacher: ModelReference, cache_dir: str | None = None) -> LocalModel:
    """Finds or downloads a teacher's files, before all of which its family is looked up.

    Raises:
        ValueError: If there is no such teacher, or it is of no supported family.
    """

    def network_name(pipeline_class: str) -> str:
        family = family_class(pipeline_class)
        if teacher.vae is not None and "vae" not in family.needed:
            raise ValueError(
                f"The teacher {teacher.name_or_path!r} has no autoencoder that {teacher.vae!r} could replace."
            )
        if teacher.null_class_label is not None and not family.takes_null_class_label:
            raise ValueError(
                f"The teacher {teacher.name_or_path!r} has no class labels of which one could be said to stand for no class; leave "
                "--null_class_label out."
            )
        return family.network_name

    try:
        return teacher.resolve(network_name, cache_dir)
    except HubError as error:
        raise ValueError(
            f"The teacher {teacher.name_or_path!r} cannot be loaded: it is neither a folder with a diffusers pipeline in "
            f"safetensors nor such a model on the Hub{teacher.said}. {error}"
        ) from error


def _own_weights(family: ModelFamily, model: LocalModel) -> None:
    """Takes a loaded teacher's weights into memory of their own, and checks that they are finite."""
    for name in dict.fromkeys((*family.needed, *family.encoders)):  # an encoder may be left out
        part = family.pipeline.components[name]
        if name == "vae" and model.reference.vae is not None:
            owned(part, f"the autoencoder {model.reference.vae!r}")
        elif isinstance(part, nn.Module):
            owned(
                part, f"the {name} of {model.name_or_path!r}{model.with_lora if name == family.network_name else ''}"
            )


def check_same_latents(own: AutoencoderKL, other: AutoencoderKL, name: str) -> None:
    """Raises a `ValueError` unless an autoencoder makes latents as a teacher's own does."""
    for key in ("latent_channels", "scaling_factor", "shift_factor", "latents_mean", "latents_std"):
        if own.config[key] != other.config[key]:
            raise ValueError(
                f"The autoencoder {name} has {key} {other.config[key]}, the teacher's own has {own.config[key]}: it belongs to "
                "another family of models. (SD 1.x and 2.x have 4 channels and 0.18215, SDXL 4 and 0.13025, SD3 and Flux 16.)"
            )
    strides = [stride_of_autoencoder(vae) for vae in (own, other)]
    if strides[0] != strides[1]:
        raise ValueError(
            f"The autoencoder {name} makes one latent of {strides[1]} x {strides[1]} pixels, the teacher's own of {strides[0]} x "
            f"{strides[0]}: it belongs to another family of models."
        )


__all__ = [
    "FAMILIES",
    "Dit",
    "Edm",
    "FlowFamily",
    "ModelFamily",
    "PixArt",
    "Pixels",
    "RescaledEdm",
    "Sana",
    "StableDiffusion",
    "StableDiffusion3",
    "StableDiffusionXL",
    "TextFamily",
    "family_class",
    "family_of",
    "family_of_index",
    "load_family",
    "network_name_of",
    "resolve_teacher",
    "scheduler_class_of",
    "to_pipeline",
    "usage_of",
]
