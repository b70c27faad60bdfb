"""The format of `path.json`: what it has to hold, and what tells one path from another. See docs/path.md."""

import re
from pathlib import Path
from typing import Any

from .files import read_json
from .published import published


FORMAT_VERSION = 1
MANIFEST = "path.json"
_NAME = re.compile(r"degradation-\d{6,}")
_FILE = re.compile(r"\w[\w.-]*\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Settings that say where something lies.
_PLACES = ("pretrained_model_name_or_path", "generator_model_name_or_path", "single_file_config", "prompts_file")


def name_of(step: int) -> str:
    """The folder and branch of the node that was recorded after a step."""
    return f"degradation-{step:06d}"


def identity(manifest: dict[str, Any]) -> dict[str, Any]:
    """What makes a path another path: teacher, start, the settings of its recording (in which folders do not count, and
    of other places their published names), and the recording itself, since equal settings do not give equal bytes
    everywhere."""
    return {
        "teacher": manifest["teacher"]["sha256"][:12],
        "start": manifest["generator"]["sha256"][:12],
        "conditioning timestep": manifest["generator"]["conditioning_timestep"],
        **published({name: value for name, value in manifest["recording"].items() if name not in _PLACES}),
        "id": manifest["id"],
    }


def read_manifest(file: Path, where: str, pinned: bool) -> dict[str, Any]:
    """A manifest that somebody else may have written, checked before anything is done by it.

    Args:
        file (`Path`): `path.json`.
        where (`str`): The folder or repository, for messages.
        pinned (`bool`): Whether nodes have to have a branch and a commit.

    Raises:
        ValueError: If it is of a newer format, or not as the format says.
    """
    manifest = read_json(file, f"{MANIFEST} of {where}")
    check_manifest(manifest, where, pinned)
    return manifest


def check_manifest(manifest: Any, where: str, pinned: bool) -> None:
    """Raises a `ValueError` unless a manifest is as the format says; see `read_manifest`."""
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        raise ValueError(
            f"{MANIFEST} of {where} has format version {version}; this library reads {FORMAT_VERSION}."
            + (" Update diffusers-disback." if newer else "")
        )
    try:
        for key in ("name_or_path", "revision", "variant", "commit", "sha256"):
            manifest["teacher"][key]
        for key in ("name_or_path", "conditioning_timestep", "sha256"):
            manifest["generator"][key]
        manifest["id"], manifest["recording"].items()
        if manifest["complete"]:
            for key in ("steps", "seconds", "peak_memory_mb"):
                manifest["cost"][key]
        last = 0
        for index, node in enumerate(manifest["nodes"], 1):
            _check_node(node, index, where, pinned)
            if node["step"] <= last:
                raise ValueError(
                    f"{MANIFEST} of {where} names node {index} at step {node['step']}, after step {last}."
                )
            last = node["step"]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{MANIFEST} of {where} is not as its format says: {error!r} is missing or wrong.") from error


def _check_node(node: dict[str, Any], index: int, where: str, pinned: bool) -> None:
    what = f"{MANIFEST} of {where} names node {index}"
    if not _NAME.fullmatch(node["name"]) or node["name"] != name_of(node["step"]):
        raise ValueError(f"{what} {node['name']!r}; names are like degradation-000200, where 200 is the step.")
    if node["kind"] not in ("full", "adapter"):
        raise ValueError(f"{what} of kind {node['kind']!r}; kinds are full and adapter.")
    if not node["files"]:
        raise ValueError(f"{what} without files.")
    for name, sha256 in node["files"].items():
        if not _FILE.fullmatch(name) or not _SHA256.fullmatch(sha256):
            raise ValueError(f"{what} with the file {name!r} of SHA-256 {sha256!r}, which cannot be.")
    if pinned and not (node["branch"] == node["name"] and _COMMIT.fullmatch(node["commit"])):
        raise ValueError(f"{what} at branch {node['branch']!r}, commit {node['commit']!r}, which cannot be.")
    for key in ("loss", "dtype", "bytes"):
        node[key]
