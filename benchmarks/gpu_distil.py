"""What `gpu_pixels.py` and `gpu_shapes.py` have in common: a teacher is made, and distilled with three seeds side by side."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffusers_disback import DisBackConfig, DisBackTrainer, Evaluation, ModelFamily
from processes import start_python


Figures = dict[str, Any]


def main(
    description: str,
    make_teacher: Callable[[argparse.Namespace], Figures],
    distil: Callable[[argparse.Namespace], Figures],
    teacher_steps: int,
) -> None:
    """Runs what the command line asks for, and writes its figures."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("teacher", "distil"))
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--figures", type=Path, required=True)
    parser.add_argument("--arm", choices=("none", "path"), default="none")
    parser.add_argument("--seed", type=int, help="of one run; by default three side by side")
    parser.add_argument("--steps", type=int, default=teacher_steps, help="of the teacher")
    parser.add_argument("--tiny", action="store_true")
    parsed = parser.parse_args()
    parsed.work_dir.mkdir(parents=True, exist_ok=True)
    if parsed.tiny:
        torch.set_num_threads(1)
    if parsed.what == "teacher":
        found = make_teacher(parsed)
    else:
        found = seeds_side_by_side(parsed) if parsed.seed is None else distil(parsed)
    parsed.figures.write_text(json.dumps(found, indent=1) + "\n")


def seeds_side_by_side(parsed: argparse.Namespace) -> Figures:
    """Distils the seeds whose figures are not there yet, each in a process of its own; the figures by seed."""
    files = {seed: parsed.work_dir / f"{parsed.arm}-{seed}.json" for seed in range(1 if parsed.tiny else 3)}
    running = [
        start_python([*sys.argv, "--seed", str(seed), "--figures", str(file)], forked=parsed.tiny)
        for seed, file in files.items()
        if not file.exists()
    ]
    for process in running:
        process.join()
    if failed := [process.exitcode for process in running if process.exitcode]:
        raise SystemExit(f"{len(failed)} of {len(running)} seeds failed, with exit statuses {failed}.")
    return {str(seed): json.loads(file.read_text()) for seed, file in files.items()}


def figures_of(config: DisBackConfig, evaluation: Callable[[], Evaluation]) -> Figures:
    """Distils by a config, whole or resumed: what both stages cost, and the student's measures over updates."""
    trainer = DisBackTrainer(args=config, evaluation=evaluation)
    result = trainer.train()
    if result is None:
        raise SystemExit(f"{config.output_dir} is finished, and its figures are gone.")
    stage_1 = {} if trainer.path is None else trainer.path.manifest["cost"]
    return {"stage_1": stage_1, "stage_2": result.cost, "curve": result.curve}


def measured_teacher(
    family: ModelFamily, evaluation: Evaluation, num_inference_steps: int, guidance_scale: float
) -> Figures:
    """The measures of a teacher's images."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sampler = family.to(device).sampler().to(device)
    how = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
    images, seconds = evaluation.sample(family, sampler, **how)
    return {**evaluation.measure(images), "seconds_per_image": seconds, **how}
