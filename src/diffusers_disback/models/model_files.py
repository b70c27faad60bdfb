"""Which files of a model are needed, and where they lie on this machine, after a download if need be."""

import glob
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from ..hub.files import read_json, read_text, to_bytes
from ..hub.repository import Files, HubError, Repository, is_licence
from .card import CARD
from .pipeline_folder import WEIGHTS, of_variant, of_variants


logger = logging.getLogger(__name__)
_KEPT = (".json", ".txt", ".safetensors", ".model")
_WITH_CODE = (*_KEPT, ".py")  # so that code is seen, and refused


def locate(
    name: str, revision: str | None, choose: Callable[[list[str]], list[str]], cache_dir: str | None
) -> tuple[Path, list[str]]:
    """Finds a model's folder on this machine, and in it the files that `choose` takes. Those of a model on the Hub are
    downloaded; where the Hub cannot be asked, `choose` takes from what is in the cache.

    Args:
        name (`str`): A folder, or a repository on the Hub.
        revision (`str`, *optional*): Of the repository.
        choose (`Callable`): From the names of all files of the model to those that are needed.
        cache_dir (`str`, *optional*): Where downloads are kept.

    Returns:
        `tuple[Path, list[str]]`: The folder (of a repository, it is named by the commit), and what was chosen.

    Raises:
        HubError: If the Hub does not give it, and it is not in the cache.
    """
    if os.path.isdir(name):
        return Path(name), choose(_names_in(Path(name)))
    repository = Repository(name)
    try:
        names = list(repository.tree(repository.head(revision)))
    except HubError as error:
        root = _cached(error, name, revision, cache_dir)
        return root, choose(_names_in(root))
    chosen = choose(names)
    root = repository.download([glob.escape(one) for one in chosen], revision, cache_dir)
    missing = [one for one in chosen if not (root / one).exists()]
    if missing:
        raise HubError(f"The Hub cannot be reached for {missing[0]} of {name}.", kind="unreachable")
    return root, chosen


def _cached(error: HubError, repo_id: str, revision: str | None, cache_dir: str | None) -> Path:
    """The folder in the Hub's cache, if an error does not say that the Hub would refuse it."""
    from huggingface_hub import snapshot_download

    if error.kind not in ("unreachable", "offline"):
        raise error
    try:
        root = snapshot_download(
            repo_id, revision=revision, cache_dir=cache_dir, allow_patterns=[], local_files_only=True
        )
    except OSError:  # nothing of it is in the cache
        raise error from None
    logger.warning(f"{error} What is in the cache of {repo_id} is taken.")
    return Path(root)


def _names_in(folder: Path) -> list[str]:
    """The names of a model's files: at the root of its folder, and in the folders of its components."""
    files = [file for pattern in ("*", "*/*") for file in folder.glob(pattern) if file.is_file()]
    return sorted(file.relative_to(folder).as_posix() for file in files)


def names_of(component: str, names: Iterable[str], variant: str | None) -> list[str]:
    """The files that are needed of a component: configs, and its weights in safetensors, of a variant if it is there."""
    own = [Path(name) for name in names if name.startswith(f"{component}/") and name.count("/") == 1]
    return [file.as_posix() for file in own_files(own, variant, _WITH_CODE)]


def own_files(files: list[Path], variant: str | None, suffixes: tuple[str, ...] = _KEPT) -> list[Path]:
    """A component's own files among those of its folder: without other variants, pickles, and other programs' copies."""
    own = [file for file in files if file.suffix in suffixes and ".bin.index." not in file.name]
    return [
        file
        for file in of_variant(own, variant)
        if file.suffix != ".safetensors" or WEIGHTS.fullmatch(file.name) is not None
    ]


def check_has_weights(component: str, names: Iterable[str], variant: str | None, what: str) -> None:
    """Raises a `ValueError` unless there are weights of a component, of the variant or without one; with the others' names."""
    files = [Path(name) for name in names if name.startswith(f"{component}/")]
    found = of_variants(files)
    if variant in found or None in found:
        return
    hint = ""
    if found:
        variants = sorted(filter(None, found))
        hint = (
            f" There are weights of the variant {' and '.join(variants)}: pass --variant {variants[0]} if it is the teacher; a "
            "student's start has to have weights without a variant."
        )
    elif any(file.suffix in (".bin", ".pt", ".ckpt") for file in files):
        hint = " There are pickled weights, which can run code when they are read, and are not."
    raise ValueError(f"{what} is not whole: its {component} is without weights in safetensors.{hint}")


def card_files(names: list[str]) -> list[str]:
    """The card and the texts of the licence at the root of a model."""
    return [name for name in names if name == CARD or (is_licence(name) and "/" not in name)]


def stamps_of(files: Files) -> dict[str, tuple[int, int, int]]:
    """Of files, by name: size, time of change in nanoseconds, inode; zeros if one is not there any more."""
    paths = {name: file for name, file in files.items() if isinstance(file, Path)}
    stats = {name: file.stat() if file.exists() else None for name, file in paths.items()}
    return {name: (s.st_size, s.st_mtime_ns, s.st_ino) if s else (0, 0, 0) for name, s in stats.items()}


def without_variant(files: list[Path], variant: str | None) -> Files:
    """A component's files by the names that they have without a variant."""
    named: Files = {}
    for file in own_files(files, variant):
        match = WEIGHTS.fullmatch(file.name)
        of = match and (match[1] or match[2])
        if of and file.suffix == ".json":  # an index of shards, which it names
            named[file.name.replace(f".{of}", "")] = read_text(file).replace(f".{of}", "").encode()
        else:
            named[file.name.replace(f".{of}", "") if of else file.name] = file
    return named


def with_dtype(file: Path, dtype: str) -> Path | bytes:
    """The config of a transformers model, in which it is declared to be of the denoiser's precision: by default
    transformers 5 loads what the config declares, diffusers float32, and the two would not fit together."""
    config = read_json(file)
    key = next((key for key in ("dtype", "torch_dtype") if key in config), "torch_dtype")
    if "model_type" not in config or config.get(key) == dtype:
        return file
    return to_bytes({**config, key: dtype})
