"""Networks in half precision among parts in float32: bases of adapters, copies that draw, and one-step pipelines."""

import itertools

import pytest
import tiny
import torch
from diffusers import PixArtSigmaPipeline
from script import SHORT, arguments
from test_flow_families import call_of, noise_of

from diffusers_disback.evaluation.report_format import read_report
from diffusers_disback.families import family_of
from diffusers_disback.models.adapters import base_of
from diffusers_disback.models.casting import called_in_float32, inference_copy


BF16, CPU = torch.bfloat16, torch.device("cpu")
every_family = pytest.mark.parametrize("name", tiny.PIPELINES)
TRANSFORMERS = {
    **tiny.FLOW,
    "pixart-alpha": tiny.pixart,
    "pixart-sigma": lambda: tiny.pixart(kind=PixArtSigmaPipeline),
}


@every_family
def test_a_copy_in_half_precision_is_whole_and_draws(name):
    """Tables that a state leaves out, too, such as the positions of PixArt and DiT."""
    family = family_of(tiny.PIPELINES[name]())
    network = family.network
    half = base_of(network, CPU, BF16)
    assert {tensor.device for tensor in (*half.parameters(), *half.buffers())} == {CPU}
    assert dict(half.named_buffers()).keys() == dict(network.named_buffers()).keys()
    noise, given = noise_of(family), family.arguments(["0", "1"])
    timestep = family.default_timestep()
    whole = family.sample(family.one_step(network, timestep), given, noise)
    with inference_copy(network, CPU, BF16) as copy:
        drawn = family.sample(family.one_step(copy, timestep), given, noise)
    assert drawn.dtype == whole.dtype and (drawn - whole).abs().mean() < 0.02
    with called_in_float32(half):
        again = family.sample(family.one_step(half, timestep), given, noise)
    assert torch.equal(again, drawn)
    assert not half._forward_hooks and not half._forward_pre_hooks


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_parts_of_a_one_step_pipeline_may_be_of_different_precision(name):
    family = family_of(TRANSFORMERS[name]())
    pipe = family.one_step(family.network, family.default_timestep())
    pipe.set_progress_bar_config(disable=True)
    call = {**call_of(family), "output_type": "pt"}
    call |= {"latents": noise_of(family)}
    whole = pipe(tiny.PROMPTS[:2], **call).images
    encoders = [one for one in family.encoders if getattr(pipe, one) is not None]
    for mix in itertools.product((torch.float32, BF16), repeat=3):
        for dtype, names in zip(mix, (["transformer"], ["vae"], encoders), strict=True):
            for part in names:
                getattr(pipe, part).to(dtype)
        drawn = pipe(tiny.PROMPTS[:2], **call).images
        assert drawn.dtype == mix[1] and (drawn.float() - whole).abs().mean() < 0.05, mix
        generated = pipe(tiny.PROMPTS[:2], **{**call, "latents": None}).images
        assert generated.isfinite().all(), mix


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize(
    "name",
    [name if name == "stable_diffusion_3" else pytest.param(name, marks=pytest.mark.slow) for name in tiny.PIPELINES],
)
def test_a_run_in_bf16_draws_its_images(name, rank, tmp_path, prompts_file, small_pictures):
    """The base of adapters is in bf16 while the rest of the pipeline is in float32."""
    import train_disback

    family = family_of(tiny.PIPELINES[name]())
    family.pipeline.save_pretrained(tmp_path / "teacher")
    is_prompted = family.usage.task == "text-to-image"
    flags = {**SHORT, "mixed_precision": "bf16", "lora_rank": rank, "validation_steps": 1, "guidance_scale": 1}
    line = arguments(tmp_path / "run", tmp_path / "teacher", prompts_file if is_prompted else None, **flags)
    train_disback.main(line)
    report = read_report(tmp_path / "run")
    assert report["settings"]["mixed_precision"] == "bf16" and len(report["curve"]) >= 2
