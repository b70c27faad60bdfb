"""Latents of an autoencoder, as stock pipelines scale them."""

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def encode_to_latents(vae: Any, pixels: Tensor) -> Tensor:
    """The mode of an autoencoder's distribution, scaled as the stock pipelines scale latents, `[N, C, H, W]` in float32.

    Args:
        vae (`AutoencoderKL`): It is moved to where the pixels are.
        pixels (`Tensor`): Images in -1..1, `[N, 3, H, W]`.
    """
    vae = vae.to(pixels.device)
    latents, config = vae.encode(pixels.to(vae.dtype)).latent_dist.mode().float(), vae.config
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, std = (
            torch.tensor(values, device=latents.device).view(1, -1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return (latents - mean) * config.scaling_factor / std
    return (latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor


def stride_of_autoencoder(vae: Any) -> int:
    """Pixels of a latent's side."""
    blocks = (
        vae.config.get("encoder_block_out_channels") or vae.config.block_out_channels
    )  # the former of AutoencoderDC
    return 2 ** (len(blocks) - 1)
