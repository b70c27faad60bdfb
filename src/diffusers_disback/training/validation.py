"""What follows from a validation: the best student is kept, alarms are told, and training may end early."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluation.base import Metric
from ..families import ModelFamily
from ..hub.files import sha256_of, write_json
from .alarms import alarm_names, alarms
from .best_student import BestStudent
from .config import TrainingConfig
from .learner import Learner
from .settings.fields import values


STATUS = "status.json"
Curve = Sequence[Mapping[str, Any]]
"""A row for each validation, with `step`, `node` and measures; the initial student's has step 0."""

# What a metric's values depend on besides the student.
_MEASURED_BY = (
    *("validation_steps", "evaluators", "evaluator_args", "num_validation_images", "validation_prompts"),
    *("evaluation_prompts_file", "num_evaluation_prompts"),
)


def check_metric(config: TrainingConfig, metrics: Mapping[str, Metric]) -> None:
    """Raises a `ValueError` with all metrics if the settings choose the best student by one that is not measured."""
    name = config.metric_for_best_model
    if name is not None and name not in metrics:
        raise ValueError(
            f"--metric_for_best_model {name} is not measured. The metrics of the chosen evaluators are "
            f"{', '.join(metrics) or 'none'}; --evaluators chooses others."
        )


def measured_by(config: TrainingConfig) -> dict[str, Any]:
    """What a run that chooses by a metric may not change when it is resumed, because values would not be comparable."""
    if config.metric_for_best_model is None:
        return {}
    found = {name: value for name, value in values(config).items() if name in _MEASURED_BY}
    if config.evaluation_prompts_file is not None:
        found["evaluation_prompts_file"] = sha256_of(Path(config.evaluation_prompts_file))
    return found


class Validation:
    """What a run does with its measures, on the main process. All of it is a function of the curve, which checkpoints hold: a
    resumed run decides as an unbroken one.

    Args:
        config (`TrainingConfig`): By which metric the best student is chosen, and how long training waits for a better one.
        family (`ModelFamily`): The teacher.
        metrics (`dict[str, Metric]`): All that is measured.
        teacher (`dict[str, float]`): The teacher's measures.

    Raises:
        ValueError: If the metric is not measured, or the folder for the best student holds something else.
    """

    def __init__(
        self,
        config: TrainingConfig,
        family: ModelFamily,
        metrics: Mapping[str, Metric],
        teacher: Mapping[str, float],
    ):
        check_metric(config, metrics)
        self.config = config
        self.metrics = metrics
        self.teacher = teacher
        self.name = config.metric_for_best_model
        self.folder = Path(config.output_dir)
        self.student = BestStudent(config.output_dir, family, config.conditioning_timestep)
        if self.name is not None:
            self.student.check_place()

    def begin(self, checkpoint: Path | None) -> None:
        """Begins with the best student of a checkpoint; with none, if there is no checkpoint."""
        if self.name is not None:
            self.student.restore(checkpoint)

    def add_to(self, checkpoint: Path) -> None:
        """Puts the best student so far into a checkpoint that is written."""
        if self.name is not None:
            self.student.add_to(checkpoint)

    def best(self, curve: Curve) -> dict[str, Any] | None:
        """Step, metric and value of the best student; the first of equal ones. `None` if there is none yet, or none is
        chosen."""
        found = None
        for row in curve:
            if self._is_better(row, found, 0.0):
                found = row
        if found is None or self.name is None:
            return None
        return {"step": found["step"], "metric": self.name, "value": found[self.name]}

    def waited(self, curve: Curve) -> int:
        """Validations since the metric last improved by more than the threshold. Those before the teacher is the target do not
        count: what the student is trained towards changes until then."""
        best, waited = None, 0
        for row in curve:
            if self.name is None or not row["step"]:
                continue
            improves = self._is_better(row, best, self.config.early_stopping_threshold)
            if row["node"] == 0:
                waited = 0 if improves else waited + 1
            if self._is_better(row, best, 0.0):
                best = row
        return waited

    def stops(self, curve: Curve, more: int = 0) -> bool:
        """Whether training ends: the metric has not improved for as long as it is given.

        Args:
            curve (`Curve`): All rows so far.
            more (`int`): Validations to come that do not improve it.
        """
        patience = self.config.early_stopping_patience
        return patience is not None and self.waited(curve) + more >= patience

    def judge(
        self, stage: str, curve: Curve, student: Learner, steps: int, notify: Callable[[str], None]
    ) -> dict[str, int]:
        """Keeps the student if it is the best, tells the alarms that begin to ring, and writes `status.json`.

        Args:
            stage (`str`): The stage's name.
            curve (`Curve`): With the row of this validation.
            student (`Learner`): In training.
            steps (`int`): Of the stage.
            notify (`Callable`): Tells a line.

        Returns:
            `dict[str, int]`: 1 for each alarm that rings, 0 for each that does not, for the tracker.
        """
        row, best = curve[-1], self.best(curve)
        if best is not None and best["step"] == row["step"]:
            self.student.write(student, best)
        rings, before = self._alarms(curve), self._alarms(curve[:-1])
        for name in rings.keys() - before.keys():
            notify(f"alarm {name} at step {row['step']}: {rings[name]}")
        status = {
            "format_version": 1,
            "stage": stage,
            "step": row["step"],
            "max_steps": steps,
            "node": row["node"],
            "measures": {name: _finite(row[name]) for name in self.metrics if name in row},
            "best": best,
            "waited": self.waited(curve),
            "stops": self.stops(curve),
            "alarms": rings,
        }
        write_json(self.folder / STATUS, status)
        return {f"alarms/{name}": int(name in rings) for name in alarm_names(self.metrics, self.name)}

    def choose(self, student: Learner, curve: Curve) -> None:
        """Makes the best student the one that is published, if that was asked for."""
        if self.config.load_best_model_at_end and self.best(curve) is not None:
            self.student.load_into(student)

    def outcome(self, curve: Curve, steps: int, max_steps: int) -> dict[str, Any]:
        """What a report says of the best student, and of an early end; empty without either.

        Args:
            curve (`Curve`): All of it.
            steps, max_steps (`int`): Steps that were done, and that were asked for.
        """
        found: dict[str, Any] = {}
        best = self.best(curve)
        if best is not None:
            found["best_model"] = {**best, "is_student": self.config.load_best_model_at_end}
        if steps < max_steps:
            patience = self.config.early_stopping_patience
            found["early_stopping"] = {
                "step": steps,
                "max_steps": max_steps,
                "metric": self.name,
                "patience": patience,
            }
        return found

    def _alarms(self, curve: Curve) -> dict[str, str]:
        return alarms(curve, self.metrics, self.teacher, self.name)

    def _is_better(self, row: Mapping[str, Any], best: Mapping[str, Any] | None, threshold: float) -> bool:
        """Whether a row of the trained student is better than another by more than a threshold; one that is not finite never."""
        if self.name is None or not row["step"] or not math.isfinite(row[self.name]):
            return False
        loss = self.metrics[self.name].loss
        return best is None or loss(best[self.name]) - loss(row[self.name]) > threshold


def _finite(value: float) -> float | None:
    """A number as JSON has them; `None` for others."""
    return value if math.isfinite(value) else None
