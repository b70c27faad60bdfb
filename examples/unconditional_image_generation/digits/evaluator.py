"""Measures images of digits: the distance to real ones, whether they show what they were sampled for, and how they differ."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from diffusers_disback import Evaluation, FeatureEvaluator, FrechetDistance, Metric
from diffusers_disback.evaluation.feature_distance import FeatureStatistics, frechet_distance
from diffusers_disback.models.weights import fingerprint

from .classifier import DigitsClassifier
from .dataset import NUM_CLASSES


HERE = Path(__file__).parent
MARKER = "digits.json"  # as make_teacher writes it
REFERENCE = "real_digits.safetensors"
NUM_IMAGES = 2000


def is_digits_teacher(name_or_path: str) -> bool:
    """Whether a folder holds a teacher of these digits."""
    return (Path(name_or_path) / MARKER).is_file()


class DigitsEvaluator(FeatureEvaluator):
    """`distance` (Frechet, in the classifier's features, to real digits), `class_accuracy`, and `class_diversity`, the mean distance
    of the features of two images of one class.

    Args:
        folder (`Path`): Of the classifier, and of the statistics of real digits; by default those that are shipped.
    """

    metrics = {
        **FrechetDistance.metrics,
        "class_accuracy": Metric("class accuracy", "accuracy", "higher"),
        "class_diversity": Metric("diversity within a class", "diversity", "higher"),
    }

    def __init__(self, folder: Path = HERE / "classifier"):
        self.classifier = load_classifier(folder)
        self.reference = FeatureStatistics.read(folder / REFERENCE, _metadata(self.classifier))

    def features(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The classifier's features, and whether it sees the digit that is asked for, 1 or 0: `[N, 64 + 1]`.

        Args:
            images (`Tensor`): Gray, or gray as RGB, in 0..255, `[N, C, 16, 16]` uint8.
            prompts (`Sequence[str]`): The digits, N.
        """
        features = embed(self.classifier, images)
        seen = self.classifier.classify(features).argmax(1)
        right = seen == torch.tensor([int(prompt) for prompt in prompts])
        return torch.cat([features, right[:, None].float()], 1)

    def measure(self, features: Tensor, groups: Tensor) -> dict[str, float]:
        """The distance, the share of right classes, and the mean over classes of the mean distance of two images."""
        of_classifier, right = features[:, :-1], features[:, -1]
        of_classes = [of_classifier[groups == group] for group in groups.unique()]
        within = [torch.pdist(own).mean() for own in of_classes if len(own) > 1]
        if not within:
            raise ValueError("No class has two images: their diversity is not defined.")
        return {
            "distance": frechet_distance(FeatureStatistics.of_features(of_classifier), self.reference),
            "class_accuracy": right.mean().item(),
            "class_diversity": torch.stack(within).mean().item(),
        }


@torch.no_grad()
def embed(classifier: DigitsClassifier, images: Tensor) -> Tensor:
    """The classifier's features of images in 0..255, `[N, C, 16, 16]` uint8."""
    return torch.cat([classifier(part.float().mean(1, keepdim=True) / 255) for part in images.split(500)])


def load_classifier(folder: Path = HERE / "classifier") -> DigitsClassifier:
    """A classifier, in float32; by default the shipped one."""
    return DigitsClassifier.from_pretrained(folder, torch_dtype=torch.float32).eval()


def _metadata(classifier: DigitsClassifier) -> dict[str, str]:
    """Of what features depend on."""
    return {"feature_model": "the classifier of digits", "weights": fingerprint(classifier)}


def write_reference(folder: Path, images: Tensor) -> None:
    """Writes mean and covariance of a classifier's features of real digits beside it.

    Args:
        folder (`Path`): The classifier's.
        images (`Tensor`): In 0..255, `[N, 1, 16, 16]` uint8.
    """
    classifier = load_classifier(folder)
    FeatureStatistics.of_features(embed(classifier, images)).save(folder / REFERENCE, _metadata(classifier))


def digits_prompts(num: int = NUM_IMAGES) -> list[str]:
    """The ten digits in turn, as class labels are called."""
    return [str(number % NUM_CLASSES) for number in range(num)]


def digits_evaluation(num: int = NUM_IMAGES) -> Evaluation:
    """Classes and noise that are always the same, and the classifier; its `floor` is what real digits score."""
    evaluation = Evaluation(digits_prompts(num), batch_size=100, name="Handwritten digits", type="handwritten-digits")
    evaluation.evaluators.append(DigitsEvaluator())
    evaluation.references["floor"] = json.loads((HERE / "teacher" / "quality.json").read_text())["quality"]["real"]
    return evaluation
