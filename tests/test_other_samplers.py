"""A student in the samplers of other programs, which begin at the last timestep. The figures of docs/exports.md."""

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler
from test_export import changed
from train_disback import SHAPES

from diffusers_disback.families import load_family, to_pipeline
from diffusers_disback.hub.publish.export import extract_lora, save_lora


SAMPLERS = {
    "lcm": (LCMScheduler, {}, 1e-6),
    "euler": (EulerDiscreteScheduler, {"timestep_spacing": "trailing"}, 1e-2),
    "ddim": (DDIMScheduler, {"timestep_spacing": "trailing", "set_alpha_to_one": True}, 1e-6),
}


def drawn(pipeline, prompts, output_type, **arguments):
    side = pipeline.unet.config.sample_size
    latents = torch.randn(len(prompts), 4, side, side, generator=torch.Generator().manual_seed(0))
    return pipeline(prompts, latents=latents, output_type=output_type, **arguments).images


def sampled(pipeline, prompts, output_type, sampler):
    """What a stock pipeline draws in the one step of a stock scheduler, which begins at the last timestep."""
    kind, changes, _ = SAMPLERS[sampler]
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **changes)
    images = drawn(pipeline, prompts, output_type, num_inference_steps=1, guidance_scale=0)
    assert pipeline.scheduler.timesteps.tolist() == [999]
    return images


def difference(one, other):
    """Root mean square, relative to that of the second."""
    return ((one - other).norm() / other.norm()).item()


TEACHERS = [("stable_diffusion", "epsilon"), ("stable_diffusion", "v_prediction"), ("stable_diffusion_xl", "epsilon")]


@pytest.mark.parametrize(("name", "prediction_type"), TEACHERS)
def test_a_student_of_the_last_timestep_is_what_other_samplers_draw(name, prediction_type, tmp_path):
    """Whole, and as a LoRA on the teacher's stock pipeline, loaded and fused; a student of an earlier one is not."""
    teacher = tiny.PIPELINES[name](prediction_type)
    network = changed(teacher.unet, rank=2)
    save_lora(extract_lora(network, teacher.unet, 4)[0], 4, tmp_path, network)
    students = {t: drawn(to_pipeline(network, t, teacher), tiny.PROMPTS, "latent") for t in (999, 625, 399)}
    stock, lora = (tiny.PIPELINES[name](prediction_type) for _ in range(2))
    lora.load_lora_weights(tmp_path)
    loaded = {sampler: sampled(lora, tiny.PROMPTS, "latent", sampler) for sampler in SAMPLERS}
    lora.fuse_lora()
    lora.unload_lora_weights()
    fused = {sampler: sampled(lora, tiny.PROMPTS, "latent", sampler) for sampler in SAMPLERS}
    stock.register_modules(unet=network)
    whole = {sampler: sampled(stock, tiny.PROMPTS, "latent", sampler) for sampler in SAMPLERS}
    for sampler, (_, _, tolerance) in SAMPLERS.items():
        for latents, rounding in ((whole[sampler], 0), (loaded[sampler], 1e-5), (fused[sampler], 1e-5)):
            found = {t: difference(latents, student) for t, student in students.items()}
            print(name, prediction_type, sampler, *(f"{t}: {value:.2g}" for t, value in found.items()))
            assert found[999] < max(tolerance, rounding) and min(found[625], found[399]) > 0.2


def test_how_near_other_samplers_come_with_real_weights():
    """The shapes teacher's copy, before training. Of images the largest difference, too, in 0..1."""
    teacher = load_family(str(SHAPES / "teacher")).pipeline
    teacher.set_progress_bar_config(disable=True)
    prompts = (SHAPES / "prompts.txt").read_text().splitlines()[:8]
    students = {t: to_pipeline(teacher.unet, t, teacher) for t in (999, 625, 399)}
    for kind in ("latent", "pt"):
        own = {t: drawn(student, prompts, kind) for t, student in students.items()}
        for sampler, (_, _, tolerance) in SAMPLERS.items():
            stock = sampled(teacher, prompts, kind, sampler)
            found = {t: difference(stock, images) for t, images in own.items()}
            largest = (stock - own[999]).abs().max().item()
            print(f"{kind} {sampler}", *(f"{t}: {value:.2g}" for t, value in found.items()), f"largest: {largest:.2g}")
            assert found[999] < tolerance and min(found[625], found[399]) > 0.2
            assert kind == "latent" or largest < 10 * tolerance


@pytest.mark.parametrize(("spacing", "timestep"), [("linspace", 0), ("leading", 1)])
def test_euler_without_trailing_timesteps_asks_at_the_first_one(spacing, timestep):
    scheduler = EulerDiscreteScheduler.from_config(tiny.scheduler().config, timestep_spacing=spacing)
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [timestep]
