"""At which timesteps networks are trained."""

import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling
from gaussian import OneGenerator, batch

from diffusers_disback.models.batch import Batch
from diffusers_disback.models.timestep_sampling import TimestepSampling


def draws(number=20000, **settings):
    return TimestepSampling(**settings).draw(OneGenerator(number, torch.Generator().manual_seed(0), (1,)), 1000)


def test_uniform_is_drawn_as_before():
    assert torch.equal(TimestepSampling().draw(batch(8, 1), 1000), batch(8, 1).draw_timesteps(20, 980))
    assert torch.equal(TimestepSampling().everywhere().draw(batch(8, 1), 1000), batch(8, 1).draw_timesteps(0, 999))


@pytest.mark.parametrize(
    "settings, quantiles",
    [
        ({}, (0.25, 0.5, 0.75)),
        ({"timestep_shift": 3.0}, (0.5, 0.75, 0.9)),  # 3 u / (1 + 2 u)
        ({"timestep_sampling": "logit_normal"}, (0.3375, 0.5, 0.6625)),  # sigmoid of -+0.6745
        ({"timestep_sampling": "logit_normal", "logit_mean": 1.0, "logit_std": 0.5}, (0.6599, 0.7311, 0.7921)),
        ({"timestep_sampling": "logit_normal", "timestep_shift": 3.0}, (0.6044, 0.75, 0.8548)),
        ({"timestep_sampling": "mode", "mode_scale": 1.29}, (0.3834, 0.5, 0.6166)),
        ({"timestep_sampling": "mode", "mode_scale": 0.0}, (0.25, 0.5, 0.75)),
    ],
)
def test_quantiles_are_those_of_the_formula(settings, quantiles):
    """In a range, and over all of the schedule."""
    names = {"timestep_sampling": "kind", "timestep_shift": "shift"}
    own = {names.get(name, name): value for name, value in settings.items()}
    for low, high in ((0.0, 1.0), (0.2, 0.6)):
        t = draws(min_noise=low, max_noise=high, **own)
        assert low * 1000 <= t.min() and t.max() <= min(high * 1000, 999)
        found = t.float().quantile(torch.tensor([0.25, 0.5, 0.75])) / 1000
        assert (found - (low + (high - low) * torch.tensor(quantiles))).abs().max() < 0.01


@pytest.mark.parametrize("kind", ["logit_normal", "mode"])
def test_it_is_the_distribution_of_diffusers(kind):
    shape = {"logit_mean": 0.5, "logit_std": 0.8, "mode_scale": 1.29}
    own = draws(kind=kind, min_noise=0.0, max_noise=1.0, **shape).float() / 1000
    state = torch.Generator().manual_seed(1)
    theirs = compute_density_for_timestep_sampling(kind, 20000, **shape, generator=state)
    at = torch.linspace(0.01, 0.99, 21)
    assert (own.quantile(at) - theirs.quantile(at)).abs().max() < 0.015


def test_a_samples_timestep_is_its_own_generators():
    whole = batch(6, 3)
    sampling = TimestepSampling("logit_normal", shift=2.0)
    parts = [Batch(whole.noise[i : i + 2], {}, {}, batch(6, 3).generators[i : i + 2]) for i in (0, 2, 4)]
    assert torch.equal(sampling.draw(whole, 1000), torch.cat([sampling.draw(part, 1000) for part in parts]))


def test_what_is_no_range_or_scale_is_refused():
    for settings in (
        {"min_noise": -0.1},
        {"max_noise": 1.1},
        {"min_noise": 1.0, "max_noise": 1.0},
        {"min_noise": 0.99},
    ):
        with pytest.raises(ValueError, match="Timesteps cannot be drawn from"):
            TimestepSampling(**settings)
    for scale in (-1.1, 1.76):
        with pytest.raises(ValueError, match="mode_scale=.* has to be in -1"):
            TimestepSampling(mode_scale=scale)
    for settings in ({"logit_std": 0.0}, {"shift": -1.0}):
        with pytest.raises(ValueError, match="have to be above 0"):
            TimestepSampling(**settings)
