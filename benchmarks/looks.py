"""The settings that were looked at on the two-dimensional world, each once, with four seeds that no result uses.

python benchmarks/looks.py            # all, minutes; prints a line for each
python benchmarks/looks.py --walk     # the denoising loss along stage 1, by step
"""

import argparse
import os
import sys
from dataclasses import replace
from statistics import median

import torch
from convergence import cost
from toy_world import REGIMES, Arm, Run, teacher

from diffusers_disback.node_spacing import footprints


SEEDS = [100, 101, 102, 103]
THRESHOLDS = {"high_learning_rate": (0.844, 0.528), "low_sigma": (0.946, 0.591)}
OTHERS = (0.636, 0.398)
MISMATCH = Arm("mismatch")
HALF, NINE = (Arm(schedule="near", settings={"share": share}) for share in (0.5, 0.9))
STONES = [Arm(schedule="adaptive", settings={"share": share}) for share in (0.5, 0.6, 0.65, 0.7)]
LOOKS = [
    *(("recorded", {}, arm) for arm in (HALF, NINE, MISMATCH)),
    *(("over_degraded", {}, arm) for arm in (HALF, NINE, replace(NINE, path="mismatch"), MISMATCH)),
    ("over_degraded", {"degradation_steps": 200}, MISMATCH),
    ("over_degraded", {"degradation_steps": 200, "steps_per_target": 60}, MISMATCH),
    *((regime, {}, arm) for regime in REGIMES if regime != "under_recorded" for arm in STONES),
]


def look(regime: str, changes: dict, arm: Arm) -> None:
    task = replace(REGIMES[regime], updates=min(REGIMES[regime].updates, 1200), **changes)
    results = Run(task, arm, SEEDS, teacher(task.teacher_steps)).run()
    costs = [
        f"{median(cost(result, level, 'evaluations') for result in results):.0f}"
        for level in THRESHOLDS.get(regime, OTHERS)
    ]
    print(regime, changes, arm, *costs, results[0]["switches"], flush=True)


def walk(regime: str, seeds: list[int]) -> None:
    task = REGIMES[regime]
    kept = footprints(300, task.num_path_nodes)
    _, losses = Run(task, MISMATCH, seeds, teacher(task.teacher_steps)).walk(kept)
    for step, loss in zip([0, *kept], losses, strict=True):
        print(regime, step, *(f"{value:.4f}" for value in loss.tolist()))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--walk", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    if options.walk:
        for regime in ("recorded", "low_sigma"):
            walk(regime, [0, 1])
        return
    for regime, changes, arm in LOOKS:
        look(regime, changes, arm)


if __name__ == "__main__":
    main(sys.argv[1:])
