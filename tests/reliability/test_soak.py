"""A long run's memory is flat; shorter than what `soak.py` measures."""

import pytest
import runs
import soak


@pytest.mark.slow
def test_memory_is_flat(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "WORK", tmp_path / "work")
    monkeypatch.setattr(runs, "RESULTS", tmp_path / "results")
    result = soak.measure(steps=400, settled=200)
    assert not soak.problems(result), result


@pytest.mark.slow
def test_growth_is_seen():
    rows = [
        {
            "stage": "backtracking",
            "step": step,
            "resident_mb": 500 + step / 10,
            "open_files": 8,
            "threads": 4 + (step > 900),
        }
        for step in range(20, 1001, 20)
    ]
    result = soak.growth(rows, 500)
    assert soak.problems(result) == ["memory grew by 7.6%", "threads: 4, then 5"]
