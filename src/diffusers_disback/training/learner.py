"""What is trained: a network, or an adapter on one that several roles share."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, DistributedType, ProjectConfiguration, broadcast
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, free_memory
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from ..families import ModelFamily
from ..hub.files import write_json
from ..models.adapters import Lora, SharedNetwork, base_of, fused, lora_config
from ..models.score_model import ScoreModel
from ..models.weights import read_weights, save_weights
from .config import TrainingConfig


SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)
SKIPS = 100  # updates in a row that fp16's loss scaling may skip; it halves the scale each time


class Learner:
    """A network that is trained: its own accelerator, optimiser, learning rate schedule and average.

    Each has an accelerator of its own because FSDP2 and DeepSpeed take one model each.

    Args:
        name (`str`): Its folder in a checkpoint.
        network (`nn.Module`): In float32; modes and gradients are set here.
        learning_rate (`float`): Of AdamW.
        updates (`int`): How many there will be, for the learning rate's schedule.
        config (`TrainingConfig`): Optimisation and precision.
        ema_decay (`float`, *optional*): Keeps an exponential moving average of the weights.

    Attributes:
        gradient_norm (`Tensor`): Of the last update, before clipping; a scalar, on the device.
        adapter (`str`, *optional*): The name of the adapter that is trained, if not all of the network is.
        lora (`tuple`, *optional*): The published adapter: its weights in peft's names, and its config.
    """

    adapter: str | None = None
    lora: Lora | None = None

    def __init__(
        self,
        name: str,
        network: nn.Module,
        learning_rate: float,
        updates: int,
        config: TrainingConfig,
        ema_decay: float | None = None,
    ):
        # Evaluation mode, so that no dropout draws from global random state; gradients flow all the same.
        tuned(network.requires_grad_(True).eval(), config)
        self._begin(name, network, list(network.parameters()), learning_rate, updates, config)
        self.network, self.optimizer, self.lr_schedule = self.accelerator.prepare(
            network, self.optimizer, self.lr_schedule
        )
        self._average(ema_decay)

    def _begin(
        self,
        name: str,
        network: nn.Module,
        parameters: list[nn.Parameter],
        learning_rate: float,
        updates: int,
        config: TrainingConfig,
    ) -> None:
        self.name = name
        self.network = network
        self.gradient_norm = torch.zeros(())
        self.config = config
        self.learning_rate = learning_rate
        self.accelerator = accelerator_of(config)
        self.bad = torch.zeros((), dtype=torch.bool, device=self.accelerator.device)
        self.skipped_in_a_row = 0
        self.optimizer = optimizer_of(parameters, learning_rate, config, self.accelerator.mixed_precision == "fp16")
        self.lr_schedule = get_scheduler(
            config.lr_scheduler, self.optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=updates
        )

    def _average(self, ema_decay: float | None) -> None:
        self.ema: EMAModel | None = None
        if ema_decay is not None:
            self.ema = EMAModel(self.parameters(), decay=ema_decay)
            if self.config.offload_ema:
                self.ema.to("cpu")

    def unwrapped(self) -> nn.Module:
        """The network as diffusers knows it."""
        return self.accelerator.unwrap_model(self.network)

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return list(self.unwrapped().parameters())

    def score_model(self, family: ModelFamily) -> ScoreModel:
        """The way to ask it."""
        return family.score_model(self.network)

    @contextmanager
    def frozen(self, family: ModelFamily) -> Iterator[ScoreModel]:
        """The network as a part of another network's loss, which gives it no gradients.

        It has to span the backward pass, too: gradient checkpointing recomputes the forward pass there, and compares.

        Args:
            family (`ModelFamily`): That says how the network is called.
        """
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            model = self.score_model(family)
            if isinstance(model.network, DistributedDataParallel):  # it would wait for gradients of its own
                model.network = model.network.module
            yield model
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)

    def learn(self, loss: Tensor) -> None:
        """The backward pass, and with the last accumulated gradient an update. Call it under `accumulate`."""
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients:
            self._update(list(self.network.parameters()))

    def _update(self, parameters: list[nn.Parameter]) -> None:
        norm = self.accelerator.clip_grad_norm_(parameters, self.config.max_grad_norm)
        if self.accelerator.scaler is None and self.accelerator.distributed_type not in SHARDED:
            # Once a gradient was not finite, no update is made with it or after it. Nothing waits for the device: the
            # flag is looked at where losses are logged.
            self.bad = self.bad | ~torch.isfinite(norm)
            self._guard(parameters)
        self.optimizer.step()
        # fp16's loss scaling overflows and skips an update now and then; that is no error.
        skipped = self.optimizer.step_was_skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if self.skipped_in_a_row > SKIPS:
            raise FloatingPointError(
                f"The last {SKIPS} updates of the {self.name} overflowed in fp16, whatever the loss was scaled by. Use bf16."
            )
        self.gradient_norm = torch.zeros_like(norm) if skipped else torch.where(self.bad, torch.nan, norm)
        if not skipped:
            self.lr_schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None and not skipped:
            if self.config.offload_ema:
                self.ema.to(self.accelerator.device)
            self.ema.step(self.parameters())
            if self.config.offload_ema:
                self.ema.to("cpu")

    def _guard(self, parameters: list[nn.Parameter]) -> None:
        """Keeps the optimiser from an update if the flag is up."""
        optimizer = self.optimizer.optimizer
        if isinstance(optimizer, torch.optim.AdamW):
            optimizer.found_inf = self.bad.float()  # as torch's GradScaler tells a fused optimiser
            return
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(self.bad, 0.0)

    def accumulate(self):
        """A context for one slice of a batch."""
        return self.accelerator.accumulate(self.network)

    @contextmanager
    def deployed(self) -> Iterator[nn.Module]:
        """The network as it would be published: with its averaged weights, if an average is kept."""
        if self.ema is None:
            yield self.unwrapped()
            return
        self.ema.store(self.parameters())
        self.ema.copy_to(self.parameters())
        try:
            yield self.unwrapped()
        finally:
            self.ema.restore(self.parameters())

    def publish(self) -> nn.Module:
        """The trained network, averaged if an average is kept. Nothing is trained afterwards."""
        if self.ema is not None:
            self.ema.copy_to(self.parameters())
        return self.unwrapped()

    def place_optimizer(self, device: torch.device | str) -> None:
        """Moves the optimiser's state, which is of no use while another network is trained."""
        for state in self.optimizer.state.values():
            for key, value in state.items():
                if torch.is_tensor(value) and value.ndim:
                    state[key] = value.to(device)

    def release(self) -> None:
        """Lets go of the network and of the optimiser's state."""
        (self.network, self.optimizer, self.lr_schedule) = self.accelerator.free_memory(
            self.network, self.optimizer, self.lr_schedule
        )
        self.ema = None
        free_memory()  # a prepared network is in a cycle of references

    def save(self, folder: Path) -> None:
        """Writes all state. To be called on every process."""
        self.accelerator.save_state(str(folder / self.name))
        if self.accelerator.is_main_process:
            self._save_average(folder / f"{self.name}_ema")

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote."""
        self.accelerator.load_state(str(folder / self.name))
        self._load_average(folder / f"{self.name}_ema")

    def keep_learning_rate(self) -> float | None:
        """Goes on with the learning rate of the settings, where what was loaded was trained with another: as far in its
        schedule as that was. Returns the other one, if it was another."""
        schedule = self.lr_schedule.scheduler
        was = schedule.base_lrs[0]
        if was == self.learning_rate:
            return None
        schedule.base_lrs = [self.learning_rate] * len(schedule.base_lrs)
        factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
        schedule._last_lr = [self.learning_rate * factor for factor in factors]
        for group, rate in zip(self.optimizer.param_groups, schedule._last_lr, strict=True):
            group["initial_lr"], group["lr"] = self.learning_rate, rate
        return was

    def _save_average(self, folder: Path) -> None:
        if self.ema is None:
            return
        state = self.ema.state_dict()
        shadow = {f"{number:06d}": tensor.contiguous() for number, tensor in enumerate(state.pop("shadow_params"))}
        folder.mkdir()
        save_weights(shadow, folder / "average.safetensors")
        write_json(folder / "average.json", state)

    def _load_average(self, folder: Path) -> None:
        if self.ema is None:
            return
        shadow = read_weights(folder / "average.safetensors")  # it stays, and its file may not
        state = json.loads((folder / "average.json").read_text())
        self.ema.load_state_dict({**state, "shadow_params": [shadow[number] for number in sorted(shadow)]})
        self.ema.to("cpu" if self.config.offload_ema else self.accelerator.device)


class AdapterLearner(Learner):
    """A role's adapter that is trained, on a network that other roles share.

    The network is not wrapped for distributed training, which would reduce what is trainable when it is wrapped: each
    role's own gradients are averaged over the processes before its update.

    Args:
        name (`str`): The role, and its folder in a checkpoint.
        shared (`SharedNetwork`): With an adapter for the role.
        original (`nn.Module`): The network in float32, without adapters, to fuse the trained adapter into.
        learning_rate (`float`), and the others: As of `Learner`.

    Raises:
        ValueError: If the processes shard their networks.
    """

    def __init__(
        self,
        name: str,
        shared: SharedNetwork,
        original: nn.Module,
        learning_rate: float,
        updates: int,
        config: TrainingConfig,
        ema_decay: float | None = None,
    ):
        self.adapter = name
        self.shared = shared
        self.original = original
        self._begin(name, shared.network, shared.parameters(name), learning_rate, updates, config)
        kind = self.accelerator.distributed_type
        if kind in SHARDED:
            raise ValueError(
                f"Adapters are trained on a network that every process holds whole, but this launch is of type "
                f"{kind.value}. Launch with plain data parallelism, or train in full, without --lora_rank."
            )
        if self.accelerator.num_processes > 1:
            for parameter in self.parameters():
                parameter.data = broadcast(parameter.data)
        self.optimizer, self.lr_schedule = self.accelerator.prepare(self.optimizer, self.lr_schedule)
        self._average(ema_decay)

    def unwrapped(self) -> nn.Module:
        return self.shared.network

    def parameters(self) -> list[nn.Parameter]:
        return self.shared.parameters(self.adapter)

    def score_model(self, family: ModelFamily) -> ScoreModel:
        model = in_precision(family.score_model(self.shared.network), self.accelerator)
        return self.shared.in_role(model, self.adapter)

    def learn(self, loss: Tensor) -> None:
        self.shared.activate(self.adapter)
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients:
            parameters = self.parameters()
            if self.accelerator.num_processes > 1:
                gradients = [parameter.grad for parameter in parameters]
                mean = self.accelerator.reduce(parameters_to_vector(gradients), "mean")
                vector_to_parameters(mean, gradients)
            self._update(parameters)

    @contextmanager
    def deployed(self) -> Iterator[nn.Module]:
        with super().deployed() as network:
            self.shared.activate(self.adapter)
            yield network

    def publish(self) -> nn.Module:
        """A copy of the original network with the trained adapter fused into it; the adapter itself stays in `lora`."""
        if self.ema is not None:
            self.ema.copy_to(self.parameters())
        weights = {key: tensor.detach().cpu().clone() for key, tensor in self.shared.weights(self.adapter).items()}
        self.lora = weights, self.shared.config(self.adapter)
        self.shared.release()
        return fused(self.original, *self.lora)

    def release(self) -> None:
        self.optimizer, self.lr_schedule = self.accelerator.free_memory(self.optimizer, self.lr_schedule)
        self.shared.release()
        self.network = self.ema = None
        free_memory()

    def save(self, folder: Path) -> None:
        super().save(folder)
        if self.accelerator.is_main_process:
            weights = {key: tensor.contiguous() for key, tensor in self.shared.weights(self.adapter).items()}
            save_weights(weights, folder / self.name / "adapter.safetensors")

    def load(self, folder: Path) -> None:
        file = folder / self.name / "adapter.safetensors"
        self.shared.fill(self.adapter, read_weights(file), str(file))
        super().load(folder)


def accelerator_of(config: TrainingConfig) -> Accelerator:
    """A fresh accelerator, as the settings say.

    Raises:
        ValueError: If fp16 is asked for on a CPU.
    """
    accelerator = Accelerator(
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mixed_precision=config.mixed_precision,
        log_with=None if config.report_to == "none" else config.report_to,
        project_config=ProjectConfiguration(
            project_dir=config.output_dir, logging_dir=str(Path(config.output_dir, config.logging_dir))
        ),
        # A learning rate step per update, whatever the number of processes.
        step_scheduler_with_optimizer=False,
        # Each weight is cast once in a pass: a cache would only hold copies, of the whole network where no gradient is asked.
        kwargs_handlers=[AutocastKwargs(cache_enabled=False)],
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError(
            "--mixed_precision fp16, here or of `accelerate launch`, needs a GPU, but this run is on the CPU. Pass "
            "--mixed_precision bf16, or no."
        )
    return accelerator


def shared_base(network: nn.Module, config: TrainingConfig) -> SharedNetwork:
    """A network in float32 as the base of several roles' adapters, in the precision and on the device of the run."""
    accelerator = accelerator_of(config)
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    dtype, scratch = compute_dtype(accelerator), config.output_dir
    base = base_of(network, accelerator.device, dtype, config.base_quantization, scratch)
    if base is not network:
        network.to("cpu")  # it is needed again to fuse a trained adapter into
    shared = SharedNetwork(base)
    tuned(base, config, shared.checkpointed)
    return shared


def add_adapter(shared: SharedNetwork, role: str, config: TrainingConfig, seed: int) -> None:
    """Adds a role's adapter, as the settings ask for it."""
    shared.add(role, lora_config(config.lora_rank, config.lora_alpha, config.lora_target_modules), seed)


def compute_dtype(accelerator: Accelerator) -> torch.dtype:
    """The precision that networks compute in."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)


def in_precision(model: ScoreModel, accelerator: Accelerator) -> ScoreModel:
    """The same way to ask, in the trained networks' precision, operation for operation."""
    call = model.call

    def call_in_precision(network, x_t, t, condition):
        with accelerator.autocast():
            return call(network, x_t, t, condition)

    model.call = call_in_precision
    return model


def optimizer_of(
    parameters: list[nn.Parameter], learning_rate: float, config: TrainingConfig, is_scaled: bool
) -> torch.optim.Optimizer:
    """AdamW: torch's, or that of bitsandbytes with states of 8 bits, or in pages that a full GPU moves out.

    Torch's is fused unless the loss is scaled, as for fp16: accelerate could then not see what is skipped.

    Raises:
        ValueError: If bitsandbytes is asked for and not installed.
    """
    arguments = {
        "lr": learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if not config.use_8bit_adam and not config.use_paged_adam:
        return torch.optim.AdamW(parameters, fused=not is_scaled, **arguments)
    try:
        import bitsandbytes
    except ImportError as error:
        raise ValueError(
            "--use_8bit_adam and --use_paged_adam need bitsandbytes: `pip install bitsandbytes`."
        ) from error
    kinds = {
        (True, False): bitsandbytes.optim.AdamW8bit,
        (True, True): bitsandbytes.optim.PagedAdamW8bit,
        (False, True): bitsandbytes.optim.PagedAdamW32bit,
    }
    return kinds[config.use_8bit_adam, config.use_paged_adam](parameters, **arguments)


def tuned(network: nn.Module, config: TrainingConfig, checkpointed: Callable | None = None) -> nn.Module:
    """A network with the settings that change its memory and speed, and not what it computes.

    Args:
        network (`nn.Module`): A diffusers denoiser.
        config (`TrainingConfig`): With these settings.
        checkpointed (`Callable`, *optional*): Runs a block under gradient checkpointing; by default diffusers' own.

    Raises:
        ValueError: If xformers is asked for and cannot be used.
    """
    if config.gradient_checkpointing:
        network.enable_gradient_checkpointing(checkpointed)
    if config.channels_last:
        network.to(memory_format=torch.channels_last)
    if config.enable_xformers_memory_efficient_attention:
        try:
            network.enable_xformers_memory_efficient_attention()
        except (ImportError, ModuleNotFoundError, ValueError) as error:
            raise ValueError(
                f"--enable_xformers_memory_efficient_attention needs xformers and a GPU ({error}). Leave it out: torch's "
                "own attention, which is the default, is as frugal."
            ) from error
    if config.compile:
        # All blocks share one code object, of which each width, role and batch size is a variant.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        network.compile_repeated_blocks()
    return network
