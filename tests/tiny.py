"""Tiny real components with random weights: a Stable Diffusion of half a megabyte."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    EDMEulerScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffusers_disback.families import FAMILIES, network_name_of
from diffusers_disback.models.reference import ModelReference
from diffusers_disback.models.weights import fingerprint
from diffusers_disback.path.path import DegradationPath
from shapes.make_teacher import make_tokenizer


WIDTH = 32
PROMPTS = ["a red circle on a navy background", "a blue star on a white background", "an orange square"]


START = {"name_or_path": None, "sha256": "0" * 64, "conditioning_timestep": 399}


def scheduler(prediction_type: str = "epsilon", **config) -> DDPMScheduler:
    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        **{"clip_sample": False, "steps_offset": 1, **config},
    )


def unet(seed: int = 0, **config) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        **{
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "cross_attention_dim": WIDTH,
            "attention_head_dim": 2,
            "norm_num_groups": 4,
            **config,
        }
    )


def pipeline(prediction_type: str = "epsilon", seed: int = 0, **unet_config) -> StableDiffusionPipeline:
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    pipe = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet(seed, **unet_config).eval(),
        scheduler=scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline_xl(prediction_type: str = "epsilon", seed: int = 0, **unet_config) -> StableDiffusionXLPipeline:
    """SDXL's structure: two text encoders, a pooled embedding, and a UNet without cross-attention in its first block."""
    one = pipeline(prediction_type, seed)
    torch.manual_seed(seed + 100)
    config = {**one.text_encoder.config.to_dict(), "projection_dim": WIDTH}
    pipe = StableDiffusionXLPipeline(
        vae=one.vae,
        text_encoder=one.text_encoder,
        tokenizer=one.tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**config)).eval(),
        tokenizer_2=make_tokenizer(),
        unet=unet(
            seed,
            **{
                "cross_attention_dim": 2 * WIDTH,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
                "transformer_layers_per_block": (1, 2),
                "use_linear_projection": True,
                **unet_config,
            },
        ).eval(),
        scheduler=scheduler(prediction_type),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def unet_2d(seed: int = 0, **config) -> UNet2DModel:
    torch.manual_seed(seed)
    return UNet2DModel(
        **{
            "sample_size": 16,
            "block_out_channels": (8, 16),
            "norm_num_groups": 4,
            "layers_per_block": 1,
            "attention_head_dim": 4,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            **config,
        }
    ).eval()


def pixels(
    prediction_type: str = "epsilon",
    seed: int = 0,
    kind: type[DiffusionPipeline] = DDPMPipeline,
    **unet_config,
) -> DiffusionPipeline:
    """On pixels, with the scheduler of diffusers' script, which clips; labels by `num_class_embeds`."""
    pipe = kind(unet_2d(seed, **unet_config), DDPMScheduler(prediction_type=prediction_type))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def dit(prediction_type: str = "epsilon", seed: int = 0, **config) -> DiTPipeline:
    """Of ten classes; half of its outputs are a variance."""
    vae = pipeline(seed=seed).vae
    torch.manual_seed(seed)
    transformer = DiTTransformer2DModel(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 3,
            "sample_size": 8,
            "num_embeds_ada_norm": 10,
            **config,
        }
    )
    pipe = DiTPipeline(transformer.eval(), vae, scheduler(prediction_type, clip_sample=True))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def edm(prediction_type: str = "epsilon", seed: int = 0, **unet_config) -> ConsistencyModelPipeline:
    """On pixels, in EDM's preconditioning."""
    pipe = ConsistencyModelPipeline(unet_2d(seed, **unet_config), EDMEulerScheduler(prediction_type=prediction_type))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def rescaled_edm(prediction_type: str = "epsilon", seed: int = 0, **unet_config) -> ConsistencyModelPipeline:
    """On pixels, in EDM's preconditioning, with the time of OpenAI's networks. There is one prediction type."""
    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=1000, sigma_min=0.0, clip_denoised=False)
    pipe = ConsistencyModelPipeline(unet_2d(seed, **unet_config), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


PIPELINES = {
    "stable_diffusion": pipeline,
    "stable_diffusion_xl": pipeline_xl,
    "pixels": pixels,
    "dit": dit,
    "edm": edm,
    "rescaled_edm": rescaled_edm,
}
TEXT = {name: make for name, make in PIPELINES.items() if FAMILIES[name].takes_prompts}


def save_teacher(folder: Path, prediction_type: str = "epsilon", seed: int = 0) -> Path:
    pipeline(prediction_type, seed).save_pretrained(folder)
    return folder


def write_prompts(folder: Path) -> Path:
    file = folder / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n")
    return file


def path(folder: Path, teacher_folder: Path, nodes: int = 2, **recording) -> DegradationPath:
    """A complete path whose node i has the weights of `unet(seed=i)`."""
    teacher = ModelReference(str(teacher_folder)).resolve(network_name_of)
    made = DegradationPath.create(folder, teacher, fingerprint(unet()), START, recording)
    for i in range(1, nodes + 1):
        made.append(unet(seed=i), step=100 * i, loss=0.5)
    made.finish({"steps": 100 * nodes, "seconds": 1.0, "peak_memory_mb": 1.0})
    return made
