"""What a run found out: measures of teacher, initial student and student, images, and `report.json`."""

import copy
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor

from .. import __version__
from ..families import ModelFamily
from ..models.adapters import SharedNetwork
from ..models.casting import inference_copy
from ..path.path import DegradationPath
from . import Evaluation
from .plots import convergence_plot, image_grid
from .report_format import REPORT, read_report
from .sampling import agreed, is_main
from .teacher_images import TeacherImages


TEACHER_STEPS = 25
RESAMPLES = 50  # of the prompts, for the intervals of teacher, initial student and student
_NO_IMAGES = (torch.empty(0, 3, 0, 0, dtype=torch.uint8), 0.0)  # where another process has them


class Report:
    """Measures pipelines as a run goes on, and writes what it found. Several processes share the sampling; the main one has the
    images, measures them and writes.

    Args:
        evaluation (`Evaluation`): Prompts and evaluators; see `Evaluation.shared` for other processes than the main one.
        wanted (`list[str]`): Prompts whose images are shown.
        family (`ModelFamily`): The teacher.
        guidance_scale (`float`): The teacher's guidance.
        teacher_steps (`int`, *optional*): Steps of the teacher's sampler (DDIM); by default 25.
        dtype (`torch.dtype`): In which denoisers draw.
        size (`int`, *optional*): The images' side in pixels; by default that which the teacher was made for.
        teacher_images (`TeacherImages`, *optional*): Where the teacher's images are kept for a run that is resumed.
        state (`PartialState`, *optional*): This process among those that share the sampling; by default it samples all.

    Raises:
        ValueError: If two evaluators measure under one name.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        wanted: list[str],
        family: ModelFamily,
        guidance_scale: float,
        teacher_steps: int | None = None,
        dtype: torch.dtype = torch.float32,
        size: int | None = None,
        teacher_images: TeacherImages | None = None,
        state: PartialState | None = None,
    ):
        self.state = state
        self.evaluation, self.metrics = evaluation, evaluation.metrics
        self.dtype = dtype
        self.gallery = Evaluation(wanted, evaluation.seed, evaluation.batch_size)
        self.gallery.show_progress = evaluation.show_progress
        self.teacher_images = teacher_images
        self.guidance_scale = guidance_scale
        self.teacher_steps = teacher_steps or TEACHER_STEPS
        for prompts in (evaluation, self.gallery):
            prompts.encode(family)
            prompts.size = family.resolution(size)
        self.family = family
        self.teacher = family.sampler()
        family.release_encoders(self.teacher)  # they are not asked again, and may leave memory
        self.measures: dict[str, dict[str, float]] = dict(evaluation.references)
        self.shown: dict[str, Tensor] = {}
        self._features: dict[str, dict[int, Tensor]] = {}
        self._intervals: dict[str, dict[str, list[float]]] = {}

    def add_teacher(self) -> None:
        """Measures the teacher in many steps, and gives these images to the evaluators; those that compare with the teacher get
        others, from the next seed. Its denoiser is on the device just for that."""
        arguments = {"num_inference_steps": self.teacher_steps, "guidance_scale": self.guidance_scale}
        seed = self.evaluation.seed
        wanted = [(self.evaluation, seed), (self.gallery, seed)]
        if agreed(self.evaluation.compares_distributions, self.state):
            wanted.append((self.evaluation, seed + 1))
        found = [self._kept_images(evaluation, seed, arguments) for evaluation, seed in wanted]
        are_kept = agreed([kept is not None for kept in found], self.state)
        sampled: list[tuple[Tensor, float]] = []
        with self._teacher_on_device(needed=not all(are_kept)):
            for (evaluation, seed), kept, is_kept in zip(wanted, found, are_kept, strict=True):
                sampled.append((kept or _NO_IMAGES) if is_kept else self._teachers_images(evaluation, seed, arguments))
        (images, seconds), (shown, _), *others = sampled
        self.evaluation.prepare(images, *(reference for reference, _ in others))
        self._keep("teacher", images, seconds, shown)
        self.measures["teacher"] |= arguments

    @contextmanager
    def _teacher_on_device(self, needed: bool) -> Iterator[None]:
        """Keeps the teacher's denoiser on the device while it samples, if it has to."""
        if not needed:
            yield
            return
        own = self.family.network
        with inference_copy(own, self.family.device, self.dtype) as network:
            self.teacher.register_modules(**{self.family.network_name: network})
            yield
        self.teacher.register_modules(**{self.family.network_name: own})

    def _kept_images(
        self, evaluation: Evaluation, seed: int, arguments: dict[str, Any]
    ) -> tuple[Tensor, float] | None:
        """What the teacher drew when the run was begun; `None` if that is not kept, or this is not the main process."""
        if self.teacher_images is None or not is_main(self.state):
            return None
        return self.teacher_images.read(evaluation, **self._sampler(seed, arguments))

    def _teachers_images(self, evaluation: Evaluation, seed: int, arguments: dict[str, Any]) -> tuple[Tensor, float]:
        """Samples the teacher, and keeps that."""
        images, seconds = evaluation.sample(self.family, self.teacher, self.state, seed=seed, **arguments)
        if self.teacher_images is not None and is_main(self.state):
            self.teacher_images.write(images, seconds, evaluation, **self._sampler(seed, arguments))
        return images, seconds

    def _sampler(self, seed: int, arguments: dict[str, Any]) -> dict[str, Any]:
        """All that the teacher's images depend on, besides prompts and weights."""
        name = type(self.teacher.scheduler).__name__
        return {**arguments, "scheduler": name, "seed": seed, "dtype": str(self.dtype)}

    def add_student(self, name: str, pipeline: DiffusionPipeline, is_shared: bool = True) -> dict[str, float]:
        """Measures a one-step pipeline under a name (`initial`, `student`); its safety checker is taken off.

        Args:
            name (`str`): Of the measures.
            pipeline (`DiffusionPipeline`): The same on every process.
            is_shared (`bool`): Whether all processes sample it; else only the main one calls this.
        """
        pipeline, state = self.family.undecorated(pipeline), self.state if is_shared else None
        images, seconds = self.evaluation.sample(self.family, pipeline, state)
        return self._keep(name, images, seconds, self.gallery.sample(self.family, pipeline, state)[0])

    def write_samples(self, file: Path) -> None:
        """Rows of prompts; columns: teacher in many steps, initial student, student."""
        titles = {
            "teacher": f"teacher\n{self.teacher_steps} steps" + _guidance(self.family, self.guidance_scale, ", "),
            "initial": "initial student\n1 step",
            "student": "student\n1 step",
        }
        columns = [name for name in titles if name in self.shown]
        rows = {prompt: [self.shown[name][row] for name in columns] for row, prompt in enumerate(self.gallery.prompts)}
        image_grid(rows, [titles[name] for name in columns], file)

    def write_convergence(self, curve: list[dict[str, float]], switches: list[int], file: Path) -> None:
        """The measures over generator updates, with the teacher's as levels, and the intervals of these and of the student."""
        found = self.intervals()
        levels, intervals = {"teacher": self.measures["teacher"]}, {"teacher": found.get("teacher", {})}
        convergence_plot(curve, switches, levels, self.metrics, file, intervals, found.get("student"))

    def write_path(self, path: DegradationPath, scales: list[float], file: Path) -> None:
        """What each node of the path draws, from the teacher to the last node, and the initial student at the end.

        Args:
            path (`DegradationPath`): Of full nodes.
            scales (`list[float]`): The guidance of nodes 0..N.
            file (`Path`): PNG.
        """
        last = {"initial student\n1 step": self.shown["initial"]}
        drawn = self.shown["teacher"]
        pipeline, steps = self.teacher, self.teacher_steps
        sample_nodes(path, self.family, pipeline, self.gallery, scales, steps, file, last, drawn, self.dtype)

    def content(self, **others: Any) -> dict[str, Any]:
        """What `report.json` holds: the measures by name, and what else is passed."""
        evaluation = {
            "name": self.evaluation.name,
            "type": self.evaluation.type,
            "num_pictures": len(self.evaluation.prompts),
            "seed": self.evaluation.seed,
            "metrics": {name: asdict(metric) for name, metric in self.metrics.items()},
        }
        content = {**self.measures, "evaluation": evaluation, "example_prompt": self.gallery.prompts[0], **others}
        if "student" in self.measures:
            content["intervals"] = self.intervals()
            content["behind"] = {name: self._behind(name) for name in ("teacher", "initial") if name in self.measures}
        return content

    def _behind(self, name: str) -> list[str]:
        """The measures by which the student is worse than another pipeline. Differences to the teacher are not held against it."""
        student, other = self.measures["student"], self.measures[name]
        return [
            key
            for key, metric in self.metrics.items()
            if metric.is_worse(student[key], other[key]) and not (name == "teacher" and metric.direction == "zero")
        ]

    def _keep(self, name: str, images: Tensor, seconds: float, shown: Tensor) -> dict[str, float]:
        measures = {key: round(value, 6) for key, value in self.evaluation.measure(images).items()}
        self.measures[name] = {**measures, "seconds_per_image": round(seconds, 6)}
        self.shown[name] = shown
        self._features[name] = self.evaluation.features
        self._intervals.pop(name, None)
        return measures

    def intervals(self) -> dict[str, dict[str, list[float]]]:
        """95 % intervals of what was measured last of teacher, initial student and student, by name; see
        `Evaluation.intervals`."""
        for name, features in self._features.items():
            if name not in self._intervals:
                found = self.evaluation.intervals(features, RESAMPLES, name == "teacher")
                self._intervals[name] = {key: [round(end, 6) for end in ends] for key, ends in found.items()}
        return self._intervals


def _guidance(family: ModelFamily, scale: float, before: str) -> str:
    """A column's guidance, in its title; nothing where nothing guides."""
    return f"{before}w={scale:.3g}" if family.takes_condition(family.network.config) else ""


def sample_nodes(
    path: DegradationPath,
    family: ModelFamily,
    teacher: DiffusionPipeline,
    evaluation: Evaluation,
    scales: list[float],
    num_inference_steps: int,
    file: Path,
    others: dict[str, Tensor] | None = None,
    drawn: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes an image of what each node draws, from the same noise. The teacher's own denoiser stays in CPU
    memory.

    Args:
        path (`DegradationPath`): Any.
        family (`ModelFamily`): The teacher.
        teacher (`DiffusionPipeline`): Its `sampler`.
        evaluation (`Evaluation`): Its prompts are the rows.
        scales (`list[float]`): The guidance of nodes 0..N.
        num_inference_steps (`int`): Of the sampler.
        file (`Path`): PNG.
        others (`dict[str, Tensor]`, *optional*): More columns: title -> images.
        drawn (`Tensor`, *optional*): The teacher's images, if they are there already.
        dtype (`torch.dtype`): In which denoisers draw.
    """
    name, kept = family.network_name, family.network
    columns: dict[str, Tensor] = {}
    own = copy.deepcopy(kept) if dtype == torch.float32 else kept
    with inference_copy(own, family.device, dtype) as network:
        teacher.register_modules(**{name: network})
        for index, scale in enumerate(scales):
            title = f"node {index}, step {path.nodes[index - 1]['step']}" if index else "teacher"
            if index:
                move_to_node(path, network, index - 1, index)
            if index or drawn is None:
                arguments: dict[str, Any] = {"num_inference_steps": num_inference_steps, "guidance_scale": scale}
                images, _ = evaluation.sample(family, teacher, **arguments)
            else:
                images = drawn
            columns[title + _guidance(family, scale, "\n")] = images
    teacher.register_modules(**{name: kept})
    columns |= others or {}
    rows = {prompt: [column[row] for column in columns.values()] for row, prompt in enumerate(evaluation.prompts)}
    image_grid(rows, list(columns), file)


def move_to_node(path: DegradationPath, network: ModelMixin, was: int | None, node: int) -> None:
    """Makes a network that is at one node another one.

    Args:
        path (`DegradationPath`): Of nodes of any kind.
        network (`ModelMixin`): Unwrapped.
        was (`int`, *optional*): The node that it is: 0 (the teacher) to N; `None` after an error.
        node (`int`): That it is to be.

    Raises:
        ValueError: If the node cannot be loaded.
    """
    if was == node:
        return
    if path.kind != "adapter":
        path.load(node, network)
        return
    shared = SharedNetwork(network)
    shared.release()
    if node:
        shared.add("node", path.adapter_config(node))
        path.load(node, network, adapter="node")
        shared.activate("node")


def summary(folder: Path) -> str:
    """Six lines of figures, from `report.json`."""
    report = read_report(folder)
    lines = []
    for name in ("teacher", "initial", "student"):
        if name in report:
            lines.append(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in report[name].items()))
    behind = report.get("behind", {}) if "student" in report else {}
    for name, words in (("teacher", "the teacher"), ("initial", "the initial one")):
        if worse := behind.get(name):
            lines[-1] += f"; behind {words} in {', '.join(worse)}"
    for name, stage in report["stages"].items():
        lines.append(
            f"{name}: {stage['steps']} steps, {stage['seconds']:.0f} s, peak memory {stage['peak_memory_mb']:.0f} MB"
        )
    lines.append(f"see {folder / 'samples.png'}, {folder / REPORT} and the pipeline in {folder}")
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """Of Python and of the libraries that figures depend on."""
    libraries = {name: version(name) for name in ("torch", "diffusers", "transformers", "accelerate")}
    return {"python": platform.python_version(), "diffusers_disback": __version__, **libraries}
