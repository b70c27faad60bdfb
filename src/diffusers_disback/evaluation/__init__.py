"""Measures of images. An evaluator sees images and prompts, never a trainer."""

import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from ..data.truncation import told_once
from ..families import ModelFamily
from .base import Evaluator, FeatureEvaluator, Metric, check_measures, groups_of
from .bootstrap import confidence_intervals, whole_groups, within_groups
from .distance import FrechetDistance
from .distributions import (
    Diversity,
    FrechetToImages,
    FrechetToTeacher,
    KernelToTeacher,
    PatchFrechetToTeacher,
    cosine_diversity,
    write_reference_statistics,
)
from .drift import DriftEvaluator
from .networks import FeatureNetworks
from .sampling import Sampled, agreed, sample_batches
from .scores import ClipScore, HumanPreferenceScore, PickScore


EVALUATORS: dict[str, type[Evaluator]] = {
    "clip_score": ClipScore,
    "diversity": Diversity,
    "drift": DriftEvaluator,
    "fid": FrechetToImages,
    "fid_to_teacher": FrechetToTeacher,
    "hps_v2": HumanPreferenceScore,
    "kid_to_teacher": KernelToTeacher,
    "patch_fid_to_teacher": PatchFrechetToTeacher,
    "pick_score": PickScore,
}
_NETWORKS = "networks"
# Images of each class, to resample these: the spread of n images is that of n - 1 in truth, here 5 % too narrow at most.
ENOUGH_IN_A_CLASS = 10


def check_evaluators(
    names: Sequence[str], arguments: Mapping[str, Any] = {}, known: Mapping[str, type[Evaluator]] = EVALUATORS
) -> None:
    """Checks that names are in `EVALUATORS`, that there is one, and that they take the arguments. Nothing is loaded.

    Args:
        names (`Sequence[str]`): Of evaluators.
        arguments (`Mapping[str, Any]`): Of their constructors, as of `--evaluator_args`.
        known (`Mapping`): Evaluators by name.

    Raises:
        ValueError: With the names that are not known, and all that are; or with what the evaluators take.
    """
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(f"--evaluators {' '.join(unknown)}: known evaluators are {', '.join(EVALUATORS)}.")
    taken = {name: _parameters(known[name]) for name in names}
    of_all = {key for parameters in taken.values() for key in parameters}
    if foreign := sorted(arguments.keys() - of_all):
        own = "; ".join(f"{name} takes {', '.join(keys) or 'none'}" for name, keys in taken.items())
        raise ValueError(f"--evaluator_args {foreign[0]}: no evaluator that was chosen takes it. {own}.")
    for name, parameters in taken.items():
        for key, parameter in parameters.items():
            if key not in arguments:
                if parameter.default is parameter.empty:
                    raise ValueError(f"--evaluators {name} needs --evaluator_args {key}=...; it has no default.")
                continue
            kinds = set(get_args(parameter.annotation) or (parameter.annotation,))
            kinds |= {int} if float in kinds else set()
            if kinds & {bool, int, float, str} and type(arguments[key]) not in kinds:
                raise ValueError(f"--evaluator_args {key}: {name} takes {parameter}, but not {arguments[key]!r}.")


def make_evaluators(
    names: Sequence[str],
    arguments: Mapping[str, Any] = {},
    device: torch.device | str = "cpu",
    cache_dir: str | None = None,
    known: Mapping[str, type[Evaluator]] = EVALUATORS,
) -> list[Evaluator]:
    """Makes evaluators, with their networks loaded; those that use the same share it.

    Args:
        names (`Sequence[str]`): In `known`.
        arguments (`Mapping[str, Any]`): Each is given to those of them whose constructor takes it.
        device (`torch.device` or `str`): Where features are computed.
        cache_dir (`str`, *optional*): Where downloaded models are kept.
        known (`Mapping`): Evaluators by name.

    Raises:
        ValueError: If a name is unknown, an argument is not taken by any of them or not of its type, or a network cannot be loaded.
    """
    check_evaluators(names, arguments, known)
    networks = FeatureNetworks(device, cache_dir)
    made = []
    for name in names:
        kind = known[name]
        own = {key: arguments[key] for key in _parameters(kind) if key in arguments}
        shared = {_NETWORKS: networks} if _NETWORKS in inspect.signature(kind).parameters else {}
        try:
            made.append(kind(**own, **shared))
        except ValueError as error:
            raise ValueError(f"--evaluators {name}: {error}") from error
    return made


def _parameters(kind: type[Evaluator]) -> dict[str, inspect.Parameter]:
    """What the constructor of an evaluator takes of a user, by name."""
    parameters = inspect.signature(kind, eval_str=True).parameters
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {key: one for key, one in parameters.items() if key != _NETWORKS and one.kind not in variable}


class Evaluation:
    """Draws the same prompts from the same noise with any pipeline, and measures what comes.

    Args:
        prompts (`list[str]`): One image each.
        seed (`int`): Of the noise.
        batch_size (`int`): Images drawn at once.
        name (`str`): Of these prompts, as a card calls them.
        type (`str`): The same as an identifier.

    Attributes:
        evaluators (`list[Evaluator]`): What measures the images; `add` adds registered ones.
        size (`int`, *optional*): The images' side in pixels; by default the pipeline's own.
        features (`dict[int, Tensor]`): Of the images that were measured last, by the number of the evaluator.
        show_progress (`bool`): Show a bar where sampling or measuring takes longer than seconds.
        references (`dict`): Measures to set beside those of pipelines, by name, such as the `floor` of a distance.
    """

    def __init__(
        self,
        prompts: list[str],
        seed: int = 0,
        batch_size: int = 50,
        name: str = "Prompts of the run",
        type: str = "prompts",
    ):
        self.prompts = prompts
        self.name = name
        self.type = type
        self.seed = seed
        self.batch_size = batch_size
        self.evaluators: list[Evaluator] = []
        self.references: dict[str, dict[str, float]] = {}
        self.size: int | None = None
        self.show_progress = False
        self.features: dict[int, Tensor] = {}
        self._has_others = False
        self._encoded: dict[str, Tensor] = {}  # what a family samples from, a row for each distinct prompt
        self._places: dict[str, int] = {}
        self._family: ModelFamily | None = None

    @classmethod
    def shared(cls, evaluation: "Evaluation | None", state: PartialState) -> "Evaluation":
        """The main process's evaluation there; on each other process one that samples the same, and measures nothing.

        Args:
            evaluation (`Evaluation`, *optional*): On the main process.
            state (`PartialState`): This process among the others, all of which have to call this.
        """
        own = None if evaluation is None else (evaluation.prompts, evaluation.seed, evaluation.batch_size)
        given = agreed(own, state)
        if given is None:
            raise ValueError("There is no evaluation on the main process to be shared.")
        return cls(*given) if evaluation is None else evaluation

    def add(
        self,
        names: Sequence[str],
        arguments: Mapping[str, Any] = {},
        device: torch.device | str = "cpu",
        cache_dir: str | None = None,
    ) -> None:
        """Adds evaluators of `EVALUATORS`: see `make_evaluators`.

        Raises:
            ValueError: If one of them cannot be made.
        """
        self.evaluators += make_evaluators(names, arguments, device, cache_dir)

    @property
    def metrics(self) -> dict[str, Metric]:
        """All evaluators' metrics, by name.

        Raises:
            ValueError: If two evaluators measure under one name.
        """
        metrics: dict[str, Metric] = {}
        for evaluator in self.evaluators:
            if twice := metrics.keys() & evaluator.metrics.keys():
                raise ValueError(f"Two evaluators measure {', '.join(sorted(twice))}. Leave one of them out.")
            metrics |= evaluator.metrics
        return metrics

    @property
    def compares_distributions(self) -> bool:
        """Whether any evaluator's reference are other images of the teacher than those that are measured."""
        return any(map(_compares_distributions, self.evaluators))

    def prepare(self, teacher_images: Tensor, reference: Tensor | None = None) -> None:
        """Gives all evaluators the teacher's images of the prompts.

        Args:
            teacher_images (`Tensor`): Those that the teacher is measured by, `[N, 3, H, W]` uint8.
            reference (`Tensor`, *optional*): Others of the same prompts, for evaluators with `compares_distributions`: compared
                with its own images the teacher would be perfect.
        """
        self._has_others = reference is not None and reference is not teacher_images
        for evaluator in self.evaluators:
            own = teacher_images if reference is None or not _compares_distributions(evaluator) else reference
            evaluator.prepare(own, self.prompts)

    @told_once()
    def encode(self, family: ModelFamily) -> None:
        """Encodes the prompts once, so that pipelines without encoders can sample them.

        Args:
            family (`ModelFamily`): The teacher, with its encoders.
        """
        distinct = list(dict.fromkeys(self.prompts))
        slices = [distinct[first : first + self.batch_size] for first in range(0, len(distinct), self.batch_size)]
        parts = [family.arguments(prompts) for prompts in slices]
        self._encoded = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        self._places = {prompt: place for place, prompt in enumerate(distinct)}
        self._family = family

    def _given(self, prompts: list[str], device: torch.device) -> dict[str, Tensor]:
        """What the family samples prompts from, a row each."""
        rows = [self._places[prompt] for prompt in prompts]
        return {name: tensor[rows].to(device) for name, tensor in self._encoded.items()}

    def sample(
        self,
        family: ModelFamily,
        pipeline: DiffusionPipeline,
        state: PartialState | None = None,
        seed: int | None = None,
        **arguments: Any,
    ) -> tuple[Tensor, float]:
        """Images, `[N, 3, H, W]` uint8 on the CPU, and the seconds that one took.

        Args:
            family (`ModelFamily`): The teacher.
            pipeline (`DiffusionPipeline`): Its `sampler`, or a student's `one_step`.
            state (`PartialState`, *optional*): This process among those that share the batches; the main one has the images
                then. By default this process samples all.
            seed (`int`, *optional*): Of the noise; by default the evaluation's.
            arguments: Of the family's `sample`, such as `num_inference_steps`.
        """
        sampled = self.timed_sample(family, pipeline, state, seed=seed, **arguments)
        return sampled.images, sampled.mean_seconds

    @told_once()
    def timed_sample(
        self,
        family: ModelFamily,
        pipeline: DiffusionPipeline,
        state: PartialState | None = None,
        warm_up: bool = False,
        seed: int | None = None,
        **arguments: Any,
    ) -> Sampled:
        """As `sample`, with the seconds of each batch; with `warm_up`, the first one is sampled once before."""
        if self._family is not family or not set(self.prompts) <= self._places.keys():
            self.encode(family)
        device = pipeline.device

        def sample(prompts: list[str], noise: Tensor) -> Tensor:
            return family.sample(pipeline, self._given(prompts, device), noise, **arguments)

        shape = family.latent_shape(self.size)
        with self._bar("sampling", len(self.prompts), "image") as bar:
            return sample_batches(
                self.prompts,
                self.batch_size,
                self.seed if seed is None else seed,
                shape,
                sample,
                device,
                state,
                warm_up,
                bar.update,
            )

    def measure(self, images: Tensor) -> dict[str, float]:
        """All evaluators' measures of what `sample` gave.

        Raises:
            ValueError: If an evaluator does not return what it says that it measures.
        """
        measures: dict[str, float] = {}
        groups, self.features = groups_of(self.prompts), {}
        bar = self._bar("measuring", len(self.evaluators), "evaluator")
        for number, evaluator in enumerate(self.evaluators):
            if isinstance(evaluator, FeatureEvaluator):
                self.features[number] = evaluator.features(images, self.prompts)
                values = evaluator.measure(self.features[number], groups)
            else:
                values = evaluator(images, self.prompts)
            check_measures(evaluator, values)
            measures |= values
            bar.update()
        bar.close()
        return measures

    def intervals(
        self, features: Mapping[int, Tensor], resamples: int, of_teacher: bool = False, level: float = 0.95
    ) -> dict[str, tuple[float, float]]:
        """Confidence intervals of measures, of evaluators that are `FeatureEvaluator`s; none for a single prompt.

        Prompts are resampled; of a teacher without prompts, whose classes are all there, the images of each class, if there are
        enough.

        Args:
            features (`Mapping[int, Tensor]`): What `self.features` was after `measure`.
            resamples (`int`): Of the prompts; none with 0.
            of_teacher (`bool`): Whether it is the teacher that was measured: compared with itself it has no interval.
            level (`float`): The share of intervals that contain the true value.
        """
        found: dict[str, tuple[float, float]] = {}
        groups = groups_of(self.prompts)
        takes_prompts = self._family is None or self._family.takes_prompts
        is_within = not takes_prompts and len(groups) and groups.bincount().min() >= ENOUGH_IN_A_CLASS
        if not resamples or not len(groups) or (groups.max() == 0 and not is_within):
            return found
        resample = within_groups if is_within else whole_groups
        for number, own in features.items():
            evaluator = self.evaluators[number]
            assert isinstance(evaluator, FeatureEvaluator)
            if not (of_teacher and self.is_own_reference(evaluator)):
                reference = evaluator.teacher_features
                found |= confidence_intervals(
                    evaluator, own, groups, resamples, level=level, reference=reference, resample=resample
                )
        return found

    def is_own_reference(self, evaluator: Evaluator) -> bool:
        """Whether the teacher is compared with the very images that it is measured by."""
        return evaluator.compares_with_teacher and not (_compares_distributions(evaluator) and self._has_others)

    def _bar(self, what: str, total: int, unit: str) -> tqdm:
        """A progress bar that is gone when all is done, and not seen at all if that is at once."""
        hidden = not self.show_progress
        return tqdm(total=total, desc=what, unit=unit, leave=False, delay=2, disable=hidden, file=sys.stderr)


def _compares_distributions(evaluator: Evaluator) -> bool:
    # Evaluators are known by what they do, and need not be of our class.
    return bool(getattr(evaluator, "compares_distributions", False))


__all__ = [
    "EVALUATORS",
    "DriftEvaluator",
    "Evaluation",
    "Evaluator",
    "FeatureEvaluator",
    "FrechetDistance",
    "Metric",
    "check_evaluators",
    "cosine_diversity",
    "make_evaluators",
    "write_reference_statistics",
]
