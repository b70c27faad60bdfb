"""The benchmark: what is read off its curves against what is known, and its smallest setting end to end."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import convergence
import gpu
import objectives
import pytest
import torch
import toy_task
import two_dimensions

from diffusers_disback.training.stage import Stage
from processes import start_python


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def result(distances, stage_1=0, evaluations_per_row=10):
    rows = range(len(distances))
    return {
        "stage_1": {"updates": stage_1},
        "curve": {
            "updates": [5 * k for k in rows],
            "evaluations": [4 * stage_1 + evaluations_per_row * k for k in rows],
            "seconds": [0.1 * k for k in rows],
            "distance": distances,
        },
    }


def test_a_threshold_is_crossed_for_good_or_not_at_all():
    crossed = result([9, 3, 1, 3, 2, 1], stage_1=7)
    assert convergence.crossing(crossed, 2) == 4, "not where it first was below"
    assert convergence.cost(crossed, 2, "updates") == 4 * 5 + 7 and convergence.cost(crossed, 2, "evaluations") == 68
    assert convergence.cost(crossed, 0.5, "updates") == 5 * 5 + 7, "never: the whole budget"
    assert convergence.crossing(crossed, 0.5) is None and convergence.crossing(crossed, 10) == 0


def test_a_held_out_task_is_measured_within_the_budget_by_where_longer_runs_settle():
    long = [{**result([9, 4, 3, 2, 1, 1]), "seed": seed} for seed in (0, 1)]
    path = [{**result([9, 1, 1], stage_1=1), "seed": 1}]
    found = convergence.within_budget({"none": long, "path": path}, budget=10)
    assert found["none"][0]["curve"]["updates"] == [0, 5, 10] and found["reference"] is long
    assert convergence.thresholds(found) == [2.0, 1.25]
    assert [convergence.cost(one, 1.25, "evaluations") for one in found["none"]] == [20, 20], "never: the whole budget"
    *_, last = convergence.comparison(found, ["path"]).splitlines()
    assert last.startswith("| path | 1.43 (1.43-1.43) |  | 14-14 | 22: yes | 15.4: yes |"), "seed by seed"
    *_, last = convergence.comparison({"none": long}, ["none"]).splitlines()
    assert last.endswith("| 40-40 | 44: yes |  |"), "neither warm nor path is there yet"
    same = {"none": long, "path": path}
    assert convergence.within_budget(same, budget=25) is same


def test_intervals_are_of_the_median_over_seeds():
    assert convergence.bootstrap([3.0] * 5) == (3.0, 3.0)
    low, high = convergence.bootstrap([float(k) for k in range(101)])
    assert 35 < low < 45 and 55 < high < 65
    middle, low, high = convergence.ratio_interval([10.0, 20.0, 30.0], [20.0, 40.0, 60.0])
    assert middle == low == high == 2, "seed by seed, above 1 if ours is cheaper"


def test_an_arm_is_run_once_goes_on_and_is_reported(tmp_path, capsys):
    line = ["--task", "toy", "--small", "--output", str(tmp_path), "--regimes", "recorded", "--seeds", "3", "4"]
    convergence.main([*line, "--arms", "none", "warm"])
    file = tmp_path / "toy" / "recorded.jsonl"
    before = convergence.read(file)
    assert {arm: [row["seed"] for row in rows] for arm, rows in before.items()} == {"none": [3, 4], "warm": [3, 4]}
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]))  # as if the last one had not ended
    with convergence.claimed(file, "path", 3) as ours:  # as another process would hold it
        assert ours
        convergence.main([*line, "--arms", "none", "warm", "path"])
    now = convergence.read(file)
    assert [row["seed"] for row in now["warm"]] == [3, 4] and [row["seed"] for row in now["path"]] == [4]
    assert set(lines[:3]) < set(file.read_text().splitlines(keepends=True))
    assert not list(tmp_path.rglob("*-*.lock")) and not list(tmp_path.rglob("*.draft"))
    assert (tmp_path / "toy" / "recorded.png").stat().st_size > 10_000
    assert "| warm | 2 |" in (tmp_path / "toy" / "tables.md").read_text()


@pytest.mark.parametrize("arm", toy_task.ARMS)
def test_every_arm_of_the_toy_ends_on_the_teacher_and_counts_its_cost(arm):
    _, (one,) = toy_task.run("recorded", arm, [5], small=True)
    task = toy_task.SMALL
    nodes = {"none": 0, "ramp": 0, "warm": 1, "warm_default": 1}.get(arm, task.num_path_nodes)
    assert len(one["switches"]) == max(nodes - 1, 0) and all(s < task.updates for s in one["switches"])
    assert (one["stage_1"]["evaluations"] > 0) == (nodes > 0)
    evaluations = one["curve"]["evaluations"]
    assert evaluations[0] == one["stage_1"]["evaluations"] and evaluations[-1] >= evaluations[0] + 8 * task.updates
    if toy_task.ARMS[arm].schedule in ("fixed", "geometric"):
        assert evaluations[-1] == evaluations[0] + 8 * task.updates


def test_a_seed_does_not_depend_on_those_beside_it():
    alone, beside = (toy_task.run("recorded", "adaptive", seeds, small=True)[1] for seeds in ([8], [7, 8]))
    assert alone[0]["curve"]["distance"] == pytest.approx(beside[1]["curve"]["distance"], rel=1e-4)
    one, two = (two_dimensions.Draws(seeds, 1).normal(4, 2) for seeds in ([8], [7, 8]))
    assert torch.equal(one[0], two[1]) and not torch.equal(one[0], two[0])


def test_measures_of_the_data_tell_good_from_bad():
    draws = two_dimensions.Draws([0, 1], 0)
    real, other = draws.data(2000), draws.data(2000)
    assert (two_dimensions.sliced_wasserstein(real, other) < 0.2).all() and (
        two_dimensions.modes_found(real) == 1
    ).all()
    assert (two_dimensions.sliced_wasserstein(real, 0 * real) > 1.5).all() and (
        two_dimensions.modes_found(0 * real) == 1 / 25
    ).all()
    assert (two_dimensions.modes_found(real + 1) == 0).all()


def test_the_denoiser_is_preconditioned_to_the_identity_where_there_is_no_noise():
    draws = two_dimensions.Draws([0], 0)
    x, weights = draws.data(50), two_dimensions.new_weights(draws)
    assert torch.allclose(two_dimensions.denoise(weights, x, torch.full((1, 50, 1), 1e-4)), x, atol=1e-3)


@pytest.mark.slow
def test_the_shapes_task_end_to_end(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "convergence.py"), "--task", "shapes", "--small", "--seeds", "0"]
    subprocess.run([*command, "--output", str(tmp_path), "--arms", "none", "shuffled", "default"], check=True)
    for arm in ("none", "shuffled", "default"):
        (one,) = convergence.read(tmp_path / "shapes" / "shapes.jsonl")[arm]
        evaluations = one["curve"]["evaluations"]
        assert evaluations[0] == one["stage_1"]["evaluations"] and evaluations[-1] > evaluations[0]
        assert one["curve"]["target_to_teacher"][-1] == 0


@pytest.mark.slow
def test_objectives_are_run_once_and_compared(tmp_path, monkeypatch, capsys):
    line = ["objectives.py", "--output", str(tmp_path), "--images", "100", "--seeds", "0", "--name"]
    flags = ["--", "--max_train_steps", "2", "--validation_steps", "2", "--train_batch_size", "2"]
    for arm, own in (
        ("none", ["--num_path_nodes", "0"]),
        ("warm", ["--num_path_nodes", "1", "--degradation_steps", "2"]),
    ):
        for _ in range(2):
            monkeypatch.setattr("sys.argv", [*line, f"tiny_{arm}", *flags, *own, "--steps_per_target", "1"])
            objectives.main()
        assert len(objectives.rows(tmp_path / f"tiny_{arm}.jsonl")) == 1
    monkeypatch.setattr("sys.argv", ["objectives.py", "--output", str(tmp_path), "--compare", "tiny"])
    objectives.main()
    assert "| tiny | warm | 1 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([1.2, 1.1, 1.3, 1.06, 0.9], "helps"),
        ([1.2, 1.1, 1.3, 0.8, 0.9], "no difference shown"),
        ([0.9, 0.8, 0.7, 0.9, 1.2], "hurts"),
        ([2.0] * 4, "fewer than 5 seeds"),
    ],
)
def test_arms_are_told_apart_by_the_rule(ratios, verdict):
    assert objectives.judgement(ratios) == verdict


@pytest.mark.parametrize("forked", [True, False])
def test_a_command_line_is_run_in_a_fork_as_it_is_anew(forked, tmp_path):
    (tmp_path / "beside.py").write_text("import os\n")
    script = "import sys, beside\nprint(__name__, sys.argv[1], beside.os.environ['ARM'], flush=True)\nsys.exit(3)"
    (tmp_path / "script.py").write_text(script)
    process = start_python([str(tmp_path / "script.py"), "told"], forked, tmp_path / "log", ARM="path")
    process.join()
    assert process.exitcode == 3 and (tmp_path / "log").read_text() == "__main__ told path\n"


def test_a_part_for_a_gpu_runs_once_at_tiny_size_unless_it_was_cut_off(tmp_path, capsys):
    assert gpu.run("tests", tmp_path, tiny=True, limit=0.0)["status"] is None
    assert not list(tmp_path.glob("*.json"))
    for told in (": done, ", ": is there"):
        assert gpu.main(["--tiny", "--output", str(tmp_path), "--parts", "step"]) == 0
        assert capsys.readouterr().out.count(told) == 1
    figures = json.loads((tmp_path / "step.json").read_text())["figures"]
    assert figures["results"][0]["seconds"].keys() == {"baseline", "ours"}


@pytest.mark.slow
def test_what_is_to_be_measured_on_a_gpu_runs_at_tiny_size(tmp_path, capsys, monkeypatch):
    """All parts; one of them again, after it was cut off after a checkpoint."""
    gpu.main(["--tiny", "--output", str(tmp_path), "--parts", "pixels-teacher"])
    with monkeypatch.context() as patch:
        patch.setattr(Stage, "_validate", lambda stage, done: os.kill(os.getpid(), signal.SIGKILL))
        cut_off = gpu.run("pixels-path", tmp_path, tiny=True)
    assert cut_off["status"] == 1 and "exit statuses [-9]" in cut_off["printed"]
    assert {file.name for file in tmp_path.glob("*.json")} == {"pixels-teacher.json", "pixels-teacher.figures.json"}

    assert gpu.main(["--tiny", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count(": done, ") == len(gpu.PARTS) and printed.count(": is there") == 1
    assert "backtracking:   0%" in (tmp_path / "pixels-none.log").read_text()
    assert "backtracking:   0%" not in (tmp_path / "pixels-path.log").read_text(), "resumed"

    figures = {name: json.loads((tmp_path / f"{name}.json").read_text())["figures"] for name in gpu.PARTS}
    for name in ("sdxl-bf16", "sdxl-nf4"):
        assert figures[name]["results"][0]["seconds_per_step"] > 0
    assert figures["step"]["results"][0]["seconds"].keys() == {"baseline", "ours"}
    for data in ("pixels", "shapes"):
        assert {"distance", "shape_accuracy"} <= figures[f"{data}-teacher"]["teacher"].keys()
        assert figures[f"{data}-teacher"]["floor"]["distance"] < figures[f"{data}-teacher"]["teacher"]["distance"]
        arms = {arm: figures[f"{data}-{arm}"]["0"] for arm in ("none", "path")}
        assert arms["path"]["stage_1"]["steps"] == 2 and arms["none"]["stage_1"] == {}
        assert all([row["step"] for row in arm["curve"]] == [0, 1, 2] for arm in arms.values())
        assert all(row["distance"] > 0 for arm in arms.values() for row in arm["curve"])
