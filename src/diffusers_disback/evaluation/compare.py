"""Several models side by side: the same prompts, the same noise, the same measures, and how certain these are."""

import gc
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..hub.files import write_json, write_text
from ..hub.markdown import fenced, text
from . import Evaluation
from .entries import HowSampled, ImageFolder, PipelineEntry
from .plots import image_grid
from .report import versions
from .sampling import is_main


LEVEL = 0.95
ROWS = 6  # prompts that are shown
_ARROWS = {"higher": "↑", "lower": "↓", "zero": "→ 0"}


@dataclass(frozen=True)
class Row:
    """What was found out about a model.

    Args:
        measures (`dict[str, float]`): By metric.
        intervals (`dict[str, tuple[float, float]]`): Of those that have one.
        seconds_per_image (`float`, *optional*): The median over batches, text encoders apart.
        settings (`dict`): How it was sampled.
        shown (`list[Tensor]`): Its images of the prompts that are shown, `[3, H, W]` uint8.
    """

    measures: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    seconds_per_image: float | None
    settings: dict[str, Any]
    shown: list[Tensor]


class Comparison:
    """Measures models one after another. Each is loaded, sampled and freed.

    Args:
        evaluation (`Evaluation`): Prompts, seed, batch size and evaluators.
        how (`HowSampled`): How models are sampled; of several processes the main one measures.
        resamples (`int`): For the intervals; none with 0.

    Attributes:
        rows (`dict[str, Row]`): By the models' names. Filled on the main process alone.
    """

    def __init__(self, evaluation: Evaluation, how: HowSampled, resamples: int = 200):
        self.evaluation, self.how, self.resamples = evaluation, how, resamples
        self.metrics = evaluation.metrics
        self.prompts = list(dict.fromkeys(evaluation.prompts))[:ROWS]
        self.rows: dict[str, Row] = {}
        self.reference: str | None = None
        self._size: tuple[int, int] | None = None

    def add(self, model: PipelineEntry | ImageFolder, is_reference: bool = False) -> None:
        """Samples a model and measures it.

        Args:
            model (`PipelineEntry` or `ImageFolder`): Of `Entry.find`.
            is_reference (`bool`): Whether it is the teacher, whose images others are compared with: then it comes first.

        Raises:
            ValueError: If it cannot be sampled, or its images are of another size than those before.
        """
        seeds = [self.evaluation.seed]
        if is_reference and self.evaluation.compares_distributions:
            seeds.append(self.evaluation.seed + 1)
        sampled, *others = model.sample(self.evaluation, self.how, seeds)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if not is_main(self.how.state):
            return
        images, name = sampled.images, model.entry.text
        height, width = images.shape[-2:]
        if self._size not in (None, (height, width)):
            raise ValueError(
                f"The images of {name} are of {width} x {height} pixels, those before of {self._size[1]} x {self._size[0]}: pass "
                "--resolution, at which all are sampled."
            )
        self._size = (height, width)
        if is_reference:
            self.reference = name
            self.evaluation.prepare(images, *(other.images for other in others))
        measures = self.evaluation.measure(images)
        intervals = self.evaluation.intervals(self.evaluation.features, self.resamples, is_reference, LEVEL)
        seconds = sampled.median_seconds if sampled.seconds else None
        shown = [images[self.evaluation.prompts.index(prompt)] for prompt in self.prompts]
        self.rows[name] = Row(measures, intervals, seconds, model.settings, shown)

    def best(self, metric: str) -> str | None:
        """The model that is best by a metric; `None` if another's interval overlaps its own, or there is no other. The teacher
        takes no part where others are compared with it."""
        ranked = {name: row for name, row in self.rows.items() if self._is_ranked(name, metric)}
        rule, best = self.metrics[metric], None
        for name, row in ranked.items():
            if best is None or rule.is_worse(ranked[best].measures[metric], row.measures[metric]):
                best = name
        if (
            best is None
            or len(ranked) < 2
            or any(self._is_level(ranked[best], row, metric) for name, row in ranked.items() if name != best)
        ):
            return None
        return best

    def table(self) -> str:
        """Markdown: a row for each model, a column for each metric, the best in bold where that is certain."""
        best = {name: self.best(name) for name in self.metrics}
        titles = [f"{text(metric.label)} {_ARROWS[metric.direction]}" for metric in self.metrics.values()]
        lines = [
            "| " + " | ".join(["model", *titles, "steps", "s / image"]) + " |",
            "| --- |" + " --- |" * (len(titles) + 2),
        ]
        for name, row in self.rows.items():
            cells = [_cell(row, metric, best[metric] == name) for metric in self.metrics]
            steps = row.settings.get("num_inference_steps")
            seconds = "" if row.seconds_per_image is None else f"{row.seconds_per_image:.3g}"
            title = text(name) + (" (teacher)" if name == self.reference else "")
            lines.append("| " + " | ".join([title, *cells, "" if steps is None else str(steps), seconds]) + " |")
        return "\n".join(lines)

    def content(self, **others: Any) -> dict[str, Any]:
        """What `evaluation.json` holds: everything, and what else is passed."""
        models = {}
        for name, row in self.rows.items():
            models[name] = {
                "measures": row.measures,
                "intervals": row.intervals,
                "seconds_per_image": row.seconds_per_image,
                "settings": row.settings,
            }
        how = self.how
        return {
            "models": models,
            "reference": self.reference,
            "metrics": {name: asdict(metric) for name, metric in self.metrics.items()},
            "num_images": len(self.evaluation.prompts),
            "num_prompts": len(set(self.evaluation.prompts)),
            "seed": self.evaluation.seed,
            "batch_size": self.evaluation.batch_size,
            "dtype": str(how.dtype).removeprefix("torch."),
            "size": self._size and list(self._size),
            "resamples": self.resamples,
            "level": LEVEL,
            "device": torch.cuda.get_device_name(how.device) if how.device.type == "cuda" else how.device.type,
            "num_processes": 1 if how.state is None else how.state.num_processes,
            "versions": versions(),
            **others,
        }

    def write(self, folder: Path, command: str, **others: Any) -> None:
        """Writes `evaluation.md`, `evaluation.json` and `evaluation.png`.

        Args:
            folder (`Path`): Is made if it is not there.
            command (`str`): That did all this.
            others: Of the JSON file.
        """
        folder.mkdir(parents=True, exist_ok=True)
        rows = {
            prompt: [row.shown[number] for row in self.rows.values()] for number, prompt in enumerate(self.prompts)
        }
        image_grid(rows, [_title(name) for name in self.rows], folder / "evaluation.png")
        write_json(folder / "evaluation.json", self.content(command=command, **others))
        count, distinct = len(self.evaluation.prompts), len(set(self.evaluation.prompts))
        said = (
            f"{count} images of {distinct} prompts for each model, from the same noise (seed {self.evaluation.seed})."
        )
        if any(row.intervals for row in self.rows.values()):
            said += f" ± is half of a {LEVEL:.0%} interval, over {self.resamples} resamples of the prompts."
        said += " The best is in bold, unless another is level with it, or its interval overlaps the best one's."
        parts = ["# Comparison", self.table(), said, "![images](evaluation.png)", fenced("bash", command)]
        write_text(folder / "evaluation.md", "\n\n".join(parts) + "\n")

    def _is_ranked(self, name: str, metric: str) -> bool:
        owner = next(one for one in self.evaluation.evaluators if metric in one.metrics)
        return name != self.reference or not self.evaluation.is_own_reference(owner)

    def _is_level(self, best: Row, other: Row, metric: str) -> bool:
        """Whether two models cannot be told apart: by their intervals, or where there are none by their values."""
        loss = self.metrics[metric].loss
        distance = abs(loss(best.measures[metric]) - loss(other.measures[metric]))
        return distance <= _half(best, metric) + _half(other, metric)


def _half(row: Row, metric: str) -> float:
    """Half the width of an interval; 0 if there is none."""
    low, high = row.intervals.get(metric, (0.0, 0.0))
    return (high - low) / 2


def _cell(row: Row, metric: str, is_best: bool) -> str:
    value = f"{row.measures[metric]:.4g}"
    value = f"**{value}**" if is_best else value
    return f"{value} ± {_half(row, metric):.2g}" if metric in row.intervals else value


def _title(name: str) -> str:
    """A model's name over its column: the end of it."""
    return name if len(name) <= 24 else f"…{name[-23:]}"
