"""The oldest versions that setup.py admits. Makes a second virtual environment, of 6 GB, for which it downloads them."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement


ROOT = Path(__file__).parent.parent
# The mathematics, the networks, files, adapters and the Hub: what other libraries have a say in.
TESTS = [
    *("losses", "score_model", "noise_schedule", "generator", "adapters", "path", "pipeline", "families", "data"),
    *("single_file", "teacher_lora", "export", "evaluation", "sharing", "published"),
]


@pytest.fixture
def oldest(monkeypatch) -> list[str]:
    """Every requirement of setup.py at its minimum, where it has one."""
    said = {}
    monkeypatch.setattr(setuptools, "setup", said.update)
    runpy.run_path(str(ROOT / "setup.py"))
    wanted = [Requirement(line) for line in (*said["install_requires"], *said["extras_require"]["dev"])]
    found = {}
    for requirement in wanted:
        minimum = [each.version for each in requirement.specifier if each.operator == ">="]
        found[requirement.name] = f"{requirement.name}=={minimum[0]}" if minimum else requirement.name
    return [*found.values()]


@pytest.fixture
def environment(tmp_path):
    """A virtual environment, which is removed again: most of it is torch's."""
    folder = tmp_path / "oldest"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.network
def test_the_oldest_versions_can_be_installed_together_and_do(oldest, environment):
    python = environment / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", *oldest]
    done = subprocess.run(install, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    command = [python, "-m", "pytest", "-q", *(f"tests/test_{name}.py" for name in TESTS)]
    path = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    ran = subprocess.run(command, cwd=ROOT, env=path, capture_output=True, text=True)
    assert ran.returncode == 0, f"{' '.join(oldest)}\n{ran.stdout[-3000:]}"
