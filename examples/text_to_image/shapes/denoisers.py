"""The kinds of shapes teachers: which networks each has, how they are asked, and which pipeline they make."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffusers_disback.models.flow_schedule import FlowSchedule
from diffusers_disback.models.noise_schedule import NoiseSchedule

from .dataset import CAPTIONS


TEXT_WIDTH, TEXT_WIDTH_2 = 64, 96
SIDE = 64.0


def make_tokenizer(prompt_length: int = 16) -> CLIPTokenizer:
    """CLIP's byte pair encoding with a vocabulary of its own, in which every word of the captions is one token."""
    bytes_ = [chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))]
    bytes_ += [chr(256 + k) for k in range(256 - len(bytes_))]
    words = sorted({word for caption in CAPTIONS for word in caption.split()}, key=lambda word: (len(word), word))
    merges, pieces = [], []
    for word in words:
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            merge = (symbols[-2], symbols[-1])
            if merge not in merges:
                merges.append(merge)
                pieces.append("".join(merge))
            symbols[-2:] = ["".join(merge)]
    tokens = [*bytes_, *(b + "</w>" for b in bytes_), *pieces, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=prompt_length)


def text_config(tokenizer: CLIPTokenizer, width: int, layers: int, **config: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **config,
    )


def make_unet(**config: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 112),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=16,
        **config,
    )


@dataclass
class StableDiffusion:
    """A UNet and one text encoder.

    Args:
        prediction_type (`str`): What the UNet predicts.
        zero_terminal_snr (`bool`): Whether no signal is left at the last timestep.
    """

    prediction_type: str = "epsilon"
    zero_terminal_snr: bool = False

    prompt_length = 16

    def networks(self, tokenizer: CLIPTokenizer) -> nn.ModuleDict:
        """The networks that are trained, by the names that the pipeline has for them."""
        text_encoder = CLIPTextModel(text_config(tokenizer, TEXT_WIDTH, layers=2))
        return nn.ModuleDict({"text_encoder": text_encoder, "unet": make_unet(cross_attention_dim=TEXT_WIDTH)})

    @staticmethod
    def arguments(networks: nn.ModuleDict, tokens: Tensor, empty: Tensor) -> dict[str, Any]:
        """What the pipeline tells the denoiser besides latents and timestep, with gradients to the text encoders.

        Args:
            networks (`nn.ModuleDict`): Of `networks`.
            tokens (`Tensor`): `[B, prompt_length]`.
            empty (`Tensor`): Which prompts are empty, `[B]` bool.
        """
        return {"encoder_hidden_states": networks["text_encoder"](tokens).last_hidden_state}

    def scheduler(self) -> SchedulerMixin:
        ends_with_noise = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return DDPMScheduler(
            num_train_timesteps=1000,
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type=self.prediction_type,
            clip_sample=False,  # latents are not confined to [-1, 1]
            steps_offset=1,
            **(ends_with_noise if self.zero_terminal_snr else {}),
        )

    def schedule(self) -> NoiseSchedule:
        return NoiseSchedule.from_scheduler(self.scheduler())

    def predict(self, networks: nn.ModuleDict, x_t: Tensor, t: Tensor, tokens: Tensor, empty: Tensor) -> Tensor:
        """The denoiser's output, of `x_t`'s shape `[B, 4, 8, 8]`, at its own times `t` `[B]`."""
        return networks["unet"](x_t, t, **self.arguments(networks, tokens, empty)).sample

    def pipeline(self, vae: AutoencoderKL, networks: nn.ModuleDict, tokenizer: CLIPTokenizer) -> DiffusionPipeline:
        return StableDiffusionPipeline(
            vae=vae,
            tokenizer=tokenizer,
            scheduler=self.scheduler(),
            **networks,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


class StableDiffusionXL(StableDiffusion):
    """A UNet and two text encoders, a pooled embedding and time ids. An empty prompt's embeddings are zeros."""

    def networks(self, tokenizer: CLIPTokenizer) -> nn.ModuleDict:
        # SDXL conditions on the last layer but one, hence a layer more.
        config_2 = text_config(tokenizer, TEXT_WIDTH_2, layers=3)
        config_2.projection_dim = TEXT_WIDTH_2
        return nn.ModuleDict(
            {
                "text_encoder": CLIPTextModel(text_config(tokenizer, TEXT_WIDTH, layers=3)),
                "text_encoder_2": CLIPTextModelWithProjection(config_2),
                "unet": make_unet(
                    cross_attention_dim=TEXT_WIDTH + TEXT_WIDTH_2,
                    addition_embed_type="text_time",
                    addition_time_embed_dim=8,
                    projection_class_embeddings_input_dim=TEXT_WIDTH_2 + 6 * 8,
                    transformer_layers_per_block=(1, 2),
                    use_linear_projection=True,
                ),
            }
        )

    @staticmethod
    def arguments(networks: nn.ModuleDict, tokens: Tensor, empty: Tensor) -> dict[str, Any]:
        encoded = [networks[name](tokens, output_hidden_states=True) for name in ("text_encoder", "text_encoder_2")]
        states = torch.cat([output.hidden_states[-2] for output in encoded], -1).masked_fill(empty[:, None, None], 0)
        pooled = encoded[1].text_embeds.masked_fill(empty[:, None], 0)
        time_ids = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]], device=tokens.device).expand(len(tokens), -1)
        return {"encoder_hidden_states": states, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids}}

    def pipeline(self, vae: AutoencoderKL, networks: nn.ModuleDict, tokenizer: CLIPTokenizer) -> DiffusionPipeline:
        components = {"vae": vae, "tokenizer": tokenizer, "scheduler": self.scheduler(), **networks}
        return StableDiffusionXLPipeline(**components, tokenizer_2=tokenizer, add_watermarker=False)


class LastKeyWeighted(TorchFunctionMode):
    """Attention in which the last key counts as often as is said: as if it and its value were there so many times."""

    def __init__(self, times: int):
        super().__init__()
        self.times = times

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            bias = args[1].new_zeros(1, 1, 1, args[1].shape[2])  # of keys; they are [B, heads, keys, width]
            bias[..., -1] = math.log(self.times)
            kwargs = {**kwargs, "attn_mask": bias}
        return func(*args, **kwargs)


class StableDiffusion3:
    """A transformer of flow matching on image and text at once, and two text encoders; without T5."""

    prompt_length = 10  # the longest caption has nine tokens
    tokens_of_t5 = 256  # the stock pipeline's zeros in the place of T5's states

    def networks(self, tokenizer: CLIPTokenizer) -> nn.ModuleDict:
        configs = [text_config(tokenizer, width, 3, projection_dim=width) for width in (TEXT_WIDTH, TEXT_WIDTH_2)]
        text_encoder, text_encoder_2 = (CLIPTextModelWithProjection(config) for config in configs)
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=4,
            attention_head_dim=32,
            num_attention_heads=4,
            caption_projection_dim=128,
            joint_attention_dim=TEXT_WIDTH + TEXT_WIDTH_2,
            pooled_projection_dim=TEXT_WIDTH + TEXT_WIDTH_2,
            pos_embed_max_size=8,
            qk_norm="rms_norm",
        )
        return nn.ModuleDict(
            {"text_encoder": text_encoder, "text_encoder_2": text_encoder_2, "transformer": transformer}
        )

    @staticmethod
    def arguments(networks: nn.ModuleDict, tokens: Tensor, empty: Tensor) -> dict[str, Any]:
        encoded = [networks[name](tokens, output_hidden_states=True) for name in ("text_encoder", "text_encoder_2")]
        states = torch.cat([output.hidden_states[-2] for output in encoded], -1)  # [B, prompt_length, 160]
        zeros = states.new_zeros(len(tokens), StableDiffusion3.tokens_of_t5, states.shape[2])
        return {
            "encoder_hidden_states": torch.cat([states, zeros], 1),
            "pooled_projections": torch.cat([output.text_embeds for output in encoded], -1),
        }

    def scheduler(self) -> SchedulerMixin:
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)

    def schedule(self) -> NoiseSchedule:
        return FlowSchedule.of(self.scheduler())

    def predict(self, networks: nn.ModuleDict, x_t: Tensor, t: Tensor, tokens: Tensor, empty: Tensor) -> Tensor:
        given = self.arguments(networks, tokens, empty)
        # The zeros have no positions, so they are equal at every layer: one of them stands for all, at a fifth of the cost.
        given["encoder_hidden_states"] = given["encoder_hidden_states"][:, : self.prompt_length + 1]
        with LastKeyWeighted(self.tokens_of_t5):
            return networks["transformer"](x_t, timestep=t, **given).sample

    def pipeline(self, vae: AutoencoderKL, networks: nn.ModuleDict, tokenizer: CLIPTokenizer) -> DiffusionPipeline:
        vae.register_to_config(shift_factor=0.0)
        components = {"vae": vae, "tokenizer": tokenizer, "scheduler": self.scheduler(), **networks}
        return StableDiffusion3Pipeline(**components, tokenizer_2=tokenizer, text_encoder_3=None, tokenizer_3=None)


KINDS = {
    "stable_diffusion": StableDiffusion,
    "stable_diffusion_xl": StableDiffusionXL,
    "stable_diffusion_3": StableDiffusion3,
}
