"""How much measures of one student spread, and how far they are off, by the number of images.

    python benchmarks/sample_sizes.py outputs/quickstart

A student and its teacher sample the same prompts, four images of each, in different orders of noise. Of these, subsets of whole
prompts are measured again and again, in the features of the shapes classifier. The table is written to
`benchmarks/results/sample_sizes.md`.
"""

import argparse
import sys
from pathlib import Path
from statistics import mean, stdev

import torch
from diffusers import DiffusionPipeline
from scripts import set_threads
from torch import Tensor


ROOT = Path(__file__).parents[1]
SHAPES = ROOT / "examples" / "text_to_image" / "shapes"
sys.path.insert(0, str(SHAPES.parent))

from diffusers_disback import DriftEvaluator, Evaluation, load_family  # noqa: E402
from diffusers_disback.evaluation.base import FeatureEvaluator  # noqa: E402
from diffusers_disback.evaluation.distributions import (  # noqa: E402
    Diversity,
    FrechetToTeacher,
    KernelToTeacher,
)
from diffusers_disback.hub.files import write_text  # noqa: E402
from shapes.dataset import CAPTIONS  # noqa: E402
from shapes.evaluator import load_classifier  # noqa: E402


SIZES = (100, 500, 2000)
PER_PROMPT = 4


class ClassifierFeatures:
    """The shapes classifier where evaluators expect a network from the Hub."""

    label = "shapes classifier"

    def __init__(self):
        self.classifier = load_classifier()

    def load(self, *_: str) -> "ClassifierFeatures":
        return self

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        return torch.cat([self.classifier(part.float() / 255) for part in images.split(100)])


def measures(evaluators: list[FeatureEvaluator], features: list[Tensor], references: list[Tensor], groups: Tensor):
    """All measures of some images, by name."""
    found: dict[str, float] = {}
    for evaluator, own, reference in zip(evaluators, features, references, strict=True):
        if evaluator.compares_with_teacher:
            evaluator.compare_with(reference)
        found |= evaluator.measure(own, groups)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student")
    parser.add_argument("--images", type=int, default=4000, help="that subsets are taken from")
    parser.add_argument("--subsets", type=int, default=20, help="of each size")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "sample_sizes.md")
    parsed = parser.parse_args()
    set_threads()
    family = load_family(str(SHAPES / "teacher"))
    prompts = [CAPTIONS[n // PER_PROMPT % len(CAPTIONS)] for n in range(parsed.images)]
    student = DiffusionPipeline.from_pretrained(parsed.student)
    evaluation = Evaluation(prompts, seed=1, batch_size=100)
    own, _ = evaluation.sample(family, family.undecorated(student))
    evaluation.seed = 2
    teachers, _ = evaluation.sample(family, family.sampler(), num_inference_steps=25, guidance_scale=4.0)
    network = ClassifierFeatures()
    evaluators = [kind("", network) for kind in (FrechetToTeacher, KernelToTeacher, Diversity)] + [DriftEvaluator()]
    features = [evaluator.features(own, prompts) for evaluator in evaluators]
    references = [evaluator.features(teachers, prompts) for evaluator in evaluators]
    generator = torch.Generator().manual_seed(0)
    # Blocks of images of one prompt; a prompt that comes again is another block.
    blocks = torch.arange(parsed.images).view(-1, PER_PROMPT)
    rows: dict[str, list[str]] = {}
    for size in SIZES:
        found: list[dict[str, float]] = []
        for _ in range(parsed.subsets):
            taken = torch.randperm(len(blocks), generator=generator)[: size // PER_PROMPT]
            places, groups = blocks[taken].flatten(), torch.arange(len(taken)).repeat_interleave(PER_PROMPT)
            found.append(measures(evaluators, [f[places] for f in features], [r[places] for r in references], groups))
        for name in found[0]:
            values = [one[name] for one in found]
            rows.setdefault(name, []).append(f"{mean(values):.4g} ± {stdev(values):.2g}")
    lines = [
        "| measure | " + " | ".join(f"{size:,} images" for size in SIZES) + " |",
        "| --- " * (1 + len(SIZES)) + "|",
    ]
    lines += [f"| `{name}` | {' | '.join(cells)} |" for name, cells in rows.items()]
    write_text(parsed.output, "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
