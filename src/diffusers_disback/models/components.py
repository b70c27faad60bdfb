"""Components of a pipeline's folder: those without a role in distillation, which may be left out, and whether all are whole."""

import logging
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin

from ..hub.files import inside, parse_json, read_text
from ..hub.repository import Files
from .pipeline_folder import INDEX, UNREADABLE, WITHOUT_A_ROLE, check_own, components_of, variant_taken


logger = logging.getLogger(__name__)
_WITHOUT_WEIGHTS = ("scheduler", "tokenizer", "tokenizer_2", "tokenizer_3", "feature_extractor")
_STEMS = ("diffusion_pytorch_model", "model")


def has_weights(component: str) -> bool:
    """Whether a component is a network that distillation needs."""
    return component not in (*_WITHOUT_WEIGHTS, *WITHOUT_A_ROLE)


def parts_left_out(index: dict[str, Any], root: Path, variant: str | None, name: str) -> dict[str, Any]:
    """What a pipeline is loaded with, so that parts without a role that cannot be loaded do not stand in its way.

    A safety checker, its feature extractor or an image encoder that is pickled, missing or broken is told, and is left out of
    all that is made of the pipeline.

    Args:
        index (`dict`): The content of its `model_index.json`.
        root (`Path`): The pipeline's folder.
        variant (`str`, *optional*): Of the weights' files.
        name (`str`): Whose it is, for messages.

    Returns:
        `dict`: For `DiffusionPipeline.from_pretrained`: `None` for each of these parts, and `requires_safety_checker`.

    Raises:
        ValueError: If a file of theirs lies elsewhere, or is code: that is no broken part, but an attack.
    """
    parts = {part: kind for part, kind in components_of(index).items() if part in WITHOUT_A_ROLE}
    left_out: dict[str, Any] = {}
    for part, (library, class_name) in parts.items():
        if inside(root, part, name).is_dir():
            check_own(root, part, f"the model {name!r}", library)
        try:
            _try_to_load(part, str(class_name), root, variant)
        except UNREADABLE as error:  # the files are wrong, which is no reason to stop, and is told
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            logger.warning(
                f"The {part} of {name} cannot be loaded, and is left out: distillation does not need it, and the "
                f"student and its path will be without one. ({reason})"
            )
            left_out[part] = None
    if "feature_extractor" in left_out and "safety_checker" in parts and "safety_checker" not in left_out:
        logger.warning(f"The safety_checker of {name} sees nothing without it, and is left out, too.")
        left_out["safety_checker"] = None
    if "safety_checker" in left_out:
        left_out["requires_safety_checker"] = False
    return left_out


def pipeline_class_of(index: dict[str, Any]) -> type[DiffusionPipeline]:
    """The class that a `model_index.json` names. The base class would ask for optional components that are passed as
    `None`."""
    made = getattr(diffusers, str(index.get("_class_name")), None)
    return made if isinstance(made, type) and issubclass(made, DiffusionPipeline) else DiffusionPipeline


def without_parts(index: dict[str, Any], without: dict[str, Any]) -> dict[str, Any]:
    """A `model_index.json` that does not name what was left out."""
    return {**index, **{name: [None, None] if value is None else value for name, value in without.items()}}


def _try_to_load(name: str, class_name: str, root: Path, variant: str | None) -> None:
    """Loads a part as its pipeline would, exactly and in safetensors, but onto no device: of its weights, names and shapes
    are read, no numbers.

    Raises:
        Exception: Of those in `UNREADABLE`, if it cannot be loaded.
    """
    import transformers
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

    known = {"StableDiffusionSafetyChecker": StableDiffusionSafetyChecker} if name == "safety_checker" else {}
    model = known.get(class_name) or getattr(transformers, class_name, None)
    if model is None:
        raise ValueError(f"it is a {class_name}, which is not known")
    if not (root / name).is_dir():
        raise ValueError("there is nothing of it")
    where = {"subfolder": name, "local_files_only": True}
    if name in _WITHOUT_WEIGHTS:
        model.from_pretrained(root, **where)
        return
    exact = {"use_safetensors": True, "output_loading_info": True, "device_map": "meta"}
    kind = variant_taken((root / name).iterdir(), variant)
    _, info = model.from_pretrained(root, **where, **exact, variant=kind)
    if info["missing_keys"]:
        raise ValueError(f"its weights lack {len(info['missing_keys'])} tensors")


def load_exactly(model_class: type[ModelMixin], folder: Path, what: str, **where: str | None) -> ModelMixin:
    """A model of diffusers in float32, from safetensors.

    Args:
        model_class (`type`): Of the model.
        folder (`Path`): With its config and weights.
        what (`str`): It is, at the beginning of a sentence.
        **where: Of `from_pretrained`: `subfolder`, `variant`.

    Raises:
        ValueError: If it cannot be read, or its weights do not fit its own config in anything.
    """
    exact: dict[str, Any] = {"use_safetensors": True, "output_loading_info": True}
    try:
        model, info = model_class.from_pretrained(folder, torch_dtype=torch.float32, **exact, **where)
    except UNREADABLE as error:
        raise ValueError(f"{what} cannot be loaded. {error}") from error
    wrong = {kind: keys for kind, keys in info.items() if keys}
    if wrong:
        raise ValueError(f"{what} does not fit its own config: {wrong}.")
    return model


def meta_model(model_class: type[ModelMixin], folder: Path, **where: str) -> ModelMixin:
    """A model of diffusers without weights, on the meta device, from its config.

    Raises:
        Exception: Of those in `UNREADABLE`, if that cannot be read.
    """
    config = model_class.load_config(folder, **where)
    with torch.device("meta"):
        return model_class.from_config(config)


def check_whole(files: Files, what: str, besides: tuple[str, ...] = ()) -> None:
    """Raises a `ValueError` unless every component that `model_index.json` names is there, a model with its weights.

    Args:
        files (`Files`): A pipeline's.
        what (`str`): Whose they are, at the beginning of a sentence.
        besides (`tuple[str, ...]`): Components that come from elsewhere.
    """
    for name in components_of(parse_json(_text(files[INDEX]), f"{INDEX} of {what}")):
        if name in besides:
            continue
        own = {path.removeprefix(f"{name}/") for path in files if path.startswith(f"{name}/")}
        if not own:
            raise ValueError(f"{what} is not whole: {INDEX} names {name}, but there is nothing of it.")
        if name in _WITHOUT_WEIGHTS:
            continue
        wanted = _weights(name, files)
        if "config.json" not in own or not wanted or not wanted <= own:
            lacking = sorted(({"config.json"} | wanted) - own) or ["weights in safetensors"]
            raise ValueError(f"{what} is not whole: its {name} is without {', '.join(lacking[:3])}.")


def _weights(name: str, files: Files) -> set[str]:
    """The names of the files that a model's weights are in."""
    for stem in _STEMS:
        if f"{name}/{stem}.safetensors" in files:
            return {f"{stem}.safetensors"}
        path = f"{name}/{stem}.safetensors.index.json"
        if path in files:
            shards = parse_json(_text(files[path]), path).get("weight_map")
            return set(map(str, shards.values())) if isinstance(shards, dict) else set()
    return set()


def _text(content: Path | bytes) -> str | bytes:
    return content if isinstance(content, bytes) else read_text(content)
