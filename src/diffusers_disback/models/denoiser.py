"""What a denoiser may ask for: no more than it is given."""

from typing import Any


# What a UNet is not given besides latents, timestep and condition, and the value of its config with which it needs none.
_NOT_GIVEN = {
    "time_cond_proj_dim": (
        None,
        "it embeds the guidance scale, as latent consistency models do: it was distilled into few steps already. Take "
        "the model that it was made of",
    ),
    "class_embed_type": (None, "it is conditioned on classes, or on another noise level, as upscalers are"),
    "num_class_embeds": (None, "it is conditioned on classes"),
    "encoder_hid_dim_type": (None, "it projects its conditions, among them images, by itself"),
    "attention_type": ("default", "it takes boxes or other groundings"),
}


def check_denoiser(config: Any, what: str) -> None:
    """Raises a `ValueError` if a UNet asks for more than latents, timestep and a text's condition.

    Args:
        config (`FrozenDict`): The UNet's.
        what (`str`): Whose it is, at the beginning of a sentence.
    """
    for key, (usual, meaning) in _NOT_GIVEN.items():
        if config.get(key, usual) != usual:
            raise ValueError(f"{what} has {key}={config[key]!r}: {meaning}. It is not supported.")
    if config["out_channels"] != config["in_channels"]:
        raise ValueError(
            f"{what} takes {config['in_channels']} channels and gives {config['out_channels']} (out_channels): it is a model "
            "for inpainting, depth or editing, or it predicts a variance, too. It is not supported."
        )
