"""Closed forms: on Gaussians everything about an objective is known."""

import pytest
import tiny
import torch
from diffusers import EDMEulerScheduler
from gaussian import OneGenerator, batch, best_discriminator, gaussian

from diffusers_disback.models.edm_schedule import EdmSchedule
from diffusers_disback.models.noise_schedule import EDM, FLOW, PREDICTION_TYPES, NoiseSchedule
from diffusers_disback.objectives import OBJECTIVES


CASES = [(name, {}) for name in OBJECTIVES] + [("f_distill", {"divergence": "forward_kl"}), ("sid", {"alpha": 1.2})]


@pytest.fixture(params=CASES, ids=lambda case: "-".join([case[0], *map(str, case[1].values())]))
def objective(request):
    name, arguments = request.param
    return OBJECTIVES[name](**arguments)


def schedule_of(prediction_type):
    if prediction_type == EDM:
        return EdmSchedule.from_scheduler(EDMEulerScheduler())
    if prediction_type != FLOW:
        return NoiseSchedule.from_scheduler(tiny.scheduler(prediction_type))
    sigma = torch.arange(1, 1001) / 1000
    return NoiseSchedule(1 - sigma, sigma, FLOW)


@pytest.fixture(params=[*PREDICTION_TYPES, FLOW, EDM])
def schedule(request):
    return schedule_of(request.param)


def scores(schedule, fake_mean, target_mean, std=0.5):
    """Target and fake score, with the discriminator between them."""
    target, fake_score = gaussian(schedule, target_mean, std), gaussian(schedule, fake_mean, std)
    target.network.requires_grad_(False)
    fake_score.discriminator = best_discriminator(target)
    return target, fake_score


def gradient_of_mean(objective, schedule, own_mean, fake_mean, target_mean, std=0.5):
    mean = torch.full((2, 1, 1), own_mean, requires_grad=True)
    data = batch(64, seed=1)
    target, fake_score = scores(schedule, fake_mean, target_mean, std)
    loss = objective.generator_loss(mean + std * data.noise, data, target, fake_score)
    (gradient,) = torch.autograd.grad(loss, mean)
    return gradient


def test_no_gradient_at_the_fixed_point(objective, schedule):
    assert gradient_of_mean(objective, schedule, 0.7, 0.7, 0.7).abs().max() < 2e-6


@pytest.mark.parametrize("own_mean", [-0.5, 2.0])
def test_the_gradient_points_away_from_the_target(objective, schedule, own_mean):
    gradient = gradient_of_mean(objective, schedule, own_mean, own_mean, 0.7)
    assert (gradient.sign() == (1 if own_mean > 0.7 else -1)).all()
    assert gradient.abs().min() > 1e-3


def test_samples_get_the_gradient_and_the_target_none(objective, schedule):
    """The fake score is kept out of it by `update_generator`: tests/test_gradients.py."""
    mean = torch.zeros(2, 1, 1, requires_grad=True)
    data = batch(8, seed=2)
    target, fake_score = scores(schedule, 0.0, 1.0)
    fake_score.network.requires_grad_(False)
    objective.generator_loss(mean + 0.5 * data.noise, data, target, fake_score).backward()
    assert mean.grad.abs().max() > 0


def test_the_fake_score_gives_the_generator_no_gradient(objective, schedule):
    mean = torch.zeros(2, 1, 1, requires_grad=True)
    data = batch(8, seed=3)
    fake_score = gaussian(schedule, 1.0, 0.5)
    objective.fake_score_loss(mean + 0.5 * data.noise, data, fake_score).backward()
    assert mean.grad is None
    assert fake_score.network.mean.grad.abs().max() > 0


@pytest.mark.parametrize(
    "prediction_type",
    ["epsilon", FLOW, *(pytest.param(name, marks=pytest.mark.slow) for name in ("v_prediction", "sample"))],
)
def test_mean_and_covariance_arrive_at_the_targets(objective, prediction_type):
    """Of a generator `mean + factor z` whose fake score is learned beside it, from another mean, scale and correlation."""
    schedule = schedule_of(prediction_type)
    wanted = torch.tensor([[0.6, 0.0], [0.3, 0.4]])  # covariance: 0.36, 0.18, 0.25
    target, fake_score = scores(schedule, -0.3, 0.7)
    target.network.factor.data = wanted
    mean, factor = torch.full((2, 1, 1), -0.3, requires_grad=True), (0.5 * torch.eye(2)).requires_grad_()
    optimizers = [
        torch.optim.Adam([mean, factor], lr=0.03, betas=(0.0, 0.99)),
        torch.optim.Adam(fake_score.network.parameters(), lr=0.08, betas=(0.0, 0.99)),
    ]
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 310) for optimizer in optimizers]
    random = torch.Generator().manual_seed(0)
    for _ in range(300):
        data = OneGenerator(32, random)
        x0 = mean + torch.einsum("ij,bjhw->bihw", factor, data.noise)
        own = [mean, factor]
        fake_score.network.requires_grad_(False)
        loss = objective.generator_loss(x0, data, target, fake_score)
        gradients = torch.autograd.grad(loss, own)
        fake_score.network.requires_grad_(True)
        optimizers[1].zero_grad()
        objective.fake_score_loss(x0, data, fake_score).backward()
        for parameter, gradient in zip(own, gradients, strict=True):
            parameter.grad = gradient
        for optimizer, scheduler in zip(optimizers, schedules, strict=True):
            optimizer.step()
            scheduler.step()
    assert (mean - 0.7).abs().max() < 0.05
    assert (factor @ factor.mT - wanted @ wanted.mT).abs().max() < 0.04


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
    spy.discriminator = lambda model, x_t, t, condition: torch.zeros(len(x_t))
    for seed in range(60):
        data = batch(64, seed)
        spy.role = "generator"
        objective.generator_loss(data.noise, data, spy, spy)
        spy.role = "fake_score"
        objective.fake_score_loss(data.noise, data, spy)
    generator, fake_score = torch.cat(asked["generator"]), torch.cat(asked["fake_score"])
    assert (generator.min(), generator.max()) >= (20, 20) and generator.min() < 25 and 975 < generator.max() <= 980
    assert fake_score.min() < 5 and 994 < fake_score.max() <= 999
