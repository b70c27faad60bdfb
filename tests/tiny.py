"""Tiny real components with random weights: a Stable Diffusion of half a megabyte."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SchedulerMixin,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    T5Config,
    T5EncoderModel,
)

from diffusers_disback.families import network_name_of
from diffusers_disback.models.reference import ModelReference
from diffusers_disback.models.weights import fingerprint
from diffusers_disback.path.path import DegradationPath
from shapes.denoisers import make_tokenizer


WIDTH = 32
PROMPTS = ["a red circle on a navy background", "a blue star on a white background", "an orange square"]


# As of the published checkpoints.
FLOW_OF_SANA = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
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


def pipeline_3(seed: int = 0, t5: bool = True, flow: dict | None = None, **config) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3's structure: three text encoders, a transformer on two streams, and latents with a shift."""
    one = pipeline(seed=seed)
    one.vae.register_to_config(shift_factor=0.0609)
    torch.manual_seed(seed + 200)
    clip = CLIPTextConfig(**{**one.text_encoder.config.to_dict(), "projection_dim": WIDTH})
    parts = {"text_encoder": CLIPTextModelWithProjection(clip), "text_encoder_2": CLIPTextModelWithProjection(clip)}
    size = {"d_model": 3 * WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    third = T5EncoderModel(T5Config(vocab_size=len(one.tokenizer), **size)).eval()
    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        **{
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "caption_projection_dim": 16,
            "joint_attention_dim": 3 * WIDTH,
            "pooled_projection_dim": 2 * WIDTH,
            "pos_embed_max_size": 12,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
            **config,
        }
    )
    pipe = StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **(flow or {})}),
        vae=one.vae,
        **{name: part.eval() for name, part in parts.items()},
        tokenizer=one.tokenizer,
        tokenizer_2=make_tokenizer(),
        text_encoder_3=third if t5 else None,
        tokenizer_3=make_tokenizer() if t5 else None,  # of T5 there is none to be had offline
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sana(seed: int = 0, flow: SchedulerMixin | None = None, **config) -> SanaPipeline:
    """SANA's structure: a language model's states, linear attention, and a deterministic autoencoder of four pixels a latent."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "query_pre_attn_scalar": 8}
    gemma = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        pad_token_id=0,
        **heads,
    )
    stages = {"block_out_channels": (8, 8, 8), "layers_per_block": (1, 1, 1), "qkv_multiscales": ((), (), ())}
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        scaling_factor=0.41407,
        **{f"{half}_{name}": value for half in ("encoder", "decoder") for name, value in stages.items()},
    )
    transformer = SanaTransformer2DModel(
        **{
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": WIDTH,
            **config,
        }
    )
    pipe = SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=Gemma2Model(gemma).eval(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=flow or DPMSolverMultistepScheduler(**FLOW_OF_SANA),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixart(
    prediction_type: str = "epsilon", seed: int = 0, kind: type[DiffusionPipeline] = PixArtAlphaPipeline, **config
) -> DiffusionPipeline:
    """PixArt's structure: the states of T5, and half of the outputs a variance."""
    one = pipeline(seed=seed)
    torch.manual_seed(seed + 300)
    size = {"d_model": WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    encoder = T5EncoderModel(T5Config(vocab_size=len(one.tokenizer), **size)).eval()
    torch.manual_seed(seed)
    transformer = PixArtTransformer2DModel(
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 3,
            "cross_attention_dim": 24,
            "sample_size": 8,
            "caption_channels": WIDTH,
            **config,
        }
    )
    parts = {"text_encoder": encoder, "tokenizer": one.tokenizer, "vae": one.vae}
    pipe = kind(transformer=transformer.eval(), scheduler=scheduler(prediction_type), **parts)
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
    "stable_diffusion_3": pipeline_3,
    "sana": sana,
    "pixart": pixart,
    "pixels": pixels,
    "dit": dit,
    "edm": edm,
    "rescaled_edm": rescaled_edm,
}
TEXT = {name: PIPELINES[name] for name in ("stable_diffusion", "stable_diffusion_xl")}  # UNets, with betas
FLOW = {name: PIPELINES[name] for name in ("stable_diffusion_3", "sana")}


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
