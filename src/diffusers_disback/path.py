"""The degradation path: an ordered sequence of diffusers model folders, from the teacher to the initial generator."""

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn


FORMAT_VERSION = 1
MANIFEST = "path.json"
_FOLDER = re.compile(r"degradation-\d{6,}")


def fingerprint(network: nn.Module) -> str:
    """A SHA-256 of a network's weights: names, types, shapes and bytes. Equal for equal weights, wherever stored."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def write_json(file: Path, content: Any) -> None:
    """Writes a JSON file whole or not at all."""
    draft = file.with_name(file.name + ".draft")
    draft.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(draft, file)


@dataclass(frozen=True)
class ModelReference:
    """Where a model lies: a folder, or a model on the Hub.

    Args:
        name_or_path (`str`): A folder, or a Hub id.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        variant (`str`, *optional*): Of the weights' files, such as `fp16`.
    """

    name_or_path: str
    revision: str | None = None
    variant: str | None = None

    def load_network(self, network_class: type[nn.Module], cache_dir: str | None = None) -> nn.Module:
        """The model's `unet` in float32.

        Raises:
            ValueError: If it cannot be read, or its weights do not fit its own config in anything.
        """
        try:
            network, info = network_class.from_pretrained(
                self.name_or_path,
                subfolder="unet",
                revision=self.revision,
                variant=self.variant,
                cache_dir=cache_dir,
                torch_dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
            )
        except OSError as error:
            raise ValueError(f"The UNet of {self.name_or_path!r} cannot be loaded. {error}") from error
        wrong = {kind: keys for kind, keys in info.items() if keys}
        if wrong:
            raise ValueError(f"The UNet of {self.name_or_path!r} does not fit its own config: {wrong}.")
        return network

    def load_into(self, network: nn.Module, cache_dir: str | None = None) -> None:
        """Fills a network with the model's `unet` weights.

        Raises:
            ValueError: If names or shapes differ in anything; the network is then as it was.
        """
        loaded = self.load_network(type(network), cache_dir)
        _fill(network, loaded.state_dict(), f"the UNet of {self.name_or_path!r}")


def _fill(network: nn.Module, weights: dict[str, torch.Tensor], what: str) -> None:
    """Copies weights into a network, if names and shapes agree in everything."""
    own = network.state_dict()
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [key for key in own.keys() & weights.keys() if own[key].shape != weights[key].shape]
    if missing or unexpected or shapes:
        raise ValueError(
            f"{what} does not fit: {len(missing)} tensors missing, {len(unexpected)} unexpected, {len(shapes)} of "
            f"another shape (the first: {[*missing[:1], *unexpected[:1], *sorted(shapes)[:1]]}). It belongs to another "
            "architecture."
        )
    network.load_state_dict(weights, strict=True)


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
        """An empty path in a new folder.

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
        folder.mkdir(parents=True, exist_ok=True)
        manifest = {
            "format_version": FORMAT_VERSION,
            "teacher": {**asdict(teacher), "sha256": teacher_sha256},
            "generator": generator,
            "recording": recording,
            "complete": False,
            "nodes": [],
        }
        path = cls(folder, manifest, teacher)
        path._write()
        return path

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

    def forget_after(self, step: int) -> None:
        """Drops the nodes recorded after a step, for a recording that is resumed there."""
        kept = [node for node in self.nodes if node["step"] <= step]
        dropped = self.nodes[len(kept) :]
        self.manifest["nodes"], self.manifest["complete"] = kept, False
        self._write()
        for node in dropped:
            shutil.rmtree(self.folder / node["name"])

    def load(self, index: int, into: nn.Module, cache_dir: str | None = None) -> None:
        """Fills a network with a node's weights: an exact fit, or an error and the network as it was.

        Args:
            index (`int`): 0 (the teacher) to N.
            into (`nn.Module`): A network of the teacher's architecture, unwrapped.
            cache_dir (`str`, *optional*): Where a teacher from the Hub is kept.

        Raises:
            IndexError: If the path has no such node.
            ValueError: If files are missing, damaged, or of another architecture.
        """
        if index == 0:
            self.teacher.load_into(into, cache_dir)
        else:
            _fill(into, self.read(index), f"node {index} ({self.node_folder(index)})")

    def read(self, index: int) -> dict[str, torch.Tensor]:
        """The weights of node 1..N, as on disk, after a check of every file's hash."""
        folder, node, weights = self.node_folder(index) / "unet", self.nodes[index - 1], {}
        for name, sha256 in node["files"].items():
            file = folder / name
            if not file.is_file():
                raise ValueError(f"node {index} is incomplete: {file} is missing. Record the path again.")
            if _sha256(file) != sha256:
                raise ValueError(f"node {index} is damaged: {file} is not what was recorded (SHA-256 differs).")
            weights.update(load_file(file))
        return weights

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

    def _write(self) -> None:
        write_json(self.folder / MANIFEST, self.manifest)


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
