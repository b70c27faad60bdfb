"""Stage 2: the generator is distilled against the path in reverse, node by node, until the target is the teacher."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from .data.conditions import ConditionSource
from .data.images import RealImages
from .families import ModelFamily
from .models.batch import Batch
from .models.generator import OneStepGenerator
from .models.score_model import ScoreModel
from .path.nodes import digest_of
from .path.path import DegradationPath
from .path.target_schedule import Measure
from .training.config import BacktrackingConfig, TrainingConfig, guidance_of_node, loss_scale, target_schedule
from .training.discriminator import discriminator_of, frozen
from .training.learner import Learner
from .training.probe import MismatchProbe, ProbeBatch, compare, mean, mismatches, predictions
from .training.results import BacktrackingResult
from .training.scores import scores_of
from .training.stage import Stage
from .training.validation import Validation


class BacktrackingTrainer(Stage):
    """Trains the one-step generator by DisBack, Algorithm 2.

    The fake score starts at the path's last node, N; the targets are N-1, ..., 1 and then 0, the teacher.

    Args:
        config, family, data, inputs: As of `Stage`.
        backtracking (`BacktrackingConfig`): The settings of this stage.
        generator (`nn.Module`): The initial generator's network; it is trained in place. The teacher's own, if all roles
            are adapters and it is the start: then it is left as it is.
        path (`DegradationPath`): The complete path; or `None`, for none.
        evaluate (`Callable`, *optional*): Network -> measures; called every `validation_steps` and at the end, on every
            process; the main one's are kept.
        initial_measures (`dict`, *optional*): What it gave of the initial generator: the curve's first row.
        images (`RealImages`, *optional*): That a discriminator learns from; needed if the settings ask for one.
        validation (`Validation`, *optional*): What follows from `evaluate`, on the main process.
    """

    name = "backtracking"
    number = 2
    own_class = BacktrackingConfig

    def __init__(
        self,
        config: TrainingConfig,
        backtracking: BacktrackingConfig,
        family: ModelFamily,
        generator: nn.Module,
        data: ConditionSource,
        path: DegradationPath | None,
        evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
        initial_measures: dict[str, float] | None = None,
        inputs: dict[str, str] | None = None,
        images: RealImages | None = None,
        validation: Validation | None = None,
    ):
        self.config = config
        self.backtracking = backtracking
        self.path = path or None  # one without nodes is none
        self.fake_score_guidance = backtracking.training_guidance_of_fake_score
        self.evaluate = evaluate
        self.validates = evaluate is not None
        self.validation = validation
        self.schedule = target_schedule(backtracking, 0 if path is None else len(path))
        self.measures: list[Measure] = []
        updates = backtracking.max_train_steps * backtracking.fake_score_updates
        # A checkpoint has the fake score's weights, and node N is not needed then.
        self.scores = scores_of(config)(
            family, config, config.fake_score_learning_rate, updates, path, loads=self.checkpoint is None
        )
        self.fake_score = self.scores.fake_score
        self.student = self.scores.student(generator, backtracking)
        self.images = images
        self.discriminator = discriminator_of(config, self.fake_score, family, data, updates, images)
        learners = [one for one in (self.student, self.fake_score, self.discriminator) if one is not None]
        counts = {"steps": backtracking.max_train_steps, "batches_per_step": backtracking.fake_score_updates}
        super().__init__(config, backtracking, family, data, learners, **counts, inputs=inputs)
        self.generator = OneStepGenerator(self.student.score_model(family), self.config.conditioning_timestep)
        self.scores.add_target()
        self.probe = MismatchProbe(config, family, data, self.accelerator.device)
        self.waits: list[dict[str, float]] = []  # for nodes, at each switch
        if initial_measures is not None:
            self.curve.append({"step": 0, "seconds": 0.0, "node": self.schedule.node(0), **initial_measures})

    # DisBack, Algorithm 2 ------------------------------------------------------------------------------------------

    def train(self) -> nn.Module:
        """Runs stage 2, whole or resumed. Returns the student's network, averaged if an average is kept; an adapter is fused
        into a copy of what it was trained on, and stays in `student.lora`."""
        self.run()  # for each step: train_step
        if self.validation is not None:
            self.validation.choose(self.student, self.curve)
        student = self.student.publish()
        if self.scores.shared is not None:
            self.scores.shared.release()
        return student

    def train_step(self, step: int, batches: list[list[Batch]]) -> dict[str, Tensor]:
        self.switch_target(step)
        first, *others = batches
        self._make_room_for(self.student)
        samples, generator_loss = self.update_generator(first, loss_scale(step, self.backtracking))
        self._make_room_for(self.fake_score)
        fake_score_losses = [self.update_fake_score(first, samples)]
        for batch in others:
            fake_score_losses.append(self.update_fake_score(batch, self.samples(batch)))
        losses = {"generator_loss": generator_loss, "fake_score_loss": torch.stack(fake_score_losses).mean()}
        return losses if self.discriminator is None else losses | self.discriminator.take_losses()

    def switch_target(self, step: int) -> None:
        """Makes the scheduled node the target, if it is not the target already."""
        node = self.schedule.node(step, self.measures)
        if node == self.target_node:
            return
        self.fill_target(node)
        waited = 0.0
        if self.path is not None:
            waited = self.path.seconds_waited if node else 0.0
            self.path.move_on(len(self.path) if self.target_node is None else self.target_node, node)
        self.target_node = node
        self.waits.append({"step": step, "node": node, "seconds": round(waited, 3)})
        self.target.guidance_scale = guidance_of_node(node, self.schedule.num_nodes, self.backtracking)
        self.notify(
            f"target of step {step} is node {node} of {self.schedule.num_nodes}"
            f"{', the teacher' if node == 0 else ''}, with guidance {self.target.guidance_scale:g}; waited {waited:.2f} s"
        )
        self.accelerator.log({f"{self.name}/seconds_waited_for_node": waited}, step=step)

    def update_generator(self, batches: list[Batch], scale: float = 1.0) -> tuple[list[Tensor], Tensor]:
        """Updates the generator once, by `scale` times its loss. Returns the samples that it was made with, detached, and the
        mean loss, neither scaled nor with the adversarial term."""
        samples, losses = [], []
        for batch in batches:
            # The fake score is frozen around the backward pass, too, which may recompute its forward pass.
            with self.student.accumulate(), frozen(self.fake_score, self.family, self.discriminator) as fake_score:
                x0 = self.generator(batch.noise, batch.condition)  # [B, C, H, W]
                fake_score.guidance_scale = self.backtracking.fake_score_guidance_scale
                loss = self.objective.generator_loss(x0, batch, self.target, fake_score)
                term = 0.0 if self.discriminator is None else self.discriminator.generator_loss(x0, batch, fake_score)
                self.student.backward_and_step(scale * (loss + term))
            samples.append(x0.detach())
            losses.append(loss.detach())
        return samples, torch.stack(losses).mean()

    # The target ----------------------------------------------------------------------------------------------------

    @property
    def target(self) -> ScoreModel:
        """The node that the generator is distilled against."""
        return self.scores.target

    def fill_target(self, node: int) -> None:
        """Makes the target a node of the path; 0 is the teacher."""
        self.scores.fill_target(node)

    @contextmanager
    def other_target(self, node: int) -> Iterator[None]:
        """Puts another node in the target's place for as long as it is measured."""
        with self.scores.kept_target():
            self.fill_target(node)
            yield

    def _make_room_for(self, learner: Learner) -> None:
        """Offloads what a learner's turn does not need to the CPU, if that was asked for."""
        if not self.config.offload_idle_role:
            return
        other = self.fake_score if learner is self.student else self.student
        other.place_optimizer("cpu")
        learner.place_optimizer(self.accelerator.device)
        self.scores.place_target(self.accelerator.device if learner is self.student else "cpu")

    # Measures ------------------------------------------------------------------------------------------------------

    def after_step(self, done: int) -> None:
        """Measures the mismatch that the adaptive schedule decides by, equal on every process."""
        node = self.target_node
        if not self.schedule.needs_measures or not node or done % self.backtracking.mismatch_every:
            return
        self._make_room_for(self.student)  # the target is on the device in the student's turn
        batches = self.probe.sample(self.generator)
        fake_score = self._fake_score_predictions(batches)
        mismatch = mean(mismatches(batches, fake_score, predictions(self.target, batches)))
        with self.other_target(node - 1):
            next_mismatch = mean(mismatches(batches, fake_score, predictions(self.target, batches)))
        mismatch, next_mismatch = self.agreed([mismatch, next_mismatch])
        self.measures.append(Measure(done, node, mismatch, next_mismatch))
        measured = {f"{self.name}/mismatch": mismatch, f"{self.name}/next_mismatch": next_mismatch}
        self.accelerator.log(measured, step=done)

    def _fake_score_predictions(self, batches: list[ProbeBatch]) -> list[Tensor]:
        return predictions(self.fake_score.score_model(self.family), batches, self.fake_score_guidance)

    def mismatch(self, node: int) -> dict[str, float]:
        """Returns the losses of fake score, target (`node`) and teacher, and both mismatches, on the student's samples."""
        if self.target_node is None:  # of a run that is resumed at its end
            self.fill_target(node)
        self._make_room_for(self.student)  # the target is on the device in the student's turn
        batches = self.probe.sample(self.generator)
        fake_score = self._fake_score_predictions(batches)
        target = teacher = predictions(self.target, batches)
        if node:
            with self.other_target(0):
                teacher = predictions(self.target, batches)
        return compare(batches, fake_score, target, teacher)

    def validate(self, done: int) -> dict[str, float]:
        node = self.schedule.node(done - 1, self.measures)
        with self.student.deployed() as network:
            measures = {} if self.evaluate is None else self.evaluate(network)
        asks = self.accelerator.is_main_process or self.scores.is_collective
        mismatch = self.mismatch(node) if asks else {}
        return {"node": node, **measures, **mismatch}

    def result(self) -> BacktrackingResult:
        """What the stage found out, for report and card."""
        measures = [asdict(measure) for measure in self.measures]
        switches = self.schedule.switches(self.measures)  # those to come as they will be at the latest
        found = (self.summary(), self.curve, switches, self.waits, measures, self.rate_changes)
        given = (self.curve, self.steps, self.backtracking.max_train_steps)
        outcome = {} if self.validation is None else self.validation.outcome(*given)
        return BacktrackingResult(*found, self.accelerator.mixed_precision, self.student.lora, outcome)

    # Checkpoints ---------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        downloaded = self.path.folders.downloaded if self.path is not None else []
        return {"waits": self.waits, "downloaded": downloaded, "measures": [asdict(m) for m in self.measures]}

    def load_state(self, state: dict[str, Any]) -> None:
        self.waits = state["waits"]
        self.measures = [Measure.from_state(measure) for measure in state["measures"]]
        if self.path is not None:
            self.path.folders.downloaded = state["downloaded"]

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "path": digest_of([] if self.path is None else self.path.nodes)}

    def release(self) -> None:
        """Lets go of all networks, when the student was saved; figures stay."""
        del self.generator
        self.scores.release()
        for learner in self.learners:
            learner.release()
