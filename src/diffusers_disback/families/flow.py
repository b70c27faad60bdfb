"""What text-to-image transformers of flow matching have in common."""

from typing import Any

from diffusers import SchedulerMixin

from ..hub.cards import Usage
from ..models.flow_schedule import FlowSchedule, flow_many_step_scheduler, flow_one_step_scheduler
from .checks import check_prediction_type
from .text import TextFamily
from .transformer import TransformerFamily


class FlowFamily(TransformerFamily, TextFamily):
    """A transformer of flow matching on an autoencoder's latents. Its student begins at pure noise, as the stock pipeline does."""

    needed: tuple[str, ...] = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    usage = Usage(scheduler_class="FlowMatchEulerDiscreteScheduler")
    conditioning_timestep = 999  # pure noise, at which stock pipelines begin
    size: int | None = None  # of images, in pixels, for shifts that depend on it

    def check(self) -> None:
        super().check()
        channels, latents = self.network.config.in_channels, self.pipeline.vae.config.latent_channels
        if channels != latents:
            raise ValueError(
                f"The teacher's transformer takes {channels} channels, but its autoencoder makes {latents}: it is a model for "
                "inpainting or editing, not for text-to-image, or the autoencoder is another model's."
            )

    @classmethod
    def check_network(cls, config: Any, what: str) -> None:
        if config["out_channels"] not in (None, config["in_channels"]):
            raise ValueError(
                f"{what} takes {config['in_channels']} channels and gives {config['out_channels']} (out_channels), which is not "
                "supported."
            )

    def noise_schedule(self) -> FlowSchedule:
        return FlowSchedule.of(self.pipeline.scheduler)

    def default_timestep(self) -> int:
        return self.schedule.num_timesteps - 1

    def at_resolution(self, resolution: int | None) -> None:
        self.size = resolution
        self.schedule = self.noise_schedule()

    def many_step_scheduler(self) -> SchedulerMixin:
        return flow_many_step_scheduler(self.pipeline.scheduler)

    def one_step_scheduler(self, timestep: int) -> SchedulerMixin:
        return flow_one_step_scheduler(self.pipeline.scheduler, timestep)

    def check_schedule(self) -> str | None:
        return check_prediction_type(self, self.text_encoders[0].device, self.encode([""]))
