"""One frozen network for several roles: a LoRA for each role, of which one is active at a time."""

import copy
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..hub.files import parse_json
from ..training.settings.groups import TARGET_MODULES
from .batch import Condition
from .score_model import ScoreModel
from .weights import adapter_text, are_layers, fill_adapter, open_weights, save_weights


if TYPE_CHECKING:
    from diffusers import ModelMixin
    from peft import LoraConfig


LORA = "lora"
"""The folder of a student's LoRA, in that of its pipeline."""

Lora = tuple[dict[str, Tensor], "LoraConfig"]
"""An adapter off its network: its weights in peft's own names, and its config."""


class SharedNetwork:
    """A frozen network, and for each role an adapter on it. Without a role it is the network itself.

    A role is made active before each of its forward passes. Under gradient checkpointing a block's forward pass is run
    again within the backward pass, where other roles may be active by then: `checkpointed` brings its role back.

    Args:
        network (`ModelMixin`): A diffusers denoiser; it is frozen here.
    """

    def __init__(self, network: "ModelMixin"):
        self.network = network.requires_grad_(False).eval()
        self.active: str | None = None
        self._layers: list = []
        self._parameters: dict[str, list[nn.Parameter]] = {}
        self._frozen: set[str] = set()

    def add(self, role: str, config: "LoraConfig", seed: int = 0) -> None:
        """Adds a role's adapter, in float32. It changes nothing yet: one of its two factors is zero.

        Args:
            role (`str`): Its name.
            config (`LoraConfig`): Rank, alpha and the layers.
            seed (`int`): Of the other factor. The CPU's global random state is left as it is.

        Raises:
            ValueError: If the network has none of the layers.
        """
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # several adapters are what is meant
            torch.manual_seed(seed)
            _inject(self.network, config, role)
        self._layers = _adapted_layers(self.network)
        self._parameters[role] = [
            parameter for name, parameter in self.network.named_parameters() if f".{role}." in name
        ]
        for parameter in self._parameters[role]:
            parameter.data = parameter.data.float()
        for name, parameters in self._parameters.items():  # peft leaves them to the adapter that was added last
            for parameter in parameters:
                parameter.requires_grad_(name not in self._frozen)
        self.active = role
        self.activate(None)

    def activate(self, role: str | None) -> None:
        """Makes a role's adapter the active one; `None` switches all off.

        What peft's `set_adapter` and `enable_adapters` do, but for visiting every parameter of every adapter to take
        gradients away and give them back: that took 12 ms for 278 layers, several times a step, and drops the gradients of
        a graph that was recorded before. An adapter that is not active is in no graph, and gets none in any case.
        """
        if role == self.active:
            return
        for layer in self._layers:
            layer._disable_adapters = role is None
            if role is not None:
                layer._active_adapter = [role]
        self.active = role

    @contextmanager
    def active_in(self, role: str | None) -> Iterator[None]:
        """Makes a role's adapter the active one for a while."""
        before = self.active
        self.activate(role)
        try:
            yield
        finally:
            self.activate(before)

    def checkpointed(self, block: nn.Module, *arguments: Any) -> Any:
        """Runs a block of the network under gradient checkpointing, for `enable_gradient_checkpointing`.

        The block is recomputed under the role of its forward pass: an objective whose gradient passes through several
        roles has all their graphs in one backward pass.
        """
        role = self.active
        return checkpoint(
            block, *arguments, use_reentrant=False, context_fn=lambda: (nullcontext(), self.active_in(role))
        )

    def freeze(self, role: str) -> None:
        """Keeps gradients out of a role's adapter, for good."""
        self._frozen.add(role)
        for parameter in self._parameters[role]:
            parameter.requires_grad_(False)

    def in_role(self, model: ScoreModel, role: str | None) -> ScoreModel:
        """The same way to ask, after the role was made active."""
        call = model.call

        def call_in_role(network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
            self.activate(role)
            return call(network, x_t, t, condition)

        model.call = call_in_role
        return model

    def parameters(self, role: str) -> list[nn.Parameter]:
        """A role's own, in their order in the network."""
        return self._parameters[role]

    def config(self, role: str) -> "LoraConfig":
        """Rank, alpha and layers of a role's adapter."""
        return self.network.peft_config[role]

    def weights(self, role: str) -> dict[str, Tensor]:
        """A role's adapter in peft's own names, `x.lora_A.weight` and `x.lora_B.weight`; no copies."""
        from peft import get_peft_model_state_dict

        return get_peft_model_state_dict(self.network, adapter_name=role)

    def fill(self, role: str, weights: dict[str, Tensor], what: str) -> None:
        """Copies weights into a role's adapter.

        Raises:
            ValueError: If names or shapes differ in anything.
        """
        fill_adapter(self.network, weights, role, what)

    def release(self) -> nn.Module:
        """Takes all adapters off. Returns the network, as it was."""
        _remove_adapters(self.network)
        self._layers, self._parameters, self._frozen, self.active = [], {}, set(), None
        return self.network


def _inject(network: nn.Module, config: "LoraConfig", adapter: str) -> None:
    """Puts an adapter on a network, as diffusers' `add_adapter` does, which not every denoiser has."""
    from peft import inject_adapter_in_model

    inject_adapter_in_model(copy.deepcopy(config), network, adapter)


def _adapted_layers(network: nn.Module) -> list:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in network.modules() if isinstance(module, BaseTunerLayer)]


def _remove_adapters(network: nn.Module) -> None:
    from diffusers.utils import recurse_remove_peft_layers

    recurse_remove_peft_layers(network)
    if hasattr(network, "peft_config"):  # not where there was none
        del network.peft_config


def check_loads_adapters(network: nn.Module) -> None:
    """Raises a `ValueError` if diffusers loads no adapters into a network."""
    from diffusers.loaders import PeftAdapterMixin

    if not isinstance(network, PeftAdapterMixin):
        raise ValueError(f"diffusers loads no LoRA into a {type(network).__name__}: none is extracted.")


def lora_config(rank: int, alpha: float | None = None, target_modules: list[str] | None = None) -> "LoraConfig":
    """The adapter of a role.

    Args:
        rank (`int`): Of every layer.
        alpha (`float`, *optional*): By default the rank, so that an update is taken as it is.
        target_modules (`list[str]`, *optional*): Ends of layers' names; by default `TARGET_MODULES`.
    """
    from peft import LoraConfig

    return LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,  # type: ignore[arg-type]  # peft says int, and takes any number
        target_modules=target_modules or TARGET_MODULES,
        init_lora_weights=True,
    )


def base_of(
    network: "ModelMixin",
    device: torch.device,
    dtype: torch.dtype,
    quantization: str | None = None,
    scratch: str | Path | None = None,
) -> "ModelMixin":
    """The network in the precision of a base that several roles share: itself where nothing has to change, else a copy.

    Args:
        network (`ModelMixin`): A diffusers denoiser in float32. A copy leaves it as it is.
        device (`torch.device`): Of the base.
        dtype (`torch.dtype`): That the base computes in.
        quantization (`str`, *optional*): `nf4` or `int8`: keep the weights of linear layers in 4 or 8 bits.
        scratch (`str` or `Path`, *optional*): A folder on a disk that has room for the network, to quantise it.

    Raises:
        ValueError: If quantisation is asked for without a GPU.
    """
    if quantization is not None:
        return _quantized(network, device, dtype, quantization, scratch)
    parameter = next(network.parameters())
    if parameter.device.type == device.type and parameter.dtype == dtype:
        return network
    with torch.device("meta"):
        base = type(network).from_config(network.config)
    weights = {
        key: tensor.to(device, dtype if tensor.is_floating_point() else None, copy=True)
        for key, tensor in network.state_dict().items()
    }
    base.load_state_dict(weights, strict=True, assign=True)
    for key, buffer in network.named_buffers():
        if key not in weights:  # a table, such as positions of patches, that a state leaves out
            place, _, name = key.rpartition(".")
            base.get_submodule(place).register_buffer(name, buffer.to(device, copy=True), persistent=False)
    return base.train(network.training)


def _quantized(
    network: "ModelMixin", device: torch.device, dtype: torch.dtype, quantization: str, scratch: str | Path | None
) -> "ModelMixin":
    """By bitsandbytes, which quantises what it loads: so the network is written down once, and read again."""
    if device.type != "cuda":
        raise ValueError(
            f"--base_quantization {quantization} needs a GPU, but this run is on the {device.type}; leave it out."
        )
    from diffusers import BitsAndBytesConfig

    configs: dict[str, dict[str, Any]] = {
        "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype},
        "int8": {"load_in_8bit": True},
    }
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        network.save_pretrained(folder)
        return type(network).from_pretrained(
            folder,
            quantization_config=BitsAndBytesConfig(**configs[quantization]),
            torch_dtype=dtype,
            use_safetensors=True,
        )


def fused(network: "ModelMixin", weights: dict[str, Tensor], config: "LoraConfig") -> "ModelMixin":
    """A copy of a network with an adapter's update added to its weights, `[out, in]` each, in the network's precision.

    Args:
        network (`ModelMixin`): Without adapters; left as it is.
        weights (`dict[str, Tensor]`): Of the adapter, in peft's names.
        config (`LoraConfig`): Of the adapter.
    """
    network = copy.deepcopy(network)
    _inject(network, config, "fused")
    fill_adapter(network, weights, "fused", "the student's LoRA")
    for layer in _adapted_layers(network):
        layer.merge()
    _remove_adapters(network)
    return network.requires_grad_(False)


def config_of(file: Path) -> "LoraConfig":
    """Rank, alpha and layers of an adapter's file.

    Raises:
        ValueError: If it does not say, or holds more than a plain LoRA.
    """
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
    from peft import LoraConfig

    with open_weights(file) as stream:
        declared = (stream.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY)
        down = [stream.get_slice(key).get_shape() for key in stream.keys() if ".lora_A" in key]  # noqa: SIM118
    if declared is None:
        raise ValueError(f"{file} does not say its adapter's rank and layers.")
    declared = parse_json(declared, f"the metadata of {file}")
    more = [name for name in ("use_dora", "use_rslora", "lora_bias", "modules_to_save") if declared.get(name)]
    if more or declared.get("bias", "none") != "none":
        raise ValueError(
            f"{file} holds more than a plain LoRA ({', '.join(more) or 'biases'}), which is not supported."
        )
    _check_adapter_config(declared, max((shape[0] for shape in down if shape), default=0), file)
    return LoraConfig(**{name: declared[name] for name in _FIELDS if declared.get(name) is not None})


_FIELDS = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")


def _check_adapter_config(declared: dict[str, Any], largest: int, file: Path) -> None:
    """Raises a `ValueError` unless what an adapter's file says of itself is of the right kinds, of plain names (peft takes
    them for regular expressions), and of no larger rank than its weights are."""

    def is_number(value: Any) -> bool:
        return type(value) in (int, float) and 0 < value < 1e9

    def is_rank(value: Any) -> bool:
        return type(value) is int and 0 < value <= largest

    checks = {
        "r": is_rank,
        "lora_alpha": is_number,
        "target_modules": lambda value: isinstance(value, list) and bool(value) and are_layers(value),
        "rank_pattern": lambda value: (
            isinstance(value, dict) and are_layers(value) and all(map(is_rank, value.values()))
        ),
        "alpha_pattern": lambda v: isinstance(v, dict) and are_layers(v) and all(map(is_number, v.values())),
    }
    for name in ("r", "target_modules"):
        if declared.get(name) is None:
            raise ValueError(f"{file} does not say its adapter's {name}.")
    for name, is_right in checks.items():
        if declared.get(name) is not None and not is_right(declared[name]):
            shown = repr(declared[name])
            raise ValueError(
                f"{file} says {name} {shown[:100]} of its adapter, which cannot be. Its weights are of rank {largest}."
            )


def write_adapter(network: "ModelMixin", adapter: str, folder: Path) -> None:
    """Writes an adapter as `network.save_lora_adapter` does, which moves the network about and warns of it.

    Args:
        network (`ModelMixin`): With the adapter on it.
        adapter (`str`): Its name.
        folder (`Path`): Made if it is not there; `load_lora_adapter(folder, prefix=None, use_safetensors=True)` reads it.
    """
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(network, adapter_name=adapter)
    save_lora(weights, network.peft_config[adapter], folder, None)


def save_lora(weights: dict[str, Tensor], config: "LoraConfig", folder: str | Path, denoiser: str | None) -> Path:
    """Writes an adapter for `pipe.load_lora_weights(folder)`: peft's own names, with rank and alpha beside them.

    What diffusers' `save_lora_weights` writes, but for the metadata, which there are in an order that changes.

    Names of diffusers' older layout would lose every attention layer as soon as convolutions are adapted, too, and
    without the metadata alpha would be taken for the rank, both without an error.

    Args:
        weights (`dict[str, Tensor]`): In peft's names.
        config (`LoraConfig`): Of the adapter.
        folder (`str` or `Path`): Made if it is not there.
        denoiser (`str`, *optional*): The pipeline's component that is adapted; `None` for an adapter of a network alone.
    """
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE

    file, prefix = Path(folder, LORA_WEIGHT_NAME_SAFE), "" if denoiser is None else f"{denoiser}."
    file.parent.mkdir(parents=True, exist_ok=True)
    text = adapter_text({f"{prefix}{key}": value for key, value in config.to_dict().items()})
    layers = {f"{prefix}{key}": value.contiguous().cpu() for key, value in weights.items()}
    save_weights(layers, file, {"format": "pt", LORA_ADAPTER_METADATA_KEY: text})
    return file
