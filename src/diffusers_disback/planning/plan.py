"""What a run will take, before anything is loaded: memory of each stage, and what fits which GPU."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from ..backtracking import BacktrackingConfig
from ..data.prompts import CAPACITY
from ..models.adapters import TARGET_MODULES, SharedNetwork, lora_config
from ..models.denoiser import check_denoiser
from ..models.pipeline_folder import UNREADABLE, components_of
from ..models.reference import LocalModel
from ..training.config import TrainingConfig
from .allocations import TOKENS, PassMemory, checkpointed, evaluation_memory, pass_memory, size


CARDS = (12, 16, 24, 40, 80)
PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RANK = 64  # of the ladder's adapters, if none is asked for


@dataclass(frozen=True)
class Setup:
    """What memory depends on, by the names of the training script's flags."""

    resolution: int | None = None
    train_batch_size: int = 1
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    lora_rank: int | None = None
    lora_target_modules: tuple[str, ...] = tuple(TARGET_MODULES)
    lora_roles: tuple[str, ...] = ("generator", "fake_score")
    base_quantization: str | None = None
    use_8bit_adam: bool = False
    use_paged_adam: bool = False
    offload_idle_role: bool = False
    offload_ema: bool = False
    use_ema: bool = False

    @classmethod
    def of(cls, training: TrainingConfig, backtracking: BacktrackingConfig) -> "Setup":
        """Of a run's settings."""
        own = {name: getattr(training, name) for name in cls.__dataclass_fields__ if name != "use_ema"}
        own |= {name: tuple(own[name]) for name in ("lora_target_modules", "lora_roles")}
        own["mixed_precision"] = training.mixed_precision or "no"
        return cls(**own, use_ema=backtracking.use_ema)

    @property
    def adapted(self) -> tuple[str, ...]:
        """The trained roles that are adapters."""
        return () if self.lora_rank is None else self.lora_roles


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Args:
        name (`str`): What it is.
        bytes (`int`): How much of it.
        place (`str`): `device`, or `CPU` for its memory.
        idle_in (`str`, *optional*): The role in whose update it is moved to CPU memory.
    """

    name: str
    bytes: int
    place: str = "device"
    idle_in: str | None = None


def adam_state(parameters: Iterable[Tensor], eight_bit: bool = False, paged: bool = False) -> tuple[int, int]:
    """Bytes of AdamW's two moments: those that stay on the device, and those that are paged.

    PyTorch's are float32, with a step count beside them. bitsandbytes' (0.50.2: `Optimizer2State.init_state`) are one
    byte each for tensors of 4,096 elements and more, with a float32 scale for every 256; smaller ones are float32.
    Those of 100,000 elements and more are paged (`get_state_buffer`), their scales are not.
    """
    resident = moved = 0
    for parameter in parameters:
        number = parameter.numel()
        small = not eight_bit or number < 4096
        moments, scales = 2 * number * (4 if small else 1), 0 if small else 2 * 4 * ceil(number / 256)
        resident += scales + (0 if eight_bit or paged else 4)
        if paged and number >= 100_000:
            moved += moments
        else:
            resident += moments
    return resident, moved


def base_bytes(network: nn.Module, dtype: torch.dtype, quantization: str | None = None) -> int:
    """Bytes of a frozen network.

    Of bitsandbytes' layers (0.50.2) only linear ones are quantised: `nf4` takes half a byte a weight and a float32 scale
    for every 64, `int8` a byte and a float32 scale a row.
    """
    total = sum(parameter.numel() for parameter in network.parameters()) * dtype.itemsize
    if quantization is None:
        return total
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            number, rows = layer.weight.numel(), layer.weight.shape[0]
            total -= number * dtype.itemsize
            total += ceil(number / 2) + 4 * ceil(number / 64) if quantization == "nf4" else number + 4 * rows
    return total


class Planner:
    """Counts what a teacher's distillation takes.

    The student starts from the teacher, and the path has at least two nodes.

    Args:
        skeleton (`Callable`): Makes the teacher's UNet on the meta device.
        stride (`int`): Pixels of a latent's side.
        others (`dict[str, nn.Module]`): The teacher's text encoders and autoencoder, on the meta device.
    """

    def __init__(self, skeleton: Callable[[], nn.Module], stride: int = 8, others: dict[str, nn.Module] = {}):
        self.skeleton = skeleton
        self.stride = stride
        self.others = others
        self._passes: dict[tuple, Any] = {}
        self._adapters: dict[Any, list[Tensor]] = {}

    @classmethod
    def of(cls, teacher: LocalModel) -> "Planner":
        """Of a teacher, of which only configs are read."""
        others = meta_networks_beside(teacher)
        stride = 2 ** (len(others["vae"].config.block_out_channels) - 1)
        return cls(teacher.meta_network, stride, others)

    @cached_property
    def network(self) -> nn.Module:
        """The teacher's UNet, on the meta device."""
        network = self.skeleton()
        check_denoiser(network.config, "The teacher's UNet")
        return network

    def trained(self, role: str, setup: Setup) -> list[Tensor]:
        """The parameters of a role that is trained, on the meta device."""
        if role not in setup.adapted:
            return list(self.network.parameters())
        kind = setup.lora_rank, setup.lora_target_modules
        if kind not in self._adapters:
            self._adapters[kind] = self._shared(setup).parameters("generator")
        return self._adapters[kind]

    def _shared(self, setup: Setup) -> SharedNetwork:
        with torch.device("meta"):
            base = self.skeleton()
            for parameter in base.parameters():
                parameter.data = parameter.data.to(PRECISIONS[setup.mixed_precision])
            shared = SharedNetwork(base)
            shared.add("generator", lora_config(setup.lora_rank, None, list(setup.lora_target_modules)))
        shared.activate("generator")
        return shared

    def latent_shape(self, setup: Setup) -> tuple[int, int, int]:
        """`(C, H, W)`."""
        side = (setup.resolution or self.network.config.sample_size * self.stride) // self.stride
        return self.network.config.in_channels, side, side

    def _kind(self, role: str, setup: Setup) -> tuple:
        """What passes of a role depend on, but for gradient checkpointing."""
        kind = (setup.train_batch_size, setup.resolution, setup.mixed_precision)
        return kind + ((setup.lora_rank, setup.lora_target_modules) if role in setup.adapted else ())

    def _asked(self, role: str, setup: Setup) -> tuple[nn.Module, tuple]:
        """A role's network on the meta device, and what its passes take besides."""
        network = self._shared(setup).network if role in setup.adapted else self.skeleton().requires_grad_(True)
        autocast = None if setup.mixed_precision == "no" else PRECISIONS[setup.mixed_precision]
        if setup.gradient_checkpointing:
            network.enable_gradient_checkpointing(checkpointed(autocast))
        return network, (self.latent_shape(setup), autocast)

    def training_pass(self, role: str, setup: Setup) -> PassMemory:
        """A forward and a backward pass of a role."""
        kind = "trained", setup.gradient_checkpointing, *self._kind(role, setup)
        if kind not in self._passes:
            network, common = self._asked(role, setup)
            self._passes[kind] = pass_memory(network, setup.train_batch_size, *common)
        return self._passes[kind]

    def evaluations(self, setup: Setup) -> int:
        """The larger of what the target, with both halves of guidance, and the fake score take without a graph."""
        kind = "asked", *self._kind("fake_score", setup)
        if kind not in self._passes:
            network, common = self._asked("fake_score", setup)
            batch = setup.train_batch_size
            fake_score = evaluation_memory(network, batch, *common)
            target = evaluation_memory(network.requires_grad_(False), 2 * batch, *common)
            self._passes[kind] = max(fake_score, target)
        return self._passes[kind]

    def rows(self, stage: int, setup: Setup) -> list[Row]:
        """What stage 1 or 2 holds, but for what comes and goes within a step."""
        whole = sum(map(size, self.network.parameters()))
        own = sum(map(size, self.trained(setup.adapted[0], setup))) if setup.adapted else 0
        base = base_bytes(self.network, PRECISIONS[setup.mixed_precision], setup.base_quantization)
        adapter, offloads = f"adapter of rank {setup.lora_rank}", setup.offload_idle_role and stage == 2
        fake_score, generator = (role in setup.adapted for role in ("fake_score", "generator"))
        rows = []
        if fake_score:
            rows += [Row("base of the scores, the teacher", base), Row(f"fake score, {adapter}", own)]
        else:
            rows += [Row("fake score", whole)]
        if stage == 1 and not (fake_score and generator):
            rows += [Row("initial generator", whole)]
        elif stage == 2:
            rows += [Row(f"target, {adapter}", own)] if fake_score else [Row("target", whole, idle_in="fake_score")]
            if generator:
                rows += [] if fake_score else [Row("base of the student", base)]
                rows += [Row(f"student, {adapter}", own)]
            else:
                rows += [Row("student", whole)]
        for role, other in (("fake_score", "generator"), ("generator", "fake_score"))[:stage]:
            state, paged = adam_state(self.trained(role, setup), setup.use_8bit_adam, setup.use_paged_adam)
            name = f"optimiser state, {'student' if role == 'generator' else 'fake score'}"
            rows += [Row(name, state, idle_in=other)]
            rows += [Row(f"{name}, paged", paged, "CPU")] if paged else []
        if setup.use_ema and stage == 2:
            average = sum(map(size, self.trained("generator", setup)))
            rows += [Row("average of the student", average, "CPU" if setup.offload_ema else "device")]
        rows += [Row("teacher, float32", whole, "CPU")]
        if "vae" in self.others:
            rows += [Row("autoencoder", sum(map(size, self.others["vae"].parameters())), "CPU")]
        return rows if offloads else [replace(row, idle_in=None) for row in rows]

    def updates(self, stage: int, setup: Setup) -> dict[str, PassMemory]:
        """What comes and goes within each role's update."""
        fake_score = self.training_pass("fake_score", setup)
        made = {"fake_score": fake_score}
        if stage == 2:
            student = self.training_pass("generator", setup)
            peak = max(student.peak, student.activations + self.evaluations(setup))
            made["generator"] = replace(student, peak=peak)
        return made

    def total(self, stage: int, setup: Setup) -> int:
        """The most that a stage holds on the device, in bytes."""
        rows = [row for row in self.rows(stage, setup) if row.place == "device"]
        return max(
            sum(row.bytes for row in rows if row.idle_in != role) + update.peak
            for role, update in self.updates(stage, setup).items()
        )

    def node(self, setup: Setup, half: bool = False) -> int:
        """Bytes of the weights of a node of the path, in float32 or half of it."""
        return sum(map(size, self.trained("fake_score", setup))) // (2 if half else 1)

    def text_encoders(self) -> int:
        """Bytes of the text encoders, which leave memory when every prompt is encoded."""
        return sum(size(each) for name, other in self.others.items() if name != "vae" for each in other.parameters())

    def checkpoint(self, stage: int, setup: Setup) -> int:
        """Bytes of a checkpoint of a stage: what is trained, optimisers' states, and the average."""
        trained = [self.trained(role, setup) for role in ("fake_score", "generator")[:stage]]
        states = sum(sum(adam_state(each, setup.use_8bit_adam, setup.use_paged_adam)) for each in trained)
        average = sum(map(size, trained[-1])) if setup.use_ema and stage == 2 else 0
        return sum(size(parameter) for each in trained for parameter in each) + states + average

    def condition(self) -> int:
        """Bytes of a prompt's condition on disk, in half precision."""
        config = self.network.config
        if config.addition_embed_type != "text_time":
            return 2 * TOKENS * config.cross_attention_dim
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        return 2 * (TOKENS * config.cross_attention_dim + pooled) + 4 * 6

    def ladder(self, setup: Setup) -> dict[str, Setup]:
        """Settings that take less and less, but for the last two of which each adds to the one before."""
        rank = setup.lora_rank or RANK
        half = setup.mixed_precision if setup.mixed_precision != "no" else "bf16"
        bare = Setup(setup.resolution, setup.train_batch_size, half, use_ema=setup.use_ema)
        rungs = {f"full, {half}": bare}

        def rung(name: str, **changes: Any) -> None:
            rungs[name] = replace(list(rungs.values())[-1], **changes)

        rung("full, + --gradient_checkpointing", gradient_checkpointing=True)
        rung("full, + --use_8bit_adam", use_8bit_adam=True)
        rung("full, + --offload_idle_role", offload_idle_role=True)
        adapters = f"rank {rank}"
        rungs[f"{adapters}, {half}"] = replace(bare, lora_rank=rank, lora_target_modules=setup.lora_target_modules)
        rung(f"{adapters}, + --gradient_checkpointing", gradient_checkpointing=True)
        rung(f"{adapters}, + --use_8bit_adam", use_8bit_adam=True)
        rung(f"{adapters}, + --base_quantization nf4", base_quantization="nf4")
        return rungs


def meta_networks_beside(teacher: LocalModel) -> dict[str, nn.Module]:
    """A teacher's text encoders and autoencoder on the meta device, from their configs.

    Raises:
        ValueError: If these cannot be read.
    """
    import transformers
    from diffusers import AutoencoderKL

    made = {}
    try:
        index, root = teacher.index, teacher.folder
        encoders = [name for name in ("text_encoder", "text_encoder_2") if name in components_of(index)]
        for name in encoders:
            network_class = getattr(transformers, index[name][1])
            config = network_class.config_class.from_pretrained(root, subfolder=name)
            with torch.device("meta"):
                made[name] = network_class(config)
        config = AutoencoderKL.load_config(root, subfolder="vae")
        with torch.device("meta"):
            return {**made, "vae": AutoencoderKL.from_config(config)}
    except UNREADABLE as error:
        raise ValueError(f"The configs of {teacher.name_or_path!r} cannot be read. {error}") from error


def table(planner: Planner, setup: Setup) -> str:
    """What each stage takes, in GB of 10^9 bytes."""

    def number(value: int) -> str:
        return f"{value / 1e9:10.3f}" if value else f"{'-':>10}"

    stages = {stage: (planner.rows(stage, setup), planner.updates(stage, setup)) for stage in (1, 2)}
    names = list(dict.fromkeys((row.name, row.place) for rows, _ in stages.values() for row in rows))
    lines = [f"{'GB':<46} {'stage 1':>10} {'stage 2':>10}"]

    def line(name: str, values: list[int], remark: str) -> None:
        lines.append(f"{name:<46} {' '.join(map(number, values))}  {remark}")

    def held(place: str) -> None:
        for name, where in names:
            if where == place:
                found = [[row for row in rows if row.name == name] for rows, _ in stages.values()]
                idle = any(row.idle_in for rows in found for row in rows)
                line(
                    f"  {name}",
                    [sum(row.bytes for row in rows) for rows in found],
                    "exact" + (", offloaded in turn" * idle),
                )

    lines.append("held on the device")
    held("device")
    for role, said in (("fake_score", "fake score"), ("generator", "student")):
        found = [updates.get(role, PassMemory(0, 0, 0)) for _, updates in stages.values()]
        lines.append(f"while the {said} is updated")
        line("  gradients", [update.gradients for update in found], "exact")
        line("  activations", [update.activations for update in found], "estimate")
        line("  both, at the worst moment", [update.peak for update in found], "estimate")
    line("peak on the device", [planner.total(stage, setup) for stage in (1, 2)], "estimate")
    lines.append("in CPU memory")
    held("CPU")
    condition, adapter = planner.condition(), "fake_score" in setup.adapted
    lines += [
        "on disk",
        f"  a node of the path: {planner.node(setup, half=adapter) / 1e9:.3f} GB, "
        + ("in half precision" if adapter else "in float32"),
        f"  a checkpoint: {planner.checkpoint(1, setup) / 1e9:.3f} GB of stage 1, "
        f"{planner.checkpoint(2, setup) / 1e9:.3f} GB of stage 2",
        f"conditions: {condition / 1e3:.0f} kB a prompt on disk; in float32 in CPU memory for up to {CAPACITY:,} prompts, "
        f"{2 * condition * CAPACITY / 1e9:.2f} GB then",
        f"text encoders: {planner.text_encoders() / 1e9:.3f} GB on the device until every prompt is encoded; throughout, and "
        "besides the above, if conditions are not cached",
    ]
    return "\n".join(lines)


def fits(planner: Planner, setup: Setup) -> str:
    """Which settings fit which GPU."""
    lines = [f"{'peak, GB':<40} {'stage 1':>8} {'stage 2':>8}  " + " ".join(f"{card:>3} GB" for card in CARDS)]
    for name, rung in planner.ladder(setup).items():
        totals = [planner.total(stage, rung) / 1e9 for stage in (1, 2)]
        marks = " ".join(f"{'fits' if max(totals) <= card else '-':>6}" for card in CARDS)
        lines.append(f"{name:<40} {totals[0]:>8.1f} {totals[1]:>8.1f}  {marks}")
    return "\n".join(lines)


REMARKS = """\
Weights, gradients and optimiser states are counted. Activations are an estimate: what the operations of one pass
allocate, followed on the meta device with fused attention and autocast's casts. On a CPU, in float32, this was what the
operations allocate to 0.1 %, and 18 to 262 MB less than resident memory grew by (docs/performance.md); on a GPU nothing
was measured.
Not in it: the CUDA context, workspaces of kernels, what an allocator rounds up or keeps, and what draws pictures: the
autoencoder, and before training the teacher's UNet in the run's precision, with the text encoders until prompts are encoded. A card of 24 GB has 24 x 2^30 bytes, 7 % more than is called fitting here. --compile,
--channels_last, xformers and the work space of quantised layers are not modelled."""
