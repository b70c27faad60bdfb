"""What is uploaded to a package index: built, checked, and used in an environment that has nothing else."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from test_packaging import RELATIVE_LINK

from diffusers_disback import __version__


ROOT = Path(__file__).parent.parent
SOURCES = ["setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "MANIFEST.in", "src"]
USE = """
import sys
from pathlib import Path

import diffusers_disback
from diffusers import DiffusionPipeline
from diffusers_disback import DisBackConfig, DisBackOneStepPipeline

assert Path(diffusers_disback.__file__).is_relative_to(sys.prefix), diffusers_disback.__file__
DisBackConfig(output_dir="run")
own = DisBackOneStepPipeline.from_pretrained(sys.argv[1])("a red star", output_type="np").images
stock = DiffusionPipeline.from_pretrained(sys.argv[1])
assert stock("a red star", num_inference_steps=1, guidance_scale=0, output_type="np").images.shape == own.shape
print(diffusers_disback.__version__)
"""


def called(*command, **environment) -> str:
    """What a command prints; its end has to be a good one."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(list(map(str, command)), env=kept | environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> list[Path]:
    """The sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("release")
    (folder / "source").mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("*.egg-info"))
        else:
            shutil.copy(ROOT / name, folder / "source" / name)
    called(sys.executable, "-m", "build", "--outdir", folder / "dist", folder / "source")
    return sorted((folder / "dist").iterdir())


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """An empty virtual environment, which is removed again: most of what is installed into it is torch's."""
    folder = tmp_path_factory.mktemp("environment")
    called(sys.executable, "-m", "venv", folder)
    yield folder / "bin"
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.network
def test_wheel_and_sdist_are_as_an_index_wants_them(distributions):
    wheel, sdist = distributions
    assert wheel.name == f"diffusers_disback-{__version__}-py3-none-any.whl"
    assert sdist.name == f"diffusers_disback-{__version__}.tar.gz"
    called(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
        metadata = archive.read(f"diffusers_disback-{__version__}.dist-info/METADATA").decode()
    assert tops == {"diffusers_disback", f"diffusers_disback-{__version__}.dist-info"}
    assert "# diffusers-disback" in metadata and RELATIVE_LINK.findall(metadata) == []
    with tarfile.open(sdist) as archive:
        assert f"diffusers_disback-{__version__}/CHANGELOG.md" in archive.getnames()


@pytest.mark.slow
@pytest.mark.network
def test_the_wheel_is_used_in_an_empty_environment(distributions, environment, run, tmp_path):
    student = run(degradation_steps=2, num_path_nodes=1, max_train_steps=2, steps_per_target=1)
    called(environment / "python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", distributions[0])
    assert called(environment / "python", "-c", USE, student, HF_HUB_OFFLINE="1").strip() == __version__
    command = environment / "diffusers-disback"
    assert __version__ in called(command, "--version")
    assert "usage: diffusers-disback" in called(command, "--help")
    called(command, "half", student)
    assert list((student / "unet").glob("*.fp16.safetensors"))
    called(environment / "python", "-m", "pip", "check")
