"""Faults of the machine end in a clear error, and the run goes on from there; a sample of `machine_faults.py`."""

import machine_faults
import pytest
import runs


pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def notebooks(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "WORK", tmp_path / "work")
    monkeypatch.setattr(runs, "RESULTS", tmp_path / "results")


@pytest.mark.parametrize(
    "kind, every", [("disk", 3), ("operations", 6), ("deleted", 2), ("damage", 19), ("signals", 2), ("processes", 1)]
)
def test_a_fault_is_told_and_the_run_goes_on(kind, every):
    if kind == "disk" and not machine_faults.can_mount():
        pytest.skip("this process may not mount disks")
    result = machine_faults.measure("full", every, [kind])
    assert not result["wrong"]
    assert sum(count["cases"] for count in result["counts"].values()) > 0
