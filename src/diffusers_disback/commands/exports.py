"""`diffusers-disback half` and `extract-lora`: other forms of a student."""

import argparse
from typing import Any

from .command_line import number
from .options import TEACHER, add_cache_dir, add_command, add_teacher, device, teacher_of


def add_commands(group: Any) -> None:
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
