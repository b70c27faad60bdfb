"""The probe against what can be computed apart, on tiny networks."""

import pytest
import tiny
import torch
from stages import training

from diffusers_disback.data.conditions import PromptConditions
from diffusers_disback.families import family_of
from diffusers_disback.models.generator import OneStepGenerator
from diffusers_disback.training.probe import (
    BANDS,
    SAMPLES,
    MismatchProbe,
    by_name,
    compare,
    denoising_losses,
    mean,
    mismatches,
    predictions,
)


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """The family, its probe batches of the teacher's copy, and the generator."""
    family = family_of(tiny.pipeline())
    data = PromptConditions(tiny.PROMPTS, family.encode)
    generator = OneStepGenerator(family.score_model(), 399)
    config = training(tmp_path_factory.mktemp("probe"), train_batch_size=8)
    return family, MismatchProbe(config, family, data, torch.device("cpu")).sample(generator)


def test_questions_cover_the_schedule_in_bands(probed):
    family, batches = probed
    assert len(batches) == SAMPLES // 8 and all(len(batch.t) == 8 for batch in batches)
    last = family.schedule.num_timesteps
    t, bands = (torch.cat([part(batch) for batch in batches]) for part in (lambda q: q.t, lambda q: q.band))
    for band in range(BANDS):
        own = t[bands == band]
        assert len(own) == SAMPLES // BANDS and len(own.unique()) > len(own) // 2
        assert band * last / BANDS <= own.min() and own.max() < (band + 1) * last / BANDS


def test_probe_batches_are_a_function_of_the_seed_and_the_student(probed, tmp_path):
    family, batches = probed
    data = PromptConditions(tiny.PROMPTS, family.encode)
    generator = OneStepGenerator(family.score_model(), 399)
    for changes, same in [({}, True), ({"seed": 1}, False)]:
        config = training(tmp_path, train_batch_size=8, **changes)
        again = MismatchProbe(config, family, data, torch.device("cpu")).sample(generator)
        assert all(torch.equal(a.x_t, b.x_t) for a, b in zip(batches, again, strict=True)) == same
    config = training(tmp_path, train_batch_size=4)
    sliced = MismatchProbe(config, family, data, torch.device("cpu")).sample(generator)
    model = family.score_model(tiny.unet(seed=1))
    assert denoising_losses(sliced, predictions(model, sliced)) == pytest.approx(
        denoising_losses(batches, predictions(model, batches)), rel=1e-5
    ), "however they are sliced"


def test_losses_and_gaps_are_means_of_squares(probed):
    family, batches = probed
    one, two = (predictions(family.score_model(tiny.unet(seed=seed)), batches) for seed in (1, 2))
    for band in range(BANDS):
        rows = torch.cat([batch.band for batch in batches]) == band
        wanted = torch.cat([batch.regression_target for batch in batches])[rows]
        first, second = (torch.cat(given)[rows] for given in (one, two))
        assert denoising_losses(batches, one)[band] == pytest.approx((first - wanted).square().mean().item())
        assert mismatches(batches, one, two)[band] == pytest.approx((first - second).square().mean().item())
    assert mismatches(batches, one, one) == [0] * BANDS


def test_the_gap_is_the_excess_loss_of_a_best_denoiser(probed):
    """Answers `wanted + error` and `wanted`: the loss of the first is larger by exactly their gap."""
    _, batches = probed
    best = [batch.regression_target for batch in batches]
    worse = [wanted + 0.3 for wanted in best]
    assert denoising_losses(batches, best) == [0] * BANDS
    assert mismatches(batches, best, worse) == pytest.approx([0.09] * BANDS, rel=1e-5)
    assert denoising_losses(batches, worse) == pytest.approx([0.09] * BANDS, rel=1e-5)


def test_names_of_measures(probed):
    family, batches = probed
    assert by_name("mismatch", [1.0, 2.0, 3.0, 4.0]) == {
        "mismatch": 2.5,
        **{f"mismatch_band_{band}": band + 1.0 for band in range(BANDS)},
    }
    one, two = (predictions(family.score_model(tiny.unet(seed=seed)), batches) for seed in (1, 2))
    measures = compare(batches, one, two, two)
    assert measures["target_to_teacher"] == 0 < measures["student_to_target"]
    assert measures["target_denoising_loss"] == pytest.approx(mean(denoising_losses(batches, two)), rel=1e-5)
    assert len(measures) == 5 * (1 + BANDS)
