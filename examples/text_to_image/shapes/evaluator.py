"""Measures images of the shapes data: the distance to real ones, and whether they show what their caption says."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from diffusers_disback import Evaluation, FeatureEvaluator, FrechetDistance, Metric
from diffusers_disback.evaluation import cosine_diversity

from .classifier import ATTRIBUTES, ShapesClassifier
from .dataset import SCENE_OF_CAPTION, SCENES, pixels


HERE = Path(__file__).parent
MARKER = "world.json"  # as make_teacher writes it
NUM_PICTURES = 2000
REFERENCE_SEED = 77  # data of its own: neither the classifier nor the teacher was trained on it
HELD_OUT_SEED = 88


def is_shapes_teacher(name_or_path: str) -> bool:
    """Whether a folder holds a teacher of the shapes data."""
    return (Path(name_or_path) / MARKER).is_file()


class ShapesEvaluator(FeatureEvaluator):
    """`distance` (Frechet, in the classifier's features, to fresh real images), an accuracy per attribute, and `caption_diversity` (of the
    images of a caption, in the same features).

    Args:
        classifier (`ShapesClassifier`, *optional*): Float32; by default the shipped one.
        num_reference (`int`): Real images.
    """

    metrics = {
        **FrechetDistance.metrics,
        **{f"{name}_accuracy": Metric(f"{name} accuracy", "accuracy", "higher") for name in ATTRIBUTES},
        "caption_diversity": Metric("diversity (shapes classifier)", "diversity", "higher"),
    }

    def __init__(self, classifier: ShapesClassifier | None = None, num_reference: int = NUM_PICTURES):
        self.classifier = load_classifier() if classifier is None else classifier
        self.frechet = FrechetDistance(self.classifier, torch.from_numpy(pixels(num_reference, REFERENCE_SEED)[0]))

    @torch.no_grad()
    def features(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """The classifier's features, and for each attribute whether it sees what the caption says, 1 or 0: `[N, 64 + 3]`."""
        logits = [self.classifier.classify(part.float() / 255) for part in images.split(100)]
        right = []
        for name, words in ATTRIBUTES.items():
            seen = torch.cat([part[name] for part in logits]).argmax(1)
            said = torch.tensor([words.index(getattr(SCENE_OF_CAPTION[prompt], name)) for prompt in prompts])
            right.append(seen == said)
        return torch.cat([self.frechet.features(images), torch.stack(right, 1).float()], 1)

    def measure(self, features: Tensor, groups: Tensor) -> dict[str, float]:
        """The distance, the share of images in which the classifier sees what the caption says, by attribute, and the
        diversity."""
        of_classifier, right = features.split([self.classifier.num_features, len(ATTRIBUTES)], 1)
        shares = right.mean(0).tolist()
        accuracies = {f"{name}_accuracy": share for name, share in zip(ATTRIBUTES, shares, strict=True)}
        distance = self.frechet.measure(of_classifier, groups)
        return {**distance, **accuracies, "caption_diversity": cosine_diversity(of_classifier, groups)}


def load_classifier(folder: Path = HERE / "classifier") -> ShapesClassifier:
    """The shipped classifier, in float32."""
    return ShapesClassifier.from_pretrained(folder, torch_dtype=torch.float32).eval()


def shapes_prompts(num: int = NUM_PICTURES, seed: int = 0) -> list[str]:
    """Captions drawn as the data set draws them."""
    rows = torch.randint(len(SCENES), (num,), generator=torch.Generator().manual_seed(seed))
    return [str(SCENES[row]) for row in rows.tolist()]


def held_out(num: int = NUM_PICTURES) -> tuple[Tensor, list[str]]:
    """Real images that nothing was trained on or is measured against, and their captions."""
    images, scenes = pixels(num, HELD_OUT_SEED)
    return torch.from_numpy(images), [str(SCENES[index]) for index in scenes]


def shapes_evaluation(num: int = NUM_PICTURES, num_real: int = NUM_PICTURES) -> Evaluation:
    """Prompts and noise that are always the same, and the classifier; its `floor` is what real images score.

    Args:
        num (`int`): Prompts.
        num_real (`int`): Real images that are compared with, and others that the floor is measured on.
    """
    evaluation = Evaluation(shapes_prompts(num), name="Captioned shapes", type="captioned-shapes")
    evaluator = ShapesEvaluator(load_classifier(), num_real)
    evaluation.evaluators.append(evaluator)
    evaluation.references["floor"] = evaluator(*held_out(num_real))
    return evaluation
