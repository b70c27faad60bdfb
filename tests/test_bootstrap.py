from types import SimpleNamespace

import pytest
import torch
from test_evaluation import Colours

from diffusers_disback.evaluation import DriftEvaluator, Evaluation, FrechetDistance
from diffusers_disback.evaluation.base import FeatureEvaluator, Metric, groups_of
from diffusers_disback.evaluation.bootstrap import confidence_intervals, within_groups


class Mean(FeatureEvaluator):
    """Of its features, and how many prompts there are."""

    metrics = {"mean": Metric("mean", "mean", "higher"), "prompts": Metric("prompts", "mean", "higher")}

    def features(self, images, prompts):
        return images

    def measure(self, features, groups):
        return {"mean": features.double().mean().item(), "prompts": len(groups.unique())}


def test_the_interval_of_a_mean_is_its_closed_form():
    values, alone = torch.randn(400, generator=torch.Generator().manual_seed(0)), torch.arange(400)
    found = confidence_intervals(Mean(), values, alone, resamples=4000)
    low, high = found["mean"]
    assert (low + high) / 2 == pytest.approx(values.double().mean().item()), "around the estimate"
    assert high - low == pytest.approx(2 * 1.96 * values.std().item() / 400**0.5, rel=0.05)
    assert found["prompts"] == (400, 400), "a prompt that is drawn twice is two groups"
    narrow = confidence_intervals(Mean(), values, alone, resamples=4000, level=0.5)["mean"]
    assert (narrow[1] - narrow[0]) / (high - low) == pytest.approx(0.6745 / 1.96, rel=1e-3)


def test_images_of_a_prompt_are_resampled_together():
    """Copies of an image tell nothing new: the interval is that of the prompts, and not by a factor of two narrower."""
    values = torch.randn(100, generator=torch.Generator().manual_seed(0))
    one = confidence_intervals(Mean(), values, torch.arange(100), resamples=1000)["mean"]
    four = confidence_intervals(Mean(), values.repeat(4), torch.arange(100).repeat(4), resamples=1000)["mean"]
    assert four == pytest.approx(one)
    uneven = groups_of(["a"] * 3 + ["b"] * 2 + ["c"])
    assert confidence_intervals(Mean(), torch.ones(6), uneven)["mean"] == (1, 1)


def test_images_of_classes_are_resampled_within_them():
    """What classes differ by is no spread, since none of them is missing."""
    noise = torch.randn(400, generator=torch.Generator().manual_seed(0))
    classes = torch.arange(400) % 4
    noise -= torch.stack([noise[classes == k].mean() for k in range(4)])[classes]
    found = confidence_intervals(Mean(), noise + 100 * classes, classes, 2000, resample=within_groups)
    low, high = found["mean"]
    assert high - low == pytest.approx(2 * 1.96 * noise.std().item() / 400**0.5, rel=0.05)
    assert found["prompts"] == (4, 4), "a class remains one"
    one = confidence_intervals(Mean(), noise, torch.zeros(400, dtype=torch.int64), 2000, resample=within_groups)[
        "mean"
    ]
    assert one == pytest.approx((low - 150, high - 150), abs=0.02), (
        "of a teacher without classes it is that of its images"
    )
    with pytest.raises(ValueError, match="two images and two resamples, but has 1 and 200"):
        confidence_intervals(Mean(), noise[:1], classes[:1], resample=within_groups)


@pytest.mark.parametrize(
    "takes_prompts, in_a_class, resampled", [(False, 10, "images"), (False, 9, "classes"), (True, 10, "classes")]
)
def test_an_evaluation_resamples_images_of_classes_if_there_are_enough(takes_prompts, in_a_class, resampled):
    evaluation = Evaluation(["0", "1"] * in_a_class)
    evaluation._family = SimpleNamespace(takes_prompts=takes_prompts)
    evaluation.evaluators.append(Mean())
    features = torch.tensor([0.0, 100.0]).repeat(in_a_class)  # classes differ, images of one do not
    low, high = evaluation.intervals({len(evaluation.evaluators) - 1: features}, resamples=20)["mean"]
    assert (high - low > 10) == (resampled == "classes")
    alone = Evaluation(["sample"] * 10)
    alone._family, alone.evaluators = evaluation._family, evaluation.evaluators
    found = alone.intervals({len(evaluation.evaluators) - 1: torch.arange(10.0)}, resamples=20)
    assert bool(found) == (not takes_prompts)


def test_intervals_contain_the_truth_as_often_as_they_say():
    worlds = torch.randn(400, 40, generator=torch.Generator().manual_seed(1))
    hits = 0
    for world in worlds:
        low, high = confidence_intervals(Mean(), world, torch.arange(40), resamples=60)["mean"]
        hits += low < 0 < high
    assert 0.90 < hits / len(worlds) < 0.98


def test_intervals_are_those_of_their_seed():
    values, alone = torch.randn(20, generator=torch.Generator().manual_seed(0)), torch.arange(20)
    first, again, other = (confidence_intervals(Mean(), values, alone, seed=seed)["mean"] for seed in (0, 0, 1))
    assert first == again != other
    with pytest.raises(ValueError, match="two prompts and two resamples, but has 1 and 200"):
        confidence_intervals(Mean(), values, torch.zeros(20, dtype=torch.int64))


class ToTeacher(Mean):
    """The difference of means to the teacher's images."""

    compares_with_teacher = True

    def compare_with(self, features):
        self.reference = features.double().mean()

    def measure(self, features, groups):
        return {"mean": (features.double().mean() - self.reference).item(), "prompts": 0.0}


def test_the_teachers_images_are_resampled_with_the_others():
    """What both have of the prompts that were drawn is no difference between them."""
    generator = torch.Generator().manual_seed(0)
    teacher, noise = 100 * torch.randn(400, generator=generator), torch.randn(400, generator=generator)
    evaluator = ToTeacher()
    evaluator.prepare(teacher, [])
    reference = evaluator.reference
    low, high = confidence_intervals(evaluator, teacher + noise, torch.arange(400), 2000, reference=teacher)["mean"]
    assert high - low == pytest.approx(2 * 1.96 * noise.std().item() / 400**0.5, rel=0.05)
    assert evaluator.reference is reference, "of copies alone"
    with pytest.raises(NotImplementedError, match="Mean does not say what it takes of the teacher"):
        Mean().compare_with(teacher)


def test_registered_evaluators_can_be_resampled():
    """With the teacher's images for reference drift is level with nothing where the images are the teacher's own."""
    images = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for evaluator in (DriftEvaluator(), FrechetDistance(Colours())):
        prompts = list("abcdefghijkl")
        evaluator.prepare(images, prompts)
        features = evaluator.features(images, prompts)
        found = confidence_intervals(evaluator, features, groups_of(prompts), 5, reference=features)
        assert all(low == pytest.approx(0, abs=1e-4) == high for low, high in found.values()), found
        assert max(map(abs, evaluator(images, prompts).values())) < 1e-4, "its own reference is as it was"
        alone = confidence_intervals(evaluator, features, groups_of(prompts), 5)
        assert max(high - low for low, high in alone.values()) > 0.001
