"""When the target changes: policies that take generator updates, and recorded measures, to a node of the path."""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


SHARE, FALL = 0.6, 0.05
"""Of the adaptive schedule, as they were found in docs/evidence.md."""


@dataclass(frozen=True)
class Measure:
    """What was measured of the student while a node was its target.

    Args:
        step (`int`): Generator updates so far.
        node (`int`): The target of the last of them.
        mismatch (`float`): The mismatch of the student and that target.
        next_mismatch (`float`): The mismatch of the student and the node after it, one closer to the teacher.
    """

    step: int
    node: int
    mismatch: float
    next_mismatch: float

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Measure":
        """Reads what a checkpoint holds; version 0.1.0 called a mismatch a gap."""
        return cls(**{name.replace("gap", "mismatch"): value for name, value in state.items()})


class TargetSchedule(ABC):
    """Step and measures -> node: N-1 first, never up again, every node, the teacher (0) at the end.

    A pure function: the node of an update depends on its number and on what was measured before it, on nothing else, so
    that a resumed run goes the way of an unbroken one.

    Args:
        num_nodes (`int`): N. With 0 or 1 the teacher is the only target.
        steps_per_target (`int`): Generator updates with each of N-1..1: exactly, on average or at most.
        steps (`int`): All generator updates.

    Raises:
        ValueError: If the teacher would get fewer than `steps_per_target`.
    """

    needs_measures = False

    def __init__(self, num_nodes: int, steps_per_target: int, steps: int):
        if steps < num_nodes * steps_per_target:
            raise ValueError(
                f"--max_train_steps {steps} is less than {num_nodes} targets x --steps_per_target {steps_per_target}: "
                "the teacher would not get its share."
            )
        self.num_nodes = num_nodes
        self.steps_per_target = steps_per_target
        self.steps = steps

    def node(self, step: int, measures: Sequence[Measure] = ()) -> int:
        """The target of generator update `step`, counted from 0.

        Args:
            step (`int`): Its number.
            measures (`Sequence[Measure]`): Taken after updates 0..step-1, in order; later ones do not matter.
        """
        return max(self.num_nodes - 1, 0) - bisect_right(self.switches(measures), step)

    @abstractmethod
    def switches(self, measures: Sequence[Measure] = ()) -> list[int]:
        """The updates from which nodes N-2, ..., 0 are the target, N-1 numbers that rise; those to come as they will be
        if nothing more is measured."""


class FixedSchedule(TargetSchedule):
    """`steps_per_target` updates with each node."""

    def switches(self, measures: Sequence[Measure] = ()) -> list[int]:
        return [i * self.steps_per_target for i in range(1, self.num_nodes)]


class AdaptiveSchedule(TargetSchedule):
    """Stays with a node while it is a stepping stone that the student is not yet on its way to, `steps_per_target` updates
    at most.

    A node is left at the first measure that finds one of two things. It is hardly nearer to the student than the next node
    is: its mismatch is above `share` of the next one's. So it is where a path was recorded for too short a time, and the
    fake score, which goes on to learn the student, leaves the path behind; or where nodes are as good as equal. Or its
    mismatch has fallen, by `fall` of its highest of the phase at two measures running: it rises while the fake score learns
    the student, and falls once the student follows the node, from where on the next one leads as well.

    Args:
        num_nodes, steps_per_target, steps (`int`): As of `TargetSchedule`.
        share (`float`): Above 0: lower leaves earlier.
        fall (`float`): Above 0: lower leaves earlier; 1 is never.
    """

    needs_measures = True

    def __init__(self, num_nodes: int, steps_per_target: int, steps: int, share: float = SHARE, fall: float = FALL):
        super().__init__(num_nodes, steps_per_target, steps)
        self.share = share
        self.fall = fall

    def switches(self, measures: Sequence[Measure] = ()) -> list[int]:
        ends, entered = [], 0
        for node in range(self.num_nodes - 1, 0, -1):
            end = entered + self.steps_per_target
            phase = [m for m in measures if m.node == node and entered < m.step < end]
            ends.append(next((m.step for i, m in enumerate(phase, 1) if self.is_done(phase[:i])), end))
            entered = ends[-1]
        return ends

    def is_done(self, phase: Sequence[Measure]) -> bool:
        """Whether a node is left after these measures of its phase, of which there is at least one."""
        mismatches = [measure.mismatch for measure in phase]
        is_hardly_nearer = mismatches[-1] > self.share * phase[-1].next_mismatch
        has_fallen = len(mismatches) > 2 and max(mismatches[-2:]) < (1 - self.fall) * max(mismatches)
        return is_hardly_nearer or has_fallen


TARGET_SCHEDULES: dict[str, type[TargetSchedule]] = {
    "fixed": FixedSchedule,
    "adaptive": AdaptiveSchedule,
}
