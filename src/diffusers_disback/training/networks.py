"""Prepares networks for a run: its accelerator, precision and memory settings, and a base that roles share."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    ProjectConfiguration,
    parse_flag_from_env,
)
from diffusers import ModelMixin
from torch import Tensor, nn

from ..models.adapters import SharedNetwork, base_of, lora_config
from ..models.batch import Condition
from ..models.score_model import ScoreModel
from .config import TrainingConfig
from .sharding import can_save_shards, is_sharded


PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def accelerator_of(config: TrainingConfig) -> Accelerator:
    """A fresh accelerator, as the settings say.

    Raises:
        ValueError: If fp16 is asked for on a CPU, a discriminator in fp16, or a launch that is not supported with these
            settings.
    """
    _check_launcher()
    accelerator = Accelerator(
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mixed_precision=config.mixed_precision,
        log_with=None if config.report_to == "none" else config.report_to,
        project_config=ProjectConfiguration(
            project_dir=config.output_dir, logging_dir=str(Path(config.output_dir, config.logging_dir))
        ),
        # A learning rate step per update, whatever the number of processes.
        step_scheduler_with_optimizer=False,
        # Each weight is cast once in a pass: a cache would only hold copies, of the whole network where no gradient is asked.
        # Buffers, such as positions of patches, are constants; to send them would be to wait for others in every pass.
        kwargs_handlers=[AutocastKwargs(cache_enabled=False), DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    _check_launch(config, accelerator.mixed_precision)
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError(
            "--mixed_precision fp16, here or of `accelerate launch`, needs a GPU, but this run is on the CPU. Pass "
            "--mixed_precision bf16, or no."
        )
    if config.has_discriminator:
        _check_trains_by_one_loss(accelerator)
    return accelerator


def _check_launcher() -> None:
    """Raises a `ValueError` if `accelerate launch` was asked for what is never supported; accelerate's own errors name no remedy."""
    for flag, name in (("DEEPSPEED", "DeepSpeed"), ("PARALLELISM_CONFIG", "accelerate's parallelism config")):
        if parse_flag_from_env(f"ACCELERATE_USE_{flag}"):
            raise ValueError(f"{name} is not supported. Launch with plain data parallelism, or with FSDP2.")
    if is_sharded() and (os.environ.get("FSDP_VERSION") != "2" or parse_flag_from_env("FSDP_OFFLOAD_PARAMS")):
        raise ValueError(
            "Of FSDP version 2 is supported, without offloading: pass --fsdp_version 2 --fsdp_offload_params false to "
            "`accelerate launch`, or launch with plain data parallelism."
        )


def _check_launch(config: TrainingConfig, mixed_precision: str) -> None:
    """Raises a `ValueError` if processes were launched to share networks in a way that is not supported, here or with these
    settings."""
    if not is_sharded():
        return
    if not torch.distributed.is_initialized():
        raise ValueError("FSDP shards over the processes of a launch, but this is a single one. Launch without FSDP.")
    if not can_save_shards():
        raise ValueError(
            f"FSDP2 needs a newer torch: torch {torch.__version__} cannot write each process's share into safetensors."
        )
    refused = {
        "--lora_rank": (
            config.lora_rank is not None,
            "adapters are trained on a network that every process holds whole",
        ),
        "a discriminator": (config.has_discriminator, "it looks into a network that every process holds whole"),
        "--metric_for_best_model": (config.metric_for_best_model is not None, "it keeps whole students"),
        "--offload_idle_role": (config.offload_idle_role, "shares stay on their device"),
        "--offload_ema": (config.offload_ema, "shares stay on their device"),
        "--use_8bit_adam": (config.use_8bit_adam, "its states have no shares"),
        "--use_paged_adam": (config.use_paged_adam, "its states have no shares"),
        "--channels_last": (config.channels_last, "weights are sharded as they lie in memory"),
        "--compile": (config.compile, "that was never tried"),
        "--mixed_precision fp16": (mixed_precision == "fp16", "its loss scaling was never tried"),
    }
    for name, (is_asked_for, why) in refused.items():
        if is_asked_for:
            raise ValueError(
                f"This launch shards networks by FSDP, which does not go with {name}: {why}. Leave it out, or launch with plain "
                "data parallelism."
            )


def _check_trains_by_one_loss(accelerator: Accelerator) -> None:
    """Raises a `ValueError` where a discriminator and the fake score could not be trained by one backward pass."""
    if accelerator.mixed_precision == "fp16":
        raise ValueError(
            "A discriminator is trained by one loss with the fake score, but --mixed_precision fp16, here or of `accelerate "
            "launch`, scales the loss of each network by itself. Pass --mixed_precision bf16, or no."
        )


def compute_dtype(accelerator: Accelerator) -> torch.dtype:
    """The precision that networks compute in."""
    return PRECISIONS.get(accelerator.mixed_precision, torch.float32)


def in_precision(model: ScoreModel, accelerator: Accelerator) -> ScoreModel:
    """The same way to ask, in the trained networks' precision, operation for operation."""
    call = model.call

    def call_in_precision(network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        with accelerator.autocast():
            return call(network, x_t, t, condition)

    model.call = call_in_precision
    return model


def tuned(network: ModelMixin, config: TrainingConfig, checkpointed: Callable | None = None) -> ModelMixin:
    """A network with the settings that change its memory and speed, and not what it computes.

    Args:
        network (`ModelMixin`): A denoiser.
        config (`TrainingConfig`): With these settings.
        checkpointed (`Callable`, *optional*): Runs a block under gradient checkpointing; by default diffusers' own.

    Raises:
        ValueError: If xformers or another attention is asked for and cannot be used.
    """
    check_tuning(network, config)
    if config.gradient_checkpointing:
        network.enable_gradient_checkpointing(checkpointed)
    if config.channels_last:
        network.to(memory_format=torch.channels_last)
    if config.enable_xformers_memory_efficient_attention:
        try:
            network.enable_xformers_memory_efficient_attention()
        except (ImportError, ModuleNotFoundError, ValueError) as error:
            raise ValueError(
                f"--enable_xformers_memory_efficient_attention needs xformers and a GPU ({error}). Leave it out: torch's "
                "own attention, which is the default, is as frugal."
            ) from error
    if config.attention_backend is not None:
        _dispatch_attention(network, config.attention_backend)
    if config.compile:
        # All blocks share one code object, of which each width, role and batch size is a variant. (`recompile_limit` since
        # torch 2.7, which knows this name, too.)
        torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)
        _compile_blocks(network)
    return network


def check_tuning(network: ModelMixin, config: TrainingConfig) -> None:
    """Refuses settings of `tuned` that a denoiser cannot have.

    Raises:
        ValueError: If xformers are asked for on a transformer, or another attention where no layer asks diffusers' dispatcher, whose
            `set_attention_backend` would change nothing without a word, or compiling where no blocks are repeated.
    """
    name, backend = type(network).__name__, config.attention_backend
    blocks = getattr(network, "transformer_blocks", ())  # of a transformer; those of a UNet lie in its levels
    if config.enable_xformers_memory_efficient_attention and len(blocks):
        raise ValueError(  # diffusers would replace SANA's linear attention, too
            f"--enable_xformers_memory_efficient_attention is of UNets, and the denoiser is a {name}. Leave it out: torch's own "
            "attention, which is the default, is as frugal."
        )
    processors = (getattr(one, "processor", None) for one in network.modules())
    if backend is not None and not any(hasattr(one, "_attention_backend") for one in processors):
        raise ValueError(
            f"--attention_backend {backend}: no layer of a {name} asks diffusers' dispatcher for its attention, in diffusers "
            f"{diffusers.__version__}. Leave it out: it computes torch's scaled dot product attention."
        )
    if config.compile and not (network._repeated_blocks or len(blocks)):
        raise ValueError(f"--compile: a {name} has no repeated blocks to compile. Leave it out.")


def _compile_blocks(network: ModelMixin) -> None:
    """Compiles the blocks that diffusers names as repeated, or else those of a transformer."""
    if network._repeated_blocks:
        network.compile_repeated_blocks()
        return
    blocks: Any = network.transformer_blocks
    for block in blocks:
        block.compile()


def _dispatch_attention(network: ModelMixin, backend: str) -> None:
    """Chooses the attention of a network's layers by diffusers' dispatcher; a `ValueError` if there is no such attention here."""
    try:
        network.set_attention_backend(backend)
    except (ImportError, RuntimeError, ValueError) as error:
        raise ValueError(f"--attention_backend {backend} cannot be used: {error} Or leave it out.") from error


def shared_base(network: ModelMixin, config: TrainingConfig) -> SharedNetwork:
    """A network in float32 as the base of several roles' adapters, in the precision and on the device of the run."""
    accelerator = accelerator_of(config)
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    dtype, scratch = compute_dtype(accelerator), config.output_dir
    base = base_of(network, accelerator.device, dtype, config.base_quantization, scratch)
    if base is not network:
        network.to("cpu")  # it is needed again to fuse a trained adapter into
    shared = SharedNetwork(base)
    tuned(base, config, shared.checkpointed)
    return shared


def add_adapter(shared: SharedNetwork, role: str, config: TrainingConfig, seed: int) -> None:
    """Adds a role's adapter, as the settings ask for it."""
    if config.lora_rank is None:
        raise ValueError(f"The {role} is no adapter: there is no --lora_rank.")
    shared.add(role, lora_config(config.lora_rank, config.lora_alpha, config.lora_target_modules), seed)
