"""Which footprints of stage 1 become nodes, and when the walk has come to its end: from denoising losses on the way.

The losses are the fake score's on the initial student's samples, the same prompts and noise every time; the first is the
teacher's, after 0 updates.
"""

import math
from collections.abc import Sequence


_PER_OCTAVE = 2


def footprints(steps: int, num_nodes: int) -> list[int]:
    """The updates after which a node can be kept if nodes are spaced by mismatch: 1, 2, 3, 4, 6, 8, 11, ..., `steps`.

    The loss falls fast at first and slowly later, so they are dense at first. They are two an octave; more, if that would
    be fewer than twice the nodes.

    Args:
        steps (`int`): Of stage 1, at most.
        num_nodes (`int`): N, at most `steps`.
    """
    for per_octave in range(_PER_OCTAVE, 2 * steps):
        octaves = math.log2(steps)
        found = sorted({round(2 ** (k / per_octave)) for k in range(int(octaves * per_octave) + 1)} | {steps})
        if len(found) >= min(2 * num_nodes, steps):
            return found
    return list(range(1, steps + 1))


def evenly_spaced(losses: Sequence[float], num_nodes: int) -> list[int]:
    """Which of the measured places become nodes 1..N: those between which the loss falls by about as much each time.

    Args:
        losses (`Sequence[float]`): After 0 updates, and at each footprint.
        num_nodes (`int`): N. If there are fewer footprints, all of them are taken.

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


def earliest_end(steps: int, warmup_steps: int = 0) -> int:
    """The updates before which a walk of at most `steps` does not count as flat: a tenth of it, twice its warm-up."""
    return max(steps // 10, 2 * warmup_steps)


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
