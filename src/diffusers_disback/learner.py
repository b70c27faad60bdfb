"""A network that is trained."""

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from .config import TrainingConfig


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
    """

    def __init__(
        self,
        name: str,
        network: nn.Module,
        learning_rate: float,
        updates: int,
        config: TrainingConfig,
        ema_decay: float | None = None,
    ):
        self.name = name
        self.gradient_norm = torch.zeros(())
        self.max_grad_norm = config.max_grad_norm
        self.accelerator = Accelerator(
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            mixed_precision=config.mixed_precision,
            log_with=None if config.report_to == "none" else config.report_to,
            project_config=ProjectConfiguration(
                project_dir=config.output_dir, logging_dir=str(Path(config.output_dir, config.logging_dir))
            ),
            # A learning rate step per update, whatever the number of processes.
            step_scheduler_with_optimizer=False,
        )
        # Evaluation mode, so that no dropout draws from global random state; gradients flow all the same.
        network.requires_grad_(True).eval()
        if config.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        optimizer = torch.optim.AdamW(
            network.parameters(),
            lr=learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.adam_weight_decay,
            eps=config.adam_epsilon,
        )
        schedule = get_scheduler(
            config.lr_scheduler, optimizer, num_warmup_steps=config.lr_warmup_steps, num_training_steps=updates
        )
        self.network, self.optimizer, self.lr_schedule = self.accelerator.prepare(network, optimizer, schedule)
        self.ema: EMAModel | None = None
        if ema_decay is not None:
            own = self.unwrapped()
            self.ema = EMAModel(own.parameters(), decay=ema_decay, model_cls=type(own), model_config=own.config)

    def unwrapped(self) -> nn.Module:
        """The network as diffusers knows it."""
        return self.accelerator.unwrap_model(self.network)

    def learn(self, loss: Tensor) -> None:
        """The backward pass, and with the last accumulated gradient an update. Call it under `accumulate`."""
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients:
            norm = self.accelerator.clip_grad_norm_(self.network.parameters(), self.max_grad_norm)
            self.optimizer.step()
            # fp16's loss scaling overflows and skips an update now and then; that is no error.
            skipped = self.optimizer.step_was_skipped
            self.gradient_norm = torch.zeros_like(norm) if skipped else norm
            if not skipped:
                self.lr_schedule.step()
            self.optimizer.zero_grad(set_to_none=True)
            if self.ema is not None:
                self.ema.step(self.unwrapped().parameters())

    def accumulate(self):
        """A context for one slice of a batch."""
        return self.accelerator.accumulate(self.network)

    def averaged(self) -> nn.Module:
        """The network with its averaged weights, if an average is kept: a copy; otherwise the network itself."""
        network = self.unwrapped()
        if self.ema is None:
            return network
        average = type(network).from_config(network.config).to(network.device).requires_grad_(False).eval()
        self.ema.copy_to(average.parameters())
        return average

    def release(self) -> None:
        """Lets go of the network and of the optimiser's state."""
        (self.network, self.optimizer, self.lr_schedule) = self.accelerator.free_memory(
            self.network, self.optimizer, self.lr_schedule
        )
        self.ema = None

    def save(self, folder: Path) -> None:
        """Writes all state. To be called on every process."""
        self.accelerator.save_state(str(folder / self.name))
        if self.ema is not None and self.accelerator.is_main_process:
            self.ema.save_pretrained(folder / f"{self.name}_ema")

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote."""
        self.accelerator.load_state(str(folder / self.name))
        if self.ema is not None:
            saved = EMAModel.from_pretrained(folder / f"{self.name}_ema", self.ema.model_cls)
            self.ema.load_state_dict(saved.state_dict())
            self.ema.to(self.accelerator.device)
