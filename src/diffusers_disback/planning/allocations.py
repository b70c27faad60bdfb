"""What a training step allocates, counted on the meta device: nothing is loaded, and nothing is computed."""

import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from ..models.batch import Condition


class Allocations(TorchDispatchMode):
    """Counts the bytes of tensors that operations make within it, and their peak. On any device.

    Kernels' own workspaces and what an allocator rounds up or keeps are not seen.

    Args:
        known (`Iterable[Tensor]`): Tensors that were there before; they and their views do not count.

    Attributes:
        live (`int`): Bytes that are held now.
        peak (`int`): The most that were held at once.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.live = self.peak = 0
        self._storages: dict[int, weakref.ref] = {}
        for tensor in known:
            self._add(tensor.untyped_storage(), 0)

    def _add(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self._storages:
            return

        def freed(_: weakref.ref) -> None:
            self.live -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in (made,) if isinstance(made, Tensor) else tree_leaves(made):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage(), leaf.untyped_storage().nbytes())
        return made


class OnGPU(TorchFunctionMode):
    """Makes a network on the meta device allocate as one on a GPU does: attention fused, and the casts of autocast.

    Autocast itself does not know the meta device. Which operations it casts is what PyTorch's documentation says of
    CUDA.

    Args:
        dtype (`torch.dtype`, *optional*): Autocast's, which keeps no casts; `None` for none.
    """

    LOWER = (F.linear, F.conv2d)
    FLOAT32 = (F.group_norm, F.layer_norm, F.mse_loss)

    def __init__(self, dtype: torch.dtype | None = None):
        super().__init__()
        self.dtype = dtype

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        return value.to(dtype)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        dtype = {**dict.fromkeys(self.LOWER, self.dtype), **dict.fromkeys(self.FLOAT32, torch.float32)}.get(func)
        if func is F.scaled_dot_product_attention:
            query, key, value = (
                self._cast(each, self.dtype or each.dtype) for each in (args or tuple(kwargs.values()))[:3]
            )
            return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True)[0]
        if self.dtype is not None and dtype is not None:
            args = tuple(self._cast(each, dtype) for each in args)
            kwargs = {name: self._cast(each, dtype) for name, each in kwargs.items()}
        return func(*args, **kwargs)


def checkpointed(autocast: torch.dtype | None) -> Callable:
    """What `enable_gradient_checkpointing` takes: it casts as on a GPU when a block is run again in the backward pass, too."""

    def run(block: nn.Module, *arguments: Any) -> Any:
        return checkpoint(block, *arguments, use_reentrant=False, context_fn=lambda: (nullcontext(), OnGPU(autocast)))

    return run


@dataclass(frozen=True)
class PassMemory:
    """What a pass holds, in bytes.

    Args:
        activations (`int`): After the forward pass: what is kept for the backward pass, and the output.
        gradients (`int`): Of parameters, after the backward pass.
        peak (`int`): At the worst moment. Activations go as gradients come, so it is less than the sum.
    """

    activations: int
    gradients: int
    peak: int


def pass_memory(
    network: nn.Module,
    call: Callable[..., Tensor],
    inputs: Callable[[], tuple[Tensor, Tensor, Condition]],
    autocast: torch.dtype | None = None,
    accumulates: bool = False,
) -> PassMemory:
    """What a forward pass of a network on the meta device would hold on a GPU; and a backward pass, if there is a graph.

    Args:
        network (`nn.Module`): A diffusers denoiser.
        call (`Callable`): How its family calls it; see `ModelFamily.call`.
        inputs (`Callable`): Makes x_t, timesteps and condition, which count as well.
        autocast (`torch.dtype`, *optional*): The precision that it computes in where that is not its own.
        accumulates (`bool`): Whether gradients are there before, to which those of the pass are added.
    """
    there = 0
    if accumulates:
        for parameter in (each for each in network.parameters() if each.requires_grad):
            parameter.grad = torch.empty_like(parameter)
            there += size(parameter)
    known = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    with Allocations([*network.parameters(), *known]) as allocations:
        arguments = inputs()
        with OnGPU(autocast):
            output = call(network, *arguments).float()
        del arguments
        activations = allocations.live
        if output.requires_grad:
            output.square().mean().backward()
        del output
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    network.zero_grad(set_to_none=True)
    return PassMemory(activations, size(*gradients), there + allocations.peak)


def size(*tensors: Tensor) -> int:
    """In bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
