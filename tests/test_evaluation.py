import json
import warnings

import numpy as np
import pytest
import scipy.linalg
import tiny
import torch
from huggingface_hub import ModelCard
from PIL import Image
from script import in_two_processes
from torch import nn

from diffusers_disback.evaluation import (
    EVALUATORS,
    DriftEvaluator,
    Evaluation,
    Evaluator,
    FrechetDistance,
    Metric,
    check_evaluators,
)
from diffusers_disback.evaluation.plots import convergence_plot, pyplot
from diffusers_disback.evaluation.report import REPORT, Report, summary
from diffusers_disback.evaluation.report_format import check_report
from diffusers_disback.families import family_of
from diffusers_disback.hub.cards import STABLE_DIFFUSION, student_card
from shapes.dataset import CAPTIONS, pixels
from shapes.evaluator import ShapesEvaluator, load_classifier


class Colours(nn.Module):
    """Five features of an image, of different sizes."""

    num_features = 5

    def forward(self, images):
        mean, std = images.mean((2, 3)), images.std((2, 3))
        return torch.cat([3 * mean, 10 * std[:, :2]], 1)


def images(seed, shift=0.0, count=300):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(count, 3, 1, 1, generator=generator) + 0.3 * torch.rand(count, 3, 8, 8, generator=generator)
    return ((values / 1.3 + shift).clamp(0, 1) * 255).to(torch.uint8)


def frechet_by_scipy(one, two):
    one, two = (Colours()(p.float() / 255).double().numpy() for p in (one, two))
    c1, c2 = np.cov(one, rowvar=False), np.cov(two, rowvar=False)
    root = scipy.linalg.sqrtm(c1 @ c2).real
    return ((one.mean(0) - two.mean(0)) ** 2).sum() + np.trace(c1 + c2 - 2 * root)


@pytest.mark.parametrize("labels, told", [(None, "teacher\n2 steps"), (4, "teacher\n2 steps, w=1")])
def test_titles_of_images_tell_guidance_where_something_guides(labels, told, tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr("diffusers_disback.evaluation.report.image_grid", lambda rows, own, file: titles.extend(own))
    family = family_of(tiny.pixels(num_class_embeds=labels))
    captions = family.conditions().captions[:1]
    report = Report(Evaluation(captions), captions, family, 1.0)
    report.add_teacher()
    report.write_samples(tmp_path / "samples.png")
    assert titles == [told]


def test_the_distance_is_scipys():
    real, generated = images(0), images(1, shift=0.1)
    expected = frechet_by_scipy(real, generated)
    assert FrechetDistance(Colours(), real)(generated)["distance"] == pytest.approx(expected, rel=1e-3)
    assert expected > 0.05, "images reach the features in 0..1, not scaled down to nothing"


def test_the_distance_can_be_asked_again():
    metric = FrechetDistance(Colours(), images(0))
    near, far = metric(images(1)), metric(images(1, shift=0.3))
    assert near["distance"] < far["distance"]
    assert metric(images(1)) == near


def test_drift():
    reference = torch.full((4, 3, 8, 8), 100, dtype=torch.uint8)
    drift = DriftEvaluator()
    drift.prepare(reference)
    assert drift(reference) == {"drift_mean": 0, "drift_std": 0, "drift_saturation": 0}
    red = reference.clone()
    red[:, 0] += 51
    measures = drift(red)
    assert measures["drift_mean"] == pytest.approx(0.2 / 3, abs=1e-6)
    assert measures["drift_saturation"] == pytest.approx(0.2, abs=1e-6), "more saturated is above 0"
    assert drift(torch.randint(0, 200, reference.shape, dtype=torch.uint8))["drift_std"] > 0.1


def test_the_distance_is_to_the_teachers_images_unless_there_are_others():
    given, own = FrechetDistance(Colours()), FrechetDistance(Colours(), images(0))
    given.prepare(images(0), [])
    own.prepare(images(2, shift=0.3), [])
    assert given(images(1)) == own(images(1))
    with pytest.raises(ValueError, match="in 5 features needs more .* but has 5: raise --num_validation_images"):
        FrechetDistance(Colours()).prepare(images(0, count=5), [])


def test_which_of_two_values_is_worse():
    assert Metric("", "", "lower").is_worse(2, 1) and not Metric("", "", "lower").is_worse(-2, 1)
    assert Metric("", "", "higher").is_worse(1, 2) and not Metric("", "", "higher").is_worse(2, 1)
    assert Metric("", "", "zero").is_worse(-2, 1) and not Metric("", "", "zero").is_worse(-1, 2)
    assert not any(Metric("", "", direction).is_worse(1, 1) for direction in ("higher", "lower", "zero"))


# A made-up evaluator -------------------------------------------------------------------------------------------------


class Taste(Evaluator):
    """Says what it was told to say, whatever it sees: of the teacher, the initial student and the student."""

    metrics = {"dullness": Metric("dullness of it", "taste", "lower"), "charm": Metric("charm", "grace", "higher")}

    def __init__(self):
        self.answers = iter([(1.0, 0.5), (3.0, 0.7), (2.0, 0.6)])

    def prepare(self, teacher_images, prompts):
        assert teacher_images.dtype == torch.uint8 and len(teacher_images) == len(prompts)
        self.is_prepared = True

    def __call__(self, images, prompts):
        assert self.is_prepared and len(images) == len(prompts)
        return dict(zip(self.metrics, next(self.answers), strict=True))


@pytest.fixture(scope="module")
def tasted():
    """The report of three pipelines, and its content."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EVALUATORS, "taste", Taste)
        evaluation = Evaluation(tiny.PROMPTS, batch_size=3)
        evaluation.add(["drift", "taste"])
    teacher = family_of(tiny.pipeline())
    report = Report(evaluation, tiny.PROMPTS[:1], teacher, 1.0, teacher_steps=2)
    report.add_teacher()
    for name, timestep in (("initial", 399), ("student", 199)):
        report.add_student(name, teacher.one_step(tiny.pipeline().unet, timestep))
    places = dict.fromkeys(("generator_model_name_or_path", "teacher_lora", "revision", "variant"))
    places |= dict.fromkeys(("pretrained_vae_model_name_or_path", "single_file_config"))
    settings = {
        "pretrained_model_name_or_path": "a/teacher",
        "output_dir": "out",
        "conditioning_timestep": 199,
        **places,
    }
    others = {"stages": {}, "machine": {}, "versions": {"diffusers_disback": "0"}, "teacher_card": {}, "path": None}
    others |= {"pipeline_class": "StableDiffusionPipeline", "command": "train", "resolution": 16, "seed": 0}
    return report, report.content(settings=settings, **others)


def test_a_report_says_in_what_the_student_is_behind(tasted, tmp_path):
    _, content = tasted
    check_report(content, "it")
    measured = {name: content[name] for name in ("teacher", "initial", "student")}
    assert [measures["dullness"] for measures in measured.values()] == [1.0, 3.0, 2.0]
    metrics = content["evaluation"]["metrics"]
    assert metrics["dullness"] == {"label": "dullness of it", "panel": "taste", "direction": "lower"}
    assert metrics.keys() == {"dullness", "charm", "drift_mean", "drift_std", "drift_saturation"}
    drifted = [
        name
        for name in ("drift_mean", "drift_std", "drift_saturation")
        if abs(content["student"][name]) > abs(content["initial"][name])
    ]
    assert content["behind"] == {"teacher": ["dullness"], "initial": [*drifted, "charm"]}
    (tmp_path / REPORT).write_text(json.dumps(content))
    (line,) = (line for line in summary(tmp_path).splitlines() if line.startswith("student: "))
    assert line.endswith(
        f"; behind the teacher in dullness; behind the initial one in {', '.join([*drifted, 'charm'])}"
    )


def test_a_card_says_which_direction_is_better(tasted):
    card = student_card(tasted[1], "it", "alice/it", False, STABLE_DIFFUSION)
    assert "Higher is better: `charm`.\nLower is better: `dullness`.\nDifferences to the teacher's" in card
    assert "0 is best: `drift_mean`, `drift_std`, `drift_saturation`." in card
    assert "behind its teacher in dullness of it (2 against 1).\n" in card
    assert {"name": "dullness of it", "type": "taste", "value": 2.0} in [
        metric
        for result in ModelCard(card).data.to_dict()["model-index"][0]["results"]
        for metric in result["metrics"]
    ]


def test_a_measure_is_drawn_on_its_own_panel(tasted, tmp_path, monkeypatch):
    report, figures = tasted[0], []
    monkeypatch.setattr(pyplot(), "close", figures.append)
    row = dict.fromkeys(("drift_mean", "drift_std", "drift_saturation"), 0.1) | {
        "charm": 0.5,
        "student_to_target": 1.0,
    }
    report.write_convergence(
        [{"step": 0, "node": 1, "dullness": 2.0, **row}, {"step": 9, "seconds": 3.0, "node": 0, **row}],
        [4],
        tmp_path / "x.png",
    )
    drift, taste, grace = figures[0].axes
    assert [line.get_label() for line in taste.lines] == ["dullness of it", "teacher: dullness of it", "target switch"]
    assert list(taste.lines[0].get_xdata()) == [0], "a resumed run may not have measured it everywhere"
    assert [axis.get_yscale() for axis in (drift, taste, grace)] == ["linear", "log", "linear"]
    assert [line.get_label() for line in drift.lines][::2] == [
        "drift mean",
        "drift std",
        "drift saturation",
        "target switch",
    ]
    assert [axis.get_ylabel() for axis in (drift, taste)] == ["nearer to 0 is better", "lower is better"]
    assert len(drift.collections) == 3 and not taste.collections, "the student's intervals, of those that have them"
    assert (tmp_path / "x.png").stat().st_size > 1000
    convergence_plot([{"step": 0, "other": 1.0}], [0], {}, report.metrics, tmp_path / "none.png")
    assert len(figures[1].axes) == 1, "nothing of it was measured"


def test_evaluators_that_do_not_fit_are_refused(monkeypatch):
    with pytest.raises(
        ValueError, match=r"--evaluators taste: known evaluators are clip_score, diversity, drift, fid, "
    ):
        check_evaluators(["drift", "taste"])
    with pytest.raises(ValueError, match="known evaluators are"):
        check_evaluators([])
    evaluation = Evaluation(["a prompt"])
    evaluation.add(["drift"])
    evaluation.add(["drift"])
    with pytest.raises(ValueError, match="Two evaluators measure drift_mean, drift_saturation, drift_std"):
        _ = evaluation.metrics
    monkeypatch.setattr(DriftEvaluator, "measure", lambda *_: {"other": 1.0})
    with pytest.raises(ValueError, match="DriftEvaluator measures other, but its metrics are drift_mean, "):
        evaluation.measure(images(0, count=1))


def test_reports_of_earlier_versions_are_read_without_directions(tasted, tmp_path):
    evaluation = {name: value for name, value in tasted[1]["evaluation"].items() if name != "metrics"}
    content = {name: value for name, value in tasted[1].items() if name != "behind"} | {"evaluation": evaluation}
    check_report(content, "it")
    (tmp_path / REPORT).write_text(json.dumps(content))
    assert "behind" not in summary(tmp_path) and "dullness 2" in summary(tmp_path)
    card = student_card(content, "it", "alice/it", False, STABLE_DIFFUSION)
    assert "behind" not in card and "| student | " in card and "is better" not in card
    for metrics in ([], {"charm": []}, {"charm": {"label": "charm", "panel": "grace", "direction": "up"}}):
        with pytest.raises(ValueError, match="it.* is not as its format says"):
            check_report({**content, "evaluation": {**evaluation, "metrics": metrics}}, "it")
    for behind in ([], {"teacher": "charm"}, {"teacher": [1]}):
        with pytest.raises(ValueError, match="it is not as its format says: 'behind' cannot be"):
            check_report({**content, "behind": behind}, "it")
    with pytest.raises(ValueError, match="No card can be made"):
        student_card({**content, "behind": {"teacher": ["nothing"]}}, "it", "alice/it", False, STABLE_DIFFUSION)


def test_the_same_noise_for_every_pipeline():
    evaluation = Evaluation(tiny.PROMPTS, seed=3, batch_size=2)
    family = family_of(tiny.pipeline())
    pipe = family.sampler()
    one, seconds = evaluation.sample(family, pipe, num_inference_steps=2, guidance_scale=2.0)
    two, _ = evaluation.sample(family, pipe, num_inference_steps=2, guidance_scale=2.0)
    assert one.shape == (3, 3, 16, 16) and one.dtype == torch.uint8 and seconds > 0
    assert torch.equal(one, two)
    other, _ = Evaluation(tiny.PROMPTS, seed=4, batch_size=2).sample(family, pipe, num_inference_steps=2)
    assert not torch.equal(one, other)


def test_the_teachers_sampler_does_not_clip():
    teacher = tiny.pipeline()
    teacher.scheduler = tiny.scheduler(clip_sample=True)
    assert family_of(teacher).sampler().scheduler.config.clip_sample is False
    assert teacher.scheduler.config.clip_sample is True, "the teacher's own is left alone"


# The shapes classifier --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluator():
    return ShapesEvaluator(load_classifier(), num_reference=500)


@pytest.fixture(scope="module")
def held_out():
    drawn, scenes = pixels(500, seed=99)
    return torch.from_numpy(drawn), [CAPTIONS[index] for index in scenes]


def test_the_classifier_knows_real_pictures(evaluator, held_out):
    measures = evaluator(*held_out)
    assert all(measures[f"{name}_accuracy"] >= 0.99 for name in ("shape", "colour", "background"))


def test_noise_and_wrong_pictures_score_badly(evaluator, held_out):
    real, captions = held_out
    floor = evaluator(real, captions)["distance"]
    noise = evaluator(torch.randint(0, 256, real.shape, dtype=torch.uint8), captions)
    assert noise["distance"] > 20 * floor
    assert noise["shape_accuracy"] < 0.5 and noise["colour_accuracy"] < 0.5
    one_picture = evaluator(real[:1].expand(500, -1, -1, -1), captions)
    assert one_picture["distance"] > 20 * floor, "collapse shows"
    shuffled = evaluator(real.roll(1, 0), captions)
    assert shuffled["distance"] == pytest.approx(floor, rel=1e-3) and shuffled["shape_accuracy"] < 0.5


def test_labels_are_cut_and_characters_without_a_glyph_are_told_once(tmp_path, monkeypatch):
    from diffusers_disback.evaluation import plots
    from diffusers_disback.evaluation.plots import LABEL, image_grid, label

    assert label("a cat\non\ta mat") == "a cat on a mat"
    assert label("a \x1b[31mred").split() == ["a", r"\x1b[31mred"]
    for long in ("word " * 4000, "x" * 20_000, "a b" + " " * 20_000 + "c", "\x1b" * 200):
        assert len(label(long)) <= LABEL + 20 and label(long).endswith("…")
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    captions = ["".join(map(chr, range(0x4E00, 0x4E00 + 60))) * 400, "$x_1$ \\frac", "a" * 20_000]
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        image_grid({caption: [image] for caption in captions}, ["a column"], tmp_path / "labels.png")
    (told,) = [str(warning.message) for warning in heard if "font" in str(warning.message)]
    assert "labels.png: the font lacks 60 of the characters" in told
    with Image.open(tmp_path / "labels.png") as drawn:
        assert drawn.width < 400 and drawn.height < 500
    monkeypatch.setattr(plots, "WIDEST", 4)
    for rows, columns in ((12, 1), (1, 12)):
        image_grid({str(row): [image] * columns for row in range(rows)}, [""] * columns, tmp_path / "many.png")
        with Image.open(tmp_path / "many.png") as drawn:
            assert max(drawn.size) <= 100 * 5, "images shrink before they are too many for one file"


def test_other_warnings_of_a_picture_are_passed_on(tmp_path):
    from diffusers_disback.evaluation.plots import glyphs_told_once

    with pytest.warns(UserWarning, match="something else"), glyphs_told_once(tmp_path / "x.png"):
        warnings.warn("something else", stacklevel=1)


def test_one_process_measures_while_the_other_waits_for_nothing(tmp_path):
    """torchmetrics would ask the other for its share, and wait for ever."""
    one, other = in_two_processes(tmp_path / "ranks", [], program="one_measures.py")
    assert one["distance"] > 0 and not other
