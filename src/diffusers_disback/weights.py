"""Files of weights: read exactly, in safetensors, or an error that names the file and what to do."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .files import FETCH, POINTER


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
    with open_weights(file) as stream:
        try:
            return {key: stream.get_tensor(key).clone() for key in stream.keys()}  # noqa: SIM118, it is no dictionary
        except (SafetensorError, OSError, ValueError, RuntimeError, AttributeError) as error:
            raise ValueError(f"{file} cannot be read: {_reason(Path(file), error)}") from error


def metadata_of(file: str | Path) -> dict[str, str]:
    """The texts in the header of a file of weights.

    Raises:
        ValueError: If there is no such file, or it is no safetensors file.
    """
    with open_weights(file) as stream:
        return stream.metadata() or {}


def check_finite(tensors: Iterable[tuple[str, Tensor]], what: str) -> None:
    """Sees that no weight is NaN or infinite: what comes of one that is looks like a fault of the training's settings, or, in
    pictures, of nothing at all.

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
