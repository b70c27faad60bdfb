"""A reader of LoRAs in the layout of kohya's scripts that shares no code with the library or with diffusers' converters.

The layout, as it is described in public: a file holds three tensors for each layer that it adapts, `NAME.lora_down.weight`,
`NAME.lora_up.weight` and `NAME.alpha`. NAME is `lora_unet_` and the path of the layer in the UNet, with `_` for every dot. The path
is that of diffusers for Stable Diffusion 1.x and 2.x, and that of the original checkpoint for SDXL. Text encoders' layers begin with
`lora_te`. A layer's weight becomes `W + alpha / rank * up @ down`; of a convolution, `down` has its kernel and `up` one of 1x1.
"""

import re

import torch
from torch import Tensor


PREFIX = "model.diffusion_model."  # of a UNet in a checkpoint of the original layout


def merge(unet: dict[str, Tensor], lora: dict[str, Tensor], strength: float = 1.0) -> dict[str, Tensor]:
    """A UNet's weights with a LoRA added.

    Args:
        unet (`dict[str, Tensor]`): In the layout of diffusers, or of the original checkpoints.
        lora (`dict[str, Tensor]`): As the file has it.
        strength (`float`): The LoRA's, as other programs call it.

    Raises:
        ValueError: If a tensor is of no layer, a layer is not whole, or shapes do not fit.
    """
    places = named_layers(unet)
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in lora.items():
        name, _, part = key.partition(".")
        if name not in places or part not in ("lora_down.weight", "lora_up.weight", "alpha"):
            raise ValueError(f"{key} fits nothing in this UNet.")
        layers.setdefault(name, {})[part] = tensor
    merged = dict(unet)
    for name, parts in layers.items():
        if len(parts) != 3:
            raise ValueError(f"{name} has only {sorted(parts)}.")
        down, up, alpha = parts["lora_down.weight"], parts["lora_up.weight"], parts["alpha"].item()
        weight, rank = merged[places[name]], len(down)
        if down.shape[1:] != weight.shape[1:] or up.shape != (len(weight), rank, *[1] * (weight.ndim - 2)):
            raise ValueError(f"{name} is {tuple(up.shape)} times {tuple(down.shape)} on {tuple(weight.shape)}.")
        update = torch.einsum("or,r...->o...", up.reshape(len(weight), rank).double(), down.double())
        merged[places[name]] = (weight.double() + strength * alpha / rank * update).to(weight.dtype)
    return merged


def named_layers(unet: dict[str, Tensor]) -> dict[str, str]:
    """A layer's name in LoRA files -> the key of its weight. Layers are what has a matrix or a kernel."""
    keys = {
        key.removeprefix(PREFIX).removesuffix(".weight"): key
        for key, tensor in unet.items()
        if key.endswith(".weight") and tensor.ndim in (2, 4)
    }
    is_original = any(path.startswith("input_blocks.") for path in keys)
    is_xl = any(path.startswith("label_emb.") for path in keys)
    if any(path.startswith("add_embedding.") for path in keys):
        raise ValueError("Files for SDXL name the layers of the original layout; pass its weights in that.")
    if is_original and not is_xl:
        places = Places(keys)
        keys = {places.in_diffusers(path): key for path, key in keys.items()}
    return {f"lora_unet_{path.replace('.', '_')}": key for path, key in keys.items()}


class Places:
    """Where the blocks of an original UNet are in diffusers'. A level ends with the layer that halves or doubles the image."""

    RESNET = {
        "in_layers.2": "conv1",
        "out_layers.3": "conv2",
        "emb_layers.1": "time_emb_proj",
        "skip_connection": "conv_shortcut",
    }
    OUTSIDE = {
        "input_blocks.0.0": "conv_in",
        "out.2": "conv_out",
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
    }

    def __init__(self, paths):
        self.blocks = {
            "middle_block.0": "mid_block.resnets.0",
            "middle_block.1": "mid_block.attentions.0",
            "middle_block.2": "mid_block.resnets.1",
        }
        for side, ours in (("input", "down"), ("output", "up")):
            numbers = {int(m[1]) for m in (re.match(rf"{side}_blocks\.(\d+)\.", path) for path in paths) if m}
            level = place = 0
            for number in sorted(numbers - ({0} if side == "input" else set())):
                resizes = False
                for part in range(3):
                    block = f"{side}_blocks.{number}.{part}"
                    inside = {path.removeprefix(f"{block}.") for path in paths if path.startswith(f"{block}.")}
                    if inside & {"op", "conv"}:
                        resizes, kind = True, f"{ours}samplers.0"
                    else:
                        kind = f"{'resnets' if part == 0 else 'attentions'}.{place}"
                    if inside:
                        self.blocks[block] = f"{ours}_blocks.{level}.{kind}"
                level, place = (level + 1, 0) if resizes else (level, place + 1)

    def in_diffusers(self, path: str) -> str:
        if path in self.OUTSIDE:
            return self.OUTSIDE[path]
        block, inside = next((b, path.removeprefix(f"{b}.")) for b in self.blocks if path.startswith(f"{b}."))
        return f"{self.blocks[block]}.{self.RESNET.get(inside, 'conv' if inside == 'op' else inside)}"
