"""What both stages promise: exact resumption, the right networks moving, the path walked back node by node."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from stages import close, equal, images_for, interrupted_at, record, recorder, trainer, training, weights

from diffusers_disback.backtracking import BacktrackingTrainer
from diffusers_disback.degradation import DegradationRecorder
from diffusers_disback.objectives import OBJECTIVES
from diffusers_disback.path.node_spacing import is_far
from diffusers_disback.path.path import DegradationPath
from diffusers_disback.training.config import (
    BacktrackingConfig,
    DegradationConfig,
    TrainingConfig,
    guidance_of_node,
    nodes_are_guided,
)
from diffusers_disback.training.run_folder import RunFolder


@pytest.fixture(scope="module")
def path(tmp_path_factory, teacher_folder):
    """A path of four nodes."""
    return record(training(tmp_path_factory.mktemp("recorded")), teacher_folder, steps=4, nodes=4)


def node(path, index):
    network = tiny.unet(seed=9)
    path.load(index, into=network)
    return weights(network)


# Stage 1 -------------------------------------------------------------------------------------------------------------


def test_node_steps_end_with_the_last():
    assert DegradationConfig(degradation_steps=100, num_path_nodes=4).node_steps == [25, 50, 75, 100]
    assert DegradationConfig(degradation_steps=7, num_path_nodes=3).node_steps == [2, 5, 7]
    assert DegradationConfig(degradation_steps=7, num_path_nodes=7).node_steps == list(range(1, 8))
    assert DegradationConfig(num_path_nodes=0).node_steps == []
    with pytest.raises(ValueError, match="--num_path_nodes 8 is more than --degradation_steps 7"):
        DegradationConfig(degradation_steps=7, num_path_nodes=8)


def test_recording_moves_the_fake_score_and_nothing_else(tmp_path, teacher_folder):
    stage = recorder(training(tmp_path), teacher_folder)
    generator, teacher = weights(stage.generator.model.network), weights(stage.family.network)
    stage.run()
    fake_score = weights(stage.fake_score.unwrapped())
    assert all(not torch.equal(fake_score[key], teacher[key]) for key in teacher), "every parameter moved"
    assert equal(weights(stage.generator.model.network), generator) and equal(weights(stage.family.network), teacher)
    assert not any(parameter.requires_grad for parameter in stage.generator.model.network.parameters())
    assert equal(node(stage.path, len(stage.path)), fake_score), "the last node is where the walk ended"
    assert not stage.path.complete
    path = stage.record()
    assert path.complete and path.manifest["cost"]["steps"] == 4
    assert stage.fake_score.network is None, "its memory is free for stage 2"


def test_recording_approaches_the_generator(tmp_path, teacher_folder):
    """The denoising loss on the generator's samples falls from node to node."""
    config = training(tmp_path, train_batch_size=8)
    path = record(config, teacher_folder, steps=60, nodes=3)
    losses = [entry["loss"] for entry in path.nodes]
    assert losses[0] > losses[1] > losses[2]


def test_stage_1_that_ends_by_itself_resumed_equals_unbroken(tmp_path, teacher_folder):
    changes = {"steps": 16, "nodes": 3, "degradation_stop": 0.35}
    config = {"train_batch_size": 8, "checkpointing_steps": 3, "fake_score_learning_rate": 3e-3}
    unbroken = record(training(tmp_path / "unbroken", **config), teacher_folder, **changes)
    end = unbroken.manifest["cost"]["steps"]
    assert end < 16 and unbroken.nodes[-1]["step"] == end and unbroken.complete
    kept = {f.name for f in (tmp_path / "unbroken" / "path").iterdir() if f.is_dir()}
    assert kept == {entry["name"] for entry in unbroken.nodes}, "nothing else is left"
    stage = recorder(training(tmp_path / "broken", **config), teacher_folder, **changes)
    stage.train_step = interrupted_at(5, stage.train_step)
    with pytest.raises(KeyboardInterrupt):
        stage.record()
    again = training(tmp_path / "broken", **config, resume_from_checkpoint="latest")
    resumed = record(again, teacher_folder, **changes)
    assert resumed.nodes == unbroken.nodes, "hashes of weights, losses and what was measured included"
    once_more = recorder(again, teacher_folder, **changes)
    once_more.path.manifest["complete"] = False
    assert once_more.record().nodes == unbroken.nodes, "cut off after its last checkpoint, before its end was written"


def test_nodes_tell_their_mismatch(path):
    teachers = [entry["mismatch"]["teacher_denoising_loss"] for entry in path.nodes]
    losses = [sum(entry["mismatch"]["denoising_loss"]) for entry in path.nodes]
    assert all(bands == teachers[0] and len(bands) == 4 for bands in teachers)
    assert sum(teachers[0]) > losses[0] > losses[-1]


# Stage 2: guidance ---------------------------------------------------------------------------------------------------


def test_guidance_grows_from_one_to_the_teachers():
    config = BacktrackingConfig(guidance_scale=7.0)
    assert [guidance_of_node(i, 4, config) for i in (4, 3, 2, 1, 0)] == [1, 1, 3, 5, 7]
    assert guidance_of_node(0, 1, config) == guidance_of_node(0, 0, config) == 7
    constant = BacktrackingConfig(guidance_scale=7.0, guidance_schedule="constant")
    assert [guidance_of_node(i, 4, constant) for i in (3, 2, 1, 0)] == [7, 7, 7, 7]


def test_prompts_are_dropped_only_for_nodes_with_guidance():
    ramp, constant = (BacktrackingConfig(guidance_scale=7.0, guidance_schedule=s) for s in ("ramp", "constant"))
    assert [nodes_are_guided(ramp, n) for n in (0, 1, 2, 3)] == [False, False, False, True]
    assert [nodes_are_guided(constant, n) for n in (0, 1, 2, 3)] == [False, False, True, True]
    assert not nodes_are_guided(BacktrackingConfig(guidance_scale=1.0), 10)


# Stage 2: the training -----------------------------------------------------------------------------------------------


def test_backtracking_walks_the_path(tmp_path, path):
    """The fake score starts as node N; each target equals its node on disk; the last is the teacher."""
    stage = trainer(training(tmp_path), path, max_train_steps=6, steps_per_target=1)
    assert equal(weights(stage.fake_score.unwrapped()), node(path, 4))
    visited, step_of = [], stage.train_step

    def watched(step, batches):
        losses = step_of(step, batches)
        assert equal(weights(stage.target.network), node(path, stage.target_node))
        visited.append((stage.target_node, stage.target.guidance_scale))
        return losses

    stage.train_step = watched
    stage.train()
    assert [i for i, _ in visited] == [3, 2, 1, 0, 0, 0]
    assert [g for _, g in visited] == pytest.approx([1, 1 + 2 / 3, 1 + 4 / 3, 3, 3, 3])
    assert equal(weights(stage.target.network), weights(tiny.pipeline().unet)), "the last target is the teacher"


def test_nodes_differ_from_each_other_and_from_the_teacher(path):
    nodes = [node(path, i) for i in range(5)]
    assert all(not equal(nodes[i], nodes[j]) for i in range(5) for j in range(i))


def test_without_a_path_the_fake_score_starts_as_the_teacher(tmp_path):
    stage = trainer(training(tmp_path), None)
    teacher = weights(tiny.pipeline().unet)
    assert equal(weights(stage.fake_score.unwrapped()), teacher)
    stage.train()
    assert equal(weights(stage.target.network), teacher) and stage.target.guidance_scale == 3


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_backtracking_moves_the_student_and_the_fake_score_and_nothing_else(tmp_path, path, objective):
    stage = trainer(training(tmp_path, objective=objective, **images_for(objective, tmp_path / "images")), path)
    before = [weights(network) for network in (stage.student.unwrapped(), stage.fake_score.unwrapped())]
    teacher = weights(stage.family.network)
    student = stage.train()
    for was, network in zip(before, (student, stage.fake_score.unwrapped()), strict=True):
        assert all(not torch.equal(was[key], value) for key, value in network.state_dict().items())
    assert equal(weights(stage.family.network), teacher)
    assert all(parameter.grad is None for parameter in stage.target.network.parameters())


def test_fake_score_updates_are_counted(tmp_path, path):
    counts = {"generator": 0, "fake_score": 0}
    stage = trainer(training(tmp_path), path, max_train_steps=4, fake_score_updates=3)
    for learner in stage.learners:
        learner.optimizer.optimizer.register_step_post_hook(
            lambda *_, name=learner.name: counts.update({name: counts[name] + 1})
        )
    stage.train()
    assert counts == {"generator": 4, "fake_score": 12}


def test_the_average_is_published(tmp_path, path):
    plain = weights(trainer(training(tmp_path / "plain"), path).train())
    stage = trainer(training(tmp_path / "average"), path, use_ema=True, ema_decay=0.5)
    stage.run()
    with stage.student.deployed() as network:
        deployed = weights(network)
    assert equal(weights(stage.student.unwrapped()), plain), "averaging does not change the training"
    averaged = weights(stage.student.publish())
    assert equal(deployed, averaged), "what is measured is what is published"
    assert all(not torch.equal(averaged[key], plain[key]) for key in plain)


# Both: seeds, resumption, accumulation -------------------------------------------------------------------------------


def test_one_seed_gives_identical_weights(tmp_path, teacher_folder):
    results = []
    for name, seed in [("one", 3), ("two", 3), ("other", 4)]:
        config = training(tmp_path / name, seed=seed)
        path = record(config, teacher_folder)
        torch.manual_seed(len(results))  # global random state does not matter
        results.append((node(path, 2), weights(trainer(config, path, steps_per_target=2).train())))
    assert all(equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    assert not any(equal(a, b) for a, b in zip(results[0], results[2], strict=True))


def test_stage_1_resumed_equals_stage_1_unbroken(tmp_path, teacher_folder):
    unbroken = record(training(tmp_path / "unbroken"), teacher_folder)
    config = training(tmp_path / "broken")
    stage = recorder(config, teacher_folder)
    stage.train_step = interrupted_at(3, stage.train_step)
    with pytest.raises(KeyboardInterrupt):
        stage.record()
    resumed = record(training(tmp_path / "broken", resume_from_checkpoint="latest"), teacher_folder)
    assert len(resumed) == len(unbroken) == 2
    for i in (1, 2):
        assert equal(node(resumed, i), node(unbroken, i))
        assert resumed.nodes[i - 1] == unbroken.nodes[i - 1]


def test_the_adaptive_schedule_resumed_equals_the_unbroken(tmp_path, path):
    """Nodes are left before their time, by measures of which some were taken before the break and some after it."""
    arguments = {"target_schedule": "adaptive", "mismatch_steps": 1, "target_share": 0.887}
    arguments |= {"max_train_steps": 24, "steps_per_target": 6}
    unbroken = trainer(training(tmp_path / "unbroken"), path, **arguments)
    expected = weights(unbroken.train())
    assert unbroken.result().switches != [6, 12, 18] and unbroken.target_node == 0
    assert {measure.node for measure in unbroken.measures} == {3, 2, 1}
    assert [wait["step"] for wait in unbroken.waits] == [0, *unbroken.result().switches]
    broken = trainer(training(tmp_path / "broken", checkpointing_steps=4), path, **arguments)
    broken.train_step = interrupted_at(unbroken.result().switches[0] + 3, broken.train_step)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = trainer(
        training(tmp_path / "broken", checkpointing_steps=4, resume_from_checkpoint="latest"), path, **arguments
    )
    assert equal(weights(resumed.train()), expected)
    assert resumed.measures == unbroken.measures and resumed.result().switches == unbroken.result().switches


def test_measuring_changes_nothing(tmp_path, path):
    plain = weights(trainer(training(tmp_path / "plain"), path, max_train_steps=6).train())
    measured = trainer(training(tmp_path / "measured", validation_steps=1), path, lambda _: {}, max_train_steps=6)
    assert equal(weights(measured.train()), plain)
    rows = measured.curve
    assert [row["node"] for row in rows] == [3, 2, 1, 0, 0, 0]
    for row in rows:
        assert (row["target_to_teacher"] == 0) == (row["node"] == 0)
        assert row["student_to_target"] > 0
        assert (row["target_denoising_loss"] == row["teacher_denoising_loss"]) == (row["node"] == 0)
    again = trainer(
        training(tmp_path / "measured", resume_from_checkpoint="latest"), path, lambda _: {}, max_train_steps=6
    )
    again.train()
    assert again.curve[-1] == {**rows[-1], "seconds": again.curve[-1]["seconds"]}, "resumed at its end"


@pytest.mark.parametrize("use_ema", [pytest.param(False, marks=pytest.mark.slow), True])
def test_stage_2_resumed_equals_stage_2_unbroken(tmp_path, path, use_ema):
    """The break falls into the second target's turn."""
    arguments = {"use_ema": use_ema, "max_train_steps": 8, "steps_per_target": 2}
    unbroken = trainer(training(tmp_path / "unbroken"), path, **arguments)
    expected = weights(unbroken.train())
    broken = trainer(training(tmp_path / "broken", checkpointing_steps=3), path, **arguments)
    broken.train_step = interrupted_at(5, broken.train_step)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = trainer(
        training(tmp_path / "broken", checkpointing_steps=3, resume_from_checkpoint="latest"), path, **arguments
    )
    assert equal(weights(resumed.train()), expected)
    assert equal(weights(resumed.fake_score.unwrapped()), weights(unbroken.fake_score.unwrapped()))
    assert resumed.target_node == 0


def test_accumulated_gradients_are_those_of_the_larger_batch(tmp_path, teacher_folder):
    results = []
    for name, size, slices in [("whole", 4, 1), ("sliced", 2, 2), ("single", 1, 4)]:
        config = training(tmp_path / name, train_batch_size=size, gradient_accumulation_steps=slices)
        path = record(config, teacher_folder)
        results.append((node(path, 2), weights(trainer(config, path, steps_per_target=2).train())))
    for other in results[1:]:
        assert all(close(a, b, 2e-4) for a, b in zip(results[0], other, strict=True))
    config = training(tmp_path / "smaller", train_batch_size=2)
    path = record(config, teacher_folder)
    assert not close(node(path, 2), results[0][0], 2e-4), "and the batch size does matter"


def test_gradient_checkpointing_changes_no_gradient(tmp_path, path):
    results = []
    for name, checkpointing in [("plain", False), ("checkpointed", True)]:
        stage = trainer(training(tmp_path / name, gradient_checkpointing=checkpointing), path)
        assert stage.student.unwrapped().is_gradient_checkpointing == checkpointing
        assert stage.fake_score.unwrapped().is_gradient_checkpointing == checkpointing
        results.append(weights(stage.train()))
    assert close(*results, 1e-6)


# Checkpoints and failures --------------------------------------------------------------------------------------------


def test_checkpoints_are_limited_and_whole(tmp_path, path):
    config = training(tmp_path, checkpointing_steps=1, checkpoints_total_limit=2)
    stage = trainer(config, path)
    stage.train()
    folder = tmp_path / "checkpoints" / "backtracking"
    assert sorted(f.name for f in folder.iterdir()) == ["checkpoint-000003", "checkpoint-000004"]
    assert not list(folder.glob("*/*/model_1*")), "a network's folder holds that network alone"
    state = json.loads((folder / "checkpoint-000004" / "stage.json").read_text())
    assert state["step"] == 4 and state["seconds"] > 0 and state["peak_memory_mb"] > 100


def test_a_draft_of_a_checkpoint_does_not_count(tmp_path, path):
    config = training(tmp_path)
    stage = trainer(config, path)
    stage.train()
    folder = tmp_path / "checkpoints" / "backtracking"
    shutil.copytree(folder / "checkpoint-000004", folder / "checkpoint-000009")
    (folder / "checkpoint-000009" / "stage.json").unlink()
    assert stage.folder.checkpoint_to_resume("backtracking", "latest").name == "checkpoint-000004"


def test_a_disk_that_is_full_at_a_checkpoint_leaves_the_one_before_and_no_draft(tmp_path, path):
    stage = trainer(training(tmp_path, checkpointing_steps=1, checkpoints_total_limit=1), path)
    save, saved = stage.fake_score.save, []

    def save_once(folder):
        saved.append(folder)
        save(folder)
        if len(saved) == 2:
            raise OSError(28, "No space left on device", str(folder))

    stage.fake_score.save = save_once
    with pytest.raises(OSError, match="No space left"):
        stage.train()
    folder = tmp_path / "checkpoints" / "backtracking"
    assert [f.name for f in folder.iterdir()] == ["checkpoint-000001"]
    assert f"The last checkpoint, {folder / 'checkpoint-000001'}, is whole" in stage.folder.intact()


ADAPTERS = {"lora_rank": 2, "node_precision": "fp32"}


@pytest.mark.parametrize("changes", [{}, pytest.param(ADAPTERS, marks=pytest.mark.slow)], ids=["full", "adapters"])
def test_both_stages_go_on_from_the_checkpoint_before_a_damaged_one_and_end_the_same(
    tmp_path, teacher_folder, capsys, changes
):
    """With nodes that the older checkpoint does not know of, an average, and a schedule that goes by what it measured."""
    kept = {"checkpointing_steps": 2, **changes}
    policy = {"use_ema": True, "target_schedule": "adaptive", "steps_per_target": 2, "mismatch_steps": 1}
    policy |= {"max_train_steps": 6, "fake_score_updates": 1}

    def both(name, **more):
        config = training(tmp_path / name, **kept, **more)
        path = record(config, teacher_folder, steps=4, nodes=3)
        stage = trainer(config, path, **policy)
        return path.nodes, stage, weights(stage.train())

    nodes, whole, expected = both("whole")
    config = training(tmp_path / "broken", **kept)
    stage = recorder(config, teacher_folder, steps=4, nodes=3)
    stage.run()  # and is cut off before it says that the path is complete
    (tmp_path / "broken/checkpoints/degradation/checkpoint-000004/fake_score/optimizer.bin").write_bytes(b"")
    again = training(tmp_path / "broken", **kept, resume_from_checkpoint="latest")
    path = record(again, teacher_folder, steps=4, nodes=3)
    assert [{**entry, "files": None} for entry in path.nodes] == [{**entry, "files": None} for entry in nodes]
    assert "checkpoint-000002 is taken instead" in capsys.readouterr().err
    stage = trainer(config, path, **policy)
    stage.train_step = interrupted_at(5, stage.train_step)
    with pytest.raises(KeyboardInterrupt):
        stage.train()
    average = tmp_path / "broken/checkpoints/backtracking/checkpoint-000004/generator_ema/average.safetensors"
    content = bytearray(average.read_bytes())
    content[-1] ^= 1
    average.write_bytes(content)
    resumed = trainer(again, path, **policy)
    assert equal(weights(resumed.train()), expected) and resumed.measures == whole.measures
    assert "generator_ema/average.safetensors was changed" in capsys.readouterr().err


@pytest.mark.parametrize("stage_name", ["degradation", "backtracking"])
def test_a_loss_that_is_not_finite_stops_the_run_and_nothing_is_saved_after_it(
    tmp_path, teacher_folder, path, stage_name
):
    config = training(tmp_path, checkpointing_steps=1, logging_steps=100, fake_score_learning_rate=1e-3)
    stage = recorder(config, teacher_folder) if stage_name == "degradation" else trainer(config, path)
    step_of = stage.train_step

    def poisoned(step, batches):
        if step == 2:
            next(stage.fake_score.unwrapped().parameters()).data.fill_(float("nan"))
        return step_of(step, batches)

    stage.train_step = poisoned
    with pytest.raises(FloatingPointError, match=f"{stage_name}: .*_loss was not finite at step 2"):
        stage.run()
    saved = sorted(f.name for f in Path(tmp_path, "checkpoints", stage_name).glob("checkpoint-*"))
    assert saved == ["checkpoint-000001", "checkpoint-000002"]
    if stage_name == "degradation":
        assert len(DegradationPath.from_pretrained(tmp_path / "path")) == 1


def test_a_nan_between_two_logs_is_found_at_the_end(tmp_path, path):
    config = training(tmp_path, checkpointing_steps=100, logging_steps=100)
    stage = trainer(config, path)
    step_of = stage.train_step
    stage.train_step = lambda step, batches: {
        k: v * (float("nan") if step == 1 else 1) for k, v in step_of(step, batches).items()
    }
    with pytest.raises(FloatingPointError, match="was not finite at step 1"):
        stage.run()


def test_a_gradient_that_is_not_finite_is_not_saved(tmp_path, path):
    """The losses of that step are fine; the update makes the weights NaN."""
    stage = trainer(training(tmp_path, checkpointing_steps=1, logging_steps=100), path, fake_score_updates=1)
    step = stage.fake_score.backward_and_step

    def poisoned(loss):
        if stage.student.optimizer.state_dict()["state"][0]["step"] == 2:
            loss = loss + next(stage.fake_score.network.parameters()).sum() * float("nan")
        step(loss)

    stage.fake_score.backward_and_step = poisoned
    with pytest.raises(FloatingPointError, match="fake_score_gradient_norm was not finite at step 1"):
        stage.run()
    saved = sorted(f.name for f in Path(tmp_path, "checkpoints", "backtracking").glob("checkpoint-*"))
    assert saved == ["checkpoint-000001"]


def test_a_checkpoint_is_not_gone_on_from_along_another_path(tmp_path, path, teacher_folder):
    trainer(training(tmp_path), path).train()
    other = record(training(tmp_path / "other", seed=5), teacher_folder, steps=4, nodes=4)
    stage = trainer(training(tmp_path, resume_from_checkpoint="latest"), other)
    with pytest.raises(ValueError, match="cannot be resumed: path was"):
        stage.train()


def test_a_recording_whose_nodes_are_gone_is_not_gone_on_with(tmp_path, teacher_folder):
    record(training(tmp_path), teacher_folder)
    shutil.rmtree(tmp_path / "path")
    with pytest.raises(ValueError, match=r"has the nodes of steps \[\], but at step 4 this recording had \[2, 4\]"):
        record(training(tmp_path, resume_from_checkpoint="latest"), teacher_folder)


def test_frozen_networks_compute_in_the_trained_ones_precision(tmp_path, path):
    """Equal weights give equal outputs: target and fake score differ by what they learnt, never by rounding."""
    stage = trainer(training(tmp_path, mixed_precision="bf16"), None)
    x_t, t = torch.randn(2, 4, 8, 8), torch.tensor([100, 900])
    condition = stage.data.condition([0, 1], [False, False])
    fake_score = stage.family.score_model(stage.fake_score.network)
    with torch.no_grad():
        outputs = [model.predict(x_t, t, condition) for model in (stage.target, fake_score)]
        exact = stage.family.score_model().predict(x_t, t, condition)
    assert torch.equal(*outputs) and not torch.equal(outputs[0], exact)
    assert stage.target.network.dtype == torch.float32


def test_numbers_out_of_range_are_refused():
    for name in ("train_batch_size", "checkpointing_steps", "gradient_accumulation_steps", "checkpoints_total_limit"):
        with pytest.raises(ValueError, match=f"--{name} has to be at least 1, but is 0"):
            TrainingConfig(**{name: 0})
    for changes, message in [
        ({"degradation_stop": 1.0}, "--degradation_stop has to be in"),
        ({"degradation_lr_multiplier": 0.0}, "--degradation_lr_multiplier has to be above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            DegradationConfig(**changes)
    for changes, message in [
        ({"max_train_steps": 0}, "--max_train_steps has to be at least 1"),
        ({"guidance_scale": 0.5}, "--guidance_scale has to be at least 1"),
        ({"ema_decay": 1.0}, "--ema_decay has to be in"),
        ({"target_schedule": "soon"}, "--target_schedule 'soon' is none of fixed, adaptive"),
        ({"target_share": 0.0}, "--target_share has to be in"),
        ({"target_fall": 0.0}, "--target_fall has to be in"),
        ({"mismatch_steps": 0}, "--mismatch_steps has to be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            BacktrackingConfig(**changes)


def test_the_warm_up_of_stage_1_is_a_tenth_of_it_and_over_before_it_may_stop(tmp_path, teacher_folder):
    config = training(tmp_path, lr_warmup_steps=500)
    stage = recorder(config, teacher_folder, steps=40, nodes=4, degradation_stop=0.9, degradation_lr_multiplier=3.0)
    (group,) = stage.fake_score.optimizer.param_groups
    assert group["initial_lr"] == pytest.approx(3 * config.fake_score_learning_rate)
    path = stage.record()
    assert stage.earliest_end == 8 <= stage.steps < 40, "not before twice the warm-up of a tenth"
    assert [node["step"] for node in path.nodes][-1] == stage.steps


@pytest.mark.parametrize(
    ("times", "warmup", "steps", "told"),
    [
        (1e9, 0, [], "there will be no path"),
        (0.0, 0, [3, 6, 9, 12], "a path is recorded"),
        (1e9, 4, [], "there will be no path"),
        pytest.param(0.0, 4, [3, 6, 9, 12], "a path is recorded", marks=pytest.mark.slow),
    ],
)
def test_a_path_is_recorded_if_the_start_is_far(
    tmp_path, teacher_folder, monkeypatch, capsys, times, warmup, steps, told
):
    """Judged once, when stage 1 may end; where the start is near it ends there, without a node."""
    monkeypatch.setattr("diffusers_disback.path.node_spacing.FAR_START", times)
    monkeypatch.setattr("diffusers_disback.training.config.AUTO_NODES", 4)
    auto = {"steps": 12, "nodes": "auto"}
    stage = recorder(training(tmp_path, lr_warmup_steps=warmup), teacher_folder, **auto)
    path = stage.record()
    assert [node["step"] for node in path.nodes] == steps
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "a start is far above" in line]
    assert told in line
    first, judged = stage.loss_history[0], next(row for row in stage.loss_history if row["step"] == stage.judged_step)
    assert f"is {sum(first['losses']) / sum(judged['losses']):.3g} times" in line
    again = recorder(
        training(tmp_path, lr_warmup_steps=warmup, resume_from_checkpoint="latest"), teacher_folder, **auto
    )
    assert len(again.record()) == len(steps)


def test_how_far_a_start_is():
    assert is_far(2.1, 1.0) and not is_far(2.0, 1.0) and not is_far(0.5, 1.0)
    assert DegradationConfig().most_path_nodes == 10 and DegradationConfig(degradation_steps=7).most_path_nodes == 7
    assert DegradationConfig(num_path_nodes=3).most_path_nodes == 3
    for wrong, message in (
        (True, "has to be a whole number"),
        ("often", "has to be a whole number, but is 'often'"),
        (-1, "at least 0"),
    ):
        with pytest.raises(ValueError, match=f"--num_path_nodes .*{message}"):
            DegradationConfig(num_path_nodes=wrong)


def test_a_resumed_run_takes_another_learning_rate_from_there_on(tmp_path, teacher_folder, monkeypatch, capsys):
    """As far in its schedule as it was; equal, bit for bit, to a run in which the rates were changed by hand."""
    common = {"lr_scheduler": "cosine", "lr_warmup_steps": 3}
    path = record(training(tmp_path / "path"), teacher_folder)

    def train(name, generator_rate=1e-3, fake_score_rate=1e-3, **changes):
        config = training(tmp_path / name, **common, fake_score_learning_rate=fake_score_rate, **changes)
        return trainer(config, path, generator_learning_rate=generator_rate)

    def by_hand(self, step, batches):
        if step == 2:
            for learner, rate in ((self.student, 4e-4), (self.fake_score, 2e-4)):
                schedule = learner.lr_schedule.scheduler
                schedule.base_lrs = [rate]
                learner.optimizer.param_groups[0]["lr"] = rate * schedule.lr_lambdas[0](schedule.last_epoch)
        return step_as_ever(self, step, batches)

    step_as_ever = BacktrackingTrainer.train_step
    monkeypatch.setattr(BacktrackingTrainer, "train_step", by_hand)
    expected = weights(train("whole").train())
    monkeypatch.setattr(BacktrackingTrainer, "train_step", interrupted_at(2, step_as_ever))
    with pytest.raises(KeyboardInterrupt):
        train("parts").train()
    monkeypatch.setattr(BacktrackingTrainer, "train_step", step_as_ever)
    resumed = train("parts", 4e-4, 2e-4, resume_from_checkpoint="latest")
    RunFolder(tmp_path / "parts").check("backtracking", resumed.settings, "latest")
    assert equal(weights(resumed.train()), expected)
    told = capsys.readouterr().err
    assert "from step 2 on the learning rate of the generator is 0.0004; it was 0.001" in told
    assert "from step 2 on the learning rate of the fake_score is 0.0002; it was 0.001" in told
    changes = [
        {"step": 2, "of": name, "was": 1e-3, "is": rate} for name, rate in (("generator", 4e-4), ("fake_score", 2e-4))
    ]
    assert resumed.rate_changes == changes
    again = train("parts", 4e-4, 2e-4, resume_from_checkpoint="latest")
    assert again.resume() == 4 and again.rate_changes == changes, "they are noted in the checkpoint, and no change now"


def test_a_recording_takes_another_learning_rate_from_there_on(tmp_path, teacher_folder, monkeypatch):
    monkeypatch.setattr(DegradationRecorder, "train_step", interrupted_at(2, DegradationRecorder.train_step))
    with pytest.raises(KeyboardInterrupt):
        record(training(tmp_path), teacher_folder)
    monkeypatch.undo()
    path = record(training(tmp_path, resume_from_checkpoint="latest", fake_score_learning_rate=1e-4), teacher_folder)
    assert path.complete and path.manifest["rate_changes"] == [
        {"step": 2, "of": "fake_score", "was": 1e-3, "is": 1e-4}
    ]
    assert DegradationPath.from_pretrained(tmp_path / "path").complete, "which readers of paths take"
