"""Where a model lies, and the same model on this machine: all that is asked of the Hub is asked in `resolve`."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
from diffusers import AutoencoderKL, ModelMixin, SchedulerMixin
from torch import nn

from ..hub.files import inside, read_json, to_bytes
from ..hub.repository import Files, HubError
from .autoencoder import autoencoder_folder, variant_of
from .card import read_card
from .components import has_weights, load_exactly, meta_model, parts_left_out, without_parts
from .flat_layout import locate_in_folders
from .model_files import (
    card_files,
    check_has_weights,
    locate,
    names_of,
    stamps_of,
    with_dtype,
    without_variant,
)
from .noise_schedule import predicted_by, scheduler_of, with_overrides
from .pipeline_folder import (
    INDEX,
    UNREADABLE,
    check_classes,
    check_component,
    check_own,
    check_pipeline,
    components_of,
    files_of,
    licences_of,
    read_index,
)
from .single_file import repo_of, single_file_of, to_folder
from .teacher_lora import fuse_lora, lora_file
from .weights import fill, owned


logger = logging.getLogger(__name__)
_SCHEDULER = "scheduler/scheduler_config.json"
_OF_NO_ID = (
    " If it is a folder or a file, there is none of this name here. (What is published holds the last part of a teacher's name "
    "only: say where it lies with --pretrained_model_name_or_path.)"
)


def title_of(network_name: str) -> str:
    """What messages call a denoiser's component."""
    return "UNet" if network_name == "unet" else network_name


def model_class(name: str) -> type[ModelMixin]:
    """The model of diffusers of a name.

    Raises:
        ValueError: If there is none.
    """
    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, ModelMixin)):
        raise ValueError(f"{name} is no model of diffusers.")
    return found


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
        null_class_label (`int`, *optional*): The class label that it was trained with for no class, which no config says.
    """

    name_or_path: str
    revision: str | None = None
    variant: str | None = None
    prediction_type: str | None = None
    vae: str | None = None
    lora: str | None = None
    single_file_config: str | None = None
    rescale_betas_zero_snr: bool = False
    null_class_label: int | None = None

    @property
    def said(self) -> str:
        """Revision and variant for messages, in brackets; empty where neither was named."""
        named = [f"{key} {getattr(self, key)}" for key in ("revision", "variant") if getattr(self, key) is not None]
        return f" ({', '.join(named)})" if named else ""

    def resolve(self, network_name: Callable[[str], str], cache_dir: str | None = None) -> "LocalModel":
        """Brings the whole model to this machine: downloads it, makes a single file into a folder, and checks all of it.

        Args:
            network_name (`Callable`): The class of its pipeline -> its denoiser's component, as `families.network_name_of`.
                It is called before any weights are downloaded, and raises if the class is not wanted.
            cache_dir (`str`, *optional*): Where downloads and conversions are kept.

        Raises:
            ValueError: If a file is missing, lies elsewhere, or cannot be read.
            HubError: If the Hub does not give it, and it is not in the cache.
        """
        place, revision = self._place(cache_dir)
        root = self._locate(place, revision, lambda names: [INDEX] if INDEX in names else [], cache_dir)
        index = read_index(root, self.what)
        network = network_name(str(index.get("_class_name")))
        check_classes(index, self.what)

        def choose(names: list[str]) -> list[str]:
            for name in components_of(index):
                if has_weights(name) and not (name == "vae" and self.vae is not None):
                    check_has_weights(name, names, self.variant, f"The model {self.name_or_path!r}")
            own = [one for name in components_of(index) for one in names_of(name, names, self.variant)]
            return [INDEX, *card_files(names), *own]

        commit = None if Path(place).is_dir() else root.name
        root = self._locate(place, commit, choose, cache_dir)
        left_out = parts_left_out(index, root, self.variant, self.name_or_path)
        check_pipeline(root, index, self.variant, self.what)
        card_folder = root
        single_file = single_file_of(self.name_or_path)
        if single_file is not None:
            commit = single_file.commit(self.revision, cache_dir)
            card_folder = self._card_beside_single_file(commit, cache_dir) or root
        vae = self.vae and autoencoder_folder(self.vae, self.variant, root / "vae", cache_dir)
        lora = self.lora and lora_file(self.lora, cache_dir)
        local = LocalModel(self, root, network, commit, index, left_out, card_folder, vae or None, lora or None)
        files = local.find_files()
        return replace(local, index=without_parts(index, left_out), files=files, stamps=stamps_of(files))

    def resolve_denoiser(self, network_name: str, cache_dir: str | None = None) -> "LocalModel":
        """Brings the denoiser alone to this machine, and what the scheduler's config says that it predicts.

        Args:
            network_name (`str`): Its component.
            cache_dir (`str`, *optional*): Where downloads and conversions are kept.

        Raises:
            ValueError: If a file of it is missing, lies elsewhere, or cannot be read, or the Hub does not give it.
        """
        place, revision = self._place(cache_dir)

        def choose(names: list[str]) -> list[str]:
            check_has_weights(network_name, names, self.variant, f"The model {self.name_or_path!r}")
            return [*names_of(network_name, names, self.variant), *(name for name in names if name == _SCHEDULER)]

        try:
            root = self._locate(place, revision, choose, cache_dir)
            lora = self.lora and lora_file(self.lora, cache_dir)
        except HubError as error:
            raise ValueError(
                f"The {title_of(network_name)} of {self.name_or_path!r} cannot be loaded. {error}"
            ) from error
        check_component(root, network_name, self.variant, self.what, "diffusers")
        commit = None if Path(place).is_dir() else root.name
        return LocalModel(self, root, network_name, commit, lora_file=lora or None)

    def resolve_configs(self, network_name: Callable[[str], str], cache_dir: str | None = None) -> "LocalModel":
        """Brings the model's configs to this machine, and no weights. Arguments as of `resolve`.

        Raises:
            ValueError: If one of them cannot be had or read, or names a file elsewhere.
        """
        place, revision = self._place(cache_dir)

        def choose(names: list[str]) -> list[str]:
            return [name for name in names if name in (INDEX, _SCHEDULER) or name.endswith("/config.json")]

        root = self._locate(place, revision, choose, cache_dir)
        index = read_index(root, self.what)
        check_classes(index, self.what)
        for name, (library, _) in components_of(index).items():
            if has_weights(name):
                check_own(root, name, self.what, library)
                read_json(inside(root, f"{name}/config.json", self.what), f"{name}/config.json of {self.what}")
        network = network_name(str(index.get("_class_name")))
        return LocalModel(self, root, network, None if Path(place).is_dir() else root.name, index)

    @property
    def what(self) -> str:
        """What messages call it."""
        return f"the model {self.name_or_path!r}"

    def _place(self, cache_dir: str | None) -> tuple[str, str | None]:
        """A folder or a Hub id, and its revision: a checkpoint in one file is made into a folder, once."""
        name, source = self.name_or_path, single_file_of(self.name_or_path)
        if source is None:
            return name, self.revision
        if self.variant is not None:
            raise ValueError(f"{name} is one file, which has no variants; leave --variant {self.variant} out.")
        return str(to_folder(source, name, self.single_file_config, self.revision, cache_dir)), None

    def _locate(
        self, place: str, revision: str | None, choose: Callable[[list[str]], list[str]], cache_dir: str | None
    ) -> Path:
        try:
            return locate_in_folders(place, revision, choose, cache_dir)
        except HubError as error:
            if repo_of(self.name_or_path) is not None:
                raise
            raise HubError(f"{error}{_OF_NO_ID}", error.kind) from error

    def _card_beside_single_file(self, commit: str | None, cache_dir: str | None) -> Path | None:
        """The folder with the card and the licence of a single file's repository; `None` if there is none to be had."""
        repo_id = repo_of(self.name_or_path)
        if repo_id is None:
            return None
        try:
            return locate(repo_id, commit, card_files, cache_dir)[0]
        except HubError as error:
            logger.warning(f"The licence of {repo_id} could not be looked up. {error}")
            return None


@dataclass(frozen=True)
class LocalModel:
    """A model on this machine, of which nothing is asked of the Hub any more. `ModelReference.resolve` makes it.

    Args:
        reference (`ModelReference`): Where it came from, and what is taken otherwise than its files say.
        folder (`Path`): Of its pipeline.
        network_name (`str`): Its denoiser's component.
        commit (`str`, *optional*): Of a model on the Hub.
        index (`dict`): The content of `model_index.json`, without the parts that are left out.
        left_out (`dict`): What its pipeline is loaded with, so that parts without a role do not stand in its way.
        card_folder (`Path`, *optional*): Where its card and the text of its licence lie.
        vae_folder (`Path`, *optional*): Of the autoencoder that takes the place of its own.
        lora_file (`Path`, *optional*): Of the LoRA that is fused into its denoiser.
        files (`Files`): What others need of it besides its denoiser; see `component_files`.
        stamps (`dict`): Of each of these files what tells whether it was written to.
    """

    reference: ModelReference
    folder: Path
    network_name: str
    commit: str | None = None
    index: dict[str, Any] = field(default_factory=dict)
    left_out: dict[str, Any] = field(default_factory=dict)
    card_folder: Path | None = None
    vae_folder: Path | None = None
    lora_file: Path | None = None
    files: Files = field(default_factory=dict)
    stamps: dict[str, tuple[int, int, int]] = field(default_factory=dict)

    @property
    def name_or_path(self) -> str:
        """As its user calls it."""
        return self.reference.name_or_path

    def component_files(self, dtype: str) -> Files:
        """What others need of the model besides its denoiser: `model_index.json` and each component's files, as they are.

        Pickled files are left out, and a variant's name is dropped, so that they load without one. Files of its
        licence come along.

        Args:
            dtype (`str`): The precision of the denoiser beside which they are put, such as `"float32"`: each text
                encoder's config declares it.
        """
        return {
            path: with_dtype(content, dtype)
            if path.endswith("/config.json") and isinstance(content, Path)
            else content
            for path, content in self.files.items()
        }

    def changed_files(self) -> list[str]:
        """The names of those files that were written to since the model was resolved."""
        return sorted(dict(self.stamps.items() ^ stamps_of(self.files).items()))

    def find_files(self) -> Files:
        """Lists what `component_files` gives, each as it lies on this machine.

        Raises:
            ValueError: If one of them lies elsewhere.
        """
        what, index = self.reference.what, self.index
        files: Files = {INDEX: self.folder / INDEX, **licences_of(self.card_folder or self.folder, what)}
        if self.left_out:
            index = without_parts(index, self.left_out)
            files[INDEX] = to_bytes(index)
        for name in components_of(index):
            if name == "vae" and self.vae_folder is not None:
                found = files_of(self.vae_folder, f"the autoencoder {self.reference.vae!r}")
                own = without_variant(found, variant_of(self.vae_folder, self.reference.variant))
            elif name != self.network_name:
                own = without_variant(files_of(self.folder / name, what, self.folder), self.reference.variant)
            else:
                continue
            files |= {f"{name}/{file}": content for file, content in own.items()}
        if self.reference.prediction_type is not None or self.reference.rescale_betas_zero_snr:
            config = files.get(_SCHEDULER)
            if not isinstance(config, Path):
                raise ValueError(f"{what} has no {_SCHEDULER}: it is not whole.")
            files[_SCHEDULER] = self._scheduler_config(config)
        return files

    def overridden_scheduler(self, scheduler: SchedulerMixin) -> SchedulerMixin:
        """The model's scheduler, with what is to be taken otherwise than it says."""
        return with_overrides(scheduler, self.reference.prediction_type, self.reference.rescale_betas_zero_snr)

    def _scheduler_config(self, file: Path) -> bytes:
        """The config of the scheduler as it is said to be; what it says besides stays."""
        what = f"The scheduler's config of {self.name_or_path!r}"
        was = read_json(file, what)
        scheduler = self.overridden_scheduler(scheduler_of(was, what))
        changes = {"prediction_type": scheduler.config.prediction_type, "_class_name": type(scheduler).__name__}
        if self.reference.rescale_betas_zero_snr:
            names = ("rescale_betas_zero_snr", "timestep_spacing", "clip_sample")
            changes |= {name: scheduler.config[name] for name in names if name in scheduler.config}
        return to_bytes({**was, **changes})

    def predicts(self) -> str | None:
        """What the model's own files say that its network predicts; `None` if they hold no scheduler.

        Raises:
            ValueError: If they cannot be read.
        """
        config = self.scheduler_config()
        return predicted_by(config) if config else None

    def scheduler_config(self) -> dict[str, Any]:
        """The `scheduler_config.json` of the model's own files; empty if they hold none."""
        file = inside(self.folder, _SCHEDULER, self.reference.what)
        return read_json(file) if file.is_file() else {}

    def card(self) -> dict[str, Any]:
        """What the model's card declares of its licence and its origin; see `read_card`."""
        return read_card(self.card_folder or self.folder, self.name_or_path)

    def load_vae(self) -> nn.Module:
        """The other autoencoder in float32; see `load_exactly`."""
        if self.vae_folder is None or self.reference.vae is None:
            raise ValueError(f"No autoencoder takes the place of that of {self.name_or_path!r}.")
        variant = variant_of(self.vae_folder, self.reference.variant)
        return load_exactly(AutoencoderKL, self.vae_folder, f"The autoencoder {self.reference.vae}", variant=variant)

    def load_network(self, network_class: type[ModelMixin]) -> ModelMixin:
        """The model's denoiser in float32.

        Raises:
            ValueError: If it cannot be read, or its weights do not fit its own config in anything.
        """
        where = {"subfolder": self.network_name, "variant": self.reference.variant}
        network = load_exactly(network_class, self.folder, f"The {self._network}", **where)
        self.fuse_lora(network)
        return owned(network, f"the {self._network}{self.with_lora}")

    def load_into(self, network: nn.Module) -> None:
        """Fills a network with the weights of the model's denoiser.

        Raises:
            ValueError: If names or shapes differ in anything; the network is then as it was.
        """
        fill(network, self.load_network(type(network)).state_dict(), f"the {self._network}")

    def fuse_lora(self, network: nn.Module) -> None:
        """Fuses the model's LoRA into its loaded denoiser, if it has one."""
        if self.lora_file is not None:
            fuse_lora(network, self.lora_file, self.reference.lora)

    @property
    def _network(self) -> str:
        """What messages call its denoiser."""
        return f"{title_of(self.network_name)} of {self.name_or_path!r}"

    @property
    def with_lora(self) -> str:
        """What else its denoiser's weights are made of, for messages."""
        return "" if self.reference.lora is None else f" with the LoRA {self.reference.lora!r} fused into it"

    def meta_network(self) -> ModelMixin:
        """The denoiser's architecture without weights, on the meta device.

        Raises:
            ValueError: If its config cannot be read.
        """
        try:
            network_class = model_class(components_of(self.index)[self.network_name][1])
            return meta_model(network_class, self.folder, subfolder=self.network_name)
        except UNREADABLE as error:
            raise ValueError(
                f"The config of the {self._network} cannot be read; say where the teacher is with "
                f"--pretrained_model_name_or_path. {error}"
            ) from error
