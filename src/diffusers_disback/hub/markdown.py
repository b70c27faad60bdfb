"""Values of others in Markdown: each is escaped for the place where it stands, and stays a value there."""

import re
import shlex
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote, urlsplit

from .files import printable


LONGEST = 1000  # characters of a value on a page
# What begins something within a line. An underscore between letters does not, nor what can only begin a line.
_SPECIAL = re.compile(r"[\\`*\[\]<>#|~&$]|(?<![^\W_])_|_(?![^\W_])")
_AT_THE_START = re.compile(r"(\d{0,9})([-+=.):])")
_LICENCE_FILE = re.compile(r"LICEN[SC]E[\w.-]*", re.IGNORECASE)


def text(value: Any) -> str:
    """Words in a line, in a heading or in a table's cell: without links, HTML, emphasis or code, on one line."""
    words = _SPECIAL.sub(r"\\\g<0>", " ".join(_cut(printable(value)).split()))
    return _AT_THE_START.sub(r"\1\\\2", words, count=1) if _AT_THE_START.match(words) else words


def inline_code(value: Any) -> str:
    """A value as code within a line, by a fence that is longer than any run of backticks in it."""
    code = _cut(printable(value))
    if not code.strip():
        return f"`{code!r}`"
    fence = "`" * (_longest_run(code) + 1)
    pad = " " if code[0] in "` " or code[-1] in "` " else ""
    return f"{fence}{pad}{code}{pad}{fence}"


def fenced(language: str, code: str) -> str:
    """A block of code, by a fence that is longer than any run of backticks in it."""
    fence = "`" * max(3, _longest_run(code) + 1)
    return f"{fence}{language}\n{code.strip()}\n{fence}"


def address(target: Any) -> str | None:
    """The destination of a link: a page of the web, or the file of a licence that lies beside the card; `None` for any
    other, such as `javascript:`."""
    if not isinstance(target, str) or len(target) > LONGEST or printable(target) != target or " " in target:
        return None
    if _LICENCE_FILE.fullmatch(target):
        return target
    try:
        parts = urlsplit(target)
    except ValueError:  # brackets that are no address of a machine
        return None
    if parts.scheme not in ("http", "https") or not parts.netloc:
        return None
    return quote(target, safe="%/:=&?~#+!$,;@").replace("&", "&amp;")


def link(words: str, target: Any) -> str:
    """A link; where the target is none that may be followed, it is shown as code.

    Args:
        words (`str`): Markdown.
        target (`Any`): An address.
    """
    place = address(target)
    return f"{words} {inline_code(target)}" if place is None else f"[{words}]({place})"


def table(rows: dict[str, dict[str, Any]]) -> str:
    """A table, one row per name; numbers in four digits."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = ["| | " + " | ".join(map(text, columns)) + " |", "| --- |" + " --- |" * len(columns)]
    for name, row in rows.items():
        cells = [_cell(row[column]) if column in row else "" for column in columns]
        lines.append(f"| {text(name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def python(value: str | None) -> str:
    """A literal of Python on one line, in double quotes where that needs no escapes."""
    literal = repr(value if value is None else str(value))
    return f'"{literal[1:-1]}"' if literal[0] == "'" and '"' not in literal else literal


def shell(arguments: Iterable[Any]) -> str:
    """Arguments for a shell, each quoted where it has to be. Of control characters their escapes are shown."""
    return shlex.join(printable(argument) for argument in arguments)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else text(value)


def _cut(words: str) -> str:
    return words if len(words) <= LONGEST else words[:LONGEST] + "..."


def _longest_run(code: str) -> int:
    return max(map(len, re.findall("`+", code)), default=0)
