"""Where nodes lie and when the walk ends, on losses that are known."""

import pytest

from diffusers_disback.path.node_spacing import evenly_spaced, footprints, is_flat


def test_footprints_are_dense_at_first_and_end_with_the_last():
    assert footprints(1000, 4) == [1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128, 181, 256, 362, 512, 724, 1000]
    assert footprints(12, 2) == [1, 2, 3, 4, 6, 8, 11, 12]


@pytest.mark.parametrize(
    "steps, num_nodes", [(1, 1), (2, 2), (7, 7), (7, 3), (12, 10), (40, 19), (100, 30), (1000, 10)]
)
def test_there_are_enough_footprints(steps, num_nodes):
    found = footprints(steps, num_nodes)
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


def test_the_walk_ends_when_doubling_it_brings_little():
    steps, losses = [0, 1, 2, 4, 8, 16], [1.0, 0.8, 0.6, 0.3, 0.22, 0.2]
    flat = [is_flat(steps[:k], losses[:k], 0.1) for k in range(2, 7)]
    assert flat == [False, False, False, False, True]
    assert not is_flat(steps, losses, 0.0) and not is_flat([0, 1, 2], [1.0, 0.5, 0.6], 0.0), "0 is never"
    assert is_flat([0, 1, 2], [1.0, 0.5, 0.6], 0.1), "it has risen since half way"
    assert not is_flat(steps, losses, 0.9, steps[-1] + 1) and is_flat(steps, losses, 0.9, steps[-1]), "not yet"
    assert not is_flat([0], [1.0], 0.5) and not is_flat([0, 1], [1.0, 1.0], 0.5), "there is no half yet"
    assert not is_flat([0, 1, 2, 4], [1.0, 1.1, 1.2, 1.3], 0.5), "what rises has not come to its end"
