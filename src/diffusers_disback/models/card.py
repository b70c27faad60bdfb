"""What a model's card declares of its licence and its origin."""

import logging
import re
from pathlib import Path
from typing import Any

from ..hub.files import inside, printable, read_text


logger = logging.getLogger(__name__)
CARD = "README.md"
_KEYS = ("license", "license_name", "license_link", "base_model")
_LARGEST_CARD, _LARGEST_FRONT_MATTER, _LONGEST_NAME = 10_000_000, 256_000, 1000  # bytes, characters, characters
_FRONT_MATTER = re.compile(r"\A\s*^---[ \t]*$(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
_NOTHING: tuple[Any, ...] = (None, "", "null", "~", [])
_MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def read_card(folder: Path, name: str) -> dict[str, Any]:
    """Reads `license`, `license_name`, `license_link` and `base_model` of a card, as far as these are names.

    A card that cannot be read stops nothing: it is told in a warning, and taken for empty.

    Args:
        folder (`Path`): Of the model.
        name (`str`): Whose it is, for messages.

    Raises:
        ValueError: If it is a link that leads out of the folder.
    """
    owner = printable(name)
    file = inside(folder, CARD, f"The folder of {owner}")
    if not file.exists():
        return {}
    try:
        declared = _front_matter(file, f"The card ({CARD}) of {owner}")
    except ValueError as error:
        logger.warning(f"{error} No licence is taken over from it; look it up before you share what is made.")
        return {}
    known = {key: declared[key] for key in _KEYS if declared.get(key) not in _NOTHING}
    wrong = [key for key, value in known.items() if not _is_name(key, value)]
    if wrong:
        logger.warning(
            f"The card ({CARD}) of {owner} declares {' and '.join(wrong)} by something that is no name; it is left out."
        )
    return {key: value for key, value in known.items() if key not in wrong}


def _front_matter(file: Path, what: str) -> dict[str, Any]:
    """The YAML at the head of a card, in which every scalar is a text.

    Raises:
        ValueError: If it is none.
    """
    import yaml

    if not file.is_file():
        raise ValueError(f"{what} is no regular file.")
    if file.stat().st_size > _LARGEST_CARD:
        raise ValueError(f"{what} is larger than {_LARGEST_CARD // 1_000_000} MB, and was not read.")
    head = _FRONT_MATTER.match(read_text(file, what).removeprefix("\ufeff").replace("\r\n", "\n"))
    if head is None:
        return {}
    if len(head[1]) > _LARGEST_FRONT_MATTER:
        raise ValueError(f"{what} begins with more than {_LARGEST_FRONT_MATTER:,} characters of metadata.")
    try:
        # Neither tags nor merged mappings are followed, by which a few lines can become gigabytes.
        declared = yaml.load(head[1], Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError) as error:
        reason = getattr(error, "problem", None) or "it is nested too deeply"
        raise ValueError(f"{what} begins with metadata that are no valid YAML ({printable(reason)}).") from error
    if declared is not None and not isinstance(declared, dict):
        raise ValueError(f"{what} begins with metadata that are a {type(declared).__name__}, no names and values.")
    return declared or {}


def _is_name(key: str, value: Any) -> bool:
    """Whether a card's entry is what it has to be: a text, or of some several."""
    values = value if isinstance(value, list) and key in ("license", "base_model") else [value]
    return all(
        isinstance(each, str)
        and len(each) <= _LONGEST_NAME
        and (key != "base_model" or _MODEL_ID.fullmatch(each) is not None)
        for each in values
    )
