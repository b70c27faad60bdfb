"""The docs against the code."""

import argparse
import json
import re
import runpy
import sys
from pathlib import Path

import pytest

import diffusers_disback
from diffusers_disback.commands.cli import parser as cli_parser
from diffusers_disback.evaluation import EVALUATORS
from diffusers_disback.families import FAMILIES
from diffusers_disback.objectives import OBJECTIVES


ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / "examples").rglob("*.md"),
]


def test_the_api_page_has_every_public_name():
    rows = re.findall(r"^\| `(\w+)` \| `([\w.]+)` \|", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert dict(rows) == diffusers_disback._MODULE_OF_NAME and len(rows) == len(dict(rows))


def test_every_registry_is_documented():
    method, evaluation = ((ROOT / "docs" / f"{name}.md").read_text() for name in ("method", "evaluation"))
    assert all(f"`{name}`" in method for name in OBJECTIVES)
    assert all(f"`{cls.__name__}`" in evaluation for cls in EVALUATORS.values())
    readme = (ROOT / "README.md").read_text()
    assert all(name in readme for family in FAMILIES.values() for name in family.pipeline_classes)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def cli_flags() -> set[str]:
    """The flags of all subcommands."""
    parsers, flags = [cli_parser()], set()
    while parsers:
        for action in parsers.pop()._actions:
            flags |= {option.lstrip("-") for option in action.option_strings}
            parsers += list(action.choices.values()) if isinstance(action, argparse._SubParsersAction) else []
    return flags


def test_flags_in_the_docs_exist():
    import train_disback

    text = " ".join(page.read_text() for page in PAGES if "teacher" not in page.parts)  # whose measurer has its own
    known = {"config", *train_disback.DisBackConfig.__dataclass_fields__}
    known |= cli_flags()
    for script in (file for name in ("benchmarks", "examples", "tests") for file in (ROOT / name).rglob("*.py")):
        known |= set(re.findall(r'add_argument\(\s*"--(\w+)"', script.read_text()))
    others = {
        "num_cpu_threads_per_process",
        "num_processes",
        "index-url",
        "output",
        "version",
        "mixed_precision",
        "multi_gpu",
        "quiet",
        *("config_file", "machine_rank", "fsdp_version", "fsdp_offload_params", "use_fsdp"),  # of accelerate
        *("standalone", "nproc_per_node"),  # of torchrun
        *("env", "flavor", "secrets", "timeout", "volume", "help"),  # of hf
        *("task", "report", "walk"),  # of the benchmark
    }
    for flag in set(re.findall(r"--([a-z0-9][a-z0-9_-]+)", text)) - others:
        assert flag in known or flag in ("num_images", "output_dir"), flag


def test_the_table_of_teachers_is_that_of_its_report():
    page = (ROOT / "docs" / "teachers.md").read_text()
    for name, run in json.loads((ROOT / "docs" / "teachers_report.json").read_text()).items():
        distances = [run[model]["distance"] for model in ("teacher", "initial", "student")]
        factor = distances[1] / distances[2]
        cells = [*(f"{distance:.4g}" for distance in distances), f"{factor:.2f}"]
        assert f"| {name} | {' | '.join(cells)} |" in page and factor >= 2


def test_the_table_of_a_comparison_is_that_of_its_report():
    page = (ROOT / "docs" / "evaluate.md").read_text()
    report = json.loads((ROOT / "docs" / "evaluate_report.json").read_text())
    for name, model in report["models"].items():
        (row,) = (line for line in page.splitlines() if line.startswith(f"| {name} "))
        for metric, value in model["measures"].items():
            assert f"{value:.4g}" in row.replace("*", ""), metric
        for low, high in model["intervals"].values():
            assert f"± {(high - low) / 2:.2g} " in row


@pytest.mark.slow
def test_the_toy_finds_its_way_back(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["disback_2d.py", "--output", str(tmp_path / "toy.png")])
    runpy.run_path(str(ROOT / "examples" / "toy" / "disback_2d.py"), run_name="__main__")
    distances = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    data, teacher, initial, *nodes_and_phases = distances
    first, second, third, *phases = nodes_and_phases
    assert data == 0 and teacher < first < second < third < initial, "the path leads from the teacher to the student"
    assert phases[-1] < 0.2 * initial
    assert (tmp_path / "toy.png").stat().st_size > 10_000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_table_has_a_header(page):
    """A blank line within a table ends it: what follows is shown as text."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    lines = ["", *text.splitlines(), ""]
    for before, line, after in zip(lines[:-2], lines[1:-1], lines[2:], strict=True):
        if line.startswith("|") and not before.strip():
            assert re.fullmatch(r"\|( *:?-+:? *\|)+", after.strip()), line
