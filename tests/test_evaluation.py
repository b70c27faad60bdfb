import warnings

import numpy as np
import pytest
import scipy.linalg
import tiny
import torch
from PIL import Image
from torch import nn

from diffusers_disback.evaluation import EVALUATORS, DriftEvaluator, Evaluation, FrechetDistance
from diffusers_disback.evaluation.report import many_step_pipeline
from shapes.evaluator import ShapesEvaluator, load_judge
from shapes.world import CAPTIONS, pixels


class Colours(nn.Module):
    """Five features of a picture, of different sizes."""

    num_features = 5

    def forward(self, pictures):
        mean, std = pictures.mean((2, 3)), pictures.std((2, 3))
        return torch.cat([3 * mean, 10 * std[:, :2]], 1)


def pictures(seed, shift=0.0, count=300):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(count, 3, 1, 1, generator=generator) + 0.3 * torch.rand(count, 3, 8, 8, generator=generator)
    return ((values / 1.3 + shift).clamp(0, 1) * 255).to(torch.uint8)


def frechet_by_scipy(one, two):
    one, two = (Colours()(p.float() / 255).double().numpy() for p in (one, two))
    c1, c2 = np.cov(one, rowvar=False), np.cov(two, rowvar=False)
    root = scipy.linalg.sqrtm(c1 @ c2).real
    return ((one.mean(0) - two.mean(0)) ** 2).sum() + np.trace(c1 + c2 - 2 * root)


def test_the_distance_is_scipys():
    real, generated = pictures(0), pictures(1, shift=0.1)
    expected = frechet_by_scipy(real, generated)
    assert FrechetDistance(Colours(), real)(generated)["distance"] == pytest.approx(expected, rel=1e-3)
    assert expected > 0.05, "pictures reach the features in 0..1, not scaled down to nothing"


def test_the_distance_can_be_asked_again():
    metric = FrechetDistance(Colours(), pictures(0))
    near, far = metric(pictures(1)), metric(pictures(1, shift=0.3))
    assert near["distance"] < far["distance"]
    assert metric(pictures(1)) == near


def test_drift():
    reference = torch.full((4, 3, 8, 8), 100, dtype=torch.uint8)
    drift = DriftEvaluator(reference)
    assert drift(reference) == {"drift_mean": 0, "drift_std": 0, "drift_saturation": 0}
    red = reference.clone()
    red[:, 0] += 51
    measures = drift(red)
    assert measures["drift_mean"] == pytest.approx(0.2 / 3, abs=1e-6)
    assert measures["drift_saturation"] == pytest.approx(0.2, abs=1e-6), "more saturated is above 0"
    assert drift(torch.randint(0, 200, reference.shape, dtype=torch.uint8))["drift_std"] > 0.1


@pytest.mark.parametrize("name", EVALUATORS)
def test_every_evaluator_gives_named_numbers(name):
    arguments = (Colours(), pictures(0)) if name == "distance" else (pictures(0),)
    measures = EVALUATORS[name](*arguments)(pictures(1), ["a prompt"] * 300)
    assert measures and all(isinstance(value, float) for value in measures.values())


def test_the_same_noise_for_every_pipeline():
    evaluation = Evaluation(tiny.PROMPTS, seed=3, batch_size=2)
    pipe = many_step_pipeline(tiny.pipeline())
    one, seconds = evaluation.draw(pipe, num_inference_steps=2, guidance_scale=2.0)
    two, _ = evaluation.draw(pipe, num_inference_steps=2, guidance_scale=2.0)
    assert one.shape == (3, 3, 16, 16) and one.dtype == torch.uint8 and seconds > 0
    assert torch.equal(one, two)
    other, _ = Evaluation(tiny.PROMPTS, seed=4, batch_size=2).draw(pipe, num_inference_steps=2)
    assert not torch.equal(one, other)


def test_the_teachers_sampler_does_not_clip():
    teacher = tiny.pipeline()
    teacher.scheduler = tiny.scheduler(clip_sample=True)
    assert many_step_pipeline(teacher).scheduler.config.clip_sample is False
    assert teacher.scheduler.config.clip_sample is True, "the teacher's own is left alone"


# The shapes world's judge ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def judge():
    return ShapesEvaluator(load_judge(), num_reference=500)


@pytest.fixture(scope="module")
def held_out():
    drawn, scenes = pixels(500, seed=99)
    return torch.from_numpy(drawn), [CAPTIONS[index] for index in scenes]


def test_the_judge_knows_real_pictures(judge, held_out):
    measures = judge(*held_out)
    assert all(measures[f"{name}_accuracy"] >= 0.99 for name in ("shape", "colour", "background"))


def test_noise_and_wrong_pictures_score_badly(judge, held_out):
    real, captions = held_out
    floor = judge(real, captions)["distance"]
    noise = judge(torch.randint(0, 256, real.shape, dtype=torch.uint8), captions)
    assert noise["distance"] > 20 * floor
    assert noise["shape_accuracy"] < 0.5 and noise["colour_accuracy"] < 0.5
    one_picture = judge(real[:1].expand(500, -1, -1, -1), captions)
    assert one_picture["distance"] > 20 * floor, "collapse shows"
    shuffled = judge(real.roll(1, 0), captions)
    assert shuffled["distance"] == pytest.approx(floor, rel=1e-3) and shuffled["shape_accuracy"] < 0.5


def test_labels_are_cut_and_characters_without_a_glyph_are_told_once(tmp_path, monkeypatch):
    from diffusers_disback.evaluation import pictures
    from diffusers_disback.evaluation.pictures import LABEL, label, picture_grid

    assert label("a cat\non\ta mat") == "a cat on a mat"
    assert label("a \x1b[31mred").split() == ["a", r"\x1b[31mred"]
    for long in ("word " * 4000, "x" * 20_000, "a b" + " " * 20_000 + "c", "\x1b" * 200):
        assert len(label(long)) <= LABEL + 20 and label(long).endswith("…")
    picture = torch.zeros(3, 8, 8, dtype=torch.uint8)
    captions = ["".join(map(chr, range(0x4E00, 0x4E00 + 60))) * 400, "$x_1$ \\frac", "a" * 20_000]
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        picture_grid({caption: [picture] for caption in captions}, ["a column"], tmp_path / "labels.png")
    (told,) = [str(warning.message) for warning in heard if "font" in str(warning.message)]
    assert "labels.png: the font lacks 60 of the characters" in told
    with Image.open(tmp_path / "labels.png") as drawn:
        assert drawn.width < 400 and drawn.height < 500
    monkeypatch.setattr(pictures, "WIDEST", 4)
    for rows, columns in ((12, 1), (1, 12)):
        picture_grid({str(row): [picture] * columns for row in range(rows)}, [""] * columns, tmp_path / "many.png")
        with Image.open(tmp_path / "many.png") as drawn:
            assert max(drawn.size) <= 100 * 5, "pictures shrink before they are too many for one file"


def test_other_warnings_of_a_picture_are_passed_on(tmp_path):
    from diffusers_disback.evaluation.pictures import glyphs_told_once

    with pytest.warns(UserWarning, match="something else"), glyphs_told_once(tmp_path / "x.png"):
        warnings.warn("something else", stacklevel=1)
