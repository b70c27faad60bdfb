"""After which steps of stage 1 nodes are recorded and losses are measured, and when it has come to its end.

The losses are the fake score's on the initial student's samples, the same prompts and noise every time; the first is the
teacher's, after 0 updates.
"""

import math
from collections.abc import Sequence


FAR_START = 2.0
"""Of `is_far`: the loss of a teacher that explains less than half of what can be explained (docs/evidence.md)."""
AUTO_NODES = 10
"""Recorded, at most, where the start is far. DisBack, for SDXL: 10."""


def evenly_spaced_steps(steps: int, num_nodes: int) -> list[int]:
    """The updates after which nodes 1..N are recorded; the last is `steps`."""
    return [round(i * steps / num_nodes) for i in range(1, num_nodes + 1)]


def candidate_steps(steps: int) -> list[int]:
    """The updates after which stage 1 may end, spaced by their logarithm: 1, 2, 3, 4, 6, 8, 11, ..., `steps`.

    The loss falls fast at first and slowly later, so they are dense at first: two each time that the updates double.
    """
    return sorted({round(2 ** (k / 2)) for k in range(int(2 * math.log2(steps)) + 1)} | {steps})


def earliest_end(steps: int, warmup_steps: int = 0) -> int:
    """The updates before which a walk of at most `steps` does not count as flat: a tenth of it, twice its warm-up."""
    return max(steps // 10, 2 * warmup_steps)


def is_far(teacher_loss: float, loss: float) -> bool:
    """Whether an initial student is far from the teacher, so that a path is worth its time.

    Args:
        teacher_loss (`float`): The teacher's denoising loss on the student's samples.
        loss (`float`): That of the fake score, fitted to them. What lies between the two is the mismatch of teacher and fake
            score.
    """
    return teacher_loss > FAR_START * loss


def is_flat(steps: Sequence[int], losses: Sequence[float], share: float, earliest: int = 0) -> bool:
    """Whether the loss has flattened: doubling the updates brought less than `share` of all that it has fallen by.

    Args:
        steps (`Sequence[int]`): 0, and the updates after which it was measured since.
        losses (`Sequence[float]`): At these.
        share (`float`): 0 is never.
        earliest (`int`): Updates before which it is not: a walk that has hardly begun is flat, too.
    """
    if not share or steps[-1] < earliest:
        return False
    half, fallen = max(i for i, step in enumerate(steps) if 2 * step <= steps[-1]), losses[0] - losses[-1]
    return half > 0 and fallen > 0 and losses[half] - losses[-1] < share * fallen
