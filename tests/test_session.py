"""A run from Python, as in a notebook: the same as from the training script."""

import inspect
import json

import datasets
import pytest
import tiny
import train_disback
from diffusers import DiffusionPipeline
from script import TINY, student
from stages import equal

from diffusers_disback import DisBackConfig, DisBackTrainer


def settings(folder, **changes) -> DisBackConfig:
    return DisBackConfig(**{"output_dir": str(folder), **TINY, **changes})


def test_a_notebook_distils_saves_and_publishes(run, tmp_path, teacher_folder, hub, repo, capsys, monkeypatch):
    folder = tmp_path / "notebook"
    trainer = DisBackTrainer(teacher_folder, args=settings(folder), train_dataset=tiny.PROMPTS)
    result = trainer.train()
    assert result is trainer.result and result.cost["steps"] == 4 and len(trainer.path) == 2
    trainer.save_model()
    assert "student: " in capsys.readouterr().out
    assert equal(student(folder), student(run("script"))), "the script of the same settings makes the same"
    image = DiffusionPipeline.from_pretrained(folder)(tiny.PROMPTS[0], num_inference_steps=1, guidance_scale=0).images[
        0
    ]
    assert image.size == (16, 16)

    trainer.push_to_hub(repo)
    assert "pushed to" in capsys.readouterr().out

    command = json.loads((folder / "report.json").read_text())["command"]
    assert command.endswith("train_disback.py --config settings.yaml --prompts_file prompts.txt")
    again = tmp_path / "again"
    monkeypatch.chdir(folder)
    train_disback.main([*command.split("train_disback.py ")[1].split(), "--output_dir", str(again)])
    assert equal(student(again), student(folder)), "the command of the card repeats the run"


def test_a_run_that_was_cut_off_goes_on_in_another_notebook(tmp_path, teacher_folder):
    whole = DisBackTrainer(teacher_folder, settings(tmp_path / "whole"), tiny.PROMPTS)
    whole.train()
    whole.save_model()
    first = DisBackTrainer(
        teacher_folder, settings(tmp_path / "run", max_train_steps=2, num_path_nodes=1), tiny.PROMPTS
    )
    first.train()  # and nothing is saved but its checkpoints
    rest = {"max_train_steps": 4, "num_path_nodes": 1, "resume_from_checkpoint": "latest"}
    second = DisBackTrainer(teacher_folder, settings(tmp_path / "run", **rest), tiny.PROMPTS)
    assert not second.is_finished
    assert second.train().cost["steps"] == 4
    second.save_model()
    third = DisBackTrainer(teacher_folder, settings(tmp_path / "run", **rest), tiny.PROMPTS)
    assert third.is_finished and third.train() is None
    third.save_model()


def test_a_data_set_in_memory_gives_its_captions(tmp_path, teacher_folder):
    rows = datasets.Dataset.from_dict({"text": [*tiny.PROMPTS, None, " "], "other": range(len(tiny.PROMPTS) + 2)})
    trainer = DisBackTrainer(teacher_folder, settings(tmp_path, stage="record"), rows)
    assert trainer.train() is None and trainer.path.complete
    assert (tmp_path / "prompts.txt").read_text().splitlines() == tiny.PROMPTS


@pytest.mark.parametrize(
    "model, changes, dataset, message",
    [
        (None, {}, ["a"], "There is no teacher: pass model"),
        ("x", {"prompts_file": "p.txt"}, ["a"], "train_dataset and prompts_file are given"),
        ("x", {}, ["", None], "holds no prompts"),
        ("x", {}, ["a", 3], "Row 1 of train_dataset"),
        ("x", {"evaluators": ["charm"]}, ["a"], "--evaluators charm: known evaluators are"),
        ("x", {"stage": "record", "num_path_nodes": 0}, ["a"], "has nothing to do"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_loaded(tmp_path, model, changes, dataset, message):
    with pytest.raises(ValueError, match=message):
        DisBackTrainer(model, settings(tmp_path, **changes), dataset)


def test_the_main_function_of_the_script_is_short():
    assert len(inspect.getsource(train_disback.main).splitlines()) <= 40
