import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from diffusers_disback import __version__
from diffusers_disback.cli import main


@pytest.fixture
def path(tmp_path, teacher_folder):
    return tiny.path(tmp_path / "path", teacher_folder)


def test_path_show(path, capsys):
    assert main(["path", "show", str(path.folder), "--table"]) == 0
    out = capsys.readouterr().out
    assert "degradation-000100" in out and "0.5" in out and "complete" in out
    assert not (path.folder.parent / "path.png").exists()


def test_path_verify(path, capsys):
    assert main(["path", "verify", str(path.folder)]) == 0
    assert "node 1: degradation-000100, 208 tensors, whole, and fits the teacher" in capsys.readouterr().out
    (path.node_folder(1) / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    assert main(["path", "verify", str(path.folder)]) == 1
    assert "node 1 is damaged" in capsys.readouterr().err


def test_a_path_of_another_architecture_does_not_verify(path, capsys, tmp_path):
    tiny.pipeline(block_out_channels=(8, 24)).save_pretrained(tmp_path / "other")
    line = ["path", "verify", str(path.folder), "--pretrained_model_name_or_path", str(tmp_path / "other")]
    assert main(line) == 1
    assert "does not fit" in capsys.readouterr().err


def test_the_console_script():
    command = Path(sys.executable).with_name("diffusers-disback")
    assert (
        subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout.strip()
        == __version__
    )
