"""`diffusers-disback evaluate`: models side by side."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..hub.markdown import shell
from .command_line import NamedValues, number
from .options import add_cache_dir, add_command


if TYPE_CHECKING:
    from ..evaluation.entries import ImageFolder, PipelineEntry


def evaluate(parsed: argparse.Namespace) -> None:
    """Compares models on the same prompts and the same noise. It writes a table with intervals, and images side by side."""
    import torch
    from diffusers.utils.logging import disable_progress_bar

    from ..evaluation import Evaluation, check_evaluators, make_evaluators
    from ..evaluation.compare import Comparison, is_main
    from ..evaluation.entries import Entry, HowSampled
    from ..evaluation.named import known_evaluators
    from ..training.checks import check_folder
    from ..training.networks import PRECISIONS
    from ..training.processes import process_state

    disable_progress_bar()
    entries = [Entry.parse(text) for text in dict.fromkeys([*filter(None, [parsed.reference]), *parsed.models])]
    if len(set(parsed.models)) < len(parsed.models):
        raise ValueError("A model is given twice; each is measured once.")
    known = known_evaluators(parsed.evaluators)
    check_evaluators(parsed.evaluators, parsed.evaluator_args, known)
    needing = [name for name in parsed.evaluators if known[name].compares_with_teacher]
    if parsed.reference is None and needing:
        raise ValueError(
            f"--evaluators {' '.join(needing)} compare with a teacher: name it, as --reference TEACHER@25."
        )
    check_folder("output", parsed.output)
    state = process_state()
    dtype = PRECISIONS[parsed.mixed_precision]
    if dtype == torch.float16 and state.device.type == "cpu":
        raise ValueError("--mixed_precision fp16 needs a GPU; leave it out, or take bf16.")
    with state.main_process_first():  # which downloads
        models = [entry.find(parsed.cache_dir) for entry in entries]
    evaluation = Evaluation(prompts_of(parsed, models), parsed.seed, parsed.batch_size)
    if is_main(state):
        evaluation.evaluators += make_evaluators(
            parsed.evaluators, parsed.evaluator_args, state.device, parsed.cache_dir, known
        )
    how = HowSampled(
        state.device, dtype, parsed.num_inference_steps, parsed.guidance_scale, parsed.resolution, state=state
    )
    comparison = Comparison(evaluation, how, parsed.resamples)
    for index, model in enumerate(models, 1):
        if is_main(state):
            print(f"{model.entry.text}: {len(evaluation.prompts)} images ({index} of {len(models)})", file=sys.stderr)
        comparison.add(model, is_reference=model.entry.text == parsed.reference)
    if is_main(state):
        command = shell(["diffusers-disback", *parsed.arguments])
        given = {"evaluators": parsed.evaluators, "evaluator_args": parsed.evaluator_args}
        given |= {"prompts_file": parsed.prompts_file, "num_images_per_prompt": parsed.num_images_per_prompt}
        print(comparison.table())
        comparison.write(Path(parsed.output), command, **given)
        print(f"\nsee {parsed.output}/evaluation.md, evaluation.json and evaluation.png")
    state.destroy_process_group()


def prompts_of(parsed: argparse.Namespace, models: "list[PipelineEntry | ImageFolder]") -> list[str]:
    """The prompt of each image: those of the file, or else the texts of the first folder of images that tells them.

    Raises:
        ValueError: If there are none, or a folder of images does not fit them.
    """
    from ..data.prompts import PromptFile
    from ..evaluation.entries import ImageFolder

    folders = [model for model in models if isinstance(model, ImageFolder)]
    texts = next((folder.texts for folder in folders if folder.texts), None)
    repeats = parsed.num_images_per_prompt
    if parsed.prompts_file is not None:
        chosen = list(PromptFile(parsed.prompts_file, parsed.num_prompts))
        prompts = [prompt for prompt in chosen for _ in range(repeats)]
    elif texts and repeats == 1 and parsed.num_prompts is None:
        prompts = texts
    else:
        raise ValueError(
            "There are no prompts: name a file with one a line by --prompts_file. Only without --num_prompts and "
            "--num_images_per_prompt can they be those of a folder of images, whose metadata.jsonl says the text of each."
        )
    for folder in folders:
        folder.check(prompts, repeats)
    return prompts


def add_commands(group: Any) -> None:
    """Adds `evaluate` to the commands."""
    parser, positive = add_command(group, "evaluate", evaluate), number(True, minimum=1)
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        help="a student, or a pipeline in many steps as MODEL@STEPS or MODEL@STEPS,guidance=SCALE, each a folder or a model on the "
        "Hub; or a folder of images. After the steps may also stand revision=, variant=, lora=, vae=, prediction_type=, "
        "null_class_label=, single_file_config=, scheduler=own|ddim|lcm",
    )
    parser.add_argument(
        "--reference", metavar="MODEL", help="a model whose images the others are compared with, such as TEACHER@25"
    )
    parser.add_argument("--prompts_file", metavar="FILE", help="a text file with one prompt a line")
    parser.add_argument(
        "--num_prompts",
        type=positive,
        metavar="N",
        help="how many prompts of the file to take, from the top (default: all)",
    )
    parser.add_argument(
        "--num_images_per_prompt", type=positive, default=1, metavar="N", help="images of each prompt (default: 1)"
    )
    parser.add_argument(
        "--evaluators",
        nargs="+",
        default=["drift"],
        metavar="NAME",
        help="what to measure: names as in docs/evaluation.md, or module:Class of your own (default: drift)",
    )
    parser.add_argument(
        "--evaluator_args",
        action=NamedValues,
        nargs="+",
        default={},
        metavar="name=value",
        help="options of the evaluators",
    )
    parser.add_argument(
        "--num_inference_steps",
        type=number(True, minimum=1, maximum=1000),
        default=25,
        metavar="STEPS",
        help="sampler steps (DDIM) of pipelines without @STEPS (default: 25)",
    )
    parser.add_argument(
        "--guidance_scale",
        type=number(False, minimum=0),
        default=7.5,
        metavar="SCALE",
        help="guidance of pipelines in many steps without guidance= (default: 7.5)",
    )
    parser.add_argument(
        "--resolution",
        type=number(True, minimum=8, maximum=16384),
        metavar="PIXELS",
        help="side of all images in pixels (default: each model's own)",
    )
    parser.add_argument(
        "--seed",
        type=number(True, minimum=0, maximum=2**32 - 1),
        default=0,
        metavar="SEED",
        help="seed of the noise (default: 0)",
    )
    parser.add_argument(
        "--batch_size", type=positive, default=8, metavar="N", help="images sampled at once (default: 8)"
    )
    parser.add_argument(
        "--mixed_precision",
        choices=["no", "bf16", "fp16"],
        default="no",
        help="precision of the denoisers (default: no, which is float32)",
    )
    parser.add_argument(
        "--resamples",
        type=number(True, minimum=0, maximum=100_000),
        default=200,
        metavar="N",
        help="bootstrap resamples of the prompts for the intervals, 0 for no intervals (default: 200)",
    )
    parser.add_argument(
        "--output", metavar="FOLDER", default="evaluation", help="the folder to write into (default: evaluation)"
    )
    add_cache_dir(parser)
