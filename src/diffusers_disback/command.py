"""A command line's end: what it says of an error, in one or two lines, and its exit code. `--debug` shows the traceback."""

import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from .files import printable
from .signals import Interrupted, SignalHandler


THEIRS, OURS = 2, 1  # a user's error, as argparse has it, and a fault of this library
_PACKAGE = Path(__file__).parent


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
            return main(arguments) or 0
        except SystemExit as error:
            if not isinstance(error, Interrupted):
                raise  # of argparse, which has said all
            return _end(error, error.code, name, debug)
        except KeyboardInterrupt as error:  # where signals are not handled, as in a thread
            return _end(error, 130, name, debug)
        except Exception as error:
            if handler.received is not None:  # what it was waiting for has ended by the same signal
                return _end(Interrupted(handler.received), 128 + handler.received, name, debug)
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
    return any(Path(frames[-1].filename).is_relative_to(place) for place in places)


def _own_places(main: Callable[[list[str]], int | None]) -> list[Path]:
    return [_PACKAGE, Path(main.__code__.co_filename).parent]


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
    """An error in words: one or two lines, of which nothing that somebody else named makes a third, or a colour."""
    said = _lines(str(error))
    if isinstance(error, KeyboardInterrupt):
        said = "ended by SIGINT."
    elif code == OURS:
        first = said.splitlines()[0] if said else ""
        said = (
            f"{type(error).__name__}: {first}\nThis is a fault of diffusers-disback, or of a library that it uses: please run "
            "again with --debug, and report what is printed."
        )
    elif isinstance(error, OSError) and error.strerror:
        where = f"{_lines(str(error.filename))}: " if error.filename is not None else ""
        said = f"{where}{_lines(error.strerror)}."
    elif isinstance(error, ImportError):
        said = f"{said}. `pip install 'diffusers-disback[train,eval]'` brings what training needs."
    elif isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        said = f"out of memory. {(said.splitlines() or [''])[0]} `diffusers-disback plan` tells what settings take."
    return " ".join([said, *map(_lines, getattr(error, "__notes__", []))])


def _lines(text: str) -> str:
    """A text with its own line breaks, and no other control characters."""
    return "\n".join(map(printable, text.splitlines()))


def _flush(stream) -> None:
    """What was printed comes before what is printed next; if nobody reads it any more, that is no error."""
    try:
        stream.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
