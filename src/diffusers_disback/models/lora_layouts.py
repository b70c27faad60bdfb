"""The files of a student's LoRA: one that diffusers loads, and of a UNet one in the layout of kohya's scripts for other programs."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .adapters import Lora, save_lora
from .teacher_lora import original_names
from .weights import save_weights


if TYPE_CHECKING:
    from diffusers import ModelMixin


KOHYA = "kohya.safetensors"
"""The file for ComfyUI, A1111 and others."""


def save_layouts(lora: Lora, network: "ModelMixin", folder: str | Path, denoiser: str) -> tuple[Path, ...]:
    """Writes a LoRA for `pipe.load_lora_weights(folder)`, and one of a UNet for other programs, too. Both hold the same numbers.

    Args:
        lora (`Lora`): Weights in peft's names; rank and alpha, which are the same of every layer.
        network (`ModelMixin`): That is adapted; it gives the layers' names.
        folder (`str` or `Path`): Made if it is not there.
        denoiser (`str`): The pipeline's component that is adapted.

    Returns:
        `tuple[Path, ...]`: The files.
    """
    from diffusers import UNet2DConditionModel

    weights, config = lora
    own = save_lora(weights, config, folder, denoiser)
    if not isinstance(network, UNet2DConditionModel):
        return (own,)
    layers = kohya_layers(weights, config.lora_alpha, network)
    save_weights({key: value.contiguous().cpu() for key, value in layers.items()}, Path(folder, KOHYA))
    return own, Path(folder, KOHYA)


def kohya_layers(weights: dict[str, Tensor], alpha: float, network: "ModelMixin") -> dict[str, Tensor]:
    """A LoRA of a UNet in kohya's names: `lora_unet_LAYER.lora_down.weight`, `.lora_up.weight` and `.alpha`, with underscores for
    the dots of LAYER. Layers of Stable Diffusion 1.x and 2.x are called as in diffusers, those of SDXL as in its original
    checkpoint (`input_blocks_4_1_...`), as kohya's scripts do: some programs pass over SDXL's layers by diffusers' names.

    Args:
        weights (`dict[str, Tensor]`): In peft's names.
        alpha (`float`): Of every layer: an update is scaled by alpha / rank.
        network (`ModelMixin`): The UNet.
    """
    is_xl = network.config.addition_embed_type == "text_time"
    names = original_names(network) if is_xl else {name: name for name, _ in network.named_modules()}
    found = {}
    for key, tensor in weights.items():
        layer, factor = key.rsplit(".lora_", 1)
        prefix = f"lora_unet_{names[layer].replace('.', '_')}"
        found[f"{prefix}.lora_{'down' if factor == 'A.weight' else 'up'}.weight"] = tensor
        found[f"{prefix}.alpha"] = torch.tensor(float(alpha))
    return found
