"""What an installed package holds."""

import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import setuptools

from diffusers_disback import __version__


ROOT = Path(__file__).parent.parent
RELATIVE_LINK = re.compile(r"\]\((?!https?:|#)[^)]*\)")
PACKAGE = ROOT / "src" / "diffusers_disback"


def files(folder: Path) -> set[str]:
    found = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return {str(file) for file in found if "__pycache__" not in file.parts}


def test_the_package_is_built_with_all_of_its_files(tmp_path):
    """`py.typed`, without which a type checker does not look at annotations, and whatever else is no module."""
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", tmp_path / "lib"]
    # The egg-info that it writes belongs to no installation.
    subprocess.run([*command, "egg_info", "--egg-base", tmp_path], cwd=ROOT, check=True, capture_output=True)
    built = files(tmp_path / "lib" / "diffusers_disback")
    assert built == files(PACKAGE) and "py.typed" in built


@pytest.fixture
def setup_script(monkeypatch):
    """What setup.py defines, and what it tells setuptools."""
    told = {}
    monkeypatch.setattr(setuptools, "setup", told.update)
    return runpy.run_path(str(ROOT / "setup.py")), told


def test_the_long_description_has_no_relative_links(setup_script):
    """An index shows it away from the repository."""
    defined, told = setup_script
    readme = (ROOT / "README.md").read_text()
    assert RELATIVE_LINK.search(readme) and RELATIVE_LINK.findall(told["long_description"]) == []
    assert RELATIVE_LINK.findall(defined["long_description"](readme, "https://example.org/us/it")) == []


def test_links_lead_to_the_repository_at_this_version(setup_script):
    absolute = setup_script[0]["long_description"]
    text, place = "[a](https://b.c/d.md) ![e](f.png)[g](h.md#k) [i](#j)", "https://example.org/us/it"
    image, page = f"![e]({place}/raw/v{__version__}/f.png)", f"[g]({place}/blob/v{__version__}/h.md#k)"
    assert absolute(text, place) == f"[a](https://b.c/d.md) {image}{page} [i](#j)"
    assert absolute(text, None) == "[a](https://b.c/d.md) g [i](#j)"


def test_the_version_is_the_same_everywhere():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^## (\S+)", changelog, re.M)[1] == __version__
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_changelog_says_where_modules_are():
    rows = re.findall(r"^  \| `([\w.]+)` \| `([\w.]+)` \|$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert len(rows) > 40
    assert [new for _, new in rows if find_spec(f"diffusers_disback.{new}") is None] == []


@pytest.mark.parametrize("script", ["text_to_image", "unconditional_image_generation"])
def test_requirements_of_the_examples_are_those_of_the_package(setup_script, script):
    told = setup_script[1]
    brings = {*told["extras_require"]["train"], *told["extras_require"]["eval"]}
    lines = set((ROOT / "examples" / script / "requirements.txt").read_text().split())
    assert brings <= lines <= {*brings, *told["install_requires"]}
