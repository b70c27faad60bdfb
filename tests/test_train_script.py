"""The training script, as a user runs it. In-process where it can be: a process costs five seconds of imports."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import train_disback
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from script import SCRIPT, SHORT, arguments, in_two_processes, student
from stages import equal, interrupted_at
from write_faults import Fault, full

from diffusers_disback import EVALUATORS, DegradationPath, DisBackOneStepPipeline, Evaluator, Metric, session
from diffusers_disback.commands.command_line import run as command_line
from diffusers_disback.evaluation.report import read_report


def test_what_a_run_leaves(run, capsys):
    folder = run(report_to="tensorboard", validation_steps=2, validation_prompts=tiny.PROMPTS[:2])
    files = {str(file.relative_to(folder)) for file in folder.rglob("*")}
    assert {"model_index.json", "pipeline.py", "README.md", "report.json", "samples.png", "convergence.png"} <= files
    assert {
        "path.png",
        "path/path.json",
        "path/degradation-000002/unet/config.json",
        "logs/diffusers-disback",
    } <= files
    report = json.loads((folder / "report.json").read_text())
    assert report["stages"]["degradation"]["steps"] == report["stages"]["backtracking"]["steps"] == 4
    for name in ("teacher", "initial", "student"):
        assert {"drift_mean", "drift_std", "drift_saturation", "seconds_per_image"} <= report[name].keys()
    assert report["teacher"]["drift_mean"] == 0 < report["student"]["drift_mean"]
    assert [row["step"] for row in report["curve"]] == [0, 2, 4]
    assert json.loads((folder / "status.json").read_text())["step"] == 4 and not (folder / "best").exists()
    assert not report.keys() & {"best_model", "early_stopping"} and not list(folder.glob("checkpoints/*/*/best"))
    assert report["seed"] == 0 and report["versions"]["torch"] == torch.__version__
    assert len(capsys.readouterr().out.strip().splitlines()) == 6
    pipe = DisBackOneStepPipeline.from_pretrained(folder)
    stock = DiffusionPipeline.from_pretrained(folder)
    latents = torch.randn(1, 4, 8, 8)
    one = pipe(tiny.PROMPTS[0], latents=latents, output_type="pt").images
    two = stock(tiny.PROMPTS[0], latents=latents, output_type="pt", num_inference_steps=1, guidance_scale=0).images
    assert torch.equal(one, two)


def test_the_snippets_of_the_card_run(run, monkeypatch):
    folder = run()
    snippets = (folder / "README.md").read_text().split("```python")[1:]
    assert len(snippets) == 3
    for snippet in snippets:
        scope = {}
        exec(snippet.split("```")[0], scope)
        assert scope["image"].size == (16, 16)


def test_the_stages_apart_equal_the_stages_together(run, tmp_path, baseline):
    recorded = run("recorded", stage="record")
    assert not (recorded / "model_index.json").exists() and (recorded / "path.png").exists()
    assert json.loads((recorded / "report.json").read_text())["stages"].keys() == {"degradation"}
    apart = run("apart", stage="backtrack", degradation_path=recorded / "path")
    assert equal(student(apart), baseline)
    same_folder = run("recorded2", stage="record", degradation_path=tmp_path / "elsewhere")
    assert not (same_folder / "path").exists() and len(DegradationPath.from_pretrained(tmp_path / "elsewhere")) == 2
    replayed = run("replayed", degradation_path=tmp_path / "elsewhere")
    assert equal(student(replayed), baseline), "a complete path is replayed, not recorded again"
    in_place = run("recorded", stage="backtrack")
    assert equal(student(in_place), baseline)


@pytest.mark.parametrize("cache_conditions, leave", [("disk", True), ("off", False)])
def test_text_encoders_leave_memory_when_every_prompt_is_encoded(run, monkeypatch, cache_conditions, leave):
    import gc
    import weakref

    from diffusers_disback.backtracking import BacktrackingTrainer
    from diffusers_disback.families import StableDiffusion

    encoders, left, train, check = [], [], BacktrackingTrainer.train, StableDiffusion.check

    def watched(family):
        check(family)
        encoders.extend(map(weakref.ref, family.text_encoders))

    def trained(self):
        gc.collect()
        left.extend(encoder() is None for encoder in encoders)
        return train(self)

    monkeypatch.setattr(StableDiffusion, "check", watched)
    monkeypatch.setattr(BacktrackingTrainer, "train", trained)
    folder = run(cache_conditions=cache_conditions)
    assert left == [leave]
    assert json.loads((folder / "model_index.json").read_text())["text_encoder"] == ["transformers", "CLIPTextModel"]
    DiffusionPipeline.from_pretrained(folder)(tiny.PROMPTS[0], num_inference_steps=1, guidance_scale=0)


def test_a_finished_run_prints_its_summary_again(run, capsys):
    import shutil

    folder = run()
    before = student(folder)
    shutil.rmtree(folder / "checkpoints")  # they may be thrown away
    capsys.readouterr()
    run(resume_from_checkpoint="latest")
    out = capsys.readouterr().out
    assert "is finished" in out and "backtracking: 4 steps" in out
    assert equal(student(folder), before)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["first", "second"])
def test_an_interrupted_run_goes_on_and_ends_the_same(run, monkeypatch, where):
    from diffusers_disback.backtracking import BacktrackingTrainer
    from diffusers_disback.degradation import DegradationRecorder

    whole = run("whole", checkpointing_steps=1)
    stage = DegradationRecorder if where == "first" else BacktrackingTrainer
    monkeypatch.setattr(stage, "train_step", interrupted_at(3, stage.train_step))
    with pytest.raises(KeyboardInterrupt):
        run("broken", checkpointing_steps=1)
    monkeypatch.undo()
    broken = run("broken", checkpointing_steps=1, resume_from_checkpoint="latest")
    assert equal(student(broken), student(whole))
    assert (
        json.loads((broken / "report.json").read_text()).keys()
        == json.loads((whole / "report.json").read_text()).keys()
    )


def signalled_at(number, step, train_step):
    """A stage's `train_step` in which a signal comes, twice, as from a terminal and from the launcher."""

    def wrapped(self, at, batches):
        if at == step:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
        return train_step(self, at, batches)

    return wrapped


def test_a_signal_ends_either_stage_after_its_step_with_a_checkpoint_and_a_code(
    tmp_path, teacher_folder, prompts_file, baseline, monkeypatch, capsys, small_pictures
):
    from diffusers_disback.backtracking import BacktrackingTrainer
    from diffusers_disback.degradation import DegradationRecorder

    folder = tmp_path / "run"
    line = arguments(folder, teacher_folder, prompts_file, resume_from_checkpoint="latest", validation_steps=2)
    for stage, number, step, code in [
        (DegradationRecorder, signal.SIGTERM, 2, 143),
        (BacktrackingTrainer, signal.SIGINT, 1, 130),  # after which it would be validated
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(stage, "train_step", signalled_at(number, step, stage.train_step))
            assert command_line(train_disback.main, line, "train") == code
        checkpoint = folder / "checkpoints" / stage.name / f"checkpoint-{step + 1:06d}"
        told = capsys.readouterr().err.splitlines()[-1]
        assert told == (
            f"train: ended by {signal.Signals(number).name}. The last checkpoint, {checkpoint}, is whole: resume with "
            "--resume_from_checkpoint latest."
        )
        assert (checkpoint / "stage.json").is_file() and not (folder / "run.lock").exists()
    assert command_line(train_disback.main, line, "train") == 0
    assert equal(student(folder), baseline)
    assert [row["step"] for row in json.loads((folder / "report.json").read_text())["curve"]] == [0, 2, 4]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_elsewhere_ends_the_run_at_once_and_two_runs_do_not_share_a_folder(
    tmp_path, teacher_folder, prompts_file, monkeypatch, capsys
):
    def loading(*_):
        with pytest.raises(ValueError, match=f"run is in use by process {os.getpid()}"):
            train_disback.main([*line, "--resume_from_checkpoint", "latest"])
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it went on")

    line = arguments(tmp_path / "run", teacher_folder, prompts_file)
    monkeypatch.setattr(session, "load_family", loading)
    assert command_line(train_disback.main, line, "train") == 143
    assert "train: ended by SIGTERM. There was no checkpoint yet" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_run_that_ended_before_its_report_measures_its_student(run):
    folder = run()
    report = json.loads((folder / "report.json").read_text())
    for name in ("report.json", "model_index.json", "README.md", "samples.png"):
        (folder / name).unlink()
    run(resume_from_checkpoint="latest")
    again = json.loads((folder / "report.json").read_text())
    assert again["student"]["drift_mean"] == report["student"]["drift_mean"] and (folder / "samples.png").exists()
    assert [row["step"] for row in again["curve"]] == [0, 4]


def test_a_run_is_finished_when_all_that_it_leaves_is_there(run, monkeypatch):
    """The disk fills up in each of the results in turn; what is there is whole, and the run goes on to write the rest."""
    from PIL import Image

    from diffusers_disback.hub.publish.results import is_finished, write_results

    failed = []

    def attempts(*given):
        config, folder = given[4], run.folder / "run"
        for at in range(100):
            try:
                with Fault(at, full, "replace").injected():
                    told = write_results(*given)
                assert is_finished(config)
                return told
            except OSError as error:
                failed.append(error.filename)
            assert not is_finished(config)
            for file in folder.glob("*.json"):
                json.loads(file.read_text())
            for file in folder.glob("*.png"):
                Image.open(file).verify()
            assert not list(folder.glob("*draft*"))
        raise AssertionError("it never ended")

    monkeypatch.setattr(session, "write_results", attempts)
    folder = run()
    assert failed == ["replace"] * 5, "three images, the card and the report"
    report = json.loads((folder / "report.json").read_text())
    assert set(report["files"]) >= {"README.md", "samples.png", "convergence.png", "path.png", "model_index.json"}
    assert report["files"]["unet/diffusion_pytorch_model.safetensors"] > 0


def test_what_a_finished_run_lacks_is_made_anew(run, teacher_folder, prompts_file, capsys, caplog):
    import shutil

    from diffusers_disback.commands.cli import main as command
    from diffusers_disback.evaluation.report import read_report
    from diffusers_disback.hub.publish.results import is_finished
    from diffusers_disback.hub.publish.student import check_student_is_whole

    folder = run()
    before = student(folder)
    config = train_disback.parse(arguments(folder, teacher_folder, prompts_file, resume_from_checkpoint="latest"))
    report = folder / "report.json"
    names = list(json.loads(report.read_text())["files"])
    assert is_finished(config) and len(names) > 12
    for name in names:
        shutil.move(folder / name, folder / "aside")
        for content in (None, b""):
            (folder / name).write_bytes(content) if content is not None else None
            assert not is_finished(config) or (folder / "aside").stat().st_size == 0, name
            if name == "README.md" or name.startswith("unet/"):
                assert command(["push", str(folder), "alice/x"]) == 2, "and nothing is asked of the Hub"
                assert f"is not whole: it has no {name}. Nothing was pushed." in capsys.readouterr().err
        shutil.move(folder / "aside", folder / name)
    assert is_finished(config)
    (folder / "README.md").write_text("# Written by hand\n")
    assert is_finished(config), "it may be"
    (folder / "model_index.json").unlink()
    for name in ("README.md", "samples.png"):
        (folder / name).write_bytes(b"")
    report.write_bytes(b"")
    assert command(["push", str(folder), "alice/x"]) == 2
    assert "report.json is damaged" in capsys.readouterr().err
    run(resume_from_checkpoint="latest")
    assert "report.json is damaged and is made anew" in capsys.readouterr().err
    assert is_finished(config) and equal(student(folder), before)
    shutil.rmtree(folder / "checkpoints")
    (folder / "samples.png").unlink()
    assert (
        is_finished(config) and "The last checkpoint, from which it could be made, is gone" in capsys.readouterr().err
    )
    check_student_is_whole(folder, read_report(folder))
    assert "has no samples.png: it is pushed without" in caplog.text, "and not refused for ever"
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    assert not is_finished(config), "a student is trained again, if nothing else is left of it"


def test_the_push_of_a_run_that_was_cut_off_says_so(run, monkeypatch, capsys):
    from diffusers_disback.commands.cli import main as command

    def cut_off(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(session, "save_student", cut_off)
        with pytest.raises(KeyboardInterrupt):
            run()
    folder = run.folder / "run"
    assert command(["push", str(folder), "alice/x"]) == 2
    told = capsys.readouterr().err
    assert f"{folder} holds no finished student: its run was cut off. Nothing was pushed." in told
    assert f"push the path alone: diffusers-disback push {folder}/path." in told


def test_a_longer_run_goes_on_from_a_finished_one(run):
    run(checkpointing_steps=2)
    longer = run(max_train_steps=6, checkpointing_steps=2, resume_from_checkpoint="latest")
    assert equal(student(longer), student(run("whole", max_train_steps=6)))


def test_resuming_from_a_named_checkpoint(run, baseline):
    whole = run("whole", checkpointing_steps=1)
    (whole / "report.json").unlink()
    again = run(
        "whole",
        checkpointing_steps=1,
        resume_from_checkpoint=whole / "checkpoints" / "backtracking" / "checkpoint-000002",
    )
    assert equal(student(again), baseline)


# Every flag does something ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"conditioning_timestep": 249},
        {"guidance_scale": 1.0},
        {"num_path_nodes": 0},
        {"degradation_lr_multiplier": 2.0},
        {"degradation_steps": 9, "degradation_stop": 0.9},
        {"target_schedule": "adaptive", "mismatch_steps": 1, "target_share": 0.1},
        {"objective": "sid", "objective_args": ["alpha=1.2"]},
        {"lr_scheduler": "cosine"},
        {"use_ema": True},
        {"resolution": 32},
        {"mixed_precision": "bf16"},
        *(
            # What they do is held by tests of its own; here, that the script passes them on.
            pytest.param(changes, marks=pytest.mark.slow)
            for changes in (
                {"seed": 1},
                {"guidance_schedule": "constant"},
                {"num_path_nodes": 1},
                {"degradation_steps": 6},
                {"steps_per_target": 1},
                {"max_train_steps": 5},
                {"fake_score_updates": 2},
                {"objective": "diff_instruct"},
                {"generator_learning_rate": 2e-3},
                {"fake_score_learning_rate": 2e-3},
                {"train_batch_size": 1},
                {"adam_beta1": 0.5},
                {"lr_warmup_steps": 2},
                {"adam_beta2": 0.9},
                {"generator_adam_beta1": 0.5},
                {"generator_adam_beta2": 0.9},
                {"fake_score_adam_beta1": 0.5},
                {"fake_score_adam_beta2": 0.9},
                {"adam_weight_decay": 0.5},
                {"adam_epsilon": 1e-2},
                {"max_grad_norm": 1e-8},
                {"use_ema": True, "ema_decay": 0.1},
                {"fake_score_guidance_scale": 2.0},
                {"generator_loss_warmup_steps": 2},
                {"gradient_accumulation_steps": 2},
                {"max_train_samples": 1},
                {"min_noise": 0.3},
                {"max_noise": 0.7},
                {"timestep_sampling": "logit_normal"},
                {"timestep_sampling": "logit_normal", "logit_mean": 1.0},
                {"timestep_sampling": "logit_normal", "logit_std": 0.5},
                {"timestep_sampling": "mode"},
                {"timestep_sampling": "mode", "mode_scale": 0.5},
                {"timestep_shift": 3.0},
                {"fake_score_training_guidance_scale": 0.0},
                {"objective": "sid"},
            )
        ),
    ],
    ids=lambda changes: "-".join(f"{k}={v}" for k, v in changes.items()),
)
def test_the_flag_changes_the_student(run, baseline, changes):
    other = student(run(**changes))
    assert other.keys() == baseline.keys() and not equal(other, baseline)
    assert all(torch.isfinite(value).all() for value in other.values())


@pytest.fixture(scope="module")
def baseline(tmp_path_factory, teacher_folder, prompts_file):
    folder = tmp_path_factory.mktemp("baseline")
    train_disback.main(arguments(folder / "run", teacher_folder, prompts_file))
    return student(folder / "run")


@pytest.mark.slow
def test_a_fall_of_the_mismatch_matters_where_it_falls(run):
    long = {"target_share": 1.0, "steps_per_target": 6, "max_train_steps": 12, "fake_score_learning_rate": 3e-2}
    long |= {"conditioning_timestep": 399}
    hasty, patient = (student(run(f"{fall}", target_schedule=None, target_fall=fall, **long)) for fall in (1e-9, 1.0))
    assert not equal(hasty, patient)


@pytest.mark.slow
def test_an_average_differs_by_its_decay(run):
    assert not equal(student(run("a", use_ema=True)), student(run("b", use_ema=True, ema_decay=0.1)))


@pytest.mark.slow
def test_dropped_prompts_matter_where_a_node_is_guided(run):
    three = {"num_path_nodes": 3, "max_train_steps": 6, "degradation_steps": 12}
    dropped, kept = run("a", **three, proportion_empty_prompts=0.5), run("b", **three, proportion_empty_prompts=0.0)
    assert not equal(student(dropped), student(kept))
    two = {"num_path_nodes": 2, "degradation_steps": 12}
    assert equal(
        student(run("c", **two, proportion_empty_prompts=0.5)), student(run("d", **two, proportion_empty_prompts=0.0))
    )


def test_the_resolution_is_the_students_own(run):
    pipe = DisBackOneStepPipeline.from_pretrained(run(resolution=32))
    assert pipe(tiny.PROMPTS[0]).images[0].size == (32, 32)


@pytest.mark.parametrize("flag", ["gradient_checkpointing", "dataloader_num_workers"])
def test_flags_that_change_no_result(run, baseline, flag, monkeypatch):
    from diffusers_disback.data.conditions import Batches

    seen, loader = [], Batches.loader

    def spy(self, batches, num_workers):
        seen.append(num_workers)
        return loader(self, batches, num_workers)

    monkeypatch.setattr(Batches, "loader", spy)
    value = 1 if flag == "dataloader_num_workers" else True
    other = student(run(**{flag: value}))
    assert all(torch.allclose(other[key], baseline[key], atol=1e-5) for key in baseline)
    assert seen == ([1, 1] if flag == "dataloader_num_workers" else [0, 0])


def test_tf32_reaches_torch(run):
    try:
        run(allow_tf32=True, stage="record", **SHORT)
        assert torch.backends.cuda.matmul.allow_tf32
        run("other", stage="record", **SHORT)
        assert not torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def test_checkpoints_and_logs_as_asked(run):
    folder = run(
        checkpointing_steps=1,
        checkpoints_total_limit=1,
        report_to="tensorboard",
        logging_dir="elsewhere",
        logging_steps=2,
        tracker_project_name="mine",
    )
    assert [f.name for f in (folder / "checkpoints" / "degradation").glob("checkpoint-*")] == ["checkpoint-000004"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars = {}
    for file in (folder / "elsewhere" / "mine").glob("events*"):
        events = EventAccumulator(str(file)).Reload()
        scalars |= {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert scalars["degradation/fake_score_loss"] == scalars["backtracking/generator_loss"] == [2, 4]
    assert "backtracking/generator_lr" in scalars and "backtracking/drift_mean" in scalars


def test_another_start(run, baseline, tmp_path):
    tiny.pipeline(seed=5).save_pretrained(tmp_path / "start")
    folder = run(generator_model_name_or_path=tmp_path / "start", generator_learning_rate=1e-30, adam_weight_decay=0.0)
    was = tiny.unet(seed=5).state_dict()
    assert all((tensor - was[key]).abs().max() < 1e-20 for key, tensor in student(folder).items())


def test_prompts_of_a_data_set(run, tmp_path):
    from shapes.dataset import write_image_folder

    write_image_folder(tmp_path / "images", 4)
    folder = run(prompts_file=None, train_data_dir=tmp_path / "images", cache_dir=tmp_path / "cache")
    assert (folder / "model_index.json").exists() and (tmp_path / "cache").exists()
    run("b", prompts_file=None, dataset_name=tmp_path / "images", caption_column="text", cache_dir=tmp_path / "cache")


def test_a_data_set_by_config_split_and_column_stored_or_streamed(run, tmp_path, prompts_file):
    (tmp_path / "captions").mkdir()
    rows = [{"words": prompt, "other": 1} for prompt in tiny.PROMPTS]
    rows += [{"words": "", "other": 1}, {"words": None, "other": 1}]
    (tmp_path / "captions" / "few.jsonl").write_text("\n".join(map(json.dumps, rows[:3])))
    (tmp_path / "captions" / "broken.jsonl").write_text(
        "\n".join(map(json.dumps, rows)).replace("red circle", "red\\ncircle")
    )
    card = "configs:\n- config_name: a\n  data_files: [{split: train, path: few.jsonl}, {split: more, path: broken.jsonl}]\n"
    card += "- config_name: b\n  data_files: [{split: train, path: few.jsonl}]\n"
    (tmp_path / "captions" / "README.md").write_text(f"---\n{card}---\n")
    common = {"prompts_file": None, "dataset_name": tmp_path / "captions", "caption_column": "words"}
    common |= {"cache_dir": tmp_path / "cache", "num_path_nodes": 0, "max_train_steps": 2}
    expected = student(run("file", num_path_nodes=0, max_train_steps=2))
    stored = run("stored", **common, dataset_config_name="a")
    streamed = run("streamed", **common, dataset_config_name="a", dataset_split="more", dataset_streaming=True)
    assert equal(student(stored), expected) and equal(student(streamed), expected)
    assert (streamed / "captions.txt").read_text() == prompts_file.read_text()
    for changes, message in [
        ({"dataset_config_name": "c"}, "cannot be read.*'c' not found"),
        ({"dataset_config_name": "a", "dataset_split": "test"}, "cannot be read.*test"),
        ({"dataset_config_name": "a", "caption_column": "text"}, "has no column 'text'; it has"),
        ({"dataset_config_name": "a", "caption_column": "other", "dataset_streaming": True}, "is a int, not a text"),
        ({"dataset_config_name": "a", "caption_column": "text", "dataset_streaming": True}, "has no column 'text'"),
    ]:
        with pytest.raises(ValueError, match=message):
            run("bad", **{**common, **changes})


def test_conditions_on_disk_or_on_the_fly(run, baseline, capsys):
    folder = run("disk", cache_conditions="disk")
    assert "3 prompts x" in capsys.readouterr().err and len(list((folder / "conditions").rglob("*.safetensors"))) == 1
    cached = student(folder)
    assert all(torch.allclose(cached[key], baseline[key], atol=5e-3) for key in baseline) and not equal(
        cached, baseline
    )
    on_the_fly = student(run("off", cache_conditions="off"))
    assert all(torch.allclose(on_the_fly[key], baseline[key], atol=1e-4) for key in baseline)
    assert "are encoded on the fly" in capsys.readouterr().err
    half = student(run("half", cache_conditions="off", text_encoder_precision="bf16"))
    assert all(torch.allclose(half[key], baseline[key], atol=5e-3) for key in baseline) and not equal(half, baseline)


def test_a_variant_is_read_and_its_name_is_dropped(run, tmp_path):
    tiny.pipeline().to(dtype=torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    folder = run(pretrained_model_name_or_path=tmp_path / "half", variant="fp16")
    assert not list(folder.rglob("*fp16*"))
    DisBackOneStepPipeline.from_pretrained(folder)(tiny.PROMPTS[0])


def test_validation_as_asked(run):
    prompts = ["a red circle", 'a "$5 #1" and $6% sign_']
    folder = run(validation_prompts=prompts, num_validation_images=3, validation_steps=3, evaluators=["drift"])
    report = json.loads((folder / "report.json").read_text())
    assert report["settings"]["validation_prompts"] == prompts
    assert [row["step"] for row in report["curve"]] == [0, 3, 4]
    assert report["evaluation"]["num_pictures"] == 6
    more = json.loads((run("more", validation_prompts=prompts) / "report.json").read_text())
    assert more["student"]["drift_mean"] != report["student"]["drift_mean"], "another number of images is measured"


def test_evaluators_are_chosen_by_name(run, monkeypatch):
    with pytest.raises(
        ValueError, match="--evaluators charm: known evaluators are clip_score, diversity, drift, fid, "
    ):
        run("unknown", evaluators=["drift", "charm"], pretrained_model_name_or_path="nowhere")

    class Charm(Evaluator):
        metrics = {"charm": Metric("charm", "charm", "higher")}

        def __call__(self, images, prompts):
            return {"charm": float(len(images))}

    monkeypatch.setitem(EVALUATORS, "charm", Charm)
    report = json.loads((run(evaluators=["charm"]) / "report.json").read_text())
    assert report["student"]["charm"] == report["curve"][-1]["charm"] == 3 and "drift_mean" not in report["student"]


def test_revision_and_cache_reach_the_library(run, monkeypatch, tmp_path):
    """Both are looked up by `ModelReference`, which tests of sharing do on the Hub."""
    calls, load = [], session.load_family

    def spy(reference, cache_dir, text_encoder_dtype):
        calls.append((reference.revision, cache_dir))
        return load(reference, cache_dir, text_encoder_dtype)

    monkeypatch.setattr(session, "load_family", spy)
    run(revision="v1", cache_dir=tmp_path / "cache")
    assert calls == [("v1", str(tmp_path / "cache"))]


def test_the_report_says_how_it_was_run(run):
    report = json.loads((run() / "report.json").read_text())
    assert report["command"].startswith("accelerate launch --num_processes 1 --mixed_precision no examples/")
    assert report["machine"] == {"device": "CPU, 1 threads", "num_processes": 1, "mixed_precision": "no"}


def test_abbreviated_flags_are_refused(tmp_path):
    with pytest.raises(ValueError, match="unrecognized arguments: --pretrained_model. --help tells all flags"):
        train_disback.main(["--pretrained_model", "x", "--output_dir", str(tmp_path)])


def test_without_a_teacher_it_is_the_embedded_one(tmp_path):
    training = train_disback.parse(["--output_dir", str(tmp_path), "--max_train_steps", "999"])
    assert Path(training.pretrained_model_name_or_path).resolve() == SCRIPT.parent / "shapes" / "teacher"
    assert Path(training.prompts_file).resolve() == SCRIPT.parent / "shapes" / "prompts.txt"
    assert not Path(training.pretrained_model_name_or_path).is_absolute(), "a card should not name a machine's folders"
    assert training.train_batch_size == 16 and training.max_train_steps == 999, "the command line has the last word"
    own = train_disback.parse(["--pretrained_model_name_or_path", "mine"])
    assert own.pretrained_model_name_or_path == "mine" and own.train_batch_size == 1 and own.prompts_file is None


def test_every_flag_has_a_test():
    """Each stands, as an argument of a run, in the body of a test: the defaults above do not count."""
    import ast
    import dataclasses

    files = [
        Path(__file__).with_name(f"test_{name}.py")
        for name in (
            "train_script",
            "upload",
            "families",
            "families_without_prompts",
            "adapters",
            "single_file",
            "discriminator",
            "validation",
            "evaluators",
        )
    ]
    tested = {"pretrained_model_name_or_path", "output_dir"}  # of every run
    for function in (statement for file in files for statement in ast.parse(file.read_text()).body):
        if isinstance(function, ast.FunctionDef) and function.name.startswith("test_"):
            for node in ast.walk(function):
                if isinstance(node, ast.keyword):
                    tested.add(node.arg)
                elif isinstance(node, ast.Dict):
                    tested |= {key.value for key in node.keys if isinstance(key, ast.Constant)}
            for name in ("gradient_checkpointing", "dataloader_num_workers"):  # of a parametrised flag's name
                tested |= {name} if name in ast.unparse(function) else set()
    for field in dataclasses.fields(train_disback.DisBackConfig):
        assert field.metadata["help"] and field.name in tested, field.name


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"pretrained_model_name_or_path": "nowhere/at-all"}, "The teacher 'nowhere/at-all' cannot be loaded"),
        ({"pretrained_model_name_or_path": "."}, "has no model_index.json"),
        ({"prompts_file": "missing.txt"}, "missing.txt cannot be read"),
        ({"prompts_file": None}, "There are no prompts"),
        ({"conditioning_timestep": 1000}, r"timestep=1000 is outside the teacher's schedule \(0..999\)"),
        ({"num_path_nodes": 5}, "--num_path_nodes 5 is more than --degradation_steps 4"),
        ({"steps_per_target": 3}, "--max_train_steps 4 is less than 2 targets x --steps_per_target 3"),
        ({"resolution": 17}, "resolution=17 is not divisible by 2"),
        ({"objective": "gan"}, "--objective 'gan' is none of diff_instruct, dmd"),
        ({"stage": "backtrack"}, "holds no degradation path"),
        ({"stage": "record", "num_path_nodes": 0}, "nothing to do"),
        ({"resume_from_checkpoint": "nothing"}, "nothing is no checkpoint of this run"),
        ({"lr_scheduler": "steep"}, "--lr_scheduler 'steep' is none of linear"),
        ({"generator_model_name_or_path": "nowhere/at-all"}, "The UNet of 'nowhere/at-all' cannot be loaded"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_bad_input_is_told_before_anything_is_written(run, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(**changes)
    assert not list((tmp_path / "run").glob("*")) if (tmp_path / "run").exists() else True


def test_a_pipeline_of_no_family(run, teacher_folder, tmp_path):
    """By its class alone, before anything is loaded."""
    shutil.copytree(teacher_folder, tmp_path / "other")
    index = json.loads((tmp_path / "other" / "model_index.json").read_text())
    (tmp_path / "other" / "model_index.json").write_text(json.dumps({**index, "_class_name": "LTXPipeline"}))
    with pytest.raises(
        ValueError, match="The teacher is a LTXPipeline; supported are stable_diffusion: StableDiffusionPipeline"
    ):
        run(pretrained_model_name_or_path=tmp_path / "other")
    tiny.pipeline(in_channels=9).save_pretrained(tmp_path / "inpainting")
    with pytest.raises(ValueError, match="UNet takes 9 channels, but its autoencoder makes 4"):
        run(pretrained_model_name_or_path=tmp_path / "inpainting")


def test_anothers_results_are_left_as_they_were(run):
    folder = run()
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    for stage in ("all", "record", "backtrack"):
        with pytest.raises(ValueError, match="holds a run's results already .* Pass --resume_from_checkpoint latest"):
            run(stage=stage)
    (folder / "report.json").rename(folder / "kept.json")
    with pytest.raises(ValueError, match="other settings: train_batch_size was 2, is 1"):
        run(train_batch_size=1, resume_from_checkpoint="latest")
    (folder / "kept.json").rename(folder / "report.json")
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*") if file != folder} == {
        file: time for file, time in before.items() if file != folder
    }


def test_a_folder_of_something_else_is_left_alone(run, tmp_path, teacher_folder):
    import shutil

    shutil.copytree(teacher_folder, tmp_path / "model")
    for resume in (None, "latest"):
        with pytest.raises(ValueError, match="holds model_index.json, which this library did not put there"):
            run("model", resume_from_checkpoint=resume)
    assert equal(student(tmp_path / "model"), student(teacher_folder))


def test_a_path_of_another_teacher_or_start_is_refused(run, tmp_path):
    recorded = run(stage="record")
    other = tiny.save_teacher(tmp_path / "other", seed=7)
    with pytest.raises(ValueError, match="was recorded from another teacher"):
        run("b", stage="backtrack", degradation_path=recorded / "path", pretrained_model_name_or_path=other)
    with pytest.raises(ValueError, match="another initial generator: its sha256"):
        run("b", stage="backtrack", degradation_path=recorded / "path", generator_model_name_or_path=other)
    with pytest.raises(ValueError, match="its conditioning_timestep is 625, this one's is 249"):
        run("b", stage="backtrack", degradation_path=recorded / "path", conditioning_timestep=249)


def test_an_unfinished_path_is_refused(run):
    recorded = run(stage="record")
    manifest = recorded / "path" / "path.json"
    manifest.write_text(manifest.read_text().replace('"complete": true', '"complete": false'))
    for stage in ("backtrack", "all"):
        with pytest.raises(ValueError, match="is unfinished: 2 nodes are recorded"):
            run("b", stage=stage, degradation_path=recorded / "path")
    assert len(DegradationPath.from_pretrained(recorded / "path")) == 2


def test_a_damaged_node_is_told_before_training(run, tmp_path):
    recorded = run(stage="record")
    (recorded / "path" / "degradation-000002" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match="node 1 is incomplete"):
        run("b", stage="backtrack", degradation_path=recorded / "path")
    assert not (tmp_path / "b").exists()


def test_anothers_unfinished_path_is_left_alone(run, tmp_path, monkeypatch):
    from diffusers_disback.degradation import DegradationRecorder

    monkeypatch.setattr(DegradationRecorder, "train_step", interrupted_at(3, DegradationRecorder.train_step))
    with pytest.raises(KeyboardInterrupt):
        run("a", degradation_path=tmp_path / "path")
    monkeypatch.undo()
    assert len(DegradationPath.from_pretrained(tmp_path / "path")) == 1
    with pytest.raises(ValueError, match="is unfinished: 1 nodes are recorded"):
        run("b", degradation_path=tmp_path / "path", resume_from_checkpoint="latest")
    assert len(DegradationPath.from_pretrained(tmp_path / "path")) == 1


def write_of_earlier_version(folder, spacing):
    """Notes settings that earlier versions had, where they noted them."""
    for file in (folder / "settings" / "degradation.json", folder / "path" / "path.json"):
        content = json.loads(file.read_text())
        content.get("recording", content)["node_spacing"] = spacing
        file.write_text(json.dumps(content))


def test_a_recording_of_an_earlier_version_is_resumed(run, monkeypatch):
    from diffusers_disback.degradation import DegradationRecorder

    with monkeypatch.context() as patch:
        patch.setattr(DegradationRecorder, "train_step", interrupted_at(3, DegradationRecorder.train_step))
        with pytest.raises(KeyboardInterrupt):
            run(checkpointing_steps=2)
    folder = run.folder / "run"
    write_of_earlier_version(folder, "mismatch")
    with pytest.raises(ValueError, match="other settings: node_spacing was 'mismatch', is 'steps'"):
        run(checkpointing_steps=2, resume_from_checkpoint="latest")
    write_of_earlier_version(folder, "steps")
    run(checkpointing_steps=2, resume_from_checkpoint="latest")
    assert json.loads((folder / "path" / "path.json").read_text())["recording"]["node_spacing"] == "steps"
    assert equal(student(folder), student(run("unbroken", checkpointing_steps=2)))


def test_results_of_an_earlier_version_are_read(run):
    """A path whose nodes were spaced by mismatch, and a report with a flag that is gone."""
    folder = run(max_train_steps=2, steps_per_target=1)
    write_of_earlier_version(folder, "mismatch")
    report = json.loads((folder / "report.json").read_text())
    report["settings"] |= {"target_schedule": "geometric", "target_ratio": 1.5, "node_spacing": "mismatch"}
    (folder / "report.json").write_text(json.dumps(report))
    assert read_report(folder)["settings"]["target_ratio"] == 1.5
    assert len(DegradationPath.from_pretrained(folder / "path")) == 2
    again = run("again", stage="backtrack", degradation_path=folder / "path", max_train_steps=2, steps_per_target=1)
    assert equal(student(again), student(folder))


@pytest.mark.parametrize("flag", ["node_spacing", "target_ratio"])
def test_a_flag_that_is_gone_is_unknown(run, flag):
    with pytest.raises(ValueError, match=f"unrecognized arguments: --{flag}"):
        run(**{flag: 1})


def test_a_learning_rate_that_explodes_is_told_and_no_student_is_written(run, tmp_path):
    with pytest.raises(FloatingPointError, match="fake_score_loss was not finite at step"):
        run(fake_score_learning_rate=1e30, logging_steps=1)
    assert not (tmp_path / "run" / "model_index.json").exists()
    assert not list((tmp_path / "run" / "checkpoints").rglob("checkpoint-*"))


# As separate processes ----------------------------------------------------------------------------------------------


def launch(command: list, **environment) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_accelerate_launch(tmp_path, teacher_folder, prompts_file, baseline):
    line = arguments(tmp_path / "run", teacher_folder, prompts_file)
    done = launch([Path(sys.executable).with_name("accelerate"), "launch", "--cpu", SCRIPT, *line])
    assert done.returncode == 0, done.stderr
    assert "samples.png" in done.stdout
    assert equal(student(tmp_path / "run"), baseline), "a run is a function of its settings"


@pytest.mark.slow
def test_accelerate_launch_of_what_is_refused(tmp_path, teacher_folder, prompts_file):
    line = arguments(tmp_path / "run", teacher_folder, prompts_file)
    train_disback.main(line)
    done = launch([Path(sys.executable).with_name("accelerate"), "launch", "--quiet", "--cpu", SCRIPT, *line])
    assert done.returncode == 1, "the launcher's own code, whatever the script's is"
    told = done.stderr.strip().splitlines()[-1]
    assert told.startswith(f"train_disback.py: {tmp_path / 'run'} holds a run's results already")
    assert "Traceback" not in done.stderr


def test_two_processes_train_both_stages_and_agree(tmp_path, teacher_folder, prompts_file):
    """Two gloo processes with half the batch each see the samples of one: ranks end identical, and near the one."""
    flags = {"train_batch_size": 1, "checkpointing_steps": 2, "use_ema": True, "validation_steps": 2}
    line = arguments(tmp_path / "two", teacher_folder, prompts_file, **flags)
    ranks = in_two_processes(tmp_path / "ranks", line)
    assert {name.split(".conv_in")[0] for name in ranks[0] if name.endswith("conv_in.weight")} == {
        "degradation.fake_score",
        "backtracking.generator",
        "backtracking.fake_score",
    }
    assert equal(*ranks), "every trained network of both stages is the same on both"
    train_disback.main(arguments(tmp_path / "one", teacher_folder, prompts_file, **{**flags, "train_batch_size": 2}))
    node = "path/degradation-000004/unet/diffusion_pytorch_model.safetensors"
    for one, two in [
        (student(tmp_path / "one"), student(tmp_path / "two")),
        (load_file(tmp_path / "one" / node), load_file(tmp_path / "two" / node)),
    ]:
        assert all(torch.allclose(one[key], two[key], atol=2e-4) for key in one)


@pytest.mark.slow
def test_two_processes_are_resumed_bit_for_bit(tmp_path, teacher_folder, prompts_file):
    """From the checkpoint at half of stage 2."""
    flags = {"train_batch_size": 1, "checkpointing_steps": 2, "use_ema": True, "validation_steps": 2}
    line = arguments(tmp_path / "two", teacher_folder, prompts_file, **flags)
    in_two_processes(tmp_path / "ranks", line)
    two = student(tmp_path / "two")
    for file in ("report.json", "model_index.json"):
        (tmp_path / "two" / file).unlink()
    resume = ["--resume_from_checkpoint", tmp_path / "two" / "checkpoints" / "backtracking" / "checkpoint-000002"]
    in_two_processes(tmp_path / "again", [*line, *resume])
    assert equal(student(tmp_path / "two"), two)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [{}, {"lora_rank": 2}])
def test_two_processes_publish_the_best_student_with_its_own_measures(tmp_path, teacher_folder, prompts_file, mode):
    """Which the main process alone knows; the report's figures are those of the curve's best row."""
    flags = {"train_batch_size": 1, "validation_steps": 1, "metric_for_best_model": "drift_mean", "max_train_steps": 6}
    line = arguments(tmp_path / "two", teacher_folder, prompts_file, **flags, **mode, generator_learning_rate=3e-2)
    in_two_processes(tmp_path / "ranks", [*line, "--load_best_model_at_end"])
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    best = report["best_model"]
    assert best["is_student"] and best["step"] < 6, "the last one would be no test"
    (row,) = [row for row in report["curve"] if row["step"] == best["step"]]
    assert report["student"]["drift_mean"] == pytest.approx(row["drift_mean"], abs=2e-3 if mode else 0)


@pytest.mark.slow
def test_two_processes_train_adapters_and_agree(tmp_path, teacher_folder, prompts_file):
    """Each role's gradients are averaged over the processes: after five steps its adapter is the same on both."""
    flags = {"lora_rank": 4, "train_batch_size": 1, "max_train_steps": 5, "use_ema": True, "fake_score_updates": 2}
    line = arguments(tmp_path / "two", teacher_folder, prompts_file, **flags)
    ranks = in_two_processes(tmp_path / "ranks", line)
    for role in ("backtracking.generator", "backtracking.fake_score", "degradation.fake_score"):
        adapter = [key for key in ranks[0] if key.startswith(role) and f".{role.split('.')[1]}.weight" in key]
        assert len(adapter) > 50 and any(ranks[0][key].any() for key in adapter if "lora_B" in key)
    assert equal(*ranks)
    train_disback.main(arguments(tmp_path / "one", teacher_folder, prompts_file, **{**flags, "train_batch_size": 2}))
    one, two = (load_file(tmp_path / name / "lora" / "pytorch_lora_weights.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(one[key], two[key], atol=2e-3) for key in one)
    moved = [key for key in one if "lora_B" in key and one[key].abs().max() > 3e-3]
    assert len(moved) > 20, "the tolerance is small beside what was learnt"


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["the launcher", "one process"])
def test_two_processes_end_at_the_same_step_after_a_signal(tmp_path, teacher_folder, prompts_file, whom):
    """With workers that draw batches ahead, which get the signal, too, where a whole process group does."""
    import time

    import psutil

    from diffusers_disback.training.checkpoint import damage

    changes = {"degradation_steps": 2000, "max_train_steps": 8, "train_batch_size": 1, "dataloader_num_workers": 1}
    line = arguments(tmp_path / "run", teacher_folder, prompts_file, **changes, checkpointing_steps=1)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "told", "w") as told:
        process = subprocess.Popen(
            list(map(str, [*torchrun, SCRIPT, *line])), env=environment, stderr=told, stdout=told
        )
    checkpoints = tmp_path / "run" / "checkpoints" / "degradation"
    while not (checkpoints / "checkpoint-000003").exists():
        assert process.poll() is None, (tmp_path / "told").read_text()[-3000:]
        time.sleep(0.05)
    ranks = [child for child in psutil.Process(process.pid).children() if SCRIPT.name in " ".join(child.cmdline())]
    if whom == "the launcher":
        process.terminate()
    else:
        next(rank for rank in ranks if rank.environ()["RANK"] == "1").send_signal(signal.SIGINT)
    process.wait(timeout=120)
    told = (tmp_path / "told").read_text()
    name = "SIGTERM" if whom == "the launcher" else "SIGINT"
    assert told.count(f"train_disback.py: ended by {name}. The last checkpoint") == 1, told[-3000:]
    assert "Traceback" not in told.split("ended by")[0] and "Connection closed" not in told
    last = max(checkpoints.glob("checkpoint-*"))
    assert damage(last) is None and not (tmp_path / "run" / "run.lock").exists()
    assert not list(checkpoints.glob("draft-*"))
    assert not any(rank.is_running() for rank in ranks)


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base_on_a_gpu(tmp_path, teacher_folder, prompts_file, quantization):
    flags = {"lora_rank": 4, "base_quantization": quantization}
    line = arguments(tmp_path / "run", teacher_folder, prompts_file, **flags)
    launcher = [Path(sys.executable).with_name("accelerate"), "launch", "--num_processes", 1]
    done = launch([*launcher, "--mixed_precision", "bf16", SCRIPT, *line], ACCELERATE_USE_CPU="false")
    assert done.returncode == 0, done.stderr
    stored = load_file(tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors")
    assert any(tensor.any() for key, tensor in stored.items() if "lora_B" in key)
    assert all(torch.isfinite(value).all() for value in student(tmp_path / "run").values())


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_training_on_a_gpu(tmp_path, teacher_folder, prompts_file, precision):
    line = arguments(tmp_path / "run", teacher_folder, prompts_file, use_ema=True, validation_steps=2)
    launcher = [Path(sys.executable).with_name("accelerate"), "launch", "--num_processes", 1]
    done = launch([*launcher, "--mixed_precision", precision, SCRIPT, *line], ACCELERATE_USE_CPU="false")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert "CPU" not in report["machine"]["device"] and report["machine"]["mixed_precision"] == precision
    assert report["stages"]["backtracking"]["peak_memory_mb"] > 0
    assert all(torch.isfinite(value).all() for value in student(tmp_path / "run").values())
