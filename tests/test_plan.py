"""What is planned, against what is allocated."""

import dataclasses

import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel
from stages import record, trainer, training
from test_families import SIZES
from test_gradients import ThroughScores, batches_of

from diffusers_disback.commands.cli import main
from diffusers_disback.families import FAMILIES, StableDiffusion, StableDiffusionXL, family_of
from diffusers_disback.models.adapters import SharedNetwork, lora_config
from diffusers_disback.objectives import OBJECTIVES
from diffusers_disback.planning.allocations import Allocations, size
from diffusers_disback.planning.plan import Planner, table
from diffusers_disback.training.config import BacktrackingConfig, TrainingConfig
from diffusers_disback.training.learner import AdapterLearner, Learner


def planner(config: dict, use_ema: bool = False, **settings) -> Planner:
    """Of a UNet of a config."""

    def skeleton():
        with torch.device("meta"):
            return UNet2DConditionModel.from_config(config)

    family = StableDiffusionXL if config.get("addition_embed_type") == "text_time" else StableDiffusion
    return Planner(skeleton, family, TrainingConfig(**settings), BacktrackingConfig(use_ema=use_ema))


def original(name: str, **settings) -> Planner:
    return planner({"sample_size": 64, **SIZES[name][0]}, **settings)


def small(**settings) -> Planner:
    """Of a UNet whose blocks are those of the originals, of a few channels."""
    channels = {"block_out_channels": (64, 128), "norm_num_groups": 32, "sample_size": 32}
    return planner(tiny.unet(**channels).config, **settings)


BATCHES = "noise, conditions and samples of a step"


def held(planned: Planner, stage: int = 2, place: str = "device") -> int:
    """But for a step's batches."""
    return sum(row.bytes for row in planned.rows(stage) if row.place == place and row.name != BATCHES)


def stated(learner: Learner) -> int:
    """Bytes of an optimiser's states."""
    states = learner.optimizer.state.values()
    return size(*(each for state in states for each in state.values() if torch.is_tensor(each)))


# Against real runs ----------------------------------------------------------------------------------------------------


SETTINGS = {
    "full": {},
    "adapters": {"lora_rank": 2},
    "adapters, some layers": {"lora_rank": 4, "lora_target_modules": ["to_q", "conv1"]},
    "a student in full": {"lora_rank": 2, "lora_roles": ["fake_score"]},
    "a fake score in full": {"lora_rank": 2, "lora_roles": ["generator"]},
}


QUICK = ("full", "adapters")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SETTINGS]
)
def test_what_is_counted_is_what_a_run_allocates(name, tmp_path, teacher_folder, monkeypatch):
    """Weights of all roles, gradients, optimiser states, the average, a node and a checkpoint."""
    changes = SETTINGS[name]
    config = training(tmp_path, pretrained_model_name_or_path=str(teacher_folder), **changes)
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

    planned = Planner.of(config, BacktrackingConfig(use_ema=True))
    rows = {row.name: row.bytes for row in planned.rows(2)}
    networks = {id(each): each for each in (learner.unwrapped() for learner in stage.learners)}
    networks[id(stage.target.network)] = stage.target.network
    weights = sum(size(*network.parameters()) for network in networks.values())
    states = {learner.name: stated(learner) for learner in stage.learners}
    average = size(*stage.student.ema.shadow_params)
    assert held(planned) == weights + sum(states.values()) + average
    assert rows["optimiser state, fake score"] == states["fake_score"]
    assert rows["optimiser state, student"] == states["generator"]
    assert rows["average of the student"] == average
    for learner in stage.learners:
        own = size(*learner.parameters())
        idle = next(other.name for other in stage.learners if other is not learner)
        assert gradients[learner.name] == {learner.name: own, idle: 0}, (
            "the two roles' gradients are never there at once"
        )
        assert planned.updates[learner.name].gradients == own
    half = isinstance(stage.fake_score, AdapterLearner)
    (file,) = (path.node_folder(1) / "unet").glob("*.safetensors")
    assert 0 < file.stat().st_size - planned.own("fake_score") // (2 if half else 1) < 40_000  # the file's header
    newest = max((tmp_path / "checkpoints" / "backtracking").glob("checkpoint-*"))
    saved = sum(file.stat().st_size for file in newest.rglob("*") if file.suffix in (".safetensors", ".bin"))
    tensors = sum(len(learner.parameters()) for learner in stage.learners)
    assert 0 < saved - planned.checkpoint(2) < 2_000 * tensors  # names beside them


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", ["stable_diffusion_xl", pytest.param("stable_diffusion", marks=pytest.mark.slow)])
def test_activations_are_what_a_pass_allocates(name, adapted, checkpoints):
    """On the meta device as on a CPU: the peak of a real forward and backward pass, followed operation by operation."""
    family = family_of(tiny.PIPELINES[name]())
    condition = family.encode(tiny.PROMPTS[:1] * 2)
    real, rank = family.network.requires_grad_(True), 2 if adapted else None
    settings = {"train_batch_size": 2, "resolution": 128, "lora_rank": rank, "gradient_checkpointing": checkpoints}
    planned = planner(real.config, **settings)
    if adapted:
        shared = SharedNetwork(real)
        shared.add("generator", lora_config(2))
        shared.activate("generator")
    if checkpoints:
        real.enable_gradient_checkpointing()
    x_t, t = torch.randn(2, 4, 16, 16), torch.tensor([1, 2])
    with Allocations([*real.parameters(), x_t, t, *condition.values()]) as allocations:
        family.call(real, x_t, t, condition).square().mean().backward()
    memory = planned.updates["fake_score"]
    assert memory.peak == pytest.approx(allocations.peak, rel=0.1)
    assert memory.gradients == size(*(each.grad for each in real.parameters() if each.grad is not None))


@pytest.mark.parametrize("adapted", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "objective, guidance",
    [(ThroughScores, 1.0), (OBJECTIVES["dmd"], 1.0), (OBJECTIVES["sid"], 2.0), (OBJECTIVES["dmd"], 2.0)],
)
def test_graphs_of_scores_are_counted_where_an_objective_has_them(
    objective, guidance, adapted, tmp_path, teacher_folder, monkeypatch
):
    """The generator's update, with a guided target and perhaps a guided fake score, against what it allocates on a CPU."""
    monkeypatch.setitem(OBJECTIVES, "of_test", objective)
    rank = 4 if adapted else None
    settings = {"pretrained_model_name_or_path": str(teacher_folder), "objective": "of_test", "resolution": 64}
    config = training(tmp_path, lora_rank=rank, **settings)
    stage = trainer(config, None)
    stage.switch_target(0)
    ((batch,),) = batches_of(stage, [5])
    known = [batch.noise, *batch.condition.values(), *batch.negative.values()]
    for network in (*(learner.unwrapped() for learner in stage.learners), stage.target.network):
        known += network.parameters()
    with Allocations(known) as allocations, stage.fake_score.frozen(stage.family) as fake_score:
        x0 = stage.generator(batch.noise, batch.condition)
        fake_score.guidance_scale = guidance
        stage.objective.generator_loss(x0, batch, stage.target, fake_score).backward()
    planned = Planner.of(config, BacktrackingConfig(fake_score_guidance_scale=guidance))
    assert planned.updates["generator"].peak == pytest.approx(allocations.peak, rel=0.1)
    silent = Planner.of(dataclasses.replace(config, objective="dmd"), BacktrackingConfig())
    assert (planned.total(2) > silent.total(2)) == (objective.differentiates_scores or guidance != 1)
    assert planned.total(1) == silent.total(1), "stage 1 trains the fake score without guidance"


@pytest.mark.parametrize("labels, guidance, halves", [(None, 8.0, 1), (4, 8.0, 2), (4, 1.0, 1)])
def test_both_halves_of_guidance_are_counted_where_something_guides(labels, guidance, halves):
    def skeleton():
        with torch.device("meta"):
            return tiny.unet_2d(num_class_embeds=labels)

    own = BacktrackingConfig(guidance_scale=guidance, fake_score_guidance_scale=guidance)
    planned = Planner(skeleton, FAMILIES["pixels"], TrainingConfig(train_batch_size=4), own, stride=1)
    assert planned.updates["fake_score"] == planned._pass("fake_score", 4 * halves)
    with torch.no_grad():
        target = planned._pass("fake_score", 4 * halves, is_trained=False)
    assert planned.updates["generator"].peak == max(
        planned.first_update.activations + max(target.peak, target.activations + target.peak),
        planned.first_update.peak,
    )


def test_states_of_8_bits_and_quantised_bases_are_about_those_of_bitsandbytes():
    """On a CPU, of all tensors and linear layers of a UNet."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    planned = small(use_8bit_adam=True)
    network = UNet2DConditionModel.from_config(planned.network.config)
    optimizer = bitsandbytes.optim.AdamW8bit(network.parameters())
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [each for state in optimizer.state.values() for key, each in state.items() if "qmap" not in key]
    (row,) = (row for row in planned.rows(1) if row.name == "optimiser state, fake score")
    assert row.bytes == pytest.approx(size(*(each for each in states if torch.is_tensor(each))), rel=0.1)
    assert row.remark == "estimate"
    half = size(*network.parameters()) // 2
    for layer in (module for module in network.modules() if isinstance(module, torch.nn.Linear)):
        weights, state = bitsandbytes.functional.quantize_4bit(layer.weight.data, quant_type="nf4")
        half += size(weights, state.absmax) - size(layer.weight) // 2
    base = small(lora_rank=2, mixed_precision="bf16", base_quantization="nf4").rows(1)[0]
    assert base.bytes == pytest.approx(half, rel=0.01) and base.remark == "estimate"
    plain = small(lora_rank=2, mixed_precision="bf16").rows(1)[0]
    assert plain.bytes == size(*network.parameters()) // 2 and plain.remark == "exact"


# At size --------------------------------------------------------------------------------------------------------------


# Weights of three networks, moments and one role's gradients of two: GB, by hand from the number of parameters.
@pytest.mark.parametrize("name, total", [("SD 1.5", 27.50), ("SD 2.1", 27.71), ("SDXL", 82.16)])
def test_full_training_takes_what_is_known(name, total):
    number, planned = SIZES[name][1], original(name)
    steps = 2 * 4 * len(list(planned.network.parameters()))
    assert held(planned) == (3 + 4) * 4 * number + steps
    assert (held(planned) + 4 * number) / 1e9 == pytest.approx(total, abs=0.01)
    assert held(planned, stage=1) == (2 + 2) * 4 * number + steps // 2
    assert planned.own("fake_score") == 4 * number
    planned.backtracking.use_ema = True
    assert planned.checkpoint(2) == 7 * 4 * number + steps


# Parameters of an adapter of rank 64 on the default layers.
@pytest.mark.parametrize("name, adapter", [("SD 1.5", 67_252_224), ("SD 2.1", 67_776_512), ("SDXL", 196_751_360)])
def test_adapters_take_what_is_known(name, adapter):
    number, planned = SIZES[name][1], original(name, lora_rank=64, mixed_precision="bf16")
    tensors = len(planned.trained["generator"])
    assert held(planned) == 2 * number + 3 * 4 * adapter + 2 * (8 * adapter + 4 * tensors)
    assert planned.own("fake_score") == 4 * adapter
    if name == "SDXL":
        assert planned.own("fake_score") // 2 <= 0.4e9 < planned.own("fake_score")


@pytest.mark.slow
def test_settings_that_save_memory_do():
    plain = small(mixed_precision="bf16")
    total = plain.total(2)
    for changes in (
        {"gradient_checkpointing": True},
        {"use_8bit_adam": True},
        {"use_paged_adam": True},
        {"offload_idle_role": True},
        {"resolution": 64},
    ):
        assert small(mixed_precision="bf16", **changes).total(2) < total, changes
    assert small(mixed_precision="bf16", use_ema=True).total(2) == total + plain.own("generator")
    assert small(mixed_precision="bf16", use_ema=True, offload_ema=True).total(2) == total
    assert small(mixed_precision="bf16", train_batch_size=2).total(2) > total


def test_the_batches_of_a_step_are_counted():
    """They are on the device at once, those of all fake-score updates and accumulated gradients."""

    def batches(stage=2, **settings):
        planned = small(resolution=64, **settings)
        return next(row.bytes for row in planned.rows(stage) if row.name == BATCHES)

    noise, condition = 4 * 8 * 8 * 4, 77 * tiny.WIDTH * 4
    assert batches(stage=1, train_batch_size=2, gradient_accumulation_steps=3) == 6 * (noise + condition + noise)
    assert batches(train_batch_size=2, gradient_accumulation_steps=3) == 6 * (5 * (noise + condition) + noise)


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
    assert f", conditioning timestep {FAMILIES[name].conditioning_timestep}\n" in out
    assert "32 x 32 pixels" in out and "target, adapter of rank 2" in out and "peak on the device" in out
    assert "estimate" in out and "in half precision" in out
    assert main(["plan", "--lora_rank", "2"]) == 2
    assert "--pretrained_model_name_or_path" in capsys.readouterr().err
    assert main(["plan", "--pretrained_model_name_or_path", str(tmp_path / "nothing")]) == 2
    assert main(["path", "show", "x", "--lora_rank", "2"]) == 2
    capsys.readouterr()
    assert main([*line[:-1], "33"]) == 2
    assert "resolution=33 is not divisible by 2, the autoencoder's stride: take 32 or 34." in capsys.readouterr().err


def test_the_table_says_what_is_moved_out():
    assert "optimiser state, student, paged" in table(small(mixed_precision="bf16", use_paged_adam=True))
    lines = table(small(offload_idle_role=True)).splitlines()
    moved = [line.split("  ")[1] for line in lines if "offloaded in turn" in line]
    assert moved == ["optimiser state, fake score", "target", "optimiser state, student"]
