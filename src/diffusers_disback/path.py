"""The degradation path: an ordered sequence of diffusers model folders, from the teacher to the initial generator."""

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from .model_reference import ModelReference, fill


FORMAT_VERSION = 1
MANIFEST = "path.json"
_FOLDER = re.compile(r"degradation-\d{6,}")


def write_json(file: Path, content: Any) -> None:
    """Writes a JSON file whole or not at all."""
    draft = file.with_name(file.name + ".draft")
    draft.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(draft, file)


class DegradationPath:
    """Nodes 0..N in a folder. Node 0 is the teacher, by reference; `len(path)` is N, the recorded nodes alone.

    Node i lies in `degradation-<its step>/`, as `unet/` and `node.json`, and `path.json` lists them. Everything is
    written whole or not at all.

    Args:
        folder (`Path`): Where it lies.
        manifest (`dict`): The content of `path.json`.
        teacher (`ModelReference`): Where node 0 is loaded from.
    """

    def __init__(self, folder: str | Path, manifest: dict[str, Any], teacher: ModelReference):
        self.folder = Path(folder)
        self.manifest = manifest
        self.teacher = teacher

    @classmethod
    def create(
        cls,
        folder: str | Path,
        teacher: ModelReference,
        teacher_sha256: str,
        generator: dict[str, Any],
        recording: dict[str, Any],
    ) -> "DegradationPath":
        """An empty path; its folder is written by `begin`, or with the first node.

        Args:
            folder (`str` or `Path`): Must not hold a path yet.
            teacher (`ModelReference`): Node 0.
            teacher_sha256 (`str`): `fingerprint` of its network.
            generator (`dict`): The start: `name_or_path`, `sha256` and `conditioning_timestep`.
            recording (`dict`): The settings of stage 1.
        """
        folder = Path(folder)
        if (folder / MANIFEST).exists():
            raise ValueError(f"{folder} holds a degradation path already; choose another folder, or remove it.")
        manifest = {
            "format_version": FORMAT_VERSION,
            "teacher": {**asdict(teacher), "sha256": teacher_sha256},
            "generator": generator,
            "recording": recording,
            "complete": False,
            "nodes": [],
        }
        return cls(folder, manifest, teacher)

    @classmethod
    def from_pretrained(cls, folder: str | Path, teacher: ModelReference | None = None) -> "DegradationPath":
        """Reads a path's manifest; weights are read when a node is loaded.

        Args:
            folder (`str` or `Path`): The folder with `path.json`.
            teacher (`ModelReference`, *optional*): Where the teacher lies on this machine; by default where the
                manifest says.

        Raises:
            ValueError: If there is no path, or this version cannot read it.
        """
        folder = Path(folder)
        file = folder / MANIFEST
        if not file.is_file():
            raise ValueError(f"{folder} holds no degradation path: it has no {MANIFEST}. Record one with stage 1.")
        try:
            manifest = json.loads(file.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{file} is no valid JSON ({error}).") from error
        version = manifest["format_version"]
        if version != FORMAT_VERSION:
            raise ValueError(f"{file} has format version {version}; this library reads {FORMAT_VERSION}.")
        for node in manifest["nodes"]:
            if not _FOLDER.fullmatch(node["name"]):
                raise ValueError(f"{file} names a node {node['name']!r}; names are like degradation-000200.")
        if teacher is None:
            known = manifest["teacher"]
            teacher = ModelReference(known["name_or_path"], known["revision"], known["variant"])
        return cls(folder, manifest, teacher)

    def __len__(self) -> int:
        return len(self.manifest["nodes"])

    @property
    def complete(self) -> bool:
        """Whether stage 1 has ended."""
        return self.manifest["complete"]

    @property
    def nodes(self) -> list[dict[str, Any]]:
        """What is known of nodes 1..N: `name`, `step`, `loss`, `dtype`, `files` with their SHA-256."""
        return self.manifest["nodes"]

    def node_folder(self, index: int) -> Path:
        """The folder of node 1..N."""
        if not 1 <= index <= len(self):
            raise IndexError(f"node {index} is not on this path: its recorded nodes are 1..{len(self)}.")
        return self.folder / self.nodes[index - 1]["name"]

    def append(self, network: nn.Module, step: int, loss: float) -> None:
        """Records the next node.

        Args:
            network (`nn.Module`): The degraded score network, unwrapped; a diffusers model.
            step (`int`): Fake-score updates so far; larger than the last node's.
            loss (`float`): The mean denoising loss since the last node.
        """
        if self.nodes and step <= self.nodes[-1]["step"]:
            raise ValueError(f"node {len(self) + 1} at step {step} does not come after step {self.nodes[-1]['step']}.")
        name = f"degradation-{step:06d}"
        draft = self.folder / f"{name}.draft"
        shutil.rmtree(draft, ignore_errors=True)
        network.save_pretrained(draft / "unet", safe_serialization=True)
        files = {file.name: _sha256(file) for file in sorted((draft / "unet").glob("*.safetensors"))}
        node = {"name": name, "step": step, "loss": loss, "dtype": str(network.dtype).split(".")[-1], "files": files}
        write_json(draft / "node.json", node)
        # A folder of this name can only be left from a recording that was cut off before `path.json` knew of it.
        shutil.rmtree(self.folder / name, ignore_errors=True)
        os.replace(draft, self.folder / name)
        self.nodes.append(node)
        self._write()

    def reread(self) -> None:
        """Takes over what another process wrote."""
        self.manifest = json.loads((self.folder / MANIFEST).read_text())

    def finish(self, cost: dict[str, float]) -> None:
        """Marks the path as complete, and notes what it cost: `steps`, `seconds`, `peak_memory_mb`."""
        self.manifest["complete"], self.manifest["cost"] = True, cost
        self._write()

    def begin(self, step: int = 0) -> None:
        """Writes the manifest, and drops the nodes recorded after a step, for a recording that is resumed there."""
        kept = [node for node in self.nodes if node["step"] <= step]
        dropped = self.nodes[len(kept) :]
        self.manifest["nodes"], self.manifest["complete"] = kept, False
        self._write()
        for node in dropped:
            shutil.rmtree(self.folder / node["name"])

    def load(self, index: int, into: nn.Module) -> None:
        """Fills a network with a node's weights: an exact fit, or an error and the network as it was.

        Args:
            index (`int`): 0 (the teacher) to N.
            into (`nn.Module`): A network of the teacher's architecture, unwrapped.

        Raises:
            IndexError: If the path has no such node.
            ValueError: If files are missing, damaged, or of another architecture.
        """
        if index == 0:
            self.teacher.load_into(into)
        else:
            fill(into, self.read(index), f"node {index} ({self.node_folder(index)})")

    def read(self, index: int) -> dict[str, torch.Tensor]:
        """The weights of node 1..N, as on disk, after a check of every file's hash."""
        weights = {}
        for file in self._files(index):
            weights.update(load_file(file))
        return weights

    def verify(self) -> None:
        """Raises a `ValueError` if a file of any node is missing or not what was recorded."""
        for index in range(1, len(self) + 1):
            self._files(index)

    def check(self, teacher_sha256: str, generator: dict[str, Any]) -> None:
        """Raises a `ValueError` if the path was recorded from another teacher or another start, naming which."""
        recorded = self.manifest["teacher"]["sha256"]
        if recorded != teacher_sha256:
            raise ValueError(
                f"The path in {self.folder} was recorded from another teacher, {self.manifest['teacher']['name_or_path']!r} "
                f"(SHA-256 {recorded[:12]}), not from this one ({teacher_sha256[:12]}). Record a path for it with stage 1."
            )
        for key in ("sha256", "conditioning_timestep"):
            was, is_ = self.manifest["generator"][key], generator[key]
            if was != is_:
                raise ValueError(
                    f"The path in {self.folder} was recorded from another initial generator: its {key} is {was}, this "
                    f"one's is {is_}. Record a path for this start with stage 1."
                )

    def _files(self, index: int) -> list[Path]:
        """The files of a node's weights, checked."""
        folder, hashes = self.node_folder(index) / "unet", self.nodes[index - 1]["files"]
        for name, sha256 in hashes.items():
            file = folder / name
            if not file.is_file():
                raise ValueError(f"node {index} is incomplete: {file} is missing. Record the path again.")
            if _sha256(file) != sha256:
                raise ValueError(f"node {index} is damaged: {file} is not what was recorded (SHA-256 differs).")
        return [folder / name for name in hashes]

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / MANIFEST, self.manifest)


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
