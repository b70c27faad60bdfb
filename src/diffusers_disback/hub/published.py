"""What of a run may be published: ids of the Hub as they are, and of a place on this machine its own name alone."""

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..training.settings.fields import named
from ..training.settings.groups import LoggingSettings
from .files import parse_json, read_json, to_bytes, write_text


REPORT = "report.json"
_ABSOLUTE = re.compile(r"[/\\~]|[A-Za-z]:[/\\]|file:", re.IGNORECASE)
_SEPARATORS = re.compile(r"[/\\]+")
_CONFIG = re.compile(r"(?:.*_)?config\.json|model_index\.json")
_FREE_TEXT = named(LoggingSettings, is_free_text=True)
_NAMELESS = "folder"  # what a place is called that has no name of its own to tell


def published(value: Any) -> Any:
    """A setting as others may see it. Numbers stay, and so do ids and addresses on the Hub and relative paths; a path that
    is absolute, that leads up by `..` or begins at a home folder becomes its last component.

    What was published once stays as it is. It says nothing of the machine, and does not lead to the file any more: what
    is needed to resume with a run is kept elsewhere.

    Args:
        value (`Any`): As JSON has them; lists and dictionaries are gone through, prompts in them left alone.
    """
    if isinstance(value, dict):
        return {key: item if key in _FREE_TEXT else published(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [published(item) for item in value]
    return _published_text(value) if isinstance(value, str) else value


def _published_text(text: str) -> str:
    if "://" in text and not text.lower().startswith("file:"):
        return re.sub(r"(?<=://)[^/@\s]*@", "", text)  # an address, without a password
    parts = _SEPARATORS.split(text.rstrip("/\\"))
    if not (_ABSOLUTE.match(text) or ".." in parts or _is_in_home(text)):
        return text
    name, home = parts[-1], os.path.expanduser("~")
    own = name and name not in (".", "..") and not name.startswith("~") and not re.fullmatch(r"[A-Za-z]:", name)
    return name if own and name != os.path.basename(home) else _NAMELESS


def _is_in_home(text: str) -> bool:
    """Whether a relative path goes by way of the home folder's name, as `bob/runs` does in `/home`."""
    home, path = Path(os.path.expanduser("~")), Path(os.path.abspath(text))
    return path.is_relative_to(home) and not Path.cwd().is_relative_to(home) and path.exists()


def published_command(arguments: Sequence[str]) -> list[str]:
    """A command line as others may see it: see `published`.

    Args:
        arguments (`Sequence[str]`): With flags as `--name value` or `--name=value`.
    """
    cleaned, free = [], False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if argument.startswith("--"):
            free = name.removeprefix("--").replace("-", "_") in _FREE_TEXT
            cleaned.append(f"{name}={value if free else published(value)}" if equals else argument)
        elif equals and name.isidentifier() and not free:  # of --objective_args
            cleaned.append(f"{name}={published(value)}")
        else:
            cleaned.append(argument if free else published(argument))
    return cleaned


def without_token(arguments: Sequence[str]) -> list[str]:
    """A command line without the token of the Hub."""
    kept, skip = [], False
    for argument in arguments:
        # The parser takes dashes in a flag, and a value after `=`, too.
        is_token = re.sub(r"(?<=\w)-", "_", argument.split("=")[0]) == "--hub_token"
        if not skip and not is_token:
            kept.append(argument)
        skip = is_token and "=" not in argument
    return kept


def component_of(content: dict[str, Any]) -> str:
    """The component that a denoiser is, which is its folder's name, from `report.json` or `path.json`. Versions before 0.2.0,
    and so paths of format 1, had none but UNets, and did not say."""
    return content.get("component", "unet")


def published_report(report: dict[str, Any]) -> dict[str, Any]:
    """The content of `report.json` as others may see it."""
    cleaned = {"settings": published(report["settings"])}
    if "command" in report:
        cleaned["command"] = shlex.join(published_command(_arguments(report["command"])))
    return {**report, **cleaned}


def _arguments(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError as error:
        raise ValueError(f"The command in report.json is no line of a shell ({error}).") from error


def published_manifest(manifest: dict[str, Any]) -> dict[str, Any]:
    """The content of `path.json` as others may see it."""
    return {**manifest, **{key: published(manifest[key]) for key in ("teacher", "generator", "recording")}}


def published_files(files: dict[str, Path | bytes]) -> dict[str, Path | bytes]:
    """Files to publish, of whose configs those are written anew that name a folder of a machine.

    Args:
        files (`dict`): Path -> file on disk, or content.

    Raises:
        ValueError: If a config is no JSON.
    """
    return {path: _published_config(path, content) for path, content in files.items()}


def _published_config(path: str, content: Path | bytes) -> Path | bytes:
    if not _CONFIG.fullmatch(path.split("/")[-1]):
        return content
    config = parse_json(content, path) if isinstance(content, bytes) else read_json(content, path)
    cleaned = _without_places(config)
    return content if cleaned == config else to_bytes(cleaned)


def clean_configs(folder: Path) -> None:
    """Takes out of the configs in a folder that was just written where on this machine what is in it came from."""
    for file in folder.glob("*.json"):
        content = _published_config(file.as_posix(), file)
        if isinstance(content, bytes):
            write_text(file, content.decode())


def _without_places(config: dict[str, Any]) -> dict[str, Any]:
    """A config without entries that name a folder of a machine, such as `_name_or_path`. Tokens, which may look like one,
    stay."""
    return {
        key: _without_places(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if not isinstance(value, str) or key == "content" or "token" in key.split("_") or published(value) == value
    }
