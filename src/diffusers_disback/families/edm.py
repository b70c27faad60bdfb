"""Denoisers on pixels in EDM's preconditioning."""

import torch
from diffusers import ConsistencyModelPipeline, DiffusionPipeline, EDMEulerScheduler, SchedulerMixin
from torch import Tensor, nn

from ..models.edm_schedule import EdmSchedule, edm_one_step_scheduler
from ..models.noise_schedule import EDM_SCHEDULERS
from ..models.score_model import AS_IT_IS, ScoreModel
from .pixels import Pixels


class Edm(Pixels):
    """As `Pixels`, with a scheduler of EDM (Karras et al., 2022, arXiv 2206.00364): `x_t = x0 + sigma * noise`, and a network that is
    given `c_in * x_t` and `c_noise = ln(sigma) / 4`.

    Its pipeline is a `ConsistencyModelPipeline`, of diffusers' own for a `UNet2DModel` the one that scales the network's input.
    """

    pipeline_classes = ("ConsistencyModelPipeline",)
    scheduler_classes = EDM_SCHEDULERS

    def noise_schedule(self) -> EdmSchedule:
        return EdmSchedule.from_scheduler(self.pipeline.scheduler)

    def many_step_scheduler(self) -> SchedulerMixin:
        return EDMEulerScheduler.from_config(self.pipeline.scheduler.config)

    def one_step_scheduler(self, timestep: int) -> SchedulerMixin:
        return edm_one_step_scheduler(self.noise_schedule(), timestep)

    def one_step(self, network: nn.Module, timestep: int) -> DiffusionPipeline:
        self.check_network(network.config, "The student's network")
        return ConsistencyModelPipeline(unet=network, scheduler=self.one_step_scheduler(timestep))

    @torch.no_grad()
    def sample(
        self,
        pipeline: DiffusionPipeline,
        given: dict[str, Tensor],
        noise: Tensor,
        num_inference_steps: int = 1,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """As of `ModelFamily`; the scheduler scales the network's input, and its times are the network's."""
        scheduler = pipeline.scheduler
        model = ScoreModel(getattr(pipeline, self.network_name), AS_IT_IS, self.call, guidance_scale)
        empty = self.conditions().empty
        negative = {key: value.expand(len(noise), *value.shape[1:]).to(noise.device) for key, value in empty.items()}
        scheduler.set_timesteps(num_inference_steps)
        x_t = noise * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x_t, t)
            output = model.guided(scaled, t.expand(len(noise)).to(noise.device), given, negative)
            x_t = scheduler.step(output, t, x_t, return_dict=False)[0]
        return self.decode(x_t)

    def check_schedule(self) -> str | None:
        return None  # at the highest noise level F is x0, of which nothing is known
