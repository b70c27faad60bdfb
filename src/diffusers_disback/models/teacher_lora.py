"""A LoRA that is fused into a denoiser: every tensor of its file is used, or named in an error."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from ..hub.files import inside, parse_json
from ..hub.repository import is_repo_id
from .model_files import locate
from .single_file import single_file_of
from .weights import NO_PICKLES, PICKLES, are_layers, metadata_of, read_weights


# The name by which diffusers saves one; it counts where several files are.
_USUAL = "pytorch_lora_weights.safetensors"
_METADATA = "lora_adapter_metadata"  # of diffusers: the adapter's config, in the header

# The two factors and the scale of a layer, as kohya's scripts, diffusers' older and its present layout, and peft end them.
_PART = re.compile(
    r"(?P<layer>.+?)(?:"
    r"(?P<down>\.lora_down\.weight|\.lora_A\.weight|[._]lora\.down\.weight)|"
    r"(?P<up>\.lora_up\.weight|\.lora_B\.weight|[._]lora\.up\.weight)|"
    r"(?P<alpha>\.alpha))"
)
_OF_TEXT = re.compile(
    r"lora_te\d?_|te\d?_|text_encoders?[._\d]|text_model\.|clip_[lgh]\.|conditioner\.|cond_stage_model\."
)
# What a file may hold besides or instead, and how it is called.
_OTHER_KINDS = {
    "a DoRA": r"dora_scale|lora_magnitude_vector",
    "a LoHa of LyCORIS": r"\.hada_",
    "a LoKr of LyCORIS": r"\.lokr_",
    "an OFT": r"\.b?oft_",
    "a GLoRA of LyCORIS": r"\.[ab][12]\.weight$",
    "an IA3 of LyCORIS": r"\.on_input$",
    "a LoCon with a third factor (CP decomposition)": r"\.lora_mid\.",
    "a difference of whole weights": r"\.diff(_b)?$|\.set_weight$",
    "a LoRA that changes normalisations": r"\.[wb]_norm$",
    "a LoRA with biases": r"(lora_\w+|lora\.\w+)\.bias$|\.bias(_\w+)?$",
    "an adapter as peft saves it, whose alpha stands in a file beside it": r"^base_model\.",
}


@dataclass
class _Layer:
    """What a file holds of one layer, by `down`, `up` and `alpha`: keys and tensors."""

    keys: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


def fuse_lora(network: nn.Module, file: Path, lora: str | None = None) -> None:
    """Adds a LoRA to a denoiser's weights, once and for all: `W + alpha / rank * up @ down` of each layer.

    Args:
        network (`nn.Module`): A diffusers UNet.
        file (`Path`): Of `lora_file`, in the layout of diffusers (its present or its older one, with or without `unet.`), of
            kohya's scripts, or of ComfyUI.
        lora (`str`, *optional*): What messages call it; by default the file.

    Raises:
        ValueError: If it cannot be read, it adapts text encoders, is more than a LoRA, or does not fit the network in
            anything; the network is then as it was.
    """
    lora = lora or str(file)
    try:
        weights, header = read_weights(file), metadata_of(file)
    except ValueError as error:
        raise ValueError(f"The LoRA {lora!r} cannot be read. {error}") from error
    layers = _sorted_out(weights, spellings(network), lora)
    config = _adapter_config(header, lora)
    modules = dict(network.named_modules())
    updates = {
        name: _update(layer, modules[name].weight, _scale(name, layer, config, lora), lora)
        for name, layer in layers.items()
    }
    for name, update in updates.items():  # all of them fit
        modules[name].weight.data += update.to(modules[name].weight.data)


def lora_file(lora: str, cache_dir: str | None = None) -> Path:
    """The file that a LoRA's name means, on this machine, after a download if need be.

    Args:
        lora (`str`): A file, `user/repo/file.safetensors`, that file's address on the Hub, a folder, or a repository.
        cache_dir (`str`, *optional*): Where downloads are kept.

    Raises:
        ValueError: If there is none, it is pickled, or a folder or repository holds several and none of them has
            diffusers' own name.
    """
    single = single_file_of(lora)
    if single is not None:
        if not single.path.lower().endswith(".safetensors"):
            raise ValueError(_pickled(lora))
        try:
            return single.fetch(None, cache_dir)
        except ValueError as error:
            raise ValueError(f"The LoRA {lora!r} cannot be read. {error}") from error
    if not os.path.isdir(lora) and not is_repo_id(lora):
        raise ValueError(f"The LoRA {lora!r} cannot be read: it is no file, no folder, and no name of a repository.")
    root, (name,) = locate(lora, None, lambda names: [_the_one(names, lora)], cache_dir)
    return inside(root, name, f"The folder of the LoRA {lora!r}")


def _the_one(names: list[str], lora: str) -> str:
    """The file that a folder or repository is meant for: its only one at the root, or the one of diffusers' own name."""
    found = sorted(name for name in names if name.lower().endswith(".safetensors"))
    at_root = [name for name in found if "/" not in name]
    if _USUAL in at_root:
        return _USUAL
    if len(at_root) == 1:
        return at_root[0]
    if found:
        shown = ", ".join((at_root or found)[:20])
        raise ValueError(
            f"The LoRA {lora!r} holds {'several files' if at_root else 'none at its root, but'}: {shown}. Say which one is "
            f"meant, for example {lora.rstrip('/')}/{(at_root or found)[0]}."
        )
    if any(name.endswith(PICKLES) for name in names):
        raise ValueError(_pickled(lora))
    raise ValueError(f"The LoRA {lora!r} cannot be read: there is no .safetensors file.")


def _pickled(lora: str) -> str:
    return f"The LoRA {lora!r} is no .safetensors file. {NO_PICKLES}"


def spellings(network: nn.Module) -> dict[str, str]:
    """Every name under which LoRAs know a layer of a UNet -> its name in the network."""
    found: dict[str, str] = {}
    original = original_names(network)
    for name, module in network.named_modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d)):
            continue
        names = [name]
        attention = re.fullmatch(r"(.*)\.(to_[qkv]|to_out)(?:\.0)?", name)
        if attention:  # the older layout of diffusers named processors
            names += [f"{attention[1]}.processor.{attention[2]}", f"{attention[1]}.{attention[2]}"]
        spelled = [*names, *(f"unet.{each}" for each in names), f"lora_unet_{name.replace('.', '_')}"]
        if name in original:
            spelled += [f"{prefix}{original[name]}" for prefix in ("diffusion_model.", "model.diffusion_model.")]
            spelled.append(f"lora_unet_{original[name].replace('.', '_')}")
        for spelling in spelled:
            if found.setdefault(spelling, name) != name:  # it would be guessed which
                found[spelling] = ""
    return {spelling: name for spelling, name in found.items() if name}


_ORIGINAL = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_WITHIN = {
    "resnets": {
        "conv1": "in_layers.2",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    },
    "downsamplers": {"conv": "op"},
}
_PLACE = re.compile(r"((?:(?:down|up)_blocks\.\d+|mid_block)\.(\w+)\.\d+)\.(.+)")


def original_names(network: ModelMixin) -> dict[str, str]:
    """Names of a UNet's layers -> those of the original checkpoints (CompVis, Stability)."""
    places = {f"mid_block.resnets.{j}": f"middle_block.{2 * j}" for j in (0, 1)}
    places["mid_block.attentions.0"] = "middle_block.1"
    number = 1  # input_blocks.0 is conv_in
    for index, block in enumerate(network.down_blocks):
        for j in range(len(block.resnets)):
            places[f"down_blocks.{index}.resnets.{j}"] = f"input_blocks.{number}.0"
            places[f"down_blocks.{index}.attentions.{j}"] = f"input_blocks.{number}.1"
            number += 1
        places[f"down_blocks.{index}.downsamplers.0"] = f"input_blocks.{number}.0"
        number += bool(block.downsamplers)
    number = 0
    for index, block in enumerate(network.up_blocks):
        for j in range(len(block.resnets)):
            places[f"up_blocks.{index}.resnets.{j}"] = f"output_blocks.{number}.0"
            places[f"up_blocks.{index}.attentions.{j}"] = f"output_blocks.{number}.1"
            number += 1
        beside = 2 if getattr(block, "attentions", None) else 1
        places[f"up_blocks.{index}.upsamplers.0"] = f"output_blocks.{number - 1}.{beside}"
    names = {}
    for name, _ in network.named_modules():
        match = _PLACE.fullmatch(name)
        if match and match[1] in places:
            names[name] = f"{places[match[1]]}.{_WITHIN.get(match[2], {}).get(match[3], match[3])}"
        elif name in _ORIGINAL:
            names[name] = _ORIGINAL[name]
    return names


def _sorted_out(weights: dict[str, Tensor], known: dict[str, str], lora: str) -> dict[str, _Layer]:
    """A file's tensors by the layers that they adapt.

    Raises:
        ValueError: If any of them is of a text encoder, of another kind than a LoRA, or of no layer, or a layer is not
            whole.
    """
    layers: dict[str, _Layer] = {}
    left = []
    for key, tensor in weights.items():
        match = _PART.fullmatch(key)
        if match is None or match["layer"] not in known:
            left.append(key)
            continue
        name, part = known[match["layer"]], next(part for part in ("down", "up", "alpha") if match[part])
        layer = layers.setdefault(name, _Layer())
        if part in layer.keys:
            raise ValueError(f"The LoRA {lora!r} adapts one layer twice: by {layer.keys[part]} and by {key}.")
        layer.keys[part], layer.tensors[part] = key, tensor
    if left or not layers:
        raise ValueError(_told(sorted(left), lora))
    for layer in layers.values():
        if not {"down", "up"} <= layer.keys.keys():
            lacking = "its other factor" if layer.keys.keys() - {"alpha"} else "both of its factors"
            raise ValueError(f"The LoRA {lora!r} is not whole: beside {min(layer.keys.values())} is not {lacking}.")
    assert sum(len(layer.keys) for layer in layers.values()) == len(weights)
    return layers


def _told(left: list[str], lora: str) -> str:
    """Why tensors were left over."""
    if not left:
        return f"The LoRA {lora!r} belongs to another model: it is empty."
    of_text = [key for key in left if _OF_TEXT.match(key)]
    if of_text:
        return (
            f"The LoRA {lora!r} adapts more than the UNet ({of_text[0]}, {len(of_text)} tensors of text encoders). A student "
            "keeps its teacher's text encoders as they are; fuse such a LoRA into a copy of the teacher by diffusers' own "
            "fuse_lora, and distil that."
        )
    for kind, pattern in _OTHER_KINDS.items():
        keys = [key for key in left if re.search(pattern, key)]
        if keys:
            return (
                f"The LoRA {lora!r} is {kind} ({keys[0]}, {len(keys)} such tensors), which is not fused here: fuse it into a "
                "copy of the teacher by a program that reads it, and distil that."
            )
    return (
        f"The LoRA {lora!r} belongs to another model: {left[0]} fits nothing ({len(left)} tensors fit nothing). It is read in "
        "the layouts of diffusers, kohya's scripts and ComfyUI."
    )


def _adapter_config(header: dict[str, str], lora: str) -> dict[str, Any]:
    """Rank and alpha as diffusers notes them in a file's header; empty if they are not there.

    Raises:
        ValueError: If it says that the adapter is more than a LoRA.
    """
    if _METADATA not in header:
        return {}
    declared = parse_json(header[_METADATA], f"The header of the LoRA {lora!r}")
    own = {key.removeprefix("unet."): value for key, value in declared.items() if key.startswith("unet.")} or declared
    more = [name for name in ("use_dora", "lora_bias", "modules_to_save", "use_qalora") if own.get(name)]
    if more or own.get("bias", "none") != "none":
        raise ValueError(
            f"The LoRA {lora!r} is more than a LoRA ({', '.join(more) or 'biases'}), which is not fused here."
        )
    for name, kind in (("rank_pattern", dict), ("alpha_pattern", dict), ("r", int), ("lora_alpha", (int, float))):
        if own.get(name) is not None and not isinstance(own[name], kind):
            raise ValueError(f"The header of the LoRA {lora!r} says {name}={own[name]!r}, which cannot be.")
        if kind is dict and not are_layers(own.get(name) or {}):
            shown = next(key for key in own[name] if not are_layers([key]))
            raise ValueError(
                f"The header of the LoRA {lora!r} has the {name} {shown[:100]!r}, which is no layer's name."
            )
    return own


def _scale(name: str, layer: _Layer, config: dict[str, Any], lora: str) -> float:
    """alpha / rank of a layer; 1 where the file says no alpha.

    Raises:
        ValueError: If what it says contradicts itself, or is no number.
    """
    rank = layer.tensors["down"].shape[0] if layer.tensors["down"].ndim else 0
    if "alpha" in layer.tensors:
        value = layer.tensors["alpha"]
        alpha = value.float().item() if value.numel() == 1 else float("nan")
        if not torch.isfinite(torch.tensor(alpha)) or alpha == 0:  # for kohya's scripts 0 means the rank
            raise ValueError(
                f"The LoRA {lora!r} has {layer.keys['alpha']} {alpha:g}, which programs read differently."
            )
        return alpha / max(rank, 1)
    if "r" not in config:
        return 1.0
    declared = _of_pattern(config.get("rank_pattern") or {}, name, config["r"], lora)
    alpha = _of_pattern(config.get("alpha_pattern") or {}, name, config.get("lora_alpha") or declared, lora)
    if declared != rank:
        raise ValueError(
            f"The header of the LoRA {lora!r} says rank {declared} of {name}, but its tensors have {rank}."
        )
    return alpha / (rank**0.5 if config.get("use_rslora") else max(rank, 1))


def _of_pattern(patterns: dict[str, Any], name: str, otherwise: Any, lora: str) -> float:
    """What peft's patterns say of a layer: keys are its name, or the end of it, and peft takes them for regular expressions."""
    value = next((v for k, v in patterns.items() if re.fullmatch(rf"(.*\.)?({k})", name)), otherwise)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"The header of the LoRA {lora!r} says {value!r} of {name}, which is no number.")
    return value


def _update(layer: _Layer, weight: Tensor, scale: float, lora: str) -> Tensor:
    """What a layer's weight changes by, `[out, in, ...]`, in float32.

    Raises:
        ValueError: If the factors are of other shapes.
    """
    down, up = layer.tensors["down"], layer.tensors["up"]
    pointwise = weight[0, 0].numel() == 1  # then linear layers and convolutions are one thing
    fits = (
        down.ndim in (2, 4)
        and up.ndim in (2, 4)
        and up.flatten(1).shape == (weight.shape[0], down.shape[0])
        and down[0].numel() == weight[0].numel()
        and (down.shape[1:] == weight.shape[1:] or (pointwise and down.shape[1] == weight.shape[1]))
    )
    if not fits:
        raise ValueError(
            f"The LoRA {lora!r} belongs to another model: {layer.keys['down']} is {tuple(down.shape)} and "
            f"{layer.keys['up']} {tuple(up.shape)}, but the layer is {tuple(weight.shape)}."
        )
    down, up = down.float(), up.float()
    if not pointwise:  # as a convolution, so that the sums are those of diffusers' own fuse_lora, bit for bit
        return nn.functional.conv2d(down.transpose(0, 1), up.view(*up.shape[:2], 1, 1)).transpose(0, 1) * scale
    return (up.flatten(1) @ down.flatten(1)).view(weight.shape) * scale
