"""Stable Diffusion 1.5, 2.1 and SDXL with random weights, in full or at a fraction of their width."""

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


HEAD = 64  # channels of an attention head, of SD 2.1 and SDXL

# The originals' own configs: UNet, and (width, layers, heads, intermediate width) of each text encoder.
UNETS: dict[str, dict[str, Any]] = {
    "sd15": {
        "sample_size": 64,
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
        "block_out_channels": (320, 640, 1280, 1280),
    },
    "sd21": {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "block_out_channels": (320, 640, 1280, 1280),
        "use_linear_projection": True,
    },
    "sdxl": {
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
TEXT_ENCODERS = {
    "sd15": [(768, 12, 12, 3072)],
    "sd21": [(1024, 23, 16, 4096)],
    "sdxl": [(768, 12, 12, 3072), (1280, 32, 20, 5120)],
}
PREDICTIONS = {"sd15": "epsilon", "sd21": "v_prediction", "sdxl": "epsilon"}
VAE_CHANNELS = (128, 256, 512, 512)


def scaled(width: int, factor: float, step: int = 32) -> int:
    """A number of channels at a fraction of the width, a multiple of `step`."""
    return max(step, round(width * factor / step) * step)


def unet_config(name: str, factor: float = 1.0, latents: int | None = None) -> dict[str, Any]:
    """The UNet's config: the original's blocks and layers, its channels times `factor`."""
    config = dict(UNETS[name])
    config["sample_size"] = latents or config["sample_size"]
    if factor == 1.0:
        return config
    channels = tuple(scaled(width, factor) for width in config["block_out_channels"])
    heads = config["attention_head_dim"]
    config["block_out_channels"] = channels
    if not isinstance(heads, int):  # a name that diffusers keeps for history: it is the number of heads
        config["attention_head_dim"] = tuple(
            next(number for number in range(max(1, width // HEAD), 0, -1) if width % number == 0) for width in channels
        )
    encoders = [scaled(width, factor) for width, *_ in TEXT_ENCODERS[name]]
    config["cross_attention_dim"] = sum(encoders)
    if "addition_embed_type" in config:
        config["addition_time_embed_dim"] = scaled(256, factor)
        config["projection_class_embeddings_input_dim"] = 6 * config["addition_time_embed_dim"] + encoders[-1]
    return config


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer of single letters: 77 tokens of any text, as of the real one."""
    letters = [chr(code) for code in range(33, 127)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: number for number, token in enumerate(tokens)}, merges=[], model_max_length=77)


def text_encoders(name: str, factor: float, depth: float, words: CLIPTokenizer) -> list[torch.nn.Module]:
    """The originals' width times `factor`, and their number of layers times `depth`."""
    made = []
    for place, (width, layers, heads, inner) in enumerate(TEXT_ENCODERS[name]):
        own = scaled(width, factor)
        config = CLIPTextConfig(
            vocab_size=49408,
            hidden_size=own,
            intermediate_size=scaled(inner, factor),
            num_hidden_layers=max(1, round(layers * depth)),
            num_attention_heads=heads if own % heads == 0 else max(1, own // 32),
            projection_dim=own,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
        made.append((CLIPTextModel if place == 0 else CLIPTextModelWithProjection)(config).eval())
    return made


def vae(factor: float = 1.0, sample_size: int = 512) -> AutoencoderKL:
    """The autoencoder of all three, its channels times `factor`."""
    channels = tuple(scaled(width, factor) for width in VAE_CHANNELS)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=channels,
        layers_per_block=2,
        latent_channels=4,
        sample_size=sample_size,
    ).eval()


def random_pipeline(name: str, factor: float = 1.0, latents: int | None = None) -> DiffusionPipeline:
    """A pipeline of the structure of `sd15`, `sd21` or `sdxl` with random weights, in float32.

    Args:
        name (`str`): Of `UNETS`.
        factor (`float`): Of all widths: channels, and with them text embeddings.
        latents (`int`, *optional*): Side of the latents; by default the original's. With smaller latents text encoders
            lose layers in proportion to the area, so that their share of the work stays about what it is.
    """
    torch.manual_seed(0)
    words, config = tokenizer(), unet_config(name, factor, latents)
    depth = (config["sample_size"] / UNETS[name]["sample_size"]) ** 2
    encoders = text_encoders(name, factor, depth, words)
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=PREDICTIONS[name],
        clip_sample=False,
        steps_offset=1,
    )
    common = {
        "vae": vae(factor, 8 * config["sample_size"]),
        "text_encoder": encoders[0],
        "tokenizer": words,
        "unet": UNet2DConditionModel(**config).eval(),
        "scheduler": scheduler,
    }
    if name == "sdxl":
        pipeline = StableDiffusionXLPipeline(
            **common, text_encoder_2=encoders[1], tokenizer_2=tokenizer(), add_watermarker=False
        )
    else:
        pipeline = StableDiffusionPipeline(
            **common, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def text_share(name: str, factor: float = 1.0, latents: int | None = None) -> float:
    """Floating-point operations of the text encoders over those of the UNet, for one prompt, counted on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        pipeline = random_pipeline(name, factor, latents)
        config = pipeline.unet.config
        tokens = torch.zeros(1, 77, dtype=torch.long)
        arguments = {"encoder_hidden_states": torch.empty(1, 77, config.cross_attention_dim)}
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            arguments["added_cond_kwargs"] = {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)}
        side = config.sample_size
        counts = []
        encoders = [
            getattr(pipeline, each) for each in ("text_encoder", "text_encoder_2") if each in pipeline.components
        ]
        for run in (
            lambda: [encoder(tokens) for encoder in encoders],
            lambda: pipeline.unet(torch.empty(1, 4, side, side), torch.zeros(1, dtype=torch.long), **arguments),
        ):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                run()
            counts.append(counter.get_total_flops())
    return counts[0] / counts[1]


def parameters(module: torch.nn.Module) -> int:
    """Their number."""
    return sum(parameter.numel() for parameter in module.parameters())


def machine() -> dict[str, Any]:
    """What figures were measured on, and with what."""
    from importlib.metadata import version

    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    made = {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "command": " ".join([Path(sys.executable).name, *map(_relative, sys.argv)]),
        "commit": _commit(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers", "accelerate", "peft")},
    }
    if torch.cuda.is_available():
        made["gpu"] = torch.cuda.get_device_name()
    return made


def _relative(argument: str) -> str:
    place = Path(argument)
    return str(place.relative_to(Path.cwd())) if place.is_absolute() and place.is_relative_to(Path.cwd()) else argument


def _commit() -> str | None:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
