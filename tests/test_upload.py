"""Runs of the training script with a Hub: what is pushed while it goes on and at its end, and what is replayed."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from hub_server import Fault
from huggingface_hub import ModelCard, scan_cache_dir
from script import arguments, student
from stages import equal, interrupted_at
from test_sharing import main_and_nodes

from diffusers_disback import DegradationPath, DisBackOneStepPipeline
from diffusers_disback.commands.cli import main as command
from diffusers_disback.degradation import DegradationRecorder
from diffusers_disback.hub.publish.background import RunUpload
from diffusers_disback.hub.repository import HubError, Repository
from diffusers_disback.training.config import TrainingConfig


def without_cache():
    """What a download left is gone."""
    for found in scan_cache_dir().repos:
        shutil.rmtree(found.repo_path)


# A run and its repository -------------------------------------------------------------------------------------------


def test_a_run_is_pushed_and_its_path_replayed_from_the_hub(run, repo, hub, capsys, tmp_path):
    """Record, push, delete everything local, replay from the Hub, distil: the same student, bit for bit."""
    first = run("first", push_to_hub=True, hub_model_id=repo)
    assert f"pushed to {hub.url}/{repo}" in capsys.readouterr().out
    expected = student(first)
    files = hub.files(repo)
    assert (
        files["unet/diffusion_pytorch_model.safetensors"]
        == (first / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    )
    assert {"model_index.json", "pipeline.py", "path.json", "report.json", "README.md", "samples.png"} <= files.keys()
    assert {"convergence.png", "path.png", "scheduler/scheduler_config.json"} <= files.keys()
    assert not [name for name in files if re.search("checkpoint|optimizer|settings|logs", name)]
    assert sorted(hub.repos[repo].branches) == ["degradation-000002", "degradation-000004", "main"]
    shutil.rmtree(first)
    without_cache()
    commit = hub.repos[repo].branches["main"]
    second = run("second", stage="backtrack", degradation_path=repo, degradation_path_revision=commit)
    assert equal(student(second), expected)
    report = json.loads((second / "report.json").read_text())
    assert report["path"]["repo_id"] == repo and report["path"]["commit"] == hub.repos[repo].branches["main"]
    assert [wait["node"] for wait in report["waits"]] == [1, 0]
    assert (second / "path.png").is_file() and not (second / "path").exists()
    assert f"degradation path of [{repo}]" in (second / "README.md").read_text()
    without_cache()
    third = run("third", degradation_path=repo, path_disk_budget_gb=1.0)  # --stage all replays it, too
    assert equal(student(third), expected) and not (third / "path.png").exists()


def test_a_student_of_a_shared_path_names_it(run, repo, hub, capsys):
    run("first", stage="record", push_to_hub=True, hub_model_id=repo)
    own = f"{repo}-student"
    run("second", stage="backtrack", degradation_path=repo, push_to_hub=True, hub_model_id=own)
    assert sorted(hub.repos[own].branches) == ["main"] and "path.json" not in hub.files(own)
    assert json.loads(hub.files(own)["report.json"])["path"]["repo_id"] == repo
    run("third", stage="record", push_to_hub=True, hub_model_id=f"{repo}-2")  # the same settings, another recording
    before = hub.snapshot(own)
    run("fourth", stage="backtrack", degradation_path=f"{repo}-2", push_to_hub=True, hub_model_id=own)
    assert "holds the student of another run: its path is" in capsys.readouterr().err and hub.snapshot(own) == before


def test_a_recording_is_pushed_with_a_card_of_its_own_and_then_joined_by_a_student(run, repo, hub):
    run(stage="record", push_to_hub=True, hub_model_id=repo)
    files = hub.files(repo)
    assert sorted(files) == [".gitattributes", "README.md", "path.json", "path.png"]
    assert "degradation-000002" in files["README.md"].decode()
    folder = run(stage="backtrack", push_to_hub=True, hub_model_id=repo)
    assert "# How it was made" in hub.files(repo)["README.md"].decode()
    assert (
        hub.files(repo)["unet/diffusion_pytorch_model.safetensors"]
        == (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    )
    assert len(DegradationPath.from_pretrained(repo)) == 2


def test_a_repository_by_default_has_the_folders_name(run, hub, alice, tmp_path):
    run("my-student", push_to_hub=True, hub_private_repo=True, num_path_nodes=0)
    assert hub.repos["alice/my-student"].private
    assert "path.json" not in hub.files("alice/my-student")


def test_a_path_that_was_left_empty_is_none(run, repo, hub, capsys):
    """From a teacher's copy stage 1 ends with its first look, and the student is that of a run without a path."""
    auto = {
        "num_path_nodes": "auto",
        "push_to_hub": True,
        "hub_model_id": repo,
        "max_train_steps": 4,
        "steps_per_target": 1,
    }
    folder = run("auto", **auto)
    assert "there will be no path" in capsys.readouterr().err
    report = json.loads((folder / "report.json").read_text())
    assert report["path"] is None and report["settings"]["num_path_nodes"] == "auto"
    assert list(hub.repos[repo].branches) == ["main"] and "path.json" not in hub.files(repo)
    assert equal(student(folder), student(run("none", num_path_nodes=0, steps_per_target=1)))
    run("auto", **auto | {"max_train_steps": 6}, resume_from_checkpoint="latest")
    assert "was left empty: the start is near the teacher" in capsys.readouterr().out
    run("recorded", stage="record", num_path_nodes="auto")
    assert command(["push", f"{run.folder}/recorded", repo]) == 2
    assert "holds neither a finished student nor a degradation path" in capsys.readouterr().err


@pytest.mark.slow
def test_the_student_of_another_run_is_not_overwritten(run, repo, hub, capsys, impatient):
    run("first", push_to_hub=True, hub_model_id=repo)
    before = hub.snapshot(repo)
    same_path = {"stage": "backtrack", "degradation_path": f"{run.folder}/first/path"}
    run("second", push_to_hub=True, hub_model_id=repo, guidance_scale=2.0, **same_path)
    captured = capsys.readouterr()
    assert "holds the student of another run: its guidance_scale is 8.0, this one's is 2.0" in captured.err
    assert "not pushed; push it later with diffusers-disback push" in captured.out
    assert hub.snapshot(repo) == before
    run("third", push_to_hub=True, hub_model_id=repo, num_path_nodes=0)
    assert "holds the student of another run: its num_path_nodes is 2, this one's is 0" in capsys.readouterr().err
    run("fourth", push_to_hub=True, hub_model_id=repo)  # the same settings, recorded once more
    assert "holds another degradation path: its id is" in capsys.readouterr().err
    assert hub.snapshot(repo) == before
    Repository("alice/lora").create()
    Repository("alice/lora").commit({"adapter_config.json": b"{}", "unet/mine.bin": b"mine"}, "Mine")
    assert command(["push", f"{run.folder}/third", "alice/lora"]) == 2
    assert "alice/lora holds adapter_config.json, unet/mine.bin, which this run did not" in capsys.readouterr().err


def test_a_longer_run_takes_its_own_place(run, repo, hub):
    run(push_to_hub=True, hub_model_id=repo, checkpointing_steps=2)
    longer = run(push_to_hub=True, hub_model_id=repo, max_train_steps=6, resume_from_checkpoint="latest")
    weights = (longer / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert hub.files(repo)["unet/diffusion_pytorch_model.safetensors"] == weights


def test_a_finished_run_can_be_pushed_by_running_it_again(run, repo, hub, capsys):
    run()
    run(push_to_hub=True, hub_model_id=repo, resume_from_checkpoint="latest")
    assert "is finished" in capsys.readouterr().out and "model_index.json" in hub.files(repo)


# What others load ---------------------------------------------------------------------------------------------------


STRANGER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "diffusers_disback":
            raise ImportError("not installed here")

sys.meta_path.insert(0, Blocker())
import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
repo, prompt, file = sys.argv[1:]
call = {"num_inference_steps": 1, "guidance_scale": 0, "output_type": "pt"}
images = []
for cls in (DiffusionPipeline, AutoPipelineForText2Image):
    pipe = cls.from_pretrained(repo)
    images.append(pipe(prompt, generator=torch.Generator().manual_seed(0), **call).images)
pipe = DiffusionPipeline.from_pretrained(repo, custom_pipeline=repo, trust_remote_code=True)
images.append(pipe(prompt, generator=torch.Generator().manual_seed(0), output_type="pt").images)
from safetensors.torch import save_file
save_file({str(i): image.contiguous() for i, image in enumerate(images)}, file)
assert not any(name.startswith("diffusers_disback") for name in sys.modules)
"""


def test_a_stranger_without_this_package_draws_the_same(run, repo, hub, tmp_path):
    from safetensors.torch import load_file

    folder = run(push_to_hub=True, hub_model_id=repo)
    shutil.rmtree(folder)
    line = [sys.executable, "-c", STRANGER, repo, tiny.PROMPTS[0], tmp_path / "images.safetensors"]
    home = tmp_path / "home"  # an empty cache
    done = subprocess.run(
        list(map(str, line)), env={**os.environ, "HF_HOME": str(home)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    without_cache()
    pipe = DisBackOneStepPipeline.from_pretrained(repo)
    own = pipe(tiny.PROMPTS[0], generator=torch.Generator().manual_seed(0), output_type="pt").images
    images = load_file(tmp_path / "images.safetensors")
    assert len(images) == 3 and all(torch.equal(own, image) for image in images.values())


def test_the_card_is_valid_and_its_snippets_run_from_the_hub(run, repo, hub):
    folder = run(push_to_hub=True, hub_model_id=repo)
    shutil.rmtree(folder)
    without_cache()
    card = ModelCard.load(repo)
    card.validate()
    (result, *others) = card.data.eval_results
    assert result.task_type == "text-to-image" and result.dataset_name == "Prompts of the run"
    assert card.data.model_name == repo.split("/")[1] and card.data.library_name == "diffusers"
    assert card.data.pipeline_tag == "text-to-image" and {"disback", "one-step"} <= set(card.data.tags)
    assert str(folder) not in card.text.split("```bash")[0], "the repository has taken the folder's place"
    for needed in ("## Licence", "## Limits", "Seed: 0", "peak_memory_mb", "carbon", "bibtex", "torch 2."):
        assert needed in card.text, needed
    snippets = card.text.split("```python")[1:]
    assert len(snippets) == 3
    for snippet in snippets:
        scope = {}
        exec(snippet.split("```")[0], scope)
        assert scope["image"].size == (16, 16)


def test_the_card_of_a_path_is_valid_and_its_snippets_run(
    run, repo, hub, capsys, tmp_path, teacher_folder, monkeypatch
):
    folder = run(stage="record", push_to_hub=True, hub_model_id=repo)
    shutil.rmtree(folder)
    without_cache()
    card = ModelCard.load(repo)
    card.validate()
    assert "degradation-path" in card.data.tags and "not pushed" not in card.text
    snippets = card.text.split("```python")[1:]
    assert len(snippets) == 2
    for snippet in snippets:
        exec(snippet.split("```")[0].replace("num_inference_steps=25", "num_inference_steps=2"), {})
    monkeypatch.chdir(tmp_path)
    Path("teacher").symlink_to(teacher_folder)  # a folder's name alone is published
    lines = [line.split() for line in card.text.split("```bash")[2].split("```")[0].strip().splitlines()]
    assert [line[:-1] for line in lines] == [
        ["diffusers-disback", "path", "show"],
        ["diffusers-disback", "path", "verify"],
        ["diffusers-disback", "pull", repo],
    ]
    for line in lines:
        assert command([*line[1:], *(["--num_inference_steps", "2"] if "show" in line else [])]) == 0
    assert (tmp_path / "path.png").is_file() and (tmp_path / "my-path" / "path.json").is_file()


def test_the_teachers_licence_is_taken_over(run, repo, hub, tmp_path, teacher_folder):
    """A teacher on the Hub, with conditions."""
    text = "---\nlicense: other\nlicense_name: house-rules\nlicense_link: LICENSE.md\n---\n# A teacher\n"
    target = Repository("alice/teacher")
    target.create()
    files = {f.relative_to(teacher_folder).as_posix(): f for f in teacher_folder.rglob("*") if f.is_file()}
    target.commit({**files, "README.md": text.encode(), "LICENSE.md": b"No cats."}, "A teacher")
    folder = run(pretrained_model_name_or_path="alice/teacher", push_to_hub=True, hub_model_id=repo)
    card = ModelCard.load(repo)
    card.validate()
    assert (card.data.license, card.data.license_name, card.data.license_link) == (
        "other",
        "house-rules",
        "LICENSE.md",
    )
    assert card.data.base_model == "alice/teacher" and card.data.base_model_relation == "finetune"
    assert "declares the licence `house-rules` ([text](LICENSE.md))" in card.text
    assert hub.files(repo)["LICENSE.md"] == hub.files(repo, "degradation-000002")["LICENSE.md"] == b"No cats."
    manifest = json.loads((folder / "path" / "path.json").read_text())
    assert manifest["teacher"]["commit"] == hub.repos["alice/teacher"].branches["main"]


# Training goes on, whatever the Hub does ----------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [3.0, pytest.param(30.0, marks=pytest.mark.slow)])
def test_no_step_waits_for_a_hub_that_stalls(run, repo, hub, monkeypatch, seconds):
    """Each request takes seconds; no step does. What was recorded arrives in the end."""
    times, step = [], DegradationRecorder.train_step

    def timed(self, *arguments):
        times.append(time.monotonic())
        return step(self, *arguments)

    def stalls(request):
        if len(times) < 4 and request.changes:
            stalled.append(request.path)
            return Fault(seconds=seconds)

    stalled = []
    monkeypatch.setattr(DegradationRecorder, "train_step", timed)
    hub.fault = stalls
    run(stage="record", push_to_hub=True, hub_model_id=repo, num_path_nodes=4)
    assert stalled and max(after - before for before, after in zip(times[:-1], times[1:], strict=True)) < 2.0
    assert len(DegradationPath.from_pretrained(repo)) == 4


def test_nodes_arrive_while_stage_1_goes_on(run, repo, hub, monkeypatch):
    """A recording that is broken off after its first node has left it on the Hub; resumed, it joins the same repository."""
    monkeypatch.setattr(DegradationRecorder, "train_step", interrupted_at(3, DegradationRecorder.train_step))
    pushed = threading.Event()
    monkeypatch.setattr(
        DegradationRecorder, "check_finite", lambda self: pushed.wait(0.5) if self.path.nodes else None
    )
    with pytest.raises(KeyboardInterrupt):
        run(stage="record", push_to_hub=True, hub_model_id=repo, checkpointing_steps=1, logging_steps=1)
    for _ in range(100):
        if hub.repos[repo].branches.keys() >= {"degradation-000002"}:
            break
        time.sleep(0.05)
    assert "degradation-000002" in hub.repos[repo].branches
    monkeypatch.undo()
    monkeypatch.setenv("HF_TOKEN", next(iter(hub.tokens)))
    run(stage="record", push_to_hub=True, hub_model_id=repo, checkpointing_steps=1, resume_from_checkpoint="latest")
    DegradationPath.from_pretrained(repo).verify(tiny.unet())


@pytest.mark.parametrize(
    "fault, message",
    [
        (Fault(lost="before"), "The Hub cannot be reached for"),
        (Fault(status=500), "The Hub cannot serve .* now .status 500."),
        (Fault(status=429), "The Hub cannot serve .* now .status 429."),
        (Fault(status=401), "the token has expired or is missing"),
        (Fault(status=403), "This token has no right to do this with"),
    ],
    ids=["unreachable", "500", "429", "401", "403"],
)
def test_training_does_not_die_of_the_hub(run, repo, hub, impatient, capsys, fault, message):
    """One clear message, everything on disk, and a command that pushes it later to the same result."""
    # As the real one: a page in HTML, and a number that no other request has.
    hub.fault = lambda request: replace(fault, headers={"X-Request-Id": f"{request.number}"}, body=b"<html>")
    folder = run(push_to_hub=True, hub_model_id=repo, hub_private_repo=True)
    hub.fault = None
    captured = capsys.readouterr()
    told = [line for line in captured.err.splitlines() if "Nothing is lost, but the Hub does not have it" in line]
    assert len(told) == 1 and re.search(message, told[0]), told
    assert repo not in hub.repos
    line = re.search(r"not pushed; push it later with diffusers-disback (.*)", captured.out)[1]
    assert line == f"push {folder} {repo} --private"
    assert command(line.split()) == 0
    assert hub.repos[repo].private
    later = main_and_nodes(hub, repo)
    hub.repos.clear()
    assert command(line.split()) == 0 and main_and_nodes(hub, repo) == later


def test_a_token_is_written_nowhere(run, hub, monkeypatch, tmp_path, capfd, caplog):
    token = hub.add_user("alice")
    caplog.set_level(logging.DEBUG)
    common = {"push_to_hub": True, "hub_token": token, "hub_model_id": "alice/secret", "hub_private_repo": True}
    run("run", **common, report_to="tensorboard")
    short = {"num_path_nodes": 0, "max_train_steps": 2, "push_to_hub": True, "hub_model_id": "alice/secret2"}
    run("dashes", **short, **{"hub-token": token})
    run("equals", **short, **{f"hub-token={token}": True}, resume_from_checkpoint="latest")
    without_cache()
    run("again", stage="backtrack", degradation_path="alice/secret", hub_token=token)  # which is private
    hub.fault = lambda request: Fault(status=403)
    run("refused", **common)
    hub.fault = None
    captured = capfd.readouterr()
    assert "push it later" in captured.out
    places = [captured.out.encode(), captured.err.encode(), caplog.text.encode(), *hub.blobs.values()]
    places += [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert len(places) > 100 and not any(token.encode() in place for place in places)
    with pytest.raises(ValueError, match="--hub_token together with --report_to wandb is refused"):
        run("other", **common, report_to="wandb")


def test_bad_names_and_flags_are_told_before_anything_is_loaded(run, tmp_path, alice):
    for changes, message in [
        ({"push_to_hub": True, "hub_model_id": "a/b/c"}, "'a/b/c' is no name of a repository"),
        ({"hub_model_id": "alice/x"}, "nothing is pushed without --push_to_hub"),
        ({"path_disk_budget_gb": 3}, "--path_disk_budget_gb is for a path on the Hub, but --degradation_path is None"),
        ({"degradation_path_revision": "v1"}, "--degradation_path_revision is for a path on the Hub"),
        (
            {"stage": "record", "degradation_path": "alice/x"},
            "--stage record writes a path into a folder. Write ./alice/x",
        ),
        ({"degradation_path": "alice/nowhere"}, "The Hub knows no alice/nowhere for this token"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(**changes)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="cannot be loaded"):
        run(push_to_hub=True, hub_model_id="alice/x", pretrained_model_name_or_path="nowhere/at-all")
    assert not alice.repos


def test_a_shared_path_of_another_teacher_or_start_or_an_unfinished_one(run, repo, hub, tmp_path):
    run("first", stage="record", push_to_hub=True, hub_model_id=repo)
    other = tiny.save_teacher(tmp_path / "other", seed=7)
    shared = {"stage": "backtrack", "degradation_path": repo}
    with pytest.raises(ValueError, match=f"The path in {repo} was recorded from another teacher"):
        run("b", **shared, pretrained_model_name_or_path=other)
    with pytest.raises(ValueError, match="another initial generator: its sha256"):
        run("b", **shared, generator_model_name_or_path=other)
    with pytest.raises(ValueError, match="its conditioning_timestep is 625, this one's is 249"):
        run("b", **shared, conditioning_timestep=249)
    with pytest.raises(ValueError, match="--max_train_steps 4 is less than 2 targets x --steps_per_target 3"):
        run("b", **shared, steps_per_target=3)
    manifest = json.loads(hub.files(repo)["path.json"])
    Repository(repo).commit({"path.json": json.dumps({**manifest, "complete": False}).encode()}, "Unfinished")
    with pytest.raises(ValueError, match=f"The path of {repo} is unfinished: 2 nodes are published"):
        run("b", **shared)
    assert not (tmp_path / "b").exists()


def test_a_node_that_cannot_be_had_stops_the_run_and_resuming_goes_on(run, repo, hub, impatient, monkeypatch):
    three = {"num_path_nodes": 3, "max_train_steps": 6, "checkpointing_steps": 1}
    whole = run("whole", **three, push_to_hub=True, hub_model_id=repo)
    without_cache()
    first = json.loads(hub.files(repo)["path.json"])["nodes"][0]["commit"]
    hub.fault = lambda request: Fault(lost="before") if first in request.path else None
    with pytest.raises(HubError, match="The Hub cannot be reached"):
        run("broken", **three, stage="backtrack", degradation_path=repo)
    hub.fault = None
    checkpoints = (whole.parent / "broken" / "checkpoints" / "backtracking").glob("checkpoint-*")
    assert len(list(checkpoints)) == 2, "the phase before was finished and saved"
    again = run("broken", **three, stage="backtrack", degradation_path=repo, resume_from_checkpoint="latest")
    assert equal(student(again), student(whole))
    assert [wait["node"] for wait in json.loads((again / "report.json").read_text())["waits"]] == [2, 1, 0]


def test_an_upload_that_is_due_stands_for_all_before_it(tmp_path, monkeypatch, capsys):
    done, go = [], threading.Event()
    monkeypatch.setattr(RunUpload, "_create", lambda upload: go.wait())
    monkeypatch.setattr(RunUpload, "_push_path", lambda upload: done.append("path"))
    monkeypatch.setattr(RunUpload, "_push_all", lambda upload: done.append("all"))
    upload = RunUpload(
        TrainingConfig(
            pretrained_model_name_or_path="teacher", output_dir=str(tmp_path), push_to_hub=True, hub_model_id="alice/x"
        )
    )
    for _ in range(5):
        upload.submit_path()
    go.set()
    while not done:
        time.sleep(0.01)
    assert upload.finish().startswith("pushed to ") and done == ["path", "all"]
    monkeypatch.setattr(RunUpload, "_push_all", lambda upload: 1 / 0)
    assert upload.finish().startswith("not pushed; push it later with ")
    assert "ZeroDivisionError" in capsys.readouterr().err
    monkeypatch.setattr(RunUpload, "_push_all", lambda upload: None)
    assert upload.finish().startswith("pushed to "), "a later push that works mends it"


@pytest.mark.slow
def test_two_processes_replay_a_shared_path(run, repo, hub, tmp_path, teacher_folder, prompts_file):
    run("recorded", stage="record", push_to_hub=True, hub_model_id=repo)
    expected = student(run("one", stage="backtrack", degradation_path=repo))
    shared = {"stage": "backtrack", "degradation_path": repo, "train_batch_size": 1, "path_disk_budget_gb": 1.0}
    line = arguments(tmp_path / "two", teacher_folder, prompts_file, **shared)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    program = Path(__file__).with_name("two_processes.py")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        list(map(str, [*torchrun, program, tmp_path / "ranks", *line])),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = student(tmp_path / "two")
    assert all(torch.allclose(expected[key], two[key], atol=2e-4) for key in expected)


# The command --------------------------------------------------------------------------------------------------------


def test_pull_and_push_are_inverse(run, repo, hub, tmp_path, capsys, teacher_folder):
    folder = run(push_to_hub=True, hub_model_id=repo)
    without_cache()
    shutil.move(folder, tmp_path / "gone")
    assert command(["pull", repo, str(tmp_path / "copy")]) == 0
    assert "a path of 2 nodes in" in capsys.readouterr().out
    assert equal(student(tmp_path / "copy"), student(tmp_path / "gone"))
    assert not list((tmp_path / "copy").rglob(".cache"))
    here = ["--pretrained_model_name_or_path", str(teacher_folder)]
    assert command(["push", str(tmp_path / "copy"), "alice/copy"]) == 2
    told = capsys.readouterr().err
    assert "If it is a folder or a file, there is none of this name here. (What is published holds" in told
    assert "say where it lies with --pretrained_model_name_or_path" in told
    assert command(["push", str(tmp_path / "copy"), "alice/copy", *here]) == 0
    assert command(["path", "verify", "alice/copy", *here]) == 0
    assert "2 nodes, complete" in capsys.readouterr().out
    one, two = hub.snapshot(repo), hub.snapshot("alice/copy")
    assert all(one[branch] == two[branch] for branch in one if branch != "main")
    assert {k: v for k, v in one["main"].items() if k not in ("README.md", "path.json")} == {
        k: v for k, v in two["main"].items() if k not in ("README.md", "path.json")
    }
    cards = [hub.files(name)["README.md"].decode() for name in (repo, "alice/copy")]
    assert cards[0].replace(repo.split("/")[1], "copy").replace("--hub_model_id alice/copy", "") == cards[1].replace(
        repo.split("/")[1], "copy"
    ).replace("--hub_model_id alice/copy", "")
    (tmp_path / "copy" / "README.md").write_text("# Written by hand\n")
    assert command(["push", str(tmp_path / "copy"), "alice/copy", *here]) == 0
    assert hub.files("alice/copy")["README.md"] == b"# Written by hand\n"
    assert command(["pull", repo, str(tmp_path / "copy")]) == 2 and "is not empty" in capsys.readouterr().err
    assert command(["push", str(tmp_path), "alice/x"]) == 2 and "nothing can be pushed" in capsys.readouterr().err
    Repository("alice/empty").create()
    assert command(["pull", "alice/empty", str(tmp_path / "x")]) == 2
    assert "holds neither a pipeline nor a degradation path at main" in capsys.readouterr().err


def test_showing_a_path_draws_what_its_nodes_paint(repo, hub, tmp_path, teacher_folder, capsys, monkeypatch):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    tiny.path(tmp_path / "path", teacher_folder).push_to_hub(repo)
    here = ["--pretrained_model_name_or_path", str(teacher_folder)]
    for where in (repo, "path"):
        line = [
            "path",
            "show",
            where,
            *(here if where == repo else []),
            "--prompt",
            "a",
            "--prompt",
            "b",
            "--num_inference_steps",
            "2",
        ]
        assert command([*line, "--output", f"{where.split('/')[0]}.png", "--guidance_scale", "2"]) == 0
        out = capsys.readouterr().out
        assert "degradation-000100" in out and "complete" in out and "float32" in out
    one, two = (Image.open(tmp_path / name) for name in ("alice.png", "path.png"))
    assert one.size == two.size and one.tobytes() == two.tobytes()
    assert command(["path", "show", repo, "--table", "--revision", hub.repos[repo].branches["main"]]) == 0
    assert Repository(repo).branches()["degradation-000100"][:12] in capsys.readouterr().out
    shutil.move(teacher_folder, tmp_path / "moved")
    try:
        assert command(["path", "verify", repo]) == 2
        assert "say where it lies with --pretrained_model_name_or_path" in capsys.readouterr().err
        assert command(["path", "verify", repo, "--pretrained_model_name_or_path", str(tmp_path / "moved")]) == 0
    finally:
        shutil.move(tmp_path / "moved", teacher_folder)
