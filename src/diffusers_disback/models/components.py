"""Components of a pipeline's folder: those without a role in distillation, which may be left out, and whether all are whole."""

import logging
import os
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from ..hub.files import inside, parse_json, read_text
from ..hub.repository import Files, HubError, Repository
from .pipeline_folder import INDEX, UNREADABLE, WITHOUT_A_ROLE, check_own, check_shards, components_of, variant_taken


logger = logging.getLogger(__name__)
_WITHOUT_WEIGHTS = ("scheduler", "tokenizer", "tokenizer_2", "feature_extractor")
_STEMS = ("diffusion_pytorch_model", "model")


def left_out(
    index: dict[str, Any], name_or_path: str, revision: str | None, variant: str | None, cache_dir: str | None
) -> dict[str, Any]:
    """What a pipeline is loaded with, so that parts without a role that cannot be loaded do not stand in its way.

    A safety checker, its feature extractor or an image encoder that is pickled, missing or broken is told once, and is left
    out of all that is made of the pipeline. That is judged by files on this machine, after a download if need be.

    Args:
        index (`dict`): The content of its `model_index.json`.
        name_or_path (`str`): A folder, or a model on the Hub.
        revision (`str`, *optional*): On the Hub.
        variant (`str`, *optional*): Of the weights' files.
        cache_dir (`str`, *optional*): Where downloads are kept.

    Returns:
        `dict`: For `DiffusionPipeline.from_pretrained`: `None` for each of these parts, and `requires_safety_checker`.

    Raises:
        ValueError: If a file of theirs lies elsewhere.
        HubError: If the Hub does not give them; what it only fails to serve now is not left out.
    """
    components = components_of(index)
    there = tuple((name, str(components[name][1])) for name in WITHOUT_A_ROLE if name in components)
    if os.path.isdir(name_or_path):
        root = Path(name_or_path)
    else:
        root = _fetched(tuple(name for name, _ in there), name_or_path, revision, variant, cache_dir)
    for name, _ in there:  # what lies elsewhere, or is code, is no broken part, but an attack
        if inside(root, name, name_or_path).is_dir():
            check_own(root, name, f"the model {name_or_path!r}", str(components[name][0]))
    stamp = tuple(  # of files, which their owner may mend
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for name, _ in there
        for file in sorted((root / name).glob("*"))
        if file.is_file()
    )
    names = _broken(there, name_or_path, root, variant, stamp)
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


@cache
def _fetched(
    names: tuple[str, ...], repo_id: str, revision: str | None, variant: str | None, cache_dir: str | None
) -> Path:
    """The folder of a model on the Hub, after its parts without a role were downloaded, as far as it has them in safetensors.
    Where the user forbids to ask the Hub, what is not on this machine counts as not there.

    Raises:
        HubError: If the Hub cannot say whether it has them, and has not said so before: then nothing is known of them.
    """
    repository = Repository(repo_id, patient=False)
    index = repository.file(INDEX, revision, cache_dir)
    if index is None:
        raise ValueError(f"The model {repo_id!r} has no {INDEX}: it is no diffusers pipeline.")
    root, commit = index.parent, index.parent.name

    def fetch(path: str) -> Path | None:
        try:
            return repository.file(path, commit, cache_dir)
        except HubError as error:
            if error.kind != "offline":
                raise
            return None

    # Whatever says how a part is loaded: more than a config is an attack, and has to be seen here to be refused.
    patterns = [f"{name}/*{suffix}" for name in names for suffix in (".json", ".py")]
    try:
        if names:
            repository.download(patterns, commit, cache_dir)
    except HubError as error:
        if error.kind != "offline":
            raise
    for name in names:
        if name in _WITHOUT_WEIGHTS:
            fetch(f"{name}/preprocessor_config.json")
            continue
        if fetch(f"{name}/config.json") is None:
            continue
        for kind in dict.fromkeys((variant, None)):
            dot = "" if kind is None else f".{kind}"
            if fetch(f"{name}/model{dot}.safetensors") is not None:
                break
            path = f"{name}/model.safetensors.index{dot}.json"
            shards = fetch(path)
            if shards is not None:
                inside(root, path, repo_id)
                named = check_shards(shards, f"{path} of the model {repo_id!r}")["weight_map"]
                for shard in sorted(set(named.values())):
                    fetch(f"{name}/{shard}")
                break
    return root


@lru_cache(maxsize=64)
def _broken(
    there: tuple[tuple[str, str], ...], name_or_path: str, root: Path, variant: str | None, stamp: tuple
) -> tuple[str, ...]:
    """The parts that cannot be loaded from their files on this machine, each after a word on why."""
    names = []
    for name, class_name in there:
        try:
            _try_to_load(name, class_name, root, variant)
        except UNREADABLE as error:  # the files are wrong, which is no reason to stop, and is told
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
