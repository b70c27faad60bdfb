#!/usr/bin/env python
"""Distils a diffusers text-to-image teacher into a one-step generator with DisBack (arXiv 2408.15991).

    accelerate launch train_disback.py                       # the embedded shapes teacher, a few minutes on a CPU
    accelerate launch train_disback.py --pretrained_model_name_or_path <teacher> --prompts_file prompts.txt

`README.md` beside this file explains the flags.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from diffusers.utils import check_min_version
from transformers import HfArgumentParser

from diffusers_disback import (
    BacktrackingConfig,
    BacktrackingTrainer,
    DegradationConfig,
    DegradationPath,
    DegradationRecorder,
    Evaluation,
    ModelFamily,
    ModelReference,
    PromptData,
    TargetSchedule,
    TrainingConfig,
    load_family,
)
from diffusers_disback.backtracking import guidance_of_node, nodes_are_guided
from diffusers_disback.data import load_prompts
from diffusers_disback.evaluation.report import REPORT, Report, summary, versions
from diffusers_disback.generator import to_pipeline
from diffusers_disback.hub import save_student, write_model_card
from diffusers_disback.objectives import OBJECTIVES
from diffusers_disback.path import fingerprint
from diffusers_disback.run_folder import FREE_SETTINGS, RunFolder, flat
from shapes.evaluator import is_shapes_teacher, shapes_evaluation


check_min_version("0.40.0")

SHAPES = Path(__file__).parent / "shapes"


def parse(arguments: list[str]) -> tuple[TrainingConfig, DegradationConfig, BacktrackingConfig]:
    """The settings. Without a teacher, the embedded one with the settings of `shapes/quickstart.args`."""
    embedded = not any(a.split("=")[0] == "--pretrained_model_name_or_path" for a in arguments)
    parser = HfArgumentParser((TrainingConfig, DegradationConfig, BacktrackingConfig), description=__doc__)
    training, degradation, backtracking = parser.parse_args_into_dataclasses(
        arguments, args_filename=SHAPES / "quickstart.args" if embedded else None, look_for_args_file=False
    )
    if embedded:
        training.pretrained_model_name_or_path = str(SHAPES / "teacher")
        if not (training.prompts_file or training.dataset_name or training.train_data_dir):
            training.prompts_file = str(SHAPES / "prompts.txt")
    if training.objective not in OBJECTIVES:
        raise ValueError(f"--objective {training.objective!r} is none of {', '.join(OBJECTIVES)}.")
    if not nodes_are_guided(backtracking, degradation.num_path_nodes):
        degradation.proportion_empty_prompts = 0.0
    return training, degradation, backtracking


def main(arguments: list[str]) -> None:
    training, degradation, backtracking = parse(arguments)
    folder = Path(training.output_dir)
    if training.resume_from_checkpoint == "latest" and (folder / REPORT).exists():
        print(f"The run in {folder} is finished.\n{summary(folder)}")
        return
    check_settings(training, degradation, backtracking)
    set_seed(training.seed)
    torch.backends.cuda.matmul.allow_tf32 = training.allow_tf32

    # The teacher, the prompts, and the student's start.
    reference = ModelReference(training.pretrained_model_name_or_path, training.revision, training.variant)
    teacher = load_family(reference, training.cache_dir)
    teacher.schedule.check_timestep(training.conditioning_timestep)
    start = training.generator_model_name_or_path and ModelReference(training.generator_model_name_or_path)
    generator = teacher.initial_generator(start, training.resolution, training.cache_dir)
    path = open_path(training, degradation, teacher, generator)
    prompts = load_prompts(training)
    teacher.to(PartialState().device)
    data = PromptData(prompts, teacher.encode)
    report = begin_report(training, backtracking, teacher, generator, prompts)

    # Stage 1: the fake score walks from the teacher to the initial generator; its footprints are the path.
    if path is not None and not path.complete:
        DegradationRecorder(training, degradation, teacher, generator, data, path).record()

    # Stage 2: the generator is pulled back along the path, from node N-1 to the teacher.
    trainer = None
    if training.stage != "record":

        def measure(network: torch.nn.Module) -> dict[str, float]:
            return report.add_student(
                "student", to_pipeline(network, training.conditioning_timestep, teacher.pipeline)
            )

        trainer = BacktrackingTrainer(training, backtracking, teacher, generator, data, path, measure)
        student = trainer.train()
        if report:
            pipeline = to_pipeline(student, training.conditioning_timestep, teacher.pipeline)
            save_student(pipeline, reference, folder, training.cache_dir)

    if report:
        write_results(report, path, trainer, (training, degradation, backtracking), arguments)


def check_settings(training: TrainingConfig, degradation: DegradationConfig, backtracking: BacktrackingConfig) -> None:
    """What can be seen before anything is loaded: step counts that do not fit, and results that are another run's."""
    folder = RunFolder(training.output_dir)
    resume = training.resume_from_checkpoint
    if training.stage != "backtrack":
        folder.check("degradation", flat(training, degradation), resume)
    if training.stage != "record":
        folder.check("backtracking", flat(training, backtracking), resume)
        if training.stage == "all":
            TargetSchedule(degradation.num_path_nodes, backtracking.steps_per_target, backtracking.max_train_steps)
    elif degradation.num_path_nodes == 0:
        raise ValueError("--stage record with --num_path_nodes 0 has nothing to do.")


def open_path(
    training: TrainingConfig, degradation: DegradationConfig, teacher: ModelFamily, generator: torch.nn.Module
) -> DegradationPath | None:
    """The path to record or to go back along; `None` if there is to be none."""
    folder = Path(training.degradation_path or Path(training.output_dir, "path"))
    start = {
        "name_or_path": training.generator_model_name_or_path,
        "sha256": fingerprint(generator),
        "conditioning_timestep": training.conditioning_timestep,
    }
    recording = {k: v for k, v in flat(training, degradation).items() if k not in FREE_SETTINGS}
    own, recorded = fingerprint(teacher.network), (folder / "path.json").exists()
    if training.stage == "backtrack" or recorded:
        path = DegradationPath.from_pretrained(folder, teacher.reference)
        path.check(own, start)
        if not path.complete and (training.stage == "backtrack" or not training.resume_from_checkpoint):
            raise ValueError(
                f"The path in {folder} is unfinished: {len(path)} nodes are recorded. Finish it with the command that "
                "began it and --resume_from_checkpoint latest."
            )
        return path
    if degradation.num_path_nodes == 0:
        return None
    if PartialState().is_main_process:
        DegradationPath.create(folder, teacher.reference, own, start, recording)
    PartialState().wait_for_everyone()
    return DegradationPath.from_pretrained(folder, teacher.reference)


def begin_report(
    training: TrainingConfig,
    backtracking: BacktrackingConfig,
    teacher: ModelFamily,
    generator: torch.nn.Module,
    prompts: Sequence[str],
) -> Report | None:
    """Teacher and initial student, measured; on the main process."""
    count = min(6, len(prompts))
    wanted = training.validation_prompts or [prompts[i * len(prompts) // count] for i in range(count)]
    wanted = list(dict.fromkeys(wanted))
    report = None
    if PartialState().is_main_process:
        if is_shapes_teacher(training.pretrained_model_name_or_path):
            evaluation = shapes_evaluation(seed=training.seed)
        else:
            repeated = [prompt for prompt in wanted for _ in range(training.num_validation_images)]
            evaluation = Evaluation(repeated, training.seed, training.train_batch_size)
        report = Report(evaluation, wanted, teacher.pipeline, backtracking.guidance_scale)
        report.add_student("initial", to_pipeline(generator, training.conditioning_timestep, teacher.pipeline))
    PartialState().wait_for_everyone()
    return report


def write_results(
    report: Report,
    path: DegradationPath | None,
    trainer: BacktrackingTrainer | None,
    configs: tuple[TrainingConfig, DegradationConfig, BacktrackingConfig],
    arguments: list[str],
) -> None:
    """Report, pictures and model card, and a summary on the screen."""
    training, _, backtracking = configs
    folder, stages, others = Path(training.output_dir), {}, {}
    report.write_samples(folder / "samples.png")
    if path is not None:
        stages["degradation"] = path.manifest["cost"]
        scales = [guidance_of_node(i, len(path), backtracking) for i in range(len(path) + 1)]
        titles = ["teacher", *(f"node {i}, step {node['step']}" for i, node in enumerate(path.nodes, 1))]
        nodes = list(zip(titles, scales, strict=True))
        report.write_path(lambda i, network: path.load(i, network), nodes, folder / "path.png")
    if trainer is not None:
        stages["backtracking"] = trainer.summary()
        others["curve"] = trainer.curve
        report.write_convergence(trainer.curve, trainer.schedule.switches, folder / "convergence.png")
    command = shlex.join(["accelerate", "launch", "examples/text_to_image/train_disback.py", *arguments])
    content = report.write(
        folder,
        stages=stages,
        seed=training.seed,
        versions=versions(),
        settings=flat(*configs),
        command=command,
        **others,
    )
    if trainer is not None:
        write_model_card(folder, content, report.gallery.prompts[0], trainer.family.resolution(training.resolution))
    print(summary(folder))


if __name__ == "__main__":
    main(sys.argv[1:])
