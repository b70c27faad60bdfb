"""After which steps nodes are recorded and when the walk ends, on losses that are known."""

import pytest

from diffusers_disback.path.node_spacing import candidate_steps, evenly_spaced_steps, is_flat


def test_nodes_are_evenly_spaced_in_steps():
    assert evenly_spaced_steps(1000, 4) == [250, 500, 750, 1000] and evenly_spaced_steps(7, 3) == [2, 5, 7]
    assert evenly_spaced_steps(5, 5) == [1, 2, 3, 4, 5] and evenly_spaced_steps(5, 0) == []


def test_candidates_are_dense_at_first_and_end_with_the_last():
    assert candidate_steps(1000) == [1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128, 181, 256, 362, 512, 724, 1000]
    assert candidate_steps(12) == [1, 2, 3, 4, 6, 8, 11, 12] and candidate_steps(1) == [1]


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 12, 40, 100, 20_000])
def test_there_are_candidates_before_and_at_the_end(steps):
    found = candidate_steps(steps)
    assert found == sorted(set(found)) and found[0] == 1 and found[-1] == steps


def test_the_walk_ends_when_doubling_it_brings_little():
    steps, losses = [0, 1, 2, 4, 8, 16], [1.0, 0.8, 0.6, 0.3, 0.22, 0.2]
    flat = [is_flat(steps[:k], losses[:k], 0.1) for k in range(2, 7)]
    assert flat == [False, False, False, False, True]
    assert not is_flat(steps, losses, 0.0) and not is_flat([0, 1, 2], [1.0, 0.5, 0.6], 0.0), "0 is never"
    assert is_flat([0, 1, 2], [1.0, 0.5, 0.6], 0.1), "it has risen since half way"
    assert not is_flat(steps, losses, 0.9, steps[-1] + 1) and is_flat(steps, losses, 0.9, steps[-1]), "not yet"
    assert not is_flat([0], [1.0], 0.5) and not is_flat([0, 1], [1.0, 1.0], 0.5), "there is no half yet"
    assert not is_flat([0, 1, 2, 4], [1.0, 1.1, 1.2, 1.3], 0.5), "what rises has not come to its end"
