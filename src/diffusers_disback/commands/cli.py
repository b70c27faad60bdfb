"""Distil diffusers teachers into one-step generators: everything but training itself, which is a script
(examples/text_to_image/train_disback.py). `diffusers-disback COMMAND --help` describes a command."""

import logging
import sys

from .. import __version__
from . import completion, convert_edm, demo, evaluate, exports, hub, info, path, plan, sweep
from .command_line import Parser, run


def parser() -> Parser:
    """All commands and their flags."""
    top = Parser(prog="diffusers-disback", description=__doc__)
    top.add_argument("--debug", action="store_true", help="show the traceback of an error; may stand anywhere")
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True, title="commands", metavar="COMMAND")
    for module in (info, plan, sweep, evaluate, demo, path, hub, exports, convert_edm):
        module.add_commands(commands)
    completion.add_commands(commands, top)
    return top


def execute(arguments: list[str]) -> int | None:
    """Parses a command line and does what it says; without any, prints the help. Errors are raised."""
    top = parser()
    parsed, parsed_not = top.parse_known_args(arguments or ["--help"])
    if parsed.command == "plan":
        parsed.flags = parsed_not
    elif parsed_not:
        top.error(f"unrecognized arguments: {' '.join(parsed_not)}")
    parsed.arguments = arguments
    return parsed.function(parsed)


# They warn of optional packages as soon as they are imported. Levels of these loggers last when transformers sets that of its own.
_TOLD_OF_IMPORTS = ("transformers.utils.import_utils", "bitsandbytes.backends.cpu.ops")


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit code; see `diffusers_disback.commands.command_line.run`."""
    for name in _TOLD_OF_IMPORTS:
        logging.getLogger(name).setLevel(logging.ERROR)
    return run(execute, sys.argv[1:] if arguments is None else arguments, "diffusers-disback")


if __name__ == "__main__":
    sys.exit(main())
