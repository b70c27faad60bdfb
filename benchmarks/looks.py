"""The settings that were looked at on the two-dimensional task, each once, with four seeds that no result uses.

python benchmarks/looks.py            # all, minutes; prints a line for each
python benchmarks/looks.py --walk     # the denoising loss along stage 1, by step
python benchmarks/looks.py --shapes   # one seed on the shapes teacher: learning rates, and a student with random weights
"""

import argparse
import sys
from dataclasses import replace
from statistics import median

import shapes_task
from convergence import cost
from experimental import dense_steps
from scripts import set_threads
from toy_task import REGIMES, SCHEDULES, Arm, Run, teacher

from diffusers_disback.path.target_schedule import AdaptiveSchedule


SEEDS = [100, 101, 102, 103]
THRESHOLDS = {"high_learning_rate": (0.844, 0.528), "low_sigma": (0.946, 0.591)}
OTHERS = (0.636, 0.398, 0.232)  # the last: 1.25 times where `none` settles in 4,500 updates


class CrestSchedule(AdaptiveSchedule):
    """What was tried third: as the adaptive schedule, but a node is left when its mismatch has been below its highest of
    the phase, however little, for `patience` measures."""

    def __init__(self, *common: int, patience: int):
        super().__init__(*common, fall=1.0)
        self.patience = patience

    def is_done(self, phase):
        gaps = [measure.mismatch for measure in phase]
        return super().is_done(phase) or len(gaps) - 1 - gaps.index(max(gaps)) >= self.patience


SCHEDULES["crest"] = CrestSchedule
FIXED, ADAPTIVE, MISMATCH = Arm(), Arm(schedule="adaptive"), Arm("mismatch")
HALF, NINE = (Arm(schedule="near", settings={"share": share}) for share in (0.5, 0.9))
STONES = [Arm(schedule="adaptive", settings={"share": share, "fall": 1.0}) for share in (0.5, 0.6, 0.65, 0.7)]
CRESTS = [Arm(schedule="crest", settings={"patience": patience}) for patience in (2, 3)]
FAST = {"degradation_rate": 5.0}
LOOKS = [
    *(("recorded", {}, arm) for arm in (HALF, NINE, MISMATCH)),
    *(("over_degraded", {}, arm) for arm in (HALF, NINE, replace(NINE, path="mismatch"), MISMATCH)),
    ("over_degraded", {"degradation_steps": 200}, MISMATCH),
    ("over_degraded", {"degradation_steps": 200, "steps_per_target": 60}, MISMATCH),
    *((regime, {}, arm) for regime in ("recorded", "over_degraded", *THRESHOLDS) for arm in STONES),
    ("over_degraded", {}, FIXED),
    ("over_degraded", {"steps_per_target": 150}, FIXED),
    ("over_degraded", {"degradation_steps": 600}, FIXED),
    ("over_degraded", {"degradation_steps": 600, "steps_per_target": 150}, FIXED),
    ("over_degraded", {"num_path_nodes": 8, "steps_per_target": 50}, FIXED),
    *((regime, {}, arm) for arm in CRESTS for regime in ("recorded", "over_degraded", *THRESHOLDS)),
    *((regime, {"steps_per_target": 200}, CRESTS[1]) for regime in ("over_degraded", "high_learning_rate")),
    ("over_degraded", {"degradation_steps": 1200}, replace(CRESTS[1], path="mismatch", stop=0.2)),
    ("over_degraded", {"degradation_steps": 1200, "num_path_nodes": 12}, replace(CRESTS[1], stop=0.2)),
    *(("recorded", FAST, arm) for arm in (Arm(direct=True), FIXED, CRESTS[1])),
    ("low_sigma", {**FAST, "degradation_steps": 60}, CRESTS[1]),
    ("recorded", FAST, ADAPTIVE),
    *((regime, {}, ADAPTIVE) for regime in ("over_degraded", "high_learning_rate")),
    ("recorded", {**FAST, "degradation_steps": 200, "num_path_nodes": 10}, replace(ADAPTIVE, stop=0.2)),
    ("recorded", {**FAST, "degradation_steps": 60}, ADAPTIVE),
    ("recorded", {**FAST, "steps_per_target": 150}, ADAPTIVE),
    ("recorded", {**FAST, "steps_per_target": 60}, ADAPTIVE),
    ("recorded", {"degradation_rate": 10.0, "degradation_steps": 50}, ADAPTIVE),
]


def look(regime: str, changes: dict, arm: Arm) -> None:
    task = replace(REGIMES[regime], **changes)
    results = Run(task, arm, SEEDS, teacher(task.teacher_steps)).run()
    costs = [
        f"{median(cost(result, level, 'evaluations') for result in results):.0f}"
        for level in THRESHOLDS.get(regime, OTHERS)
    ]
    print(regime, changes, arm, *costs, results[0]["switches"], flush=True)


def walk(regime: str, seeds: list[int]) -> None:
    task = REGIMES[regime]
    kept = dense_steps(300, task.num_path_nodes)
    _, losses = Run(task, MISMATCH, seeds, teacher(task.teacher_steps)).walk(kept)
    for step, loss in zip([0, *kept], losses, strict=True):
        print(regime, step, *(f"{value:.4f}" for value in loss.tolist()))


def shapes() -> None:
    """The learning rates of the arm without a path; then a student of the teacher's size with random weights."""
    none, default = shapes_task.ARMS["none"], shapes_task.ARMS["default"]
    for generator, fake_score, decay in (
        (3e-4, 5e-4, 0.95),
        (1e-4, 5e-4, 0.95),
        (1e-4, 3e-4, 0.95),
        (3e-4, 1e-3, 0.98),
    ):
        arm = replace(none, backtracking={"ema_decay": decay})
        task = shapes_task.Regime(generator_learning_rate=generator, fake_score_learning_rate=fake_score, updates=200)
        _print_curve((generator, fake_score, decay), shapes_task.one(task, arm, 100))
    task = shapes_task.Regime(student_widths=(64, 112), generator_learning_rate=3e-4, updates=250)
    fixed = replace(task, degradation_steps=80, num_path_nodes=4, steps_per_target=25)
    _print_curve("random: none", shapes_task.one(task, none, 100))
    _print_curve("random: path, 80 steps", shapes_task.one(fixed, shapes_task.ARMS["path"], 100))
    for lengths in ((160, 8, 30), (50, 10, 25)):
        changed = replace(task, default=lengths, mismatch_every=5)
        _print_curve(f"random: default {lengths}", shapes_task.one(changed, default, 100))


def _print_curve(what: object, result: dict) -> None:
    print(what, result["stage_1"]["updates"], result["switches"], result["curve"]["distance"], flush=True)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--walk", action="store_true")
    parser.add_argument("--shapes", action="store_true")
    options = parser.parse_args(arguments)
    set_threads()
    if options.walk:
        for regime in ("recorded", "low_sigma"):
            walk(regime, [0, 1])
        return
    if options.shapes:
        shapes()
        return
    for regime, changes, arm in LOOKS:
        look(regime, changes, arm)


if __name__ == "__main__":
    main(sys.argv[1:])
