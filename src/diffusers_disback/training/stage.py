"""What the two stages share: the resumable loop."""

import shutil
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm.auto import tqdm

from ..data.conditions import Batches, ConditionSource, Draw, batch_of
from ..data.images import RealImages
from ..families import ModelFamily
from ..hub.files import writing
from ..models.batch import Batch, to_device
from ..models.generator import OneStepGenerator
from ..objectives import make_objective
from .checkpoint import read_state
from .config import TrainingConfig
from .defaults import with_defaults
from .discriminator import DiscriminatorLearner
from .learner import Learner
from .processes import decided_by_main, peak_memory_mb
from .run_folder import RunFolder
from .settings.fields import Settings, values
from .sharding import is_sharded
from .signals import SignalHandler, signal_handler
from .validation import Validation, measured_by


class Stage(ABC):
    """A resumable loop. Stage 1 is stage 2 without an update of the generator.

    One step takes `batches_per_step` global batches, which are functions of the step: a resumed run equals an unbroken
    one, bit for bit.

    Args:
        config (`TrainingConfig`): What both stages share.
        own (`DegradationConfig` or `BacktrackingConfig`): The stage's own settings; of `own_class`.
        family (`ModelFamily`): The teacher.
        data (`ConditionSource`): What samples are conditioned on.
        learners (`list[Learner]`): The trained networks.
        steps (`int`): Steps of the stage.
        batches_per_step (`int`): Global batches of a step.
        proportion_empty (`float`): Share of samples whose condition is dropped.
        inputs (`dict[str, str]`, *optional*): Hashes of what the run is made from, to be written down with its settings.

    Attributes:
        rate_changes (`list[dict]`): Of a run that was resumed with another learning rate: from which step on, whose, and
            what it was and is.
    """

    name: str
    number: int
    own_class: type[Settings]

    def __init__(
        self,
        config: TrainingConfig,
        own: Settings,
        family: ModelFamily,
        data: ConditionSource,
        learners: list[Learner],
        steps: int,
        batches_per_step: int,
        proportion_empty: float = 0.0,
        inputs: dict[str, str] | None = None,
    ):
        self.config = config = with_defaults(config, family)
        self.inputs = inputs
        self.rate_changes: list[dict[str, Any]] = []
        self.settings = values(config, TrainingConfig) | values(own, self.own_class)
        self.family = family
        self.data = data
        self.learners = learners
        self.accelerator = learners[0].accelerator
        self.steps = steps
        self.batches_per_step = batches_per_step
        self.objective = make_objective(config.objective, config.objective_args, config.timestep_sampling_law)
        self.folder = RunFolder(config.output_dir)
        self.batches = Batches(
            len(data),
            family.latent_shape(config.resolution),
            config.seed,
            self.number,
            config.train_batch_size,
            config.gradient_accumulation_steps,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            proportion_empty,
        )
        self.seconds = 0.0
        self.peak_memory_mb = 0.0
        self.curve: list[dict[str, float]] = []
        self._first_bad_step: dict[str, Tensor] = {}
        self._totals: dict[str, Tensor] = {}
        self._counted = 0
        self._signals: Tensor | None = None
        self._validated: int | None = None

    # What a stage is ---------------------------------------------------------------------------------------------

    generator: OneStepGenerator
    fake_score: Learner
    fake_score_guidance = 1.0  # in its own loss
    discriminator: DiscriminatorLearner | None = None
    images: RealImages | None = None  # that it learns from
    student: Learner  # of stage 2
    target_node: int | None = None
    validation: Validation | None = None  # on the main process, of a stage that validates

    @abstractmethod
    def train_step(self, step: int, batches: list[list[Batch]]) -> dict[str, Tensor]:
        """One step on `batches_per_step` global batches of slices. Returns losses, on their device."""

    def after_step(self, done: int) -> None:  # noqa: B027
        """What happens after `done` steps, before anything is logged or saved. It may make `done` the last: `steps`."""

    validates = False

    def validate(self, done: int) -> dict[str, float]:
        """Measures of the student after `done` steps, if `validates`; asked on every process, which share the sampling."""
        return {}

    def identity(self) -> dict[str, Any]:
        """What, besides the settings, has to be the same for a checkpoint to be resumed."""
        launch = {"num_processes": self.accelerator.num_processes, "is_sharded": is_sharded() or None}
        return {**launch, **measured_by(self.config)}

    def state(self) -> dict[str, Any]:
        """What a stage adds to a checkpoint's `stage.json`."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Takes back what `state` gave."""

    # What both do ------------------------------------------------------------------------------------------------

    def update_fake_score(self, batches: list[Batch], samples: list[Tensor]) -> Tensor:
        """One denoising-score-matching update on detached samples, and one of the discriminator, if there is one. Returns the
        mean denoising loss."""
        losses = []
        for batch, x0 in zip(batches, samples, strict=True):
            with self.fake_score.accumulate():
                fake_score = self.fake_score.score_model(self.family)
                if self.discriminator is not None:
                    self.discriminator.update(x0, batch, fake_score)
                fake_score.guidance_scale = self.fake_score_guidance
                loss = self.objective.fake_score_loss(x0, batch, fake_score)
                self.fake_score.backward_and_step(loss)
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    @torch.no_grad()
    def samples(self, batches: list[Batch]) -> list[Tensor]:
        """The generator's samples, without a graph."""
        return [self.generator(batch.noise, batch.condition) for batch in batches]  # each [B, C, H, W]

    @cached_property
    def checkpoint(self) -> Path | None:
        """The whole checkpoint to go on from, the same on every process; `None` to begin at the start."""
        folder = RunFolder(self.config.output_dir)
        return decided_by_main(lambda: folder.checkpoint_to_resume(self.name, self.config.resume_from_checkpoint))

    def resume(self) -> int:
        """Goes on from a checkpoint, if that was asked for and there is one. Returns the steps done."""
        checkpoint = self.checkpoint
        if checkpoint is None:
            return 0
        state = read_state(checkpoint)
        changed = {
            k: (state["identity"].get(k), v) for k, v in self.identity().items() if state["identity"].get(k) != v
        }
        if changed:
            what = "; ".join(f"{name} was {was}, is {is_}" for name, (was, is_) in changed.items())
            raise ValueError(f"{checkpoint} cannot be resumed: {what}.")
        if state["step"] > self.steps:
            raise ValueError(f"{checkpoint} is at step {state['step']}, beyond the {self.steps} steps asked for.")
        for learner in self.learners:
            learner.load(checkpoint)
        self.seconds, self.peak_memory_mb, self.curve = state["seconds"], state["peak_memory_mb"], state["curve"]
        self.rate_changes = state.get("rate_changes", [])
        self._keep_learning_rates(state["step"])
        self.load_state(state)
        self.notify(f"going on from {checkpoint}")
        return state["step"]

    def _keep_learning_rates(self, step: int) -> None:
        """Takes the learning rates of the settings in place of a checkpoint's, and says so if they are others."""
        for learner in self.learners:
            was, is_ = learner.keep_learning_rate(), learner.learning_rate
            if was is not None:
                self.rate_changes.append({"step": step, "of": learner.name, "was": was, "is": is_})
                self.notify(f"from step {step} on the learning rate of the {learner.name} is {is_:g}; it was {was:g}")

    def run(self) -> None:
        """All steps, from the start or from a checkpoint."""
        resumes = self.checkpoint is not None  # of which a refusal changes nothing in the folder
        if self.accelerator.is_main_process and not resumes:
            self.folder.claim(self.name, self.settings, self.inputs)
        first = self.resume()
        if self.accelerator.is_main_process:
            if resumes:
                self.folder.claim(self.name, self.settings, self.inputs)
            self.folder.clear_drafts(self.name)
            if self.validation is not None:
                self.validation.begin(self.checkpoint)
        tracked = {k: v for k, v in self.settings.items() if isinstance(v, (int, float, str, bool))}
        self.accelerator.init_trackers(self.config.tracker_project_name, tracked)
        if self.accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        numbers = range(first * self.batches_per_step, self.steps * self.batches_per_step)
        loader = iter(self.batches.loader(numbers, self.config.dataloader_num_workers))
        bar = tqdm(
            total=self.steps,
            initial=first,
            desc=self.name,
            unit="step",
            disable=not self.accelerator.is_local_main_process,
        )
        handler = signal_handler()
        try:
            with handler.held():
                self._train(first, loader, bar, handler)
        finally:
            bar.close()
        self.check_finite()
        if self.validates and self._validated != self.steps:
            self._validate(self.steps)
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def _train(self, first: int, loader: Iterator[list[Draw]], bar: tqdm, handler: SignalHandler) -> None:
        """The steps from `first` on. A signal ends them after a step, with a checkpoint.

        Raises:
            Interrupted: After a signal.
        """
        if self.validates and 0 < first < self.steps and first % self.config.validation_steps == 0:
            with handler.held(False):
                self._validate(first)  # which the checkpoint does not know of
        started = time.monotonic()
        for step in range(first, self.steps):
            done = step + 1
            draws = [next(loader) for _ in range(self.batches_per_step)]
            losses = self.train_step(step, [[self._batch(draw) for draw in slices] for slices in draws])
            norms = {f"{learner.name}_gradient_norm": learner.gradient_norm for learner in self.learners}
            self._watch(step, losses | norms)
            self.after_step(done)
            bar.update()
            if done % self.config.logging_steps == 0 or done == self.steps:
                self._log(done, bar)
            validates = self.validates and done % self.config.validation_steps == 0 and done < self.steps
            saves = done % self.config.checkpointing_steps == 0 or done == self.steps
            saves = saves or (validates and self.target_node == 0 and self._stops(more=1))
            if saves or validates:
                self.seconds += time.monotonic() - started
                if saves:
                    self._save(done)
                started = time.monotonic()
            if self._has_to_end(handler, is_last=done == self.steps):
                if not saves:
                    self.seconds += time.monotonic() - started
                    self._save(done)
                handler.raise_if_received()
            if validates:  # after it was saved: it may take long, and does not have to be waited for
                with handler.held(False):
                    self._validate(done)
                started = time.monotonic()
            if done == self.steps:  # a stage may have put its end nearer
                break

    def _has_to_end(self, handler: SignalHandler, is_last: bool) -> bool:
        """Whether any process had a signal. Of several, each learns of it a step later, so that none waits for its device;
        and all at the same step."""
        if not handler.is_installed:
            return False
        if self.accelerator.num_processes > 1:
            own = torch.tensor([handler.received or 0], device=self.accelerator.device)
            before, self._signals = self._signals, self.accelerator.gather(own)
            known = self._signals if is_last or before is None else before
            handler.received = handler.received or int(known.max()) or None
            return bool(known.any())
        return handler.received is not None

    def notify(self, what: str) -> None:
        """Prints a line above the progress bar, on the main process."""
        if self.accelerator.is_main_process:
            tqdm.write(f"{self.name}: {what}", file=sys.stderr)

    def agreed(self, values: list[Any]) -> list[Any]:
        """The main process's values, on every process."""
        return broadcast_object_list(values)

    def summary(self) -> dict[str, float]:
        """Steps, seconds (evaluation and saving apart) and the peak of memory in MB."""
        return {
            "steps": self.steps,
            "seconds": round(self.seconds, 2),
            "peak_memory_mb": round(max(self.peak_memory_mb, peak_memory_mb(self.accelerator.device)), 1),
        }

    def check_finite(self) -> None:
        """Stops the run if a loss or a gradient was not finite on any process since the last look.

        Raises:
            FloatingPointError: With its name and its first bad step.
        """
        for name, first in self._first_bad_step.items():
            steps = self.accelerator.gather(first.reshape(1))
            bad = steps[steps >= 0]
            if len(bad):
                raise FloatingPointError(
                    f"{self.name}: {name} was not finite at step {int(bad.min())}. Nothing was saved after it. Go on "
                    "from the last checkpoint with --resume_from_checkpoint latest and a lower --generator_learning_rate or "
                    "--fake_score_learning_rate, which a resumed run may change, or with bf16 instead of fp16."
                )

    def _batch(self, draw: Draw) -> Batch:
        batch = batch_of(draw, self.data, self.accelerator.device)
        if self.images is not None:
            batch.real = to_device(self.images.samples(draw), self.accelerator.device)
        return batch

    def _watch(self, step: int, losses: dict[str, Tensor]) -> None:
        """Adds up losses and notes the first bad step, without waiting for the device."""
        for name, loss in losses.items():
            first = self._first_bad_step.setdefault(name, torch.full_like(loss, -1.0))
            self._first_bad_step[name] = torch.where((first < 0) & ~torch.isfinite(loss), float(step), first)
            self._totals[name] = self._totals.get(name, 0) + loss
        self._counted += 1

    def _log(self, done: int, bar: tqdm) -> None:
        self.check_finite()
        means = {name: (total / self._counted).item() for name, total in self._totals.items()}
        self._totals, self._counted = {}, 0
        rates = {f"{learner.name}_lr": learner.lr_schedule.get_last_lr()[0] for learner in self.learners}
        bar.set_postfix({name: f"{value:.4g}" for name, value in means.items() if name.endswith("loss")})
        self.accelerator.log({f"{self.name}/{k}": v for k, v in (means | rates).items()}, step=done)

    def _validate(self, done: int) -> None:
        self.check_finite()
        measures = self.validate(done)
        if self.accelerator.is_main_process:
            self.curve.append({"step": done, "seconds": round(self.seconds, 2), **measures})
            self.accelerator.log({f"{self.name}/{k}": v for k, v in measures.items()}, step=done)
            if self.validation is not None:
                given = (self.name, self.curve, self.student, self.steps, self.notify)
                self.accelerator.log(self.validation.judge(*given), step=done)
        self._validated = done
        self.accelerator.wait_for_everyone()
        if done < self.steps and self._stops():
            self.notify(f"ends at step {done}: {self.config.metric_for_best_model} has not improved for long enough")
            self.steps = done

    def _stops(self, more: int = 0) -> bool:
        """Whether training ends early, on every process; or would, after `more` validations that do not improve the metric."""
        if self.config.early_stopping_patience is None:
            return False
        return self.agreed([self.validation is not None and self.validation.stops(self.curve, more)])[0]

    def _save(self, done: int) -> None:
        self.check_finite()
        draft = self.folder.draft_of_checkpoint(self.name, done)
        if self.accelerator.is_main_process:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        try:
            with writing(draft):
                for learner in self.learners:
                    learner.save(draft)
                if self.validation is not None:
                    self.validation.add_to(draft)
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                state = {"step": done, "identity": self.identity(), **self.summary(), "curve": self.curve}
                state |= {**self.state(), "rate_changes": self.rate_changes}
                self.folder.finish_checkpoint(self.name, done, state, self.config.checkpoints_total_limit)
        except OSError:
            shutil.rmtree(draft, ignore_errors=True)  # of a full disk it may be the larger part
            raise
        self.accelerator.wait_for_everyone()
