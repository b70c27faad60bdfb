"""Pipelines in the layout of the original checkpoints (CompVis, Stability), which diffusers reads and does not write: the
inverse of `diffusers.loaders.single_file_utils`."""

import re
from pathlib import Path

import torch
from diffusers.loaders.single_file_utils import DIFFUSERS_TO_LDM_MAPPING
from safetensors.torch import save_file


RESNET = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "time_emb_proj.": "emb_layers.1.",
    "conv_shortcut.": "skip_connection.",
}
OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "final_layer_norm": "ln_final",
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    ".fc1.": ".c_fc.",
    ".fc2.": ".c_proj.",
    "self_attn.out_proj": "attn.out_proj",
}


def replaced(text, words):
    for old, new in words.items():
        text = text.replace(old, new)
    return text


def original_unet(unet):
    names = {**DIFFUSERS_TO_LDM_MAPPING["unet"]["layers"], **DIFFUSERS_TO_LDM_MAPPING["unet"]["addition_embed_type"]}
    layers = unet.config.layers_per_block
    found = {}
    for key, value in unet.state_dict().items():
        match = re.match(r"(down|up|mid)_blocks?\.(?:(\d+)\.)?(resnets|attentions|\w+samplers)\.(\d+)\.(.*)", key)
        side, block, kind, place, rest = match.groups() if match else (None,) * 5
        if side == "down":
            first = 1 + int(block) * (layers + 1)
            if kind == "downsamplers":
                name = f"input_blocks.{first + layers}.0.{rest.replace('conv', 'op')}"
            else:
                name = f"input_blocks.{first + int(place)}.{0 if kind == 'resnets' else 1}.{rest}"
        elif side == "up":
            first = int(block) * (layers + 1)
            if kind == "upsamplers":
                attends = unet.config.up_block_types[int(block)].startswith("CrossAttn")
                name = f"output_blocks.{first + layers}.{2 if attends else 1}.{rest}"
            else:
                name = f"output_blocks.{first + int(place)}.{0 if kind == 'resnets' else 1}.{rest}"
        elif side == "mid":
            name = f"middle_block.{2 * int(place) if kind == 'resnets' else 1}.{rest}"
        else:
            name = names[key]
        found["model.diffusion_model." + (replaced(name, RESNET) if kind == "resnets" else name)] = value
    return found


def original_vae(vae):
    names = DIFFUSERS_TO_LDM_MAPPING["vae"]
    last = len(vae.config.block_out_channels) - 1
    found = {}
    for key, value in vae.state_dict().items():
        name = names.get(key, key)
        if key not in names:
            name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
            name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
            name = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{last - int(m[1])}.block.", name)
            name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", name)
            name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
            name = name.replace("conv_shortcut", "nin_shortcut")
            if "mid_block.attentions" in name:
                words = {"mid_block.attentions.0": "mid.attn_1", "group_norm": "norm", "to_out.0": "proj_out"}
                name = re.sub(r"to_([qkv])", r"\1", replaced(name, words))
                value = value[:, :, None, None] if value.ndim == 2 else value
        found["first_stage_model." + name] = value
    return found


def clip(encoder, prefix):
    """As in SD 1.x, and SDXL's first encoder."""
    return {f"{prefix}text_model.{k.removeprefix('text_model.')}": v for k, v in encoder.state_dict().items()}


def open_clip(encoder, prefix):
    """As in SD 2.x, and SDXL's second encoder: queries, keys and values are one matrix."""
    state = {key.removeprefix("text_model."): value for key, value in encoder.state_dict().items()}
    found = {}
    for key, value in state.items():
        if key == "text_projection.weight":
            found[f"{prefix}text_projection"] = value.T
        elif ".q_proj." in key:
            whole = torch.cat([state[key.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")])
            name = replaced(key, OPEN_CLIP).replace("self_attn.q_proj.", "attn.in_proj_")
            found[prefix + name] = whole
        elif ".k_proj." not in key and ".v_proj." not in key:
            found[prefix + replaced(key, OPEN_CLIP)] = value
    return found


def state_dict(pipe, kind):
    """All of a pipeline as one checkpoint of a kind: `v1`, `v2` or `xl_base`."""
    found = {**original_unet(pipe.unet), **original_vae(pipe.vae)}
    if kind == "v1":
        found |= clip(pipe.text_encoder, "cond_stage_model.transformer.")
    elif kind == "v2":
        found |= open_clip(pipe.text_encoder, "cond_stage_model.model.")
    else:
        found |= clip(pipe.text_encoder, "conditioner.embedders.0.transformer.")
        found |= open_clip(pipe.text_encoder_2, "conditioner.embedders.1.model.")
    return {key: value.contiguous().clone() for key, value in found.items()}


def write(pipe, kind, file: Path, **changes) -> Path:
    """Writes a pipeline as a single file; what is `None` in `changes` is left out."""
    stored = {**state_dict(pipe, kind), **changes}
    save_file({key: value for key, value in stored.items() if value is not None}, file)
    return file
