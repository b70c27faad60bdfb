"""The benchmark on pictures of digits: networks of many seeds side by side against each one alone, and every arm in small."""

import json
import sys
from pathlib import Path

import pytest
import torch


sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import convergence  # noqa: E402
import judged  # noqa: E402
import pictures  # noqa: E402
import pictures_task  # noqa: E402
from two_dimensions import Draws  # noqa: E402


def small(arm, seeds, start="copy", **changes):
    regime = pictures_task.Regime(start=start, **(pictures_task.SMALL | changes)).of_arm(arm)
    return pictures_task.Run(pictures.world("digits"), regime, pictures_task.ARMS[arm], seeds).run()


@pytest.mark.parametrize("arm", pictures_task.ARMS)
def test_every_arm_ends_on_the_teacher_and_counts_its_cost(arm):
    (one,) = small(arm, [5], fake_score_updates=2)
    settings = pictures_task.SMALL
    nodes = {"none": 0, "ramp": 0, "warm": 1, "default": 0, "warm_default": 1}.get(arm, settings["num_path_nodes"])
    assert len(one["switches"]) == max(nodes - 1, 0) and all(s < settings["updates"] for s in one["switches"])
    first, evaluations = one["stage_1"], one["curve"]["evaluations"]
    if "default" in arm:  # the copy is near: stage 1 ends with its first tenth
        assert first["updates"] == settings["default_steps"] // 10 and first["nodes"] == nodes
    else:
        assert first["updates"] == (settings["degradation_steps"] if nodes else 0)
    assert evaluations[0] == first["evaluations"] >= 4 * first["updates"]
    # a generator update 8, and 4 for the second update of the fake score
    assert evaluations[-1] - evaluations[0] == 12 * settings["updates"] or "default" in arm
    assert set(convergence.AXES) | set(pictures_task.Task.MEASURES) <= one["curve"].keys()


@pytest.mark.parametrize("start", ["random", "half"])
def test_a_seed_does_not_depend_on_those_beside_it(start):
    alone, beside = (small("default", seeds, start) for seeds in ([8], [7, 8]))
    assert alone[0]["curve"]["distance"] == pytest.approx(beside[1]["curve"]["distance"], rel=1e-3)
    assert (
        alone[0]["switches"] == beside[1]["switches"] and alone[0]["stage_1"]["nodes"] == beside[1]["stage_1"]["nodes"]
    )
    assert beside[0]["curve"]["distance"] != beside[1]["curve"]["distance"]


def test_networks_side_by_side_give_what_each_gives_and_their_gradients():
    weights = pictures.new_weights(Draws([0, 1], 4), 64, 16)
    together = pictures.SideBySide(weights, trains=True)
    x, level = torch.randn(6, 1, 8, 8), torch.randn(6)
    output = together(x, level)[0]
    (output.square().mean((1, 2, 3)).sum()).backward()
    for k in range(2):
        one = pictures.SideBySide({name: tensor[k : k + 1] for name, tensor in weights.items()}, trains=True)
        own = one(x[3 * k : 3 * k + 3], level[3 * k : 3 * k + 3])[0]
        assert torch.allclose(own, output[3 * k : 3 * k + 3], atol=1e-5)
        own.square().mean((1, 2, 3)).sum().backward()
        for name, parameter in one.named_parameters():
            assert torch.allclose(parameter.grad[0], getattr(together, name).grad[k], atol=1e-4), name


@pytest.mark.parametrize("name", pictures.SIZES)
def test_the_worlds_teacher_and_judge_tell_good_from_bad(name):
    world = pictures.world(name)
    noise = Draws([3], 7).normal(500, 1, world.size, world.size)[0]
    drawn = pictures.sample(world.teacher, noise, steps=20)
    good, bad, one = (world.judge(images[None]) for images in (drawn, noise, drawn[:1].expand(500, -1, -1, -1)))
    assert good["distance"][0] < 2 * world.measured["distance"] + 0.5 < bad["distance"][0] / 2
    assert good["classes"][0] > 9 and one["classes"][0] == pytest.approx(1) and one["distance"][0] > 5


def test_arms_have_equal_budgets_in_evaluations():
    regime = pictures_task.Regime(
        updates=1200, evaluate_every=15, fake_score_updates=2, own={"path": {"fake_score_updates": 1}}
    )
    path, none = regime.of_arm("path"), regime.of_arm("none")
    assert (none.updates, none.evaluate_every, path.updates, path.evaluate_every) == (1200, 15, 1800, 22)
    assert 12 * none.updates == 8 * path.updates


def test_the_judged_table_compares_seed_by_seed(tmp_path):
    def row(arm, seed, distances, first=0):
        settings = {"num_path_nodes": 2, "steps_per_target": 1}
        curve = {name: [1.0] * len(distances) for name in pictures_task.Task.MEASURES}
        curve |= {"updates": list(range(len(distances))), "distance": distances}
        curve["evaluations"] = [first + 10 * k for k in curve["updates"]]
        stage_1 = {"updates": first // 4, "nodes": 2 * bool(first)}
        return {"arm": arm, "seed": seed, "settings": settings, "stage_1": stage_1, "curve": curve}

    found = {
        "none": [row("none", seed, [9, 8, 4, 2, 1]) for seed in (0, 1)],
        "ramp": [row("ramp", seed, [9, 2, 1, 1, 1]) for seed in (0, 1)],
        "path": [row("path", seed, [9, 3, 2, 1, 0.5], first=4) for seed in (0, 1)],
    }
    assert judged.levels(found) == [2, 1.25, 1]
    assert judged.paired(found, "path", "none", 2) == (pytest.approx(30 / 24),) * 3
    assert judged.best_control(found, 2) == "ramp" and judged.paired(found, "path", "ramp", 2)[0] == pytest.approx(
        10 / 24
    )
    lines = judged.table(found, ["none", "path"]).splitlines()
    assert lines[-1].startswith("| path | 1; 2 | 24 (24-24) |") and "2 of 2" in lines[-1]
    assert "ramp: 0.42" in judged.summary({"copy": found})


def test_settings_are_tried_once_and_the_best_one_is_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures_task, "TUNING_SEEDS", [100])
    tuning = pictures_task.Tuning("digits", "copy", tmp_path, updates=60)
    for rate in (1e-5, 1e-3):
        tuning.tried("none", pictures_task.rates(rate, 1, 1))
    rows = [json.loads(line) for line in tuning.file.read_text().splitlines()]
    again = pictures_task.Tuning("digits", "copy", tmp_path, updates=60)
    again.tried("none", pictures_task.rates(1e-5, 1, 1))
    assert again.rows == rows and len(tuning.file.read_text().splitlines()) == 2
    assert again.ranking("none")[0]["settings"]["generator_learning_rate"] == 1e-3
    assert pictures_task.tuning_table("digits", tmp_path).count("| copy | none |") == 2
