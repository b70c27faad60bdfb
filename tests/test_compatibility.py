"""What is written loads under older libraries. Makes a second virtual environment, for which it downloads them."""

import os
import site
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from script import SCRIPT

from diffusers_disback import DisBackOneStepPipeline


OLDER = ["diffusers==0.35.2", "transformers==4.57.1", "huggingface-hub==0.36.0", "tokenizers==0.22.1"]
PROMPT = "a red circle on a navy background"

LOAD = """
import sys
import diffusers, huggingface_hub, torch, transformers
from diffusers import DiffusionPipeline
from safetensors.torch import save_file

versions = [diffusers.__version__, transformers.__version__, huggingface_hub.__version__]
assert versions == ["0.35.2", "4.57.1", "0.36.0"], versions
repo, prompt, file, node = sys.argv[1:]
call = {"output_type": "pt", "generator": torch.Generator().manual_seed(0)}
student = DiffusionPipeline.from_pretrained(repo)
images = {"stock": student(prompt, num_inference_steps=1, guidance_scale=0, **call).images}
call["generator"].manual_seed(0)
own = DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo, trust_remote_code=True)
images["own"] = own(prompt, **call).images
call["generator"].manual_seed(0)
degraded = DiffusionPipeline.from_pretrained(repo, revision=node)
images["node"] = degraded(prompt, num_inference_steps=3, guidance_scale=2.0, **call).images
save_file({name: image.contiguous() for name, image in images.items()}, file)
"""


@pytest.fixture
def older_python(tmp_path):
    """A virtual environment with older libraries in front of this one's others (torch above all)."""
    environment = tmp_path / "older"
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    python = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *OLDER], check=True)
    (folder,) = environment.glob("lib/python*/site-packages")
    (folder / "behind.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return python


@pytest.mark.slow
@pytest.mark.network
def test_older_libraries_draw_the_same(older_python, repo, hub, tmp_path):
    """From the shapes teacher, whose text encoder is stored as both generations of transformers read it."""
    import train_disback

    shapes = SCRIPT.parent / "shapes"
    line = {
        "pretrained_model_name_or_path": shapes / "teacher",
        "prompts_file": shapes / "prompts.txt",
        "output_dir": tmp_path / "run",
        "degradation_steps": 2,
        "degradation_stop": 0.0,
        "num_path_nodes": 1,
        "max_train_steps": 2,
        "steps_per_target": 1,
        "fake_score_learning_rate": 1e-5,
        "generator_learning_rate": 1e-5,
        "train_batch_size": 2,
        "lr_warmup_steps": 0,
        "report_to": "none",
        "hub_model_id": repo,
    }
    train_disback.main(
        [*(word for name, value in line.items() for word in (f"--{name}", str(value))), "--push_to_hub"]
    )
    node = "degradation-000002"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    command = [older_python, "-c", LOAD, repo, PROMPT, tmp_path / "images.safetensors", node]
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "newly initialized" not in done.stderr, (
        "a text encoder whose keys do not fit is random, with a warning only"
    )
    images = load_file(tmp_path / "images.safetensors")
    pipe = DisBackOneStepPipeline.from_pretrained(repo)
    own = pipe(PROMPT, output_type="pt", generator=torch.Generator().manual_seed(0)).images
    assert torch.allclose(images["stock"], own, atol=1e-5) and torch.allclose(images["own"], own, atol=1e-5)
    from diffusers import DiffusionPipeline

    degraded = DiffusionPipeline.from_pretrained(repo, revision=node)
    drawn = degraded(
        PROMPT, num_inference_steps=3, guidance_scale=2.0, output_type="pt", generator=torch.Generator().manual_seed(0)
    ).images
    assert torch.allclose(images["node"], drawn, atol=1e-5)
