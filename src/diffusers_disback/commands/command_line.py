"""A command line's end: what it says of an error, in one or two lines, and its exit code. `--debug` shows the traceback."""

import os
import select
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from ..hub.files import printable
from ..training.signals import Interrupted, SignalHandler


THEIRS, OURS = 2, 1  # a user's error, as argparse has it, and a fault of this library
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
        except SystemExit as error:
            if not isinstance(error, Interrupted):
                raise  # of argparse, which has said all
            return _end(error, error.code, name, debug)
        except KeyboardInterrupt as error:  # where signals are not handled, as in a thread
            return _end(error, 130, name, debug)
        except Exception as error:
            # What it was waiting for has ended by the same signal; any other error is told, or a checkpoint that could not be
            # saved would look like one that was.
            if handler.received is not None and _is_of_another_process(error):
                return _end(Interrupted(handler.received), 128 + handler.received, name, debug)
            if isinstance(error, BrokenPipeError) and not _flush(sys.stdout):
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
    said = _lines(error)
    first = said.split("\n")[0]
    if isinstance(error, KeyboardInterrupt):
        said = "ended by SIGINT."
    elif _is_of_another_process(error):
        said = "another process of this launch has ended; what it says is the reason."
    elif code == OURS:
        said = (
            f"{type(error).__name__}: {first}\nThis is a fault of diffusers-disback, or of a library that it uses: please run "
            "again with --debug, and report what is printed."
        )
    elif isinstance(error, OSError):
        where = "" if error.filename is None else f"{_lines(error.filename)}: "
        said = f"{where}{_lines(error.strerror)}." if error.strerror else first
    elif isinstance(error, ImportError):
        said = f"{first}. `pip install 'diffusers-disback[train,eval]'` brings what training needs."
    elif isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        said = f"out of memory. {first} `diffusers-disback plan` tells what settings take."
    return " ".join([said, *map(_lines, getattr(error, "__notes__", []))])


def parse_flags(parser: Any, arguments: list[str], **how: Any) -> list[Any]:
    """The dataclasses of an `HfArgumentParser`; an error is raised as any other, without a page of usage.

    Args:
        parser (`HfArgumentParser`): Of the dataclasses.
        arguments (`list[str]`): The command line.
        how: Passed on to `parse_args_into_dataclasses`.

    Raises:
        ValueError: If a flag is unknown, or its value is of the wrong kind.
    """

    def refuse(said: str) -> None:
        raise ValueError(f"{said}. --help tells all flags.")

    parser.error = refuse
    *configs, unknown = parser.parse_args_into_dataclasses(
        arguments, look_for_args_file=False, return_remaining_strings=True, **how
    )
    if unknown:
        flags = [argument for argument in unknown if argument.startswith("-")]  # a value may be a secret
        refuse(f"unrecognized arguments: {' '.join(flags or unknown)}")
    return configs


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
