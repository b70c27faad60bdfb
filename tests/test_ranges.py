"""Settings that are refused before anything is loaded."""

import argparse
import dataclasses
import math

import pytest

from diffusers_disback.commands.command_line import number
from diffusers_disback.training.config import BacktrackingConfig, DegradationConfig, TrainingConfig
from diffusers_disback.training.settings.fields import LARGEST, Range, choices_of, kind_of


CONFIGS = (TrainingConfig, DegradationConfig, BacktrackingConfig)
NEEDED = {  # beside another
    "lora_alpha": {"lora_rank": 4},
    "path_disk_budget_gb": {"degradation_path": "user/repo"},
    "degradation_steps": {"num_path_nodes": 1},
    "max_noise": {"min_noise": 0.0},
    "early_stopping_patience": {"metric_for_best_model": "drift_mean"},
    "early_stopping_threshold": {"metric_for_best_model": "drift_mean", "early_stopping_patience": 1},
}


def settings(*kinds):
    every = [(config, field) for config in CONFIGS for field in dataclasses.fields(config)]
    return [(config, field) for config, field in every if kind_of(field) in kinds and not choices_of(field)]


def taken(config, name, value):
    return config(**{**NEEDED.get(name, {}), name: value})


def test_every_number_is_refused_out_of_its_range_with_its_name():
    assert len(settings(int, float)) > 35
    for config, field in settings(int, float):
        whole, wanted = kind_of(field) is int, field.metadata["range"]
        assert wanted != Range(), f"{field.name} says which numbers it takes"
        bad = [-1, -(10**30), 10**30, True, "1"] if whole else [math.nan, math.inf, -math.inf, True, "1"]
        bad += [] if whole or (wanted.minimum or 0) < 0 else [-1.0]
        bad += [bound for bound in (wanted.above, wanted.below) if bound is not None]
        bad += [] if wanted.minimum is None else [wanted.minimum - 1]
        bad += [] if wanted.maximum is None else [wanted.maximum + 1]
        for value in bad:
            with pytest.raises(ValueError, match=f"--{field.name} has to be"):
                taken(config, field.name, value)
        for bound in (wanted.minimum, wanted.maximum):
            if bound is not None:
                assert getattr(taken(config, field.name, bound), field.name) == bound


def test_what_was_seen_to_train_for_nothing_or_backwards_is_refused():
    for name, values in {
        "max_grad_norm": (-1.0, 0.0),
        "adam_epsilon": (0.0, math.inf),
        "adam_beta1": (1.0, -0.1),
        "adam_weight_decay": (-0.1, math.nan),
        "lr_warmup_steps": (-1,),
        "resolution": (0, 7),
        "dataloader_num_workers": (100_000,),
        "seed": (-1, 2**32),
        "fake_score_learning_rate": (0.0, -1.0, math.nan),
    }.items():
        for value in values:
            with pytest.raises(ValueError, match=f"--{name} has to be"):
                TrainingConfig(**{name: value})
    with pytest.raises(ValueError, match="--train_batch_size has to have a value"):
        TrainingConfig(train_batch_size=None)


def test_texts_are_refused_empty_and_names_unknown():
    for config, field in settings(str):
        for value, message in (("", "is empty"), (" ", "is empty"), ("a\0b", "NUL"), ("\udcff", "is not UTF-8")):
            with pytest.raises(ValueError, match=f"--{field.name} {message}|--{field.name} holds a {message}"):
                taken(config, field.name, value)
    for config, name in (
        (TrainingConfig, "mixed_precision"),
        (TrainingConfig, "stage"),
        (BacktrackingConfig, "guidance_schedule"),
    ):
        with pytest.raises(ValueError, match=f"--{name} 'fp8' is none of"):
            config(**{name: "fp8"})
    with pytest.raises(ValueError, match="--lora_target_modules is empty"):
        TrainingConfig(lora_target_modules=[""])
    with pytest.raises(ValueError, match="--use_ema has to be True or False, but is 'no'"):
        BacktrackingConfig(use_ema="no")
    assert TrainingConfig(validation_prompts=[""]).validation_prompts == [""], "the image of no prompt"
    secret = "hf_secret\udcff"
    with pytest.raises(ValueError) as told:
        TrainingConfig(hub_token=secret)
    assert "secret" not in str(told.value)


def test_how_a_range_is_told():
    assert [str(Range(**bounds)) for bounds in ({"minimum": 1}, {"above": 0}, {"maximum": 5}, {"below": 5})] == [
        "at least 1",
        "above 0",
        "at most 5",
        "below 5",
    ]
    assert str(Range(minimum=0, below=1)) == "in [0, 1)" and str(Range(above=0, maximum=1)) == "in (0, 1]"
    assert str(Range(minimum=0, maximum=2**32 - 1)) == "in [0, 4294967295]"


def test_flags_of_commands_take_the_numbers_of_a_range():
    assert number(True, minimum=1)("3") == 3 and number(False, minimum=1)("1.5") == 1.5
    for parse, text in (
        (number(True, minimum=1), "0"),
        (number(True, minimum=1), "1.5"),
        (number(True, minimum=1), str(LARGEST + 1)),
        (number(False, minimum=1), "nan"),
        (number(False, minimum=1), "inf"),
        (number(False, minimum=1), "x"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is not taken: it has to be"):
            parse(text)


def test_commands_refuse_numbers_before_they_look_for_a_model(capsys):
    from diffusers_disback.commands.cli import main

    for line, flag in (
        (["timestep-sweep", "nowhere", "--batch_size", "0"], "--batch_size"),
        (["timestep-sweep", "nowhere", "--timesteps", "-5"], "--timesteps"),
        (["timestep-sweep", "nowhere", "--num_prompts", "0"], "--num_prompts"),
        (["timestep-sweep", "nowhere", "--guidance_scale", "nan"], "--guidance_scale"),
        (["extract-lora", "nowhere", "nowhere", "out", "--rank", "0"], "--rank"),
        (["path", "show", "nowhere", "--num_inference_steps", "0"], "--num_inference_steps"),
    ):
        assert main(line) == 2
        assert flag in capsys.readouterr().err
