"""Which values a setting takes: numbers in their range, names that are known, texts that are not empty."""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin


LARGEST = 2**31 - 1  # of whole numbers that have no other bound: what torch takes everywhere


@dataclass(frozen=True)
class Range:
    """The numbers that a setting takes; NaN and infinities are never among them.

    Args:
        minimum, maximum (`float`, *optional*): Bounds that are taken.
        above, below (`float`, *optional*): Bounds that are not.
    """

    minimum: float | None = None
    above: float | None = None
    below: float | None = None
    maximum: float | None = None

    def __contains__(self, number: float) -> bool:
        return (
            math.isfinite(number)
            and (self.minimum is None or number >= self.minimum)
            and (self.above is None or number > self.above)
            and (self.below is None or number < self.below)
            and (self.maximum is None or number <= self.maximum)
        )

    def __str__(self) -> str:
        lower = self.minimum if self.above is None else self.above
        upper = self.maximum if self.below is None else self.below
        if lower is None and upper is None:
            return "a finite number"
        if upper is None:
            return f"{'at least' if self.above is None else 'above'} {lower:g}"
        if lower is None:
            return f"{'at most' if self.below is None else 'below'} {upper}"
        return f"in {'[' if self.above is None else '('}{lower:g}, {upper}{']' if self.below is None else ')'}"


class Help(str):
    """A setting's help on the command line, and with it the values that it takes: argparse is handed all of a field's
    metadata, and knows no more than a help.

    Args:
        text (`str`): The help.
        range (`Range`): Of a number.
        may_be_empty (`bool`): Of a list: whether its texts may be empty.
    """

    def __new__(cls, text: str, range: Range, may_be_empty: bool = False) -> "Help":
        made = super().__new__(cls, text)
        made.range, made.may_be_empty = range, may_be_empty
        return made


def check_number(name: str, number: Any, wanted: Range, whole: bool) -> None:
    """Sees that a number is one, finite and in its range.

    Args:
        name (`str`): Of the setting, for the message, such as `--seed`.
        number (`Any`): Its value.
        wanted (`Range`): Its range.
        whole (`bool`): Whether it is an `int`, which is at most `LARGEST` unless its range says otherwise.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(number, bool) or not isinstance(number, int if whole else (int, float)):
        raise ValueError(f"{name} has to be a {'whole ' if whole else ''}number, but is {number!r}.")
    if whole and wanted.below is None and wanted.maximum is None and number > LARGEST:
        raise ValueError(f"{name} has to be at most {LARGEST}, but is {number}.")
    if number not in wanted:
        raise ValueError(f"{name} has to be {wanted}, but is {number}.")


def check_settings(config: Any) -> None:
    """Sees that every field of a dataclass of settings has a value that it takes: a number in the range of its `Help`,
    one of the names of its `Literal`, a text that is not empty. `None` is a value where the field's type or default says so.

    Raises:
        ValueError: With the setting's name, its value and what it takes.
    """
    for field in fields(config):
        name, value = f"--{field.name}", getattr(config, field.name)
        kinds = get_args(field.type) if get_origin(field.type) in (Union, UnionType) else (field.type,)
        kind = next(one for one in kinds if one is not NoneType)
        if value is None:
            if NoneType not in kinds and field.default is not None:
                raise ValueError(f"{name} has to have a value, but is None.")
        elif get_origin(kind) is Literal:
            if value not in get_args(kind):
                raise ValueError(f"{name} {value!r} is none of {', '.join(get_args(kind))}.")
        elif kind is int or kind is float:
            check_number(name, value, field.metadata["help"].range, kind is int)
        elif kind is bool:
            if not isinstance(value, bool):
                raise ValueError(f"{name} has to be True or False, but is {value!r}.")
        elif kind is str:
            check_text(name, value)
        else:
            for each in value:
                check_text(name, each, field.metadata["help"].may_be_empty)


def check_text(name: str, text: Any, may_be_empty: bool = False) -> None:
    """Raises a `ValueError` unless a setting's value is a text, with something in it, that can be written as UTF-8. It may
    be a token: the message does not show it."""
    if not isinstance(text, str):
        raise ValueError(f"{name} has to be a text, but is a {type(text).__name__}.")
    if not text.strip() and not may_be_empty:
        raise ValueError(f"{name} is empty. Leave it out, or give it a value.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not UTF-8.") from error
    if "\0" in text:
        raise ValueError(f"{name} holds a NUL character, which no name has.")


def number(whole: bool, **bounds: float) -> Callable[[str], float]:
    """The `type` of a flag of `argparse` that takes the numbers of a range.

    Args:
        whole (`bool`): Whether it takes whole numbers alone.
        bounds (`float`): Of `Range`.
    """
    wanted = Range(**bounds)

    def parse(text: str) -> float:
        try:
            value = int(text) if whole else float(text)
            check_number("it", value, wanted, whole)
        except ValueError as error:
            told = str(error) if str(error).startswith("it ") else f"it has to be a {'whole ' * whole}number"
            raise argparse.ArgumentTypeError(f"{text!r} is not taken: {told.rstrip('.')}") from error
        return value

    return parse
