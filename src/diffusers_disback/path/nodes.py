"""Reading a degradation path: its nodes' weights, exact and checked by their hashes, and what is known of them."""

import hashlib
import json
import logging
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..hub.files import inside, sha256_of
from ..hub.published import component_of
from ..hub.repository import HubError, in_background
from ..models.adapters import config_of
from ..models.reference import LocalModel, ModelReference
from ..models.weights import check_adapter_fit, check_finite, check_fit, fill, fill_adapter, mapped_weights
from .manifest import MANIFEST
from .storage import FolderNodes, HubNodes, Nodes


logger = logging.getLogger(__name__)


class PathNodes:
    """Nodes 0..N of a path that is read. Node 0 is the teacher, by reference; `len(path)` is N, the recorded nodes.

    Args:
        folders (`Nodes`): Where its nodes lie.
        manifest (`dict`): The content of `path.json`.
        teacher (`ModelReference` or `LocalModel`): Where node 0 is loaded from.
        cache_dir (`str`, *optional*): Where downloads are kept.
    """

    def __init__(
        self,
        folders: Nodes,
        manifest: dict[str, Any],
        teacher: ModelReference | LocalModel,
        cache_dir: str | None = None,
    ):
        self.folders = folders
        self.manifest = manifest
        self._local_teacher = teacher if isinstance(teacher, LocalModel) else None
        self.teacher = teacher.reference if isinstance(teacher, LocalModel) else teacher
        self.cache_dir = cache_dir
        self.teacher_was_told = True  # by the user, or by a run's settings, and not by `path.json` alone
        self.seconds_waited = 0.0
        self._coming: dict[int, Future[list[Path]]] = {}
        self._sound: set[tuple[Path, int, int, str]] = set()  # files that were hashed: size, time of change, hash

    def __len__(self) -> int:
        return len(self.manifest["nodes"])

    @property
    def complete(self) -> bool:
        """Whether stage 1 has ended."""
        return self.manifest["complete"]

    @property
    def denoiser(self) -> str:
        """The teacher's component that nodes are of, and the name of their folders: `unet`, `transformer`."""
        return component_of(self.manifest)

    @property
    def nodes(self) -> list[dict[str, Any]]:
        """What is known of nodes 1..N: `name`, `kind`, `step`, `loss`, `dtype`, `bytes`, `files` with their SHA-256,
        and what was measured of them (`mismatch`)."""
        return self.manifest["nodes"]

    @property
    def where(self) -> str:
        """The folder, or the repository's id."""
        return self.folders.where

    @property
    def commit(self) -> str | None:
        """The commit of a path on the Hub; `None` of a folder."""
        return self.folders.commit if isinstance(self.folders, HubNodes) else None

    @property
    def folder(self) -> Path:
        """The folder that it is recorded in.

        Raises:
            ValueError: If it lies on the Hub.
        """
        if not isinstance(self.folders, FolderNodes):
            raise ValueError(f"The path {self.where} lies on the Hub and cannot be recorded on; `save_pretrained` it.")
        return self.folders.folder

    def local_teacher(self) -> LocalModel:
        """The teacher on this machine; it is resolved when it is needed first."""
        self._local_teacher = self._known_teacher() or self.teacher.resolve(lambda _: self.denoiser, self.cache_dir)
        return self._local_teacher

    def _known_teacher(self) -> LocalModel | None:
        """The teacher, if it was resolved, and is the same still."""
        known = self._local_teacher
        return known if known is not None and known.reference == self.teacher else None

    def node_folder(self, index: int) -> Path:
        """The folder of node 1..N, after a download if need be."""
        return self.folders.fetch(self._node(index))

    def load(self, index: int, into: nn.Module, adapter: str | None = None) -> None:
        """Fills a network with a node's weights: an exact fit, or an error and the network as it was.

        Args:
            index (`int`): 0 (the teacher) to N.
            into (`nn.Module`): A network of the teacher's architecture, unwrapped.
            adapter (`str`, *optional*): The name of the adapter on it that an adapter node fills.

        Raises:
            IndexError: If the path has no such node.
            ValueError: If files are missing, damaged, or of another architecture, or an adapter is asked for where there
                is none, or the other way round.
        """
        if index == 0:
            (self._known_teacher() or self.teacher.resolve_denoiser(self.denoiser, self.cache_dir)).load_into(into)
            return
        kind = self._node(index)["kind"]
        if (kind == "adapter") != (adapter is not None):
            raise ValueError(
                f"node {index} of {self.where} is of kind {kind!r}, but adapter={adapter!r} is to be filled."
            )
        weights, what = self._mapped(index), f"node {index} of {self.where}"
        if adapter is None:
            fill(into, weights, what)
        else:
            fill_adapter(into, weights, adapter, what)

    def read(self, index: int) -> dict[str, torch.Tensor]:
        """The weights of node 1..N, as stored and in memory of their own, after a check of every file's hash.

        `seconds_waited` is then how long the node's files had to be waited for.
        """
        return {key: tensor.clone() for key, tensor in self._mapped(index).items()}

    def _mapped(self, index: int) -> dict[str, torch.Tensor]:
        """The same, mapped to the files: for what copies them into a network, which has them in memory once already."""
        started = time.monotonic()
        coming = self._coming.pop(index, None)
        try:
            files = self._files(index) if coming is None else coming.result()
        except HubError as error:
            if coming is None:
                raise
            logger.warning(f"Node {index} could not be fetched ahead. {error} Trying again now.")
            files = self._files(index)
        self.seconds_waited = time.monotonic() - started
        weights: dict[str, torch.Tensor] = {}
        for file in files:
            weights.update(mapped_weights(file))
        dtype = self.nodes[index - 1]["dtype"]
        others = sorted(key for key, tensor in weights.items() if str(tensor.dtype) != f"torch.{dtype}")
        if others:
            raise ValueError(
                f"node {index} of {self.where} is not what {MANIFEST} says: {others[0]} is {weights[others[0]].dtype}, "
                f"not {dtype}."
            )
        check_finite(weights.items(), f"node {index} of {self.where}")
        return weights

    def prefetch(self, index: int) -> None:
        """Downloads and checks a node in the background, so that `load` does not wait for it. The teacher has no need."""
        if 1 <= index <= len(self) and index not in self._coming:
            self._coming[index] = in_background(self._files, index)

    def release(self, index: int) -> None:
        """Takes note that a node is behind: if it was downloaded, the disk budget may have its place."""
        if 1 <= index <= len(self):
            self.folders.release(self._node(index))

    def move_on(self, behind: int, node: int) -> None:
        """Lets go of the nodes from `behind` down to a target, and begins to fetch the one after it."""
        for index in range(behind, node, -1):
            self.release(index)
        if node > 1:
            self.prefetch(node - 1)

    def verify(self, network: nn.Module | None = None) -> None:
        """Reads every node.

        Args:
            network (`nn.Module`, *optional*): Of the teacher's architecture, on any device, `meta` included: every node
                has to fit it in everything.

        Raises:
            ValueError: If a file of any node is missing or not what was recorded, or does not fit.
        """
        for index in range(1, len(self) + 1):
            if network is None:
                self._files(index)
            else:
                self.verify_node(index, network)

    def verify_node(self, index: int, network: nn.Module) -> int:
        """Reads one node, and sees that it fits the teacher's architecture in everything. Returns its tensors' number."""
        weights, what = self._mapped(index), f"node {index} of {self.where}"
        if self._node(index)["kind"] == "full":
            check_fit(network.state_dict(), weights, what)
        else:
            check_adapter_fit(network, weights, what)
        return len(weights)

    def check(self, teacher_sha256: str, generator: dict[str, Any], denoiser: str) -> None:
        """Raises a `ValueError` if the path was recorded from another teacher or another start, naming which.

        Args:
            teacher_sha256 (`str`): `fingerprint` of the teacher's denoiser.
            generator (`dict`): The start, as of `create`.
            denoiser (`str`): The teacher's component.
        """
        self._check_teacher_is_asked_as_recorded()
        if self.denoiser != denoiser:
            raise ValueError(
                f"The path in {self.where} is of a pipeline's {self.denoiser}, but this teacher's denoiser is its {denoiser}. "
                "Record a path for it with stage 1."
            )
        recorded = self.manifest["teacher"]["sha256"]
        if recorded != teacher_sha256:
            raise ValueError(
                f"The path in {self.where} was recorded from another teacher, {self.manifest['teacher']['name_or_path']!r} "
                f"(SHA-256 {recorded[:12]}), not from this one ({teacher_sha256[:12]}). Record a path for it with stage 1."
            )
        for key in ("sha256", "conditioning_timestep"):
            was, is_ = self.manifest["generator"][key], generator[key]
            if was != is_:
                like_it = f", or pass --{key} {was}" if key == "conditioning_timestep" else ""
                raise ValueError(
                    f"The path in {self.where} was recorded from another initial generator: its {key} is {was}, this "
                    f"one's is {is_}. Record a path for this start with stage 1{like_it}."
                )

    def _check_teacher_is_asked_as_recorded(self) -> None:
        """Nodes are of the schedule that they were recorded with: the same flags have to say what the teacher's files do not."""
        for key in ("prediction_type", "rescale_betas_zero_snr", "null_class_label"):
            found = (self.manifest["teacher"].get(key), getattr(self.teacher, key))
            was, is_ = (None if value is False else value for value in found)
            if was != is_:
                flags = [f"without --{key}" if value is None else f"with --{key} {value}" for value in (was, is_)]
                belongs = (
                    "are of another unconditional branch"
                    if key == "null_class_label"
                    else "belong to another schedule"
                )
                raise ValueError(
                    f"The path in {self.where} was recorded {flags[0]}, but is to be replayed {flags[1]}: its nodes "
                    f"{belongs}. Pass what it was recorded with, or record another path with stage 1."
                )

    def adapter_config(self, index: int) -> Any:
        """Rank, alpha and layers of an adapter node, a `LoraConfig`.

        Raises:
            ValueError: If it is none, or its file does not say.
        """
        if self._node(index)["kind"] != "adapter":
            raise ValueError(f"node {index} of {self.where} is a whole network, no adapter.")
        (file,) = self._files(index)
        return config_of(file)

    @property
    def kind(self) -> str | None:
        """What its nodes are, `full` or `adapter`; `None` if there are none."""
        return self.nodes[0]["kind"] if self.nodes else None

    def _node(self, index: int) -> dict[str, Any]:
        if not 1 <= index <= len(self):
            raise IndexError(f"node {index} is not on this path: its recorded nodes are 1..{len(self)}.")
        return self.nodes[index - 1]

    def _files(self, index: int) -> list[Path]:
        """The files of a node's weights, checked."""
        return self._checked(index, self.node_folder(index))

    def _checked(self, index: int, folder: Path) -> list[Path]:
        hashes = self.nodes[index - 1]["files"]
        for name, sha256 in hashes.items():
            file = inside(folder, f"{self.denoiser}/{name}", f"{MANIFEST} of {self.where}")
            if not file.is_file():
                raise ValueError(f"node {index} is incomplete: {file} is missing. Record or pull the path again.")
            status = file.stat()
            seen = file, status.st_size, status.st_mtime_ns, sha256
            if seen not in self._sound and sha256_of(file) != sha256:
                raise ValueError(f"node {index} is damaged: {file} is not what was recorded (SHA-256 differs).")
            self._sound.add(seen)
        return [folder / self.denoiser / name for name in hashes]


def digest_of(nodes: list[dict[str, Any]]) -> str:
    """What tells a path's weights from others': a digest of all of their hashes."""
    hashes = [node["files"] for node in nodes]
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()[:16]
