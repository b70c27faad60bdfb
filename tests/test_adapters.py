"""Roles as adapters on one shared network: each is what a network of its own would be, and only it moves."""

import copy
import json
import shutil

import diffusers
import pytest
import tiny
import torch
import train_disback
from diffusers import DiffusionPipeline, UNet2DConditionModel
from kohya_reader import merge
from safetensors.torch import load_file
from script import arguments
from stages import close, equal, interrupted_at, record, recorder, trainer, training, weights
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_disback import DegradationPath, DisBackOneStepPipeline
from diffusers_disback.commands.command_line import run as run_command
from diffusers_disback.families import FAMILIES, family_of
from diffusers_disback.models.adapters import SharedNetwork, base_of, fused, lora_config
from diffusers_disback.models.lora_layouts import KOHYA
from diffusers_disback.models.weights import fill_adapter
from diffusers_disback.training.networks import tuned


ROLES = ("generator", "fake_score", "target")


def adapted(folder, **changes):
    return training(folder, lora_rank=4, **changes)


@pytest.fixture(scope="module")
def path(tmp_path_factory, teacher_folder):
    """A path of three adapter nodes."""
    return record(adapted(tmp_path_factory.mktemp("recorded")), teacher_folder, steps=6, nodes=3)


def shared_network(seed: int = 0) -> SharedNetwork:
    """With adapters that do something."""
    shared = SharedNetwork(tiny.unet())
    for number, role in enumerate(ROLES):
        shared.add(role, lora_config(4), seed + number)
        generator = torch.Generator().manual_seed(seed + 10 + number)
        for parameter in shared.parameters(role):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return shared


def alone(shared: SharedNetwork, role: str) -> torch.nn.Module:
    """A separate copy of the base that carries one of the adapters."""
    network = tiny.unet().requires_grad_(False).eval()
    network.add_adapter(copy.deepcopy(shared.config(role)), adapter_name=role)
    fill_adapter(network, shared.weights(role), role, "the role")
    return network


def read(path, index):
    return {key: tensor.float() for key, tensor in path.read(index).items()}


def lora_weights(stage, role):
    return {key: value.detach().clone() for key, value in stage.scores.shared.weights(role).items()}


# Gradients -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_gradients_are_those_of_separate_networks(checkpointing):
    """The generator's graph is recorded first; then the other roles are asked; then comes its backward pass."""
    shared = shared_network()
    family = family_of(tiny.pipeline())
    condition = family.encode(tiny.PROMPTS[:2])
    separate = {role: family.score_model(alone(shared, role)) for role in ROLES}
    models = {role: shared.in_role(family.score_model(shared.network), role) for role in ROLES}
    if checkpointing:
        for network in (shared.network, *(model.network for model in separate.values())):
            network.enable_gradient_checkpointing()
    noise, t = torch.randn(2, 4, 8, 8), torch.tensor([399, 399])

    def losses(asked, activate):
        x0 = asked["generator"].denoise(noise, t, condition)
        with torch.no_grad():
            x_t = family.schedule.diffuse(x0, noise, t)
            direction = asked["fake_score"].denoise(x_t, t, condition) - asked["target"].denoise(x_t, t, condition)
        activate("generator")
        (x0 * direction).mean().backward()
        loss = asked["fake_score"].denoising_loss(x0.detach(), noise, t, condition)
        with torch.no_grad():
            asked["target"].denoise(x_t, t, condition)
        activate("fake_score")
        loss.backward()

    losses(models, shared.activate)
    losses(separate, lambda role: None)
    for role in ("generator", "fake_score"):
        theirs = {name: p for name, p in separate[role].network.named_parameters() if f".{role}." in name}
        ours = {name: p for name, p in shared.network.named_parameters() if f".{role}." in name}
        assert ours.keys() == theirs.keys() and len(ours) > 50
        for name, parameter in ours.items():
            expected = theirs[name].grad
            assert parameter.grad is not None and expected is not None, name
            assert (parameter.grad - expected).abs().max() <= 1e-6 * expected.abs().max(), name
    assert all(parameter.grad is None for parameter in shared.parameters("target"))
    assert all(p.grad is None for name, p in shared.network.named_parameters() if ".lora_" not in name)


def test_without_a_role_the_network_is_the_teacher():
    shared, plain = shared_network(), tiny.unet().eval()
    condition = family_of(tiny.pipeline()).encode(tiny.PROMPTS[:1])
    x_t, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    outputs = {}
    for role in (None, "generator", None, "target", "generator", None):
        shared.activate(role)
        with torch.no_grad():
            output = shared.network(x_t, t, **condition).sample
        assert torch.equal(outputs.setdefault(role, output), output)
    assert torch.equal(outputs[None], plain(x_t, t, **condition).sample)
    assert not torch.equal(outputs["generator"], outputs["target"])
    assert equal(weights(shared.release()), weights(plain))


def test_a_fresh_adapter_changes_nothing_and_leaves_global_randomness_alone():
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    one, two, other = (SharedNetwork(tiny.unet()) for _ in range(3))
    torch.manual_seed(5)
    one.add("generator", lora_config(4), seed=1)
    assert torch.equal(torch.randn(3), expected)
    two.add("generator", lora_config(4), seed=1)
    other.add("generator", lora_config(4), seed=2)
    assert equal(one.weights("generator"), two.weights("generator"))
    assert not equal(one.weights("generator"), other.weights("generator"))
    assert all(not tensor.any() for key, tensor in one.weights("generator").items() if "lora_B" in key)


def test_a_base_in_another_precision_is_a_copy():
    network = tiny.unet()
    assert base_of(network, torch.device("cpu"), torch.float32) is network
    base = base_of(network, torch.device("cpu"), torch.bfloat16)
    assert base.dtype == torch.bfloat16 and network.dtype == torch.float32 and base.config == network.config
    assert all(torch.equal(base.state_dict()[key], value.bfloat16()) for key, value in weights(network).items())


def test_quantisation_without_a_gpu_is_one_clear_error(run, tmp_path):
    with pytest.raises(ValueError, match="--base_quantization nf4 needs a GPU, but this run is on the cpu"):
        run(lora_rank=4, base_quantization="nf4")
    with pytest.raises(ValueError, match="--base_quantization int8 is for adapters on one shared network"):
        run("b", base_quantization="int8")


# Both stages ---------------------------------------------------------------------------------------------------------


def test_recording_moves_the_fake_scores_adapter_alone(tmp_path, teacher_folder):
    stage = recorder(adapted(tmp_path), teacher_folder)
    before = weights(stage.family.network)
    stage.run()
    after = weights(stage.family.network)
    moved = {key for key in after if not torch.equal(after[key], before[key])}
    assert moved == {key for key in after if ".lora_" in key}
    stage.record()
    assert equal(weights(stage.family.network), weights(tiny.pipeline().unet)), "the teacher is as it was"
    assert [node["kind"] for node in stage.path.nodes] == ["adapter"] * 2


def test_backtracking_walks_the_path(tmp_path, path):
    """The fake score starts as node N, each target is its node, the last is the teacher; two adapters move."""
    stage = trainer(adapted(tmp_path), path, max_train_steps=5, steps_per_target=1)
    assert equal(lora_weights(stage, "fake_score"), read(path, 3))
    before = {role: lora_weights(stage, role) for role in ("generator", "fake_score")}
    base = {key: value for key, value in weights(stage.scores.shared.network).items() if ".lora_" not in key}
    visited, step_of = [], stage.train_step
    x_t, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    condition = stage.family.encode(tiny.PROMPTS[:1])
    plain = tiny.pipeline().unet(x_t, t, **condition).sample

    def watched(step, batches):
        losses = step_of(step, batches)
        visited.append(stage.target_node)
        if stage.target_node:
            assert equal(lora_weights(stage, "target"), read(path, stage.target_node))
        with torch.no_grad():
            drawn = stage.target.predict(x_t, t, condition)
        assert torch.equal(drawn, plain) == (stage.target_node == 0)
        return losses

    stage.train_step = watched
    stage.run()
    assert visited == [2, 1, 0, 0, 0]
    for role, was in before.items():
        assert all(not torch.equal(was[key], value) for key, value in lora_weights(stage, role).items()), role
    now = weights(stage.scores.shared.network)
    assert all(torch.equal(now[key], value) for key, value in base.items())


def test_adapters_are_resumed_bit_for_bit(tmp_path, teacher_folder):
    results = []
    for name in ("unbroken", "broken"):
        config = adapted(tmp_path / name, checkpointing_steps=3)
        if name == "broken":
            stage = recorder(config, teacher_folder, steps=8)
            stage.train_step = interrupted_at(5, stage.train_step)
            with pytest.raises(KeyboardInterrupt):
                stage.record()
            config = adapted(tmp_path / name, checkpointing_steps=3, resume_from_checkpoint="latest")
        recorded = record(config, teacher_folder, steps=8)
        arguments = {"use_ema": True, "ema_decay": 0.5, "max_train_steps": 8, "steps_per_target": 2}
        if name == "broken":
            stage = trainer(adapted(tmp_path / name, checkpointing_steps=3), recorded, **arguments)
            stage.train_step = interrupted_at(5, stage.train_step)
            with pytest.raises(KeyboardInterrupt):
                stage.train()
        stage = trainer(config, recorded, **arguments)
        student = weights(stage.train())
        results.append((recorded.read(2), student, stage.student.lora[0]))
    assert all(equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize("roles, start", [(["fake_score"], None), (["generator"], "other")], ids=["fake", "generator"])
def test_one_role_may_be_a_whole_network(run, tmp_path, roles, start):
    """Student full and fake score an adapter, or the reverse; from the teacher, or from another network."""
    tiny.pipeline(seed=5).save_pretrained(tmp_path / "other")
    flags = {"lora_rank": 4, "lora_roles": roles}
    folder = run(**flags, generator_model_name_or_path=start and tmp_path / "other")
    kind = "adapter" if roles == ["fake_score"] else "full"
    path = DegradationPath.from_pretrained(folder / "path")
    assert [node["kind"] for node in path.nodes] == [kind] * 2
    assert (folder / "lora").exists() == (roles == ["generator"])
    began = tiny.unet(seed=5 if start else 0)
    student = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    moved = [key for key, value in weights(student).items() if not torch.equal(value, weights(began)[key])]
    assert (len(moved) == len(weights(began))) == (roles == ["fake_score"]) and moved
    with pytest.raises(ValueError, match=f"are of kind {kind!r}, but the fake score is to be"):
        other = {
            "lora_rank": None if kind == "adapter" else 4,
            "generator_model_name_or_path": start and tmp_path / "other",
        }
        run("b", **other, degradation_path=folder / "path", stage="backtrack")


def test_accumulated_gradients_are_those_of_the_larger_batch(tmp_path, path):
    results = []
    for size, slices in ((4, 1), (1, 4)):
        config = adapted(tmp_path / str(size), train_batch_size=size, gradient_accumulation_steps=slices)
        stage = trainer(config, path)
        stage.run()
        results.append({**lora_weights(stage, "generator"), **lora_weights(stage, "fake_score")})
    assert close(*results, atol=1e-4)


@pytest.mark.slow
def test_measuring_changes_nothing(tmp_path, path):
    expected = weights(trainer(adapted(tmp_path / "plain"), path, max_train_steps=5).train())
    config = adapted(tmp_path / "measured", validation_steps=1)
    measured = trainer(config, path, lambda _: {}, max_train_steps=5)
    assert equal(weights(measured.train()), expected)
    assert [row["node"] for row in measured.curve] == [2, 1, 0, 0, 0]
    assert all((row["target_to_teacher"] == 0) == (row["node"] == 0) for row in measured.curve)


def test_another_node_takes_the_targets_place_for_a_while(tmp_path, path):
    stage = trainer(adapted(tmp_path), path)
    stage.switch_target(0)
    own, target = lora_weights(stage, "target"), stage.target
    with stage.other_target(1):
        assert equal(lora_weights(stage, "target"), read(path, 1)) and stage.target is target
    assert equal(lora_weights(stage, "target"), own)
    with stage.other_target(0):
        assert stage.target is not target, "the network itself, the teacher"
    assert equal(lora_weights(stage, "target"), own) and stage.target is target


def test_a_path_of_another_rank_is_gone_along(tmp_path, path):
    stage = trainer(training(tmp_path, lora_rank=2, lora_alpha=1.0), path)
    assert stage.scores.shared.config("generator").r == 2 and stage.scores.shared.config("generator").lora_alpha == 1
    assert stage.scores.shared.config("fake_score").r == stage.scores.shared.config("target").r == 4
    stage.run()


def test_nodes_are_written_in_half_precision(path, tmp_path, teacher_folder):
    node = path.nodes[0]
    assert node["dtype"] == "float16" and 0 < node["rounding_error"] < 1e-3
    full = record(adapted(tmp_path, node_precision="fp32"), teacher_folder, steps=6, nodes=3)
    assert full.nodes[0]["dtype"] == "float32" and full.nodes[0]["rounding_error"] == 0
    assert close({k: v.float() for k, v in path.read(1).items()}, full.read(1), atol=1e-3)
    assert full.nodes[0]["bytes"] > 1.5 * node["bytes"]
    half = record(training(tmp_path / "whole", node_precision="fp16"), teacher_folder)
    network = tiny.unet(seed=9)
    half.load(1, into=network)
    assert network.dtype == torch.float32 and half.nodes[0]["rounding_error"] > 0
    assert half.read(1)["conv_in.weight"].dtype == torch.float16


# What a step does ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora_rank", [None, 4], ids=["full", "adapters"])
@pytest.mark.parametrize("fake_score_updates", [1, 3])
def test_a_step_asks_no_network_twice(tmp_path, teacher_folder, lora_rank, fake_score_updates):
    """One generator pass and its backward, one target pass with both halves of the guidance, one fake-score pass without
    gradient, a training pass per fake-score update (all but the first draw fresh samples); no text encoder."""
    config = training(tmp_path, lora_rank=lora_rank)
    recorded = record(config, teacher_folder, steps=3, nodes=3)
    arguments = {"max_train_steps": 3, "guidance_schedule": "constant", "fake_score_updates": fake_score_updates}
    stage = trainer(config, recorded, **arguments)
    seen = []

    def counted(name, model):
        predict = model.predict

        def spy(x_t, t, condition):
            seen.append((name, torch.is_grad_enabled(), len(x_t)))
            return predict(x_t, t, condition)

        model.predict = spy
        return model

    stage.generator.model = counted("generator", stage.generator.model)
    fake_score_of = stage.fake_score.score_model
    stage.fake_score.score_model = lambda family: counted("fake_score", fake_score_of(family))
    switch, known = stage.switch_target, set()

    def switched(step):
        switch(step)
        if stage.target not in known:
            known.add(counted("target", stage.target))

    stage.switch_target = switched
    texts = []
    stage.family.pipeline.text_encoder.register_forward_hook(lambda *_: texts.append(1))
    backward = []
    for learner in stage.learners:
        passes = learner.accelerator.backward
        learner.accelerator.backward = lambda loss, passes=passes, name=learner.name: (
            backward.append(name),
            passes(loss),
        )
    stage.run()
    k = fake_score_updates
    first = [("generator", True, 2), ("target", False, 4), ("fake_score", False, 2), ("fake_score", True, 2)]
    assert seen == [*first, *[("generator", False, 2), ("fake_score", True, 2)] * (k - 1)] * 3
    assert backward == ["generator", *["fake_score"] * k] * 3 and not texts
    trained = {id(p) for learner in stage.learners for p in learner.parameters()}
    networks = (stage.student.unwrapped(), stage.fake_score.unwrapped(), stage.target.network, stage.family.network)
    assert all(p.grad is None for network in networks for p in network.parameters() if id(p) not in trained)


@pytest.mark.parametrize("lora_rank", [None, 4], ids=["full", "adapters"])
def test_stage_1_asks_each_network_once(tmp_path, teacher_folder, lora_rank):
    stage = recorder(training(tmp_path, lora_rank=lora_rank), teacher_folder, steps=1, nodes=1)
    stage.measure = lambda done: stage.loss_history.append({"step": done, "losses": [1.0]})  # of nodes, not of a step
    seen = []
    generator, fake_score_of = stage.generator.model, stage.fake_score.score_model
    for name, model in (("generator", generator),):
        predict = model.predict
        model.predict = lambda *a, predict=predict, name=name: (
            seen.append((name, torch.is_grad_enabled())),
            predict(*a),
        )[1]

    def counted(family):
        model = fake_score_of(family)
        predict = model.predict
        model.predict = lambda *a: (seen.append(("fake_score", torch.is_grad_enabled())), predict(*a))[1]
        return model

    stage.fake_score.score_model = counted
    stage.measure = lambda done: stage.loss_history.append(
        {"step": done, "losses": [1.0]}
    )  # which is not asked in every step
    stage.run()
    assert seen == [("generator", False), ("fake_score", True)]


class Synchronisations(TorchDispatchMode):
    """Counts values that are taken from tensors, for which a GPU would have to be waited for."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.number += function is torch.ops.aten._local_scalar_dense.default
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize("lora_rank", [None, 4], ids=["full", "adapters"])
def test_a_step_does_not_wait_for_the_device(tmp_path, path, lora_rank):
    """But where a node is loaded, and where the optimiser reads its own step count, which lies in CPU memory."""
    stage = trainer(training(tmp_path, lora_rank=lora_rank, logging_steps=100), None if lora_rank is None else path)
    number = []

    def counted(step_of):
        def wrapped(*arguments):
            with Synchronisations() as mode:
                result = step_of(*arguments)
            number.append(mode.number)
            return result

        return wrapped

    for learner in stage.learners:
        own = learner.optimizer.step
        learner.optimizer.step = lambda own=own: outside(own)

    def outside(step):
        with torch.utils._python_dispatch._disable_current_modes():
            step()

    stage.train_step = counted(stage.train_step)
    stage._watch = counted(stage._watch)
    stage.run()
    assert len(number) == 8 and number[4:] == [0] * 4, "in steps without a switch"


def test_an_update_with_a_gradient_that_is_not_finite_is_not_made(tmp_path, path):
    stage = trainer(adapted(tmp_path, logging_steps=100), path, fake_score_updates=1)
    step = stage.fake_score.backward_and_step

    def poisoned(loss):
        step(loss + (loss * float("nan") if stage.fake_score.optimizer.state_dict()["state"] else 0))

    stage.fake_score.backward_and_step = poisoned
    with pytest.raises(FloatingPointError, match="fake_score_gradient_norm was not finite at step 1"):
        stage.run()
    assert all(parameter.isfinite().all() for parameter in stage.fake_score.parameters())
    assert all(parameter.isfinite().all() for parameter in stage.student.parameters())


@pytest.mark.parametrize("lora_rank", [None, 4], ids=["full", "adapters"])
def test_one_bad_gradient_among_several_updates_stops_the_run(tmp_path, path, lora_rank):
    """It is not hidden by the good ones that follow in the same step, and nothing moves after it."""
    config = training(tmp_path, lora_rank=lora_rank, checkpointing_steps=1, logging_steps=100)
    stage = trainer(config, path if lora_rank else None, fake_score_updates=3)
    step, number, kept = stage.fake_score.backward_and_step, [], []

    def poisoned(loss):
        number.append(1)
        if len(number) == 5:  # the second update of step 1
            kept.extend(parameter.detach().clone() for parameter in stage.fake_score.parameters())
        step(loss * float("nan") if len(number) == 5 else loss)

    stage.fake_score.backward_and_step = poisoned
    with pytest.raises(FloatingPointError, match="fake_score_gradient_norm was not finite at step 1"):
        stage.run()
    assert len(number) == 6 and all(map(torch.equal, kept, stage.fake_score.parameters()))
    saved = sorted(f.name for f in (tmp_path / "checkpoints" / "backtracking").glob("checkpoint-*"))
    assert saved == ["checkpoint-000001"]


def test_an_overflow_under_loss_scaling_is_skipped_and_seen(tmp_path):
    """As on a GPU in fp16: accelerate has to see that the scaler skipped, which a fused optimiser hides from it."""
    from diffusers_disback.training.optim import optimizer_of

    config = training(tmp_path)
    network = torch.nn.Linear(2, 1)
    assert optimizer_of("generator", list(network.parameters()), 1e-3, config, False).defaults["fused"]
    optimizer = optimizer_of("generator", list(network.parameters()), 1e-3, config, True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    called = []
    optimizer.register_step_post_hook(lambda *_: called.append(1))
    before = network.weight.detach().clone()
    for factor in (1e38, 1.0):
        scaler.scale(network(torch.ones(1, 2)).sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(network.weight, before) == (factor > 1)
    assert len(called) == 1, "the overflow did not come to the optimiser"


@pytest.mark.parametrize("lora_rank", [None, 4], ids=["full", "adapters"])
def test_stage_1_leaves_nothing_behind(tmp_path, teacher_folder, lora_rank):
    import gc
    import weakref

    stage = recorder(training(tmp_path, lora_rank=lora_rank, mixed_precision="bf16"), teacher_folder)
    held = [weakref.ref(parameter) for parameter in stage.fake_score.parameters()]
    gc.disable()
    try:
        stage.record()
        assert not [reference for reference in held if reference() is not None]
    finally:
        gc.enable()


# Memory and speed ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [None, 4], ids=["full", "adapters"])
def test_where_things_lie_changes_nothing(tmp_path, path, lora_rank):
    """Offloading changes no bit, channels last and checkpointing no more than rounding does."""
    students = []
    for flags in (
        {},
        {"offload_idle_role": True, "offload_ema": True},
        {"channels_last": True, "gradient_checkpointing": True},
    ):
        config = training(tmp_path / str(len(students)), lora_rank=lora_rank, **flags)
        stage = trainer(config, path if lora_rank else None, use_ema=True, ema_decay=0.5)
        students.append(weights(stage.train()))
    plain, moved, laid_out = students
    assert equal(moved, plain)
    difference = torch.cat([(laid_out[key] - value).abs().flatten() for key, value in plain.items()])
    change = torch.cat([(value - tiny.unet().state_dict()[key]).abs().flatten() for key, value in plain.items()])
    assert difference.mean() < 1e-2 * change.mean()


def optimizer_kind(name):
    import bitsandbytes

    return getattr(bitsandbytes.optim, name)


@pytest.mark.parametrize(
    "flags, kind",
    [
        ({"use_8bit_adam": True}, "AdamW8bit"),
        ({"use_paged_adam": True}, "PagedAdamW32bit"),
        ({"use_8bit_adam": True, "use_paged_adam": True}, "PagedAdamW8bit"),
    ],
    ids=["8bit", "paged", "both"],
)
def test_optimisers_of_bitsandbytes(tmp_path, path, flags, kind):
    """They train, and are resumed bit for bit."""
    stage = trainer(adapted(tmp_path, **flags), path, max_train_steps=4)
    assert type(stage.student.optimizer.optimizer) is optimizer_kind(kind)
    before = lora_weights(stage, "generator")
    stage.run()
    after = lora_weights(stage, "generator")
    assert all(not torch.equal(after[key], value) for key, value in before.items())
    shutil.rmtree(tmp_path / "checkpoints" / "backtracking" / "checkpoint-000004")
    resumed = trainer(adapted(tmp_path, resume_from_checkpoint="latest", **flags), path, max_train_steps=4)
    resumed.run()
    assert equal(lora_weights(resumed, "generator"), after)


def test_xformers_that_cannot_be_used_is_told(run):
    with pytest.raises(ValueError, match="--enable_xformers_memory_efficient_attention needs xformers and a GPU"):
        run(enable_xformers_memory_efficient_attention=True)


@pytest.mark.parametrize("name", ["sana", "stable_diffusion_3", "pixart", "dit"])
def test_xformers_are_of_unets(name, tmp_path, monkeypatch):
    """On SANA they would replace its linear attention by another."""
    network = tiny.PIPELINES[name]().transformer
    asked = []
    monkeypatch.setattr(type(network), "enable_xformers_memory_efficient_attention", lambda _: asked.append(1))
    with pytest.raises(ValueError, match=f"is of UNets, and the denoiser is a {type(network).__name__}"):
        tuned(network, training(tmp_path, enable_xformers_memory_efficient_attention=True))
    assert not asked


def test_blocks_without_a_name_in_diffusers_are_compiled_as_well(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(type(module).__name__))
    for name in ("sana", "stable_diffusion_3", "pixart", "dit"):
        network = tiny.PIPELINES[name]().transformer
        tuned(network, training(tmp_path, compile=True))
        assert compiled == [type(block).__name__ for block in network.transformer_blocks] and compiled
        compiled.clear()
    with pytest.raises(ValueError, match="--compile: a UNet2DModel has no repeated blocks to compile"):
        tuned(tiny.unet_2d(), training(tmp_path, compile=True))


def test_attention_of_the_dispatcher(tmp_path):
    """It serves Flux's layers; those of UNets, and what is not installed, are told."""
    from diffusers import FluxTransformer2DModel

    flux = FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    native = training(tmp_path, attention_backend="native")
    tuned(flux, native)
    assert {one.processor._attention_backend for one in flux.modules() if hasattr(one, "processor")} == {"native"}
    for network, backend, message in (
        (flux, "sage", "--attention_backend sage cannot be used: Sage Attention backend 'sage' is not usable"),
        (flux, "nothing", "--attention_backend nothing cannot be used: .* must be one of the following"),
        (tiny.unet(), "native", "no layer of a UNet2DConditionModel asks diffusers' dispatcher for its attention"),
    ):
        with pytest.raises(ValueError, match=message):
            tuned(network, training(tmp_path, attention_backend=backend))


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].network_name == "transformer"])
def test_attention_that_would_change_nothing_is_refused_in_a_line(name, tmp_path, prompts_file, capsys):
    """Before anything is drawn. Diffusers itself takes it for these transformers without a word."""
    pipe = tiny.PIPELINES[name]()
    assert not any(
        hasattr(one.processor, "_attention_backend") for one in pipe.transformer.modules() if hasattr(one, "processor")
    )
    pipe.save_pretrained(tmp_path / "teacher")
    prompts = {} if FAMILIES[name].takes_prompts else {"prompts_file": None}
    line = arguments(tmp_path / "run", tmp_path / "teacher", prompts_file, attention_backend="native", **prompts)
    assert run_command(train_disback.main, line, "train_disback.py") == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith(
        f"train_disback.py: --attention_backend native: no layer of a {type(pipe.transformer).__name__} asks"
    )
    assert f"in diffusers {diffusers.__version__}. Leave it out" in told
    assert not (tmp_path / "run" / "evaluation").exists()


def test_settings_that_do_not_fit_together(run):
    for flags, message in [
        ({"lora_rank": 0}, "--lora_rank has to be in"),
        ({"lora_alpha": 2.0}, "--lora_alpha and --lora_roles are of adapters: pass --lora_rank"),
        ({"lora_roles": ["generator"]}, "--lora_alpha and --lora_roles are of adapters: pass --lora_rank"),
        ({"lora_rank": 4, "lora_alpha": 0.0}, "--lora_alpha has to be above 0"),
        ({"lora_rank": 4, "lora_roles": ["teacher"]}, "--lora_roles 'teacher' is none of generator, fake_score"),
        ({"lora_rank": 4, "lora_target_modules": ["nothing"]}, "Target modules .*nothing.* not found"),
        ({"use_paged_adam": True, "offload_idle_role": True}, "leave --offload_idle_role out"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(**flags)


@pytest.mark.slow
def test_compiled_blocks_compute_the_same(run):
    flags = {"lora_rank": 4}
    expected = weights(UNet2DConditionModel.from_pretrained(run("a", **flags), subfolder="unet"))
    compiled = run("b", **flags, compile=True)
    assert close(weights(UNet2DConditionModel.from_pretrained(compiled, subfolder="unet")), expected, atol=1e-3)


def test_nodes_that_are_more_than_a_plain_lora_are_refused(tmp_path, path):
    from safetensors.torch import save_file

    from diffusers_disback.models.adapters import config_of

    file = tmp_path / "node.safetensors"
    for said, message in [
        ({"r": 4, "lora_alpha": 4, "target_modules": ["to_q"], "use_dora": True}, "more than a plain LoRA .use_dora"),
        ({"r": 4, "lora_alpha": 4, "target_modules": ["to_q"], "bias": "all"}, "more than a plain LoRA .biases"),
        (None, "does not say its adapter's rank"),
    ]:
        metadata = {"format": "pt"} if said is None else {"format": "pt", "lora_adapter_metadata": json.dumps(said)}
        save_file({"x": torch.zeros(1)}, file, metadata)
        with pytest.raises(ValueError, match=message):
            config_of(file)
    assert path.adapter_config(1).r == 4


# The result ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, alpha", [("stable_diffusion", None), pytest.param("stable_diffusion_xl", 2.0, marks=pytest.mark.slow)]
)
def test_the_lora_loads_in_the_stock_pipeline(run, tmp_path, name, alpha):
    """Convolutions and attention alike, tensor by tensor; the images are those of the fused student."""
    teacher = tmp_path / "teacher"
    tiny.PIPELINES[name]().save_pretrained(teacher)
    folder = run(pretrained_model_name_or_path=teacher, lora_rank=4, lora_alpha=alpha)
    stored = load_file(folder / "lora" / "pytorch_lora_weights.safetensors")
    assert any("attn1.to_q" in key for key in stored) and any("conv1" in key for key in stored)
    stock = DiffusionPipeline.from_pretrained(teacher)
    stock.load_lora_weights(folder / "lora")
    stock.scheduler = type(DiffusionPipeline.from_pretrained(folder).scheduler).from_pretrained(
        folder / "lora", subfolder="scheduler"
    )
    from peft import get_peft_model_state_dict

    (adapter,) = stock.get_list_adapters()["unet"]
    loaded = get_peft_model_state_dict(stock.unet, adapter_name=adapter)
    assert equal(loaded, {key.removeprefix("unet."): value for key, value in stored.items()})
    assert stock.unet.peft_config[adapter].lora_alpha == (alpha or 4)
    arguments = {"latents": torch.randn(1, 4, 8, 8), "output_type": "pt"}
    drawn = stock(tiny.PROMPTS[0], num_inference_steps=1, guidance_scale=0, **arguments).images
    own = DisBackOneStepPipeline.from_pretrained(folder)(tiny.PROMPTS[0], **arguments).images
    assert (drawn - own).abs().max() < 1e-5
    network = fused(tiny.PIPELINES[name]().unet, loaded, stock.unet.peft_config[adapter])
    published = weights(UNet2DConditionModel.from_pretrained(folder, subfolder="unet"))
    assert close(weights(network), published, atol=1e-7)
    if name == "stable_diffusion":  # in the names of SDXL's files: tests/test_kohya.py
        other = merge(weights(tiny.PIPELINES[name]().unet), load_file(folder / "lora" / KOHYA))
        assert close(other, published, atol=1e-6)


def test_the_lora_draws_what_was_trained(tmp_path, path, teacher_folder):
    """Before it is fused: to rounding, the image of the network that was trained."""
    from diffusers_disback.families import to_pipeline
    from diffusers_disback.models.adapters import save_lora
    from diffusers_disback.models.generator import one_step_scheduler

    stage = trainer(adapted(tmp_path), path)
    stage.run()
    arguments = {"latents": torch.randn(1, 4, 8, 8), "output_type": "pt"}
    with stage.student.deployed() as network:
        trained = to_pipeline(network, 399, stage.family.pipeline)(tiny.PROMPTS[0], **arguments).images
    stage.student.publish()
    save_lora(*stage.student.lora, tmp_path / "lora", "unet")
    stock = DiffusionPipeline.from_pretrained(teacher_folder)
    stock.scheduler = one_step_scheduler(stock.scheduler, 399)
    stock.load_lora_weights(tmp_path / "lora")
    drawn = stock(tiny.PROMPTS[0], num_inference_steps=1, guidance_scale=0, **arguments).images
    assert (drawn - trained).abs().max() <= 1e-6


def test_a_run_with_adapters_is_whole(run, repo, hub, teacher_folder, monkeypatch):
    """In half precision, with a path of adapters; pushed, and replayed from the Hub."""
    folder = run(lora_rank=4, mixed_precision="bf16", validation_steps=2, push_to_hub=True, hub_model_id=repo)
    report = json.loads((folder / "report.json").read_text())
    assert [row["step"] for row in report["curve"]] == [0, 2, 4] and (folder / "path.png").exists()
    assert report["lora"] == {"rank": 4, "alpha": 4, "folder": "lora"}
    monkeypatch.chdir(teacher_folder.parent)  # a card has a folder's name alone
    assert "lora/pytorch_lora_weights.safetensors" in hub.files(repo, "main")
    for card in ((folder / "README.md").read_text(), hub.files(repo, "main")["README.md"].decode()):
        snippets = card.split("```python")[1:]
        assert len(snippets) == 4 and "load_lora_weights" in snippets[2]
        scope = {}
        exec(snippets[2].split("```")[0], scope)
        assert scope["image"].size == (16, 16)
    own = DisBackOneStepPipeline.from_pretrained(repo)
    assert own.unet.dtype == torch.float32
    again = run("again", lora_rank=4, mixed_precision="bf16", degradation_path=repo, stage="backtrack")
    one, two = (load_file(place / "lora" / "pytorch_lora_weights.safetensors") for place in (folder, again))
    assert equal(one, two)
