"""The snippets of docs/after.md, as they stand there, on tiny models; and the table of its figures."""

import json
import re
import shlex
from pathlib import Path

import after
import pytest
import tiny
import torch
import train_disback
from diffusers import ControlNetModel
from PIL import Image
from script import SHORT
from test_export import changed

from diffusers_disback.commands.cli import main as command
from diffusers_disback.families import to_pipeline
from diffusers_disback.hub.publish.export import extract_lora, save_lora


ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^```(python|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SNIPPETS = FENCE.findall((ROOT / "docs" / "after.md").read_text())
PYTHON = [text for language, text in SNIPPETS if language == "python"]
BASH = [text for language, text in SNIPPETS if language == "bash"]
TINY = {
    **SHORT,
    "train_batch_size": 2,
    "num_validation_images": 1,
    "report_to": "none",
    "mixed_precision": "no",
    "fake_score_updates": 1,
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with all that the page names."""
    monkeypatch.chdir(tmp_path)
    teacher = tiny.pipeline()
    teacher.save_pretrained("my-teacher")
    to_pipeline(changed(teacher.unet, rank=2), 625, teacher).save_pretrained("outputs/my-student")
    layers = extract_lora(changed(teacher.unet, rank=2, seed=6), teacher.unet, 2)[0]
    save_lora(layers, 2, "lora", teacher.unet)[1].rename("style.safetensors")
    embedding = {"conditioning_embedding_out_channels": (8, 8)}  # this autoencoder halves an image once
    ControlNetModel.from_unet(teacher.unet, **embedding).save_pretrained("my-controlnet")
    for name in ("edges", "photo"):
        Image.new("RGB", (16, 16), "navy").save(f"{name}.png")
    for name in ("prompts", "more-prompts"):
        Path(f"{name}.txt").write_text("\n".join(tiny.PROMPTS))
    Path("examples").symlink_to(ROOT / "examples")
    Path("benchmarks").symlink_to(ROOT / "benchmarks")
    return tmp_path


def run_python(text):
    namespace = {}
    exec(compile(text, "docs/after.md", "exec"), namespace)
    return namespace


def test_the_snippets_in_python_run(place):
    seen = [run_python(text) for text in PYTHON if ".compile()" not in text]
    assert len(seen) == 4 and all(found["image"].size == (16, 16) for found in seen)
    styled, controlled, repainted, half = seen
    assert Path("outputs/my-styled-student/pipeline.py").is_file()
    assert half["pipe"].unet.dtype == torch.bfloat16
    # A ControlNet that was not trained yet changes no bit.
    pipe, arguments = controlled["pipe"], {"prompt": tiny.PROMPTS[0], "output_type": "pt"}
    own = pipe(**arguments, generator=torch.Generator().manual_seed(0)).images
    steps = {"num_inference_steps": 1, "guidance_scale": 0, "generator": torch.Generator().manual_seed(0)}
    assert torch.equal(controlled["controlled"](image=controlled["edges"], **arguments, **steps).images, own)
    # What the page says of a smaller strength.
    with pytest.raises(RuntimeError, match="0 elements"):
        repainted["repaint"](tiny.PROMPTS[0], **{**repainted["arguments"], "strength": 0.8})
    assert repainted["repaint"].scheduler.timesteps.tolist() == [625]


def test_the_tables_are_those_of_their_report():
    """Of docs/after.md and docs/exports.md."""
    report = json.loads(after.RESULTS.read_text())
    rows = [
        {cell.strip() for cell in line.split("|")}
        for name in ("after", "exports")
        for line in (ROOT / "docs" / f"{name}.md").read_text().splitlines()
    ]
    names = ("distance", "shape_accuracy", "colour_accuracy", "background_accuracy")
    measured = [report["prompts"][count] for count in ("6", "24", "96")]
    measured += [model for teacher in ("first", "second") for model in report["lora"][teacher].values()]
    wanted = [{f"{found[name]:.4g}" for name in names} for found in measured]
    wanted += [
        {", ".join(f"{value:.4g}" for value in found[of]) for of in ("prompt", "source")}
        for key, found in report["images"].items()
        if key.startswith("at ")
    ]
    for size in ("rank 4", "rank 16", "rank 64", "1280 x 11520, rank 64"):
        both = [report["svd"][f"{name}, {size}"] for name in ("exact", "fast")]
        wanted.append({f"{found['left']:.5f}" for found in both} | {f"{found['seconds']:g}" for found in both})
    for key, found in report["speed"].items():
        if "batch" in key:
            wanted.append({f"{found[name]:.3g}" for name in ("first", "median")})
    for cells in wanted:
        assert any(cells <= row for row in rows), cells


@pytest.mark.slow
def test_a_compiled_student_draws(place):
    (text,) = (text for text in PYTHON if ".compile()" in text)
    pipe = run_python(text)["pipe"]
    again = type(pipe).from_pretrained("outputs/my-student")
    arguments = {"prompt": tiny.PROMPTS[0], "output_type": "latent"}
    one, two = (p(**arguments, generator=torch.Generator().manual_seed(0)).images for p in (pipe, again))
    assert torch.allclose(one, two, atol=1e-4)


@pytest.mark.slow
def test_the_commands_run(place):
    """Those of training with a few steps."""
    seen = set()
    for line in (line for text in BASH for line in text.replace("\\\n", " ").splitlines()):
        program, *words = shlex.split(line, comments=True)
        if program == "accelerate":
            assert words[:2] == ["launch", "examples/text_to_image/train_disback.py"]
            flags = {name: value for name, value in TINY.items() if f"--{name}" not in words}
            train_disback.main([*words[2:], *(word for k, v in flags.items() for word in (f"--{k}", str(v)))])
            folder = words[words.index("--output_dir") + 1]
            assert Path(folder, "model_index.json").is_file()
            seen.add(folder)
        elif program == "diffusers-disback":
            assert command(words) == 0
        else:
            assert (program, words[0]) == ("python", "benchmarks/after.py") and words[1] in after.PARTS, line
    assert len(seen) == 2


@pytest.mark.slow
@pytest.mark.parametrize("part", after.PARTS)
def test_what_made_the_figures_runs(part, tmp_path, monkeypatch):
    figures = tmp_path / "after.json"
    monkeypatch.setattr(
        "sys.argv", ["after.py", part, "--tiny", "--work_dir", str(tmp_path), "--figures", str(figures)]
    )
    after.main()
    assert part in figures.read_text()
