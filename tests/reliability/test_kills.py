"""Killed runs go on and end the same. How often is `kills.py`'s business; see docs/reliability.md."""

import kills
import pytest
import runs


pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def notebooks(tmp_path, monkeypatch):
    """Results of tests are not those of the repository, and tests do not resume with measurements."""
    monkeypatch.setattr(runs, "WORK", tmp_path / "work")
    monkeypatch.setattr(runs, "RESULTS", tmp_path / "results")


@pytest.mark.parametrize("mode", runs.MODES)
def test_runs_killed_at_random_moments_end_the_same(mode):
    result = kills.random_kills(mode, kills=10, seed=1)
    assert not result["wrong"]
    assert result["kills"] == result["resumed"] == result["equal"] >= 10


@pytest.mark.parametrize("mode, every", [("full", 15), ("adapter", 20)])
def test_what_a_kill_leaves_at_an_operation_on_files_is_gone_on_with(mode, every):
    result = kills.at_boundaries(mode, every)
    assert not result["wrong"]
    assert result["tried"] == result["resumed"] == result["equal"] >= 5


def test_the_comparison_sees_what_differs(tmp_path):
    for name in ("one-run", "two-run"):
        (tmp_path / name / "unet").mkdir(parents=True)
        (tmp_path / name / "unet" / "model.safetensors").write_bytes(b"weights")
        (tmp_path / name / "report.json").write_text(
            f'{{"seconds": "{name}", "where": "{tmp_path / name}", "loss": 1}}'
        )
    one, two = tmp_path / "one-run", tmp_path / "two-run"
    assert runs.differences(one, two) == []
    (two / "report.json").write_text('{"seconds": 1, "where": "elsewhere", "loss": 1}')
    (two / "unet" / "model.safetensors").write_bytes(b"Weights")
    (two / "report.draft.json").write_text("{")
    assert runs.differences(one, two) == ["report.draft.json", "report.json", "unet/model.safetensors"]
