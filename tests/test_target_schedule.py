"""What every policy promises, whatever is measured; and what each does."""

import dataclasses
import random
from itertools import product

import pytest

from diffusers_disback.path.target_schedule import TARGET_SCHEDULES, AdaptiveSchedule, Measure
from diffusers_disback.training.config import BacktrackingConfig, target_schedule


SIZES = [(0, 3, 5), (1, 3, 5), (2, 1, 2), (4, 3, 12), (4, 3, 40), (9, 1, 9), (5, 20, 100)]
POLICIES = [
    ("fixed", {}),
    ("adaptive", {"target_share": 0.1}),
    ("adaptive", {"target_share": 1.0}),
    ("adaptive", {"target_share": 1.0, "target_fall": 0.01}),
]


def make(policy, size, settings):
    num_nodes, steps_per_target, steps = size
    config = BacktrackingConfig(
        max_train_steps=steps, steps_per_target=steps_per_target, target_schedule=policy, **settings
    )
    return target_schedule(config, num_nodes)


def walk(schedule, seed, every=1):
    """A run: the node of every update, and measures of a random student on the way."""
    numbers, nodes, measures = random.Random(seed), [], []
    for step in range(schedule.steps):
        nodes.append(schedule.node(step, measures))
        if nodes[-1] > 0 and (step + 1) % every == 0:
            measures.append(Measure(step + 1, nodes[-1], numbers.expovariate(1), numbers.expovariate(1)))
    return nodes, measures


@pytest.mark.parametrize("policy, settings", POLICIES, ids=lambda value: str(value))
def test_it_visits_every_node_and_ends_on_the_teacher(policy, settings):
    for size, seed in product(SIZES, range(6)):
        schedule, case = make(policy, size, settings), f"{size}, seed {seed}"
        nodes, measures = walk(schedule, seed, every=1 + seed % 3)
        num_nodes, steps_per_target, steps = size
        assert nodes[0] == max(num_nodes - 1, 0) and nodes[-1] == 0, case
        assert nodes == sorted(nodes, reverse=True), f"{case}: it never goes back up"
        assert set(nodes) == set(range(max(num_nodes, 1))), case
        assert nodes.count(0) >= min(steps_per_target, steps), f"{case}: the teacher has its share"
        assert schedule.switches(measures) == [s for s in range(1, steps) if nodes[s] != nodes[s - 1]], case
        if policy == "adaptive":
            assert all(nodes.count(i) <= steps_per_target for i in range(1, num_nodes)), case
        else:
            assert len(nodes) - nodes.count(0) == max(num_nodes - 1, 0) * steps_per_target, case


@pytest.mark.parametrize("policy, settings", POLICIES, ids=lambda value: str(value))
def test_the_past_does_not_depend_on_what_is_measured_later(policy, settings):
    for seed in range(6):
        schedule = make(policy, (5, 20, 100), settings)
        nodes, measures = walk(schedule, seed, every=2)
        assert [schedule.node(step, measures) for step in range(100)] == nodes, "asked again at the end"
        for cut in (7, 33, 61):
            before = [measure for measure in measures if measure.step <= cut]
            assert [schedule.node(step, before) for step in range(cut + 1)] == nodes[: cut + 1], f"{seed}, {cut}"


@pytest.mark.parametrize("policy", TARGET_SCHEDULES)
def test_the_teacher_gets_its_share(policy):
    make(policy, (4, 3, 12), {})
    with pytest.raises(ValueError, match="--max_train_steps 11 is less than 4 targets x --steps_per_target 3"):
        make(policy, (4, 3, 11), {})


def test_the_mismatch_is_measured_ten_times_with_each_node_by_default():
    assert [BacktrackingConfig(steps_per_target=k).mismatch_every for k in (200, 15, 9)] == [20, 1, 1]
    assert BacktrackingConfig(mismatch_steps=7).mismatch_every == 7


def test_the_fixed_schedule_stays_as_long_with_each():
    nodes, _ = walk(make("fixed", (4, 3, 14), {}), 0)
    assert nodes == [3, 3, 3, 2, 2, 2, 1, 1, 1, 0, 0, 0, 0, 0]


def test_the_adaptive_schedule_leaves_a_node_that_is_no_stepping_stone():
    schedule = AdaptiveSchedule(3, 100, 300, share=0.5)
    useful, useless = Measure(10, 2, 0.4, 1.0), Measure(20, 2, 0.6, 1.0)
    assert schedule.switches([useful]) == [100, 200], "as long as it may"
    assert schedule.switches([useful, useless]) == [20, 120]
    assert schedule.node(19, [useful, useless]) == 2 and schedule.node(20, [useful, useless]) == 1
    assert schedule.switches([useful, useless, Measure(30, 1, 0.9, 1.0)]) == [20, 30]
    assert schedule.switches([useful, useless, Measure(30, 1, 0.1, 1.0)]) == [20, 120]


def test_the_adaptive_schedule_leaves_a_node_that_the_student_is_on_its_way_to():
    schedule = AdaptiveSchedule(3, 100, 300, share=0.5, fall=0.1)
    rising = [Measure(10 * k, 2, 0.1 * k, 9.0) for k in range(1, 5)]
    assert schedule.switches(rising) == [100, 200], "it learns the student"
    first, second, little = Measure(50, 2, 0.35, 9.0), Measure(60, 2, 0.355, 9.0), Measure(60, 2, 0.37, 9.0)
    assert schedule.switches([*rising, first]) == [100, 200]
    assert schedule.switches([*rising, first, little]) == [100, 200]
    assert schedule.switches([*rising, first, second]) == [60, 160], "below the highest twice, if not falling twice"
    next_one = [Measure(70, 1, 0.3, 9.0), Measure(80, 1, 0.2, 9.0), Measure(90, 1, 0.1, 9.0)]
    assert schedule.switches([*rising, first, second, *next_one]) == [60, 90]
    assert AdaptiveSchedule(3, 100, 300, 0.5, 1.0).switches([*rising, first, second, *next_one]) == [100, 200]


def test_measures_of_a_checkpoint_of_the_first_version_are_read():
    measure = Measure(8, 2, 0.5, 0.25)
    assert Measure.from_state({"step": 8, "node": 2, "gap": 0.5, "next_gap": 0.25}) == measure
    assert Measure.from_state(dataclasses.asdict(measure)) == measure
