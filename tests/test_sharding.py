"""Training in full by FSDP2, in two gloo processes, against the same by plain data parallelism or in one process."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from script import SHORT, arguments, in_two_processes, student
from stages import close, equal, training

from diffusers_disback.training.networks import _check_launch, accelerator_of


FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
NODE = "path/degradation-000004/unet/diffusion_pytorch_model.safetensors"
FLAGS = {"train_batch_size": 1, "checkpointing_steps": 2, "use_ema": True, "validation_steps": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"objective": "sid", "gradient_checkpointing": True, "gradient_accumulation_steps": 2},
        {"target_schedule": "adaptive", "mismatch_steps": 1},
    ],
    ids=["dmd", "sid", "adaptive"],
)
def test_sharded_stages_are_those_of_data_parallelism(changes, tmp_path, teacher_folder, prompts_file):
    ranks = {}
    for name, environment in (("sharded", FSDP), ("parallel", {})):
        line = arguments(tmp_path / name, teacher_folder, prompts_file, **{**FLAGS, **changes})
        ranks[name] = in_two_processes(tmp_path / f"{name}-ranks", line, **environment)
    assert equal(*ranks["sharded"]), "every process gathers the same"
    assert close(ranks["sharded"][0], ranks["parallel"][0], atol=2e-4)
    for file in ("unet/diffusion_pytorch_model.safetensors", NODE):
        assert close(load_file(tmp_path / "sharded" / file), load_file(tmp_path / "parallel" / file), atol=2e-4), file
    configs = [json.loads((tmp_path / name / "unet" / "config.json").read_text()) for name in ranks]
    assert configs[0] == configs[1], "nothing of FSDP is published"
    curves = [json.loads((tmp_path / name / "report.json").read_text())["curve"] for name in ranks]
    assert [row.keys() for row in curves[0]] == [row.keys() for row in curves[1]]


@pytest.mark.slow
def test_a_sharded_update_in_bf16_is_that_of_data_parallelism(tmp_path, teacher_folder, prompts_file):
    """The first. Later ones drift apart, since half precision rounds weights that differ in the last place to different ones."""
    changes = {"degradation_steps": 1, "num_path_nodes": 1, "stage": "record", "mixed_precision": "bf16"}
    weights = []
    for name, environment in (("sharded", FSDP), ("parallel", {})):
        line = arguments(tmp_path / name, teacher_folder, prompts_file, train_batch_size=1, **changes)
        ranks = in_two_processes(tmp_path / f"{name}-ranks", line, **environment)
        weights.append(torch.cat([tensor.flatten() for _, tensor in sorted(ranks[0].items())]))
    differ = (weights[0] - weights[1]).abs() > 1e-5
    assert differ.float().mean() < 2e-3, (
        "Adam's first update is the gradient's sign: those near 0 alone may have another"
    )


@pytest.mark.slow
def test_a_sharded_run_is_resumed_bit_for_bit(tmp_path, teacher_folder, prompts_file):
    line = arguments(tmp_path / "two", teacher_folder, prompts_file, **FLAGS)
    in_two_processes(tmp_path / "ranks", line, **FSDP)
    two = student(tmp_path / "two")
    checkpoints = tmp_path / "two" / "checkpoints" / "backtracking"
    files = {file.name for file in (checkpoints / "checkpoint-000002" / "generator").iterdir()}
    assert len(files) == 3 and all(name.endswith((".safetensors", ".json")) for name in files), "and no pickle"
    for file in ("report.json", "model_index.json"):
        (tmp_path / "two" / file).unlink()
    resume = ["--resume_from_checkpoint", checkpoints / "checkpoint-000002"]
    in_two_processes(tmp_path / "again", [*line, *resume], **FSDP)
    assert equal(student(tmp_path / "two"), two)
    with pytest.raises(AssertionError, match="is_sharded was True, is None"):
        in_two_processes(tmp_path / "parallel", [*line, *resume])


@pytest.mark.parametrize(
    "environment, told",
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed is not supported"),
        (
            {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"},
            "parallelism config is not supported",
        ),
        ({"ACCELERATE_USE_FSDP": "true"}, "--fsdp_version 2"),
        ({**FSDP, "FSDP_VERSION": "1", "FSDP_SYNC_MODULE_STATES": "true"}, "--fsdp_version 2"),  # as it is launched
        ({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, "without offloading"),
    ],
)
def test_what_is_never_supported_is_refused_before_accelerate_looks(environment, told, tmp_path, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=told):
        accelerator_of(training(tmp_path))


def test_a_launch_of_a_single_process_is_refused(tmp_path, monkeypatch):
    accelerator_of(training(tmp_path))
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="a single one"):
        _check_launch(training(tmp_path), "no")


def test_a_torch_whose_writer_has_other_parameters_is_refused(tmp_path, monkeypatch):
    """As torch 2.8 has it."""
    from torch.distributed.checkpoint import hf_storage

    class Older:
        def __init__(self, path, fqn_to_index_mapping=None, token=None, save_sharded=False):
            raise AssertionError("it is not asked")

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    _check_launch(training(tmp_path), "no")
    monkeypatch.setattr(hf_storage, "HuggingFaceStorageWriter", Older)
    with pytest.raises(ValueError, match=f"needs a newer torch: torch {re.escape(torch.__version__)} cannot"):
        _check_launch(training(tmp_path), "no")


@pytest.mark.parametrize(
    "flag, value", [("lora_rank", 2), ("offload_idle_role", True), ("use_8bit_adam", True), ("channels_last", True)]
)
def test_what_does_not_go_with_shards_is_refused(flag, value, tmp_path, teacher_folder, prompts_file):
    line = arguments(tmp_path / "run", teacher_folder, prompts_file, **SHORT, **{flag: value})
    with pytest.raises(AssertionError, match=f"does not go with --{flag}"):
        in_two_processes(tmp_path / "ranks", line, **FSDP)


@pytest.mark.slow
@pytest.mark.parametrize("teacher", ["latents", "grey pixels"])
def test_a_sharded_update_is_that_of_one_process(teacher, tmp_path):
    """Three updates with clipped gradients and an average, in which a whole copy says what the shares are to be."""
    ranks = in_two_processes(tmp_path / "ranks", [teacher], "sharded_updates.py", **FSDP)
    assert equal(*ranks)
    found = {name: {} for name in ("start", "sharded", "whole", "average", "restored", "filled")}
    for key, tensor in ranks[0].items():
        name, _, key = key.partition("/")
        found[name][key] = tensor
    assert close(found["sharded"], found["whole"], atol=1e-6)
    moved = [key for key, start in found["start"].items() if (found["whole"][key] - start).abs().max() > 1e-4]
    assert len(moved) > 0.9 * len(found["start"]), (
        "all but biases that nothing depends on, as those of attention's keys"
    )
    assert not equal(found["average"], found["sharded"])
    assert equal(found["restored"], found["average"]), "weights, moments and average are read back exactly"
    assert equal(found["filled"], found["start"])
    assert torch.stack([found["sharded"][key].isfinite().all() for key in found["sharded"]]).all()
