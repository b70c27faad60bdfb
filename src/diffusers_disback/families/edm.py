"""Denoisers on pixels in EDM's preconditioning."""

from dataclasses import replace
from typing import Any

from diffusers import ConsistencyModelPipeline, DiffusionPipeline, EDMEulerScheduler, SchedulerMixin
from torch import nn

from ..hub.cards import Usage
from ..models.edm_schedule import (
    EdmSchedule,
    RescaledEdmSchedule,
    edm_one_step_scheduler,
    rescaled_edm_many_step_scheduler,
    rescaled_edm_one_step_scheduler,
)
from ..models.noise_schedule import EDM_SCHEDULERS, RESCALED_EDM_SCHEDULER
from ..models.reference import LocalModel
from .pixels import Pixels


class Edm(Pixels):
    """As `Pixels`, with a scheduler of EDM (Karras et al., 2022, arXiv 2206.00364): `x_t = x0 + sigma * noise`, and a network that is
    given `c_in * x_t` and `c_noise = ln(sigma) / 4`.

    Its pipeline is a `ConsistencyModelPipeline`, the only one of diffusers for a `UNet2DModel` that scales the network's input.
    """

    pipeline_classes = ("ConsistencyModelPipeline",)
    scheduler_classes: tuple[str, ...] = EDM_SCHEDULERS
    schedule: EdmSchedule

    def noise_schedule(self) -> EdmSchedule:
        return EdmSchedule.from_scheduler(self.pipeline.scheduler)

    def many_step_scheduler(self) -> SchedulerMixin:
        return EDMEulerScheduler.from_config(self.pipeline.scheduler.config)

    def one_step_scheduler(self, timestep: int) -> SchedulerMixin:
        return edm_one_step_scheduler(self.noise_schedule(), timestep)

    def one_step(self, network: nn.Module, timestep: int) -> DiffusionPipeline:
        self.check_network(network.config, "The student's network")
        return ConsistencyModelPipeline(unet=network, scheduler=self.one_step_scheduler(timestep))

    def _check_start_predicts_the_same(self, start: LocalModel) -> None:
        super()._check_start_predicts_the_same(start)
        given = start.scheduler_config().get("sigma_data", self.schedule.sigma_data)
        if given != self.schedule.sigma_data:
            raise ValueError(
                f"The student's start {start.name_or_path!r} is preconditioned for sigma_data {given}, but the teacher for "
                f"{self.schedule.sigma_data}: it would be asked for the wrong thing."
            )

    def check_schedule(self) -> str | None:
        return None  # at the highest noise level F is x0, of which nothing is known


class RescaledEdm(Edm):
    """As `Edm`, of a network whose time is 1000 c_noise: those that were published with Consistency Models (Song et al., 2023,
    arXiv 2303.01469), which `diffusers-disback convert-edm` converts.

    They are told by a `CMStochasticIterativeScheduler` with `sigma_min` 0, with which its boundary condition is EDM's own
    preconditioning. The stock pipeline would sample a teacher of it as a consistency model; it samples a student as it is.
    """

    scheduler_classes = (RESCALED_EDM_SCHEDULER,)
    schedule: RescaledEdmSchedule

    @classmethod
    def usage_with(cls, config: Any) -> Usage:
        return replace(super().usage_with(config), calls_teacher=False)

    def noise_schedule(self) -> RescaledEdmSchedule:
        return RescaledEdmSchedule.from_scheduler(self.pipeline.scheduler)

    def many_step_scheduler(self) -> SchedulerMixin:
        return rescaled_edm_many_step_scheduler(self.pipeline.scheduler)

    def one_step_scheduler(self, timestep: int) -> SchedulerMixin:
        return rescaled_edm_one_step_scheduler(self.noise_schedule(), timestep)
