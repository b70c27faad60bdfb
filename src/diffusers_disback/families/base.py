"""What a teacher has to answer, so that the rest of the library never asks what class it is."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from torch import Tensor, nn

from ..data.conditions import ConditionSource, NoCondition
from ..hub.cards import UNCONDITIONAL, Usage
from ..models.autoencoder import check_divides
from ..models.batch import Condition
from ..models.generator import many_step_scheduler, one_step_scheduler
from ..models.noise_schedule import NoiseSchedule
from ..models.reference import LocalModel, title_of
from ..models.score_model import UNSCALED, ScoreModel, call_network
from ..training.settings.groups import TARGET_MODULES


class ModelFamily:
    """A teacher's pipeline, seen as what distillation needs of it.

    The answers given here are those of a pipeline without prompts, whose denoiser works on pixels in -1..1 and whose
    scheduler has betas. A family overrides what is otherwise; see docs/how_to_add.md.

    Args:
        pipeline (`DiffusionPipeline`): The teacher's.
        model (`LocalModel`, *optional*): The files that it was loaded from.

    Raises:
        ValueError: If its components do not fit together, or the denoiser takes more than it is given.

    Attributes:
        pipeline_classes (`tuple[str, ...]`): The names of the pipelines that it takes.
        network_name (`str`): The denoiser's component, which is also its folder in a pipeline and in a path.
        needed (`tuple[str, ...]`): The components that a teacher has to have.
        encoders (`tuple[str, ...]`): Those that only encode conditions, and leave memory when all are encoded.
        may_be_absent (`tuple[str, ...]`): The components that a pipeline may do without, and is then loaded with `None` for.
        agree_in (`tuple[str, ...]`): The keys of the denoiser's config in which a student's start agrees with the teacher.
        scheduler_classes (`tuple[str, ...]`): The schedulers that tell its pipelines from those of another family with the same
            names; by default any that no other family names.
        takes_prompts (`bool`): Whether conditions are made of prompts.
        takes_null_class_label (`bool`): Whether a label can be said to stand for no class.
        usage (`Usage`): What a student's card says of how it is used.
        own_pipelines (`dict[str, str]`): Classes of this package that load students, by the class of the stock pipeline, where
            they are not one for all (`usage`).
        lora_target_modules (`list[str]`): The layers that adapters are on by default: ends of their names.
        conditioning_timestep (`int`, *optional*): The default of `--conditioning_timestep`, if published recipes name one; see
            `default_timestep`.
        schedule (`NoiseSchedule`): Of this teacher.
        device (`torch.device`): Where all but the denoiser was last moved to.
    """

    pipeline_classes: tuple[str, ...] = ()
    network_name = "unet"
    needed: tuple[str, ...] = ("unet", "scheduler")
    encoders: tuple[str, ...] = ()
    may_be_absent: tuple[str, ...] = ()
    agree_in: tuple[str, ...] = ("in_channels", "out_channels")
    scheduler_classes: tuple[str, ...] = ()
    takes_prompts = False
    takes_null_class_label = False
    usage = UNCONDITIONAL
    lora_target_modules: list[str] = TARGET_MODULES
    own_pipelines: dict[str, str] = {}
    conditioning_timestep: int | None = None

    def __init__(self, pipeline: DiffusionPipeline, model: LocalModel | None = None):
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval()
        self.pipeline = pipeline
        self.model = model
        self.device = torch.device("cpu")
        absent = [name for name in self.needed if pipeline.components.get(name) is None]
        if absent:
            raise ValueError(f"The teacher's pipeline is without {' and '.join(absent)}; a whole one is needed.")
        self.check()
        self.schedule = self.noise_schedule()

    # What a family answers ------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises a `ValueError` unless the components, which are all there, fit together."""
        self.check_network(self.network.config, f"The teacher's {title_of(self.network_name)}")

    @classmethod
    def check_network(cls, config: Any, what: str) -> None:
        """Raises a `ValueError` if a denoiser asks for more than it will be given.

        Args:
            config (`FrozenDict`): The denoiser's.
            what (`str`): Whose it is, at the beginning of a sentence.
        """

    @classmethod
    def usage_with(cls, config: Any) -> Usage:
        """How pipelines with a denoiser of a config are used, as cards say it."""
        return cls.usage

    def noise_schedule(self) -> NoiseSchedule:
        """What the denoiser's timesteps and its output mean."""
        return NoiseSchedule.from_scheduler(self.pipeline.scheduler)

    def at_resolution(self, resolution: int | None) -> None:
        """Sets the schedule of images of a side in pixels, where a scheduler's noise levels depend on it."""

    def default_timestep(self) -> int:
        """The timestep at which a student is evaluated by default: the family's `conditioning_timestep`, or else the one with 2.5 times as
        much noise as signal, SiD's on pixels (arXiv 2404.04057: sigma_init = 2.5). Of Stable Diffusion it is 625, as in SiD-LSG."""
        return self._nearest_to(2.5) if self.conditioning_timestep is None else self.conditioning_timestep

    def check_timestep(self, timestep: int, name: str = "timestep") -> None:
        """Raises a `ValueError`, with the name of the setting, if a timestep is outside the teacher's schedule, or has no x0."""
        self.schedule.check_timestep(timestep, name, f"; the default for this teacher is {self.default_timestep()}")

    def timestep_of(self, sigma: float) -> int:
        """The timestep whose ratio of noise to signal is nearest to a number.

        Raises:
            ValueError: If the schedule has no such noise.
        """
        ratios = self.schedule.sigma / self.schedule.alpha
        if not 0.99 * ratios[0] <= sigma <= 1.01 * ratios[-1]:
            raise ValueError(
                f"--sigma_init {sigma:g} is outside the teacher's schedule, whose ratio of noise to signal goes from "
                f"{ratios[0]:.3g} to {ratios[-1]:.3g}."
            )
        return self._nearest_to(sigma)

    def _nearest_to(self, sigma: float) -> int:
        return int((self.schedule.sigma - sigma * self.schedule.alpha).abs().argmin())

    @staticmethod
    def call(network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The denoiser's output, `[B, C, H, W]`, at integer timesteps of the schedule, `[B]`."""
        return call_network(network, x_t, t, condition)

    def conditions(self, prompts: Sequence[str] | None = None, resolution: int | None = None) -> ConditionSource:
        """What samples are conditioned on.

        Args:
            prompts (`Sequence[str]`, *optional*): Of a family that takes them.
            resolution (`int`, *optional*): Of the images, in pixels.
        """
        return NoCondition()

    @classmethod
    def example_condition(cls, config: Any, batch: int) -> Condition:
        """A condition of the right shapes on the meta device, from the denoiser's config alone: for the planner."""
        return {}

    @classmethod
    def takes_condition(cls, config: Any) -> bool:
        """Whether a denoiser of a config takes a condition; without one nothing guides."""
        return bool(cls.example_condition(config, 1))

    def inputs(self, resolution: int | None = None) -> dict[str, str]:
        """Hashes of what a run depends on besides the denoiser and the scheduler, by their names in `INPUTS`."""
        return {}

    def arguments(self, captions: list[str]) -> dict[str, Tensor]:
        """What `sample` is given to sample captions of the `conditions`, a row each; as the network's condition."""
        return {}

    @property
    def stride(self) -> int:
        """Pixels of a latent's side."""
        return 1

    @classmethod
    def stride_of(cls, others: dict[str, nn.Module]) -> int:
        """The stride, from the other components, whose weights may be on the meta device."""
        return 1

    def many_step_scheduler(self) -> SchedulerMixin:
        """A deterministic sampler's scheduler."""
        return many_step_scheduler(self.pipeline.scheduler)

    def one_step_scheduler(self, timestep: int) -> SchedulerMixin:
        """The scheduler whose only step is the generator; a `ValueError` for a timestep at which there is none."""
        return one_step_scheduler(self.pipeline.scheduler, timestep)

    def assemble(self, network: nn.Module, scheduler: SchedulerMixin) -> DiffusionPipeline:
        """A pipeline of the teacher's class and other components, which are shared."""
        parts = {**self.pipeline.components, self.network_name: network, "scheduler": scheduler}
        return type(self.pipeline)(**parts)

    def one_step(self, network: nn.Module, timestep: int) -> DiffusionPipeline:
        """The deployed student: its network, the one-step scheduler, and the teacher's other components.

        Args:
            network (`nn.Module`): The student's, unwrapped.
            timestep (`int`): The conditioning timestep.

        Raises:
            ValueError: If the network asks for more than it is given, or the timestep is refused.
        """
        self.check_network(network.config, "The student's network")
        return self.assemble(network, self.one_step_scheduler(timestep))

    def undecorated(self, pipeline: DiffusionPipeline) -> DiffusionPipeline:
        """A pipeline as it is measured: without what touches finished images, and without progress bars."""
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    @torch.no_grad()
    def sample(
        self,
        pipeline: DiffusionPipeline,
        given: dict[str, Tensor],
        noise: Tensor,
        num_inference_steps: int = 1,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """Images in 0..1, `[N, 3, H, W]`.

        Args:
            pipeline (`DiffusionPipeline`): Of `sampler` or `one_step`.
            given (`dict[str, Tensor]`): Of `arguments`.
            noise (`Tensor`): Standard normal, float32, `[N, C, H, W]`.
            num_inference_steps (`int`): Of the pipeline's scheduler.
            guidance_scale (`float`): Classifier-free; 1 means none.
        """
        scheduler = pipeline.scheduler
        # The scheduler scales the network's input, where that has to be, and its times are the network's.
        model = ScoreModel(getattr(pipeline, self.network_name), UNSCALED, self.call, guidance_scale)
        empty = self.conditions().empty
        negative = {key: value.expand(len(noise), *value.shape[1:]).to(noise.device) for key, value in empty.items()}
        scheduler.set_timesteps(num_inference_steps, device=noise.device)
        x_t = noise * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(x_t, t)
            output = model.guided(scaled, t.expand(len(noise)), given, negative)
            x_t = scheduler.step(output, t, x_t, return_dict=False)[0]
        return self.decode(x_t)

    def decode(self, x0: Tensor) -> Tensor:
        """Images in 0..1, of samples of the denoiser."""
        return (x0 / 2 + 0.5).clamp(0, 1)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Samples of the denoiser, of images in -1..1, `[N, 3, H, W]`, on their device; `decode` the other way round. A
        function of each image alone."""
        return pixels

    @staticmethod
    def bottleneck(network: nn.Module) -> nn.Module:
        """The part of an unwrapped denoiser at whose output a discriminator looks: the middle of a UNet; of a transformer,
        override it to give its middle block.

        Raises:
            ValueError: If there is none.
        """
        middle = getattr(network, "mid_block", None)
        if middle is None:
            raise ValueError(
                f"A {type(network).__name__} has no mid_block, at which a discriminator could look. Its family has to say "
                "what its bottleneck is; or leave --adversarial_weight at 0."
            )
        return middle

    def check_schedule(self) -> str | None:
        """What speaks against the scheduler's config, if anything does."""
        return None

    def encode(self, prompts: list[str], resolution: int | None = None) -> Condition:
        """The condition of prompts, batch first, on the encoders' device; of a family that takes them. That of `""` is the
        negative one.

        Args:
            prompts (`list[str]`): Any.
            resolution (`int`, *optional*): Of the images, in pixels, for networks that are told it.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how prompts are encoded.")

    @property
    def tokenizers(self) -> list[Any]:
        """Of the text encoders, in their order; none if there are no prompts."""
        return []

    # What follows of it -----------------------------------------------------------------------------------------------

    @property
    def local_model(self) -> LocalModel:
        """The files that it was loaded from.

        Raises:
            ValueError: If it was made of a pipeline in memory.
        """
        if self.model is None:
            raise ValueError(f"The {type(self.pipeline).__name__} is in memory alone: load it by `load_family`.")
        return self.model

    @property
    def network(self) -> ModelMixin:
        """The teacher's denoiser."""
        return getattr(self.pipeline, self.network_name)

    def resolution(self, resolution: int | None = None) -> int:
        """The side of the images in pixels; by default that which the teacher was made for.

        Raises:
            ValueError: If its config does not say.
        """
        side = self.network.config.sample_size
        if resolution is None and not isinstance(side, int):
            raise ValueError(
                f"The teacher's {title_of(self.network_name)} has sample_size {side!r} in its config, which is no side of a "
                "square: pass --resolution."
            )
        return resolution or side * self.stride

    def latent_shape(self, resolution: int | None = None) -> tuple[int, int, int]:
        """`(C, H, W)` of what the denoiser works on, for a square image.

        Raises:
            ValueError: If the stride does not divide the resolution.
        """
        stride, resolution = self.stride, self.resolution(resolution)
        check_divides(stride, resolution)
        return self.network.config.in_channels, resolution // stride, resolution // stride

    def score_model(self, network: nn.Module | None = None) -> ScoreModel:
        """The way to ask a network of this family; by default the teacher's own."""
        return ScoreModel(self.network if network is None else network, self.schedule, self.call)

    def sampler(self) -> DiffusionPipeline:
        """The teacher with a deterministic sampler of many steps, as it is measured; its components are shared."""
        return self.undecorated(self.assemble(self.network, self.many_step_scheduler()))

    def initial_generator(
        self,
        start: LocalModel | None = None,
        resolution: int | None = None,
        shared: bool = False,
    ) -> ModelMixin:
        """The network that the student starts from: the teacher's copy, or the denoiser of another model.

        Args:
            start (`LocalModel`, *optional*): The other model; see `ModelReference.resolve_denoiser`.
            resolution (`int`, *optional*): That the student is made for, in pixels; by default the teacher's.
            shared (`bool`): Without another model, the teacher's own network in place of a copy, for adapters on it.

        Raises:
            ValueError: If the other model's denoiser does not take the teacher's latents and conditions, or its scheduler
                says that it predicts something else than the teacher.
        """
        network: ModelMixin
        if start is None:
            network = self.network if shared else self.score_model().copy().network
        else:
            self._check_start_predicts_the_same(start)
            network = start.load_network(type(self.network))
            what = f"The {title_of(self.network_name)} of the student's start {start.name_or_path!r}"
            self.check_network(network.config, what)
            for name in self.agree_in:
                was, is_ = self.network.config[name], network.config[name]
                if was != is_:
                    raise ValueError(
                        f"The student's start {start.name_or_path!r} has {name} {is_}, the teacher has {was}: it works on "
                        "other latents or other conditions."
                    )
        network.register_to_config(sample_size=self.latent_shape(resolution)[-1])
        return network

    def _check_start_predicts_the_same(self, start: LocalModel) -> None:
        """The student is asked as the teacher is: a network that predicts v gives no x0 by the formula of the noise."""
        predicted = start.predicts()
        if predicted not in (None, self.schedule.prediction_type):
            raise ValueError(
                f"The scheduler of the student's start {start.name_or_path!r} says that it predicts {predicted}, but the teacher "
                f"predicts {self.schedule.prediction_type}: it would be asked for the wrong thing. Start from a model of the "
                "teacher's kind; if one of the two configs is wrong, mend the start's scheduler_config.json, or pass the "
                "teacher's --prediction_type."
            )

    # Where its parts lie ----------------------------------------------------------------------------------------------

    def to(self, device: torch.device | str) -> "ModelFamily":
        """Moves all but the denoiser, of which training holds copies of its own."""
        self.device = torch.device(device)
        for component in self.pipeline.components.values():
            if isinstance(component, nn.Module) and component is not self.network:
                component.to(device)
        return self

    @contextmanager
    def on_device(self, device: torch.device) -> Iterator[None]:
        """Keeps all but the denoiser on a device while images are sampled; afterwards it is offloaded."""
        self.to(device)
        yield
        self.offload_to_cpu()

    def offload_to_cpu(self) -> None:
        """Moves all but the encoders to CPU memory: training asks for nothing else."""
        encoders = [self.pipeline.components.get(name) for name in self.encoders]
        for component in self.pipeline.components.values():
            if isinstance(component, nn.Module) and component not in encoders:
                component.to("cpu")

    def release_encoders(self, pipeline: DiffusionPipeline | None = None) -> None:
        """Lets go of the encoders, when every condition that is still needed was encoded.

        Args:
            pipeline (`DiffusionPipeline`, *optional*): That is to let go of them; by default the teacher's own.
        """
        pipeline = self.pipeline if pipeline is None else pipeline
        pipeline.register_modules(**dict.fromkeys(self.encoders))
