"""Stable Diffusion 1.x and 2.x: a text encoder, a UNet, latents of an 8x autoencoder. Also the base of other families."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..data.truncation import told_once
from ..models.adapters import base_of
from ..models.batch import Condition
from ..models.denoiser import check_denoiser
from ..models.noise_schedule import NoiseSchedule
from ..models.reference import LocalModel
from ..models.score_model import ScoreModel, call_network
from ..models.weights import fingerprint


_NUMBERS = 2048  # that the doubt of a teacher's betas is measured on, at least: eight small latents, or two large ones
# By which a network's inputs and outputs are told apart.
_OF_CONDITIONS = (
    *("in_channels", "out_channels", "cross_attention_dim", "addition_embed_type", "addition_time_embed_dim"),
    "projection_class_embeddings_input_dim",
)
_TOLERANCE = 0.08  # of its slope; see docs/teachers.md


class ModelFamily:
    """A teacher's pipeline, seen as what distillation needs of it.

    Args:
        pipeline (`DiffusionPipeline`): The teacher's.
        model (`LocalModel`, *optional*): The files that it was loaded from.

    Raises:
        ValueError: If its components do not fit together, or the denoiser takes more than latents, as for inpainting.
    """

    pipeline_classes: tuple[str, ...] = ("StableDiffusionPipeline",)
    addition_embed_types: tuple[str | None, ...] = (None, "text")  # which the text encoder's states feed
    needed: tuple[str, ...] = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")

    def __init__(self, pipeline: DiffusionPipeline, model: LocalModel | None = None):
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval()
        self.pipeline = pipeline
        self.model = model
        self.check()
        self.schedule = NoiseSchedule.from_scheduler(pipeline.scheduler)

    def check(self) -> None:
        """Sees that the components fit together.

        Raises:
            ValueError: With what does not fit.
        """
        absent = [name for name in self.needed if self.pipeline.components[name] is None]
        if absent:
            raise ValueError(f"The teacher's pipeline is without {' and '.join(absent)}; a whole one is needed.")
        unet, vae = self.pipeline.unet.config, self.pipeline.vae.config
        if unet.in_channels != vae.latent_channels:
            raise ValueError(
                f"The teacher's UNet takes {unet.in_channels} channels, but its autoencoder makes "
                f"{vae.latent_channels}: it is a model for inpainting, depth or editing, not for text-to-image, or the "
                "autoencoder is another model's."
            )
        check_denoiser(unet, "The teacher's UNet")
        width = sum(encoder.config.hidden_size for encoder in self.text_encoders)
        if unet.cross_attention_dim != width:
            raise ValueError(
                f"The teacher's UNet takes text embeddings of width {unet.cross_attention_dim}, but its "
                f"{'text encoder makes' if len(self.text_encoders) == 1 else 'text encoders make'} {width}: they belong "
                "to different models."
            )
        if unet.addition_embed_type not in self.addition_embed_types:
            raise ValueError(
                f"The teacher is a {type(self.pipeline).__name__}, whose UNet is given "
                f"{' or '.join(map(repr, self.addition_embed_types))} besides the text's states, but its addition_embed_type "
                f"is {unet.addition_embed_type!r}: it is of another family."
            )

    @property
    def text_encoders(self) -> list[nn.Module]:
        """Whose outputs, side by side, condition the denoiser."""
        encoders = [self.pipeline.components.get(name) for name in ("text_encoder", "text_encoder_2")]
        return [encoder for encoder in encoders if encoder is not None]

    @property
    def tokenizers(self) -> list[Any]:
        """Of the text encoders, in their order."""
        return [self.pipeline.components[name] for name in ("tokenizer", "tokenizer_2") if name in self.needed]

    @property
    def network(self) -> nn.Module:
        """The teacher's denoiser."""
        return self.pipeline.unet

    def initial_generator(
        self,
        start: LocalModel | None = None,
        resolution: int | None = None,
        shared: bool = False,
    ) -> nn.Module:
        """The network that the student starts from: the teacher's copy, or the UNet of another model.

        Args:
            start (`LocalModel`, *optional*): The other model.
            resolution (`int`, *optional*): That the student is made for, in pixels; by default the teacher's.
            shared (`bool`): Without another model, the teacher's own network in place of a copy, for adapters on it.

        Raises:
            ValueError: If the other model's UNet does not take the teacher's latents and conditions, or its scheduler says
                that it predicts something else than the teacher.
        """
        if start is None:
            network = self.network if shared else self.score_model().copy().network
        else:
            self._check_start_predicts_the_same(start)
            network = start.load_network(type(self.network))
            check_denoiser(network.config, f"The UNet of the student's start {start.name_or_path!r}")
        for name in _OF_CONDITIONS:
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
        said = start.predicts()
        if said not in (None, self.schedule.prediction_type):
            raise ValueError(
                f"The scheduler of the student's start {start.name_or_path!r} says that it predicts {said}, but the teacher "
                f"predicts {self.schedule.prediction_type}: it would be asked for the wrong thing. Start from a model of the "
                "teacher's kind; if one of the two configs is wrong, mend the start's scheduler_config.json, or pass the "
                "teacher's --prediction_type."
            )

    def to(self, device: torch.device) -> "ModelFamily":
        """Moves all but the denoiser, of which training holds copies of its own."""
        for component in self.pipeline.components.values():
            if isinstance(component, nn.Module) and component is not self.network:
                component.to(device)
        return self

    @contextmanager
    def drawing(self, device: torch.device) -> Iterator[None]:
        """While pictures are drawn all but the denoiser is on a device; afterwards it rests."""
        self.to(device)
        yield
        self.rest()

    def rest(self) -> None:
        """Moves all but the text encoders to CPU memory: training asks for nothing else."""
        for component in self.pipeline.components.values():
            if isinstance(component, nn.Module) and component not in self.text_encoders:
                component.to("cpu")

    def release_text_encoders(self) -> None:
        """Lets go of the text encoders, when every prompt that is still needed was encoded."""
        for name in ("text_encoder", "text_encoder_2"):
            if name in self.pipeline.components:
                self.pipeline.register_modules(**{name: None})

    def resolution(self, resolution: int | None = None) -> int:
        """The side of the pictures in pixels; by default that which the teacher was made for.

        Raises:
            ValueError: If its config does not say.
        """
        side = self.network.config.sample_size
        if resolution is None and not isinstance(side, int):
            raise ValueError(
                f"The teacher's UNet has sample_size {side!r} in its config, which is no side of a square: pass --resolution."
            )
        return resolution or side * self.pipeline.vae_scale_factor

    def latent_shape(self, resolution: int | None = None) -> tuple[int, int, int]:
        """`(C, H, W)` of the latents of a square picture.

        Raises:
            ValueError: If the autoencoder's stride does not divide the resolution.
        """
        stride, resolution = self.pipeline.vae_scale_factor, self.resolution(resolution)
        if resolution % stride:
            raise ValueError(f"resolution={resolution} is not divisible by {stride}, the autoencoder's stride.")
        return self.pipeline.vae.config.latent_channels, resolution // stride, resolution // stride

    def score_model(self, network: nn.Module | None = None) -> ScoreModel:
        """The way to ask a network of this family; by default the teacher's own."""
        return ScoreModel(self.network if network is None else network, self.schedule, self.call)

    def call(self, network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The network's output, `[B, C, H, W]`."""
        return call_network(network, x_t, t, condition)

    def encoder_id(self, resolution: int | None = None) -> str:
        """What `encode` depends on: a text that is equal for equal conditions."""
        zeros = self.pipeline.config.get("force_zeros_for_empty_prompt")
        parts = self.pipeline.components
        tokenizers = [parts[name] for name in ("tokenizer", "tokenizer_2") if parts.get(name) is not None]
        words = json.dumps([[one.model_max_length, one.get_vocab()] for one in tokenizers], sort_keys=True)
        return f"{type(self).__name__} {zeros} {self.resolution(resolution)} " + " ".join(
            [hashlib.sha256(words.encode()).hexdigest(), *(fingerprint(encoder) for encoder in self.text_encoders)]
        )

    @torch.no_grad()
    def doubt(self) -> str | None:
        """What speaks against the scheduler's config, if anything does: against its prediction type, or its betas."""
        device = self.text_encoders[0].device
        # A half-precision copy on a GPU, where the text encoders lie beside it.
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        model = self.score_model(base_of(self.network, device, dtype))
        return self._doubt_of_prediction_type(model, device) or self._doubt_of_betas(model, device)

    def _doubt_of_prediction_type(self, model: ScoreModel, device: torch.device) -> str | None:
        """At the highest noise level x_t is all but the noise itself. A network that predicts the noise gives it back; one
        that predicts v or x0 does not, since the picture is hardly to be seen."""
        noise = self._noise(1, 0).to(device)
        t = torch.full((1,), self.schedule.num_timesteps - 1, device=device)
        output = model.predict(noise, t, self.encode([""]))
        loss, declared = (output - noise).square().mean().item(), self.schedule.prediction_type
        if (declared == "epsilon") == (loss < 0.5):
            return None
        other = "v_prediction or sample" if declared == "epsilon" else "epsilon"
        return (
            f"The teacher's scheduler says prediction_type={declared!r}, but at the highest noise level its output is "
            f"{'not ' if declared == 'epsilon' else ''}the noise (mean squared difference {loss:.2g}). If its pictures are "
            f"wrong, try --prediction_type {other}."
        )

    def _doubt_of_betas(self, model: ScoreModel, device: torch.device) -> str | None:
        """Where a network's timesteps stand for other noise levels than the config says, it finds more or less noise."""
        slope = self._slope_of_noise(model, device)
        if abs(slope - 1) < _TOLERANCE:
            return None
        return (
            f"The teacher's scheduler says beta_schedule={self.pipeline.scheduler.config.beta_schedule!r}, but at middle "
            f"timesteps its network takes pictures of this schedule for {'less' if slope > 1 else 'more'} noisy than they "
            f"are (by a factor of {slope:.2f}): its betas, or its prediction type, may not be those that it was trained with. "
            "If its pictures are wrong, mend its scheduler_config.json, or try --prediction_type."
        )

    def _slope_of_noise(self, model: ScoreModel, device: torch.device) -> float:
        """That of added noise on found noise. What a network finds is an expectation, E[noise | x_t]: over pictures as it
        knows them the slope is 1. Its own pictures, drawn in four steps, are as it knows them."""
        count = max(2, _NUMBERS // torch.Size(self.latent_shape()).numel())
        condition = {key: value.expand(count, *value.shape[1:]) for key, value in self.encode([""]).items()}

        def at(share: float) -> Tensor:
            return torch.full((count,), round(share * self.schedule.num_timesteps) - 1, device=device)

        def sigma_noise(x_t: Tensor, x0: Tensor, t: Tensor) -> Tensor:
            return x_t - self.schedule.diffuse(x0, torch.zeros_like(x0), t)

        levels = [at(share) for share in (0.8, 0.6, 0.4, 0.2)]
        x_t = self._noise(count, 1).to(device)
        for t, below in zip(levels, [*levels[1:], None], strict=True):
            x0 = model.denoise(x_t, t, condition)
            if below is not None:  # DDIM (Song et al., 2020, Eq. 12), without noise of its own
                sigma = self.schedule.diffuse(torch.zeros_like(x0), torch.ones_like(x0), t)
                x_t = self.schedule.diffuse(x0, sigma_noise(x_t, x0, t) / sigma, below)
        t = at(0.3)
        x_t = self.schedule.diffuse(x0, self._noise(count, 2).to(device), t)
        added, found = sigma_noise(x_t, x0, t), sigma_noise(x_t, model.denoise(x_t, t, condition), t)
        return ((added * found).mean() / found.square().mean()).item()

    def _noise(self, count: int, seed: int) -> Tensor:
        """Standard normal, `[count, C, H, W]`, from a seed of its own."""
        return torch.randn(count, *self.latent_shape(), generator=torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def encode(self, prompts: list[str], resolution: int | None = None) -> Condition:
        """The condition of prompts, batch first, on the text encoder's device. That of `""` is the negative one.

        Args:
            prompts (`list[str]`): Any.
            resolution (`int`, *optional*): Of the pictures, in pixels, for networks that are told it.
        """
        device = self.pipeline.text_encoder.device
        with told_once():
            prompt_embeds, _ = self.pipeline.encode_prompt(prompts, device, 1, False)
        return {"encoder_hidden_states": prompt_embeds}
