"""One step of each stage on another device than the CPU, where no GPU is at hand: an operation that mixes the two fails.

The other device is torch's `meta`, which has shapes and no numbers. What copies back to the CPU (`--offload_idle_role`, other targets
for a measure) cannot be seen on it.
"""

import pytest
import torch
from accelerate import PartialState
from peft.tuners.tuners_utils import BaseTunerLayer
from stages import images_for, record, recorder, trainer, training

from diffusers_disback.models.batch import Batch
from diffusers_disback.path.path import DegradationPath


pytestmark = pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
META = torch.device("meta")
ADAPTERS = {"lora_rank": 2}


@pytest.fixture
def on_meta(monkeypatch):
    """Makes `meta` the device that accelerate places networks and batches on."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    monkeypatch.setattr(PartialState(), "device", META)
    monkeypatch.setattr(BaseTunerLayer, "_move_adapter_to_device_of_base_layer", move_adapter)  # it skips meta alone
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *_: None)  # its fused kernel knows no meta


def move_adapter(layer, adapter_name, device=None):
    for name in layer.adapter_layer_names:
        if adapter_name in (layers := getattr(layer, name, {})):
            layers[adapter_name].to(META)


@pytest.fixture(scope="module")
def paths(tmp_path_factory, teacher_folder):
    """A recorded path of full nodes, and one of adapters."""
    folders = {}
    for name, mode in (("full", {}), ("adapters", ADAPTERS)):
        folders[name] = tmp_path_factory.mktemp(name)
        record(training(folders[name], **mode), teacher_folder)
    return folders


def one_step(stage):
    numbers = range(stage.batches_per_step)
    losses = stage.train_step(0, [[stage._batch(draw) for draw in stage.batches[number]] for number in numbers])
    assert losses and all(loss.device == META for loss in losses.values())
    for learner in stage.learners:
        assert {parameter.device for parameter in learner.parameters()} == {META}


SLOW = pytest.mark.slow


@pytest.mark.parametrize("mode", [{}, pytest.param({"gradient_checkpointing": True}, marks=SLOW), ADAPTERS])
def test_stage_1(tmp_path, teacher_folder, on_meta, mode):
    one_step(recorder(training(tmp_path, **mode), teacher_folder))


@pytest.mark.parametrize(
    "objective, mode, changes",
    [
        ("dmd", {}, {"use_ema": True}),
        pytest.param("dmd", {"gradient_checkpointing": True}, {}, marks=SLOW),
        ("sid", {}, {"fake_score_guidance_scale": 2.0}),
        ("f_distill", {}, {}),
        pytest.param("diff_instruct", ADAPTERS, {}, marks=SLOW),
        ("sid", {**ADAPTERS, "gradient_checkpointing": True}, {}),
    ],
)
def test_stage_2(tmp_path, teacher_folder, paths, on_meta, objective, mode, changes):
    images = images_for(objective, tmp_path / "images")
    path = DegradationPath.from_pretrained(paths["adapters" if "lora_rank" in mode else "full"] / "path")
    stage = trainer(training(tmp_path / "run", objective=objective, **mode, **images), path, **changes)
    one_step(stage)
    assert stage.target_node == 1
    stage.schedule.node = lambda *_: 0
    one_step(stage)  # the teacher's turn


def test_a_tensor_that_was_left_behind_is_seen(tmp_path, teacher_folder, on_meta, monkeypatch):
    stage = recorder(training(tmp_path), teacher_folder)
    monkeypatch.setattr(Batch, "draw_noise", lambda self: torch.randn(self.noise.shape))
    with pytest.raises(RuntimeError, match="meta"):
        one_step(stage)
