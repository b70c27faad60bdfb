"""A setting: a dataclass field that says what it is for, which values it takes, and what depends on it.

All that is to be known of a flag is the metadata of its field, and is read from there: by the command line, by checks of
values, by resumed runs, and by what is published.
"""

import math
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import partial
from inspect import get_annotations
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
            abs(number) < math.inf
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


def setting(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    may_be_empty: bool = False,
    changes_result: bool = True,
    is_rate: bool = False,
    by_content: bool = False,
    is_free_text: bool = False,
    is_secret: bool = False,
    teacher_as: str | None = None,
    **bounds: float,
) -> Any:
    """Declares a setting.

    Args:
        default (`Any`): Its value if nothing is said.
        help (`str`): On the command line.
        choices (`tuple[str, ...]`): The texts that it takes, where its type does not say so.
        may_be_empty (`bool`): Of a list: whether its texts may be empty.
        changes_result (`bool`): Whether a run with another value is another run. A resumed run may not change it then.
        is_rate (`bool`): Whether it changes the result, and a resumed run may change it all the same: it is taken from the
            checkpoint on, which is told and noted.
        by_content (`bool`): Whether what it names is compared by its content, so that where that lies does not count.
        is_free_text (`bool`): Whether it names no place, whatever it begins with. Of all other texts what leads to a
            place on this machine is not published; see `hub.published`.
        is_secret (`bool`): Whether it is written nowhere.
        teacher_as (`str`, *optional*): What a teacher is taken otherwise in than its files say, as `ModelReference` and
            `path.json` name it; commands that load the teacher again repeat the flag.
        **bounds (`float`): Of a number's `Range`: `minimum`, `above`, `below`, `maximum`.
    """
    metadata = {
        "help": help,
        "range": Range(**bounds),
        "choices": choices,
        "may_be_empty": may_be_empty,
        "changes_result": changes_result,
        "is_rate": is_rate,
        "by_content": by_content,
        "is_free_text": is_free_text,
        "is_secret": is_secret,
        "teacher_as": teacher_as,
    }
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, repr=not is_secret, metadata=metadata)


free_setting = partial(setting, changes_result=False)
"""Declares a setting that a resumed run may change: it is the same run all the same."""


@dataclass(kw_only=True)
class Settings:
    """A group of settings, or several.

    Raises:
        ValueError: With the flag of a value that its setting does not take.
    """

    def __post_init__(self) -> None:
        for one in fields(self):
            check(one, getattr(self, one.name), f"--{one.name}")


def groups(config: type[Settings]) -> dict[type[Settings], list[Field]]:
    """The classes that declare the settings of a dataclass, and their settings."""
    found = {
        group: [one for one in fields(config) if one.name in get_annotations(group)]
        for group in reversed(config.__mro__)
    }
    return {group: own for group, own in found.items() if own}


def title(group: type[Settings]) -> str:
    """What a group is of."""
    return (group.__doc__ or group.__name__).split("\n")[0].rstrip(".")


def named(*configs: type[Settings], **facts: Any) -> set[str]:
    """The names of the settings of which something is true, such as `is_rate=True`."""
    every = [one for config in configs for one in fields(config)]
    return {one.name for one in every if all(one.metadata[fact] == value for fact, value in facts.items())}


def values(settings: Settings, *kinds: type[Settings]) -> dict[str, Any]:
    """The values of settings in one dictionary, for others to read: without secrets.

    Args:
        settings (`Settings`): All of them, or more.
        *kinds (`type[Settings]`): Of which classes; by default all.
    """
    every = [one for kind in kinds or (type(settings),) for one in fields(kind)]
    return {one.name: getattr(settings, one.name) for one in every if not one.metadata["is_secret"]}


def default_of(one: Field) -> Any:
    """The value of a setting of which nothing is said."""
    return one.default if one.default_factory is MISSING else one.default_factory()


# Values --------------------------------------------------------------------------------------------------------------


def kind_of(one: Field) -> Any:
    """The type of a setting's value, if it has one: `int`, `float`, `bool`, `str`, `Literal[...]`, `list[...]` or `dict[...]`."""
    return _kinds(one.type)[0]


def words_of(one: Field) -> tuple[str, ...]:
    """The words that a number's setting takes in place of a number, such as `auto`."""
    first, *others = _kinds(one.type)
    return (
        ()
        if get_origin(first) is Literal
        else tuple(w for k in others if get_origin(k) is Literal for w in get_args(k))
    )


def choices_of(one: Field) -> tuple[str, ...]:
    """The texts that a setting takes; none if it takes any."""
    kind = kind_of(one)
    return get_args(kind) if get_origin(kind) is Literal else one.metadata["choices"]


def _kinds(annotation: Any) -> list[Any]:
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return [kind for kind in kinds if kind is not NoneType]


def check(one: Field, value: Any, name: str) -> None:
    """Checks that a setting takes a value: a number in its range, one of its choices, a text that is not empty. `None` is a
    value where the setting's type or default says so.

    Args:
        one (`Field`): The setting.
        value (`Any`): Its value.
        name (`str`): How the message names it, such as `--seed`.

    Raises:
        ValueError: With the setting's name, its value and what it takes.
    """
    kind, choices = kind_of(one), choices_of(one)
    if value is None:
        if NoneType not in get_args(one.type) and one.default is not None:
            raise ValueError(f"{name} has to have a value, but is None.")
    elif isinstance(value, str) and value in words_of(one):
        pass
    elif kind in (int, float):
        check_number(name, value, one.metadata["range"], whole=kind is int)
    elif kind is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{name} has to be True or False, but is {_shown(value)}.")
    elif kind is str or get_origin(kind) is Literal:
        check_text(name, value, choices)
    elif get_origin(kind) is list:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{name} has to be a list of texts, but is {_shown(value)}.")
        for each in value:
            check_text(name, each, choices, one.metadata["may_be_empty"])
    else:
        _check_arguments(name, value)


def check_number(name: str, number: Any, wanted: Range, whole: bool) -> None:
    """Checks that a number is one, finite and in its range.

    Args:
        name (`str`): Of the setting, for the message, such as `--seed`.
        number (`Any`): Its value.
        wanted (`Range`): Its range.
        whole (`bool`): Whether it is an `int`, which is at most `LARGEST` unless its range says otherwise.

    Raises:
        ValueError: If it is not.
    """
    if isinstance(number, bool) or not isinstance(number, int if whole else (int, float)):
        raise ValueError(f"{name} has to be a {'whole ' if whole else ''}number, but is {_shown(number)}.")
    if whole and wanted.below is None and wanted.maximum is None and number > LARGEST:
        raise ValueError(f"{name} has to be at most {LARGEST}, but is {number}.")
    if number not in wanted:
        raise ValueError(f"{name} has to be {wanted}, but is {number}.")


def check_text(name: str, text: Any, choices: tuple[str, ...] = (), may_be_empty: bool = False) -> None:
    """Raises a `ValueError` unless a setting's value is a text, with something in it, that can be written as UTF-8; one of
    its choices, if it has any. It may be a token: only what should have been a choice is shown."""
    if choices:
        if text not in choices:
            raise ValueError(f"{name} {_shown(text)} is none of {', '.join(choices)}.")
        return
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


def _check_arguments(name: str, arguments: Any) -> None:
    if not isinstance(arguments, dict) or not all(isinstance(key, str) for key in arguments):
        raise ValueError(f"{name} has to give values to names, but is {_shown(arguments)}.")
    for key, value in arguments.items():
        if isinstance(value, str):
            check_text(f"{name} {key}", value)
        elif not isinstance(value, bool):
            check_number(f"{name} {key}", value, Range(), whole=False)


def _shown(value: Any) -> str:
    return f"a {type(value).__name__}" if isinstance(value, (list, tuple, dict)) else repr(value)
