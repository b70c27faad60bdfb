"""`diffusers-disback convert-edm`: OpenAI's EDM checkpoints as teachers."""

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

from .. import __version__
from ..hub.files import sha256_of, write_text, writing
from ..hub.markdown import inline_code
from .command_line import number
from .options import add_command


_CARD = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
---

# {name}

Converted by `diffusers-disback convert-edm` {version} from {name} (SHA-256 `{sha256}`), with `{flags}`.

An EDM denoiser (arXiv 2206.00364) whose time is 1000 ln(sigma) / 4. The scheduler tells that convention; sampled by the stock
`ConsistencyModelPipeline` it is taken for a consistency model, which it is not. It is a teacher for `diffusers-disback`.

The licence is that of the checkpoint, which its file does not name: look it up before you share this or a student of it, and
name it above (`license:`).
"""


def add_commands(group: Any) -> None:
    """Adds `convert-edm` to the commands."""
    parser = add_command(group, "convert-edm", convert_edm)
    parser.add_argument(
        "file",
        metavar="FILE",
        help="the checkpoint, such as edm_imagenet64_ema.pt: of torch.save, which is read without running code, or safetensors",
    )
    parser.add_argument("folder", metavar="FOLDER", help="the teacher's folder to write; new, or empty")
    parser.add_argument(
        "--resolution",
        type=number(True, minimum=1),
        required=True,
        metavar="PIXELS",
        help="side of its images in pixels, which the file does not say",
    )
    parser.add_argument(
        "--attention_head_dim",
        type=number(True, minimum=1),
        default=64,
        metavar="CHANNELS",
        help="channels of an attention head (num_head_channels), which the file does not say (default: 64, as published)",
    )
    parser.add_argument(
        "--attention_order",
        choices=["new", "legacy"],
        default="new",
        help="how queries, keys and values are laid out, which the file does not say: new (OpenAI's flash attention, as in the "
        "published EDM checkpoints) or legacy (each head's together, QKVAttentionLegacy) (default: new)",
    )


def convert_edm(parsed: argparse.Namespace) -> None:
    """Converts an EDM checkpoint in OpenAI's ADM layout into a teacher's folder. Such are edm_imagenet64_ema.pt and edm_cat256_ema.pt."""
    from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline

    from ..models.adm_layout import read_checkpoint, to_unet

    file, folder = Path(parsed.file), Path(parsed.folder)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty; nothing was written. Choose another folder.")
    weights = read_checkpoint(file)
    network = to_unet(weights, str(file), parsed.resolution, parsed.attention_head_dim, parsed.attention_order)
    # With sigma_min 0 the boundary condition of consistency models is EDM's own preconditioning.
    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=1000, sigma_min=0.0, clip_denoised=False)
    flags = " ".join(
        f"--{name} {getattr(parsed, name)}" for name in ("resolution", "attention_head_dim", "attention_order")
    )
    card = _CARD.format(name=inline_code(file.name), version=__version__, sha256=sha256_of(file), flags=flags)
    place = folder.resolve()
    draft = place.with_name(f"{place.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)  # of one that was cut off
    try:
        draft.mkdir(parents=True)
        with writing(folder):
            ConsistencyModelPipeline(network, scheduler).save_pretrained(draft)
        write_text(draft / "README.md", card)
        os.replace(draft, place)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    config = network.config
    print(
        f"{folder}: {sum(tensor.numel() for tensor in weights.values()):,} weights, {config.sample_size} x {config.sample_size} pixels, "
        f"{config.num_class_embeds or 'no'} classes, channels {' '.join(map(str, config.block_out_channels))}"
    )
