"""The degradation path: an ordered sequence of diffusers model folders, from the teacher to the initial generator."""

import os
import shutil
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin

from ..families import scheduler_class_of, usage_of
from ..hub.cards import path_card
from ..hub.files import inside, sha256_of, to_bytes, write_json
from ..hub.published import clean_configs, component_of
from ..hub.repository import Files, Repository, is_repo_id
from ..models.adapters import write_adapter
from ..models.reference import LocalModel, ModelReference
from ..models.weights import cast_files, open_weights
from .manifest import FORMAT_VERSION, MANIFEST, name_of, read_manifest
from .nodes import PathNodes
from .sharing import check_is_ours, check_teacher_may_be_shared, push_nodes
from .storage import FolderNodes, HubNodes, Nodes


class DegradationPath(PathNodes):
    """Nodes 0..N in a folder or on the Hub. Node 0 is the teacher, by reference; `len(path)` is N, the recorded nodes.

    Node i lies in `degradation-<its step>/`, a folder or the branch of that name, as its denoiser's component (`unet/`,
    `transformer/`) and `node.json`, and `path.json` lists them. Everything is written whole or not at all.

    Args:
        folders, manifest, teacher, cache_dir: As of `PathNodes`, which reads it.
    """

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
            commit, denoiser = file.parent.name, component_of(manifest)
            folders: Nodes = HubNodes(repository, commit, manifest["nodes"], denoiser, cache_dir, disk_budget_gb)
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
            folders = FolderNodes(folder, component_of(manifest))
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
                known.get("null_class_label"),
            )
        path = cls(folders, manifest, teacher, cache_dir)
        path.teacher_was_told = was_told
        return path

    # Recording ---------------------------------------------------------------------------------------------------

    def append(
        self,
        network: ModelMixin,
        step: int,
        loss: float,
        adapter: str | None = None,
        dtype: torch.dtype | None = None,
        mismatch: dict[str, list[float]] | None = None,
    ) -> None:
        """Records the next node.

        Args:
            network (`ModelMixin`): The degraded score network, unwrapped; a diffusers model.
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
        rounding_error = 0.0 if dtype is None else cast_files(files, dtype)
        with open_weights(files[0]) as stream:
            written = stream.get_tensor(next(iter(stream.keys()))).dtype
        node: dict[str, Any] = {
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
    ) -> str:
        """Shares the path: a branch for each node; `path.json` and a card on `main`. Can be repeated.

        Args:
            repo_id (`str`): `user/name`. It is made if it is not there.
            private (`bool`, *optional*): Of a new repository.
            create_pr (`bool`): Propose what goes to `main` as a pull request. The branches are made in any case: pull
                requests have none.
            commit_message (`str`, *optional*): Of the commit to `main`.
            token (`str`, *optional*): By default that of `hf auth login`. It is never written anywhere.

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
            image = inside(Path(self.where), "path.png", self.where)
            files |= {"path.png": image} if image.is_file() else {}
            teacher = self.local_teacher()
            config, index = teacher.meta_network().config, teacher.index
            usage = usage_of(index.get("_class_name"), config, scheduler_class_of(index), index)
            card = path_card(manifest, repository.repo_id, teacher.card(), image.is_file(), usage)
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
