"""Closed forms: on Gaussians everything about an objective is known."""

import pytest
import tiny
import torch
from gaussian import batch, gaussian

from diffusers_disback.models.noise_schedule import PREDICTION_TYPES, NoiseSchedule
from diffusers_disback.objectives import OBJECTIVES


@pytest.fixture(params=OBJECTIVES)
def objective(request):
    return OBJECTIVES[request.param]()


@pytest.fixture(params=PREDICTION_TYPES)
def schedule(request):
    return NoiseSchedule.from_scheduler(tiny.scheduler(request.param))


def gradient_of_mean(objective, schedule, own_mean, fake_mean, target_mean, std=0.5):
    mean = torch.full((2, 1, 1), own_mean, requires_grad=True)
    data = batch(64, seed=1)
    target, fake_score = gaussian(schedule, target_mean, std), gaussian(schedule, fake_mean, std)
    loss = objective.generator_loss(mean + std * data.noise, data, target, fake_score)
    (gradient,) = torch.autograd.grad(loss, mean)
    return gradient, target, fake_score


def test_no_gradient_at_the_fixed_point(objective, schedule):
    gradient, _, _ = gradient_of_mean(objective, schedule, 0.7, 0.7, 0.7)
    assert gradient.abs().max() < 1e-6


@pytest.mark.parametrize("own_mean", [-0.5, 2.0])
def test_the_gradient_points_away_from_the_target(objective, schedule, own_mean):
    gradient, _, _ = gradient_of_mean(objective, schedule, own_mean, own_mean, 0.7)
    assert (gradient.sign() == (1 if own_mean > 0.7 else -1)).all()
    assert gradient.abs().min() > 1e-3


def test_scores_get_no_gradient_from_the_generator(objective, schedule):
    mean = torch.zeros(2, 1, 1, requires_grad=True)
    data = batch(8, seed=2)
    target, fake_score = gaussian(schedule, 1.0, 0.5), gaussian(schedule, 0.0, 0.5)
    objective.generator_loss(mean + 0.5 * data.noise, data, target, fake_score).backward()
    assert mean.grad is not None
    assert target.network.mean.grad is None and fake_score.network.mean.grad is None


def test_the_fake_score_gives_the_generator_no_gradient(objective, schedule):
    mean = torch.zeros(2, 1, 1, requires_grad=True)
    data = batch(8, seed=3)
    fake_score = gaussian(schedule, 1.0, 0.5)
    objective.fake_score_loss(mean + 0.5 * data.noise, data, fake_score).backward()
    assert mean.grad is None
    assert fake_score.network.mean.grad.abs().max() > 0


def test_a_learnable_mean_arrives_at_the_targets(objective, schedule):
    mean = torch.full((2, 1, 1), -1.0, requires_grad=True)
    target, fake_score = gaussian(schedule, 0.7, 0.5), gaussian(schedule, -1.0, 0.5)
    optimizers = [torch.optim.Adam([mean], lr=0.03), torch.optim.Adam(fake_score.network.parameters(), lr=0.06)]
    for step in range(300):
        if step == 200:
            for optimizer in optimizers:
                optimizer.param_groups[0]["lr"] /= 10
        data = batch(16, seed=step)
        x0 = mean + 0.5 * data.noise
        losses = [
            objective.generator_loss(x0, data, target, fake_score),
            objective.fake_score_loss(x0, data, fake_score),
        ]
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert (mean - 0.7).abs().max() < 0.05
    assert (fake_score.network.mean - 0.7).abs().max() < 0.1


def test_the_dmd_weight_is_one_over_the_targets_error(schedule):
    x0, x0_target = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    weight = OBJECTIVES["dmd"]().weight(x0, x0_target)
    assert weight.shape == (3, 1, 1, 1)
    assert torch.allclose(weight.flatten(), 1 / (x0 - x0_target).abs().flatten(1).mean(1))
    assert torch.isfinite(OBJECTIVES["dmd"]().weight(x0, x0)).all()


def test_the_generator_asks_between_2_and_98_percent_and_the_fake_score_everywhere(objective, schedule):
    asked = {"generator": [], "fake_score": []}

    class Spy(type(gaussian(schedule, 0.0, 1.0))):
        role = "generator"

        def predict(self, x_t, t, condition):
            asked[self.role].append(t)
            return super().predict(x_t, t, condition)

    spy = Spy(gaussian(schedule, 0.0, 1.0).network, schedule)
    for seed in range(60):
        data = batch(64, seed)
        spy.role = "generator"
        objective.generator_loss(data.noise, data, spy, spy)
        spy.role = "fake_score"
        objective.fake_score_loss(data.noise, data, spy)
    generator, fake_score = torch.cat(asked["generator"]), torch.cat(asked["fake_score"])
    assert (generator.min(), generator.max()) >= (20, 20) and generator.min() < 25 and 975 < generator.max() <= 980
    assert fake_score.min() < 5 and 994 < fake_score.max() <= 999
