"""Models of before pipelines had folders: one denoiser and one scheduler, whose files lie beside `model_index.json`.

Such are `google/ddpm-cifar10-32` and others of that time, which diffusers reads to this day."""

import shutil
from collections.abc import Callable
from pathlib import Path

from ..hub.files import inside, known_sha256, link_or_copy
from .model_files import locate
from .pipeline_folder import INDEX, WEIGHTS
from .single_file import made_once


_DENOISER, _SCHEDULER = "unet", "scheduler"
_CONFIGS = {"config.json": _DENOISER, "scheduler_config.json": _SCHEDULER}


def locate_in_folders(
    name: str, revision: str | None, choose: Callable[[list[str]], list[str]], cache_dir: str | None
) -> Path:
    """As `locate`, for a model whose files may lie flat: `choose` sees and takes them as if each component had its folder, and
    such a folder is made of them, once, with the commit as its name.

    Args:
        name, revision, choose, cache_dir: As of `locate`.

    Raises:
        HubError: If the Hub does not give it, and it is not in the cache.
        ValueError: If a file is a link that leads out of a folder, or the folder cannot be written.
    """
    is_flat = False

    def choose_flat(names: list[str]) -> list[str]:
        nonlocal is_flat
        is_flat = _is_flat(names)
        return [_flat(one) for one in choose([_foldered(one) for one in names])] if is_flat else choose(names)

    root, chosen = locate(name, revision, choose_flat, cache_dir)
    if not is_flat or chosen == [INDEX]:
        return root
    files = {_foldered(one): inside(root, one, f"the model {name!r}") for one in chosen}
    # A snapshot's folder is named by its commit, and nothing is written into its files; a user's own may be written to.
    is_local = Path(name).is_dir()
    folder, put = ("model", shutil.copyfile) if is_local else (root.name, link_or_copy)

    def write(draft: Path) -> None:
        for place, file in files.items():
            made = draft / folder / place
            made.parent.mkdir(parents=True, exist_ok=True)
            put(file.resolve(), made)

    content = " ".join(["flat", folder, *(f"{place} {known_sha256(file)}" for place, file in files.items())])
    return made_once(content, name, write, cache_dir) / folder


def _is_flat(names: list[str]) -> bool:
    folders = {one.split("/")[0] for one in names if "/" in one}
    return {INDEX, *_CONFIGS} <= set(names) and not folders & {_DENOISER, _SCHEDULER}


def _foldered(name: str) -> str:
    """Where a file at the root belongs."""
    component = _CONFIGS.get(name) or (_DENOISER if WEIGHTS.fullmatch(name) else None)
    return name if component is None else f"{component}/{name}"


def _flat(name: str) -> str:
    return name.split("/")[-1] if name.startswith((f"{_DENOISER}/", f"{_SCHEDULER}/")) else name
