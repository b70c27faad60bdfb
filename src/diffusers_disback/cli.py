"""`diffusers-disback`: what is not training. Training has one door, `examples/text_to_image/train_disback.py`."""

import argparse
import sys

from . import __version__


def path_show(folder: str) -> None:
    """Prints a table of a path's nodes."""
    from .path import DegradationPath

    path = DegradationPath.from_pretrained(folder)
    teacher, generator = path.manifest["teacher"], path.manifest["generator"]
    print(f"teacher: {teacher['name_or_path']} (SHA-256 {teacher['sha256'][:12]})")
    print(f"start: {generator['name_or_path'] or 'the teacher'} at timestep {generator['conditioning_timestep']}")
    print(f"{'node':>4}  {'step':>8}  {'loss':>10}  {'dtype':<8}  name")
    for index, node in enumerate(path.nodes, 1):
        print(f"{index:>4}  {node['step']:>8}  {node['loss']:>10.5g}  {node['dtype']:<8}  {node['name']}")
    print("complete" if path.complete else "unfinished")


def path_verify(folder: str) -> None:
    """Checks that every node is whole."""
    from .path import DegradationPath

    path = DegradationPath.from_pretrained(folder)
    for index, node in enumerate(path.nodes, 1):
        tensors = len(path.read(index))
        print(f"node {index}: {node['name']}, {tensors} tensors, whole")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="diffusers-disback", description=__doc__)
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    path = commands.add_parser("path", help="look at a degradation path").add_subparsers(dest="verb", required=True)
    for name, function in (("show", path_show), ("verify", path_verify)):
        command = path.add_parser(name, help=function.__doc__)
        command.add_argument("folder", help="the folder with path.json")
        command.set_defaults(function=function)
    parsed = parser.parse_args(arguments)
    try:
        parsed.function(parsed.folder)
    except ValueError as error:
        print(f"diffusers-disback: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
