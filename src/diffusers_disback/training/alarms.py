"""Alarms: what a run's measures say when something goes wrong. They are told, and stop nothing."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation.base import Metric


LEAST_DIVERSITY = 0.5
"""Share of the teacher's diversity. Students of one step are less diverse than their teachers, collapsed ones by far."""

DRIFT_RANGE = 0.05
"""Of full scale, 13 of 255 levels: six times the farthest that the healthy runs of docs/*_report.json end from their teacher
(0.008). A student that starts farther away has the range that it starts in."""

WORSENINGS = 3
"""Validations in a row, each worse than the one before: fewer are the noise of a measure on few images."""


def alarm_names(metrics: Mapping[str, Metric], best: str | None) -> list[str]:
    """The alarms that a run can raise, by what it measures.

    Args:
        metrics (`Mapping[str, Metric]`): All that is measured.
        best (`str`, *optional*): The metric that the best student is chosen by.
    """
    names = ["diversity"] if _diversities(metrics) else []
    names += ["drift"] if _differences(metrics) else []
    names += ["worsening"] if best is not None else []
    return [*names, "not_finite"]


def alarms(
    curve: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Metric],
    teacher: Mapping[str, float],
    best: str | None = None,
) -> dict[str, str]:
    """The alarms that ring after the last validation: name -> a line that says why. A function of the curve alone, so that a
    resumed run raises what an unbroken one does.

    Args:
        curve (`Sequence[Mapping]`): A row for each validation, with `step` and measures; the initial student's has step 0.
        metrics (`Mapping[str, Metric]`): How they are to be read.
        teacher (`Mapping[str, float]`): The teacher's measures.
        best (`str`, *optional*): The metric that the best student is chosen by.
    """
    if not curve or not curve[-1]["step"]:
        return {}
    row, found = curve[-1], {}
    low = [f"{name} is {row[name]:.4g}, the teacher's {teacher[name]:.4g}" for name in _low(row, metrics, teacher)]
    if low:
        found["diversity"] = f"{' and '.join(low)}: less than {LEAST_DIVERSITY:g} of it; samples may have collapsed"
    far = [
        f"{name} is {row[name]:.4g}, outside of -{limit:.4g}..{limit:.4g}"
        for name in _differences(metrics)
        if abs(row.get(name, 0.0)) > (limit := _range(curve, name))
    ]
    if far:
        found["drift"] = f"{' and '.join(far)} around the teacher's 0"
    if best is not None and _has_worsened(curve, best, metrics[best]):
        found["worsening"] = (
            f"{best} was worse than before at {WORSENINGS} validations in a row, and is {row[best]:.4g}"
        )
    wrong = [name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
    if wrong:
        found["not_finite"] = f"{', '.join(wrong)} {'is' if len(wrong) == 1 else 'are'} not finite"
    return found


def _diversities(metrics: Mapping[str, Metric]) -> list[str]:
    return [name for name, one in metrics.items() if "diversity" in (name, one.panel) and one.direction == "higher"]


def _differences(metrics: Mapping[str, Metric]) -> list[str]:
    return [name for name, one in metrics.items() if one.direction == "zero"]


def _low(row: Mapping[str, Any], metrics: Mapping[str, Metric], teacher: Mapping[str, float]) -> list[str]:
    """The measures of diversity that are low; NaN is not."""
    known = [name for name in _diversities(metrics) if name in row and name in teacher]
    return [name for name in known if row[name] < LEAST_DIVERSITY * teacher[name]]


def _range(curve: Sequence[Mapping[str, Any]], name: str) -> float:
    """How far a difference to the teacher may go."""
    initial = abs(curve[0].get(name, 0.0)) if curve[0]["step"] == 0 else 0.0
    return max(DRIFT_RANGE, initial) if math.isfinite(initial) else DRIFT_RANGE


def _has_worsened(curve: Sequence[Mapping[str, Any]], name: str, metric: Metric) -> bool:
    """Whether each of the last validations was worse than the one before."""
    last = [row[name] for row in curve if name in row and row["step"]][-WORSENINGS - 1 :]
    return len(last) > WORSENINGS and all(
        metric.is_worse(now, before) for before, now in zip(last, last[1:], strict=False)
    )
