"""What `diffusers-disback info` says of folders, files and repositories, and that it downloads no weights."""

import json
import subprocess
import sys

import tiny
import torch
from safetensors.torch import save_file

from diffusers_disback.commands.cli import main
from diffusers_disback.hub.repository import Repository


def told(capsys, *line: str, code: int = 0) -> str:
    assert main(["info", *line]) == code, capsys.readouterr().err
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.err


def test_a_run_its_student_and_its_path_here_and_on_the_hub(run, teacher_folder, capsys, hub, repo):
    folder = run()
    capsys.readouterr()
    said = told(capsys, str(folder))
    assert [line for line in said.splitlines() if line and line[0] != " "] == [
        "A training run that is finished",
        "A one-step student of teacher",
        "A one-step student, as a pipeline",
        "A degradation path of 2 nodes",
    ]
    settings = json.loads((folder / "report.json").read_text())["settings"]
    assert f"  conditioning timestep: {settings['conditioning_timestep']}\n" in said
    assert f'  load it: DiffusionPipeline.from_pretrained("{folder}")\n' in said
    assert "  call it: pipe(" in said and "num_inference_steps=1, guidance_scale=0)\n" in said
    assert "  drift_mean: " in said and "M parameters in F32\n" in said
    assert main(["push", str(folder), repo, "--pretrained_model_name_or_path", str(teacher_folder)]) == 0
    capsys.readouterr()
    hub.requests.clear()
    online = told(capsys, repo)
    assert "A one-step student, as a pipeline" in online and f'from_pretrained("{repo}")' in online
    assert "A degradation path of 2 nodes" in online and "training run" not in online
    assert next(line for line in said.splitlines() if "unet:" in line) in online, "read from the header there, too"
    weights = [request.path for request in hub.requests if request.path.endswith(".safetensors")]
    assert len(weights) == 1 and weights[0].endswith("unet/diffusion_pytorch_model.safetensors"), "its header alone"
    (folder / "report.json").unlink()
    assert "A training run that is not finished" in told(capsys, str(folder))


def test_a_teacher_and_what_cannot_be_one(tmp_path, teacher_folder, capsys):
    said = told(capsys, str(teacher_folder))
    assert said.startswith("A teacher\n  pipeline: StableDiffusionPipeline\n  family: stable_diffusion\n")
    assert "  prediction: epsilon\n  schedule: DDPMScheduler, num_train_timesteps 1000" in said
    assert f"--pretrained_model_name_or_path {teacher_folder} " in said
    index = {"_class_name": "FluxPipeline", "vae": ["diffusers", "AutoencoderKL"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert told(capsys, str(tmp_path)).startswith("A FluxPipeline, which is of no family that can be distilled here")


def test_a_lora_and_what_is_none(tmp_path, capsys):
    layers = {f"unet.a.lora_{name}.weight": torch.zeros(*shape) for name, shape in {"A": (4, 8), "B": (6, 4)}.items()}
    (tmp_path / "lora").mkdir()
    file = tmp_path / "lora" / "pytorch_lora_weights.safetensors"
    save_file(layers, file)
    for place in (file, file.parent, tmp_path):
        said = told(capsys, str(place))
        assert (
            said.startswith("A LoRA (") and "  layers: 1\n  rank: 4\n  weights: 5.6e-05 M parameters in F32\n" in said
        )
    assert "  of: unet\n" in said
    save_file({"lora_unet_a.lora_down.weight": torch.zeros(4, 8)}, file)
    assert "  of: unet\n" in told(capsys, str(file))
    file.unlink()
    (tmp_path / "photo.png").write_bytes(b"")
    said = told(capsys, str(tmp_path), code=2)
    assert "is no pipeline, path, LoRA or training run of this library. It holds photo.png.\n" in said
    assert "is no folder or file, and no name of a repository" in told(capsys, "./nothing", code=2)
    assert told(capsys, "", code=2).startswith("diffusers-disback: '' is no folder or file")


def test_names_of_others_do_not_leave_the_folder_nor_command_the_terminal(tmp_path, teacher_folder, capsys):
    path = tiny.path(tmp_path / "path", teacher_folder)
    file = path.folder / "path.json"
    manifest = json.loads(file.read_text())
    manifest["teacher"]["name_or_path"] = "\x1b]0;title\x07\n"
    file.write_text(json.dumps(manifest))
    said = told(capsys, str(path.folder))
    assert r"  teacher: \x1b]0;title\x07\n" + "\n" in said and said.replace("\n", "").isprintable()
    outside = tmp_path / "outside.json"
    file.rename(outside)
    file.symlink_to(outside)
    assert "a link that leads out of its folder" in told(capsys, str(path.folder), code=2)


def test_a_header_on_the_hub_that_is_none_is_told(hub, repo, capsys):
    from huggingface_hub import HfApi

    Repository(repo).create()
    bad = b'{"lora_A": {"dtype": "F32", "shape": ["x", 3], "data_offsets": [0, 1]}}'
    for content in (b"", b"\xff" * 16, b"\x02" + b"\x00" * 7 + b"[]", len(bad).to_bytes(8, "little") + bad):
        HfApi().upload_file(path_or_fileobj=content, path_in_repo="pytorch_lora_weights.safetensors", repo_id=repo)
        assert "pytorch_lora_weights.safetensors of " in told(capsys, repo, code=2)


def test_an_error_is_one_line_whatever_libraries_say_on_their_import(tmp_path):
    """transformers and bitsandbytes warn of optional packages."""
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    command = [sys.executable, "-m", "diffusers_disback.commands.cli", "info", "broken"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("diffusers-disback: "), done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
