"""A checkpoint in one file, as fine-tunes are shared: made once into a diffusers folder, which then is the model."""

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import unquote

import torch

from ..hub.files import inside, known_sha256, read_json, sha256_of, write_json
from ..hub.repository import HubError, is_repo_id
from .model_files import locate
from .noise_schedule import with_overrides
from .original_layout import (
    SUPPORTED,
    convert,
    empty_tensors,
    kind_of,
    not_in_config,
    read_header,
    readable_copy,
    settings_in,
)
from .pipeline_folder import INDEX, check_classes, components_of, files_of, read_index
from .weights import save_weights


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_ADDRESS = re.compile(
    r"(?:https?://)?(?:huggingface\.co|hf\.co)/([^/]+/[^/]+)/(?:blob|resolve)/([^/]+)/([^?]+)(\?.*)?"
)
_IN_REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)/(.+)")
_SUFFIXES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth", ".gguf")
_CONFIGS = (".json", ".txt", ".model")


@dataclass(frozen=True)
class SingleFile:
    """Where a checkpoint lies: a file on this machine, or one in a repository on the Hub.

    Args:
        path (`str`): On this machine, or in the repository.
        repo_id (`str`, *optional*): The repository.
        revision (`str`, *optional*): Of the repository, if the address names one.
    """

    path: str
    repo_id: str | None = None
    revision: str | None = None

    def fetch(self, revision: str | None = None, cache_dir: str | None = None) -> Path:
        """The file on this machine, after a download if need be.

        Raises:
            ValueError: If there is none.
        """
        if self.repo_id is None:
            if not os.path.isfile(self.path):
                raise ValueError(
                    f"There is no file {self.path}. A file on the Hub is named user/repo/{os.path.basename(self.path)}, or "
                    "by its address."
                )
            return Path(self.path)
        revision = revision or self.revision

        def choose(names: list[str]) -> list[str]:
            if self.path not in names:
                raise ValueError(f"{self.repo_id} has no file {self.path} at {revision or 'main'}.")
            return [self.path]

        root, (path,) = locate(self.repo_id, revision, choose, cache_dir)
        return root / path

    def commit(self, revision: str | None = None, cache_dir: str | None = None) -> str | None:
        """The commit that a downloaded file is of; `None` for one of this machine's, or if it was not downloaded."""
        from huggingface_hub import try_to_load_from_cache

        if self.repo_id is None:
            return None
        file = try_to_load_from_cache(self.repo_id, self.path, cache_dir, revision or self.revision or "main")
        depth = len(PurePosixPath(self.path).parts)
        return Path(file).parents[depth - 1].name if isinstance(file, str) else None


def single_file_of(name: str) -> SingleFile | None:
    """The checkpoint that a model's name means: a file, `user/repo/file.safetensors`, or that file's address on the Hub;
    `None` if it means a folder or a repository."""
    if os.path.isdir(name):
        return None
    address, inside = _ADDRESS.fullmatch(name), _IN_REPOSITORY.fullmatch(name)
    if os.path.isfile(name):
        return SingleFile(name)
    if address:
        return SingleFile(unquote(address[3]), address[1], unquote(address[2]))
    if not name.lower().endswith(_SUFFIXES):
        return None
    return SingleFile(inside[2], inside[1]) if inside and ".." not in name else SingleFile(name)


def repo_of(name: str) -> str | None:
    """The repository on the Hub that a model's name means: its own, or that of a single file; `None` if it means none."""
    file = single_file_of(name)
    if file is not None:
        return file.repo_id
    return name if is_repo_id(name) else None


def to_folder(source: SingleFile, name: str, config: str | None, revision: str | None, cache_dir: str | None) -> Path:
    """A checkpoint as a diffusers folder, made once: it is named by the file's and the config's content.

    Args:
        source (`SingleFile`): Where it lies.
        name (`str`): What messages call it.
        config (`str`, *optional*): The folder or Hub id of a pipeline that says how the model is built; by default
            diffusers knows one on the Hub.
        revision (`str`, *optional*): Of a file on the Hub.
        cache_dir (`str`, *optional*): Where downloads and the folder are kept; by default where the Hub's client does.

    Raises:
        ValueError: If it is no checkpoint of a supported model, is pickled, or does not fit the config in anything.
    """
    file = source.fetch(revision, cache_dir)
    shapes, dtypes = read_header(file, name)
    kind = kind_of(shapes, name)
    configs = _config_folder(config, shapes, cache_dir)
    class_name = read_index(configs, f"the config of {name}").get("_class_name")
    if class_name != SUPPORTED[kind]:
        raise ValueError(
            f"{name} is a checkpoint of a {SUPPORTED[kind]}, but the config {config!r} is of a {class_name}. Pass the folder "
            "or Hub id of a pipeline of its kind with --single_file_config."
        )
    sha256, declared = known_sha256(file), not_in_config(settings_in(file, kind, name), configs, name)
    content = f"{sha256} {_digest(configs)}" + (f" {sorted(declared.items())}" if declared else "")

    def write(draft: Path) -> None:
        plain = draft.with_suffix(".plain.safetensors")
        try:
            pipeline = convert(readable_copy(file, plain, name), kind, configs, shapes, dtypes, name)
            pipeline.scheduler = with_overrides(
                pipeline.scheduler, declared.get("prediction_type"), declared.get("rescale_betas_zero_snr", False)
            )
            save_portable(pipeline, draft)
        finally:
            plain.unlink(missing_ok=True)
        note = {"file": os.path.basename(file), "sha256": sha256, "kind": kind, "said": declared}
        write_json(draft / "single_file.json", note)

    return made_once(content, name, write, cache_dir)


def made_once(content: str, name: str, write: Callable[[Path], None], cache_dir: str | None = None) -> Path:
    """A folder that is made of a file once, whole or not at all; one that is there is taken, from a cache that cannot be
    written to, too.

    Args:
        content (`str`): What the folder is made of, as text: it is named by that.
        name (`str`): Of the file, for messages.
        write (`Callable[[Path], None]`): Makes the folder, at the place that it is given, and fills it.
        cache_dir (`str`, *optional*): Where the folder is kept; by default where the Hub's client keeps its own.

    Raises:
        ValueError: If it cannot be written.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import WeakFileLock

    key = hashlib.sha256(content.encode()).hexdigest()[:16]
    folder = Path(cache_dir or constants.HF_HOME, "single_files", key)
    if folder.exists():  # it was put there whole
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(folder.with_suffix(".lock")):  # of several processes, one makes it
            if not folder.exists():
                draft = folder.with_suffix(".draft")
                shutil.rmtree(draft, ignore_errors=True)  # of one that was cut off
                try:
                    write(draft)
                    os.replace(draft, folder)
                finally:
                    shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        raise ValueError(
            f"{name} is made into a folder once, and that cannot be written to {folder.parent} "
            f"({error.strerror or error}). Pass a folder on a disk with room that can be written to with --cache_dir."
        ) from error
    return folder


def save_portable(pipeline: "DiffusionPipeline", folder: Path) -> None:
    """Writes a pipeline's folder, in safetensors, in the form that older transformers read too.

    transformers 5 writes CLIP's text encoder without its `text_model.` prefix and its tokenizer as one file; older ones
    take the first for random weights, without an error, and cannot read the second.

    Args:
        pipeline (`DiffusionPipeline`): In any precision.
        folder (`Path`): New.
    """
    pipeline.save_pretrained(folder)
    for name, component in pipeline.components.items():
        if name.startswith("tokenizer") and component is not None and not (folder / name / "vocab.json").exists():
            component.backend_tokenizer.model.save(str(folder / name))
        if not name.startswith("text_encoder") or component is None:
            continue
        if type(component).__name__ == "CLIPTextModel":
            weights = {
                key if key.startswith("text_model.") else f"text_model.{key}": value.contiguous()
                for key, value in component.state_dict().items()
            }
            save_weights(weights, folder / name / "model.safetensors", {"format": "pt"})
        # By default transformers 5 loads what the config declares, and diffusers float32: the two have to agree.
        file = folder / name / "config.json"
        config = read_json(file)
        write_json(file, {**config, "dtype" if "dtype" in config else "torch_dtype": "float32"})


def _config_folder(config: str | None, shapes: dict[str, torch.Size], cache_dir: str | None) -> Path:
    """The folder with the configs of a pipeline that is built as the checkpoint is."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    if config is not None and os.path.isdir(config):
        folder = Path(config)
    else:
        wanted = config or fetch_diffusers_config(empty_tensors(shapes))["pretrained_model_name_or_path"]
        try:
            folder, _ = locate(wanted, None, lambda names: [one for one in names if one.endswith(_CONFIGS)], cache_dir)
        except HubError as error:
            raise ValueError(
                f"The config of the single file cannot be had from {wanted}. Pass the folder or Hub id of a diffusers "
                f"pipeline of its kind (its configs and tokenizers, no weights) with --single_file_config. {error}"
            ) from error
    what = f"--single_file_config {config or folder}"
    index = read_index(folder, what)
    check_classes(index, what)
    for name in components_of(index):
        if inside(folder, name, what).is_dir():
            files_of(folder / name, what, folder)
    return folder


def _digest(configs: Path) -> str:
    """A SHA-256 of the configs in a folder."""
    content = hashlib.sha256()
    for file in [configs / INDEX, *sorted(configs.glob("*/*"))]:
        if file.suffix in _CONFIGS and not file.name.endswith(".index.json"):
            content.update(f"{file.relative_to(configs)} {sha256_of(file)}\n".encode())
    return content.hexdigest()
