"""Both stages on pictures of digits, of many seeds side by side, with the library's objective, noise levels, generator and policies.

    python benchmarks/pictures_task.py digits --tune        # resumable; the table of what was tuned
    python benchmarks/convergence.py --task digits          # or mnist: the judged runs

Costs are counted per seed: a forward pass of a network is one evaluation, a backward pass two.
"""

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import judged
import pictures
import torch
from convergence import cost, locked, settled
from pictures import SeedsBatch, SideBySide, Weights
from scripts import set_threads
from torch import Tensor
from toy_task import shuffled
from two_dimensions import Draws

from diffusers_disback import DegradationConfig
from diffusers_disback.models.generator import OneStepGenerator
from diffusers_disback.models.score_model import ScoreModel
from diffusers_disback.objectives import make_objective
from diffusers_disback.path.node_spacing import (
    AUTO_NODES,
    candidate_steps,
    earliest_end,
    evenly_spaced_steps,
    is_far,
    is_flat,
)
from diffusers_disback.path.target_schedule import TARGET_SCHEDULES, Measure
from diffusers_disback.training.config import loss_scale
from diffusers_disback.training.probe import BANDS


Settings = dict[str, Any]


@dataclass(frozen=True)
class Regime:
    """A task and the settings that all arms share, and those that arms have of their own.

    Args:
        start (`str`): The student's weights: `copy` of the teacher's, `random`, or random ones of `half` the width.
        generator_learning_rate, fake_score_learning_rate (`float`): Of Adam, whose first beta is 0.
        fake_score_updates (`int`): For each of the generator.
        degradation_steps, num_path_nodes, steps_per_target (`int`): Of stage 1, N and K.
        default_steps (`int`): Of stage 1 of the default settings, at most.
        degradation_lr_multiplier (`float`): Stage 1's learning rate over the fake score's in stage 2.
        generator_loss_warmup_steps (`int`): Over which the generator's loss is scaled up.
        updates (`int`): Of the generator: the budget.
        evaluate_every (`int`): Updates.
        batch (`int`): Pictures of an update.
        ema_decay (`float`): Of the average of the student's weights that is measured.
        asked (`float`): The noise level at which the student is asked.
        objective (`str`): Of the library's.
        own (`dict`): Arm -> its own settings, in place of these.
        shares (`str`): The regime whose results stand for arms that have none here.
    """

    start: str = "copy"
    generator_learning_rate: float = 3e-4
    fake_score_learning_rate: float = 6e-4
    fake_score_updates: int = 1
    degradation_steps: int = 100
    default_steps: int = 200
    degradation_lr_multiplier: float = 1.0
    num_path_nodes: int = 5
    steps_per_target: int = 30
    generator_loss_warmup_steps: int = 0
    updates: int = 1000
    evaluate_every: int = 20
    batch: int = 32
    ema_decay: float = 0.99
    asked: float = 2.5
    objective: str = "diff_instruct"
    own: dict[str, dict[str, Any]] = field(default_factory=dict)
    shares: str = ""

    @property
    def evaluations_per_update(self) -> int:
        """Generator 3, target 1, fake score 1, and 3 to fit it; each further time 1 to draw and 3 to fit."""
        return 8 + 4 * (self.fake_score_updates - 1)

    def of_arm(self, name: str) -> "Regime":
        """The settings of an arm; its budget is the regime's in evaluations, not in updates."""
        mine = replace(self, **self.own.get(name, {}), own={})
        updates = round(self.updates * self.evaluations_per_update / mine.evaluations_per_update)
        mine = replace(mine, updates=updates, evaluate_every=round(self.evaluate_every * updates / self.updates))
        if ARMS[name].is_default:
            return replace(mine, num_path_nodes=AUTO_NODES, degradation_steps=mine.default_steps)
        if not ARMS[name].ramps:
            return mine
        return replace(mine, generator_loss_warmup_steps=mine.num_path_nodes * mine.steps_per_target)


@dataclass(frozen=True)
class Arm:
    """What is compared.

    Args:
        path (`str`): `none`; `steps`; `shuffled`, in a random order of targets.
        direct (`bool`): The path is not used but for its end: the teacher is the only target.
        schedule (`str`): Of the library's policies.
        stop (`float`): Stage 1 ends when its loss has flattened by this share; 0 is never.
        ramps (`bool`): The generator's loss is scaled up from 0.03 to 1 over N * K updates.
        resets (`bool`): The generator's Adam forgets its state at each switch of the target.
        is_default (`bool`): The library's defaults: a path of at most 10 nodes where the start is far; where it is near, stage 1 ends with
            the look that finds it.
        drops (`bool`): And what was fitted until then is dropped: the fake score starts as the teacher.
    """

    path: str = "steps"
    direct: bool = False
    schedule: str = "fixed"
    stop: float = 0.0
    ramps: bool = False
    resets: bool = False
    is_default: bool = False
    drops: bool = False


ARMS = {
    "none": Arm("none"),
    "ramp": Arm("none", ramps=True),
    "warm": Arm(direct=True),
    "path": Arm(),
    "reset": Arm(resets=True),
    "shuffled": Arm("shuffled"),
    "default": Arm(schedule="adaptive", stop=DegradationConfig.degradation_stop, is_default=True, drops=True),
    "warm_default": Arm(schedule="adaptive", stop=DegradationConfig.degradation_stop, is_default=True),
}
SMALL = {
    "degradation_steps": 8,
    "default_steps": 10,
    "num_path_nodes": 3,
    "steps_per_target": 6,
    "updates": 24,
    "batch": 16,
    "evaluate_every": 8,
}


def rates(generator: float, ratio: float, fake_score_updates: int) -> Settings:
    """Learning rates of both networks, the fake score's as a multiple of the generator's, and how often it is updated."""
    return {
        "generator_learning_rate": generator,
        "fake_score_learning_rate": float(f"{generator * ratio:.3g}"),
        "fake_score_updates": fake_score_updates,
    }


def walk(degradation_steps: int, steps_per_target: int) -> Settings:
    """The lengths of stage 1 and of a phase of stage 2."""
    return {"degradation_steps": degradation_steps, "steps_per_target": steps_per_target}


# By `python benchmarks/pictures_task.py digits --tune` and the same of mnist; docs/evidence.md says how.
TUNED: dict[str, dict[str, Settings]] = {
    "digits": {
        "copy": rates(1e-3, 4, 2) | walk(50, 10),
        "random": rates(1e-3, 2, 1) | walk(50, 10),
        "half": rates(1e-3, 2, 1) | walk(100, 30),
    },
    "mnist": {
        "copy": rates(3e-4, 1, 2) | walk(50, 10),
        "random": rates(1e-3, 2, 3) | walk(100, 10),
        "half": rates(1e-3, 2, 2) | walk(50, 10),
    },
}
# As papers have them: low, one update of the fake score, at twice the generator's rate.
LOW = {"copy": rates(3e-5, 2, 1), "random": rates(1e-4, 2, 1), "half": rates(1e-4, 2, 1)}


def ramp(updates: int) -> Settings:
    """How long the generator's loss is scaled up."""
    return {"num_path_nodes": 1, "steps_per_target": updates}


# What was best for an arm in the tuning, where that is another setting than the common one.
OWN: dict[str, dict[str, dict[str, Settings]]] = {
    "digits": {
        "copy": {"ramp": ramp(60)},
        "random": {"ramp": ramp(20), "warm": {"degradation_steps": 200}},
        "half": {
            "ramp": ramp(20),
            "warm": {"degradation_steps": 200},
            "path": rates(1e-3, 4, 1) | walk(50, 10),
            "default": rates(1e-3, 4, 1) | walk(50, 10),
        },
    },
    "mnist": {
        "copy": {
            "ramp": rates(3e-4, 2, 1) | ramp(60),
            "warm": rates(3e-4, 4, 1) | {"degradation_steps": 100},
            "path": rates(3e-4, 2, 1) | walk(200, 10),
            "default": rates(3e-4, 2, 1) | walk(200, 10),
            "warm_default": rates(3e-4, 2, 1) | walk(200, 10),
        },
        "random": {"ramp": ramp(20)},
        "half": {
            "ramp": rates(1e-3, 2, 3) | ramp(20),
            "warm": rates(1e-3, 2, 3) | {"degradation_steps": 100},
            "path": rates(1e-3, 2, 3) | walk(50, 10),
            "default": rates(1e-3, 2, 3) | walk(50, 10),
        },
    },
}
BUDGETS = {"copy": (1200, 6000), "random": (3200, 6000), "half": (3200, 6000)}


def regimes(name: str) -> dict[str, Regime]:
    """Of a world: of each start at the rates that are tuned for no path, at low ones, and each arm at its own best."""
    found = {}
    for start, tuned in TUNED[name].items():
        budget, low_budget = BUDGETS[start]
        common: Settings = {"start": start, "updates": budget, "evaluate_every": budget // 80}
        found[f"{start}_tuned"] = Regime(**common, **tuned)
        longer = {"updates": low_budget, "evaluate_every": low_budget // 80, "default_steps": 800}
        found[f"{start}_low"] = Regime(**common | longer, **LOW[start], **walk(200, 60))
        if start in OWN[name]:
            found[f"{start}_own"] = Regime(**common, **tuned, own=OWN[name][start], shares=f"{start}_tuned")
    return found


REGIMES = {name: regimes(name) for name in TUNED}
PROBED, SHOWN = 32, 1000
MISMATCH_EVERY = 0.1  # of the updates with a target, as the library's default
BETAS = (0.0, 0.999)


def take(path: Weights, nodes: list[int]) -> Weights:
    """Of stacked nodes, `[N + 1, S, ...]`, each seed's own."""
    return {name: tensor[nodes, range(len(nodes))] for name, tensor in path.items()}


class Run:
    """All seeds of one arm in one regime.

    Args:
        world (`pictures.World`): The teacher, and the judge.
        regime (`Regime`): The arm's settings.
        arm (`Arm`): What is tried.
        seeds (`list[int]`): Side by side.
    """

    def __init__(self, world: pictures.World, regime: Regime, arm: Arm, seeds: list[int]):
        self.world, self.regime, self.arm, self.seeds = world, regime, arm, seeds
        self.started = time.monotonic()
        self.evaluations = torch.zeros(len(seeds))
        self.objective = make_objective(regime.objective, {})
        self.timestep = pictures.timestep_of(regime.asked)
        self.shape = (regime.batch, 1, world.size, world.size)
        self.teacher = {name: tensor.expand(len(seeds), -1, -1).contiguous() for name, tensor in world.teacher.items()}
        self.start = self.initial_weights()
        self.probe = Draws(seeds, 3)
        self.probe_noise = [self.probe.normal(PROBED, *self.shape[1:]).flatten(0, 1) for _ in range(2)]
        band = pictures.schedule().num_timesteps // BANDS
        places = torch.arange(PROBED) % BANDS * band
        self.probe_t = (places + (self.probe.uniform(PROBED) * band).long()).flatten()

    def initial_weights(self) -> Weights:
        """The student's."""
        if self.regime.start == "copy":
            return self.teacher
        width = pictures.WIDTH // (2 if self.regime.start == "half" else 1)
        return pictures.new_weights(Draws(self.seeds, 4), self.world.size**2, width)

    def generator_of(self, network: SideBySide) -> OneStepGenerator:
        return OneStepGenerator(score_model(network), self.timestep)

    def loss_of(self, mean: Tensor) -> Tensor:
        """The sum over seeds of their losses, from the mean over all samples: each seed's gradient is what it is alone."""
        return mean * len(self.seeds)

    # Stage 1 -----------------------------------------------------------------------------------------------------

    def record(self) -> tuple[Weights, list[int], list[int]]:
        """Nodes 0..N of every seed, `[N + 1, S, ...]`, N and the updates that were spent; of fewer nodes than others the last is
        repeated."""
        regime, arm, seeds = self.regime, self.arm, len(self.seeds)
        if arm.path == "none":
            return {name: tensor[None] for name, tensor in self.teacher.items()}, [0] * seeds, [0] * seeds
        steps = regime.degradation_steps
        wanted = evenly_spaced_steps(steps, regime.num_path_nodes)
        kept = sorted({*wanted, *candidate_steps(steps)}) if arm.stop else wanted
        footprint, losses = self.walk(kept)
        chosen, spent, counts = [], [], []
        for seed in range(seeds):
            own, last, near = [loss[seed] for loss in losses], len(kept), False
            if arm.stop:
                ends = range(1, last)
                first = earliest_end(steps)
                flat = (k for k in ends if is_flat([0, *kept[:k]], own[: k + 1], arm.stop, first))
                last = next(flat, last)
                judged = next(k for k, step in enumerate(kept, 1) if step >= first)
                near = arm.is_default and not is_far(own[0], own[judged])
                last = judged if near else last
            places = [k for k, step in enumerate(kept[:last], 1) if step in wanted or k == last]
            if arm.drops and near:
                places = []
            if arm.path == "shuffled":
                places[:-1] = shuffled(places[:-1], self.seeds[seed])
            spent.append(kept[last - 1])
            counts.append(len(places))
            chosen.append([0, *places])
        longest = max(counts) + 1
        path = {
            name: torch.stack(
                [
                    torch.stack(
                        [footprint[places[min(i, len(places) - 1)]][name][s] for s, places in enumerate(chosen)]
                    )
                    for i in range(longest)
                ]
            )
            for name in self.teacher
        }
        self.evaluations += 4 * torch.tensor(spent)  # generator forward, fake score forward and backward
        if arm.stop:
            measured = torch.tensor([sum(step <= end for step in kept) + 1 for end in spent])
            self.evaluations += measured * PROBED / regime.batch
        return path, counts, spent

    def walk(self, kept: list[int]) -> tuple[list[Weights], list[list[float]]]:
        """The fake score's weights, and each seed's loss, after 0 updates and after those to be kept."""
        draws, regime = Draws(self.seeds, 1), self.regime
        generator = self.generator_of(SideBySide(self.start))
        network = SideBySide(self.teacher, trains=True)
        rate = regime.fake_score_learning_rate * regime.degradation_lr_multiplier
        optimizer = torch.optim.Adam(network.parameters(), rate, BETAS)
        probed = self.probed(generator)
        footprint, losses = [self.teacher], [self.probe_loss(network, probed)]
        for step in range(1, kept[-1] + 1):
            batch = SeedsBatch(draws, self.shape)
            with torch.no_grad():
                x0 = generator(batch.noise, {})
            self.fit(network, optimizer, x0, batch)
            if step in kept:
                footprint.append({name: tensor.clone() for name, tensor in network.weights.items()})
                losses.append(self.probe_loss(network, probed))
        return footprint, losses

    def fit(self, network: SideBySide, optimizer: torch.optim.Optimizer, x0: Tensor, batch: SeedsBatch) -> None:
        """An update of the fake score."""
        loss = self.loss_of(self.objective.fake_score_loss(x0, batch, score_model(network)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    # Stage 2 -----------------------------------------------------------------------------------------------------

    def run(self) -> list[dict[str, Any]]:
        """Both stages. Returns the record of each seed."""
        regime, arm, seeds = self.regime, self.arm, len(self.seeds)
        path, counts, spent = self.record()
        stage_1 = self.evaluations.tolist(), (time.monotonic() - self.started) / seeds
        policy = TARGET_SCHEDULES[arm.schedule]
        schedules = [
            policy(min(count, 1) if arm.direct else count, regime.steps_per_target, regime.updates) for count in counts
        ]
        measures: list[list[Measure]] = [[] for _ in self.seeds]
        student, fake_score = SideBySide(self.start, trains=True), SideBySide(take(path, counts), trains=True)
        target, other = SideBySide(self.teacher), SideBySide(self.teacher)
        generator = self.generator_of(student)
        optimizer = torch.optim.Adam(student.parameters(), regime.generator_learning_rate, BETAS)
        fake_optimizer = torch.optim.Adam(fake_score.parameters(), regime.fake_score_learning_rate, BETAS)
        draws, nodes = Draws(self.seeds, 2), [-1] * seeds
        average = SideBySide(self.start)
        shown = Draws([78], 4).normal(SHOWN, *self.shape[1:]).expand(seeds, -1, -1, -1, -1).flatten(0, 1)
        curve = [self.look(average, shown, student, optimizer)]
        every = max(round(MISMATCH_EVERY * regime.steps_per_target), 1)
        for step in range(regime.updates):
            now = [schedule.node(step, own) for schedule, own in zip(schedules, measures, strict=True)]
            if now != nodes:
                target.fill(take(path, now))
                if arm.resets:  # the schedule is fixed: all seeds switch at once
                    optimizer.state.clear()
                nodes = now
            batch = SeedsBatch(draws, self.shape)
            x0 = generator(batch.noise, {})
            mean = self.objective.generator_loss(x0, batch, score_model(target), score_model(fake_score))
            optimizer.zero_grad()
            (loss_scale(step, regime) * self.loss_of(mean)).backward()
            optimizer.step()
            with torch.no_grad():
                for name, tensor in student.weights.items():
                    getattr(average, name).lerp_(tensor, 1 - regime.ema_decay)
            self.fit(fake_score, fake_optimizer, x0.detach(), batch)
            for _ in range(regime.fake_score_updates - 1):
                batch = SeedsBatch(draws, self.shape)
                with torch.no_grad():
                    x0 = generator(batch.noise, {})
                self.fit(fake_score, fake_optimizer, x0, batch)
            self.evaluations += regime.evaluations_per_update
            done = step + 1
            if policy.needs_measures and done % every == 0 and any(nodes):
                other.fill(take(path, [max(node - 1, 0) for node in nodes]))
                self.note(done, nodes, measures, generator, fake_score, target, other)
            if done % regime.evaluate_every == 0:
                curve.append(self.look(average, shown, student, optimizer))
        return [
            self.result(i, counts, spent, stage_1, schedules[i].switches(measures[i]), measures[i], curve)
            for i in range(seeds)
        ]

    # Measures ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def probed(self, generator: OneStepGenerator) -> tuple[Tensor, Tensor]:
        """The student's samples, noised the same way every time, and what a network's output should be of them."""
        x0 = generator(self.probe_noise[0], {})
        noise, schedule = self.probe_noise[1], pictures.schedule()
        return schedule.diffuse(x0, noise, self.probe_t), schedule.regression_target(x0, noise, self.probe_t)

    @torch.no_grad()
    def output(self, network: SideBySide, x_t: Tensor) -> Tensor:
        """`[S, n * pixels]`."""
        return score_model(network).predict(x_t, self.probe_t, {}).reshape(len(self.seeds), -1)

    def probe_loss(self, network: SideBySide, probed: tuple[Tensor, Tensor]) -> list[float]:
        """Each seed's denoising loss."""
        wanted = probed[1].reshape(len(self.seeds), -1)
        return (self.output(network, probed[0]) - wanted).square().mean(1).tolist()

    def note(self, done, nodes, measures, generator, fake_score, target, other) -> None:
        """The adaptive schedule's measure of the seeds that are not at the teacher yet."""
        x_t = self.probed(generator)[0]
        fake = self.output(fake_score, x_t)
        gap, next_gap = ((fake - self.output(one, x_t)).square().mean(1).tolist() for one in (target, other))
        for seed, node in enumerate(nodes):
            if node > 0:
                measures[seed].append(Measure(done, node, gap[seed], next_gap[seed]))
                self.evaluations[seed] += 4 * PROBED / self.regime.batch

    @torch.no_grad()
    def look(
        self, average: SideBySide, shown: Tensor, student: SideBySide, optimizer: torch.optim.Adam
    ) -> dict[str, list[float]]:
        """A row of the curve; of the student's last update its gradient's norm, and the root of the mean of Adam's second moment,
        without its correction for the first updates."""
        images = self.generator_of(average)(shown, {}).unflatten(0, (len(self.seeds), -1))
        parameters = list(student.parameters())
        states = [optimizer.state[one]["exp_avg_sq"] for one in parameters if one in optimizer.state]
        gradients = [one.grad.square() for one in parameters if one.grad is not None]

        def over(tensors: list[Tensor]) -> Tensor:
            return sum((one.flatten(1).sum(1) for one in tensors), torch.zeros(len(self.seeds)))

        count = sum(one[0].numel() for one in parameters)
        return {
            "evaluations": self.evaluations.tolist(),
            "seconds": [(time.monotonic() - self.started) / len(self.seeds)] * len(self.seeds),
            **self.world.judge(images),
            "gradient_norm": over(gradients).sqrt().tolist(),
            "second_moment_root": (over(states) / count).sqrt().tolist(),
        }

    def result(self, i, counts, spent, stage_1, switches, measures, curve) -> dict[str, Any]:
        columns = {key: [float(f"{row[key][i]:.5g}") for row in curve] for key in curve[0]}
        updates = [k * self.regime.evaluate_every for k in range(len(curve))]
        first = {"updates": spent[i], "evaluations": stage_1[0][i], "seconds": round(stage_1[1], 3)}
        return {
            "stage_1": first | {"nodes": counts[i]},
            "switches": switches,
            "measures": len(measures),
            "curve": {"updates": updates, **columns},
        }


def score_model(network: SideBySide) -> ScoreModel:
    return ScoreModel(network, pictures.schedule())


class Task:
    """What the benchmark asks of a task: see convergence.py.

    Args:
        name (`str`): Of the world.
    """

    SIDE_BY_SIDE = True
    SEEDS = list(range(8))
    MEASURES = ["classes", "gradient_norm", "second_moment_root"]
    ARMS = ARMS
    report = staticmethod(judged.report)

    def __init__(self, name: str):
        self.name = name
        self.REGIMES = REGIMES[name]

    def arms_of(self, regime: str) -> list[str]:
        """The arms that are run in a regime; of the others the results of the regime that it shares stand."""
        whole = self.REGIMES[regime]
        if whole.shares:
            return list(whole.own)
        left_out = {"half": ("reset", "shuffled", "warm_default"), "random": ("warm_default",)}
        return [arm for arm in ARMS if arm not in left_out.get(whole.start, ())]

    def run(self, regime: str, arm: str, seeds: list[int], small: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The settings, and the record of each seed."""
        task = self.REGIMES[regime].of_arm(arm)
        task = replace(task, **SMALL) if small else task
        results = Run(pictures.world(self.name), task, ARMS[arm], seeds).run()
        settings = asdict(task)
        del settings["own"]
        return {"settings": settings | {"arm": asdict(ARMS[arm])}}, results


# Settings, on seeds that no result uses -------------------------------------------------------------------------------

TUNING_SEEDS = [100, 101, 102]
STARTS = ("copy", "random", "half")
TUNING_UPDATES = {"copy": 500, "random": 1600, "half": 1600}
RATES = {"copy": (1e-4, 3e-4, 1e-3, 3e-3), "random": (3e-4, 1e-3)}  # of the generator
RATIOS = (1, 2, 4)  # of the fake score's to it
LENGTHS = (50, 100, 200)  # of stage 1
PHASES = (10, 30)  # K
RAMPS = (20, 60, 150)  # N * K of a ramp


class Tuning:
    """Tunes one start: first rates of both networks and the fake score's updates for the arm without a path, then each other arm's own
    settings, at the rates of no path and around them. Every setting is a line of `tuning.jsonl`.

    Args:
        name (`str`): Of the world.
        start (`str`): Of the student.
        folder (`Path`): Of the world's results.
    """

    def __init__(self, name: str, start: str, folder: Path, updates: int | None = None):
        self.name, self.start, self.file = name, start, folder / "tuning.jsonl"
        self.updates = updates or TUNING_UPDATES[start]
        folder.mkdir(parents=True, exist_ok=True)
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        rows = [json.loads(line) for line in lines]
        self.rows = [row for row in rows if row["start"] == start]

    def run(self) -> None:
        if self.start == "half":  # as far as random weights are: the best settings of those
            other = Tuning(self.name, "random", self.file.parent)
            for arm, number in (("none", 2), ("ramp", 1), ("warm", 1), ("path", 2)):
                for row in other.ranking(arm)[:number]:
                    self.tried(arm, row["settings"])
            return
        for rate, ratio in itertools.product(RATES[self.start], RATIOS):
            self.tried("none", rates(rate, ratio, 1))
        for row in self.ranking("none", [1])[:3]:
            for more in (2, 3):
                self.tried("none", {**row["settings"], "fake_score_updates": more})
        best = self.ranking("none")[0]["settings"]
        for updates in RAMPS:
            self.tried("ramp", {**best, "num_path_nodes": 1, "steps_per_target": updates})
        for steps in LENGTHS:
            self.tried("warm", {**best, "degradation_steps": steps})
            for phase in PHASES:
                self.tried("path", {**best, "degradation_steps": steps, "steps_per_target": phase})
        for arm in ("path", "warm"):
            own = self.ranking(arm)[0]["settings"]
            for number in (1, 2, 3):
                self.tried(arm, {**own, "fake_score_updates": number})

    def tried(self, arm: str, settings: Settings) -> None:
        """Runs an arm with settings, unless it was."""
        if any(row["arm"] == arm and row["settings"] == settings for row in self.rows):
            return
        regime = Regime(start=self.start, updates=self.updates, evaluate_every=self.updates // 40, **settings)
        results = Run(pictures.world(self.name), regime.of_arm(arm), ARMS[arm], TUNING_SEEDS).run()
        kept = ("evaluations", "distance")
        curves = [{key: result["curve"][key] for key in kept} for result in results]
        row = {"start": self.start, "arm": arm, "settings": settings, "curves": curves}
        with locked(self.file.with_suffix(".lock")), open(self.file, "a") as stream:
            stream.write(json.dumps(row) + "\n")
        self.rows.append(row)
        print(self.start, arm, settings, f"{self.final(row):.3f}", file=sys.stderr, flush=True)

    def final(self, row: Settings) -> float:
        return settled([{"curve": curve} for curve in row["curves"]])

    def threshold(self) -> float:
        """1.25 times the lowest distance that any setting of the arm without a path settles at."""
        return 1.25 * min(self.final(row) for row in self.rows if row["arm"] == "none")

    def cost(self, row: Settings) -> float:
        """The median number of evaluations to the threshold; infinite of settings that do not settle below it."""
        level = self.threshold()
        own = [cost({"curve": curve, "stage_1": {"updates": 0}}, level, "evaluations") for curve in row["curves"]]
        return median(own) if self.final(row) <= level else math.inf

    def ranking(self, arm: str, fake_score_updates: Iterable[int] = (1, 2, 3)) -> list[Settings]:
        """The settings of an arm, the best one first."""
        rows = [r for r in self.rows if r["arm"] == arm and r["settings"]["fake_score_updates"] in fake_score_updates]
        return sorted(rows, key=lambda row: (self.cost(row), self.final(row)))


def tuning_table(name: str, folder: Path) -> str:
    """Markdown: every setting that was tried, the best first."""
    lines = ["| start | arm | settings | evaluations to the threshold | distance at the end |", "| --- " * 5 + "|"]
    for start in STARTS:
        tuning = Tuning(name, start, folder)
        for arm in ("none", "ramp", "warm", "path"):
            for row in tuning.ranking(arm):
                settings = ", ".join(f"{key} {value:g}" for key, value in row["settings"].items())
                lines.append(f"| {start} | {arm} | {settings} | {tuning.cost(row):.0f} | {tuning.final(row):.3f} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", choices=REGIMES)
    parser.add_argument("--tune", action="store_true", required=True)
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=STARTS)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "convergence", help="of all worlds"
    )
    options = parser.parse_args(arguments)
    set_threads()
    folder = options.output / options.world
    for start in options.starts:
        Tuning(options.world, start, folder).run()
    (folder / "tuning.md").write_text(tuning_table(options.world, folder) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
