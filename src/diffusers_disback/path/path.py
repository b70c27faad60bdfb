"""The degradation path: an ordered sequence of diffusers model folders, from the teacher to the initial generator."""

import logging
import os
import shutil
import time
import uuid
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..hub.cards import STABLE_DIFFUSION, Usage, path_card
from ..hub.files import inside, sha256_of, to_bytes, write_json
from ..hub.published import clean_configs
from ..hub.repository import Files, HubError, Repository, in_background, is_repo_id
from ..models.adapters import config_of, write_adapter
from ..models.reference import LocalModel, ModelReference
from ..models.weights import (
    check_adapter_fit,
    check_finite,
    check_fit,
    fill,
    fill_adapter,
    mapped_weights,
    open_weights,
    read_weights,
    save_weights,
)
from .manifest import FORMAT_VERSION, MANIFEST, denoiser_of, name_of, read_manifest
from .sharing import check_is_ours, check_teacher_may_be_shared, push_nodes
from .storage import FolderNodes, HubNodes, Nodes


logger = logging.getLogger(__name__)


class DegradationPath:
    """Nodes 0..N in a folder or on the Hub. Node 0 is the teacher, by reference; `len(path)` is N, the recorded nodes.

    Node i lies in `degradation-<its step>/`, a folder or the branch of that name, as its denoiser's component (`unet/`,
    `transformer/`) and `node.json`, and `path.json` lists them. Everything is written whole or not at all.

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

    @classmethod
    def create(
        cls,
        folder: str | Path,
        teacher: LocalModel,
        teacher_sha256: str,
        generator: dict[str, Any],
        recording: dict[str, Any],
    ) -> "DegradationPath":
        """An empty path; its folder is written by `begin`, or with the first node.

        Args:
            folder (`str` or `Path`): Must not hold a path yet.
            teacher (`LocalModel`): Node 0.
            teacher_sha256 (`str`): `fingerprint` of its network.
            generator (`dict`): The start: `name_or_path`, `sha256` and `conditioning_timestep`.
            recording (`dict`): The settings of stage 1.
        """
        folder = Path(folder)
        if (folder / MANIFEST).exists():
            raise ValueError(f"{folder} holds a degradation path already; choose another folder, or remove it.")
        manifest = {
            "format_version": FORMAT_VERSION,
            "id": uuid.uuid4().hex,
            "component": teacher.network_name,
            "teacher": {**asdict(teacher.reference), "commit": teacher.commit, "sha256": teacher_sha256},
            "generator": generator,
            "recording": recording,
            "complete": False,
            "nodes": [],
        }
        return cls(FolderNodes(folder, teacher.network_name), manifest, teacher)

    @classmethod
    def from_pretrained(
        cls,
        folder_or_repo: str | Path,
        revision: str | None = None,
        teacher: ModelReference | LocalModel | None = None,
        cache_dir: str | None = None,
        token: str | None = None,
        disk_budget_gb: float | None = None,
    ) -> "DegradationPath":
        """Reads a path's manifest; a node's weights are read, and downloaded, when it is loaded.

        Args:
            folder_or_repo (`str` or `Path`): The folder with `path.json`, or a repository on the Hub.
            revision (`str`, *optional*): Of the repository: branch, tag or commit.
            teacher (`ModelReference` or `LocalModel`, *optional*): Where the teacher lies on this machine; by default
                where the manifest says.
            cache_dir (`str`, *optional*): Where downloads are kept.
            token (`str`, *optional*): By default that of `hf auth login`.
            disk_budget_gb (`float`, *optional*): Of downloaded nodes: those that were released are deleted beyond it.

        Raises:
            ValueError: If there is no path, or this version cannot read it; if a folder is asked for a revision.
            HubError: If the Hub does not give it.
        """
        if is_repo_id(folder_or_repo):
            repository = Repository(str(folder_or_repo), token)
            file = repository.file(MANIFEST, revision, cache_dir)
            if file is None:
                raise ValueError(
                    f"{folder_or_repo} holds no degradation path: it has no {MANIFEST} at {revision or 'main'}."
                )
            manifest = read_manifest(file, str(folder_or_repo), pinned=True)
            commit, denoiser = file.parent.name, denoiser_of(manifest)
            folders: Nodes = HubNodes(repository, commit, manifest["nodes"], cache_dir, disk_budget_gb, denoiser)
        else:
            folder = Path(folder_or_repo)
            if revision is not None:
                raise ValueError(
                    f"{folder} is a folder, which has no revisions, but revision {revision!r} is asked for."
                )
            if not (folder / MANIFEST).is_file():
                nested = folder / "path" / MANIFEST
                hint = f"Did you mean {nested.parent}?" if nested.is_file() else "Record one with stage 1."
                raise ValueError(f"{folder} holds no degradation path: it has no {MANIFEST}. {hint}")
            file = inside(folder, MANIFEST, str(folder))
            manifest = read_manifest(file, str(folder), pinned=False)
            folders = FolderNodes(folder, denoiser_of(manifest))
        was_told = teacher is not None
        if teacher is None:
            known = manifest["teacher"]
            teacher = ModelReference(
                known["name_or_path"],
                known["commit"] or known["revision"],
                known["variant"],
                known.get("prediction_type"),
                known.get("vae"),
                known.get("lora"),
                known.get("single_file_config"),
                known.get("rescale_betas_zero_snr") is True,
            )
        path = cls(folders, manifest, teacher, cache_dir)
        path.teacher_was_told = was_told
        return path

    def __len__(self) -> int:
        return len(self.manifest["nodes"])

    @property
    def complete(self) -> bool:
        """Whether stage 1 has ended."""
        return self.manifest["complete"]

    @property
    def denoiser(self) -> str:
        """The teacher's component that nodes are of, and the name of their folders: `unet`, `transformer`."""
        return denoiser_of(self.manifest)

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
    def folder(self) -> Path:
        """The folder that it is recorded in.

        Raises:
            ValueError: If it lies on the Hub.
        """
        if not isinstance(self.folders, FolderNodes):
            raise ValueError(f"The path {self.where} lies on the Hub and cannot be recorded on; `save_pretrained` it.")
        return self.folders.folder

    # Recording ---------------------------------------------------------------------------------------------------

    def append(
        self,
        network: nn.Module,
        step: int,
        loss: float,
        adapter: str | None = None,
        dtype: torch.dtype | None = None,
        mismatch: dict[str, list[float]] | None = None,
    ) -> None:
        """Records the next node.

        Args:
            network (`nn.Module`): The degraded score network, unwrapped; a diffusers model.
            step (`int`): Fake-score updates so far; larger than the last node's.
            loss (`float`): The mean denoising loss since the last node.
            adapter (`str`, *optional*): Record the adapter of this name, which is on the network, instead of all of it.
            dtype (`torch.dtype`, *optional*): In which weights are written, if not in their own; what rounding takes away
                is noted as `rounding_error`, a share of their norm.
            mismatch (`dict`, *optional*): What was measured of it: name -> a number for each band of noise.
        """
        if self.nodes and step <= self.nodes[-1]["step"]:
            raise ValueError(f"node {len(self) + 1} at step {step} does not come after step {self.nodes[-1]['step']}.")
        name = name_of(step)
        draft = self.folder / f"{name}.draft"
        shutil.rmtree(draft, ignore_errors=True)
        if adapter is None:
            network.save_pretrained(draft / self.denoiser, safe_serialization=True)
            clean_configs(draft / self.denoiser)
        else:
            write_adapter(network, adapter, draft / self.denoiser)
        files = sorted((draft / self.denoiser).glob("*.safetensors"))
        rounding_error = 0.0 if dtype is None else _cast(files, dtype)
        with open_weights(files[0]) as stream:
            written = stream.get_tensor(next(iter(stream.keys()))).dtype
        node = {
            "name": name,
            "kind": "full" if adapter is None else "adapter",
            "step": step,
            "loss": loss,
            "dtype": str(written).split(".")[-1],
            "rounding_error": rounding_error,
            "bytes": sum(file.stat().st_size for file in files),
            "files": {file.name: sha256_of(file) for file in files},
        }
        if mismatch is not None:
            node["mismatch"] = mismatch
        write_json(draft / "node.json", {**node, "path": self.manifest["id"]})
        # A folder of this name can only be left from a recording that was cut off before `path.json` knew of it.
        shutil.rmtree(self.folder / name, ignore_errors=True)
        os.replace(draft, self.folder / name)
        self.nodes.append(node)
        self._write()

    def reread(self) -> None:
        """Takes over what another process wrote."""
        self.manifest = read_manifest(self.folder / MANIFEST, self.where, pinned=False)

    def finish(self, cost: dict[str, float]) -> None:
        """Marks the path as complete, and notes what it cost: `steps`, `seconds`, `peak_memory_mb`."""
        self.manifest["complete"], self.manifest["cost"] = True, cost
        self._write()

    def begin(self, step: int = 0) -> None:
        """Writes the manifest, and drops the nodes recorded after a step, for a recording that is resumed there."""
        self.manifest["complete"] = False
        dropped = [node for node in self.nodes if node["step"] > step]
        self.manifest["nodes"] = [node for node in self.nodes if node["step"] <= step]
        self._write()
        for node in dropped:
            shutil.rmtree(self.folder / node["name"])

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / MANIFEST, self.manifest)

    # Reading -----------------------------------------------------------------------------------------------------

    def local_teacher(self) -> LocalModel:
        """The teacher on this machine; it is resolved when it is needed first."""
        self._local_teacher = self._known_teacher() or self.teacher.resolve(self.cache_dir, lambda _: self.denoiser)
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
            (self._known_teacher() or self.teacher.resolve_denoiser(self.cache_dir, self.denoiser)).load_into(into)
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

    def check(self, teacher_sha256: str, generator: dict[str, Any], denoiser: str = "unet") -> None:
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
                raise ValueError(
                    f"The path in {self.where} was recorded from another initial generator: its {key} is {was}, this "
                    f"one's is {is_}. Record a path for this start with stage 1."
                )

    def _check_teacher_is_asked_as_recorded(self) -> None:
        """Nodes are of the schedule that they were recorded with: the same flags have to say what the teacher's files do not."""
        for key in ("prediction_type", "rescale_betas_zero_snr"):
            was, is_ = self.manifest["teacher"].get(key) or None, getattr(self.teacher, key) or None
            if was != is_:
                said = [f"with --{key} {value}" if value else f"without --{key}" for value in (was, is_)]
                raise ValueError(
                    f"The path in {self.where} was recorded {said[0]}, but is to be replayed {said[1]}: its nodes "
                    "belong to another schedule. Pass what it was recorded with, or record another path with stage 1."
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
            told = file.stat()
            seen = file, told.st_size, told.st_mtime_ns, sha256
            if seen not in self._sound and sha256_of(file) != sha256:
                raise ValueError(f"node {index} is damaged: {file} is not what was recorded (SHA-256 differs).")
            self._sound.add(seen)
        return [folder / self.denoiser / name for name in hashes]

    # Sharing -----------------------------------------------------------------------------------------------------

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the path into a folder: a copy, every node of which was checked. If broken off, it can be repeated.

        Args:
            folder (`str` or `Path`): Must not hold a path yet.
        """
        folder = Path(folder)
        if (folder / MANIFEST).exists():
            raise ValueError(f"{folder} holds a degradation path already; choose another folder, or remove it.")
        folder.mkdir(parents=True, exist_ok=True)
        for index, node in enumerate(self.nodes, 1):
            if (folder / node["name"]).exists():  # of a copy that was broken off: it is whole, or not ours
                self._checked(index, folder / node["name"])
                continue
            draft = folder / f"{node['name']}.draft"
            self.folders.copy(node, draft)
            self._checked(index, draft)
            os.replace(draft, folder / node["name"])
        write_json(folder / MANIFEST, self.manifest)

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        token: str | None = None,
        usage: Usage = STABLE_DIFFUSION,
    ) -> str:
        """Shares the path: a branch for each node; `path.json` and a card on `main`. Can be repeated.

        Args:
            repo_id (`str`): `user/name`. It is made if it is not there.
            private (`bool`, *optional*): Of a new repository.
            create_pr (`bool`): Propose what goes to `main` as a pull request. The branches are made in any case: pull
                requests have none.
            commit_message (`str`, *optional*): Of the commit to `main`.
            token (`str`, *optional*): By default that of `hf auth login`. It is never written anywhere.
            usage (`Usage`): What the teacher's family says of its use, for the card.

        Returns:
            `str`: The repository's full id.

        Raises:
            ValueError: See `check_teachers_place`.
            HubError: If the repository holds something else, or the Hub fails for good. Nothing is overwritten then.
        """
        self.check_teachers_place()
        repository = Repository(repo_id, token)
        repository.create(private)
        manifest = self.push_nodes(repository, claim=not create_pr)
        files: Files = {MANIFEST: to_bytes(manifest)}
        if "model_index.json" not in repository.tree(repository.head()):  # a student has a card of its own
            picture = inside(Path(self.where), "path.png", self.where)
            files |= {"path.png": picture} if picture.is_file() else {}
            card = path_card(manifest, repository.repo_id, self.local_teacher().card(), picture.is_file(), usage)
            files["README.md"] = card.encode()
        repository.commit(
            files,
            commit_message or f"Add the degradation path, {len(self)} nodes",
            check=lambda head: check_is_ours(repository, head, self.manifest),
            create_pr=create_pr,
        )
        return repository.repo_id

    def push_nodes(self, repository: Repository, claim: bool = True) -> dict[str, Any]:
        """Pushes the nodes alone. Returns the manifest for `main`, with the commit of each.

        Args:
            repository (`Repository`): It exists.
            claim (`bool`): First write to `main` whose it is.

        Raises:
            ValueError: See `check_teachers_place`.
            HubError: If the repository holds something else, or the Hub fails for good.
        """
        self.check_teachers_place()
        dtype = self.nodes[0]["dtype"] if self.kind == "full" else "float32"  # of the network beside the text encoder
        teacher_files = self.local_teacher().component_files(dtype)
        check_teacher_may_be_shared(self.teacher, repository)
        return push_nodes(self.manifest, self.folders, teacher_files, repository, claim)

    def check_teachers_place(self) -> None:
        """Sees that files of this machine are not published because somebody else's `path.json` names them.

        Raises:
            ValueError: If it names a place on this machine as the teacher's, and neither the user nor the settings of the
                run that recorded it said so.
        """
        if self.teacher_was_told:
            return
        for name in (self.teacher.name_or_path, self.teacher.vae, self.teacher.single_file_config):
            if name is not None and os.path.exists(name):
                raise ValueError(
                    f"{MANIFEST} of {self.where} names {name!r} on this machine as its teacher's, of which files would be "
                    "published, and it lies in no folder of a run whose settings say so. If it is the teacher, say so: "
                    f"--pretrained_model_name_or_path {self.teacher.name_or_path}."
                )


def _cast(files: list[Path], dtype: torch.dtype) -> float:
    """Writes files of weights anew in a precision, if it is another. Returns the share of their norm that rounding took.

    Raises:
        ValueError: If a weight is beyond the precision's range.
    """
    whole = lost = 0.0
    for file in files:
        weights = read_weights(file)
        if all(tensor.dtype == dtype for tensor in weights.values()):
            continue
        with open_weights(file) as stream:
            metadata = stream.metadata()
        rounded = {key: tensor.to(dtype) for key, tensor in weights.items()}
        for key, tensor in weights.items():
            if tensor.isfinite().all() and not rounded[key].isfinite().all():
                raise ValueError(f"{key} of the node has values beyond {dtype}; pass --node_precision fp32.")
            whole += tensor.double().square().sum().item()
            lost += (tensor.double() - rounded[key].double()).square().sum().item()
        save_weights(rounded, file, metadata)
    return (lost / whole) ** 0.5 if whole else 0.0
