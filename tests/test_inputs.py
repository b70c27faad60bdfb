"""What a run is made from: looked at before anything is loaded, and the same when the run is resumed."""

import json
import os
import shutil

import pytest
import tiny

from diffusers_disback import DisBackConfig
from diffusers_disback.families import family_of
from diffusers_disback.training import checks
from diffusers_disback.training.checks import check_settings
from diffusers_disback.training.inputs import check_inputs
from diffusers_disback.training.networks import accelerator_of
from diffusers_disback.training.run_folder import INPUTS, RunFolder


# The same when a run is resumed --------------------------------------------------------------------------------------


def made_from(folder, teacher=None, start=None, prompts=tiny.PROMPTS, **training):
    """Begins both stages with these inputs, and returns how to look whether they are the same."""
    where = {} if start is None else {"generator_model_name_or_path": "a start"}
    config = DisBackConfig(output_dir=str(folder), **where, **training)
    teacher = teacher or family_of(tiny.pipeline())
    return check_inputs(config, teacher, start or teacher.network, prompts)


def changed_teacher(part):
    family = family_of(tiny.pipeline())
    if part == "tokenizer":
        family.pipeline.tokenizer.add_tokens(["turquoise"])
    elif part == "scheduler":
        family = family_of(tiny.pipeline("v_prediction"))
    else:
        next(getattr(family.pipeline, part).parameters()).data += 1e-3
    return family


def test_inputs_are_compared_by_content(tmp_path):
    settings = {"prompts_file": "prompts.txt"}
    inputs = made_from(tmp_path, start=tiny.unet(seed=3))
    assert inputs.keys() == INPUTS.keys() - {"images"}, "those are a discriminator's"
    for stage in ("degradation", "backtracking"):
        RunFolder(tmp_path).claim(stage, settings, inputs)
    assert RunFolder(tmp_path).settings() == settings, "hashes are no settings"
    assert made_from(tmp_path, start=tiny.unet(seed=3)) == inputs, "loaded anew they are the same"
    for changes, told in (
        ({"prompts": [*tiny.PROMPTS, "one more"]}, "the prompts"),
        ({"teacher": changed_teacher("unet")}, "the teacher's UNet"),
        ({"teacher": changed_teacher("text_encoder")}, "the teacher's text encoders"),
        ({"teacher": changed_teacher("tokenizer")}, "text encoders or tokenizers"),
        ({"teacher": changed_teacher("vae")}, "the autoencoder"),
        ({"teacher": changed_teacher("scheduler")}, "the teacher's scheduler"),
        ({"start": tiny.unet(seed=4)}, "the student's start"),
    ):
        with pytest.raises(ValueError, match=f"other inputs: [^;]*{told}.* changed since it began"):
            made_from(tmp_path, **{"start": tiny.unet(seed=3), **changes})
    made_from(tmp_path / "another", start=tiny.unet(seed=4))


def test_only_the_stages_that_are_asked_for_are_compared_and_older_folders_are_not(tmp_path):
    inputs = made_from(tmp_path)
    RunFolder(tmp_path).claim("degradation", {}, inputs)
    made_from(tmp_path, stage="backtrack", prompts=["others"])
    with pytest.raises(ValueError, match="holds the degradation of a run with other inputs"):
        made_from(tmp_path, stage="record", prompts=["others"])
    RunFolder(tmp_path).claim("degradation", {})
    made_from(tmp_path, stage="record", prompts=["others"])


def test_a_run_whose_prompts_were_changed_is_not_resumed(run, tmp_path, prompts_file):
    own = tmp_path / "own.txt"
    shutil.copy(prompts_file, own)
    short = {"num_path_nodes": 0, "max_train_steps": 1, "prompts_file": own}
    folder = run(**short)
    files = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    own.write_text("something else\n")
    with pytest.raises(ValueError, match="with other inputs: the prompts"):
        run(**{**short, "max_train_steps": 2}, resume_from_checkpoint="latest")
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == files
    assert "inputs" not in json.loads((folder / "report.json").read_text())["settings"]


# Before anything is loaded --------------------------------------------------------------------------------------------


def config(tmp_path, **changes):
    return DisBackConfig(**{"output_dir": str(tmp_path / "out"), **changes})


def test_folders_that_are_files_and_trackers_that_are_not_there_are_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    os.symlink("nowhere", tmp_path / "link")
    for name in ("output_dir", "cache_dir", "degradation_path"):
        for place in ("file", "file/below/it", "pipe", "link"):
            with pytest.raises(ValueError, match=f"--{name} .*{place} is no folder and cannot be made"):
                check_settings(config(tmp_path, **{name: str(tmp_path / place)}))
    check_settings(config(tmp_path, cache_dir=str(tmp_path / "new" / "folders")))
    for name, message in (
        ("wandb", "pip install wandb"),
        ("comet_ml", "pip install comet-ml"),
        ("wndb", "is none of .*wandb"),
    ):
        with pytest.raises(ValueError, match=f"--report_to '?{name}'? .*{message}"):
            check_settings(config(tmp_path, report_to=name))
    for name in ("all", "none", "tensorboard", "trackio"):
        check_settings(config(tmp_path, report_to=name))
    monkeypatch.setattr(checks, "get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(ValueError, match=r"--report_to trackio needs a package .*: `pip install trackio`"):
        check_settings(config(tmp_path, report_to="trackio"))


def test_half_precision_of_fp16_is_refused_on_a_cpu(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="--mixed_precision fp16.* needs a GPU"):
        accelerator_of(config(tmp_path, mixed_precision="fp16", report_to="none"))


def test_half_precision_of_the_launcher_is_refused_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="of `accelerate launch`, needs a GPU"):
        accelerator_of(config(tmp_path, report_to="none"))
