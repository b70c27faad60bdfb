import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from diffusers_disback import __version__
from diffusers_disback.cli import main
from diffusers_disback.model_reference import ModelReference
from diffusers_disback.path import DegradationPath


@pytest.fixture
def folder(tmp_path):
    start = {"name_or_path": None, "sha256": "0" * 64, "conditioning_timestep": 399}
    path = DegradationPath.create(tmp_path / "path", ModelReference("teacher"), "0" * 64, start, {})
    path.append(tiny.unet(), step=20, loss=0.25)
    return path.folder


def test_path_show(folder, capsys):
    assert main(["path", "show", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "degradation-000020" in out and "0.25" in out and "unfinished" in out


def test_path_verify(folder, capsys):
    assert main(["path", "verify", str(folder)]) == 0
    assert "node 1: degradation-000020, 208 tensors, whole" in capsys.readouterr().out
    (folder / "degradation-000020" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    assert main(["path", "verify", str(folder)]) == 1
    assert "node 1 is damaged" in capsys.readouterr().err


def test_the_console_script():
    command = Path(sys.executable).with_name("diffusers-disback")
    assert (
        subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout.strip()
        == __version__
    )
