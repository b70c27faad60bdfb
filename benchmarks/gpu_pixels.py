"""A teacher of pixels of CIFAR-10's size, made from scratch of drawn shapes, and distilled with and without a path.

    python benchmarks/gpu_pixels.py teacher --work_dir outputs/pixels --figures teacher.json
    python benchmarks/gpu_pixels.py distil --arm path --work_dir outputs/pixels --figures path.json

32 x 32 pixels in colour, 36 million parameters (DDPM's for CIFAR-10, arXiv 2006.11239, with class labels: the shape); the classifier
of the shapes teacher judges. Three seeds are distilled side by side, each in a process of its own. See `gpu.py`.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from gpu_distil import figures_of, main, measured_teacher
from torch import Tensor, nn
from torch.nn.functional import interpolate, mse_loss


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "text_to_image"))

from diffusers_disback import (  # noqa: E402
    DisBackConfig,
    Evaluation,
    FeatureEvaluator,
    FrechetDistance,
    Metric,
    load_family,
)
from diffusers_disback.models.reference import ModelReference  # noqa: E402
from shapes.dataset import SCENES, SHAPES, pixels  # noqa: E402
from shapes.evaluator import load_classifier  # noqa: E402
from shapes.fit import fit  # noqa: E402


SIDE, NO_CLASS, DROPPED = 32, len(SHAPES), 0.1
DATA_SEED, REAL_SEED = 5_000_000, 6_000_000


class Enlarged(nn.Module):
    """The classifier's features of images of half its side."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = load_classifier()
        self.num_features = self.classifier.num_features

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(enlarged(images))


def enlarged(images: Tensor) -> Tensor:
    return interpolate(images, scale_factor=2, mode="bilinear")


class ShapeEvaluator(FeatureEvaluator):
    """`distance` to real images in the shapes classifier's features, and how often it sees the shape that was asked for."""

    metrics = {**FrechetDistance.metrics, "shape_accuracy": Metric("shape accuracy", "accuracy", "higher")}

    def __init__(self, num_real: int):
        self.network = Enlarged().eval()
        self.frechet = FrechetDistance(self.network, drawn(num_real, REAL_SEED)[0])

    @torch.no_grad()
    def features(self, images: Tensor, prompts: Any) -> Tensor:
        """The classifier's features, and whether it sees the shape: `[N, F + 1]`."""
        parts = images.split(500)
        seen = torch.cat([self.network.classifier.classify(enlarged(part.float() / 255))["shape"] for part in parts])
        right = seen.argmax(1) == torch.tensor([int(label) for label in prompts])
        return torch.cat([self.frechet.features(images), right[:, None].float()], 1)

    def measure(self, features: Tensor, groups: Tensor) -> dict[str, float]:
        """The distance, and the share of right shapes."""
        own = features[:, :-1]
        return {**self.frechet.measure(own, groups), "shape_accuracy": features[:, -1].mean().item()}


def drawn(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images at half their side, `[N, 3, 32, 32]` uint8, and their shapes, `[N]`."""
    images, scenes = pixels(number, seed)
    small = torch.from_numpy(images).float().unflatten(2, (SIDE, 2)).unflatten(4, (SIDE, 2)).mean((3, 5))
    labels = [SHAPES.index(SCENES[scene].shape) for scene in scenes.tolist()]
    return small.round().to(torch.uint8), torch.tensor(labels)


def evaluation(tiny: bool) -> Evaluation:
    number = 8 if tiny else 2000
    made = Evaluation([str(place % NO_CLASS) for place in range(number)], batch_size=500, name="Shapes, 32 x 32")
    made.evaluators.append(ShapeEvaluator(80 if tiny else 2000))
    return made


def make_teacher(parsed: argparse.Namespace) -> dict[str, Any]:
    """Trains the teacher, or goes on with it, and measures it."""
    torch.manual_seed(0)
    widths, layers = ((8, 16), 1) if parsed.tiny else ((128, 256, 256, 256), 2)
    attention = tuple(place == 1 for place in range(len(widths)))  # at 16 x 16 pixels
    unet = UNet2DModel(
        sample_size=SIDE,
        block_out_channels=widths,
        layers_per_block=layers,
        norm_num_groups=4 if parsed.tiny else 32,
        num_class_embeds=NO_CLASS + 1,
        down_block_types=tuple("AttnDownBlock2D" if here else "DownBlock2D" for here in attention),
        up_block_types=tuple("AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attention)),
    )
    scheduler = DDPMScheduler(clip_sample=False)
    images, labels = drawn(64 if parsed.tiny else 30_000, DATA_SEED)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images, labels = images.to(device), labels.to(device)
    batch = 4 if parsed.tiny else 128

    def loss(network: nn.Module, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(len(images), (batch,), generator=generator).to(device)
        noise = torch.randn(batch, 3, SIDE, SIDE, generator=generator).to(device)
        t = torch.randint(scheduler.config.num_train_timesteps, (batch,), generator=generator).to(device)
        dropped = (torch.rand(batch, generator=generator) < DROPPED).to(device)
        x_t = scheduler.add_noise(images[rows].float() / 127.5 - 1, noise, t)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            output = network(x_t, t, class_labels=labels[rows].masked_fill(dropped, NO_CLASS)).sample
        return mse_loss(output.float(), noise)

    steps = 2 if parsed.tiny else parsed.steps
    made = fit("unet", unet, loss, steps, 2e-4, parsed.work_dir, 0.9 if parsed.tiny else 0.999)
    folder = parsed.work_dir / "teacher"
    DDPMPipeline(made.cpu(), scheduler).save_pretrained(folder)
    family = load_family(ModelReference(str(folder), null_class_label=NO_CLASS))
    one = evaluation(parsed.tiny)
    teacher = measured_teacher(family, one, 2 if parsed.tiny else 50, guidance_scale=1.0)
    real, shapes = drawn(80 if parsed.tiny else 2000, REAL_SEED + 1)
    floor = one.evaluators[0](real, [str(shape) for shape in shapes.tolist()])
    return {"steps": steps, "teacher": teacher, "floor": floor}


def distil(parsed: argparse.Namespace) -> dict[str, Any]:
    """Distils one seed."""
    updates = 2 if parsed.tiny else 2000
    path = {
        "none": {"num_path_nodes": 0},
        "path": {"num_path_nodes": 4, "degradation_steps": 200, "steps_per_target": 100},
    }
    if parsed.tiny:
        path["path"] = {"num_path_nodes": 1, "degradation_steps": 2, "steps_per_target": 1}
    config = DisBackConfig(
        pretrained_model_name_or_path=str(parsed.work_dir / "teacher"),
        null_class_label=NO_CLASS,
        output_dir=str(parsed.work_dir / f"run-{parsed.arm}-{parsed.seed}"),
        seed=parsed.seed,
        guidance_scale=1.0,
        train_batch_size=2 if parsed.tiny else 128,
        mixed_precision="bf16" if torch.cuda.is_available() else "no",
        max_train_steps=updates,
        validation_steps=updates // 2 if parsed.tiny else 100,
        checkpointing_steps=1 if parsed.tiny else 500,
        checkpoints_total_limit=1,
        generator_learning_rate=1e-4,
        fake_score_learning_rate=2e-4,
        fake_score_updates=1,
        adam_beta1=0.0,
        lr_scheduler="constant",
        report_to="none",
        resume_from_checkpoint="latest",
        **path[parsed.arm],
    )
    return figures_of(config, lambda: evaluation(parsed.tiny))


if __name__ == "__main__":
    main(__doc__, make_teacher, distil, teacher_steps=8000)
