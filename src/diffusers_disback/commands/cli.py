"""Distil diffusers teachers into one-step generators: everything but training itself, which is a script
(examples/text_to_image/train_disback.py). `diffusers-disback COMMAND --help` describes a command."""

import argparse
import sys
from typing import Any

from .. import __version__
from . import completion, convert_edm, demo, evaluate, hub, info, path, plan, sweep
from .command_line import Parser, number, run
from .options import TEACHER, add_cache_dir, add_command, add_teacher, device, teacher_of


def half(parsed: argparse.Namespace) -> None:
    """Adds float16 weights to a student's folder, as the variant fp16. Its float32 weights stay."""
    from ..hub.publish.export import add_half_variant

    for file in add_half_variant(parsed.folder):
        print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")


def extract_lora(parsed: argparse.Namespace) -> None:
    """Extracts a student as a LoRA of its teacher, for diffusers and for other programs. It is the nearest one of its rank, by a
    singular value decomposition of each layer's difference."""
    from ..hub.publish.export import denoiser_of, extract_lora, save_lora
    from ..models.reference import ModelReference

    if parsed.third is not None:  # STUDENT TEACHER OUTPUT, as before 0.2.0
        parsed.pretrained_model_name_or_path, parsed.output = parsed.output, parsed.third
    student, teacher = (
        denoiser_of(reference, parsed.denoiser, parsed.cache_dir).to(device())
        for reference in (ModelReference(parsed.student), teacher_of(parsed))
    )
    layers, residual = extract_lora(student, teacher, parsed.rank, parsed.svd)
    halves = {key: value.half().cpu() for key, value in layers.items()}
    files = save_lora(halves, parsed.rank, parsed.output, student, parsed.denoiser)
    print(f"rank {parsed.rank}: leaves {residual:.1%} of the difference between student and teacher")
    for file in files:
        print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")


def add_exports(group: Any) -> None:
    """Adds `half` and `extract-lora` to the commands."""
    halving = add_command(group, "half", half)
    halving.add_argument("folder", metavar="FOLDER", help="a student's folder, as training wrote it")
    lora = add_command(group, "extract-lora", extract_lora)
    lora.usage = f"diffusers-disback extract-lora STUDENT OUTPUT {TEACHER} TEACHER [options]"
    lora.add_argument("student", metavar="STUDENT", help="a folder, or a model on the Hub (user/name)")
    lora.add_argument("output", metavar="OUTPUT", help="the folder to write into")
    lora.add_argument("third", nargs="?", help=argparse.SUPPRESS)
    add_teacher(lora)
    lora.add_argument(
        "--denoiser",
        choices=("unet", "transformer"),
        default="unet",
        help="the denoiser's component, in both models (default: unet)",
    )
    lora.add_argument(
        "--rank",
        type=number(True, minimum=1, maximum=4096),
        default=64,
        metavar="RANK",
        help="rank of every layer's update; alpha is the same (default: 64)",
    )
    lora.add_argument(
        "--svd",
        choices=("exact", "fast"),
        default="exact",
        help="decomposition; fast is randomised, with a fixed seed, for large models on a CPU, and may leave a little more "
        "(default: exact)",
    )
    add_cache_dir(lora)


def parser() -> Parser:
    """All commands and their flags."""
    top = Parser(prog="diffusers-disback", description=__doc__)
    top.add_argument("--debug", action="store_true", help="show the traceback of an error; may stand anywhere")
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True, title="commands", metavar="COMMAND")
    for module in (info, plan, sweep, evaluate, demo, path, hub):
        module.add_commands(commands)
    add_exports(commands)
    convert_edm.add_commands(commands)
    completion.add_commands(commands, top)
    return top


def execute(arguments: list[str]) -> int | None:
    """Parses a command line and does what it says; without any, prints the help. Errors are raised."""
    parsed, parsed_not = parser().parse_known_args(arguments or ["--help"])
    if parsed.command == "plan":
        parsed.flags = parsed_not
    elif parsed_not:
        parser().error(f"unrecognized arguments: {' '.join(parsed_not)}")
    parsed.arguments = arguments
    return parsed.function(parsed)


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit code; see `diffusers_disback.commands.command_line.run`."""
    return run(execute, sys.argv[1:] if arguments is None else arguments, "diffusers-disback")


if __name__ == "__main__":
    sys.exit(main())
