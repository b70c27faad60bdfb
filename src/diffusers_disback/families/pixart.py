"""PixArt: a transformer on latents with the states of T5, whose outputs are a prediction and a variance."""

import inspect
from dataclasses import replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import is_bs4_available, is_ftfy_available
from torch import Tensor, nn

from ..models.batch import Condition
from ..pipelines.one_step_pixart import DisBackOneStepPixArtAlphaPipeline, DisBackOneStepPixArtSigmaPipeline
from .checks import check_prediction_type
from .text import TextFamily
from .transformer import LearnedVarianceFamily, prediction_of


TOKENS_OF_PIXART = 300  # of a prompt, by default of PixArtSigmaPipeline; that of PixArt-alpha reads 120


_OWN: dict[str, Any] = {
    "PixArtAlphaPipeline": DisBackOneStepPixArtAlphaPipeline,
    "PixArtSigmaPipeline": DisBackOneStepPixArtSigmaPipeline,
}


class PixArt(LearnedVarianceFamily, TextFamily):
    """PixArt-alpha (arXiv 2310.00426) and PixArt-Sigma (arXiv 2403.04692). The condition is `encoder_hidden_states` and
    `encoder_attention_mask`, and of PixArt-alpha at 1024 pixels `resolution` and `aspect_ratio`, too.

    Its stock pipelines load no LoRA: where adapters are trained, the student is a whole network.
    """

    pipeline_classes = tuple(_OWN)
    encoding = "PixArt"
    needed = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    encoded_as = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    call_settings = {"use_resolution_binning": False, "negative_prompt": None}  # whose embeddings are given
    agree_in = ("in_channels", "out_channels", "caption_channels", "sample_size", "patch_size")
    usage = replace(
        TextFamily.usage,
        condition="{prompt}, use_resolution_binning=False",
        takes_lora=False,
        network_class="PixArtTransformer2DModel",
    )
    own_pipelines = {stock: own.__name__ for stock, own in _OWN.items()}
    lora_target_modules = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]  # of every block

    def check(self) -> None:
        super().check()
        network = self.network.config
        made = self.pipeline.text_encoder.config.d_model
        if network.caption_channels not in (None, made):
            raise ValueError(
                f"The teacher's transformer takes text embeddings of width {network.caption_channels}, but its text encoder makes "
                f"{made}: they belong to different models."
            )
        if self.network.use_additional_conditions and not self._is_told_sizes:
            raise ValueError(
                f"The teacher's transformer is told images' sizes, which its {type(self.pipeline).__name__} does not tell one of "
                f"sample_size {network.sample_size}."
            )

    @property
    def _is_told_sizes(self) -> bool:
        """Whether the stock pipeline tells the network images' sizes."""
        return type(self.pipeline).__name__ == "PixArtAlphaPipeline" and self.network.config.sample_size == 128

    @staticmethod
    def call(network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        added = {name: condition.get(name) for name in ("resolution", "aspect_ratio")}
        text = {name: condition[name] for name in ("encoder_hidden_states", "encoder_attention_mask")}
        output = network(x_t, timestep=t, added_cond_kwargs=added, return_dict=False, **text)[0]
        return prediction_of(output, x_t)

    @property
    def cleans_captions(self) -> bool:
        """Whether the stock call cleans prompts by default, for which it needs two packages."""
        default = inspect.signature(type(self.pipeline).__call__).parameters["clean_caption"].default
        return default and is_bs4_available() and is_ftfy_available()

    @property
    def most_tokens(self) -> dict[str, int]:  # type: ignore[override]
        """As of `TextFamily`."""
        parameters = inspect.signature(type(self.pipeline).encode_prompt).parameters
        return {"tokenizer": parameters["max_sequence_length"].default}

    def encoder_id(self, resolution: int | None = None) -> str:
        return f"{super().encoder_id(resolution)} {type(self.pipeline).__name__} {self.cleans_captions}"

    def stock_encode_prompt(self, prompts: list[str], guided: bool) -> tuple[Tensor, ...]:
        return self.pipeline.encode_prompt(
            prompts, guided, device=self.text_encoders[0].device, clean_caption=self.cleans_captions
        )

    @torch.no_grad()
    def encode(self, prompts: list[str], resolution: int | None = None) -> Condition:
        embeds, mask, _, _ = self.encode_prompt(prompts)
        condition = {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}
        if self._is_told_sizes:
            side = float(self.resolution(resolution))
            condition |= {
                "resolution": torch.tensor([[side, side]] * len(prompts), device=embeds.device),
                "aspect_ratio": torch.ones(len(prompts), 1, device=embeds.device),
            }
        return condition

    @classmethod
    def example_condition(cls, config: Any, batch: int) -> Condition:
        width = config.caption_channels or config.cross_attention_dim
        condition = {
            "encoder_hidden_states": torch.empty(batch, TOKENS_OF_PIXART, width, device="meta"),
            "encoder_attention_mask": torch.empty(batch, TOKENS_OF_PIXART, dtype=torch.long, device="meta"),
        }
        if config.sample_size == 128 and config.use_additional_conditions is not False:
            condition["resolution"] = torch.empty(batch, 2, device="meta")
            condition["aspect_ratio"] = torch.empty(batch, 1, device="meta")
        return condition

    def one_step(self, network: nn.Module, timestep: int) -> DiffusionPipeline:
        self.check_network(network.config, "The student's network")
        own = {"transformer": network, "scheduler": self.one_step_scheduler(timestep)}
        return _OWN[type(self.pipeline).__name__](**{**self.pipeline.components, **own})

    def check_schedule(self) -> str | None:
        return check_prediction_type(self, self.text_encoders[0].device, self.encode([""]))
