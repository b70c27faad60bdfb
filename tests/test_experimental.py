"""The policies that only the benchmarks have."""

import sys
from pathlib import Path

import pytest
from stages import recorder, training

from diffusers_disback import BacktrackingConfig
from diffusers_disback.path.target_schedule import TARGET_SCHEDULES
from diffusers_disback.training.config import target_schedule


sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from experimental import (  # noqa: E402
    DenseDegradation,
    GeometricSchedule,
    dense_steps,
    evenly_spaced,
    keep_evenly_spaced,
)


def test_geometric_phases_grow_or_shrink():
    assert GeometricSchedule(4, 70, 280, 2.0).switches() == [30, 90, 210]
    assert GeometricSchedule(4, 70, 280, 0.5).switches() == [120, 180, 210]
    assert GeometricSchedule(4, 70, 280, 1.0).switches() == [70, 140, 210]
    assert GeometricSchedule(4, 1, 4, 100.0).switches() == [1, 2, 3], "no phase is empty"


@pytest.mark.parametrize("ratio", [0.2, 1.5, 9.0])
@pytest.mark.parametrize("size", [(0, 3, 5), (1, 3, 5), (2, 1, 2), (4, 3, 12), (9, 1, 9), (5, 20, 100)])
def test_geometric_phases_visit_every_node_and_leave_the_teacher_its_share(size, ratio):
    nodes, per_target, steps = size
    schedule = GeometricSchedule(*size, ratio)
    visited = [schedule.node(step) for step in range(steps)]
    assert visited == sorted(visited, reverse=True) and set(visited) == set(range(max(nodes, 1)))
    assert len(visited) - visited.count(0) == max(nodes - 1, 0) * per_target


def test_a_schedule_that_is_registered_is_a_choice(monkeypatch):
    with pytest.raises(ValueError, match="--target_schedule 'geometric' is none of fixed, adaptive"):
        BacktrackingConfig(target_schedule="geometric")
    monkeypatch.setitem(TARGET_SCHEDULES, "geometric", GeometricSchedule)
    config = BacktrackingConfig(target_schedule="geometric", max_train_steps=12, steps_per_target=3)
    assert isinstance(target_schedule(config, 4), GeometricSchedule)


@pytest.mark.parametrize(
    "steps, num_nodes", [(1, 1), (2, 2), (7, 7), (7, 3), (12, 10), (40, 19), (100, 30), (1000, 10)]
)
def test_there_are_enough_dense_steps(steps, num_nodes):
    found = dense_steps(steps, num_nodes)
    assert found == sorted(set(found)) and found[0] >= 1 and found[-1] == steps
    assert len(found) >= min(2 * num_nodes, steps)


def test_nodes_lie_where_the_loss_has_fallen_evenly():
    losses = [1.0, 0.9, 0.7, 0.6, 0.4, 0.31, 0.2, 0.1]
    assert evenly_spaced(losses, 3) == [2, 4, 7]
    assert evenly_spaced(losses, 1) == [7] and evenly_spaced(losses, 0) == []
    assert evenly_spaced([1.0, 0.2, 0.19, 0.18, 0.17], 3) == [1, 2, 4], "all at once: the first place, then the next"


@pytest.mark.parametrize("losses", [[1.0, 0.5, 0.7, 0.2, 0.3], [0.2, 0.3, 0.4, 0.5, 0.6], [0.5] * 5])
@pytest.mark.parametrize("num_nodes", range(7))
def test_whatever_the_losses_nodes_are_distinct_and_end_with_the_last(losses, num_nodes):
    places = evenly_spaced(losses, num_nodes)
    assert len(places) == min(num_nodes, 4) == len(set(places)) and places == sorted(places)
    assert not places or (places[0] >= 1 and places[-1] == 4)


def test_a_dense_recording_keeps_nodes_where_its_loss_has_fallen_evenly(tmp_path, teacher_folder):
    config = training(tmp_path, train_batch_size=8, fake_score_learning_rate=3e-3)
    settings = DenseDegradation(degradation_steps=16, num_path_nodes=3, degradation_stop=0.0)
    path = recorder(config, teacher_folder, degradation=settings).record()
    assert [node["step"] for node in path.nodes] == [1, 2, 3, 4, 6, 8, 11, 16]
    keep_evenly_spaced(path, 3)
    assert len(path) == 3 and path.nodes[-1]["step"] == 16 and path.nodes[0]["step"] < 0.3 * 16
    assert path.read(1).keys() == path.read(3).keys()
