"""Where a model lies, and how a network is filled with weights: exactly, or not at all."""

import hashlib
import logging
import os
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import nn

from ..hub.files import inside, printable, read_json, read_text, to_bytes
from ..hub.repository import Files, HubError, Repository, downloaded
from .autoencoder import autoencoder_folder, load_autoencoder, variant_of
from .components import left_out, pipeline_class_of, without_parts
from .noise_schedule import scheduler_of, with_said_otherwise
from .pipeline_folder import (
    INDEX,
    UNREADABLE,
    WEIGHTS,
    check_classes,
    check_component,
    check_own,
    check_pipeline,
    components_of,
    files_of,
    licences_of,
    of_variant,
    read_index,
)
from .single_file import repo_of, single_file_of, to_folder
from .teacher_lora import fuse_lora
from .weights import owned


logger = logging.getLogger(__name__)
_KEPT = (".json", ".txt", ".safetensors", ".model")


CARD = "README.md"
_LARGEST_CARD, _LARGEST_FRONT_MATTER, _LONGEST_NAME = 10_000_000, 256_000, 1000  # bytes, characters, characters
_FRONT_MATTER = re.compile(r"\A\s*^---[ \t]*$(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
_NOTHING = (None, "", "null", "~", [])
_MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def fingerprint(network: nn.Module) -> str:
    """A SHA-256 of a network's weights: names, types, shapes and bytes. Equal for equal weights, wherever stored."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@dataclass(frozen=True)
class ModelReference:
    """Where a model lies: a folder, a model on the Hub, or a checkpoint in one file.

    Args:
        name_or_path (`str`): A folder, a Hub id, or a file; one on the Hub as `user/repo/file.safetensors` or by its address.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        variant (`str`, *optional*): Of the weights' files, such as `fp16`.
        prediction_type (`str`, *optional*): What it predicts, if its scheduler's config says something else.
        vae (`str`, *optional*): The folder, Hub id or file of an autoencoder that takes the place of its own.
        lora (`str`, *optional*): The file, folder or Hub id of a LoRA that is fused into its denoiser.
        single_file_config (`str`, *optional*): Of a checkpoint in one file: the folder or Hub id of a pipeline that says
            how it is built.
        rescale_betas_zero_snr (`bool`): Whether its betas are rescaled to zero terminal SNR, though its scheduler's config
            does not say so.
    """

    name_or_path: str
    revision: str | None = None
    variant: str | None = None
    prediction_type: str | None = None
    vae: str | None = None
    lora: str | None = None
    single_file_config: str | None = None
    rescale_betas_zero_snr: bool = False

    def source(self, cache_dir: str | None = None) -> "ModelReference":
        """The same model as a folder or a Hub id: a checkpoint in one file is made into a folder, once.

        Raises:
            ValueError: If it cannot be.
        """
        if single_file_of(self.name_or_path) is None:
            return self
        if self.variant is not None:
            raise ValueError(
                f"{self.name_or_path} is one file, which has no variants; leave --variant {self.variant} out."
            )
        folder = to_folder(self.name_or_path, self.single_file_config, self.revision, cache_dir)
        return replace(self, name_or_path=str(folder), revision=None, single_file_config=None)

    def commit(self, cache_dir: str | None = None) -> str | None:
        """The commit that a downloaded model is of; `None` for a folder, or if it was not downloaded."""
        from huggingface_hub import try_to_load_from_cache

        single = single_file_of(self.name_or_path)
        if single is not None:
            return single.commit(self.revision, cache_dir)
        if os.path.isdir(self.name_or_path):
            return None
        file = try_to_load_from_cache(self.name_or_path, INDEX, cache_dir, self.revision or "main")
        return Path(file).parent.name if isinstance(file, str) else None

    def folder(self, cache_dir: str | None = None) -> Path:
        """Where the pipeline's files lie on this machine. The Hub is asked once in a process.

        Raises:
            ValueError: If they cannot be had.
        """
        source = self.source(cache_dir)
        if os.path.isdir(source.name_or_path):
            return Path(source.name_or_path)
        return _downloaded(source, cache_dir)

    def index(self, cache_dir: str | None = None) -> dict[str, Any]:
        """The pipeline's `model_index.json`; of a model on the Hub nothing else is downloaded.

        Raises:
            ValueError: If it cannot be had, or names what is no component.
        """
        source, what = self.source(cache_dir), f"the model {self.name_or_path!r}"
        if os.path.isdir(source.name_or_path):
            root = Path(source.name_or_path)
        else:
            try:
                file = Repository(source.name_or_path, patient=False).file(INDEX, source.revision, cache_dir)
            except HubError as error:
                raise HubError(f"{error}{self.whereabouts()}", error.passes, error.wait, error.kind) from error
            if file is None:
                raise ValueError(f"{what} has no {INDEX}: it is no diffusers pipeline.")
            root = file.parent
        return read_index(root, what)

    def check_files(self, cache_dir: str | None = None) -> Path:
        """The folder of the pipeline's files, after a check of all that diffusers will read of it.

        Raises:
            ValueError: If a file is missing, lies elsewhere, or cannot be read.
        """
        source = self.source(cache_dir)
        index, folder = self.index(cache_dir), self.folder(cache_dir)
        check_pipeline(folder, index, source.variant, f"the model {self.name_or_path!r}")
        return folder

    def papers(self, cache_dir: str | None = None) -> Path:
        """The folder in which the model's card and licence lie, if it has any."""
        repo_id = repo_of(self.name_or_path)
        if repo_id is None or single_file_of(self.name_or_path) is None:
            return self.folder(cache_dir)
        return _papers(repo_id, self.commit(cache_dir), cache_dir) or self.folder(cache_dir)

    def component_files(self, dtype: str, cache_dir: str | None = None) -> Files:
        """What others need of the model besides its denoiser: `model_index.json` and each component's files, as they are.

        Pickled files are left out, and a variant's name is dropped, so that they load without one. Files of its
        licence come along.

        Args:
            dtype (`str`): The precision of the denoiser beside which they are put, such as `"float32"`: each text
                encoder's config declares it.
            cache_dir (`str`, *optional*): Where downloads are kept.
        """
        root = self.folder(cache_dir)
        what = f"the model {self.name_or_path!r}"
        index = read_index(root, what)
        check_classes(index, what)
        files: Files = {INDEX: root / INDEX, **licences_of(self.papers(cache_dir), what)}
        without = self.left_out(index, cache_dir)
        if without:
            index = without_parts(index, without)
            files[INDEX] = to_bytes(index)
        for name in components_of(index):
            if name == "vae" and self.vae is not None:
                own = self._vae_files(dtype, cache_dir)
            elif name != "unet":
                own = _own_files(root / name, self.variant, dtype, what, root)
            else:
                continue
            files |= {f"{name}/{file}": content for file, content in own.items()}
        if self.prediction_type is not None or self.rescale_betas_zero_snr:
            path = "scheduler/scheduler_config.json"
            if path not in files:
                raise ValueError(f"{what} has no {path}: it is not whole.")
            files |= self._scheduler_file(files[path])
        return files

    def scheduler_as_said(self, scheduler: SchedulerMixin) -> SchedulerMixin:
        """The model's scheduler, with what is to be taken otherwise than it says."""
        return with_said_otherwise(scheduler, self.prediction_type, self.rescale_betas_zero_snr)

    def _scheduler_file(self, file: Path) -> Files:
        """The config of the scheduler as it is said to be; what it says besides stays."""
        what = f"The scheduler's config of {self.name_or_path!r}"
        was = read_json(file, what)
        made = self.scheduler_as_said(scheduler_of(was, what))
        said = {"prediction_type": made.config.prediction_type, "_class_name": type(made).__name__}
        if self.rescale_betas_zero_snr:
            names = ("rescale_betas_zero_snr", "timestep_spacing", "clip_sample")
            said |= {name: made.config[name] for name in names if name in made.config}
        return {"scheduler/scheduler_config.json": to_bytes({**was, **said})}

    def predicts(self, cache_dir: str | None = None) -> str | None:
        """What the model's own files say that its network predicts; `None` if they hold no scheduler.

        Raises:
            ValueError: If they cannot be read.
        """
        source = self.source(cache_dir)
        path = "scheduler/scheduler_config.json"
        if os.path.isdir(source.name_or_path):
            file = inside(source.name_or_path, path, f"the model {self.name_or_path!r}")
        else:
            try:
                file = Repository(source.name_or_path, patient=False).file(path, source.revision, cache_dir)
            except HubError as error:
                logger.warning(f"What {source.name_or_path} predicts could not be looked up. {error}")
                return None
        if file is None or not file.is_file():
            return None
        return str(read_json(file).get("prediction_type", "epsilon"))

    def vae_folder(self, cache_dir: str | None = None) -> Path:
        """Where the files of the other autoencoder lie on this machine.

        Raises:
            ValueError: If there is none, or it cannot be taken.
        """
        return autoencoder_folder(self.vae, self.variant, self.folder(cache_dir) / "vae", cache_dir)

    def load_vae(self, cache_dir: str | None = None) -> nn.Module:
        """The other autoencoder in float32; see `load_autoencoder`."""
        return load_autoencoder(self.vae_folder(cache_dir), self.variant, self.vae)

    def _vae_files(self, dtype: str, cache_dir: str | None) -> Files:
        folder = self.vae_folder(cache_dir)
        return _own_files(folder, variant_of(folder, self.variant), dtype, f"the autoencoder {self.vae!r}")

    def left_out(self, index: dict[str, Any], cache_dir: str | None = None) -> dict[str, Any]:
        """What the model is loaded with, so that parts without a role do not stand in its way; see `components`."""
        source = self.source(cache_dir)
        return left_out(index, source.name_or_path, source.revision, source.variant, cache_dir)

    def card(self, cache_dir: str | None = None) -> dict[str, Any]:
        """What the model's card declares of its licence and its origin: `license`, `license_name`, `license_link` and
        `base_model`, as far as these are names; empty if it has no card. One that cannot be read stops nothing: it is told
        in a warning, and taken for empty."""
        folder, owner = self.papers(cache_dir), printable(self.name_or_path)
        file = inside(folder, CARD, f"The folder of {owner}")
        if not file.exists():
            return {}
        try:
            declared = _front_matter(file, f"The card ({CARD}) of {owner}")
        except ValueError as error:
            logger.warning(f"{error} No licence is taken over from it; look it up before you share what is made.")
            return {}
        known = {key: declared.get(key) for key in ("license", "license_name", "license_link", "base_model")}
        wrong = [key for key, value in known.items() if value not in _NOTHING and not _is_name(key, value)]
        if wrong:
            logger.warning(
                f"The card ({CARD}) of {owner} declares {' and '.join(wrong)} by something that is no name; it is left out."
            )
        return {key: value for key, value in known.items() if value not in _NOTHING and key not in wrong}

    def load_network(self, network_class: type[nn.Module], cache_dir: str | None = None) -> nn.Module:
        """The model's `unet` in float32.

        Raises:
            ValueError: If it cannot be read, or its weights do not fit its own config in anything.
        """
        source = self.source(cache_dir)
        try:
            folder = _denoiser_folder(source, cache_dir)
        except HubError as error:
            raise ValueError(f"The UNet of {self.name_or_path!r} cannot be loaded. {error}") from error
        try:
            network, info = network_class.from_pretrained(
                folder,
                subfolder="unet",
                variant=source.variant,
                torch_dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
            )
        except UNREADABLE as error:
            raise ValueError(
                f"The UNet of {self.name_or_path!r} cannot be loaded. {error}{source.other_variants()}"
            ) from error
        wrong = {kind: keys for kind, keys in info.items() if keys}
        if wrong:
            raise ValueError(f"The UNet of {self.name_or_path!r} does not fit its own config: {wrong}.")
        if self.lora is not None:
            fuse_lora(network, self.lora, cache_dir)
        return owned(network, f"the UNet of {self.name_or_path!r}{self.with_lora}")

    @property
    def with_lora(self) -> str:
        """What else its denoiser's weights are made of, for messages."""
        return "" if self.lora is None else f" with the LoRA {self.lora!r} fused into it"

    def other_variants(self) -> str:
        """Of a model whose weights were not found: a sentence on those that are there, if there are any."""
        try:
            if os.path.isdir(self.name_or_path):
                names = [file.name for file in Path(self.name_or_path, "unet").glob("*")]
            else:
                repository = Repository(self.name_or_path, patient=False)
                names = [path.removeprefix("unet/") for path in repository.tree(repository.head(self.revision))]
        except HubError:  # which is what the error tells already
            return ""
        matches = [match for match in map(WEIGHTS.fullmatch, names) if match]
        found = {match.group(1) or match.group(2) for match in matches} - {None, self.variant}
        if not found:
            return ""
        variants = " and ".join(sorted(found))
        return (
            f" There are weights of the variant {variants}: pass --variant {sorted(found)[0]} if it is the teacher; a student's "
            "start has to have weights without a variant."
        )

    def whereabouts(self) -> str:
        """Of a model that was not found, and whose name is no id on the Hub: a sentence on how to say where it lies."""
        if repo_of(self.name_or_path) is not None:
            return ""
        return (
            " If it is a folder or a file, say where it lies with --pretrained_model_name_or_path: what is published holds the "
            "last part of its name only."
        )

    def configs(self, components: dict[str, str], cache_dir: str | None = None) -> Path:
        """The folder that holds the `config.json` of components; of a model on the Hub nothing else is downloaded.

        Args:
            components (`dict[str, str]`): Their names, and the library that the class of each is from.
            cache_dir (`str`, *optional*): Where downloads are kept.

        Raises:
            ValueError: If one of them cannot be had, or is not its own; see `check_own`.
        """
        source, what = self.source(cache_dir), f"the model {self.name_or_path!r}"
        root = Path(source.name_or_path)
        if not root.is_dir():
            patterns = [f"{name}/config.json" for name in components]
            root = Repository(source.name_or_path, patient=False).download(patterns, source.revision, cache_dir)
        for name, library in components.items():
            check_own(root, name, what, library)
            read_json(inside(root, f"{name}/config.json", what), f"{name}/config.json of {what}")
        return root

    def skeleton(self, cache_dir: str | None = None) -> nn.Module:
        """The denoiser's architecture without weights, on the meta device.

        Raises:
            ValueError: If its config cannot be read.
        """
        from diffusers import UNet2DConditionModel

        try:
            config = UNet2DConditionModel.load_config(self.configs({"unet": "diffusers"}, cache_dir), subfolder="unet")
            with torch.device("meta"):
                return UNet2DConditionModel.from_config(config)
        except UNREADABLE as error:
            raise ValueError(
                f"The config of the UNet of {self.name_or_path!r} cannot be read; say where the teacher is with "
                f"--pretrained_model_name_or_path. {error}"
            ) from error

    def load_into(self, network: nn.Module, cache_dir: str | None = None) -> None:
        """Fills a network with the model's `unet` weights.

        Raises:
            ValueError: If names or shapes differ in anything; the network is then as it was.
        """
        loaded = self.load_network(type(network), cache_dir)
        fill(network, loaded.state_dict(), f"the UNet of {self.name_or_path!r}")


@cache
def _downloaded(reference: ModelReference, cache_dir: str | None) -> Path:
    """A pipeline's files, and with them its card and the text of its licence, if the Hub gives these."""
    index = reference.index(cache_dir)
    check_classes(index, f"the model {reference.name_or_path!r}")  # before diffusers goes by it
    without = reference.left_out(index, cache_dir)
    try:
        folder = pipeline_class_of(index).download(
            reference.name_or_path,
            revision=reference.revision,
            variant=reference.variant,
            cache_dir=cache_dir,
            use_safetensors=True,
            **without,
        )
    except UNREADABLE as error:
        hints = f"{reference.other_variants()}{reference.whereabouts()}"
        raise ValueError(f"The model {reference.name_or_path!r} cannot be downloaded. {error}{hints}") from error
    _papers(reference.name_or_path, reference.commit(cache_dir), cache_dir)
    return Path(folder)


def _denoiser_folder(source: ModelReference, cache_dir: str | None) -> Path:
    """The folder whose `unet/` holds a model's denoiser on this machine, checked; nothing else of it is downloaded.

    Raises:
        ValueError: If a file of it lies elsewhere, or cannot be read.
        HubError: If the Hub does not give it.
    """
    root, stem = Path(source.name_or_path), "unet/diffusion_pytorch_model"
    if not root.is_dir():
        dot = "" if source.variant is None else f".{source.variant}"
        patterns = [f"{stem}{dot}.safetensors", f"{stem}{dot}-*.safetensors", f"{stem}-*{dot}.safetensors"]
        patterns += [f"{stem}.safetensors.index{dot}.json", "unet/config.json"]
        root = downloaded(source.name_or_path, tuple(patterns), source.revision, cache_dir)
    if (root / "unet").is_dir():  # if it is not, that is told with what is there
        check_component(root, "unet", source.variant, f"the model {source.name_or_path!r}", "diffusers")
    return root


@cache
def _papers(repo_id: str, commit: str | None, cache_dir: str | None) -> Path | None:
    """The folder with a repository's card and the text of its licence; `None` if they could not be looked up."""
    try:
        return Repository(repo_id, patient=False).download(["README.md", "LICENSE*", "LICENCE*"], commit, cache_dir)
    except HubError as error:
        logger.warning(f"The licence of {repo_id} could not be looked up. {error}")
        return None


def check_fit(own: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], what: str) -> None:
    """Raises a `ValueError` unless weights have the names and shapes of a network's own."""
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [key for key in own.keys() & weights.keys() if own[key].shape != weights[key].shape]
    if missing or unexpected or shapes:
        raise ValueError(
            f"{what} does not fit: {len(missing)} tensors missing, {len(unexpected)} unexpected, {len(shapes)} of "
            f"another shape (the first: {[*missing[:1], *unexpected[:1], *sorted(shapes)[:1]]}). It belongs to another "
            "architecture."
        )


def check_adapter_fit(network: nn.Module, weights: dict[str, torch.Tensor], what: str) -> None:
    """Raises a `ValueError` unless an adapter's weights are pairs of the shapes that a network's layers take."""
    layers = {name: layer.weight.shape for name, layer in network.named_modules() if hasattr(layer, "weight")}
    pairs: dict[str, dict[str, torch.Size]] = {}
    for key, tensor in weights.items():
        name, _, part = key.partition(".lora_")
        pairs.setdefault(name, {})[part] = tensor.shape
    for name, pair in pairs.items():
        own, down, up = layers.get(name), pair.get("A.weight"), pair.get("B.weight")
        if own is None or len(pair) != 2 or down is None or up is None:
            raise ValueError(
                f"{what} adapts {name} by {sorted(pair)}, which the teacher's architecture does not take."
            )
        if down[1:] != own[1:] or up[:2] != (own[0], down[0]):
            raise ValueError(
                f"{what} does not fit: it adapts {name} by {tuple(down)} and {tuple(up)}, but the teacher has "
                f"{tuple(own)} there. It belongs to another architecture."
            )


def fill(network: nn.Module, weights: dict[str, torch.Tensor], what: str) -> None:
    """Copies weights into a network, if names and shapes agree in everything."""
    check_fit(network.state_dict(), weights, what)
    network.load_state_dict(weights, strict=True)


def fill_adapter(network: nn.Module, weights: dict[str, torch.Tensor], adapter: str, what: str) -> None:
    """Copies weights into an adapter on a network, if names and shapes agree in everything."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    check_fit(get_peft_model_state_dict(network, adapter_name=adapter), weights, what)
    set_peft_model_state_dict(network, weights, adapter_name=adapter)


def _front_matter(file: Path, what: str) -> dict[str, Any]:
    """The YAML at the head of a card, in which every scalar is a text.

    Raises:
        ValueError: If it is none.
    """
    import yaml

    if not file.is_file():
        raise ValueError(f"{what} is no regular file.")
    if file.stat().st_size > _LARGEST_CARD:
        raise ValueError(f"{what} is larger than {_LARGEST_CARD // 1_000_000} MB, and was not read.")
    head = _FRONT_MATTER.match(read_text(file, what).removeprefix("\ufeff").replace("\r\n", "\n"))
    if head is None:
        return {}
    if len(head[1]) > _LARGEST_FRONT_MATTER:
        raise ValueError(f"{what} begins with more than {_LARGEST_FRONT_MATTER:,} characters of metadata.")
    try:
        # Neither tags nor merged mappings are followed, by which a few lines can become gigabytes.
        declared = yaml.load(head[1], Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError) as error:
        reason = getattr(error, "problem", None) or "it is nested too deeply"
        raise ValueError(f"{what} begins with metadata that are no valid YAML ({printable(reason)}).") from error
    if declared is not None and not isinstance(declared, dict):
        raise ValueError(f"{what} begins with metadata that are a {type(declared).__name__}, no names and values.")
    return declared or {}


def _is_name(key: str, value: Any) -> bool:
    """Whether a card's entry is what it has to be: a text, or of some several."""
    values = value if isinstance(value, list) and key in ("license", "base_model") else [value]
    return all(
        isinstance(each, str)
        and len(each) <= _LONGEST_NAME
        and (key != "base_model" or _MODEL_ID.fullmatch(each) is not None)
        for each in values
    )


def _own_files(
    folder: Path, variant: str | None, dtype: str, what: str | None = None, root: Path | None = None
) -> Files:
    """A component's files by the names that they have without a variant."""
    files = [file for file in files_of(folder, what or str(folder), root) if file.suffix in _KEPT]
    own: Files = {}
    for file in of_variant([file for file in files if ".bin.index." not in file.name], variant):
        match = WEIGHTS.fullmatch(file.name)
        of = match and (match.group(1) or match.group(2))
        if file.name == "config.json":
            own[file.name] = _with_dtype(file, dtype)
        elif match is None and file.suffix == ".safetensors":
            continue  # another program's copy
        elif not of:
            own[file.name] = file
        else:
            is_index = file.suffix == ".json"  # of shards, which it names
            content = read_text(file).replace(f".{of}", "").encode() if is_index else file
            own[file.name.replace(f".{of}", "")] = content
    return own


def _with_dtype(file: Path, dtype: str) -> Path | bytes:
    """The config of a transformers model, in which it is declared to be of the denoiser's precision: by default
    transformers 5 loads what the config declares, diffusers float32, and the two would not fit together."""
    config = read_json(file)
    key = next((key for key in ("dtype", "torch_dtype") if key in config), "torch_dtype")
    if "model_type" not in config or config.get(key) == dtype:
        return file
    return to_bytes({**config, key: dtype})
