#!/usr/bin/env python
"""Distils a diffusers text-to-image teacher into a one-step generator with DisBack (arXiv 2408.15991).

    accelerate launch train_disback.py                       # the embedded shapes teacher, minutes on a CPU
    accelerate launch train_disback.py --pretrained_model_name_or_path <teacher> --prompts_file prompts.txt

`README.md` beside this file explains the flags. `--debug`, which is no setting, shows the traceback of an error.
"""

import os
import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import set_seed
from diffusers.utils import check_min_version

from diffusers_disback import (
    BacktrackingTrainer,
    DegradationRecorder,
    DisBackConfig,
    ModelReference,
    load_family,
)
from diffusers_disback.backtracking import nodes_are_guided
from diffusers_disback.commands.command_line import read_flags, run
from diffusers_disback.evaluation.report import Report, drawable, summary
from diffusers_disback.hub.publish.background import RunUpload
from diffusers_disback.hub.publish.student import check_teacher_files, save_student
from diffusers_disback.session import (
    Configs,
    check_inputs,
    check_settings,
    condition_source,
    in_use,
    is_finished,
    load_prompts,
    open_path,
    picture_evaluation,
    validation_prompts,
    write_results,
)
from diffusers_disback.training.networks import accelerator_of, compute_dtype
from diffusers_disback.training.processes import process_state
from diffusers_disback.training.settings_file import SETTINGS, write_settings
from shapes.evaluator import is_shapes_teacher, shapes_evaluation


check_min_version("0.40.0")

SHAPES = Path(__file__).parent / "shapes"


def parse(arguments: list[str]) -> DisBackConfig:
    """The settings. Without a teacher, the embedded one with the settings of `shapes/quickstart.args`."""
    given = read_flags(DisBackConfig, arguments, description=__doc__)
    if "pretrained_model_name_or_path" not in given:
        # Relative, so that what is published names no machine's folders.
        embedded = {"pretrained_model_name_or_path": os.path.relpath(SHAPES / "teacher")}
        if not given.keys() & {"prompts_file", "dataset_name", "train_data_dir"}:
            embedded["prompts_file"] = os.path.relpath(SHAPES / "prompts.txt")
        quickstart = read_flags(DisBackConfig, (SHAPES / "quickstart.args").read_text().split())
        given = {**quickstart, **embedded, **given}
    config = DisBackConfig(**given)
    if not nodes_are_guided(config, config.num_path_nodes):
        config.proportion_empty_prompts = 0.0
    return config


def main(arguments: list[str]) -> None:
    """All of it. Errors are raised; `diffusers_disback.commands.command_line.run` makes lines and exit codes of them."""
    training = parse(arguments)
    configs = (training, training, training)
    folder = Path(training.output_dir)
    check_settings(configs)
    state = process_state()
    if training.resume_from_checkpoint == "latest" and is_finished(configs):
        state.print(f"The run in {folder} is finished.\n{summary(folder)}")
        if training.push_to_hub and state.is_main_process:
            print(RunUpload(training).finish())
        return
    with in_use(folder):
        distil(configs, state, arguments)


def distil(configs: Configs, state: PartialState, arguments: list[str]) -> None:
    """The run, in an output folder that is its own."""
    training, degradation, backtracking = configs
    folder, timestep = Path(training.output_dir), training.conditioning_timestep
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    set_seed(training.seed)
    dtype = compute_dtype(accelerator_of(training))
    torch.backends.cuda.matmul.allow_tf32 = training.allow_tf32

    # The teacher, the prompts, the student's start, and what will be measured.
    prompts = load_prompts(training)
    reference = training.teacher
    teacher = load_family(reference, training.cache_dir).to(state.device)
    if state.is_main_process and (doubt := teacher.check_schedule()):
        print(doubt, file=sys.stderr)
    teacher.schedule.check_timestep(timestep, "conditioning_timestep")
    teacher_card: dict[str, Any] = {}
    if state.is_main_process:  # what the end of the run needs of the teacher's files is read before it begins
        check_teacher_files(teacher.model)
        teacher_card = teacher.model.card()
    start = training.generator_model_name_or_path and ModelReference(
        training.generator_model_name_or_path, single_file_config=training.single_file_config
    )
    start = start and start.resolve_denoiser(training.cache_dir)
    generator = teacher.initial_generator(start, training.resolution, training.all_adapters)
    inputs = check_inputs(configs, teacher, generator, prompts)
    path = open_path(configs, teacher, generator, state, inputs)
    data = condition_source(training, teacher, prompts, state, inputs)
    upload = RunUpload(training, teacher.model) if training.push_to_hub and state.is_main_process else None

    def measure(network: torch.nn.Module, name: str = "student") -> dict[str, float]:
        with teacher.on_device(state.device):
            return report.add_student(name, teacher.one_step(network, timestep))

    report = initial = None
    if state.is_main_process:
        wanted = validation_prompts(training, data.captions)
        shapes = is_shapes_teacher(reference.name_or_path)
        evaluation = shapes_evaluation() if shapes else picture_evaluation(training, wanted)
        evaluation.add(training.evaluators)
        size = teacher.resolution(training.resolution)
        report = Report(evaluation, wanted, teacher, backtracking.guidance_scale, dtype=dtype, size=size)
    if data.is_encoded:
        teacher.release_encoders()
    if report:
        report.add_teacher()
        with drawable(generator, state.device, dtype) as network:
            initial = measure(network, "initial")
    teacher.offload_to_cpu()
    state.wait_for_everyone()

    if state.is_main_process:
        write_settings(folder / SETTINGS, training)

    # Stage 1: the fake score walks from the teacher to the initial generator; nodes of its way are the path.
    if path is not None and not path.complete:
        recorded = upload and upload.submit_path
        path = DegradationRecorder(training, degradation, teacher, generator, data, path, recorded, inputs).record()

    # Stage 2: the generator is pulled back along the path, from node N-1 to the teacher.
    trainer = None
    if training.stage != "record":
        trainer = BacktrackingTrainer(training, backtracking, teacher, generator, data, path, measure, initial, inputs)
        student = trainer.train()
        if report:
            deployed = teacher.one_step(student, timestep)
            save_student(deployed, teacher.model, folder, trainer.student.lora)
            if trainer.student.lora is not None:  # was measured before it was fused, maybe on a base of few bits
                with drawable(student, state.device, dtype) as network:
                    measure(network)
            del deployed
        del student
        trainer.release()

    if report:
        script = "examples/text_to_image/train_disback.py"
        with teacher.on_device(state.device):
            print(write_results(report, teacher, path, trainer, configs, script, arguments, teacher_card))
    if upload:
        print(upload.finish())


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], Path(__file__).name))
