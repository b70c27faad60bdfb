"""The quickstart's bars, as they stand in the report that it leaves. Ten minutes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_quickstart_reaches_its_bars(tmp_path):
    command = [Path(sys.executable).with_name("accelerate"), "launch", "--num_cpu_threads_per_process", "2"]
    script = ROOT / "examples" / "text_to_image" / "train_disback.py"
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    subprocess.run([*command, script, "--output_dir", tmp_path], check=True, env=environment, cwd=ROOT)
    report = json.loads((tmp_path / "report.json").read_text())
    teacher, initial, student = (report[name] for name in ("teacher", "initial", "student"))
    for name in ("shape", "colour", "background"):
        assert student[f"{name}_accuracy"] >= 0.90
    assert student["distance"] <= 0.25 * initial["distance"]
    assert student["distance"] <= 2.0 * teacher["distance"]
    assert sum(stage["seconds"] for stage in report["stages"].values()) <= 300
    assert max(stage["peak_memory_mb"] for stage in report["stages"].values()) <= 3000
