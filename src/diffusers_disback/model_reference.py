"""Where a model lies, and how a network is filled with weights: exactly, or not at all."""

import hashlib
from dataclasses import dataclass

import torch
from torch import nn


def fingerprint(network: nn.Module) -> str:
    """A SHA-256 of a network's weights: names, types, shapes and bytes. Equal for equal weights, wherever stored."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@dataclass(frozen=True)
class ModelReference:
    """Where a model lies: a folder, or a model on the Hub.

    Args:
        name_or_path (`str`): A folder, or a Hub id.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        variant (`str`, *optional*): Of the weights' files, such as `fp16`.
    """

    name_or_path: str
    revision: str | None = None
    variant: str | None = None

    def load_network(self, network_class: type[nn.Module], cache_dir: str | None = None) -> nn.Module:
        """The model's `unet` in float32.

        Raises:
            ValueError: If it cannot be read, or its weights do not fit its own config in anything.
        """
        try:
            network, info = network_class.from_pretrained(
                self.name_or_path,
                subfolder="unet",
                revision=self.revision,
                variant=self.variant,
                cache_dir=cache_dir,
                torch_dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
            )
        except OSError as error:
            raise ValueError(f"The UNet of {self.name_or_path!r} cannot be loaded. {error}") from error
        wrong = {kind: keys for kind, keys in info.items() if keys}
        if wrong:
            raise ValueError(f"The UNet of {self.name_or_path!r} does not fit its own config: {wrong}.")
        return network

    def load_into(self, network: nn.Module, cache_dir: str | None = None) -> None:
        """Fills a network with the model's `unet` weights.

        Raises:
            ValueError: If names or shapes differ in anything; the network is then as it was.
        """
        loaded = self.load_network(type(network), cache_dir)
        fill(network, loaded.state_dict(), f"the UNet of {self.name_or_path!r}")


def fill(network: nn.Module, weights: dict[str, torch.Tensor], what: str) -> None:
    """Copies weights into a network, if names and shapes agree in everything."""
    own = network.state_dict()
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [key for key in own.keys() & weights.keys() if own[key].shape != weights[key].shape]
    if missing or unexpected or shapes:
        raise ValueError(
            f"{what} does not fit: {len(missing)} tensors missing, {len(unexpected)} unexpected, {len(shapes)} of "
            f"another shape (the first: {[*missing[:1], *unexpected[:1], *sorted(shapes)[:1]]}). It belongs to another "
            "architecture."
        )
    network.load_state_dict(weights, strict=True)
