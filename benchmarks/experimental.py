"""Policies that were measured and brought nothing (docs/evidence.md): phases that grow geometrically, and nodes that are
evenly spaced in mismatch. They are the benchmarks' own."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from diffusers_disback import DegradationConfig, DegradationPath
from diffusers_disback.path.target_schedule import Measure, TargetSchedule
from diffusers_disback.training.probe import mean


class GeometricSchedule(TargetSchedule):
    """Phases that are `ratio` times as long as the one before, `steps_per_target` on average, at least one update each.

    Args:
        num_nodes, steps_per_target, steps (`int`): As of `TargetSchedule`.
        ratio (`float`): Above 1 phases grow towards the teacher, below 1 they shrink; 1 is the fixed schedule.
    """

    def __init__(self, num_nodes: int, steps_per_target: int, steps: int, ratio: float = 1.5):
        super().__init__(num_nodes, steps_per_target, steps)
        self.ratio = ratio

    def switches(self, measures: Sequence[Measure] = ()) -> list[int]:
        phases = self.num_nodes - 1
        lengths = [self.ratio**i for i in range(phases)]
        total, ends, gone = phases * self.steps_per_target, [], 0.0
        for i, length in enumerate(lengths):
            gone += length / sum(lengths)
            earliest, latest = (ends[-1] if ends else 0) + 1, total - (phases - 1 - i)
            ends.append(min(max(round(gone * total), earliest), latest))
        return ends


def dense_steps(steps: int, num_nodes: int) -> list[int]:
    """The updates after which a node can be kept if nodes are spaced by mismatch: 1, 2, 3, 4, 6, 8, 11, ..., `steps`.

    They are two each time that the updates double; more, if that would be fewer than twice the nodes.

    Args:
        steps (`int`): Of stage 1, at most.
        num_nodes (`int`): N, at most `steps`.
    """
    for per_octave in range(2, 2 * steps):
        octaves = math.log2(steps)
        found = sorted({round(2 ** (k / per_octave)) for k in range(int(octaves * per_octave) + 1)} | {steps})
        if len(found) >= min(2 * num_nodes, steps):
            return found
    return list(range(1, steps + 1))


def evenly_spaced(losses: Sequence[float], num_nodes: int) -> list[int]:
    """Which of the measured places become nodes 1..N: those between which the loss falls by about as much each time.

    Args:
        losses (`Sequence[float]`): After 0 updates, and at each of `dense_steps`.
        num_nodes (`int`): N. If there are fewer places, all of them are taken.

    Returns:
        `list[int]`: Indices into `losses`, rising, without 0; the last is the last.
    """
    last = len(losses) - 1
    num_nodes = min(num_nodes, last)
    chosen = [0]
    for i in range(1, num_nodes):
        level = losses[0] + i / num_nodes * (losses[last] - losses[0])
        possible = range(chosen[-1] + 1, last - (num_nodes - i) + 1)
        chosen.append(min(possible, key=lambda k: abs(losses[k] - level)))
    return [*chosen[1:], last] if num_nodes else []


@dataclass
class DenseDegradation(DegradationConfig):
    """Settings of stage 1 that record a node at each of `dense_steps`, from which `keep_evenly_spaced` chooses."""

    @property
    def node_steps(self) -> list[int]:
        return dense_steps(self.degradation_steps, self.num_path_nodes)


def keep_evenly_spaced(path: DegradationPath, num_nodes: int) -> None:
    """Leaves N nodes of a path that was recorded densely, in memory; its files stay."""
    measured = [node["mismatch"] for node in path.nodes]
    losses = [mean(measured[0]["teacher_denoising_loss"]), *(mean(bands["denoising_loss"]) for bands in measured)]
    path.manifest["nodes"] = [path.nodes[place - 1] for place in evenly_spaced(losses, num_nodes)]
