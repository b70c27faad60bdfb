"""Guidance of the fake score in the generator's loss and in its own, and the warm-up of the generator's loss."""

import pytest
import torch
from stages import trainer, training

from diffusers_disback.training.config import BacktrackingConfig, loss_scale


def batches_of(stage, number=0):
    return [stage._batch(draw) for draw in stage.batches[number]]


def calls_of(stage):
    """The passes of both scores in their order: whose, with what condition, and whether with a graph."""
    calls = []

    def watch(name, network):
        def hook(module, args, kwargs):
            calls.append((name, kwargs["encoder_hidden_states"].detach().clone(), torch.is_grad_enabled()))

        network.register_forward_pre_hook(hook, with_kwargs=True)

    watch("target", stage.target.network)
    watch("fake_score", stage.fake_score.unwrapped())
    return calls


def stage_with(tmp_path, **changes):
    common = {"objective": "sid", "generator_adam_beta1": 0.0, "fake_score_adam_beta1": 0.0}
    stage = trainer(training(tmp_path, **common), None, guidance_scale=2.0, fake_score_updates=1, **changes)
    stage.switch_target(0)
    return stage


def conditions(stage, scale):
    """What a network is given of a batch at a guidance scale."""
    (batch,) = batches_of(stage)
    with_, without = batch.condition["encoder_hidden_states"], batch.negative["encoder_hidden_states"]
    return {1.0: with_, 0.0: without}.get(scale, torch.cat([without, with_]))


@pytest.mark.parametrize(
    "asked, trained", [(2.0, None), (1.0, None), (0.0, None), (-1.0, None), (1.5, 2.0), (2.0, 1.0), (0.0, 1.0)]
)
def test_the_fake_score_is_asked_and_trained_with_its_guidance(asked, trained, tmp_path):
    """SiD-LSG's settings are the first: long and short guidance of 2 everywhere."""
    stage = stage_with(tmp_path, fake_score_guidance_scale=asked, fake_score_training_guidance_scale=trained)
    stage.generator.model.call = stage.fake_score.score_model(
        stage.family
    ).call  # the student's passes are not watched
    calls = calls_of(stage)
    samples, _ = stage.update_generator(batches_of(stage))
    assert [name for name, _, _ in calls] == ["target", "fake_score"]
    assert torch.equal(calls[0][1], conditions(stage, 2.0)), "the teacher's guidance is its own"
    assert torch.equal(calls[1][1], conditions(stage, asked))
    calls.clear()
    stage.update_fake_score(batches_of(stage), samples)
    ((name, condition, has_gradient),) = calls
    assert name == "fake_score" and has_gradient
    assert torch.equal(condition, conditions(stage, asked if trained is None else trained))


def test_the_losses_are_those_of_the_guided_outputs(tmp_path):
    stage = stage_with(tmp_path, fake_score_guidance_scale=-0.5, fake_score_training_guidance_scale=3.0)
    model, (batch,) = stage.fake_score.score_model(stage.family), batches_of(stage)
    x0, t, noise = stage.samples([batch])[0], torch.tensor([100, 700]), torch.randn_like(batch.noise)
    x_t = model.schedule.diffuse(x0, noise, t)
    with_, without = model.predict(x_t, t, batch.condition), model.predict(x_t, t, batch.negative)
    for scale in (0.0, 1.0, -0.5, 3.0):
        model.guidance_scale = scale
        guided = without + scale * (with_ - without)
        loss = model.denoising_loss(x0, noise, t, batch.condition, batch.negative)
        assert torch.allclose(loss, torch.nn.functional.mse_loss(guided, noise), rtol=1e-5)
        wanted = model.schedule.x0_of_output(guided, x_t, t)
        assert torch.allclose(model.denoise(x_t, t, batch.condition, batch.negative), wanted, atol=1e-4)
    with pytest.raises(ValueError, match="needs the condition of the empty prompt"):
        model.denoise(x_t, t, batch.condition)


def test_the_probe_measures_the_fake_score_as_it_is_trained(tmp_path):
    stages = [stage_with(tmp_path, fake_score_training_guidance_scale=scale) for scale in (1.0, 3.0)]
    losses = [stage.mismatch(0)["fake_score_denoising_loss"] for stage in stages]
    assert losses[0] != losses[1]
    assert stages[0].mismatch(0)["teacher_denoising_loss"] == stages[1].mismatch(0)["teacher_denoising_loss"]


def test_the_generators_loss_is_scaled_up(tmp_path):
    config = BacktrackingConfig(generator_loss_warmup_steps=4)
    scales = [loss_scale(step, config) for step in range(6)]
    assert scales == pytest.approx([0.03, 0.03**0.75, 0.03**0.5, 0.03**0.25, 1.0, 1.0])
    assert {loss_scale(step, BacktrackingConfig()) for step in range(3)} == {1.0}
    norms = {}
    for steps in (0, 4):
        stage = stage_with(tmp_path, generator_loss_warmup_steps=steps)
        losses = stage.train_step(0, [batches_of(stage)])
        norms[steps] = (stage.student.gradient_norm.item(), losses["generator_loss"].item())
    assert norms[4][0] == pytest.approx(0.03 * norms[0][0], rel=1e-4)
    assert norms[4][1] == norms[0][1], "what is logged is not scaled"
