"""Networks that processes hold in shares, by torch's FSDP2: sharded, whole again, and in checkpoints.

Every network of a run is sharded by itself, trained or frozen, along the first axis of each parameter, over all processes.
Parameters are gathered and reduced in float32; autocast computes in the run's precision, as in one process.
"""

import copy
import inspect
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from accelerate.utils import parse_flag_from_env
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


def is_sharded() -> bool:
    """Whether this launch shards networks: `accelerate launch --use_fsdp`, or `distributed_type: FSDP` in its config."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP")


def shard(network: ModelMixin, device: torch.device) -> ModelMixin:
    """Shards a network in place, and moves the own shares to a device.

    Each of the blocks that diffusers names (`_no_split_modules`) is gathered by itself when it computes, and let go of
    afterwards; what is outside of them, and a network that names none, is gathered at once.

    Args:
        network (`ModelMixin`): On the CPU, equal on every process.
        device (`torch.device`): Of this process.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    blocks = set(network._no_split_modules or ())
    for module in reversed([*network.modules()]):  # inner ones first
        if module is network or type(module).__name__ in blocks:
            # By default torch keeps the outermost gathered after a forward pass without gradients: of what is filled with
            # other weights then, the next pass would not know.
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return network


def outline_of(network: nn.Module) -> nn.Module:
    """A copy of a network without its weights, to be filled by `whole`."""
    weights = {
        id(one): nn.Parameter(torch.empty_like(one, device="meta"), one.requires_grad) for one in network.parameters()
    }
    return copy.deepcopy(network, weights)  # which takes for copied what it is told to be


def whole(outline: nn.Module, weights: dict[str, Tensor]) -> nn.Module:
    """A whole network on the CPU. To be called on every process.

    Args:
        outline (`nn.Module`): Of `outline_of`; it is left as it is.
        weights (`dict[str, Tensor]`): All that its `state_dict` names, in shares.
    """
    network = copy.deepcopy(outline)
    gathered = {name: _gathered(tensor).cpu() for name, tensor in weights.items()}
    network.load_state_dict(gathered, strict=True, assign=True)
    return network


def _gathered(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def own_share(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in the same memory; all of one that is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# Checkpoints ---------------------------------------------------------------------------------------------------------


_WRITING: dict[str, Any] = {"save_distributed": True}


def can_save_shards() -> bool:
    """Whether this torch can be asked as `save_shards` asks it. Older ones have no such writer, or one of other parameters."""
    if find_spec("torch.distributed.checkpoint.hf_storage") is None:
        return False
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    return _WRITING.keys() <= inspect.signature(HuggingFaceStorageWriter.__init__).parameters.keys()


def save_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    """Writes each process's shares into a safetensors file of its own. To be called on every process.

    Args:
        tensors (`dict[str, Tensor]`): Of the same names on every process; those that are not sharded are equal there.
        folder (`Path`): Which all processes see.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageWriter, save

    save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), **_WRITING))


def names_of_shards(folder: Path) -> set[str]:
    """The names of the tensors that `save_shards` wrote."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    return set(HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata)


def load_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    """Fills tensors with what `save_shards` wrote. To be called on every process.

    Args:
        tensors (`dict[str, Tensor]`): Of the shapes that were saved.
        folder (`Path`): Of `save_shards`.

    Raises:
        ValueError: If the folder has tensors of other names.
    """
    from torch.distributed.checkpoint import HuggingFaceStorageReader, load

    others = sorted(names_of_shards(folder) ^ tensors.keys())
    if others:
        raise ValueError(
            f"{folder} does not fit: {len(others)} tensors are missing or unexpected (the first: {others[0]})."
        )
    load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)))
