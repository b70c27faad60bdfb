"""Stage 1: the fake score walks from the teacher to the initial generator, and its footprints are kept."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapters import SharedNetwork
from .batch import Batch
from .config import TrainingConfig, setting
from .data import PromptData
from .families import ModelFamily
from .generator import OneStepGenerator
from .learner import AdapterLearner, Learner, add_adapter, shared_base
from .path import DegradationPath
from .trainer import Stage


@dataclass
class DegradationConfig:
    """The settings of stage 1.

    Raises:
        ValueError: If there are more nodes than steps.
    """

    degradation_steps: int = setting(
        1000, "Fake-score updates of stage 1. DisBack, for SDXL: 1,000 (its scripts; the paper's are not known to us)."
    )
    num_path_nodes: int = setting(
        10,
        "N, the nodes recorded, evenly spaced. DisBack, for SDXL: 10. 0 records nothing: plain DMD or Diff-Instruct.",
    )
    proportion_empty_prompts: float = setting(
        0.1,
        "Share of stage 1's prompts that are dropped, if a node is used with guidance: without it a node's "
        "unconditional branch is never fitted.",
    )

    def __post_init__(self):
        if self.num_path_nodes < 0:
            raise ValueError(f"--num_path_nodes has to be at least 0, but is {self.num_path_nodes}.")
        if self.num_path_nodes > self.degradation_steps:
            raise ValueError(
                f"--num_path_nodes {self.num_path_nodes} is more than --degradation_steps {self.degradation_steps}: "
                "there is at most one node per step."
            )
        if not 0 <= self.proportion_empty_prompts < 1:
            raise ValueError(
                f"--proportion_empty_prompts has to be in [0, 1), but is {self.proportion_empty_prompts}."
            )

    @property
    def node_steps(self) -> list[int]:
        """The steps after which nodes 1..N are recorded; the last is the last step."""
        nodes, steps = self.num_path_nodes, self.degradation_steps
        return [round(i * steps / nodes) for i in range(1, nodes + 1)]


class DegradationRecorder(Stage):
    """DisBack, Algorithm 1: fits a copy of the teacher to the frozen initial generator's samples.

    Args:
        config (`TrainingConfig`): What both stages share.
        degradation (`DegradationConfig`): The settings of this stage.
        family (`ModelFamily`): The teacher.
        generator (`nn.Module`): The initial generator's network; frozen. The teacher's own, if all roles are adapters and
            it is the start.
        data (`PromptData`): Prompts and their conditions.
        path (`DegradationPath`): Where nodes are recorded; empty, or of a recording that is resumed.
        recorded (`Callable`, *optional*): Called on the main process when there is something new in the path's folder.
    """

    name = "degradation"
    number = 1

    def __init__(
        self,
        config: TrainingConfig,
        degradation: DegradationConfig,
        family: ModelFamily,
        generator: nn.Module,
        data: PromptData,
        path: DegradationPath,
        recorded: Callable[[], None] | None = None,
    ):
        self.path = path
        self.recorded = recorded or (lambda: None)
        self.node_steps = degradation.node_steps
        updates, rate = degradation.degradation_steps, config.fake_score_learning_rate
        shared: SharedNetwork | None = None
        if config.is_adapter("fake_score"):
            shared = shared_base(family.network, config)
            add_adapter(shared, "fake_score", config, config.seed)
            self.fake_score: Learner = AdapterLearner("fake_score", shared, family.network, rate, updates, config)
        else:
            self.fake_score = Learner("fake_score", family.score_model().copy().network, rate, updates, config)
        super().__init__(
            config,
            degradation,
            family,
            data,
            [self.fake_score],
            steps=degradation.degradation_steps,
            batches_per_step=1,
            proportion_empty_prompts=degradation.proportion_empty_prompts,
        )
        if generator is family.network:
            model = self.on_base(shared, None)
        else:
            model = self.frozen(generator.to(self.accelerator.device))
        self.generator = OneStepGenerator(model, config.conditioning_timestep)
        self._loss_since_node = torch.zeros((), device=self.accelerator.device)

    def train_step(self, step: int, batches: list[list[Batch]]) -> dict[str, Tensor]:
        (first,) = batches
        loss = self.update_fake_score(first, self.samples(first))
        self._loss_since_node = self._loss_since_node + loss
        return {"fake_score_loss": loss}

    def after_step(self, done: int) -> None:
        if done not in self.node_steps:
            return
        self.check_finite()
        if self.accelerator.is_main_process:
            since = done - (self.path.nodes[-1]["step"] if self.path.nodes else 0)
            learner, loss = self.fake_score, (self._loss_since_node / since).item()
            self.path.append(learner.unwrapped(), done, loss, learner.adapter, self.node_dtype)
            self.recorded()
        self.accelerator.wait_for_everyone()
        self._loss_since_node = torch.zeros_like(self._loss_since_node)

    @property
    def node_dtype(self) -> torch.dtype:
        """In which nodes are written."""
        asked = self.config.node_precision or ("fp32" if self.fake_score.adapter is None else "fp16")
        return {"fp32": torch.float32, "fp16": torch.float16}[asked]

    def record(self) -> DegradationPath:
        """Stage 1, whole or resumed. Returns the complete path; the fake score's memory is free again."""
        self.run()
        if self.accelerator.is_main_process:
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
        expected = [step for step in self.node_steps if step <= done]
        if [node["step"] for node in self.path.nodes] != expected:
            raise ValueError(
                f"{self.path.folder} has the nodes of steps {[node['step'] for node in self.path.nodes]}, but at step "
                f"{done} this recording had {expected}. Record the path again, in another --output_dir."
            )
        return done

    def state(self) -> dict[str, Any]:
        return {"loss_since_node": self._loss_since_node.item()}

    def load_state(self, state: dict[str, Any]) -> None:
        self._loss_since_node = torch.full_like(self._loss_since_node, state["loss_since_node"])
