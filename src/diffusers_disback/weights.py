"""Files of weights: read exactly, in safetensors, or an error that names the file and what to do."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

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
