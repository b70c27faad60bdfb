"""The format of `path.json`: what it has to hold, and what tells one path from another. See docs/path.md."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import UnionType
from typing import Any

from ..hub.files import read_json
from ..hub.published import published
from ..training.settings.fields import named
from ..training.settings.groups import DataSettings, ModelSettings


FORMAT_VERSION = 2
_READ = (1, FORMAT_VERSION)  # version 1 had no `component`: its denoisers were all UNets
MANIFEST = "path.json"
Kinds = Mapping[str, type | UnionType | Callable[[Any], bool]]
"""What fields of JSON have to be: a type, or a function that says whether a value is right."""

ADAPTER = "pytorch_lora_weights.safetensors"
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMPONENT = re.compile(r"[a-z][a-z0-9_]{0,99}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_BY_CONTENT = named(ModelSettings, DataSettings, by_content=True)


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
        **published({name: value for name, value in manifest["recording"].items() if name not in _BY_CONTENT}),
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
    what = f"{MANIFEST} of {where}"
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if type(version) is not int or version not in _READ:
        newer = type(version) is int and version > FORMAT_VERSION
        raise ValueError(
            f"{what} has format version {shown(version)}; this library reads {' and '.join(map(str, _READ))}."
            + (" Update diffusers-disback." if newer else "")
        )
    # A component in version 1 is of no known meaning: such nodes are all UNets.
    component: Kinds = {"component?": lambda value: value == "unet"} if version == 1 else {"component": is_component}
    check_fields(manifest, {**_FIELDS, **component}, what)
    if manifest["complete"] or "cost" in manifest:
        check_fields(manifest, {"cost": dict}, what)
        check_fields(manifest["cost"], {"steps": is_count, "seconds": is_number, "peak_memory_mb": is_number}, what)
    check_fields(manifest["teacher"], _TEACHER, f"{what} of its teacher")
    check_fields(manifest["generator"], _GENERATOR, f"{what} of the student's start")
    last = 0
    for index, node in enumerate(manifest["nodes"], 1):
        _check_node(node, f"{what} names node {index}", pinned)
        if node["step"] <= last:
            raise ValueError(f"{what} names node {index} at step {node['step']}, after step {last}.")
        last = node["step"]


def _check_node(node: Any, what: str, pinned: bool) -> None:
    if not isinstance(node, dict) or not isinstance(node.get("name"), str):
        raise ValueError(f"{what} as {shown(node)}, which is none.")
    if not is_count(node.get("step")) or node["name"] != name_of(node["step"]):
        raise ValueError(
            f"{what} {shown(node['name'])} of step {shown(node.get('step'))}; names are like degradation-000200, where 200 is "
            "the step."
        )
    what = f"{what}, {node['name']},"
    if node.get("kind") not in ("full", "adapter"):
        raise ValueError(f"{what} of kind {shown(node.get('kind'))}; kinds are full and adapter.")
    files = node.get("files")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{what} without files.")
    for name, sha256 in files.items():
        if not _FILE.fullmatch(name) or len(name) > 200 or not is_sha256(sha256):
            raise ValueError(f"{what} with the file {shown(name)} of SHA-256 {shown(sha256)}, which cannot be.")
    if node["kind"] == "adapter" and list(files) != [ADAPTER]:
        raise ValueError(f"{what} with the files {shown(list(files))}; an adapter has one, {ADAPTER}.")
    check_fields(node, _NODE, what)
    if "mismatch" in node and not all(
        isinstance(bands, list) and all(map(is_number, bands)) for bands in node["mismatch"].values()
    ):
        raise ValueError(f"{what} with the mismatch {shown(node['mismatch'])}, which is no lists of numbers by name.")
    if pinned and not (node.get("branch") == node["name"] and _is_text_of(_COMMIT, node.get("commit"))):
        raise ValueError(
            f"{what} at branch {shown(node.get('branch'))}, commit {shown(node.get('commit'))}, which cannot be."
        )


# Kinds of values -----------------------------------------------------------------------------------------------------


def check_fields(content: dict[str, Any], fields: Kinds, what: str) -> None:
    """Sees that what was read holds fields of the right kinds; a name that ends on `?` may be missing.

    Raises:
        ValueError: With the first that it does not.
    """
    for name, is_right in fields.items():
        key = name.removesuffix("?")
        if key not in content:
            if key == name:
                raise ValueError(f"{what} is not as its format says: {key!r} is missing.")
        elif not (
            isinstance(content[key], is_right) if isinstance(is_right, type | UnionType) else is_right(content[key])
        ):
            raise ValueError(f"{what} is not as its format says: {key!r} cannot be {shown(content[key])}.")


def shown(value: Any) -> str:
    """A value of somebody else for a message, cut off."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def is_number(value: Any) -> bool:
    """A finite number; `True` is none."""
    return type(value) in (int, float) and abs(value) < 1e300


def is_count(value: Any) -> bool:
    """A whole number from 0 on, of which there can be so many."""
    return type(value) is int and 0 <= value < 2**63


def is_sha256(value: Any) -> bool:
    """A SHA-256 in hexadecimal."""
    return _is_text_of(_SHA256, value)


def is_component(value: Any) -> bool:
    """The name of a pipeline's component, which is a folder's, too."""
    return _is_text_of(_COMPONENT, value)


def _is_text_of(pattern: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


_FIELDS: Kinds = {
    "id": str,
    "teacher": dict,
    "generator": dict,
    "recording": dict,
    "complete": bool,
    "nodes": list,
}
_TEACHER: Kinds = {
    **{"name_or_path": str, "sha256": is_sha256},
    **dict.fromkeys(("revision", "variant", "commit"), str | None),
    **{f"{name}?": str | None for name in ("prediction_type", "vae", "lora", "single_file_config")},
    "null_class_label?": lambda value: value is None or is_count(value),
}
_GENERATOR: Kinds = {"name_or_path": str | None, "sha256": is_sha256, "conditioning_timestep": is_count}
_NODE: Kinds = {
    "loss": is_number,
    "dtype": lambda value: value in ("float32", "float16", "bfloat16", "float64"),
    "bytes": is_count,
    "rounding_error?": is_number,
    "mismatch?": dict,
    "branch?": str,
    "commit?": str,
}
