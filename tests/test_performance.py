"""The benchmarks at tiny width."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


FOLDER = Path(__file__).parent.parent / "benchmarks"


def run(script: str, *line: str, output: Path | None = None) -> list[dict]:
    command = [sys.executable, str(FOLDER / script), *line]
    subprocess.run([*command, *(["--output", str(output)] if output else [])], check=True)
    return json.loads(output.read_text())["results"]


STEP = ["--factor", "0.1", "--latents", "8", "--rounds", "1", "--fake_score_updates", "1", "--lora_rank", "2"]


@pytest.mark.slow
def test_the_step_is_measured_against_the_baseline(tmp_path):
    line = [*STEP, "--models", "sd15", "--stages", "2", "--only", "ours"]
    (stage_2,) = run("bench_step.py", *line, output=tmp_path / "step.json")
    assert stage_2["seconds"].keys() == stage_2["speedup"].keys() == {"baseline", "ours"}
    assert all(value > 0 for value in stage_2["seconds"].values())


@pytest.mark.slow
def test_each_waste_is_switched_off_alone(tmp_path):
    rows = run("bench_step.py", *STEP, "--models", "sdxl", output=tmp_path / "step.json")
    modes = {"baseline", *(f"without {waste}" for waste in ("text", "passes", "forwards", "float64", "float32"))}
    for row in rows:
        assert modes | {"ours", "ours, adapters of rank 2"} <= row["seconds"].keys()


@pytest.mark.slow
def test_memory_is_measured_in_processes_of_their_own(tmp_path):
    line = ["--memory", "--factor", "0.1", "--latents", "8", "--steps", "1", "--fake_score_updates", "1"]
    full, adapters = run("bench_step.py", *line, "--lora_rank", "2", output=tmp_path / "memory.json")
    assert 0 < adapters["above_imports_mb"] < full["above_imports_mb"]


def test_the_pipeline_makes_what_its_parts_make(tmp_path):
    line = ["--models", "sd21", "--factor", "0.1", "--latents", "8", "--rounds", "1"]
    (row,) = run("bench_pipeline.py", *line, output=tmp_path / "pipeline.json")
    assert row["largest_difference"] < 1e-4 and row["ratio"] > 0


@pytest.mark.slow
def test_the_plan_is_measured(tmp_path):
    rows = run("bench_plan.py", "--models", "sd15", output=tmp_path / "plan.json")
    assert all(abs(row["error_to_allocated"]) < 0.02 for row in rows)
