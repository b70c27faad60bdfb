import inspect
import json
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import tiny
import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image

from diffusers_disback.families import family_of, network_name_of, to_pipeline
from diffusers_disback.hub.publish.student import save_student
from diffusers_disback.models.generator import OneStepGenerator
from diffusers_disback.models.reference import ModelReference
from diffusers_disback.pipelines.one_step import DisBackOneStepPipeline


PROMPT = tiny.PROMPTS[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, teacher_folder):
    """A student as training writes it."""
    folder = tmp_path_factory.mktemp("student")
    teacher = StableDiffusionPipeline.from_pretrained(teacher_folder)
    save_student(
        to_pipeline(tiny.unet(seed=1), 399, teacher),
        ModelReference(str(teacher_folder)).resolve(network_name_of),
        folder,
    )
    return folder


@pytest.fixture
def pipe(folder):
    pipe = DisBackOneStepPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(count=1):
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(3))


def draw(pipe, prompt=PROMPT, count=1, output_type="pt", **arguments):
    return pipe(prompt, latents=latents(count), output_type=output_type, **arguments).images


STOCK = {"num_inference_steps": 1, "guidance_scale": 0}


@pytest.mark.parametrize("stock", [StableDiffusionPipeline, DiffusionPipeline, AutoPipelineForText2Image])
def test_stock_pipelines_draw_the_same_picture_bit_for_bit(pipe, folder, stock):
    other = stock.from_pretrained(folder)
    assert type(other) is StableDiffusionPipeline
    assert torch.equal(draw(pipe), draw(other, **STOCK))


def test_the_travelling_file_draws_the_same_picture_bit_for_bit(pipe, folder):
    other = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)
    assert type(other).__name__ == "DisBackOneStepPipeline" and type(other) is not DisBackOneStepPipeline
    assert torch.equal(draw(pipe), draw(other))


def test_the_bare_unet_draws_the_same_picture_bit_for_bit(pipe, folder, teacher_folder):
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    family = family_of(StableDiffusionPipeline.from_pretrained(teacher_folder))
    with torch.no_grad():
        x0 = OneStepGenerator(family.score_model(unet), 399)(latents(), family.encode([PROMPT]))
        assert torch.equal(draw(pipe, output_type="latent"), x0)
        images = family.pipeline.vae.decode(x0 / family.pipeline.vae.config.scaling_factor).sample
    assert torch.equal(draw(pipe), (images / 2 + 0.5).clamp(0, 1))


@pytest.mark.slow
def test_the_folder_loads_where_the_package_is_not_installed(pipe, folder, tmp_path):
    program = f"""
import sys
sys.modules["diffusers_disback"] = None
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(folder)!r}, custom_pipeline={str(folder)!r}, trust_remote_code=True)
latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
torch.save(pipe({PROMPT!r}, latents=latents, output_type="pt").images, {str(tmp_path / "image.pt")!r})
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "image.pt"), draw(pipe))


def test_what_is_written(folder):
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["requires_safety_checker"] is False
    assert (folder / "pipeline.py").read_text() == inspect.getsource(inspect.getmodule(DisBackOneStepPipeline))
    assert not list(folder.rglob("*.bin")) and not list(folder.rglob("*.pt"))


def test_saved_again_it_is_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert torch.equal(draw(DisBackOneStepPipeline.from_pretrained(tmp_path)), draw(pipe))
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"


def test_saved_over_itself_it_keeps_its_file(folder):
    remote = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(folder), trust_remote_code=True)
    before = (folder / "pipeline.py").read_text()
    remote.save_pretrained(folder)
    assert (folder / "pipeline.py").read_text() == before


def test_a_batch_is_its_pictures(pipe):
    together = draw(pipe, tiny.PROMPTS, count=3)
    for row, prompt in enumerate(tiny.PROMPTS):
        alone = pipe(prompt, latents=latents(3)[row : row + 1], output_type="pt").images
        assert torch.allclose(together[row], alone[0], atol=1e-5)


def test_several_pictures_of_a_prompt(pipe):
    assert len(pipe(tiny.PROMPTS, num_images_per_prompt=2, output_type="pt").images) == 6


def test_a_seed_gives_a_picture(pipe):
    one, two, other = (
        pipe(PROMPT, generator=torch.Generator().manual_seed(seed), output_type="pt").images for seed in (5, 5, 6)
    )
    assert torch.equal(one, two) and not torch.equal(one, other)
    seeds = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    listed = pipe([PROMPT] * 2, generator=seeds, output_type="pt").images
    assert torch.allclose(listed, torch.cat([one, other]), atol=1e-5)


def test_output_types(pipe):
    assert isinstance(draw(pipe, output_type="pil")[0], Image.Image)
    assert isinstance(draw(pipe, output_type="np"), np.ndarray)
    assert draw(pipe, output_type="np").shape == (1, 16, 16, 3)
    assert draw(pipe, output_type="latent").shape == (1, 4, 8, 8)
    images, objections = pipe(PROMPT, latents=latents(), output_type="pt", return_dict=False)
    assert torch.equal(images, draw(pipe)) and objections is None


def test_other_sizes(pipe):
    assert pipe(PROMPT, height=32, width=24, output_type="pt").images.shape == (1, 3, 32, 24)
    with pytest.raises(ValueError, match="divisible by 8"):
        pipe(PROMPT, height=33, width=24)


def test_embeddings_in_place_of_a_prompt(pipe):
    embeds, _ = pipe.encode_prompt(PROMPT, "cpu", 1, False)
    assert torch.equal(draw(pipe, None, prompt_embeds=embeds), draw(pipe))
    with pytest.raises(ValueError, match="only forward one of the two"):
        pipe(PROMPT, prompt_embeds=embeds)


def test_clip_skip_leaves_out_the_last_layer(pipe):
    tokens = pipe.tokenizer(PROMPT, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        states = pipe.text_encoder(tokens, output_hidden_states=True).hidden_states
        (norm,) = (m for name, m in pipe.text_encoder.named_modules() if name.endswith("final_layer_norm"))
        assert torch.equal(draw(pipe, clip_skip=1), draw(pipe, None, prompt_embeds=norm(states[-2])))
        assert torch.equal(draw(pipe, clip_skip=0), draw(pipe)), "nothing skipped"
    assert not torch.equal(draw(pipe, clip_skip=1), draw(pipe))
    assert len(pipe(tiny.PROMPTS, num_images_per_prompt=2, clip_skip=1, output_type="pt").images) == 6


def test_callback(pipe):
    seen = []

    def callback(pipeline, step, timestep, tensors):
        seen.append((step, int(timestep), sorted(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    changed = draw(pipe, callback_on_step_end=callback, output_type="latent")
    assert seen == [(0, 399, ["latents"])]
    assert not changed.any()
    with pytest.raises(ValueError, match="has to be in"):
        pipe(PROMPT, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["noise"])


def test_the_unet_is_asked_once(pipe):
    calls = []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    draw(pipe, tiny.PROMPTS, count=3)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_inference_steps": 4}, "num_inference_steps=4: a one-step student"),
        ({"guidance_scale": 7.5}, "guidance_scale=7.5: the student has"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, "`latents` have the shape"),
        ({"latents": torch.zeros(1, 3, 8, 8)}, "`latents` have the shape"),
        ({"generator": [torch.Generator()] * 2}, "list of generators of length 2"),
    ],
)
def test_what_a_one_step_student_cannot_do_is_refused(pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(PROMPT, **arguments)


def test_what_has_no_effect_is_told(pipe, caplog):
    logging = diffusers.utils.logging
    logging.enable_propagation()
    try:
        before = draw(pipe)
        assert not caplog.messages
        idle = {"negative_prompt": "blurry", "guidance_rescale": 0.7, "prompt_2": "else", "original_size": (512, 512)}
        assert torch.equal(draw(pipe, **idle), before)
    finally:
        logging.disable_propagation()
    assert {message.split(":")[0] for message in caplog.messages} == {f"`{name}` has no effect" for name in idle}
    with pytest.raises(TypeError, match="no argument 'promt'"):
        pipe(PROMPT, promt="a typo")


def test_an_ordinary_scheduler_is_refused(pipe):
    pipe.scheduler = tiny.scheduler()
    with pytest.raises(ValueError, match="it is no one-step scheduler"):
        pipe(PROMPT)


def test_memory_savers_change_nothing_much(pipe):
    before = draw(pipe)
    pipe.enable_attention_slicing()
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    assert torch.allclose(draw(pipe), before, atol=1e-5)
    assert pipe.vae.use_slicing and pipe.vae.use_tiling


def test_dtype_and_device(pipe):
    before = draw(pipe)
    pipe.to(torch.bfloat16)
    assert draw(pipe).dtype == torch.bfloat16
    assert (draw(pipe).float() - before).abs().mean() < 0.05


def test_components_make_the_same_pipeline(pipe):
    assert torch.equal(draw(DisBackOneStepPipeline(**pipe.components)), draw(pipe))


def test_loading_in_half_precision(folder):
    pipe = DisBackOneStepPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    assert pipe.unet.dtype == pipe.text_encoder.dtype == torch.bfloat16


def test_a_lora_and_a_textual_inversion_load(pipe, tmp_path):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    before = draw(pipe)
    unet = tiny.unet(seed=1)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights="gaussian"))
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(unet))
    pipe.load_lora_weights(tmp_path)
    adapted = draw(pipe)
    assert not torch.allclose(adapted, before, atol=1e-4)
    assert torch.allclose(draw(pipe, cross_attention_kwargs={"scale": 0.0}), before, atol=1e-6)
    pipe.unload_lora_weights()
    pipe.load_textual_inversion({"<new>": torch.randn(1, tiny.WIDTH)}, token="<new>")
    assert not torch.equal(draw(pipe, "a <new> circle"), draw(pipe, "a circle"))


@pytest.mark.gpu
def test_model_cpu_offload(folder):
    pipe = DisBackOneStepPipeline.from_pretrained(folder)
    pipe.enable_model_cpu_offload()
    assert torch.isfinite(draw(pipe)).all()
    assert pipe.unet.device.type == "cpu"
