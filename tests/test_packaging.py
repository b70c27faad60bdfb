"""What an installed package holds."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from diffusers_disback import __version__


ROOT = Path(__file__).parent.parent
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


def test_the_version_is_the_same_everywhere():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(r"^## (\S+)", changelog, re.M)[1] == __version__
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_changelog_says_where_modules_are():
    rows = re.findall(r"^  \| `([\w.]+)` \| `([\w.]+)` \|$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert len(rows) > 40
    assert [new for _, new in rows if find_spec(f"diffusers_disback.{new}") is None] == []
