"""The two scores of a stage, the fake score and the target: whole networks, or adapters on one network that they share."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..families import ModelFamily
from ..models.adapters import SharedNetwork
from ..models.score_model import ScoreModel
from ..models.weights import fill
from ..path.path import DegradationPath
from .config import BacktrackingConfig, TrainingConfig
from .learner import AdapterLearner, Learner
from .networks import add_adapter, in_precision, shared_base, tuned
from .sharded_learner import ShardedLearner
from .sharding import is_sharded, own_share, shard


class Scores(ABC):
    """The fake score, which is trained, and the target, which is a node of the path.

    Args:
        family (`ModelFamily`): The teacher.
        config (`TrainingConfig`): Adapters, precision and optimisation.
        learning_rate (`float`): Of the fake score.
        updates (`int`): Of the fake score, for its learning rate's schedule.
        path (`DegradationPath`, *optional*): In stage 2, a complete path, at whose last node the fake score starts;
            without one it starts from the teacher.
        loads (`bool`): `False` if a checkpoint is loaded into the fake score later, in place of the node.

    Attributes:
        kind (`str`): Of the path's nodes: `full` or `adapter`.
        fake_score (`Learner`): The fake score.
        target (`ScoreModel`): The target; stage 2 makes it by `add_target`.
        shared (`SharedNetwork`, *optional*): The network that roles share, if they do.

    Raises:
        ValueError: If the path's nodes are of the other kind.
    """

    kind: str
    fake_score: Learner
    target: ScoreModel
    shared: SharedNetwork | None = None
    learner_of_network: type[Learner] = Learner
    is_collective = False  # whether all processes have to ask for a prediction

    def __init__(
        self,
        family: ModelFamily,
        config: TrainingConfig,
        learning_rate: float,
        updates: int,
        path: DegradationPath | None = None,
        loads: bool = True,
    ):
        self.family = family
        self.config = config
        self.path = path or None  # one without nodes is none
        self._check_kind()
        self._make_fake_score(learning_rate, updates, self.path is not None and loads)
        self.accelerator = self.fake_score.accelerator

    def _check_kind(self) -> None:
        if self.path is None or self.path.kind == self.kind:
            return
        role = "an adapter (--lora_rank, --lora_roles)" if self.kind == "adapter" else "a whole network"
        raise ValueError(
            f"The nodes of the path of {self.path.where} are of kind {self.path.kind!r}, but the fake score is to be {role}. "
            "Train it as the path was recorded, or record another path."
        )

    def student(self, generator: nn.Module, backtracking: BacktrackingConfig) -> Learner:
        """Makes the learner of the generator: a whole network; or an adapter, on the scores' network if it starts from it.

        Args:
            generator (`nn.Module`): The initial generator's network.
            backtracking (`BacktrackingConfig`): The settings of stage 2.
        """
        config, updates, rate = self.config, backtracking.max_train_steps, backtracking.generator_learning_rate
        ema_decay = backtracking.ema_decay if backtracking.use_ema else None
        if not config.is_adapter("generator"):
            return self.learner_of_network("generator", generator, rate, updates, config, ema_decay)
        shared = self.shared
        if shared is None or generator is not self.family.network:
            shared = shared_base(generator, config)
        add_adapter(shared, "generator", config, config.seed + 1)
        return AdapterLearner("generator", shared, generator, rate, updates, config, ema_decay)

    @property
    def nodes(self) -> DegradationPath:
        """The path whose nodes are loaded; a `ValueError` if there is none."""
        if self.path is None:
            raise ValueError("There is no path, of which a node could be loaded.")
        return self.path

    @abstractmethod
    def _make_fake_score(self, learning_rate: float, updates: int, loads: bool) -> None: ...

    @abstractmethod
    def add_target(self) -> None:
        """Makes the target. It is the teacher until it is filled with a node."""

    @abstractmethod
    def fill_target(self, node: int) -> None:
        """Makes the target a node of the path; 0 is the teacher."""

    @abstractmethod
    def _target_weights(self) -> dict[str, Tensor]: ...

    @abstractmethod
    def _restore_target(self, weights: dict[str, Tensor]) -> None: ...

    @contextmanager
    def kept_target(self) -> Iterator[None]:
        """Keeps the target's weights on the CPU while another node is in its place, and puts them back."""
        target = self.target
        kept = {key: value.to("cpu", copy=True) for key, value in self._target_weights().items()}
        yield
        self.target = target
        self._restore_target(kept)

    def frozen(self, network: nn.Module) -> ScoreModel:
        """A frozen network in float32 that computes in the trained ones' precision, operation for operation: equal
        weights give equal outputs, so that what two scores differ by is never rounding."""
        network = tuned(network.to(self.accelerator.device).requires_grad_(False), self.config)
        return in_precision(self.family.score_model(network), self.accelerator)

    def place_target(self, device: torch.device | str) -> None:  # noqa: B027
        """Moves the target; an adapter is small and stays where it is."""

    def release(self) -> None:
        """Lets go of the target."""
        del self.target


class FullScores(Scores):
    """Both are whole networks."""

    kind = "full"

    def _make_fake_score(self, learning_rate: float, updates: int, loads: bool) -> None:
        network = self.family.score_model().copy().network
        if loads:
            self.nodes.load(len(self.nodes), into=network)
            self.nodes.prefetch(len(self.nodes) - 1)
        self.fake_score = self.learner_of_network("fake_score", network, learning_rate, updates, self.config)

    def add_target(self) -> None:
        self.target = self.frozen(self.family.score_model().copy().network)

    def fill_target(self, node: int) -> None:
        if node:
            self.nodes.load(node, self.target.network)
        else:
            fill(self.target.network, self.family.network.state_dict(), "the teacher")

    def _target_weights(self) -> dict[str, Tensor]:
        return self.target.network.state_dict()

    def _restore_target(self, weights: dict[str, Tensor]) -> None:
        self.target.network.load_state_dict(weights, strict=True)

    def place_target(self, device: torch.device | str) -> None:
        self.target.network.to(device)


class ShardedScores(FullScores):
    """Both are whole networks, of which each process holds a share."""

    learner_of_network = ShardedLearner
    is_collective = True

    def add_target(self) -> None:
        self.target = self._frozen_shares(self.family.score_model().copy().network)

    def frozen(self, network: nn.Module) -> ScoreModel:
        """The same, of a copy: what is sharded is so for good."""
        return self._frozen_shares(copy.deepcopy(network))

    def _frozen_shares(self, network: nn.Module) -> ScoreModel:
        network = tuned(network.requires_grad_(False), self.config)
        return in_precision(self.family.score_model(shard(network, self.accelerator.device)), self.accelerator)

    def _target_weights(self) -> dict[str, Tensor]:
        return {name: own_share(tensor) for name, tensor in self.target.network.state_dict().items()}

    def _restore_target(self, weights: dict[str, Tensor]) -> None:
        for name, share in self._target_weights().items():
            share.copy_(weights[name])


class AdapterScores(Scores):
    """Both are adapters on one frozen network, which without an adapter is the teacher."""

    kind = "adapter"
    shared: SharedNetwork

    def _make_fake_score(self, learning_rate: float, updates: int, loads: bool) -> None:
        self.shared = shared_base(self.family.network, self.config)
        if self.path is None:
            add_adapter(self.shared, "fake_score", self.config, self.config.seed)
        else:
            for role in ("fake_score", "target"):
                self.shared.add(role, self.nodes.adapter_config(len(self.nodes)))
            self.shared.freeze("target")
        if loads:
            self.nodes.load(len(self.nodes), self.shared.network, "fake_score")
            self.nodes.prefetch(len(self.nodes) - 1)
        self.fake_score = AdapterLearner(
            "fake_score", self.shared, self.family.network, learning_rate, updates, self.config
        )

    def add_target(self) -> None:
        self.target = self._teacher = self._in_role(None)
        self._node = self._in_role("target")

    def fill_target(self, node: int) -> None:
        self.target = self._node if node else self._teacher
        if node:
            self.nodes.load(node, self.shared.network, "target")

    def _target_weights(self) -> dict[str, Tensor]:
        return self.shared.weights("target")

    def _restore_target(self, weights: dict[str, Tensor]) -> None:
        self.shared.fill("target", weights, "the target")

    def frozen(self, network: nn.Module) -> ScoreModel:
        return self._in_role(None) if network is self.family.network else super().frozen(network)

    def _in_role(self, role: str | None) -> ScoreModel:
        """A role on the shared network, without gradients of its own; `None` is the network itself."""
        model = in_precision(self.family.score_model(self.shared.network), self.accelerator)
        return self.shared.in_role(model, role)

    def release(self) -> None:
        super().release()
        del self._teacher, self._node


def scores_of(config: TrainingConfig) -> type[Scores]:
    """The kind of scores that the settings ask for."""
    if is_sharded():
        return ShardedScores
    return AdapterScores if config.is_adapter("fake_score") else FullScores
