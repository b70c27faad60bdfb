"""What is trained: a network, or an adapter on one that several roles share."""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, free_memory
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from ..families import ModelFamily
from ..hub.files import write_json
from ..models.adapters import LORA, Lora, SharedNetwork, fused, save_lora
from ..models.casting import called_in_float32
from ..models.score_model import ScoreModel
from ..models.weights import fill, mapped_weights, read_weights, save_weights
from .config import TrainingConfig
from .networks import accelerator_of, in_precision, tuned
from .optim import optimizer_of


MAX_SKIPPED_UPDATES = 100  # updates in a row that fp16's loss scaling may skip; it halves the scale each time


class Learner:
    """A network that is trained: its own accelerator, optimiser, learning rate schedule and average.

    Each has an accelerator of its own: which gradients are accumulated is counted for each by itself.

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
    accelerator: Accelerator
    optimizer: Any  # accelerate's, around torch's, and so the schedule
    lr_schedule: Any

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
        self.found_nonfinite = torch.zeros((), dtype=torch.bool, device=self.accelerator.device)
        self.skipped_in_a_row = 0
        self.optimizer = optimizer_of(
            name, parameters, learning_rate, config, self.accelerator.mixed_precision == "fp16"
        )
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
        """Returns the network as a score model."""
        return family.score_model(self.network)

    @contextmanager
    def frozen(self, family: ModelFamily) -> Iterator[ScoreModel]:
        """The network as a part of another network's loss, which gives it no gradients.

        It has to span the backward pass, too: gradient checkpointing recomputes the forward pass there, and compares.

        Args:
            family (`ModelFamily`): That says how the network is called.
        """
        with self.without_gradients():
            model = self.score_model(family)
            if isinstance(model.network, DistributedDataParallel):  # it would wait for gradients of its own
                model.network = model.network.module
            yield model

    @contextmanager
    def without_gradients(self) -> Iterator[None]:
        """Keeps gradients out of what is trained, around a forward and its backward pass."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)

    def backward_and_step(self, loss: Tensor) -> None:
        """Runs the backward pass, and updates with the last accumulated gradient. Call it under `accumulate`."""
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients:
            self._update(list(self.network.parameters()))

    def _update(self, parameters: list[nn.Parameter]) -> None:
        norm = self._clipped(parameters)
        if self.accelerator.scaler is None:
            # Once a gradient was not finite, no update is made with it or after it. Nothing waits for the device: the
            # flag is looked at where losses are logged.
            self.found_nonfinite = self.found_nonfinite | ~torch.isfinite(norm)
            self._guard(parameters)
        self.optimizer.step()
        # fp16's loss scaling overflows and skips an update now and then; that is no error.
        skipped = self.optimizer.step_was_skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if self.skipped_in_a_row > MAX_SKIPPED_UPDATES:
            raise FloatingPointError(
                f"The last {MAX_SKIPPED_UPDATES} updates of the {self.name} overflowed in fp16, whatever the loss was scaled by. Use bf16."
            )
        self.gradient_norm = torch.zeros_like(norm) if skipped else torch.where(self.found_nonfinite, torch.nan, norm)
        if not skipped:
            self.lr_schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None and not skipped:
            if self.config.offload_ema:
                self.ema.to(self.accelerator.device)
            self.ema.step(self.parameters())
            if self.config.offload_ema:
                self.ema.to("cpu")

    def _clipped(self, parameters: list[nn.Parameter]) -> Tensor:
        """Clips gradients. Returns their norm before, a scalar."""
        return self.accelerator.clip_grad_norm_(parameters, self.config.max_grad_norm)

    def _guard(self, parameters: list[nn.Parameter]) -> None:
        """Keeps the optimiser from an update if the flag is up."""
        optimizer = self.optimizer.optimizer
        if isinstance(optimizer, torch.optim.AdamW):
            optimizer.found_inf = self.found_nonfinite.float()  # type: ignore[attr-defined]  # torch's GradScaler sets it, too
            return
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(self.found_nonfinite, 0.0)

    def accumulate(self) -> AbstractContextManager[Any]:
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

    def save_deployed(self, folder: Path, component: str) -> None:
        """Writes the network as a student's is written, in `deployed`.

        Args:
            folder (`Path`): Of the pipeline.
            component (`str`): The denoiser's name in it, and its folder.
        """
        network: Any = self.unwrapped()  # a diffusers model
        network.save_pretrained(folder / component)

    def load_deployed(self, folder: Path, component: str) -> None:
        """Reads what `save_deployed` wrote, to be published. Nothing is trained afterwards."""
        weights = {
            k: v for file in (folder / component).glob("*.safetensors") for k, v in mapped_weights(file).items()
        }
        fill(self.unwrapped(), weights, str(folder / component))
        self.ema = None

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
    """

    adapter: str

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

    def backward_and_step(self, loss: Tensor) -> None:
        self.shared.activate(self.adapter)
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients:
            parameters = self.parameters()
            if self.accelerator.num_processes > 1:
                gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
                mean = self.accelerator.reduce(parameters_to_vector(gradients), "mean")
                vector_to_parameters(mean, gradients)
            self._update(parameters)

    @contextmanager
    def deployed(self) -> Iterator[nn.Module]:
        with super().deployed() as network:
            self.shared.activate(self.adapter)
            with called_in_float32(network):
                yield network

    def publish(self) -> nn.Module:
        """A copy of the original network with the trained adapter fused into it; the adapter itself stays in `lora`."""
        if self.ema is not None:
            self.ema.copy_to(self.parameters())
        weights = {key: tensor.detach().cpu().clone() for key, tensor in self.shared.weights(self.adapter).items()}
        self.lora = weights, self.shared.config(self.adapter)
        self.shared.release()
        return fused(self.original, *self.lora)

    def save_deployed(self, folder: Path, component: str) -> None:
        """Writes the adapter as a student's LoRA is written."""
        save_lora(self.shared.weights(self.adapter), self.shared.config(self.adapter), folder / LORA, component)

    def load_deployed(self, folder: Path, component: str) -> None:
        (file,) = (folder / LORA).glob("*.safetensors")
        weights = {key.removeprefix(f"{component}."): tensor for key, tensor in read_weights(file).items()}
        self.shared.fill(self.adapter, weights, str(file))
        self.ema = None

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
