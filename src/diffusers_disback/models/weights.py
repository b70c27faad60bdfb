"""Files of weights, in safetensors: read exactly, or an error that names the file and what to do; written so that equal
weights are equal files."""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..hub.files import FETCH, POINTER


PICKLES = (".bin", ".pt", ".pth", ".ckpt")
NO_PICKLES = "Pickles can run code when they are read, and are not; find or make a safetensors version of it."

HALVES = {"F16": torch.float16, "BF16": torch.bfloat16}
"""The half precisions, by their names in a file's header."""


def open_weights(file: str | Path) -> Any:
    """A file of weights as `safetensors.safe_open` gives it, for PyTorch. Tensors of it stay mapped to the file.

    Raises:
        ValueError: If there is no such file, or it is no safetensors file; for a pointer of Git LFS with the remedy.
    """
    file = Path(file)
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {_reason(file, error)}") from error


def read_weights(file: str | Path) -> dict[str, Tensor]:
    """All tensors of a file in memory of their own, so that nothing of what is read changes with the file.

    Raises:
        ValueError: If there is no such file, or it is no safetensors file.
    """
    return {key: tensor.clone() for key, tensor in mapped_weights(file).items()}


def mapped_weights(file: str | Path) -> dict[str, Tensor]:
    """All tensors of a file, mapped to it: for what copies or looks at them and lets go of them, without a second copy in
    memory. Whatever keeps them takes `read_weights`.

    Raises:
        ValueError: If there is no such file, or it is no safetensors file.
    """
    with open_weights(file) as stream:
        try:
            return {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118, it is no dictionary
        except (SafetensorError, OSError, ValueError, RuntimeError, AttributeError) as error:
            raise ValueError(f"{file} cannot be read: {_reason(Path(file), error)}") from error


def layout_of(file: str | Path) -> tuple[dict[str, torch.Size], dict[str, str]]:
    """Reads the shape and the type of every tensor in a file of weights, and nothing else of it.

    Raises:
        ValueError: If there is no such file, or it is no safetensors file.
    """
    with open_weights(file) as stream:
        slices = {key: stream.get_slice(key) for key in stream.keys()}  # noqa: SIM118, it is no dictionary
        shapes = {key: torch.Size(part.get_shape()) for key, part in slices.items()}
        return shapes, {key: part.get_dtype() for key, part in slices.items()}


def metadata_of(file: str | Path) -> dict[str, str]:
    """The texts in the header of a file of weights.

    Raises:
        ValueError: If there is no such file, or it is no safetensors file.
    """
    with open_weights(file) as stream:
        return stream.metadata() or {}


def check_finite(tensors: Iterable[tuple[str, Tensor]], what: str) -> None:
    """Sees that no weight is NaN or infinite: what comes of one that is looks like a fault of the training's settings, or, in
    images, of nothing at all.

    Args:
        tensors (`Iterable[tuple[str, Tensor]]`): With their names.
        what (`str`): Whose they are, for the message.

    Raises:
        ValueError: With the first such tensor's name.
    """
    for name, tensor in tensors:
        # A sum is one pass without a copy; it overflows where all numbers are finite, too, but only then is there a doubt.
        if tensor.is_floating_point() and not tensor.sum(dtype=torch.float32).isfinite():
            bad = int((~tensor.isfinite()).sum())
            if bad:
                raise ValueError(
                    f"{what} cannot be used: {bad:,} of {tensor.numel():,} numbers of its weight {name} are NaN or infinite. "
                    "Download or save it again; if it was converted to half precision, convert it anew or take the original."
                )


def owned(network: nn.Module, what: str) -> nn.Module:
    """A loaded network whose weights are in memory of their own and finite. Libraries leave them mapped to the files, so
    that a file which is overwritten while a run goes on would change the run.

    Args:
        network (`nn.Module`): Its tensors are replaced one at a time; those that are shared stay shared.
        what (`str`): It is, for the message.

    Raises:
        ValueError: If a weight is NaN or infinite.
    """
    named = [*network.named_parameters(), *network.named_buffers()]
    for _, tensor in named:
        tensor.data = tensor.data.clone()
    check_finite(named, what)
    return network


def fingerprint(network: nn.Module) -> str:
    """A SHA-256 of a network's weights: names, types, shapes and bytes. Equal for equal weights, wherever stored."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


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
    layers = {
        name: layer.weight.shape
        for name, layer in network.named_modules()
        if isinstance(getattr(layer, "weight", None), Tensor)
    }
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
    """Copies weights into a network, if names and shapes agree in everything; of one that is sharded into the own share."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import FSDPModule

    check_fit(network.state_dict(), weights, what)
    if isinstance(network, FSDPModule):
        given: dict[str, Any] = {**weights}
        set_model_state_dict(network, given, options=StateDictOptions(full_state_dict=True, strict=True))
    else:
        network.load_state_dict(weights, strict=True)


def fill_adapter(network: nn.Module, weights: dict[str, torch.Tensor], adapter: str, what: str) -> None:
    """Copies weights into an adapter on a network, if names and shapes agree in everything."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    check_fit(get_peft_model_state_dict(network, adapter_name=adapter), weights, what)
    set_peft_model_state_dict(network, weights, adapter_name=adapter)


def save_weights(weights: dict[str, Tensor], file: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a file of weights; equal weights and metadata are equal files, byte for byte.

    safetensors writes several texts of metadata in an order that changes from call to call: here they are sorted.

    Args:
        weights (`dict[str, Tensor]`): Contiguous, none shares another's memory.
        file (`str` or `Path`): To write.
        metadata (`dict[str, str]`, *optional*): Texts for the header.
    """
    save_file(weights, file, metadata)
    if len(metadata or ()) < 2:
        return
    with open(file, "r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        # The same texts in another order, written as safetensors writes them: as long as before.
        written = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        stream.seek(8)
        stream.write(written.ljust(size))


_LAYER = re.compile(r"\^?[A-Za-z0-9_.]{1,200}")


def are_layers(value: Any) -> bool:
    """Whether a list's entries, or a dictionary's keys, are plain names of layers: peft takes them for regular expressions,
    which somebody else could write so that they never end. diffusers marks the beginning of a whole name with `^`."""
    return isinstance(value, list | dict) and all(isinstance(v, str) and _LAYER.fullmatch(v) for v in value)


def adapter_text(config: dict[str, Any]) -> str:
    """An adapter's config as it stands in the metadata of its file, in a fixed order; its sets are in hash order.

    Args:
        config (`dict`): Of peft's `to_dict`.
    """
    return json.dumps(_ordered(config), indent=2, sort_keys=True)


def _ordered(value: Any) -> Any:
    """A value whose sets, at any depth, are sorted lists."""
    if isinstance(value, dict):
        return {key: _ordered(one) for key, one in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(_ordered(one) for one in value)
    return [_ordered(one) for one in value] if isinstance(value, (list, tuple)) else value


def _reason(file: Path, error: Exception) -> str:
    """What is wrong with a file that safetensors does not read."""
    if not file.is_file():
        return "there is no such file."
    try:
        with open(file, "rb") as stream:
            beginning = stream.read(64)
    except OSError as problem:
        return f"{problem.strerror}."
    if beginning.startswith(POINTER.encode()):
        return FETCH
    if beginning.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "it is a web page in place of weights, as of a download that asked to log in. Download it again."
    return f"it is no whole safetensors file ({error}). Download or copy it again."


def cast_files(files: list[Path], dtype: torch.dtype) -> float:
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
