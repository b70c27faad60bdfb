#!/usr/bin/env python
"""Distils a diffusers teacher of pixels into a one-step generator with DisBack (arXiv 2408.15991), with class labels or without.

    accelerate launch train_disback.py                       # the embedded digits teacher, minutes on a CPU
    accelerate launch train_disback.py --pretrained_model_name_or_path google/ddpm-cifar10-32

`README.md` beside this file explains the flags. `--debug`, which is no setting, shows the traceback of an error.
"""

import os
import sys
from pathlib import Path

import diffusers
from diffusers.utils import check_min_version

from diffusers_disback import DisBackConfig, DisBackTrainer
from diffusers_disback.commands.command_line import read_flags, run
from digits.evaluator import digits_evaluation, is_digits_teacher


check_min_version("0.40.0")

DIGITS = Path(__file__).parent / "digits"


def parse(arguments: list[str]) -> DisBackConfig:
    """Reads the settings. Without a teacher, it is the embedded one, with the settings of `digits/quickstart.args`."""
    given = read_flags(DisBackConfig, arguments, description=__doc__)
    if "pretrained_model_name_or_path" not in given:
        # Relative, so that what is published names no machine's folders.
        embedded = {"pretrained_model_name_or_path": os.path.relpath(DIGITS / "teacher")}
        quickstart = read_flags(DisBackConfig, (DIGITS / "quickstart.args").read_text().split())
        given = {**quickstart, **embedded, **given}
    return DisBackConfig(**given)


def main(arguments: list[str]) -> None:
    """Trains, saves and publishes. Errors are raised; `commands.command_line.run` makes lines and exit codes of them."""
    config = parse(arguments)
    diffusers.utils.logging.disable_progress_bar()
    evaluation = digits_evaluation if is_digits_teacher(config.pretrained_model_name_or_path) else None
    command = ["examples/unconditional_image_generation/train_disback.py", *arguments]
    trainer = DisBackTrainer(args=config, evaluation=evaluation, command=command)
    trainer.train()
    trainer.save_model()
    if config.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], Path(__file__).name))
