"""A command line's end: what it says of an error, in one or two lines, and its exit code. `--debug` shows the traceback."""

import argparse
import os
import select
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import Field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn, TextIO, get_origin

from ..hub.files import printable
from ..training.settings.fields import (
    Range,
    Settings,
    check_number,
    choices_of,
    default_of,
    groups,
    kind_of,
    title,
    words_of,
)
from ..training.settings_file import read_settings
from ..training.signals import Interrupted, SignalHandler


THEIRS, OURS = 2, 1  # a user's error, as argparse has it, and a fault of this library
_TRUTHS = {
    **dict.fromkeys(("true", "yes", "t", "y", "1"), True),
    **dict.fromkeys(("false", "no", "f", "n", "0"), False),
}
_PACKAGE = Path(__file__).parents[1]


def run(main: Callable[[list[str]], int | None], arguments: list[str], name: str) -> int:
    """Calls the function of a command line. Errors become lines on stderr, and signals are handled.

    Args:
        main (`Callable`): Takes the arguments, `--debug` apart; an error of it is raised as any.
        arguments (`list[str]`): Of the command line.
        name (`str`): Of the command, for messages.

    Returns:
        `int`: The exit code: 0; 2 for an error that the user can mend, 1 for one of ours; 128 and its number for a signal.
    """
    debug, arguments = "--debug" in arguments, [argument for argument in arguments if argument != "--debug"]
    with SignalHandler() as handler:
        try:
            code = main(arguments) or 0
            _flush(sys.stdout)
            return code
        except Interrupted as error:
            return _end(error, 128 + error.number, name, debug)
        except KeyboardInterrupt as error:  # where signals are not handled, as in a thread
            return _end(error, 130, name, debug)
        except Exception as error:
            # What it was waiting for has ended by the same signal; any other error is told, or a checkpoint that could not be
            # saved would look like one that was.
            if handler.received is not None and _is_of_another_process(error):
                return _end(Interrupted(handler.received), 128 + handler.received, name, debug)
            if isinstance(error, BrokenPipeError) and not _is_read(sys.stdout):
                return (
                    141  # as of a program that SIGPIPE has ended: whoever read the output, such as `head`, has enough
                )
            return _end(error, THEIRS if is_theirs(error, _own_places(main)) else OURS, name, debug)


def is_theirs(error: BaseException, places: list[Path]) -> bool:
    """Whether the user can mend an error: one that this project raised, in words for users; a disk's or a file's; too
    little memory; a library that is not installed.

    Args:
        error (`BaseException`): With its traceback.
        places (`list[Path]`): Folders with the project's own code.
    """
    if isinstance(error, (OSError, ImportError, MemoryError)) or type(error).__name__ == "OutOfMemoryError":
        return True
    frames = traceback.extract_tb(error.__traceback__)
    if not isinstance(error, (ValueError, FloatingPointError)) or not frames:
        return False
    raised = Path(frames[-1].filename).resolve()
    inner = [raised.relative_to(place).parts for place in places if raised.is_relative_to(place)]
    return any("site-packages" not in parts for parts in inner)


def _own_places(main: Callable[[list[str]], int | None]) -> list[Path]:
    return [_PACKAGE.resolve(), Path(main.__code__.co_filename).resolve().parent]


def _end(error: BaseException, code: int, name: str, debug: bool) -> int:
    """Says what happened. Of several processes the main one speaks first, and others only of errors, not of signals."""
    rank = int(os.environ.get("RANK", "0"))
    if rank and isinstance(error, (Interrupted, KeyboardInterrupt)):
        return code
    if rank:
        time.sleep(0.5)
        name = f"{name}, process {rank}"
    if debug:
        traceback.print_exception(error)
    _flush(sys.stdout)
    print(f"{name}: {message(error, code)}", file=sys.stderr)
    _flush(sys.stderr)
    return code


def message(error: BaseException, code: int) -> str:
    """An error in words: one or two lines, in which what somebody else named shows no colours and moves no cursor."""
    text = _lines(error)
    first = text.split("\n")[0]
    if isinstance(error, KeyboardInterrupt):
        text = "ended by SIGINT."
    elif _is_of_another_process(error):
        text = "another process of this launch has ended; what it says is the reason."
    elif code == OURS:
        text = (
            f"{type(error).__name__}: {first}\nThis is a fault of diffusers-disback, or of a library that it uses: please run "
            "again with --debug, and report what is printed."
        )
    elif isinstance(error, OSError):
        where = "" if error.filename is None else f"{_lines(error.filename)}: "
        text = f"{where}{_lines(error.strerror)}." if error.strerror else first
    elif isinstance(error, ImportError):
        text = f"{first}. `pip install 'diffusers-disback[train,eval]'` brings what training needs."
    elif isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        text = f"out of memory. {first} `diffusers-disback plan` tells what settings take."
    return " ".join([text, *map(_lines, getattr(error, "__notes__", []))])


class Parser(argparse.ArgumentParser):
    """Raises its errors as any other, without a page of usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. --help tells all flags.")


def read_flags(config: type[Settings], arguments: list[str], **how: Any) -> dict[str, Any]:
    """The settings that a command line gives; those of a file that it names with `--config` come before its own flags.

    Args:
        config (`type[Settings]`): The dataclass that they are of.
        arguments (`list[str]`): The command line.
        **how: Of the `ArgumentParser`.

    Raises:
        ValueError: If a flag is unknown, or its value is of the wrong kind.
    """
    parser = Parser(allow_abbrev=False, argument_default=argparse.SUPPRESS, **how)
    parser.add_argument(
        "--config", help="A YAML file of flags, as in `seed: 0`. Flags of the command line override it."
    )
    for group, own in groups(config).items():
        section = parser.add_argument_group(title(group))
        for one in own:
            add_flag(section, one)

    known, unknown = parser.parse_known_args(arguments)
    if unknown:
        flags = [argument for argument in unknown if argument.startswith("-")]  # a value may be a secret
        parser.error(f"unrecognized arguments: {' '.join(flags or unknown)}")
    given = vars(known)
    file = given.pop("config", None)
    return given if file is None else {**read_settings(file, config), **given}


def read_flags_or_embedded(config: type[Settings], arguments: list[str], folder: Path, **how: Any) -> dict[str, Any]:
    """As `read_flags`. Without a teacher it is the one that is embedded in a folder, `teacher`, with the settings of
    `quickstart.args` and the prompts of `prompts.txt`, if there is one, where the arguments say nothing else.

    Args:
        config, arguments, how: As of `read_flags`.
        folder (`Path`): Of the embedded teacher.
    """
    given = read_flags(config, arguments, **how)
    if "pretrained_model_name_or_path" in given:
        return given
    # Relative, so that what is published names no machine's folders.
    embedded = {"pretrained_model_name_or_path": os.path.relpath(folder / "teacher")}
    prompts = folder / "prompts.txt"
    if prompts.exists() and not given.keys() & {"prompts_file", "dataset_name", "train_data_dir"}:
        embedded["prompts_file"] = os.path.relpath(prompts)
    return {**read_flags(config, (folder / "quickstart.args").read_text().split()), **embedded, **given}


def add_flag(parser: Any, one: Field) -> None:
    """Adds the flag of a setting, also with dashes, to a parser or a group of one.

    Args:
        parser (`ArgumentParser`): Which is told types alone; `Settings` knows what values are taken.
        one (`Field`): The setting.
    """
    kind, choices, default = kind_of(one), choices_of(one), default_of(one)
    how: dict[str, Any] = {"type": kind}
    if kind is bool:
        how = {"type": _truth, "nargs": "?", "const": True, "metavar": "true"}
    elif get_origin(kind) is list:
        how = {"type": str, "nargs": "+"}
    elif get_origin(kind) is dict:
        how = {"action": NamedValues, "nargs": "+", "metavar": "name=value"}
    elif get_origin(kind) is Literal:
        how = {"type": str}
    elif words_of(one):
        how = {"type": partial(_word_or, words_of(one), kind), "metavar": f"{{{','.join(words_of(one))}}} or a number"}
    if choices and len(choices) < 5:
        how["metavar"] = f"{{{','.join(choices)}}}"
    shown = " ".join(default) if isinstance(default, (list, dict)) else default
    text = one.metadata["help"] + ("" if shown in (None, "") or shown is False else f" (default: {shown})")
    flags = dict.fromkeys([f"--{one.name}", f"--{one.name.replace('_', '-')}"])
    parser.add_argument(*flags, help=text.replace("%", "%%"), **how)


def _word_or(words: tuple[str, ...], kind: type, text: str) -> Any:
    """A word as it is, and any other text as a number."""
    if text in words:
        return text
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither {' nor '.join(words)} nor a number") from None


class NamedValues(argparse.Action):
    """Collects arguments of the form `name=value`."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        given: dict[str, Any] = {}
        for pair in values:
            name, equals, text = pair.partition("=")
            if not name or not equals:
                raise argparse.ArgumentError(self, f"{pair!r} is no name=value")
            if name in given:
                raise argparse.ArgumentError(self, f"{name} is given twice")
            given[name] = _number_or_text(text)
        setattr(namespace, self.dest, given)


def _number_or_text(text: str) -> bool | int | float | str:
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


def _truth(text: str) -> bool:
    if text.lower() not in _TRUTHS:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join(_TRUTHS)}")
    return _TRUTHS[text.lower()]


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
            shown = str(error) if str(error).startswith("it ") else f"it has to be a {'whole ' * whole}number"
            raise argparse.ArgumentTypeError(f"{text!r} is not taken: {shown.rstrip('.')}") from error
        return value

    return parse


def _is_of_another_process(error: BaseException) -> bool:
    """Whether an error is that of a connection which another process of the launch has left."""
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, RuntimeError) and any("torch/distributed/" in frame.filename for frame in frames[-2:])


def _lines(text: Any) -> str:
    """A text with its own line breaks, and no other control characters."""
    return "\n".join(map(printable, str(text).split("\n")))


def _flush(stream: TextIO) -> None:
    """What was printed comes before what is printed next; if nobody reads it any more, that is no error."""
    try:
        stream.flush()
    except BrokenPipeError:
        _is_read(stream)


def _is_read(stream: TextIO) -> bool:
    """Whether somebody reads a stream; if not, what is left of it goes nowhere."""
    poll = select.poll()
    poll.register(stream.fileno(), select.POLLOUT)
    if all(not events & select.POLLERR for _, events in poll.poll(0)):
        return True
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return False
