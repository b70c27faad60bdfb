"""How certain the numbers of an evaluator are, over the prompts and the noise that happened to be drawn."""

from collections.abc import Callable
from copy import copy
from statistics import NormalDist

import torch
from torch import Tensor

from .base import FeatureEvaluator


Resample = Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor]]


def whole_groups(groups: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws as many groups as there are, with replacement, each with all of its rows.

    Args:
        groups (`Tensor`): Equal numbers, `[N]` int64.
        generator (`torch.Generator`): Of the draws.

    Returns:
        `tuple`: The rows that are drawn, and their groups; each occurrence of a group is one of its own.
    """
    sizes = groups.unique(return_counts=True)[1]
    members = groups.argsort(stable=True).split(sizes.tolist())
    drawn = torch.randint(len(members), (len(members),), generator=generator)
    taken = torch.cat([members[number] for number in drawn.tolist()])
    return taken, torch.arange(len(drawn)).repeat_interleave(sizes[drawn])


def within_groups(groups: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws from each group as many rows as it has, with replacement. As of `whole_groups`; groups stay what they are."""
    sizes = groups.unique(return_counts=True)[1].tolist()
    taken = torch.cat(
        [
            own[torch.randint(len(own), (len(own),), generator=generator)]
            for own in groups.argsort(stable=True).split(sizes)
        ]
    )
    return taken, groups[taken]


def confidence_intervals(
    evaluator: FeatureEvaluator,
    features: Tensor,
    groups: Tensor,
    resamples: int = 200,
    seed: int = 0,
    level: float = 0.95,
    reference: Tensor | None = None,
    resample: Resample = whole_groups,
) -> dict[str, tuple[float, float]]:
    """Normal bootstrap intervals of an evaluator's numbers (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993).

    Whole prompts are resampled with replacement, since images of one prompt depend on each other; each occurrence of a prompt
    is a group of its own. Classes of which none is missing are no sample of others: `within_groups` resamples the images of each,
    and their shares stay what they are. The interval is the estimate plus and minus the standard deviation over resamples times the normal
    quantile. Percentiles would not do: a Frechet distance is biased upward on a resample, whose images repeat, and its
    percentile interval often does not even contain the estimate.

    What the evaluator compares with is resampled with the images, if its features are given: those of the teacher's images of
    the same prompts. Otherwise much of what two sets of images share, which prompts were drawn, would count as a difference
    between them. Real images are not resampled: the intervals are given them.

    Args:
        evaluator (`FeatureEvaluator`): Prepared.
        features (`Tensor`): Its features, `[N, ...]`.
        groups (`Tensor`): Which images are of one prompt: equal numbers, `[N]` int64.
        resamples (`int`): At least 2.
        seed (`int`): Of the resamples.
        level (`float`): The share of intervals that contain the true value, in 0..1.
        reference (`Tensor`, *optional*): The features of the teacher's images, of the same prompts in the same order; of an
            evaluator that `compares_with_teacher`.
        resample (`Callable`): `whole_groups` or `within_groups`.

    Returns:
        `dict[str, tuple[float, float]]`: The lower and the upper end for each of `evaluator.metrics`.

    Raises:
        ValueError: If there are fewer than two prompts, or images where these are resampled within groups, or two resamples.
    """
    number, what = (len(groups), "images") if resample is within_groups else (len(groups.unique()), "prompts")
    if number < 2 or resamples < 2:
        raise ValueError(f"An interval needs at least two {what} and two resamples, but has {number} and {resamples}.")
    generator = torch.Generator().manual_seed(seed)
    measured = []
    for _ in range(resamples):
        taken, drawn = resample(groups, generator)
        resampled = copy(evaluator)
        if reference is not None:
            resampled.compare_with(reference[taken])
        measured.append(resampled.measure(features[taken], drawn))
    quantile = NormalDist().inv_cdf((1 + level) / 2)
    intervals = {}
    for name, value in evaluator.measure(features, groups).items():
        values = torch.tensor([measures[name] for measures in measured], dtype=torch.float64)
        half = quantile * values.std().item()
        intervals[name] = (value - half, value + half)
    return intervals
