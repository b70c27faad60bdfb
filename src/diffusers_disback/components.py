"""Components of a pipeline's folder: those without a role in distillation, which may be left out, and whether all are whole."""

import logging
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from .files import inside, parse_json, read_text
from .pipeline_folder import WITHOUT_A_ROLE, check_own
from .repository import Files, HubError, Repository


logger = logging.getLogger(__name__)
_WITHOUT_WEIGHTS = ("scheduler", "tokenizer", "tokenizer_2", "feature_extractor")
_STEMS = ("diffusion_pytorch_model", "model")


def left_out(
    index: dict[str, Any], name_or_path: str, revision: str | None, variant: str | None, cache_dir: str | None
) -> dict[str, Any]:
    """What a pipeline is loaded with, so that parts without a role that cannot be loaded do not stand in its way.

    A safety checker, its feature extractor or an image encoder that is pickled, missing or broken is told once, and is left
    out of all that is made of the pipeline.

    Args:
        index (`dict`): The content of its `model_index.json`.
        name_or_path (`str`): A folder, or a model on the Hub.
        revision (`str`, *optional*): On the Hub.
        variant (`str`, *optional*): Of the weights' files.
        cache_dir (`str`, *optional*): Where downloads are kept.

    Returns:
        `dict`: For `DiffusionPipeline.from_pretrained`: `None` for each of these parts, and `requires_safety_checker`.
    """
    there = tuple(
        (name, str(index[name][0]), str(index[name][1])) for name in WITHOUT_A_ROLE if _is_named(index, name)
    )
    folder = Path(name_or_path)
    if os.path.isdir(folder):  # what lies elsewhere is no broken part, but an attack
        for name, library, _ in there:
            if inside(folder, name, name_or_path).is_dir():
                check_own(folder, name, f"the model {name_or_path!r}", library)
    stamp = tuple(  # of a folder, which its owner may mend
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for name, _, _ in there
        for file in (sorted((folder / name).glob("*")) if os.path.isdir(folder / name) else ())
        if file.is_file()
    )
    names = _broken(there, name_or_path, revision, variant, cache_dir, stamp)
    without: dict[str, Any] = dict.fromkeys(names)
    if "safety_checker" in without:
        without["requires_safety_checker"] = False
    return without


def pipeline_class_of(index: dict[str, Any]) -> type[DiffusionPipeline]:
    """The class that a `model_index.json` names. The base class would ask for optional components that are passed as
    `None`."""
    made = getattr(diffusers, str(index.get("_class_name")), None)
    return made if isinstance(made, type) and issubclass(made, DiffusionPipeline) else DiffusionPipeline


def without_parts(index: dict[str, Any], without: dict[str, Any]) -> dict[str, Any]:
    """A `model_index.json` that does not name what was left out."""
    return {**index, **{name: [None, None] if value is None else value for name, value in without.items()}}


def _is_named(index: dict[str, Any], name: str) -> bool:
    kind = index.get(name)
    return isinstance(kind, list) and len(kind) == 2 and kind[0] is not None


@lru_cache(maxsize=64)
def _broken(
    there: tuple[tuple[str, str, str], ...],
    name_or_path: str,
    revision: str | None,
    variant: str | None,
    cache_dir: str | None,
    stamp: tuple,
) -> tuple[str, ...]:
    """The parts that cannot be loaded, each after a word on why.

    Raises:
        ValueError: If one on the Hub is more than a part that cannot be loaded; see `check_own`.
    """
    names = []
    for name, library, class_name in there:
        try:
            configs = None if os.path.isdir(name_or_path) else _configs(name, name_or_path, revision, cache_dir)
        except HubError as error:
            configs, problem = None, error
        else:
            problem = None
        if configs is not None and (configs / name).is_dir():
            check_own(configs, name, f"the model {name_or_path!r}", library)
        try:
            if problem is not None:
                raise problem
            _load(name, class_name, name_or_path, revision, variant, cache_dir)
        except Exception as error:  # whatever is wrong with it is no reason to stop, and is told
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            logger.warning(
                f"The {name} of {name_or_path} cannot be loaded, and is left out: distillation does not need it, and the "
                f"student and its path will be without one. ({reason})"
            )
            names.append(name)
    if (
        "feature_extractor" in names
        and "safety_checker" in {part[0] for part in there}
        and "safety_checker" not in names
    ):
        logger.warning(f"The safety_checker of {name_or_path} sees nothing without it, and is left out, too.")
        names.append("safety_checker")
    return tuple(names)


def _configs(name: str, repo_id: str, revision: str | None, cache_dir: str | None) -> Path:
    """The folder with what says how a part on the Hub is loaded; its weights are not downloaded.

    Raises:
        HubError: If the Hub does not give it.
    """
    patterns = [f"{name}/{pattern}" for pattern in ("*.json", "*.py")]
    return Repository(repo_id, patient=False).download(patterns, revision, cache_dir)


def _load(
    name: str, class_name: str, name_or_path: str, revision: str | None, variant: str | None, cache_dir: str | None
) -> None:
    """Loads a part as its pipeline would: exactly, in safetensors.

    Raises:
        Exception: Of any kind, if it cannot be loaded.
    """
    import transformers
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

    known = {"StableDiffusionSafetyChecker": StableDiffusionSafetyChecker} if name == "safety_checker" else {}
    model = known.get(class_name) or getattr(transformers, class_name, None)
    if model is None:
        raise ValueError(f"it is a {class_name}, which is not known")
    where = {"subfolder": name, "revision": revision or "main", "cache_dir": cache_dir}
    if name == "feature_extractor":
        model.from_pretrained(name_or_path, **where)
        return
    exact = {"use_safetensors": True, "output_loading_info": True}
    try:
        _, info = model.from_pretrained(name_or_path, **where, **exact, variant=variant)
    except OSError:
        if variant is None:
            raise
        _, info = model.from_pretrained(name_or_path, **where, **exact)  # of a part that has no variant
    if info["missing_keys"]:
        raise ValueError(f"its weights lack {len(info['missing_keys'])} tensors")


def check_whole(files: Files, what: str, besides: tuple[str, ...] = ()) -> None:
    """Raises a `ValueError` unless every component that `model_index.json` names is there, a model with its weights.

    Args:
        files (`Files`): A pipeline's.
        what (`str`): Whose they are, at the beginning of a sentence.
        besides (`tuple[str, ...]`): Components that come from elsewhere.
    """
    index = parse_json(_text(files["model_index.json"]), f"model_index.json of {what}")
    for name in index:
        if not _is_named(index, name) or name in besides:
            continue
        own = {path.removeprefix(f"{name}/") for path in files if path.startswith(f"{name}/")}
        if not own:
            raise ValueError(f"{what} is not whole: model_index.json names {name}, but there is nothing of it.")
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
