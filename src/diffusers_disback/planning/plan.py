"""What a run takes, before anything is loaded: memory of each stage, and what it leaves on disk."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from ..data.conditions import CAPACITY
from ..families import ModelFamily, family_of_index, network_name_of
from ..models.adapters import SharedNetwork, lora_config
from ..models.autoencoder import check_divides
from ..models.batch import Condition
from ..models.components import has_weights
from ..models.discriminator import Discriminator, DiscriminatorHead, bottleneck_features
from ..models.generator import check_many_steps
from ..models.noise_schedule import scheduler_of
from ..models.pipeline_folder import UNREADABLE, components_of
from ..models.reference import LocalModel, model_class, title_of
from ..models.score_model import UNSCALED, ScoreModel
from ..objectives import OBJECTIVES
from ..training.config import BacktrackingConfig, TrainingConfig
from ..training.networks import PRECISIONS
from .allocations import PassMemory, checkpointed, pass_memory, size


QUANTIZED = {"nf4": 0.5 + 4 / 64, "int8": 1.0}  # bytes of a linear layer's weight, with its share of the scales
ROLES = "fake_score", "generator"  # stage 1 trains the first
ENCODES = f"exact; in CPU memory, if there are {CAPACITY:,} images or fewer"
NAMES = {"fake_score": "fake score", "generator": "student"}


@dataclass(frozen=True)
class Row:
    """A line of the table: so many bytes on the `device` or in memory of the `CPU`, where they are moved in the update of
    another role, `idle_in`; and how well that is known."""

    name: str
    bytes: int
    place: str = "device"
    idle_in: str | None = None
    remark: str = "exact"


@dataclass
class Planner:
    """Counts what a distillation takes, by its settings. The student starts from the teacher, and the path has at least
    two nodes.

    Args:
        skeleton (`Callable`): Makes the teacher's denoiser on the meta device.
        family (`type[ModelFamily]`): The teacher's.
        training (`TrainingConfig`): What both stages share. If no precision is named, it is float32.
        backtracking (`BacktrackingConfig`): The settings of stage 2.
        stride (`int`): Pixels of a latent's side.
        others (`dict[str, nn.Module]`): The teacher's other networks, on the meta device.
    """

    skeleton: Callable[[], ModelMixin]
    family: type[ModelFamily]
    training: TrainingConfig
    backtracking: BacktrackingConfig
    stride: int = 8
    others: dict[str, nn.Module] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.dtype = PRECISIONS[self.training.mixed_precision or "no"]
        self.autocast = None if self.dtype == torch.float32 else self.dtype

    @classmethod
    def of(cls, training: TrainingConfig, backtracking: BacktrackingConfig) -> "Planner":
        """Plans a run by its settings; of its teacher only configs are read.

        Raises:
            ValueError: If these cannot be read, are of a student, or do not go with the resolution.
        """
        teacher = training.teacher.resolve_configs(network_name_of, training.cache_dir)
        family = family_of_index(teacher.index)
        if config := teacher.scheduler_config():
            name = teacher.name_or_path
            check_many_steps(scheduler_of(config, f"The scheduler's config of {name!r}"), name)
        others = meta_networks_beside(teacher)
        stride = family.stride_of(others)
        check_divides(stride, training.resolution)
        return cls(teacher.meta_network, family, training, backtracking, stride, others)

    @cached_property
    def network(self) -> ModelMixin:
        """The teacher's denoiser, on the meta device."""
        network = self.skeleton()
        self.family.check_network(network.config, f"The teacher's {title_of(self.family.network_name)}")
        return network

    @cached_property
    def trained(self) -> dict[str, list[Tensor]]:
        """The parameters of each role that are trained, on the meta device."""
        trained = {role: [p for p in self._network_of(role).parameters() if p.requires_grad] for role in ROLES}
        return trained | ({"discriminator": list(self.head.parameters())} if self.training.has_discriminator else {})

    def whole(self, role: str) -> int:
        """Bytes of a role's network, or of its adapter: what is trained of it, and tables such as positions of patches."""
        return self.own(role) + (0 if self.training.is_adapter(role) else size(*self.network.buffers()))

    def own(self, role: str) -> int:
        """Bytes of what is trained of a role, in float32; the fake score's are those of a node of the path."""
        return size(*self.trained[role])

    @property
    def resolution(self) -> int:
        """The images' side in pixels."""
        return self.training.resolution or self.network.config.sample_size * self.stride

    def _network_of(self, role: str) -> ModelMixin:
        """A network to be run as a role's: all of it is trained, or an adapter on it."""
        training, network = self.training, self.skeleton().requires_grad_(True)
        if training.lora_rank is not None and training.is_adapter(role):
            for parameter in network.parameters():
                parameter.data = parameter.data.to(self.dtype)
            shared = SharedNetwork(network)
            with torch.device("meta"):
                targets = training.lora_target_modules or self.family.lora_target_modules
                shared.add(role, lora_config(training.lora_rank, None, targets))
            shared.activate(role)
        if training.gradient_checkpointing:
            network.enable_gradient_checkpointing(checkpointed(self.autocast))
        return network

    @cached_property
    def first_update(self) -> PassMemory:
        """What the fake score's update in stage 1, which is without guidance, takes besides what is held."""
        return self._pass("fake_score", self.training.train_batch_size)

    @cached_property
    def updates(self) -> dict[str, PassMemory]:
        """What each role's update in stage 2 takes besides what is held."""
        training, batch, own = self.training, self.training.train_batch_size, self.backtracking
        scales = (own.training_guidance_of_fake_score, own.guidance_scale, own.fake_score_guidance_scale)
        takes_condition = self.family.takes_condition(self.network.config)
        own_samples, *samples = (2 * batch if takes_condition and scale not in (0, 1) else batch for scale in scales)
        student = self.first_update
        fake_score = student if own_samples == batch else self._pass("fake_score", own_samples)
        if training.has_discriminator:  # which leaves its gradient there, for the pass of its own loss to add to
            judged = self._pass("fake_score", 2 * batch, is_judged=True)
            own_pass = self._pass("fake_score", own_samples, accumulates=True)
            peak = max(judged.peak, own_pass.peak)
            fake_score = PassMemory(max(judged.activations, own_pass.activations), own_pass.gradients, peak)
        if training.is_adapter("generator") != training.is_adapter("fake_score"):
            student = self._pass("generator", batch)
        through_scores = OBJECTIVES[training.objective].differentiates_scores
        with torch.set_grad_enabled(through_scores):  # the target, then the fake score, with both halves of guidance
            target, asked = (self._pass("fake_score", number, is_trained=False) for number in samples)
        graphs = target.activations + asked.activations if through_scores else 0
        peak = student.activations + max(target.peak, target.activations + asked.peak)
        if training.adversarial_weight:
            judged = self._pass("fake_score", batch, is_trained=False, is_judged=True)
            peak = max(peak, student.activations + graphs + judged.peak)
            graphs += judged.activations
        update = replace(student, activations=student.activations + graphs, peak=max(student.peak, peak))
        return {"fake_score": fake_score, "generator": update}

    @cached_property
    def head(self) -> DiscriminatorHead:
        """A discriminator's, on the meta device."""
        network = self.skeleton()
        model = ScoreModel(network, UNSCALED, self.family.call)
        inputs = example_inputs(self.family, network.config, 1, self.resolution // self.stride, torch.float32)
        with torch.no_grad():
            features = bottleneck_features(model, self.family.bottleneck(network), *inputs)
        with torch.device("meta"):
            return DiscriminatorHead(features.shape[-1])

    def _pass(
        self, role: str, samples: int, is_trained: bool = True, accumulates: bool = False, is_judged: bool = False
    ) -> PassMemory:
        """A pass of a role; if it is not trained, its graph, where there is one, leads to the samples alone. If it is judged, it
        leads to a discriminator's logits, and back from there."""
        network: nn.Module = self._network_of(role)
        call: Callable[..., Tensor] = self.family.call
        config, dtype, side = network.config, next(network.parameters()).dtype, self.resolution // self.stride
        if is_judged:
            discriminator = Discriminator(self.head.requires_grad_(True), self.family.bottleneck(network))
            network = nn.ModuleList([network, self.head])

            def judged(both: nn.ModuleList, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
                return discriminator(ScoreModel(both[0], UNSCALED, self.family.call), x_t, t, condition)

            call = judged

        if not is_trained:
            network.requires_grad_(False)

        def inputs() -> tuple[Tensor, Tensor, Condition]:
            return example_inputs(self.family, config, samples, side, dtype, requires_grad=not is_trained)

        return pass_memory(network, call, inputs, self.autocast, accumulates)

    def rows(self, stage: int) -> list[Row]:
        """What stage 1 or 2 holds throughout."""
        training, whole = self.training, size(*self.network.parameters(), *self.network.buffers())
        fake_score, student = training.is_adapter("fake_score"), training.is_adapter("generator")
        of_rank, offloads = f", adapter of rank {training.lora_rank}", training.offload_idle_role and stage == 2
        rows = [self._base("base of the scores, the teacher")] if fake_score else []
        rows += [Row("fake score" + of_rank * fake_score, self.whole("fake_score"))]
        if stage == 1 and not training.all_adapters:
            rows += [Row("initial generator", whole)]
        elif stage == 2:
            idle_in = "fake_score" if offloads and not fake_score else None
            rows += [Row("target" + of_rank * fake_score, self.whole("fake_score"), idle_in=idle_in)]
            rows += [self._base("base of the student")] if student and not fake_score else []
            rows += [Row("student" + of_rank * student, self.whole("generator"))]
        for role, other in list(zip(ROLES, reversed(ROLES), strict=True))[:stage]:
            name = f"optimiser state, {NAMES[role]}" + ", paged" * training.use_paged_adam
            place = "CPU" if training.use_paged_adam else "device"
            remark = "estimate" if training.use_8bit_adam else "exact"
            rows += [Row(name, self._adam(role), place, other if offloads else None, remark)]
        if self.backtracking.use_ema and stage == 2:
            place = "CPU" if training.offload_ema else "device"
            rows += [Row("average of the student", self.own("generator"), place)]
        rows += [Row("noise, conditions and samples of a step", self._batches(stage))]
        rows += [Row("teacher, float32", whole, "CPU")]
        autoencoders = [other for name, other in self.others.items() if name not in self.family.encoders]
        autoencoder = sum(size(*other.parameters()) for other in autoencoders)
        if training.has_discriminator and stage == 2:
            paged, place = ", paged" * training.use_paged_adam, "CPU" if training.use_paged_adam else "device"
            remark = "estimate" if training.use_8bit_adam else "exact"
            rows += [Row("discriminator's head", self.own("discriminator"))]
            rows += [
                Row(f"optimiser state, discriminator's head{paged}", self._adam("discriminator"), place, remark=remark)
            ]
            rows += [Row("autoencoder, for real images", autoencoder, remark=ENCODES)] if autoencoders else []
        elif autoencoders:
            rows += [Row("autoencoder", autoencoder, "CPU")]
        return rows

    def _base(self, name: str) -> Row:
        """A frozen network under adapters, of which linear layers may be quantised."""
        number, linear = sum(each.numel() for each in (*self.network.parameters(), *self.network.buffers())), 0
        if self.training.base_quantization is not None:
            linear = sum(each.weight.numel() for each in self.network.modules() if isinstance(each, nn.Linear))
        quantized = int(linear * QUANTIZED.get(self.training.base_quantization or "", 0))
        return Row(name, (number - linear) * self.dtype.itemsize + quantized, remark="estimate" if linear else "exact")

    def _batches(self, stage: int) -> int:
        """All batches of a step, which are on the device at once, and the samples that the generator made of the first."""
        training, side = self.training, self.resolution // self.stride
        number = training.train_batch_size * training.gradient_accumulation_steps
        noise, _, condition = example_inputs(self.family, self.network.config, 1, side, torch.float32)
        batches = self.backtracking.fake_score_updates if stage == 2 else 1
        return number * (batches * size(noise, *condition.values()) + size(noise))

    def _adam(self, role: str) -> int:
        """AdamW's two moments in float32, and a step count for each tensor; in 8 bits about a byte for each moment."""
        number = sum(parameter.numel() for parameter in self.trained[role])
        return 2 * number if self.training.use_8bit_adam else 8 * number + 4 * len(self.trained[role])

    def total(self, stage: int) -> int:
        """The most that a stage holds on the device, in bytes."""
        rows = [row for row in self.rows(stage) if row.place == "device"]
        updates = {"fake_score": self.first_update} if stage == 1 else self.updates
        return max(sum(row.bytes for row in rows if row.idle_in != role) + updates[role].peak for role in updates)

    def checkpoint(self, stage: int) -> int:
        """Bytes of a checkpoint of a stage: what is trained, optimisers' states, and the average."""
        average = self.own("generator") if self.backtracking.use_ema and stage == 2 else 0
        judges = self.training.has_discriminator and stage == 2
        roles = [*ROLES[:stage], *(["discriminator"] if judges else [])]
        return sum(self.own(role) + self._adam(role) for role in roles) + average


def example_inputs(
    family: type[ModelFamily],
    config: Any,
    samples: int,
    side: int,
    dtype: torch.dtype,
    requires_grad: bool = False,
) -> tuple[Tensor, Tensor, Condition]:
    """What a denoiser of a config is called with, on the meta device.

    Returns:
        `tuple`: Samples, `[B, C, side, side]`, with `requires_grad`; timesteps, `[B]`; and a condition.
    """
    x_t = torch.empty(samples, config.in_channels, side, side, device="meta", dtype=dtype, requires_grad=requires_grad)
    condition = family.example_condition(config, samples)
    condition = {key: value.to(dtype) if value.is_floating_point() else value for key, value in condition.items()}
    return x_t, torch.empty(samples, dtype=torch.long, device="meta"), condition


def meta_networks_beside(teacher: LocalModel) -> dict[str, nn.Module]:
    """A teacher's networks besides its denoiser, on the meta device, from their configs.

    Raises:
        ValueError: If these cannot be read.
    """
    import transformers

    networks: dict[str, nn.Module] = {}
    try:
        for name, (library, class_name) in components_of(teacher.index).items():
            if name == teacher.network_name or not has_weights(name):
                continue
            with torch.device("meta"):
                if library == "diffusers":
                    kind = model_class(class_name)
                    networks[name] = kind.from_config(kind.load_config(teacher.folder, subfolder=name))
                else:
                    kind = getattr(transformers, class_name)
                    networks[name] = kind(kind.config_class.from_pretrained(teacher.folder, subfolder=name))
    except UNREADABLE as error:
        raise ValueError(f"The configs of {teacher.name_or_path!r} cannot be read. {error}") from error
    return networks


def table(planner: Planner) -> str:
    """What each stage takes, in GB of 10^9 bytes."""
    lines = [f"{'GB':<46} {'stage 1':>10} {'stage 2':>10}"]

    def line(name: str, values: Iterable[int], remark: str) -> None:
        numbers = (f"{value / 1e9:10.3f}" if value else f"{'-':>10}" for value in values)
        lines.append(f"{name:<46} {' '.join(numbers)}  {remark}")

    stages = [{row.name: row for row in planner.rows(stage)} for stage in (1, 2)]

    def held(place: str) -> None:
        for name, row in (stages[0] | stages[1]).items():
            if row.place == place:
                values = (rows[name].bytes if name in rows else 0 for rows in stages)
                line(f"  {name}", values, row.remark + ", offloaded in turn" * bool(row.idle_in))

    lines.append("held on the device")
    held("device")
    for role, name in NAMES.items():
        lines.append(f"while the {name} is updated")
        update = planner.updates[role]
        passes = [planner.first_update if role == "fake_score" else PassMemory(0, 0, 0), update]
        line("  gradients", (each.gradients for each in passes), "exact")
        line("  activations", (each.activations for each in passes), "estimate")
        line("  both, at the worst moment", (each.peak for each in passes), "estimate")
    line("peak on the device", (planner.total(stage) for stage in (1, 2)), "estimate")
    lines.append("in CPU memory")
    held("CPU")
    half = planner.training.is_adapter("fake_score")
    node = planner.whole("fake_score") // (2 if half else 1)
    encoders = sum(
        size(*other.parameters()) for name, other in planner.others.items() if name in planner.family.encoders
    )
    if planner.training.text_encoder_precision != "no":
        encoders //= 2
    lines += [
        "on disk",
        f"  a node of the path: {node / 1e9:.3f} GB, in {'half precision' if half else 'float32'}",
        f"  a checkpoint: {planner.checkpoint(1) / 1e9:.3f} GB of stage 1, {planner.checkpoint(2) / 1e9:.3f} GB of stage 2",
        f"text encoders: {encoders / 1e9:.3f} GB on the device until every prompt is encoded; throughout, and besides the "
        "above, if conditions are not cached",
    ]
    return "\n".join(lines)


REMARKS = """\
Weights, gradients and optimiser states are counted; states of 8 bits and quantised bases roughly. Activations are an
estimate: what the operations of one pass allocate, followed on the meta device with fused attention and autocast's casts.
On a CPU, in float32, that was right to 0.1 %, and 18 to 262 MB less than resident memory grew by (docs/performance.md); on
a GPU nothing was measured. Not in it: the CUDA context, workspaces of kernels, what an allocator rounds up or keeps,
--compile, --channels_last, xformers, and what draws or encodes images: the autoencoder, and before training the teacher's UNet in
the run's precision, with the text encoders until prompts are encoded."""
