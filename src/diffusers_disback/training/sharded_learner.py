"""A network that is trained in shares: each process holds a part of its weights, its optimiser's state and its average."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..families import ModelFamily
from ..hub.files import read_json, write_json
from ..models.score_model import ScoreModel
from .config import TrainingConfig
from .learner import Learner
from .networks import accelerator_of, in_precision, tuned
from .sharding import load_shards, names_of_shards, outline_of, save_shards, shard, whole


_STATE = "state.json"
_MOMENTS = ("exp_avg", "exp_avg_sq")


class ShardedLearner(Learner):
    """Trains a sharded network. `accelerate` prepares optimiser and schedule; the network is sharded by `sharding.shard`, as
    frozen ones are, which accelerate would not take without an optimiser.

    Args:
        name, network, learning_rate, updates, config, ema_decay: As of `Learner`; the network is on the CPU and is sharded in
            place.
    """

    def __init__(
        self,
        name: str,
        network: ModelMixin,
        learning_rate: float,
        updates: int,
        config: TrainingConfig,
        ema_decay: float | None = None,
    ):
        tuned(network.requires_grad_(True).eval(), config)
        self.outline = outline_of(network)
        shard(network, accelerator_of(config).device)
        self._begin(name, network, list(network.parameters()), learning_rate, updates, config)
        self.optimizer = self.accelerator.prepare_optimizer(self.optimizer)
        self.lr_schedule = self.accelerator.prepare_scheduler(self.lr_schedule)
        self._average(ema_decay)

    def unwrapped(self) -> nn.Module:
        """The sharded network; `deployed` gives it whole."""
        return self.network

    def score_model(self, family: ModelFamily) -> ScoreModel:
        return in_precision(family.score_model(self.network), self.accelerator)

    def accumulate(self) -> AbstractContextManager[Any]:
        """A context for one slice of a batch. Gradients are reduced after each: kept whole until the last, they would take as
        much memory as in one process."""
        return self.accelerator.accumulate()

    def _clipped(self, parameters: list[nn.Parameter]) -> Tensor:
        norm = super()._clipped(parameters)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def whole(self) -> nn.Module:
        """The network as it would be published, whole, on the CPU. To be called on every process."""
        weights = self.network.state_dict()
        if self.ema is not None:
            names = [name for name, _ in self.network.named_parameters()]
            weights |= dict(zip(names, self.ema.shadow_params, strict=True))
        return whole(self.outline, weights)

    @contextmanager
    def deployed(self) -> Iterator[nn.Module]:
        yield self.whole()

    def publish(self) -> nn.Module:
        return self.whole()

    def save(self, folder: Path) -> None:
        place = folder / self.name
        save_shards(self._tensors(), place)
        if self.accelerator.is_main_process:
            average = {} if self.ema is None else self.ema.state_dict()
            average.pop("shadow_params", None)
            write_json(place / _STATE, {"lr_schedule": self.lr_schedule.scheduler.state_dict(), "average": average})

    def load(self, folder: Path) -> None:
        place = folder / self.name
        self._make_moments(names_of_shards(place))
        load_shards(self._tensors(), place)
        state = read_json(place / _STATE)
        schedule = self.lr_schedule.scheduler
        schedule.load_state_dict(state["lr_schedule"])
        for group, base, rate in zip(
            self.optimizer.param_groups, schedule.base_lrs, schedule.get_last_lr(), strict=True
        ):
            group["initial_lr"], group["lr"] = base, rate
        if self.ema is not None:
            self.ema.load_state_dict({**state["average"], "shadow_params": self.ema.shadow_params})

    def _tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint holds in shares: weights, the optimiser's state and the average."""
        tensors = {f"weights.{name}": tensor for name, tensor in self.network.state_dict().items()}
        for number, (name, parameter) in enumerate(self.network.named_parameters()):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{key}"] = value
            if self.ema is not None:
                tensors[f"average.{name}"] = self.ema.shadow_params[number]
        return tensors

    def _make_moments(self, saved: set[str]) -> None:
        """Gives the optimiser an empty state for each parameter that had one when it was saved."""
        for name, parameter in self.network.named_parameters():
            if f"optimizer.{name}.step" in saved:
                moments = {key: torch.zeros_like(parameter, requires_grad=False) for key in _MOMENTS}
                step = torch.zeros((), dtype=torch.float32, device=self.accelerator.device)
                self.optimizer.state[parameter] = {"step": step, **moments}
