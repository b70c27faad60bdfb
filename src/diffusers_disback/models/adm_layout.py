"""Checkpoints of ADM's UNet (Dhariwal and Nichol, 2021, arXiv 2105.05233) as OpenAI's code names its tensors: those of EDM that
were published with Consistency Models (Song et al., 2023, arXiv 2303.01469), as diffusers' `UNet2DModel`.

Such a file holds weights alone. What they tell of the network is read from their names and shapes; the resolution, the width of
an attention head and the order of queries, keys and values they do not tell."""

import pickle
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor

from ..hub.files import check_no_pointer
from .pipeline_folder import UNREADABLE
from .weights import check_finite, read_weights


ORDERS = ("new", "legacy")
"""How `qkv` is laid out: all queries, all keys, all values (OpenAI's flash attention and `QKVAttention`), or each head's three
after one another (`QKVAttentionLegacy`)."""

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_GROUPS = 32  # of every normalisation
_OUTER = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ATTENTION = {"norm": "group_norm", "proj_out": "to_out.0"}
_QKV = ("to_q", "to_k", "to_v")


def read_checkpoint(file: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, by their names: of a safetensors file, or of a state dict that `torch.save` wrote, which is
    read with `weights_only=True` and so runs no code.

    Raises:
        ValueError: If there is no such file, it holds more than tensors, or it cannot be read.
    """
    if file.suffix.lower() == ".pkl":
        raise ValueError(
            f"{file} is refused: NVIDIA's checkpoints are pickles of classes, which run code when they are read, of networks with "
            "other names and another time (c_noise). In their own code base, write the network as a diffusers folder with an "
            "EDMEulerScheduler, which is a teacher without a conversion."
        )
    if not file.is_file():
        raise ValueError(f"There is no file {file}.")
    check_no_pointer(file)
    if file.suffix.lower() == ".safetensors":
        return read_weights(file)
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, struct.error, *UNREADABLE) as error:
        raise ValueError(
            f"{file} cannot be read: it is no whole state dict of torch.save ({type(error).__name__}). Anything but tensors in it "
            "would run code, and is not read: in its own code base, write the network's state_dict() alone."
        ) from error
    if not isinstance(found, dict) or not all(
        isinstance(tensor, Tensor) and tensor.layout == torch.strided for tensor in found.values()
    ):
        raise ValueError(
            f"{file} holds a {type(found).__name__}, and not dense tensors by their names alone: in its own code base, write the network's "
            "state_dict()."
        )
    return {str(name): tensor for name, tensor in found.items()}


def to_unet(
    weights: dict[str, Tensor], what: str, resolution: int, attention_head_dim: int = 64, attention_order: str = "new"
) -> UNet2DModel:
    """The network of a checkpoint, in float32; the same function of its input, its time and its label, up to rounding.

    Args:
        weights (`dict[str, Tensor]`): Of `read_checkpoint`.
        what (`str`): Its name, for messages.
        resolution (`int`): Of the images, in pixels.
        attention_head_dim (`int`): Channels of an attention head (OpenAI's `num_head_channels`).
        attention_order (`str`): One of `ORDERS`.

    Raises:
        ValueError: If a tensor is missing, left over, of another shape, of another type than floating point, or not finite; or
            the network has what `UNet2DModel` has not.
    """
    if attention_order not in ORDERS:
        raise ValueError(f"attention_order={attention_order!r} is none of {', '.join(ORDERS)}.")
    config = _config(weights, what, resolution, attention_head_dim)
    with torch.device("meta"):
        network = UNet2DModel(**config)
    wanted = network.state_dict()
    places = dict(_places(config))
    sources = {key: _source(key, places) for key in wanted}
    names = set(sources.values())
    missing, unexpected = sorted(names - weights.keys()), sorted(weights.keys() - names)
    if missing or unexpected:
        raise ValueError(
            f"{what} is no ADM UNet of {len(config['block_out_channels'])} levels with {config['layers_per_block']} residual blocks: "
            f"{_listed(missing)} missing, {_listed(unexpected)} unexpected."
        )
    check_finite(weights.items(), what)
    found = {
        key: _tensor(key, weights[source], attention_head_dim, attention_order) for key, source in sources.items()
    }
    wrong = [
        f"{sources[key]} {tuple(weights[sources[key]].shape)}"
        for key, own in wanted.items()
        if found[key].shape != own.shape
    ]
    if wrong:
        raise ValueError(
            f"{what} is no ADM UNet: {_listed(sorted(set(wrong)))} of another shape than the rest asks for."
        )
    other = sorted(name for name, tensor in weights.items() if tensor.dtype not in _FLOATS)
    if other:
        raise ValueError(
            f"{what} has {_listed(other)} in {weights[other[0]].dtype}, which float32 does not hold exactly."
        )
    # Queries, keys and values are parts of one tensor of the file, and get memory of their own.
    own_memory = {key: tensor.float().clone(memory_format=torch.contiguous_format) for key, tensor in found.items()}
    network.load_state_dict(own_memory, assign=True)
    return network.eval()


def _config(weights: dict[str, Tensor], what: str, resolution: int, attention_head_dim: int) -> dict[str, Any]:
    """The config of the `UNet2DModel`, as names and shapes tell it."""

    def size(name: str, dimension: int = 0) -> int:
        if name not in weights or weights[name].ndim <= dimension:
            raise ValueError(f"{what} is no ADM UNet: it has no tensor {name} of {dimension + 1} dimensions or more.")
        return weights[name].shape[dimension]

    by_convolution = sorted(
        name
        for name in weights
        if name.startswith(("input_blocks", "output_blocks")) and name.endswith((".op.weight", ".conv.weight"))
    )
    if by_convolution:
        raise ValueError(
            f"{what} changes its resolution by convolutions ({by_convolution[0]}), which is not supported: residual blocks do it in all "
            "published EDM checkpoints of this layout (resblock_updown)."
        )
    # The last block of a level going up, of layers + 1 blocks, holds another residual block, which doubles the resolution.
    ups = [k for k in _count(weights, "output_blocks") if _upsampler(weights, k)]
    blocks, levels = len(_count(weights, "output_blocks")), len(ups) + 1
    each, rest = divmod(blocks, levels)
    if each < 2 or rest or ups != [each * (level + 1) - 1 for level in range(levels - 1)]:
        raise ValueError(
            f"{what} is no ADM UNet: of {blocks} output blocks {ups or 'none'} double the resolution, which are no levels of equally "
            "many blocks."
        )
    firsts = [1 + level * each for level in range(levels)]
    attends = [f"input_blocks.{first}.1.qkv.weight" in weights for first in firsts]
    channels = [size(f"input_blocks.{first}.0.out_layers.3.weight") for first in firsts]
    given, gives = size("input_blocks.0.0.weight", 1), size("out.2.weight")
    if given != gives:
        raise ValueError(
            f"{what} takes {given} channels and gives {gives}: as of a learned variance, which ADM's own diffusion models have and "
            "EDM's have not."
        )
    if any(width % _GROUPS for width in channels):
        raise ValueError(f"{what} has levels of {channels} channels, which are not all divisible by {_GROUPS}.")
    # The last level attends in its middle, whatever its blocks do.
    seen = [channels[level] for level in range(levels) if attends[level] or level == levels - 1]
    if any(width % attention_head_dim for width in seen):
        raise ValueError(
            f"{what} attends in {seen} channels, which are not all divisible by --attention_head_dim {attention_head_dim}."
        )
    if resolution % 2 ** (levels - 1):
        raise ValueError(f"--resolution {resolution} cannot be halved {levels - 1} times, as {what} does.")
    embedding = size("input_blocks.1.0.emb_layers.1.weight")
    return {
        "sample_size": resolution,
        "in_channels": given,
        "out_channels": gives,
        "block_out_channels": tuple(channels),
        "layers_per_block": each - 1,
        "time_embedding_dim": size("time_embed.0.weight"),
        "num_class_embeds": size("label_emb.weight") if "label_emb.weight" in weights else None,
        "down_block_types": tuple("AttnDownBlock2D" if a else "ResnetDownsampleBlock2D" for a in attends),
        "up_block_types": tuple("AttnUpBlock2D" if a else "ResnetUpsampleBlock2D" for a in reversed(attends)),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "attention_head_dim": attention_head_dim,
        "norm_num_groups": _GROUPS,
        "attn_norm_num_groups": _GROUPS,
        "resnet_time_scale_shift": "scale_shift" if embedding == 2 * channels[0] else "default",
    }


def _count(weights: dict[str, Tensor], name: str) -> list[int]:
    """The numbers of blocks, from 0 on."""
    parts = [key.split(".") for key in weights if key.startswith(f"{name}.")]
    found = sorted({int(part[1]) for part in parts if part[1].isdecimal()})
    return found if found == list(range(len(found))) else []


def _upsampler(weights: dict[str, Tensor], block: int) -> bool:
    return any(f"output_blocks.{block}.{place}.in_layers.0.weight" in weights for place in (1, 2))


def _places(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Each leaf module of the `UNet2DModel` that may be there -> its place in ADM's layout."""
    layers, levels = config["layers_per_block"], len(config["block_out_channels"])

    def leaves(place: str, ours: str, names: dict[str, str]) -> Iterator[tuple[str, str]]:
        yield from ((f"{ours}.{own}", f"{place}.{name}") for name, own in names.items())

    def resnet(place: str, ours: str) -> Iterator[tuple[str, str]]:
        return leaves(place, ours, _RESNET)

    def attention(place: str, ours: str) -> Iterator[tuple[str, str]]:
        yield from leaves(place, ours, _ATTENTION)
        yield from ((f"{ours}.{own}", f"{place}.qkv") for own in _QKV)

    yield from ((ours, name) for name, ours in _OUTER.items())
    for level in range(levels):
        for layer in range(layers + 1):
            block = f"input_blocks.{1 + level * (layers + 1) + layer}"
            if layer == layers:
                yield from resnet(f"{block}.0", f"down_blocks.{level}.downsamplers.0")
            else:
                yield from resnet(f"{block}.0", f"down_blocks.{level}.resnets.{layer}")
                yield from attention(f"{block}.1", f"down_blocks.{level}.attentions.{layer}")
            block = f"output_blocks.{level * (layers + 1) + layer}"
            yield from resnet(f"{block}.0", f"up_blocks.{level}.resnets.{layer}")
            yield from attention(f"{block}.1", f"up_blocks.{level}.attentions.{layer}")
        after = 2 if config["up_block_types"][level].startswith("Attn") else 1
        yield from resnet(f"output_blocks.{(level + 1) * (layers + 1) - 1}.{after}", f"up_blocks.{level}.upsamplers.0")
    yield from resnet("middle_block.0", "mid_block.resnets.0")
    yield from attention("middle_block.1", "mid_block.attentions.0")
    yield from resnet("middle_block.2", "mid_block.resnets.1")


def _source(key: str, places: dict[str, str]) -> str:
    """The name in ADM's layout of a tensor of the `UNet2DModel`."""
    module, _, kind = key.rpartition(".")
    return f"{places[module]}.{kind}"


def _tensor(key: str, tensor: Tensor, head_dim: int, order: str) -> Tensor:
    """What of a tensor is that of the `UNet2DModel`: its linear layers of attention are convolutions of one pixel here."""
    part = key.rsplit(".", 2)[-2]
    if ".attentions." in key and part != "group_norm" and key.endswith(".weight"):
        tensor = tensor.flatten(1)
    if part not in _QKV or tensor.shape[0] % (3 * head_dim):
        return tensor
    index = _QKV.index(part)
    if order == "new":
        return tensor.chunk(3)[index]
    return tensor.unflatten(0, (-1, 3, head_dim))[:, index].flatten(0, 1)


def _listed(names: list[str]) -> str:
    """How many, and the first of them."""
    return f"{len(names)} tensors" + (f" ({', '.join(names[:4])}{', ...' if len(names) > 4 else ''})" if names else "")
