"""`diffusers-disback completion`: a shell completes commands, flags and files."""

import argparse
from collections.abc import Iterator
from typing import Any

from .command_line import add_flag
from .options import add_command


_FILES = ("FILE", "FOLDER", "LORA", "MODEL", "OUTPUT", "PATH", "STUDENT", "TEACHER", "VAE")  # values that may be files


def add_commands(group: Any, top: argparse.ArgumentParser) -> None:
    """Adds `completion` to the commands of a parser."""
    parser = add_command(group, "completion", completion)
    parser.add_argument("shell", choices=["bash", "zsh", "tcsh"], help="the shell to complete in")
    parser.set_defaults(top=top)


def completion(parsed: argparse.Namespace) -> None:
    """Prints a script that completes commands, flags and files in a shell. For bash, add to ~/.bashrc:
    eval "$(diffusers-disback completion bash)". It needs shtab (pip install shtab)."""
    from ..training.config import DisBackConfig
    from ..training.settings.fields import groups

    try:
        import shtab
    except ImportError as error:
        raise ValueError("Completion needs shtab: pip install 'diffusers-disback[completion]'.") from error
    for parser in parsers(parsed.top):
        if parser.prog.endswith(" plan"):  # which reads the flags of the training script itself
            for own in groups(DisBackConfig).values():
                for one in own:
                    add_flag(parser, one)
        for action in parser._actions:
            if action.metavar in _FILES:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parsed.top, parsed.shell))


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser, and those of all commands in it."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from parsers(each)
