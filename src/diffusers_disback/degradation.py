"""Stage 1: the fake score walks from the teacher to the initial generator, and nodes of its way are kept."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .data.conditions import ConditionSource
from .families import ModelFamily
from .hub.files import writing
from .models.batch import Batch
from .models.generator import OneStepGenerator
from .path.node_spacing import FAR_START, candidate_steps, earliest_end, is_far, is_flat
from .path.path import DegradationPath
from .training.config import DegradationConfig, TrainingConfig
from .training.probe import MismatchProbe, denoising_losses, mean, predictions
from .training.scores import scores_of
from .training.stage import Stage


class DegradationRecorder(Stage):
    """DisBack, Algorithm 1: fits a copy of the teacher to the frozen initial generator's samples.

    Args:
        config (`TrainingConfig`): What both stages share.
        degradation (`DegradationConfig`): The settings of this stage.
        family (`ModelFamily`): The teacher.
        generator (`nn.Module`): The initial generator's network; frozen. The teacher's own, if all roles are adapters and
            it is the start.
        data (`ConditionSource`): What samples are conditioned on.
        path (`DegradationPath`): Where nodes are recorded; empty, or of a recording that is resumed.
        recorded (`Callable`, *optional*): Called on the main process when there is something new in the path's folder.
        inputs (`dict[str, str]`, *optional*): As of `Stage`.
    """

    name = "degradation"
    number = 1
    own_class = DegradationConfig

    def __init__(
        self,
        config: TrainingConfig,
        degradation: DegradationConfig,
        family: ModelFamily,
        generator: nn.Module,
        data: ConditionSource,
        path: DegradationPath,
        recorded: Callable[[], None] | None = None,
        inputs: dict[str, str] | None = None,
    ):
        self.path = path
        self.degradation = degradation
        self.recorded = recorded or (lambda: None)
        self.node_steps = degradation.node_steps
        self.measured_steps = set(self.node_steps)
        if degradation.degradation_stop or degradation.num_path_nodes == "auto":
            self.measured_steps |= set(candidate_steps(degradation.degradation_steps))
        self.loss_history: list[dict[str, Any]] = []  # the fake score's denoising loss in each band, step by step
        updates = degradation.degradation_steps
        warmup_steps = min(config.lr_warmup_steps, updates // 10)
        own = replace(config, lr_warmup_steps=warmup_steps)
        self.earliest_end = earliest_end(updates, warmup_steps)
        self.judged_step: int | None = None  # after which it is judged how far the start is
        if degradation.num_path_nodes == "auto":
            self.judged_step = min(step for step in self.measured_steps if step >= self.earliest_end)
            self.node_steps = [step for step in self.node_steps if step >= self.judged_step]
        rate = degradation.degradation_lr_multiplier * config.fake_score_learning_rate
        scores = scores_of(config)(family, own, rate, updates)
        self.fake_score = scores.fake_score
        super().__init__(
            config,
            degradation,
            family,
            data,
            [self.fake_score],
            steps=degradation.degradation_steps,
            batches_per_step=1,
            proportion_empty=degradation.proportion_empty_prompts,
            inputs=inputs,
        )
        self.generator = OneStepGenerator(scores.frozen(generator), self.config.conditioning_timestep)
        self.probe = MismatchProbe(config, family, data, self.accelerator.device)
        self._loss_since_node = torch.zeros((), device=self.accelerator.device)

    def train_step(self, step: int, batches: list[list[Batch]]) -> dict[str, Tensor]:
        (first,) = batches
        loss = self.update_fake_score(first, self.samples(first))
        self._loss_since_node = self._loss_since_node + loss
        return {"fake_score_loss": loss}

    def after_step(self, done: int) -> None:
        if done not in self.measured_steps:
            return
        self.check_finite()
        self.measure(done)
        loss = mean(self.loss_history[-1]["losses"])
        self.accelerator.log({f"{self.name}/denoising_loss": loss}, step=done)
        is_near = self.begins_near()
        if done == self.judged_step:
            ratio = mean(self.loss_history[0]["losses"]) / loss
            self.notify(
                f"on the initial student's samples the teacher's denoising loss is {ratio:.3g} times the fake score's (a start is "
                f"far above {FAR_START:g}): {'there will be no path' if is_near else 'a path is recorded'}"
            )
        if is_near:
            self.steps = done
            return
        if self.has_flattened() and done < self.steps:
            self.notify(f"the denoising loss, {loss:.4g}, has flattened after {done} steps")
            self.steps = done
        if done in self.node_steps or done == self.steps:
            self.append(done)

    def measure(self, done: int) -> None:
        """Measures the fake score's denoising loss on the initial student's samples; after 0 steps it is the teacher's."""
        batches = self.probe.sample(self.generator)
        outputs = predictions(self.fake_score.score_model(self.family), batches)
        self.loss_history.append({"step": done, "losses": self.agreed(denoising_losses(batches, outputs))})

    def begins_near(self) -> bool:
        """Whether the initial student was found to be near the teacher, so that stage 1 has come to its end, without a node."""
        losses = {row["step"]: mean(row["losses"]) for row in self.loss_history}
        return self.judged_step in losses and not is_far(losses[0], losses[self.judged_step])

    def has_flattened(self) -> bool:
        """Whether stage 1 has come to its end by itself."""
        steps, losses = [row["step"] for row in self.loss_history], [mean(row["losses"]) for row in self.loss_history]
        return is_flat(steps, losses, self.degradation.degradation_stop, self.earliest_end)

    def append(self, done: int) -> None:
        """Records a node, with its own loss and the teacher's in each band."""
        with self.fake_score.deployed() as network:
            if self.accelerator.is_main_process:
                self._append(network, done)
        self.accelerator.wait_for_everyone()
        self._loss_since_node = torch.zeros_like(self._loss_since_node)

    def _append(self, network: nn.Module, done: int) -> None:
        since = done - (self.path.nodes[-1]["step"] if self.path.nodes else 0)
        measured = {
            "denoising_loss": self.loss_history[-1]["losses"],
            "teacher_denoising_loss": self.loss_history[0]["losses"],
        }
        loss = (self._loss_since_node / since).item()
        with writing(self.path.folder):
            self.path.append(network, done, loss, self.fake_score.adapter, self.node_dtype, measured)
        self.recorded()

    @property
    def node_dtype(self) -> torch.dtype:
        """In which nodes are written."""
        asked = self.config.node_precision or ("fp32" if self.fake_score.adapter is None else "fp16")
        return {"fp32": torch.float32, "fp16": torch.float16}[asked]

    def record(self) -> DegradationPath:
        """Stage 1, whole or resumed. Returns the complete path; the fake score's memory is free again."""
        self.run()
        if self.accelerator.is_main_process:
            if self.rate_changes:  # its settings stay those that it was begun with
                self.path.manifest["rate_changes"] = self.rate_changes
            self.path.finish(self.summary())
            self.recorded()
        self.accelerator.wait_for_everyone()
        self.path.reread()
        self.fake_score.release()
        return self.path

    def resume(self) -> int:
        done = super().resume()
        if self.accelerator.is_main_process:
            self.path.begin(done)
            self.recorded()
        self.accelerator.wait_for_everyone()
        self.path.reread()
        reached = {step for step in (*self.node_steps, self.steps) if step <= done}  # it may have stopped between two
        expected = [] if self.begins_near() else sorted(reached)
        if [node["step"] for node in self.path.nodes] != expected:
            raise ValueError(
                f"{self.path.folder} has the nodes of steps {[node['step'] for node in self.path.nodes]}, but at step "
                f"{done} this recording had {expected}. Record the path again, in another --output_dir."
            )
        if done == 0:
            self.measure(0)
        return done

    def state(self) -> dict[str, Any]:
        return {"loss_since_node": self._loss_since_node.item(), "loss_history": self.loss_history}

    def load_state(self, state: dict[str, Any]) -> None:
        self._loss_since_node = torch.full_like(self._loss_since_node, state["loss_since_node"])
        self.loss_history = state[
            "loss_history" if "loss_history" in state else "walk"
        ]  # which version 0.1.0 called it
        if self.begins_near() or self.has_flattened():
            self.steps = state["step"]
