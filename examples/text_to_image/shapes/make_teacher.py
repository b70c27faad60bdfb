"""Makes the shapes teacher and its classifier from scratch: classifier, autoencoder, then text encoder and denoiser together.

    cd examples/text_to_image && accelerate launch --num_cpu_threads_per_process 2 -m shapes.make_teacher

The classifier and the autoencoder are made from shapes at any tilt, the teacher from the data set's own.

Teachers of other kinds are made with the shipped classifier and autoencoder, each in folders of its own:

    accelerate launch -m shapes.make_teacher --denoiser_only --family stable_diffusion_xl \\
        --work_dir outputs/xl --output_dir outputs/xl

Every part is resumable: run the same command again and it goes on where it was. `shapes.measure_teacher` measures the
result and writes its card.
"""

import argparse
import math
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import CLIPTokenizer

from diffusers_disback.models.noise_schedule import PREDICTION_TYPES
from diffusers_disback.models.single_file import save_portable

from .classifier import ATTRIBUTES, ShapesClassifier
from .dataset import ANY_TILT, CAPTIONS, MAX_TILT, SCENES, pixels
from .denoisers import KINDS, StableDiffusion, StableDiffusion3, make_tokenizer
from .fit import fit


HERE = Path(__file__).parent


def fresh_pictures(
    batch_size: int, part: int, step: int, device: torch.device, max_tilt: float
) -> tuple[Tensor, Tensor]:
    """Images in 0..1, never drawn before, and their scenes. Seeds from 1,000,000 on are for training."""
    images, scenes = pixels(batch_size, 1_000_000 * part + step, max_tilt)
    return torch.from_numpy(images).to(device).float() / 255, torch.from_numpy(scenes).to(device)


def attribute_labels(scenes: Tensor) -> dict[str, Tensor]:
    """Class indices of each attribute, `[B]` each, from indices into `SCENES`."""
    words = [SCENES[index] for index in scenes.tolist()]
    return {
        name: torch.tensor([classes.index(getattr(scene, name)) for scene in words], device=scenes.device)
        for name, classes in ATTRIBUTES.items()
    }


def make_classifier(steps: int, work_dir: Path) -> ShapesClassifier:
    def loss(classifier: nn.Module, step: int) -> Tensor:
        images, scenes = fresh_pictures(64, 1, step, classifier.device, ANY_TILT)
        logits = classifier.classify(images)
        return sum(nn.functional.cross_entropy(logits[k], label) for k, label in attribute_labels(scenes).items())

    return fit("classifier", ShapesClassifier(), loss, steps, 2e-3, work_dir, ema_decay=0.99)


def make_autoencoder(steps: int, work_dir: Path) -> AutoencoderKL:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 48, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
    )

    def loss(vae: nn.Module, step: int) -> Tensor:
        images, _ = fresh_pictures(24, 2, step, vae.device, ANY_TILT)
        images = images * 2 - 1
        posterior = vae.encode(images).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(step))
        rebuilt = vae.decode(posterior.mean + posterior.std * noise.to(images.device)).sample
        difference = rebuilt - images
        return difference.square().mean() + difference.abs().mean() + 1e-6 * posterior.kl().mean()

    return fit("vae", vae, loss, steps, 3e-3, work_dir, ema_decay=0.995)


@torch.no_grad()
def encode_dataset(vae: AutoencoderKL, num_images: int, work_dir: Path) -> dict[str, Tensor]:
    """Posterior moments of `num_images` images and their scenes; kept in `work_dir/latents.safetensors`."""
    file = work_dir / "latents.safetensors"
    if not file.exists():
        rows = []
        for step in tqdm(range(math.ceil(num_images / 100)), desc="encode", mininterval=10):
            images, scenes = fresh_pictures(min(100, num_images - 100 * step), 3, step, vae.device, MAX_TILT)
            posterior = vae.encode(images * 2 - 1).latent_dist
            rows.append((posterior.mean, posterior.std, scenes))
        mean, std, scenes = (torch.cat(column).cpu().contiguous() for column in zip(*rows, strict=True))
        save_file({"mean": mean, "std": std, "scenes": scenes}, file)
    return load_file(file)


def make_teacher(
    kind: StableDiffusion | StableDiffusion3,
    tokenizer: CLIPTokenizer,
    latents: dict[str, Tensor],
    steps: int,
    work_dir: Path,
) -> nn.ModuleDict:
    scale, schedule = 1 / latents["mean"].std(), kind.schedule()
    tokens = tokenizer(["", *CAPTIONS], padding="max_length", return_tensors="pt").input_ids

    def loss(networks: nn.ModuleDict, step: int) -> Tensor:
        device = next(networks.parameters()).device
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(len(latents["mean"]), (64,), generator=generator)
        mean, std, scenes = (latents[key][rows] for key in ("mean", "std", "scenes"))
        x0 = scale * (mean + std * torch.randn(mean.shape, generator=generator))
        noise = torch.randn(x0.shape, generator=generator)
        t = torch.randint(1000, (len(x0),), generator=generator)
        dropped = torch.rand(len(x0), generator=generator) < 0.1
        captions = tokens[torch.where(dropped, 0, scenes + 1)]
        x_t, times = schedule.diffuse(x0, noise, t).to(device), schedule.time_of(t).to(device)
        output = kind.predict(networks, x_t, times, captions.to(device), dropped.to(device))
        return nn.functional.mse_loss(output, schedule.regression_target(x0, noise, t).to(device))

    return fit("denoiser", kind.networks(tokenizer), loss, steps, 1e-3, work_dir, ema_decay=0.999)


def save_teacher(output_dir: Path, pipeline: DiffusionPipeline) -> None:
    """The pipeline's folder in half precision, in the form that older transformers read too."""
    shutil.rmtree(output_dir, ignore_errors=True)
    save_portable(pipeline.to(dtype=torch.float16), output_dir)
    (output_dir / "world.json").write_text('{"world": "shapes"}\n')


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Make the shapes teacher and its classifier.")
    parser.add_argument(
        "--work_dir",
        type=Path,
        default=Path("outputs/shapes_teacher"),
        help="What is unfinished; one for each teacher.",
    )
    parser.add_argument("--output_dir", type=Path, default=HERE, help="Gets the folders `classifier` and `teacher`.")
    parser.add_argument("--denoiser_only", action="store_true", help="Take the shipped classifier and autoencoder.")
    parser.add_argument("--family", choices=KINDS, default="stable_diffusion")
    parser.add_argument(
        "--prediction_type", choices=PREDICTION_TYPES, default=None, help="epsilon by default; not of a flow."
    )
    parser.add_argument("--zero_terminal_snr", action="store_true", help="No signal is left at the last timestep.")
    parser.add_argument("--classifier_steps", type=int, default=1500)
    parser.add_argument("--vae_steps", type=int, default=4000)
    parser.add_argument("--denoiser_steps", type=int, default=12000)
    parser.add_argument("--num_latents", type=int, default=40000)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(arguments: list[str] | None = None) -> None:
    settings = parser().parse_args(arguments)
    flow = settings.family == "stable_diffusion_3"
    if flow and (settings.prediction_type or settings.zero_terminal_snr):
        parser().error("--family stable_diffusion_3 is of flow matching: it has no --prediction_type.")
    if settings.zero_terminal_snr and settings.prediction_type in (None, "epsilon"):
        parser().error(
            "--zero_terminal_snr needs --prediction_type v_prediction or sample: the noise alone tells no x0."
        )
    if settings.denoiser_only and settings.output_dir == HERE:
        parser().error("--denoiser_only needs an --output_dir of its own: the shipped teacher is not to be replaced.")
    if flow:
        kind = StableDiffusion3()
    else:
        kind = KINDS[settings.family](settings.prediction_type or "epsilon", settings.zero_terminal_snr)
    settings.work_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)

    if settings.denoiser_only:
        vae = AutoencoderKL.from_pretrained(HERE / "teacher" / "vae", torch_dtype=torch.float32).eval()
    else:
        classifier = make_classifier(settings.classifier_steps, settings.work_dir)
        classifier.half().save_pretrained(settings.output_dir / "classifier")
        vae = make_autoencoder(settings.vae_steps, settings.work_dir)
    latents = encode_dataset(vae, settings.num_latents, settings.work_dir)
    vae.register_to_config(scaling_factor=round((1 / latents["mean"].std()).item(), 5))

    tokenizer = make_tokenizer(kind.prompt_length)
    networks = make_teacher(kind, tokenizer, latents, settings.denoiser_steps, settings.work_dir)
    save_teacher(settings.output_dir / "teacher", kind.pipeline(vae, networks, tokenizer))


if __name__ == "__main__":
    main()
