"""The generator's gradient is that of its own parameters alone, and the same with gradient checkpointing as without."""

import pytest
import torch
from stages import record, trainer, training

from diffusers_disback.models.score_model import ScoreModel
from diffusers_disback.objectives import OBJECTIVES, Objective


class ThroughScores(Objective):
    """A loss whose gradient passes through both scores, as that of score identity distillation does."""

    differentiates_scores = True

    def generator_loss(self, x0, batch, target, fake_score):
        t = batch.draw_timesteps(20, 979)
        x_t = target.schedule.diffuse(x0, batch.draw_noise(), t)
        x0_target = target.denoise(x_t, t, batch.condition, batch.negative)
        x0_fake = fake_score.denoise(x_t, t, batch.condition)
        return ((x0_target - x0_fake) * (x0_target - x0)).mean()


OBJECTIVES_OF_TEST = {**OBJECTIVES, "through_scores": ThroughScores}


@pytest.fixture(autouse=True)
def discriminator(monkeypatch):
    monkeypatch.setattr(ScoreModel, "discriminator", staticmethod(lambda model, x_t, *_: x_t.flatten(1).mean(1)))


def batches_of(stage, numbers):
    return [[stage._batch(draw) for draw in stage.batches[number]] for number in numbers]


def gradients(stage, objective):
    """The generator's gradient of one update, which is not made, and what other roles were left with."""
    stage.objective = objective
    found = {}

    def keep(parameters):
        own = {id(parameter) for parameter in parameters}
        found["own"] = [parameter.grad.clone() for parameter in parameters]
        networks = [learner.unwrapped() for learner in stage.learners] + [stage.target.network]
        others = [p for network in networks for p in network.parameters() if id(p) not in own]
        found["others"] = sum(parameter.grad is not None for parameter in others)
        for parameter in parameters:
            parameter.grad = None

    own, stage.student._update = stage.student._update, keep
    stage.update_generator(*batches_of(stage, [5]))
    stage.student._update = own
    assert all(parameter.requires_grad for learner in stage.learners for parameter in learner.parameters())
    return found


def stages_of(mode, folder, teacher_folder):
    """Stage 2 without and with gradient checkpointing, after a first update, so that no adapter is zero."""
    settings = {} if mode == "full" else {"lora_rank": 4}
    path = None
    if mode == "adapters along a path":
        path = record(training(folder, **settings), teacher_folder, steps=4, nodes=2)
    for checkpointing in (False, True):
        config = training(folder / str(checkpointing), gradient_checkpointing=checkpointing, **settings)
        stage = trainer(config, path)
        stage.switch_target(0)
        stage.train_step(0, batches_of(stage, range(2)))
        yield stage


@pytest.mark.parametrize("mode", ["full", "adapters", "adapters along a path"])
def test_gradients_are_equal_with_and_without_checkpointing(mode, tmp_path, teacher_folder):
    """And none is left in another role, whose own next update would take it."""
    plain_stage, checkpointed_stage = stages_of(mode, tmp_path, teacher_folder)
    for name, objective in OBJECTIVES_OF_TEST.items():
        plain, checkpointed = (gradients(stage, objective()) for stage in (plain_stage, checkpointed_stage))
        assert plain["others"] == checkpointed["others"] == 0, name
        assert len(plain["own"]) == len(checkpointed["own"]) > 50
        norm = torch.stack([gradient.norm() for gradient in plain["own"]]).norm()
        differences = [one - two for one, two in zip(plain["own"], checkpointed["own"], strict=True)]
        assert norm > 0 and torch.stack([each.norm() for each in differences]).norm() <= 1e-6 * norm, name
