"""Makes the digits teacher from scratch, its classifier, and the statistics of real digits that the evaluator compares with.

    cd examples/unconditional_image_generation && OMP_NUM_THREADS=1 python -m digits.make_teacher --data_dir outputs/mnist

One CPU thread is enough. Every part is resumable: run the same command again and it goes on where it was. `digits.measure_teacher` measures the result and writes its card.
"""

import argparse
import math
import shutil
import sys
from pathlib import Path

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample, mse_loss


sys.path.append(str(Path(__file__).parents[2] / "text_to_image"))  # whose shapes are trained by the same loop

from diffusers_disback.models.noise_schedule import NoiseSchedule
from shapes.fit import fit

from .classifier import DigitsClassifier
from .dataset import NUM_CLASSES, RESOLUTION, digits
from .evaluator import HERE, MARKER, write_reference


NO_CLASS = NUM_CLASSES  # the label that stands for none
DROPPED = 0.1  # the share of labels that it replaces


def distorted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images turned by up to 12 degrees, scaled by up to 15 %, and moved by up to a pixel."""
    turn, scale, x, y = torch.rand(4, len(images), generator=generator) * 2 - 1
    turn, scale = turn * math.radians(12), torch.exp(scale * 0.15)
    rows = (
        scale * turn.cos(),
        -scale * turn.sin(),
        x * 2 / RESOLUTION,
        scale * turn.sin(),
        scale * turn.cos(),
        y * 2 / RESOLUTION,
    )
    grid = affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(images.shape), align_corners=False)
    return grid_sample(images, grid, align_corners=False)


def make_classifier(images: Tensor, labels: Tensor, steps: int, work_dir: Path) -> DigitsClassifier:
    """A classifier of images in 0..255, `[N, 1, 16, 16]` uint8, and their labels, `[N]`."""

    def loss(classifier: nn.Module, step: int) -> Tensor:
        generator, device = torch.Generator().manual_seed(step), next(classifier.parameters()).device
        rows = torch.randint(len(images), (64,), generator=generator)
        shown = distorted(images[rows].float() / 255, generator).to(device)
        return cross_entropy(classifier.classify(classifier(shown)), labels[rows].to(device), label_smoothing=0.05)

    return fit("classifier", DigitsClassifier(), loss, steps, 2e-3, work_dir, ema_decay=0.99)


def make_unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=RESOLUTION,
        in_channels=1,
        out_channels=1,
        num_class_embeds=NUM_CLASSES + 1,
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
        block_out_channels=(16, 48, 64),
        layers_per_block=1,
        attention_head_dim=16,
        norm_num_groups=8,
        resnet_time_scale_shift="scale_shift",
    )


def make_teacher(
    images: Tensor, labels: Tensor, scheduler: DDPMScheduler, steps: int, batch_size: int, work_dir: Path
) -> UNet2DModel:
    """A denoiser of images in 0..255, `[N, 1, 16, 16]` uint8, and their labels, `[N]`."""
    schedule = NoiseSchedule.from_scheduler(scheduler)

    def loss(unet: nn.Module, step: int) -> Tensor:
        generator, device = torch.Generator().manual_seed(step), next(unet.parameters()).device
        rows = torch.randint(len(images), (batch_size,), generator=generator)
        x0 = images[rows].float() / 127.5 - 1
        noise = torch.randn(x0.shape, generator=generator)
        t = torch.randint(schedule.num_timesteps, (batch_size,), generator=generator)
        dropped = torch.rand(batch_size, generator=generator) < DROPPED
        given = torch.where(dropped, NO_CLASS, labels[rows])
        x_t = schedule.diffuse(x0, noise, t).to(device)
        output = unet(x_t, t.to(device), class_labels=given.to(device)).sample
        return mse_loss(output, schedule.regression_target(x0, noise, t).to(device))

    return fit("unet", make_unet(), loss, steps, 2e-3, work_dir, ema_decay=0.999)


def save_teacher(folder: Path, unet: UNet2DModel, scheduler: DDPMScheduler) -> None:
    """Writes the pipeline's folder, in half precision, with the mark by which the training script knows the teacher."""
    shutil.rmtree(folder, ignore_errors=True)
    DDPMPipeline(unet.half(), scheduler).save_pretrained(folder)
    (folder / MARKER).write_text('{"data": "MNIST, 16x16"}\n')


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Make the digits teacher and its classifier.")
    parser.add_argument(
        "--data_dir", type=Path, required=True, help="Where MNIST is kept; it is downloaded if need be."
    )
    parser.add_argument(
        "--work_dir",
        type=Path,
        default=Path("outputs/digits_teacher"),
        help="What is unfinished, and the loss curves.",
    )
    parser.add_argument("--output_dir", type=Path, default=HERE, help="Gets the folders `classifier` and `teacher`.")
    parser.add_argument("--teacher_only", action="store_true", help="Leave the classifier as it is.")
    parser.add_argument("--prediction_type", choices=("epsilon", "v_prediction"), default="v_prediction")
    parser.add_argument("--classifier_steps", type=int, default=3000)
    parser.add_argument("--teacher_steps", type=int, default=5000)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(arguments: list[str] | None = None) -> None:
    settings = parser().parse_args(arguments)
    settings.work_dir.mkdir(parents=True, exist_ok=True)
    images, labels = digits(settings.data_dir, "train")
    torch.manual_seed(settings.seed)
    if not settings.teacher_only:
        classifier = make_classifier(images, labels, settings.classifier_steps, settings.work_dir)
        classifier.half().save_pretrained(settings.output_dir / "classifier")
        write_reference(settings.output_dir / "classifier", digits(settings.data_dir, "reference")[0])
    scheduler = DDPMScheduler(num_train_timesteps=1000, prediction_type=settings.prediction_type)
    sizes = (settings.teacher_steps, settings.batch_size)
    save_teacher(
        settings.output_dir / "teacher", make_teacher(images, labels, scheduler, *sizes, settings.work_dir), scheduler
    )


if __name__ == "__main__":
    main()
