"""A denoiser in half precision in a pipeline whose other parts are in float32."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn
from torch.utils._pytree import tree_map

from .adapters import base_of


def _cast(values: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda v: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v, values)


@contextmanager
def called_in_float32(network: ModelMixin) -> Iterator[ModelMixin]:
    """The same network, which casts what it is called with to its own precision, and its output to float32."""
    dtype = network.dtype
    if dtype == torch.float32:
        yield network
        return

    def cast_inputs(
        _: nn.Module, given: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        # The timestep, second or by name, may be a logarithm of the noise level: it keeps its precision.
        places = tuple(value if place == 1 else _cast(value, dtype) for place, value in enumerate(given))
        return places, {name: value if name == "timestep" else _cast(value, dtype) for name, value in named.items()}

    hooks = (
        network.register_forward_pre_hook(cast_inputs, with_kwargs=True),
        network.register_forward_hook(lambda _, given, output: _cast(output, torch.float32)),
    )
    try:
        yield network
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def inference_copy(network: ModelMixin, device: torch.device, dtype: torch.dtype) -> Iterator[ModelMixin]:
    """A float32 network on a device, in a precision, for as long as it draws images.

    Args:
        network (`ModelMixin`): A denoiser. In float32 it is moved, and moved back; in half of it a copy is made.
        device (`torch.device`): Where images are drawn.
        dtype (`torch.dtype`): That the run computes in. The rest of the pipeline stays in float32.
    """
    if dtype == torch.float32:
        home = next(network.parameters()).device
        yield network.to(device)
        network.to(home)
        return
    with called_in_float32(base_of(network, device, dtype)) as half:
        yield half
