"""Makes the shapes teacher and its classifier from scratch: classifier, autoencoder, then text encoder and UNet together.

    cd examples/text_to_image && accelerate launch --num_cpu_threads_per_process 2 -m shapes.make_teacher

The classifier and the autoencoder are made from shapes at any tilt, the teacher from the data set's own.

Teachers of other kinds are made with the shipped classifier and autoencoder, each in folders of its own:

    accelerate launch -m shapes.make_teacher --denoiser_only --family stable_diffusion_xl \\
        --work_dir outputs/xl --output_dir outputs/xl

Every part is resumable: run the same command again and it goes on where it was. `shapes.measure_teacher` measures the
result and writes its card.
"""

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from diffusers_disback.families import FAMILIES
from diffusers_disback.models.noise_schedule import PREDICTION_TYPES, NoiseSchedule
from diffusers_disback.models.single_file import save_portable

from .classifier import ATTRIBUTES, ShapesClassifier
from .dataset import ANY_TILT, CAPTIONS, MAX_TILT, SCENES, pixels
from .fit import fit


HERE = Path(__file__).parent
PROMPT_LENGTH = 16
TEXT_WIDTH, TEXT_WIDTH_2 = 64, 96
SIDE = 64.0


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
        for step in tqdm(range(num_images // 100), desc="encode", mininterval=10):
            images, scenes = fresh_pictures(100, 3, step, vae.device, MAX_TILT)
            posterior = vae.encode(images * 2 - 1).latent_dist
            rows.append((posterior.mean, posterior.std, scenes))
        mean, std, scenes = (torch.cat(column).cpu().contiguous() for column in zip(*rows, strict=True))
        save_file({"mean": mean, "std": std, "scenes": scenes}, file)
    return load_file(file)


def make_tokenizer() -> CLIPTokenizer:
    """CLIP's byte pair encoding with a vocabulary of its own, in which every word of the captions is one token."""
    bytes_ = [chr(b) for b in (*range(33, 127), *range(161, 173), *range(174, 256))]
    bytes_ += [chr(256 + k) for k in range(256 - len(bytes_))]
    words = sorted({word for caption in CAPTIONS for word in caption.split()}, key=lambda word: (len(word), word))
    merges, pieces = [], []
    for word in words:
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            merge = (symbols[-2], symbols[-1])
            if merge not in merges:
                merges.append(merge)
                pieces.append("".join(merge))
            symbols[-2:] = ["".join(merge)]
    tokens = [*bytes_, *(b + "</w>" for b in bytes_), *pieces, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=PROMPT_LENGTH)


def make_scheduler(prediction_type: str, zero_terminal_snr: bool) -> DDPMScheduler:
    ends_with_noise = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if zero_terminal_snr else {}
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        clip_sample=False,  # latents are not confined to [-1, 1]
        steps_offset=1,
        **ends_with_noise,
    )


def text_config(tokenizer: CLIPTokenizer, width: int, layers: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=PROMPT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def make_unet(**config) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 112),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=16,
        **config,
    )


def make_denoiser(family: str, tokenizer: CLIPTokenizer) -> nn.ModuleDict:
    """The text encoders and the UNet, by the names that the pipeline has for them."""
    if family == "stable_diffusion":
        text_encoder = CLIPTextModel(text_config(tokenizer, TEXT_WIDTH, layers=2))
        return nn.ModuleDict({"text_encoder": text_encoder, "unet": make_unet(cross_attention_dim=TEXT_WIDTH)})
    # SDXL conditions on the last layer but one, hence a layer more.
    config_2 = text_config(tokenizer, TEXT_WIDTH_2, layers=3)
    config_2.projection_dim = TEXT_WIDTH_2
    return nn.ModuleDict(
        {
            "text_encoder": CLIPTextModel(text_config(tokenizer, TEXT_WIDTH, layers=3)),
            "text_encoder_2": CLIPTextModelWithProjection(config_2),
            "unet": make_unet(
                cross_attention_dim=TEXT_WIDTH + TEXT_WIDTH_2,
                addition_embed_type="text_time",
                addition_time_embed_dim=8,
                projection_class_embeddings_input_dim=TEXT_WIDTH_2 + 6 * 8,
                transformer_layers_per_block=(1, 2),
                use_linear_projection=True,
            ),
        }
    )


def network_arguments(denoiser: nn.ModuleDict, tokens: Tensor, empty: Tensor) -> dict[str, Tensor | dict[str, Tensor]]:
    """What the pipeline tells the UNet besides latents and timestep, with gradients to the text encoders.

    Args:
        denoiser (`nn.ModuleDict`): Of `make_denoiser`.
        tokens (`Tensor`): `[B, PROMPT_LENGTH]`.
        empty (`Tensor`): Which prompts are empty, `[B]` bool.
    """
    if "text_encoder_2" not in denoiser:
        return {"encoder_hidden_states": denoiser["text_encoder"](tokens).last_hidden_state}
    encoded = [denoiser[name](tokens, output_hidden_states=True) for name in ("text_encoder", "text_encoder_2")]
    states = torch.cat([output.hidden_states[-2] for output in encoded], -1).masked_fill(empty[:, None, None], 0)
    pooled = encoded[1].text_embeds.masked_fill(empty[:, None], 0)
    time_ids = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]], device=tokens.device).expand(len(tokens), -1)
    return {"encoder_hidden_states": states, "added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids}}


def make_teacher(
    family: str,
    tokenizer: CLIPTokenizer,
    scheduler: DDPMScheduler,
    latents: dict[str, Tensor],
    steps: int,
    work_dir: Path,
) -> nn.ModuleDict:
    scale, schedule = 1 / latents["mean"].std(), NoiseSchedule.from_scheduler(scheduler)
    tokens = tokenizer(["", *CAPTIONS], padding="max_length", max_length=PROMPT_LENGTH, return_tensors="pt").input_ids

    def loss(model: nn.Module, step: int) -> Tensor:
        device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(len(latents["mean"]), (64,), generator=generator)
        mean, std, scenes = (latents[key][rows] for key in ("mean", "std", "scenes"))
        x0 = scale * (mean + std * torch.randn(mean.shape, generator=generator))
        noise = torch.randn(x0.shape, generator=generator)
        t = torch.randint(1000, (len(x0),), generator=generator)
        dropped = torch.rand(len(x0), generator=generator) < 0.1
        captions = tokens[torch.where(dropped, 0, scenes + 1)]
        x_t = schedule.diffuse(x0, noise, t).to(device)
        arguments = network_arguments(model, captions.to(device), dropped.to(device))
        output = model["unet"](x_t, t.to(device), **arguments).sample
        return nn.functional.mse_loss(output, schedule.regression_target(x0, noise, t).to(device))

    return fit("denoiser", make_denoiser(family, tokenizer), loss, steps, 1e-3, work_dir, ema_decay=0.999)


def pipeline_of(
    vae: AutoencoderKL, denoiser: nn.ModuleDict, tokenizer: CLIPTokenizer, scheduler: DDPMScheduler
) -> DiffusionPipeline:
    components = {"vae": vae, "tokenizer": tokenizer, "scheduler": scheduler, **denoiser}
    if "text_encoder_2" in denoiser:
        return StableDiffusionXLPipeline(**components, tokenizer_2=tokenizer, add_watermarker=False)
    return StableDiffusionPipeline(
        **components, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


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
    parser.add_argument("--family", choices=FAMILIES, default="stable_diffusion")
    parser.add_argument("--prediction_type", choices=PREDICTION_TYPES, default="epsilon")
    parser.add_argument("--zero_terminal_snr", action="store_true", help="No signal is left at the last timestep.")
    parser.add_argument("--classifier_steps", type=int, default=1500)
    parser.add_argument("--vae_steps", type=int, default=4000)
    parser.add_argument("--denoiser_steps", type=int, default=12000)
    parser.add_argument("--num_latents", type=int, default=40000)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(arguments: list[str] | None = None) -> None:
    settings = parser().parse_args(arguments)
    if settings.zero_terminal_snr and settings.prediction_type == "epsilon":
        parser().error(
            "--zero_terminal_snr needs --prediction_type v_prediction or sample: the noise alone tells no x0."
        )
    if settings.denoiser_only and settings.output_dir == HERE:
        parser().error("--denoiser_only needs an --output_dir of its own: the shipped teacher is not to be replaced.")
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

    tokenizer = make_tokenizer()
    scheduler = make_scheduler(settings.prediction_type, settings.zero_terminal_snr)
    denoiser = make_teacher(settings.family, tokenizer, scheduler, latents, settings.denoiser_steps, settings.work_dir)
    save_teacher(settings.output_dir / "teacher", pipeline_of(vae, denoiser, tokenizer, scheduler))


if __name__ == "__main__":
    main()
