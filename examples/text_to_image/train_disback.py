#!/usr/bin/env python
# /// script
# requires-python = ">=3.11"
# dependencies = ["diffusers-disback[train,eval]"]
#
# [tool.uv.sources]
# diffusers-disback = { path = "../..", editable = true }
# ///
"""Distils a diffusers text-to-image teacher into a one-step generator with DisBack (arXiv 2408.15991).

    uv run train_disback.py                                  # installs nothing beforehand: docs/zero_setup.md
    accelerate launch train_disback.py                       # the embedded shapes teacher, minutes on a CPU
    accelerate launch train_disback.py --pretrained_model_name_or_path <teacher> --prompts_file prompts.txt

`README.md` beside this file explains the flags. `--debug`, which is no setting, shows the traceback of an error.
"""

import sys
from pathlib import Path

import diffusers
import transformers
from diffusers.utils import check_min_version

from diffusers_disback import DisBackConfig, DisBackTrainer
from diffusers_disback.commands.command_line import read_flags_or_embedded, run
from diffusers_disback.session import SCRIPT
from shapes.evaluator import is_shapes_teacher, shapes_evaluation


check_min_version("0.40.0")

SHAPES = Path(__file__).parent / "shapes"


def parse(arguments: list[str]) -> DisBackConfig:
    """Reads the settings. Without a teacher, it is the embedded one, with the settings of `shapes/quickstart.args`."""
    return DisBackConfig(**read_flags_or_embedded(DisBackConfig, arguments, SHAPES, description=__doc__))


def main(arguments: list[str]) -> None:
    """Trains, saves and publishes. Errors are raised; `commands.command_line.run` makes lines and exit codes of them."""
    config = parse(arguments)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    evaluation = shapes_evaluation if is_shapes_teacher(config.pretrained_model_name_or_path) else None
    command = [SCRIPT, *arguments]
    trainer = DisBackTrainer(args=config, evaluation=evaluation, command=command)
    trainer.train()
    trainer.save_model()
    if config.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:], Path(__file__).name))
