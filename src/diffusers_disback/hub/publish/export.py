"""A student in other forms: in half precision beside its own weights, and as a LoRA of its teacher."""

import re
from pathlib import Path

import torch
from diffusers import ModelMixin
from torch import nn

from ...models import adapters
from ...models.lora_layouts import save_layouts
from ...models.pipeline_folder import check_shards, read_index
from ...models.reference import ModelReference, model_class
from ...models.weights import open_weights, save_weights
from ..files import inside, read_json, write_json, writing, written_whole


_WEIGHTS = re.compile(r"(?P<stem>[a-z_]+)(?P<shard>-\d+-of-\d+)?\.safetensors")
_INDEX = re.compile(r"(?P<stem>[a-z_]+)\.safetensors\.index\.json")


def add_half_variant(folder: str | Path) -> list[Path]:
    """Writes float16 weights beside a saved pipeline's own, as the variant `fp16`: `from_pretrained(folder,
    variant="fp16", torch_dtype=torch.float16)`.

    Tensors are cast and nothing is saved by a model's own `save_pretrained`: what transformers 5 writes of a text encoder,
    older versions do not read.

    Args:
        folder (`str` or `Path`): Of a diffusers pipeline.

    Returns:
        `list[Path]`: The files that were written.

    Raises:
        ValueError: If it is no pipeline's folder, or a weight is too large for float16.
    """
    folder = Path(folder)
    read_index(folder, str(folder))
    files = sorted(inside(folder, file.relative_to(folder).as_posix(), str(folder)) for file in folder.glob("*/*"))
    indexes = {file: check_shards(file, str(file)) for file in files if _INDEX.fullmatch(file.name)}
    written = []
    for file in files:
        weights, index = _WEIGHTS.fullmatch(file.name), _INDEX.fullmatch(file.name)
        if weights:
            target = file.with_name(f"{weights['stem']}.fp16{weights['shard'] or ''}.safetensors")
            with open_weights(file) as stream, writing(target), written_whole(target) as draft:
                tensors = {key: _half(key, stream.get_tensor(key), file) for key in stream.keys()}  # noqa: SIM118
                save_weights(tensors, draft, stream.metadata())
            written.append(target)
        elif index:
            content = indexes[file]
            stem = index["stem"]
            content["weight_map"] = {k: v.replace(stem, f"{stem}.fp16", 1) for k, v in content["weight_map"].items()}
            target = file.with_name(f"{stem}.safetensors.index.fp16.json")
            write_json(target, content)
            written.append(target)
    return written


def _half(key: str, tensor: torch.Tensor, file: Path) -> torch.Tensor:
    half = tensor.half() if tensor.is_floating_point() else tensor
    if tensor.is_floating_point() and tensor.isfinite().all() and not half.isfinite().all():
        raise ValueError(f"{key} of {file} has values beyond float16's 65,504; nothing of it was written.")
    return half


def denoiser_of(reference: ModelReference, name: str, cache_dir: str | None = None) -> ModelMixin:
    """The denoiser of a model, of the class that its config names.

    Args:
        reference (`ModelReference`): Where it lies.
        name (`str`): Its component.
        cache_dir (`str`, *optional*): Where downloads and conversions are kept.

    Raises:
        ValueError: If it cannot be loaded, or diffusers loads no adapters into it.
    """
    model = reference.resolve_denoiser(name, cache_dir)
    config = read_json(inside(model.folder, f"{name}/config.json", reference.name_or_path), f"the config of {name}")
    network = model.load_network(model_class(str(config.get("_class_name"))))
    adapters.check_loads_adapters(network)
    return network


def exact_svd(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The largest singular values of a matrix, `[m, n]`, and their vectors: `[m, k]`, `[k]` and `[k, n]`, k at most the rank."""
    up, values, down = torch.linalg.svd(matrix, full_matrices=False)
    return up[:, :rank], values[:rank], down[:rank]


def fast_svd(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`exact_svd`, approximately: by projection on a random subspace (Halko et al., arXiv 0909.4061), of a fixed seed."""
    devices = [matrix.device] if matrix.is_cuda else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(0)
        up, values, down = torch.svd_lowrank(matrix, min(rank + OVERSAMPLING, *matrix.shape), niter=POWER_ITERATIONS)
    return up[:, :rank], values[:rank], down.mT[:rank]


SVDS = {"exact": exact_svd, "fast": fast_svd}
"""Name -> decomposition; a literal dict."""

# The subspace has so many dimensions more than the rank, and is sharpened so often.
OVERSAMPLING, POWER_ITERATIONS = 8, 4


def extract_lora(
    student: nn.Module, teacher: nn.Module, rank: int, svd: str = "exact"
) -> tuple[dict[str, torch.Tensor], float]:
    """The LoRA of a rank that comes nearest to a student from its teacher: of each linear layer and convolution, the largest
    singular values of the difference of weights (Eckart and Young, 1936). Biases, normalisations and convolutions in groups
    are left as the teacher's.

    Args:
        student (`nn.Module`): The one-step network.
        teacher (`nn.Module`): Of the same architecture.
        rank (`int`): At most; a layer that has less room gets less.
        svd (`str`): A name of `SVDS`. `fast` leaves a little more of the difference than there need be.

    Returns:
        `tuple[dict[str, Tensor], float]`: The layers in peft's names, `x.lora_A.weight` and `x.lora_B.weight` with alpha
        equal to the rank, and the share of the difference that they leave: the norm of what is left over the norm of the
        difference, over all parameters.

    Raises:
        ValueError: If the two are of different architectures, or equal.
    """
    own, other = student.state_dict(), teacher.state_dict()
    if {k: v.shape for k, v in own.items()} != {k: v.shape for k, v in other.items()}:
        raise ValueError(
            "The student is of another architecture than the teacher; a LoRA cannot lead from one to the other."
        )
    differences = {key: own[key].float() - other[key].float().to(own[key].device) for key in own}
    whole = sum(difference.square().sum(dtype=torch.float64) for difference in differences.values())
    if whole == 0:
        raise ValueError("The student equals the teacher; there is nothing to extract.")
    layers, left = {}, whole.clone()
    for name, module in student.named_modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d)) or (isinstance(module, nn.Conv2d) and module.groups > 1):
            continue
        difference = differences[f"{name}.weight"]
        up, values, down = SVDS[svd](difference.flatten(1), rank)
        kept = len(values)
        # Every layer has the same rank on paper, because alpha is one for all: zeros fill up what is not there.
        full_up, full_down = up.new_zeros(len(up), rank), down.new_zeros(rank, down.shape[1])
        full_up[:, :kept] = up * values.sqrt()
        full_down[:kept] = values.sqrt()[:, None] * down
        convolution = isinstance(module, nn.Conv2d)
        layers[f"{name}.lora_A.weight"] = full_down.view(rank, *difference.shape[1:]).contiguous()
        layers[f"{name}.lora_B.weight"] = (
            full_up[:, :, None, None].contiguous() if convolution else full_up.contiguous()
        )
        # Either decomposition projects: what is kept is at right angles to what is left.
        left -= values.square().sum(dtype=torch.float64)
    return layers, (left.clamp(min=0) / whole).sqrt().item()


def save_lora(
    layers: dict[str, torch.Tensor], rank: int, folder: str | Path, network: ModelMixin, denoiser: str = "unet"
) -> tuple[Path, ...]:
    """Writes a LoRA in diffusers' layout, and one of a UNet in that of kohya's scripts, too, which ComfyUI and A1111 read.

    Args:
        layers (`dict[str, Tensor]`): Of `extract_lora`.
        rank (`int`): Its rank, and its alpha.
        folder (`str` or `Path`): Made if it is not there.
        network (`ModelMixin`): The student or the teacher.
        denoiser (`str`): The component that is adapted.
    """
    targets = sorted({key.split(".lora_")[0] for key in layers})
    config = adapters.lora_config(rank, target_modules=targets)
    return save_layouts((layers, config), network, folder, denoiser)
