"""Guidance that is too high, made on purpose on the shapes teacher: what the student draws, and its drift from the teacher.

python benchmarks/saturation.py --output docs/images/saturation.png
"""

from dataclasses import replace

import torch
from scripts import picture_options, set_threads
from shapes_task import ARMS, EXAMPLES, Regime, one, pictures_of
from torch import Tensor

from diffusers_disback import ModelReference, load_family
from diffusers_disback.evaluation.drift import DriftEvaluator
from diffusers_disback.evaluation.plots import pyplot


SCALES = (4.0, 15.0, 40.0)
TASK = Regime(updates=120, evaluate_every=20, images=80)
SHOWN = 8


class Looker:
    """Measures the drift from the teacher's images, and keeps the last that it saw."""

    def __init__(self, reference: Tensor):
        self.drift = DriftEvaluator()
        self.drift.prepare(reference)
        self.images = reference

    def __call__(self, images: Tensor) -> dict[str, float]:
        self.images = images
        return self.drift(images, [])


def main() -> None:
    options, plt = picture_options(__doc__), pyplot()
    set_threads()
    teacher = load_family(ModelReference(str(EXAMPLES / "shapes" / "teacher")))
    reference = pictures_of(teacher, TASK.images, guidance_scale=SCALES[0], num_inference_steps=20)
    rows = [("teacher, 20 steps, guidance 4", reference)]
    figure, axes = plt.subplots(len(SCALES) + 2, 1, figsize=(SHOWN * 1.1, 8), height_ratios=[1] * 4 + [2])
    for scale in SCALES:
        looker = Looker(reference)
        result = one(TASK, replace(ARMS["none"], backtracking={"guidance_scale": scale}), options.seed, looker)
        curve = result["curve"]
        axes[-1].plot(curve["updates"], curve["drift_saturation"], label=f"drift_saturation, guidance {scale:g}")
        rows.append((f"student, guidance {scale:g}", looker.images))
        last = {name: curve[name][-1] for name in ("distance", "shape_accuracy", "drift_std", "drift_saturation")}
        print(f"guidance {scale:g}", last, flush=True)
    for panel, (title, images) in zip(axes, rows, strict=False):
        panel.imshow(torch.cat(list(images[:SHOWN]), 2).permute(1, 2, 0))
        panel.set_title(title, fontsize=8, loc="left")
        panel.axis("off")
    axes[-1].axhline(0, color="0.6", lw=0.8)
    axes[-1].set(xlabel="generator updates")
    axes[-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(options.output, dpi=80)


if __name__ == "__main__":
    main()
