"""Both stages in two dimensions, of many seeds side by side, with the library's own schedules.

Every seed has a target of its own: where seeds leave a node at different times, their targets are gathered from the stacked
nodes of their paths. Costs are counted per seed: a forward pass of a network is one evaluation, a backward pass two.
"""

import argparse
import functools
import itertools
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import two_dimensions
from convergence import settled
from experimental import GeometricSchedule, dense_steps, evenly_spaced
from safetensors.torch import load_file, save_file
from scripts import set_threads
from torch import Tensor
from two_dimensions import Draws, Weights

from diffusers_disback import DegradationConfig
from diffusers_disback.path.node_spacing import candidate_steps, earliest_end, evenly_spaced_steps, is_flat
from diffusers_disback.path.target_schedule import TARGET_SCHEDULES, AdaptiveSchedule, Measure
from diffusers_disback.training.config import loss_scale


@dataclass(frozen=True)
class Regime:
    """A task and the settings that all arms share.

    Args:
        dataset (`str`): `grid` or `ring`.
        asked (`float`): The noise level at which the student is asked.
        generator_learning_rate, fake_score_learning_rate (`float`): Of Adam.
        degradation_steps (`int`): Of stage 1.
        degradation_rate (`float`): Its learning rate over the fake score's in stage 2.
        num_path_nodes, steps_per_target (`int`): N and K.
        updates (`int`): Of the generator: the budget.
        reference (`int`): How many times the budget the arm without a path is run for, to see where it settles.
        batch (`int`): Points of an update.
        ema_decay (`float`): Of the average of the student's weights that is measured.
        evaluate_every (`int`): Updates.
        teacher_steps (`int`): That the teacher was trained for.
        objective (`str`): dmd, diff_instruct or sid, by the library's equations.
        generator_loss_warmup_steps (`int`): Over which the generator's loss is scaled up.
    """

    dataset: str = "grid"
    asked: float = 20.0
    generator_learning_rate: float = 1e-4
    fake_score_learning_rate: float = 2e-4
    degradation_steps: int = 100
    degradation_rate: float = 1.0
    num_path_nodes: int = 4
    steps_per_target: int = 100
    updates: int = 1500
    reference: int = 1
    batch: int = 128
    ema_decay: float = 0.98
    evaluate_every: int = 25
    teacher_steps: int = 12_000
    objective: str = "dmd"
    generator_loss_warmup_steps: int = 0


REGIMES = {
    "recorded": Regime(),
    "over_degraded": Regime(degradation_steps=300),
    "under_recorded": Regime(degradation_steps=60),
    "high_learning_rate": Regime(generator_learning_rate=5e-4, fake_score_learning_rate=1e-3, updates=600),
    "low_sigma": Regime(asked=2.5, updates=600),
    "ring": Regime(dataset="ring", degradation_rate=5.0, reference=3),  # held out: docs/evidence.md
    # Rates by `python benchmarks/toy_task.py --tune`: docs/evidence.md, "Objectives, with and without a path".
    "objective_dmd": Regime(fake_score_learning_rate=1e-3),
    "objective_sid": Regime(objective="sid", generator_learning_rate=3e-4, fake_score_learning_rate=1e-3),
    "objective_diff_instruct": Regime(objective="diff_instruct", fake_score_learning_rate=1e-3),
    # The same, tuned again over more rates of the fake score, since the best had been the highest.
    "tuned_dmd": Regime(generator_learning_rate=3e-4, fake_score_learning_rate=1e-2),
    "tuned_sid": Regime(objective="sid", generator_learning_rate=3e-4, fake_score_learning_rate=1e-2),
    "tuned_diff_instruct": Regime(
        objective="diff_instruct", generator_learning_rate=3e-4, fake_score_learning_rate=3e-3
    ),
}
RATES = list(
    itertools.product((1e-4, 3e-4, 1e-3), (3e-4, 1e-3, 3e-3, 1e-2))
)  # of generator and fake score, that are tuned over
SMALL = Regime(
    degradation_steps=8,
    num_path_nodes=3,
    steps_per_target=12,
    updates=40,
    batch=16,
    evaluate_every=4,
    teacher_steps=20,
)


@dataclass(frozen=True)
class Arm:
    """What is compared.

    Args:
        path (`str`): none; steps or mismatch (how nodes are spaced); shuffled (spaced by steps, in a random order of
            targets).
        schedule (`str`): fixed, geometric, near or adaptive.
        stop (`float`): Stage 1 ends when its loss has flattened by this share; 0 is never.
        settings (`dict`): Of the schedule.
        direct (`bool`): The path is not used but for its end: the teacher is the only target.
        glides (`bool`): Within a phase the target's weights glide from its node's to the next one's.
        task (`dict`): Settings of the regime that this arm has otherwise.
    """

    path: str = "steps"
    schedule: str = "fixed"
    stop: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)
    direct: bool = False
    glides: bool = False
    task: dict[str, Any] = field(default_factory=dict)


DEFAULT = {"degradation_steps": 200, "num_path_nodes": 10, "degradation_rate": 5.0}
ARMS = {
    "none": Arm("none"),
    "ramp": Arm("none", task={"generator_loss_warmup_steps": 400}),
    "warm": Arm(direct=True),
    "path": Arm(),
    "shuffled": Arm("shuffled"),
    "geometric": Arm(schedule="geometric", settings={"ratio": 1.5}),
    "near": Arm(schedule="near", settings={"share": 0.5}),
    "stone": Arm(schedule="adaptive", settings={"fall": 1.0}),
    "adaptive": Arm(schedule="adaptive"),
    "mismatch": Arm("mismatch"),
    "interpolated": Arm(glides=True),
    "default": Arm(schedule="adaptive", stop=DegradationConfig.degradation_stop, task=DEFAULT),
    "warm_default": Arm(stop=DegradationConfig.degradation_stop, direct=True, task=DEFAULT),
}


def shuffled(values: list[int], seed: int) -> list[int]:
    """Another order of different values, or their own if there is no other."""
    generator, order = torch.Generator().manual_seed(seed), values
    while order == values and len(values) > 1:
        order = [values[i] for i in torch.randperm(len(values), generator=generator).tolist()]
    return order


class NearSchedule(AdaptiveSchedule):
    """What was tried first: leaves a node when its mismatch is below `share` of the next one's, or has stopped falling (the
    last two measures of a phase are no better than all before them, by 2 %)."""

    def is_done(self, phase: Sequence[Measure]) -> bool:
        if phase[-1].mismatch < self.share * phase[-1].next_mismatch:
            return True
        before, recent = phase[:-2], phase[-2:]
        return bool(before) and min(m.mismatch for m in recent) > 0.98 * min(m.mismatch for m in before)


SCHEDULES = {**TARGET_SCHEDULES, "geometric": GeometricSchedule, "near": NearSchedule}
MISMATCH_EVERY, BANDS, PROBED = 10, 4, 64


def trainable(weights: Weights, seeds: int) -> Weights:
    """A copy for each seed."""
    return [tensor.expand(seeds, -1, -1).clone().requires_grad_() for tensor in weights]


def frozen(weights: Weights) -> Weights:
    return [tensor.detach().clone() for tensor in weights]


def generator_loss(
    objective: str, x0: Tensor, sigma: Tensor, noise: Tensor, target: Weights, fake_score: Weights
) -> Tensor:
    """The sum over seeds of an objective's loss; `dmd` and `diff_instruct` by a product with their gradient."""
    x = x0 + sigma * noise
    with torch.set_grad_enabled(objective == "sid"):
        x0_target, x0_fake = two_dimensions.denoise(target, x, sigma), two_dimensions.denoise(fake_score, x, sigma)
    # DMD, Eq. 8: per sample, over the target's mean absolute error
    weight = 1 / (x0 - x0_target).detach().abs().mean(2, keepdim=True).clamp_min(1e-6)
    if objective == "sid":  # with alpha = 1
        return (weight * (x0_target - x0_fake) * (x0_fake - x0)).mean((1, 2)).sum()
    direction = (x0_fake - x0_target) * (weight if objective == "dmd" else 1.0)
    return (direction * x0).mean((1, 2)).sum()


class Probe:
    """Of each seed, points that are always noised in the same way, in bands of the logarithm of the noise level."""

    def __init__(self, draws: Draws, asked: float):
        self.asked = asked
        self.input = draws.normal(PROBED, 2)
        ends = torch.logspace(
            *torch.tensor([two_dimensions.SIGMA_MIN, two_dimensions.SIGMA_MAX]).log10().tolist(), BANDS + 1
        )
        bands = zip(ends, ends[1:], strict=False)
        self.sigma = torch.cat([draws.sigma(PROBED, low, high) for low, high in bands], 1)
        self.noise = draws.normal(BANDS * PROBED, 2)
        self.evaluations = BANDS * PROBED

    @torch.no_grad()
    def points(self, generator: Weights) -> Tensor:
        """The generator's samples, `[S, bands * n, 2]`."""
        return two_dimensions.generate(generator, self.input, self.asked).repeat(1, BANDS, 1)

    @torch.no_grad()
    def denoised(self, weights: Weights, x0: Tensor) -> Tensor:
        return two_dimensions.denoise(weights, x0 + self.sigma * self.noise, self.sigma)

    @torch.no_grad()
    def loss(self, weights: Weights, x0: Tensor) -> Tensor:
        return two_dimensions.denoising_loss(weights, x0, self.sigma, self.noise)


class Run:
    """All seeds of one arm in one regime.

    Args:
        regime (`Regime`): The task.
        arm (`Arm`): What is tried.
        seeds (`list[int]`): Side by side.
        teacher (`Weights`): `[1, in, out]`.
    """

    def __init__(self, regime: Regime, arm: Arm, seeds: list[int], teacher: Weights):
        self.regime, self.arm, self.seeds, self.teacher = regime, arm, seeds, teacher
        self.started = time.monotonic()
        self.evaluations = torch.zeros(len(seeds))
        self.probe = Probe(Draws(seeds, 3), regime.asked)
        self.start = [tensor.expand(len(seeds), -1, -1) for tensor in teacher]

    # Stage 1 -----------------------------------------------------------------------------------------------------

    def record(self) -> tuple[list[Weights], list[int], list[int]]:
        """Nodes 0..N of every seed, N and the updates that were spent; of fewer nodes than others the last is repeated."""
        regime, arm, seeds = self.regime, self.arm, len(self.seeds)
        if arm.path == "none":
            return [self.start], [0] * seeds, [0] * seeds
        nodes, steps = regime.num_path_nodes, regime.degradation_steps
        wanted = dense_steps(steps, nodes) if arm.path == "mismatch" else evenly_spaced_steps(steps, nodes)
        kept = sorted({*wanted, *candidate_steps(steps)}) if arm.stop else wanted
        footprint, losses = self.walk(kept)
        chosen, spent, counts = [], [], []
        for seed in range(seeds):
            own = [loss[seed].item() for loss in losses]
            last = len(kept)
            if arm.stop:
                first = earliest_end(steps)
                ends = (k for k in range(1, last) if is_flat([0, *kept[:k]], own[: k + 1], arm.stop, first))
                last = next(ends, last)
            spent.append(kept[last - 1])
            places = [k for k, step in enumerate(kept[:last], 1) if step in wanted or k == last]
            if arm.path == "mismatch":
                places = [[0, *places][i] for i in evenly_spaced([own[0], *(own[k] for k in places)], nodes)]
            counts.append(len(places))
            chosen.append([0, *places])
        if arm.path == "shuffled":
            for seed, places in zip(self.seeds, chosen, strict=True):
                places[1:-1] = shuffled(places[1:-1], seed)
        path = [
            [
                torch.stack(
                    [footprint[places[min(i, len(places) - 1)]][layer][seed] for seed, places in enumerate(chosen)]
                )
                for layer in range(len(self.start))
            ]
            for i in range(max(counts) + 1)
        ]
        self.evaluations += 4 * torch.tensor(spent)  # generator forward, fake score forward and backward
        if arm.path == "mismatch" or arm.stop:
            measured = torch.tensor([sum(step <= end for step in kept) + 1 for end in spent])
            self.evaluations += measured * self.probe.evaluations / regime.batch
        return path, counts, spent

    def walk(self, kept: list[int]) -> tuple[list[Weights], list[Tensor]]:
        """The fake score's weights and loss after 0 updates and after those to be kept."""
        draws, weights = Draws(self.seeds, 1), trainable(self.teacher, len(self.seeds))
        rate = self.regime.fake_score_learning_rate * self.regime.degradation_rate
        optimizer = torch.optim.Adam(weights, rate)
        x0 = self.probe.points(self.start)
        footprint, losses = [self.start], [self.probe.loss(self.start, x0)]
        for step in range(1, kept[-1] + 1):
            with torch.no_grad():
                points = two_dimensions.generate(self.start, draws.normal(self.regime.batch, 2), self.regime.asked)
            self.fit(weights, optimizer, points, draws)
            if step in kept:
                footprint.append(frozen(weights))
                losses.append(self.probe.loss(weights, x0))
        return footprint, losses

    def fit(self, weights: Weights, optimizer: torch.optim.Optimizer, points: Tensor, draws: Draws) -> None:
        """An update of the fake score."""
        batch = self.regime.batch
        loss = two_dimensions.denoising_loss(weights, points, draws.sigma(batch), draws.normal(batch, 2)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    # Stage 2 -----------------------------------------------------------------------------------------------------

    def run(self) -> list[dict[str, Any]]:
        """Both stages. Returns the record of each seed."""
        regime, arm, seeds = self.regime, self.arm, len(self.seeds)
        path, counts, spent = self.record()
        stage_1 = self.evaluations.tolist(), (time.monotonic() - self.started) / seeds
        schedules = [
            SCHEDULES[arm.schedule](
                min(count, 1) if arm.direct else count, regime.steps_per_target, regime.updates, **arm.settings
            )
            for count in counts
        ]
        measures: list[list[Measure]] = [[] for _ in self.seeds]
        stacked = [torch.stack([node[layer] for node in path]) for layer in range(len(path[0]))]
        generator, fake_score = (
            trainable(self.teacher, seeds),
            [tensor.clone().requires_grad_() for tensor in self.at(stacked, counts)],
        )
        g_optimizer = torch.optim.Adam(generator, regime.generator_learning_rate)
        f_optimizer = torch.optim.Adam(fake_score, regime.fake_score_learning_rate)
        draws, nodes, target = Draws(self.seeds, 2), None, []
        average = frozen(generator)
        truth = Draws([77], 4).data(2000, regime.dataset)
        shown = Draws([78], 4).normal(2000, 2)
        curve: list[dict[str, list[float]]] = [self.measure(average, shown, truth)]
        for step in range(regime.updates):
            now = [schedule.node(step, own) for schedule, own in zip(schedules, measures, strict=True)]
            if now != nodes or arm.glides:
                nodes = now
                target = self.between(stacked, nodes, step) if arm.glides else self.at(stacked, nodes)
            x0 = two_dimensions.generate(generator, draws.normal(regime.batch, 2), regime.asked)
            sigma, noise = draws.sigma(regime.batch), draws.normal(regime.batch, 2)
            loss = generator_loss(regime.objective, x0, sigma, noise, target, frozen(fake_score))
            g_optimizer.zero_grad()
            (loss_scale(step, regime) * loss).backward()
            g_optimizer.step()
            for kept, tensor in zip(average, generator, strict=True):
                kept.lerp_(tensor.detach(), 1 - regime.ema_decay)
            self.fit(fake_score, f_optimizer, x0.detach(), draws)
            # Generator 3, target 1, fake score 1, and 3 to fit it; a backward pass through both scores is 4.
            self.evaluations += 12 if regime.objective == "sid" else 8
            done = step + 1
            if SCHEDULES[arm.schedule].needs_measures and done % MISMATCH_EVERY == 0 and any(nodes):
                self.note(done, nodes, measures, generator, fake_score, target, stacked)
            if done % regime.evaluate_every == 0:
                self.look(done, generator, fake_score, target)
                curve.append(self.measure(average, shown, truth))
        return [
            self.result(i, spent, stage_1, schedules[i].switches(measures[i]), measures[i], curve)
            for i in range(seeds)
        ]

    def look(self, done: int, generator: Weights, fake_score: Weights, target: Weights) -> None:
        """For those who want to see more of a run than its distance: asked at every evaluation."""

    def at(self, stacked: list[Tensor], nodes: list[int]) -> Weights:
        """The weights of each seed's own node."""
        return [layer[torch.tensor(nodes), torch.arange(len(nodes))] for layer in stacked]

    def between(self, stacked: list[Tensor], nodes: list[int], step: int) -> Weights:
        """Weights that glide from each node to the next one, all through a phase of the fixed schedule."""
        gone = step % self.regime.steps_per_target / self.regime.steps_per_target
        here, there = self.at(stacked, nodes), self.at(stacked, [max(node - 1, 0) for node in nodes])
        return [torch.lerp(one, other, gone) for one, other in zip(here, there, strict=True)]

    def note(self, done, nodes, measures, generator, fake_score, target, stacked) -> None:
        """The adaptive schedule's measure of the seeds that are not at the teacher yet."""
        x0 = self.probe.points(generator)
        fake, here = self.probe.denoised(fake_score, x0), self.probe.denoised(target, x0)
        there = self.probe.denoised(self.at(stacked, [max(node - 1, 0) for node in nodes]), x0)
        gap, next_gap = (two_dimensions.gap(fake, other, self.probe.sigma).tolist() for other in (here, there))
        for seed, node in enumerate(nodes):
            if node > 0:
                measures[seed].append(Measure(done, node, gap[seed], next_gap[seed]))
                self.evaluations[seed] += (3 * self.probe.evaluations + PROBED) / self.regime.batch

    @torch.no_grad()
    def measure(self, generator: Weights, shown: Tensor, truth: Tensor) -> dict[str, list[float]]:
        points = two_dimensions.generate(generator, shown.expand(len(self.seeds), -1, -1), self.regime.asked)
        return {
            "evaluations": self.evaluations.tolist(),
            "seconds": [(time.monotonic() - self.started) / len(self.seeds)] * len(self.seeds),
            "distance": two_dimensions.sliced_wasserstein(points, truth).tolist(),
            "modes": two_dimensions.modes_found(points, self.regime.dataset).tolist(),
        }

    def result(self, i, spent, stage_1, switches, measures, curve) -> dict[str, Any]:
        columns = {key: [float(f"{row[key][i]:.5g}") for row in curve] for key in curve[0]}
        updates = [k * self.regime.evaluate_every for k in range(len(curve))]
        return {
            "stage_1": {"updates": spent[i], "evaluations": stage_1[0][i], "seconds": round(stage_1[1], 3)},
            "switches": switches,
            "curve": {"updates": updates, **columns},
        }


# What the benchmark asks of a task ------------------------------------------------------------------------------------

SIDE_BY_SIDE = True
SEEDS = list(range(10))
MEASURES = ["modes"]


def run(regime: str, arm: str, seeds: list[int], small: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The settings, and the record of each seed."""
    task = SMALL if small else replace(REGIMES[regime], **ARMS[arm].task)
    if arm == "none":
        task = replace(task, updates=task.updates * task.reference)
    results = Run(task, ARMS[arm], seeds, teacher(task.teacher_steps, task.dataset)).run()
    # The key that results have had from the first.
    settings = {"world" if name == "dataset" else name: value for name, value in asdict(task).items()}
    return {"settings": settings | {"arm": asdict(ARMS[arm])}}, results


@functools.cache
def teacher(steps: int, dataset: str = "grid") -> Weights:
    """The teacher of all runs on a data set; it is trained once, and kept."""
    name = f"toy-teacher-{steps}.safetensors" if dataset == "grid" else f"toy-teacher-{dataset}-{steps}.safetensors"
    file = Path(__file__).parent / "results" / name
    if not file.exists():
        weights = two_dimensions.train_teacher(dataset, steps=steps)
        if steps != Regime.teacher_steps:
            return weights
        draft = file.with_suffix(f".{os.getpid()}.draft")
        save_file({f"{i:02d}": tensor.contiguous() for i, tensor in enumerate(weights)}, draft)
        os.replace(draft, file)
    return [tensor for _, tensor in sorted(load_file(file).items())]


def tune(seeds: list[int]) -> str:
    """A Markdown table: where the arm without a path settles, for each objective and each of `RATES`, on seeds of its own."""
    lines = ["| objective | generator's rate | fake score's | distance that runs settle at |", "| --- " * 4 + "|"]
    for name, (rate, fake_rate) in itertools.product(("dmd", "diff_instruct", "sid"), RATES):
        task = Regime(objective=name, generator_learning_rate=rate, fake_score_learning_rate=fake_rate)
        results = Run(task, ARMS["none"], seeds, teacher(task.teacher_steps, task.dataset)).run()
        lines.append(f"| {name} | {rate:g} | {fake_rate:g} | {settled(results):.3f} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=tune.__doc__)
    parser.add_argument("--tune", action="store_true", required=True)
    parser.parse_args()
    set_threads()
    print(tune([100, 101, 102]))
