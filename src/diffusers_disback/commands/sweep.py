"""`diffusers-disback timestep-sweep`: which conditioning timestep suits a teacher."""

import argparse
from pathlib import Path
from typing import Any

from .command_line import number
from .options import TEACHER, add_cache_dir, add_command, add_teacher, device, prompts_for, teacher_of


def add_commands(group: Any) -> None:
    """Adds `timestep-sweep` to the commands."""
    parser, positive = add_command(group, "timestep-sweep", timestep_sweep), number(True, minimum=1)
    parser.usage = f"diffusers-disback timestep-sweep {TEACHER} TEACHER [options]"
    parser.add_argument("teacher", nargs="?", help=argparse.SUPPRESS)
    add_teacher(parser)
    parser.add_argument(
        "--prediction_type",
        choices=["epsilon", "v_prediction", "sample"],
        help="what the teacher predicts, if its scheduler's config says something else",
    )
    parser.add_argument(
        "--rescale_betas_zero_snr",
        action="store_true",
        help="rescale the teacher's betas to zero terminal SNR, if its scheduler's config does not say so",
    )
    parser.add_argument(
        "--null_class_label",
        type=number(True, minimum=0),
        metavar="LABEL",
        help="the class label that stands for no class, for a teacher with class labels",
    )
    parser.add_argument(
        "--pretrained_vae_model_name_or_path", metavar="VAE", help="an autoencoder in place of the teacher's own"
    )
    parser.add_argument(
        "--timesteps",
        type=number(True, minimum=0),
        nargs="+",
        default=[99, 199, 299, 399, 499, 599, 699, 799, 899, 999],
        metavar="T",
        help="the timesteps to try (default: 99 199 ... 999)",
    )
    parser.add_argument("--prompt", action="append", help="a prompt; repeat it for more (default: two prompts)")
    parser.add_argument(
        "--prompts_file", metavar="FILE", help="a text file with one prompt a line, in place of --prompt"
    )
    parser.add_argument(
        "--num_prompts",
        type=positive,
        default=16,
        metavar="N",
        help="how many prompts of the file to take, from the top (default: 16)",
    )
    parser.add_argument(
        "--num_images_per_prompt", type=positive, default=4, metavar="N", help="images of each prompt (default: 4)"
    )
    parser.add_argument(
        "--batch_size", type=positive, default=4, metavar="N", help="images sampled at once (default: 4)"
    )
    parser.add_argument(
        "--guidance_scale",
        type=number(False, minimum=1),
        default=7.5,
        metavar="SCALE",
        help="classifier-free guidance of the teacher's many-step images (default: 7.5)",
    )
    parser.add_argument(
        "--num_inference_steps",
        type=number(True, minimum=1, maximum=1000),
        default=25,
        metavar="STEPS",
        help="steps of the teacher's sampler, DDIM (default: 25)",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        default="timesteps.png",
        help="the image to write; the table is written beside it, as JSON (default: timesteps.png)",
    )
    add_cache_dir(parser)


def timestep_sweep(parsed: argparse.Namespace) -> None:
    """Recommends a --conditioning_timestep for a teacher. The teacher is evaluated once at each of a range of timesteps; a table and
    an image compare the results with its many-step images."""
    from diffusers.utils.logging import disable_progress_bar

    from ..data.prompts import PromptFile
    from ..evaluation import Evaluation
    from ..evaluation.sweep import recommended
    from ..evaluation.sweep import timestep_sweep as sweep
    from ..families import load_family
    from ..hub.files import write_json
    from ..models.generator import check_many_steps

    disable_progress_bar()
    if parsed.pretrained_model_name_or_path is None:  # a word, as before 0.2.0
        parsed.pretrained_model_name_or_path = parsed.teacher
    teacher = teacher_of(
        parsed,
        prediction_type=parsed.prediction_type,
        vae=parsed.pretrained_vae_model_name_or_path,
        rescale_betas_zero_snr=parsed.rescale_betas_zero_snr,
        null_class_label=parsed.null_class_label,
    )
    family = load_family(teacher, parsed.cache_dir)
    check_many_steps(family.pipeline.scheduler, teacher.name_or_path)
    for t in parsed.timesteps:
        family.check_timestep(t)
    prompts = (
        parsed.prompt if parsed.prompts_file is None else list(PromptFile(parsed.prompts_file, parsed.num_prompts))
    )
    prompts = prompts_for(family, prompts)
    repeated = [prompt for prompt in prompts for _ in range(parsed.num_images_per_prompt)]
    family.to(device()).network.to(device())
    evaluation, image = Evaluation(repeated, batch_size=parsed.batch_size), Path(parsed.output)
    measures = sweep(family, parsed.timesteps, evaluation, parsed.guidance_scale, parsed.num_inference_steps, image)
    names = list(next(iter(measures.values())))
    print(f"{'timestep':>8}  " + "  ".join(f"{name:>16}" for name in names))
    for t, values in measures.items():
        print(f"{t:>8}  " + "  ".join(f"{values[name]:>16.4f}" for name in names))
    best = recommended(measures)
    write_json(image.with_suffix(".json"), {"recommended": best, "timesteps": measures, "num_pictures": len(repeated)})
    print(f"recommended: --conditioning_timestep {best} (least drift, over {len(repeated)} images)")
    print(f"see {image} and {image.with_suffix('.json')}")
