"""What is planned, against what is allocated."""

from functools import cache

import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel
from stages import record, trainer, training
from test_families import SIZES

from diffusers_disback.backtracking import BacktrackingConfig
from diffusers_disback.commands.cli import main
from diffusers_disback.families import family_of
from diffusers_disback.models.adapters import SharedNetwork, lora_config
from diffusers_disback.models.reference import ModelReference
from diffusers_disback.planning.allocations import Allocations, checkpointed, evaluation_memory, pass_memory, size
from diffusers_disback.planning.plan import Planner, Setup, adam_state, base_bytes, fits, table
from diffusers_disback.training.learner import AdapterLearner, Learner


def skeleton(name: str) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**{"sample_size": 64, **SIZES[name][0]})


@cache
def planner(name: str) -> Planner:
    return Planner(lambda: skeleton(name))


@cache
def small() -> Planner:
    """Of a UNet whose blocks are those of the originals, of a few channels."""
    channels = {"block_out_channels": (64, 128), "norm_num_groups": 32, "sample_size": 32}
    return Planner(lambda: ModelReferenceLike(tiny.unet(**channels)).skeleton())


def held(planned: Planner, setup: Setup, stage: int = 2, place: str = "device") -> int:
    return sum(row.bytes for row in planned.rows(stage, setup) if row.place == place)


def stated(learner: Learner) -> int:
    """Bytes of an optimiser's states, without the tables of 256 values that all 8-bit states share."""
    states = learner.optimizer.state.values()
    return sum(
        size(each) for state in states for key, each in state.items() if torch.is_tensor(each) and "qmap" not in key
    )


# Against real runs ----------------------------------------------------------------------------------------------------


SETTINGS = {
    "full": {},
    "adapters": {"lora_rank": 2},
    "adapters, some layers": {"lora_rank": 4, "lora_target_modules": ["to_q", "conv1"]},
    "a student in full": {"lora_rank": 2, "lora_roles": ["fake_score"]},
    "a fake score in full": {"lora_rank": 2, "lora_roles": ["generator"]},
    "8-bit Adam": {"use_8bit_adam": True},
}


QUICK = ("full", "adapters", "8-bit Adam")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SETTINGS]
)
def test_what_is_counted_is_what_a_run_allocates(name, tmp_path, teacher_folder, monkeypatch):
    """Weights of all roles, gradients, optimiser states, the average, a node and a checkpoint."""
    changes = SETTINGS[name]
    if "use_8bit_adam" in changes:
        pytest.importorskip("bitsandbytes")
    config = training(tmp_path, **changes)
    path = record(config, teacher_folder)
    stage = trainer(config, path, use_ema=True)
    gradients, update = {}, Learner._update

    def spy(learner, parameters):
        gradients[learner.name] = {
            other.name: sum(size(each.grad) for each in other.parameters() if each.grad is not None)
            for other in stage.learners
        }
        update(learner, parameters)

    monkeypatch.setattr(Learner, "_update", spy)
    stage.run()

    planned = Planner.of(ModelReference(str(teacher_folder)).resolve_configs())
    setup = Setup.of(config, BacktrackingConfig(use_ema=True))
    rows = {row.name: row.bytes for row in planned.rows(2, setup)}
    networks = {id(each): each for each in (learner.unwrapped() for learner in stage.learners)}
    networks[id(stage.target.network)] = stage.target.network
    weights = sum(size(each) for network in networks.values() for each in network.parameters())
    states = {learner.name: stated(learner) for learner in stage.learners}
    average = sum(map(size, stage.student.ema.shadow_params))
    assert held(planned, setup) == weights + sum(states.values()) + average
    assert rows["optimiser state, fake score"] == states["fake_score"]
    assert rows["optimiser state, student"] == states["generator"]
    assert rows["average of the student"] == average
    for learner in stage.learners:
        own = sum(map(size, learner.parameters()))
        idle = next(other.name for other in stage.learners if other is not learner)
        assert gradients[learner.name] == {learner.name: own, idle: 0}, (
            "the two roles' gradients are never there at once"
        )
        assert planned.updates(2, setup)[learner.name].gradients == own
    half = isinstance(stage.fake_score, AdapterLearner)
    (file,) = (path.node_folder(1) / "unet").glob("*.safetensors")
    assert 0 < file.stat().st_size - planned.node(setup, half) < 40_000  # the file's header
    newest = max((tmp_path / "checkpoints" / "backtracking").glob("checkpoint-*"))
    saved = sum(file.stat().st_size for file in newest.rglob("*") if file.suffix in (".safetensors", ".bin"))
    tensors = sum(len(learner.parameters()) for learner in stage.learners)
    assert 0 < saved - planned.checkpoint(2, setup) < 2_000 * tensors  # names beside them


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", ["stable_diffusion_xl", pytest.param("stable_diffusion", marks=pytest.mark.slow)])
def test_activations_are_what_a_pass_allocates(name, adapted, checkpoints):
    """On the meta device as on a CPU: the peak of a real forward and backward pass, followed operation by operation."""
    family = family_of(tiny.PIPELINES[name]())
    condition = family.encode(tiny.PROMPTS[:1] * 2)
    skeleton = ModelReferenceLike(family.network).skeleton()
    networks = [family.network.requires_grad_(True), skeleton]
    if adapted:
        shareds = [SharedNetwork(network) for network in networks]
        for shared, device in zip(shareds, ("cpu", "meta"), strict=True):
            with torch.device(device):
                shared.add("generator", lora_config(2))
            shared.activate("generator")
    real, planned = networks
    if checkpoints:
        real.enable_gradient_checkpointing()
        planned.enable_gradient_checkpointing(checkpointed(None))
    x_t, t = torch.randn(2, 4, 16, 16), torch.tensor([1, 2])
    with Allocations([*real.parameters(), x_t, t, *condition.values()]) as allocations:
        family.call(real, x_t, t, condition).square().mean().backward()
    memory = pass_memory(planned, 2, (4, 16, 16))
    assert memory.peak == pytest.approx(allocations.peak, rel=0.1)
    assert memory.gradients == sum(size(each.grad) for each in real.parameters() if each.grad is not None)
    assert 0 < evaluation_memory(planned, 2, (4, 16, 16)) < memory.peak


class ModelReferenceLike:
    """The skeleton of a network that is in memory."""

    def __init__(self, network):
        self.config = network.config

    def skeleton(self):
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(self.config)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("shape", [(4095,), (4096,), (4097,), (400, 256), (3,)])
def test_8_bit_states_are_those_of_bitsandbytes(shape, paged):
    """On a CPU, where nothing is paged."""
    optim = pytest.importorskip("bitsandbytes").optim
    parameter = torch.nn.Parameter(torch.randn(shape))
    optimizer = (optim.PagedAdamW8bit if paged else optim.AdamW8bit)([parameter])
    parameter.grad = torch.randn(shape)
    optimizer.step()
    state = {key: each for key, each in optimizer.state[parameter].items() if not key.startswith("qmap")}
    real = sum(size(each) for each in state.values() if torch.is_tensor(each))
    resident, moved = adam_state([parameter], eight_bit=True, paged=paged)
    assert resident + moved == real
    assert (moved > 0) == (paged and parameter.numel() >= 100_000)


def test_a_quantised_base_is_that_of_bitsandbytes():
    """A linear layer of 4 bits on a CPU: weights and scales, but for the table of 16 values."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    plain = torch.nn.Sequential(torch.nn.Linear(96, 50), torch.nn.Conv2d(4, 8, 3))
    weights, state = bitsandbytes.functional.quantize_4bit(plain[0].weight.data, quant_type="nf4")
    rest = sum(size(each) for each in (plain[0].bias, *plain[1].parameters())) // 2
    assert base_bytes(plain, torch.bfloat16, "nf4") == size(weights) + size(state.absmax) + rest
    assert base_bytes(plain, torch.bfloat16, "int8") == 96 * 50 + 4 * 50 + rest
    assert base_bytes(plain, torch.bfloat16) == sum(size(each) for each in plain.parameters()) // 2


# At size --------------------------------------------------------------------------------------------------------------


# Weights of three networks, moments and one role's gradients of two: GB, by hand from the number of parameters.
@pytest.mark.parametrize("name, total", [("SD 1.5", 27.50), ("SD 2.1", 27.71), ("SDXL", 82.16)])
def test_full_training_takes_what_is_known(name, total):
    number, setup = SIZES[name][1], Setup()
    steps = 2 * 4 * len(list(planner(name).network.parameters()))
    assert held(planner(name), setup) == (3 + 4) * 4 * number + steps
    assert (held(planner(name), setup) + 4 * number) / 1e9 == pytest.approx(total, abs=0.01)
    assert held(planner(name), setup, stage=1) == (2 + 2) * 4 * number + steps // 2
    assert planner(name).node(setup) == 4 * number
    assert planner(name).checkpoint(2, Setup(use_ema=True)) == 7 * 4 * number + steps


# Parameters of an adapter of rank 64 on the default layers; and bytes of a node in half precision.
@pytest.mark.parametrize("name, adapter", [("SD 1.5", 67_252_224), ("SD 2.1", 67_776_512), ("SDXL", 196_751_360)])
def test_adapters_take_what_is_known(name, adapter):
    number, setup = SIZES[name][1], Setup(lora_rank=64, mixed_precision="bf16")
    tensors = len(planner(name).trained("generator", setup))
    assert sum(each.numel() for each in planner(name).trained("generator", setup)) == adapter
    assert held(planner(name), setup) == 2 * number + 3 * 4 * adapter + 2 * (8 * adapter + 4 * tensors)
    assert planner(name).node(setup, half=True) == 2 * adapter
    if name == "SDXL":
        assert planner(name).node(setup, half=True) <= 0.4e9 < planner(name).node(setup)
    quantised = Setup(lora_rank=64, mixed_precision="bf16", base_quantization="nf4")
    assert held(planner(name), quantised) < held(planner(name), setup)


def test_settings_that_save_memory_do():
    planned, plain = small(), Setup(mixed_precision="bf16")
    total = planned.total(2, plain)
    for changes in (
        {"gradient_checkpointing": True},
        {"use_8bit_adam": True},
        {"use_paged_adam": True},
        {"offload_idle_role": True},
        {"resolution": 64},
    ):
        assert planned.total(2, Setup(**{"mixed_precision": "bf16", **changes})) < total, changes
    average = planned.total(2, Setup(mixed_precision="bf16", use_ema=True))
    assert average == total + planned.node(plain)
    assert planned.total(2, Setup(mixed_precision="bf16", use_ema=True, offload_ema=True)) == total
    assert planned.total(2, Setup(mixed_precision="bf16", train_batch_size=2)) > total


# The command ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stable_diffusion", pytest.param("stable_diffusion_xl", marks=pytest.mark.slow)])
def test_the_command_loads_nothing(name, tmp_path, capsys):
    tiny.PIPELINES[name]().save_pretrained(tmp_path)
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    line = [
        "plan",
        "--pretrained_model_name_or_path",
        str(tmp_path),
        "--lora_rank",
        "2",
        "--use_ema",
        "--resolution",
        "32",
    ]
    assert main(line) == 0
    out = capsys.readouterr().out
    assert "32 x 32 pixels" in out and "target, adapter of rank 2" in out and "peak on the device" in out
    assert "rank 2, + --base_quantization nf4" in out and "estimate" in out and "in half precision" in out
    assert main(["plan", "--lora_rank", "2"]) == 2
    assert "--pretrained_model_name_or_path" in capsys.readouterr().err
    assert main(["plan", "--pretrained_model_name_or_path", str(tmp_path / "nothing")]) == 2
    with pytest.raises(SystemExit):
        main(["path", "show", "x", "--lora_rank", "2"])


def test_tables_say_what_fits():
    planned, setup = small(), Setup(mixed_precision="bf16", use_paged_adam=True)
    assert "optimiser state, student, paged" in table(planned, setup)
    rows = fits(planned, setup).splitlines()
    assert len(rows) == 9 and all(row.count("fits") == 5 for row in rows[1:])
