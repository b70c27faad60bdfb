"""The one-step pipeline draws what the stock pipeline draws, bit for bit, whatever both are told; or both refuse."""

import copy
import sys

import numpy as np
import pytest
import tiny
import torch
from diffusers.callbacks import PipelineCallback
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from peft import LoraConfig, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from diffusers_disback import DisBackOneStepPipeline
from diffusers_disback.families import to_pipeline


STOCK = {"num_inference_steps": 1, "guidance_scale": 0}
ONE, MORE = tiny.PROMPTS[0], tiny.PROMPTS[:2]
ENCODERS = {"stable_diffusion": ["text_encoder"], "stable_diffusion_xl": ["text_encoder", "text_encoder_2"]}
both_families = pytest.mark.parametrize("family", tiny.TEXT)


def pair(family, changed=lambda components: None):
    """The one-step pipeline and the stock one, of equal parts; none is shared."""
    teacher = tiny.PIPELINES[family]()
    teacher.unet = tiny.PIPELINES[family](seed=1).unet
    own = to_pipeline(teacher.unet, 399, teacher)
    stock_class, made = own.stock_class, []
    for kind in (DisBackOneStepPipeline, stock_class):
        components = copy.deepcopy(own.components)
        changed(components)
        if kind is stock_class:
            foreign = ("safety_checker",) if family == "stable_diffusion_xl" else ("text_encoder_2", "tokenizer_2")
            components = {name: part for name, part in components.items() if name not in foreign}
            if family == "stable_diffusion":
                components["requires_safety_checker"] = False
        made.append(kind(**components))
        made[-1].set_progress_bar_config(disable=True)
    return made


def outcome(pipe, arguments):
    """What a call gives: images and flags, or the class of its error."""
    torch.manual_seed(0)
    arguments = {"prompt": ONE, "output_type": "pt", **arguments()}
    try:
        output = pipe(**arguments)
    except Exception as error:  # which one is what is compared
        return type(error), str(error)
    return output if isinstance(output, tuple) else (type(output), *output.values())


def same(one, two):
    if isinstance(one, (tuple, list)):
        return type(one) is type(two) and len(one) == len(two) and all(map(same, one, two))
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    return np.array_equal(one, two) if isinstance(one, np.ndarray) else one == two


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def noise(*shape):
    return torch.randn(*shape, generator=seeded(3))


class Halving(PipelineCallback):
    tensor_inputs = ["latents"]

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
        return {"latents": callback_kwargs["latents"] / 2}


def zeros(pipeline, step, timestep, tensors):
    assert step == 0 and timestep == 399 and pipeline.num_timesteps == 1
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def interrupting(pipeline, step, timestep, tensors):
    pipeline._interrupt = True
    return {}


EMBEDS = {"prompt": None, "prompt_embeds": noise(1, 16, 32)}
EITHER = {
    "nothing else": {},
    "prompts": {"prompt": MORE},
    "no prompt": {"prompt": None},
    "an empty prompt": {"prompt": ""},
    "a long prompt": {"prompt": "a red circle " * 40},
    "no prompts": {"prompt": []},
    "a prompt of another type": {"prompt": 3},
    "a tuple of prompts": {"prompt": tuple(MORE)},
    "sizes": {"height": 32, "width": 16},
    "height alone": {"height": 32},
    "a size that does not divide": {"height": 33, "width": 16},
    "several images": {"num_images_per_prompt": 2, "prompt": MORE},
    "generator": lambda: {"generator": seeded(5)},
    "generators": lambda: {"generator": [seeded(5), seeded(6)], "prompt": MORE},
    "too few generators": lambda: {"generator": [seeded(5)], "prompt": MORE},
    "latents": {"latents": noise(1, 4, 8, 8)},
    "latents of another size": {"latents": noise(1, 4, 12, 8)},
    "odd latents": {"latents": noise(1, 4, 9, 9)},
    "latents and sizes": {"latents": noise(1, 4, 16, 8), "height": 32, "width": 16},
    "prompt and embeddings": {"prompt_embeds": noise(1, 16, 32)},
    "negative prompt": {"negative_prompt": "blurry"},
    "negative prompts": {"negative_prompt": ["blurry", "dark"]},
    "pil": {"output_type": "pil"},
    "np": {"output_type": "np"},
    "latent": {"output_type": "latent"},
    "an unknown output": {"output_type": "webp"},
    "a tuple": {"return_dict": False},
    "no scale": {"cross_attention_kwargs": {}},
    "scale": {"cross_attention_kwargs": {"scale": 0.5}},
    "a foreign attention argument": {"cross_attention_kwargs": {"nothing": 1}},
    "clip_skip": {"clip_skip": 1},
    "clip_skip of none": {"clip_skip": 0},
    "clip_skip of more than there are": {"clip_skip": 9},
    "guidance_scale 1": {"guidance_scale": 1},
    "guidance_scale 1/2": {"guidance_scale": 0.5},
    "guidance_rescale": {"guidance_rescale": 0.7},
    "eta": {"eta": 1.0},
    "eta and generator": lambda: {"eta": 1.0, "generator": seeded(1)},
    "timesteps": {"timesteps": [399]},
    "sigmas": {"sigmas": [14.6]},
    "timesteps and sigmas": {"timesteps": [399], "sigmas": [14.6]},
    "callback": {"callback_on_step_end": zeros},
    "callback on embeddings": {"callback_on_step_end": zeros, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]},
    "callback on what there is not": {"callback_on_step_end": zeros, "callback_on_step_end_tensor_inputs": ["noise"]},
    "a callback that interrupts": {"callback_on_step_end": interrupting},
    "a callback that returns nothing": {"callback_on_step_end": lambda *_: None},
    "callback object": {"callback_on_step_end": Halving()},
    "the callback of old": {"callback": lambda step, t, latents: latents.mul_(0), "callback_steps": 1},
    "callback_steps of zero": {"callback_steps": 0},
    "an image without an adapter": {"ip_adapter_image": noise(1, 3, 16, 16)},
    "an image's embeddings in no list": {"ip_adapter_image_embeds": noise(1, 1, 32)},
    "an image and its embeddings": {"ip_adapter_image": 0, "ip_adapter_image_embeds": [noise(1, 1, 32)]},
}  # fmt: skip
SD = {
    "embeddings": EMBEDS,
    "several of embeddings": {**EMBEDS, "num_images_per_prompt": 2},
    "embeddings of both signs": {**EMBEDS, "negative_prompt_embeds": noise(1, 16, 32)},
    "embeddings of unequal shapes": {**EMBEDS, "negative_prompt_embeds": noise(2, 16, 32)},
    "both negatives": {"negative_prompt": "dark", "negative_prompt_embeds": noise(1, 16, 32)},
    "embeddings of another width": {"prompt": None, "prompt_embeds": noise(1, 16, 31)},
    "callback on the negative": {
        "callback_on_step_end": lambda *_: {}, "callback_on_step_end_tensor_inputs": ["negative_prompt_embeds"]},
}  # fmt: skip
EMBEDS_XL = {"prompt": None, "prompt_embeds": noise(1, 16, 64), "pooled_prompt_embeds": noise(1, 32)}
NEGATIVES_XL = {"negative_prompt_embeds": noise(1, 16, 64), "negative_pooled_prompt_embeds": noise(1, 32)}
XL = {
    "embeddings": EMBEDS_XL,
    "several of embeddings": {**EMBEDS_XL, "num_images_per_prompt": 2},
    "embeddings of both signs": {**EMBEDS_XL, **NEGATIVES_XL},
    "no pooled embeddings": {"prompt": None, "prompt_embeds": noise(1, 16, 64)},
    "pooled embeddings beside a prompt": {"pooled_prompt_embeds": noise(1, 32)},
    "no negative pooled embeddings": {**EMBEDS_XL, "negative_prompt_embeds": noise(1, 16, 64)},
    "embeddings and prompt_2": {**EMBEDS_XL, "prompt_2": ONE},
    "prompt_2": {"prompt_2": "something else"},
    "prompts_2": {"prompt": MORE, "prompt_2": list(reversed(MORE))},
    "prompt_2 of another type": {"prompt_2": 3},
    "negative_prompt_2": {"negative_prompt": "dark", "negative_prompt_2": "blurry"},
    "sizes told": {"original_size": (512, 256), "crops_coords_top_left": (8, 4), "target_size": (64, 32)},
    "sizes in a list": {"original_size": [512, 256]},
    "negative sizes": {"negative_original_size": (8, 8), "negative_target_size": (8, 8),
        "negative_crops_coords_top_left": (1, 1)},
    "denoising_end": {"denoising_end": 0.5},
    "denoising_end before the step": {"denoising_end": 0.001, "output_type": "latent"},
    "callback on the pooled": {"callback_on_step_end": zeros,
        "callback_on_step_end_tensor_inputs": ["add_text_embeds", "add_time_ids", "latents"]},
}  # fmt: skip
MATRIX = {"stable_diffusion": {**EITHER, **SD}, "stable_diffusion_xl": {**EITHER, **XL}}
REFUSED = {
    *("no prompt", "no prompts", "a prompt of another type", "a tuple of prompts", "prompt and embeddings"),
    *("a size that does not divide", "too few generators"),
    *("timesteps", "sigmas", "timesteps and sigmas", "callback_steps of zero", "clip_skip of more than there are"),
    *("callback on what there is not", "a callback that returns nothing", "an image without an adapter"),
    *("an image's embeddings in no list", "an image and its embeddings"),
    *("embeddings of unequal shapes", "embeddings of another width", "both negatives"),
    *("no pooled embeddings", "no negative pooled embeddings", "embeddings and prompt_2", "prompt_2 of another type"),
    *("sizes in a list",),
}


def compared(pipes, rows):
    """The names of the rows that both draw, and of those in which the two differ."""
    drawn, found = [], {}
    for name, row in rows.items():
        arguments = row if callable(row) else lambda row=row: row
        own = outcome(pipes[0], arguments)
        stock = outcome(pipes[1], lambda arguments=arguments: {**STOCK, **arguments()})
        raised = isinstance(own[0], type) and issubclass(own[0], Exception)
        if not (own[0] is stock[0] if raised else same(own, stock)):
            found[name] = (own, stock)
        elif not raised:
            drawn.append(name)
    return drawn, found


@both_families
def test_for_every_argument(family):
    pipes = pair(family)
    drawn, found = compared(pipes, MATRIX[family])
    # The stock pipeline asks a text encoder for an attribute that those of transformers 5 have no more.
    better = {"clip_skip", "clip_skip of none"} if family == "stable_diffusion" else set()
    if hasattr(pipes[1].text_encoder, "text_model"):
        better = set()
    assert found.keys() == better, found
    assert all(not issubclass(own[0], Exception) and stock[0] is AttributeError for own, stock in found.values())
    refused = MATRIX[family].keys() - set(drawn) - better
    assert refused == REFUSED & MATRIX[family].keys(), refused ^ REFUSED


def lora(pipe, family, seed, rank=2):
    """A LoRA that does something, on every part, as a state dict."""
    generator, found = seeded(seed), {}
    for part, targets in {"unet": ["to_q", "to_v"], **dict.fromkeys(ENCODERS[family], ["q_proj", "fc1"])}.items():
        module = copy.deepcopy(getattr(pipe, part))
        adapter = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
        inject_adapter_in_model(adapter, module)
        for key, tensor in get_peft_model_state_dict(module).items():
            found[f"{part}.{key}"] = torch.randn(tensor.shape, generator=generator) / 2
    return found


@both_families
def test_with_loras_on_every_part(family):
    """Loaded, weighed, scaled, fused and taken off; every part's own changes the image."""
    pipes = pair(family)
    parts = ["unet", *ENCODERS[family]]
    loras = {name: lora(pipes[0], family, seed) for seed, name in enumerate("ab")}
    loras |= {part: {k: v for k, v in loras["a"].items() if k.startswith(f"{part}.")} for part in parts}
    rows = {"prompts and a scale": {"prompt": MORE, "cross_attention_kwargs": {"scale": 0.5}}}
    names = ("several images", "embeddings", "no scale", "clip_skip")
    more = {name: MATRIX[family][name] for name in names if (name, family) != ("clip_skip", "stable_diffusion")}
    before = outcome(pipes[0], dict)[1]
    for method, arguments, keywords, further in (
        *(("load_lora_weights", [loras[name]], {"adapter_name": name}, {}) for name in loras),
        *(("set_adapters", [part], {}, {}) for part in parts),
        ("set_adapters", [["a", "b"]], {"adapter_weights": [0.7, -0.3]}, more),
        ("set_adapters", [["a", "b"]], {"adapter_weights": [dict.fromkeys(parts, 0.2), {"text_encoder": 0.5}]}, {}),
        ("disable_lora", [], {}, {}),
        ("enable_lora", [], {}, {}),
        ("delete_adapters", ["b"], {}, {}),
        ("fuse_lora", [], {"adapter_names": ["a"], "lora_scale": 0.5}, more),
        ("unfuse_lora", [], {}, {}),
        ("fuse_lora", [], {"components": ["text_encoder"]}, {}),
        ("unload_lora_weights", [], {}, {}),
    ):
        for pipe in pipes:
            getattr(pipe, method)(*arguments, **keywords)
        if method == "load_lora_weights":
            continue
        drawn, found = compared(pipes, {**rows, **further})
        assert len(drawn) == len(rows) + len(further) and not found, (method, arguments, found)
        assert pipes[0].get_list_adapters() == pipes[1].get_list_adapters()
        if arguments and arguments[0] in parts:
            assert not torch.equal(outcome(pipes[0], dict)[1], before), arguments
    for components in (["vae"], ["text_encoder_2", "vae"]):
        errors = []
        for pipe in pipes:
            with pytest.raises(ValueError, match="is not found in") as caught:
                pipe.fuse_lora(components=components)
            errors.append(str(caught.value))
        assert errors[0] == errors[1]


def test_the_scale_of_a_lora_reaches_the_text_encoder_of_every_call():
    """Also where layers are skipped, which the stock pipeline cannot do with transformers 5."""
    own, _ = pair("stable_diffusion")
    before = outcome(own, lambda: {"clip_skip": 1})
    own.load_lora_weights({k: v for k, v in lora(own, "stable_diffusion", 0).items() if k.startswith("text_encoder.")})
    assert not same(outcome(own, lambda: {"clip_skip": 1}), before)
    assert same(outcome(own, lambda: {"clip_skip": 1, "cross_attention_kwargs": {"scale": 0.0}}), before)
    assert "text_model" not in vars(own.text_encoder)


def ip_adapter(pipe, tokens=4, seed=7):
    """A small IP-Adapter of the kind with one linear projection."""
    width, generator = pipe.unet.config.cross_attention_dim, seeded(seed)
    weights = {
        "image_proj": {
            "proj.weight": torch.randn(tokens * width, 24, generator=generator),
            "proj.bias": torch.zeros(tokens * width),
            "norm.weight": torch.ones(width),
            "norm.bias": torch.zeros(width),
        },
        "ip_adapter": {},
    }
    place = 1
    for name in pipe.unet.attn_processors:
        if "attn2" in name:
            layer = pipe.unet.get_submodule(name.removesuffix(".processor"))
            for kind in ("k", "v"):
                weights["ip_adapter"][f"{place}.to_{kind}_ip.weight"] = torch.randn(
                    layer.to_k.out_features, width, generator=generator
                )
            place += 2
    return weights


@both_families
def test_with_an_ip_adapter(family):
    torch.manual_seed(4)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8,
        projection_dim=24,
    )  # fmt: skip
    encoder = CLIPVisionModelWithProjection(vision).eval()

    def with_encoder(components):
        components["image_encoder"] = copy.deepcopy(encoder)
        components["feature_extractor"] = CLIPImageProcessor(size=16, crop_size=16)

    pipes = pair(family, with_encoder)
    before = outcome(pipes[0], dict)
    weights = ip_adapter(pipes[0])
    for pipe in pipes:
        pipe.load_ip_adapter(copy.deepcopy(weights), subfolder="", weight_name="")
    image = Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3))
    rows = {
        "image": {"ip_adapter_image": image},
        "image in a list": {"ip_adapter_image": [image], "prompt": MORE, "num_images_per_prompt": 2},
        "embeddings": {"ip_adapter_image_embeds": [noise(1, 1, 24)]},
        "no image": {},
        "too many images": {"ip_adapter_image": [image, image]},
    }
    drawn, found = compared(pipes, rows)
    assert not found and drawn == ["image", "image in a list", "embeddings"], (drawn, found)
    assert not same(outcome(pipes[0], lambda: rows["image"]), before)
    for pipe in pipes:
        pipe.set_ip_adapter_scale(0.3)
    assert not compared(pipes, rows)[1]
    for pipe in pipes:
        pipe.unload_ip_adapter()
    assert same(outcome(pipes[0], dict), before)


def test_with_a_safety_checker():
    """Flags, and black images in place of those that it objects to."""
    part = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(vision_config={**part, "image_size": 16, "patch_size": 8}, text_config=part, projection_dim=8)
    checker = StableDiffusionSafetyChecker(config).eval()

    def with_checker(components):
        components["safety_checker"] = copy.deepcopy(checker)
        components["feature_extractor"] = CLIPImageProcessor(size=16, crop_size=16)

    pipes = pair("stable_diffusion", with_checker)
    rows = {name: EITHER[name] for name in ("nothing else", "prompts", "pil", "np", "latent", "a tuple")}
    for threshold, objects in ((2.0, False), (-2.0, True)):
        for pipe in pipes:
            pipe.safety_checker.concept_embeds_weights.data.fill_(threshold)
        drawn, found = compared(pipes, rows)
        assert len(drawn) == len(rows) and not found, found
        _, images, flags = outcome(pipes[0], lambda: {"prompt": MORE})
        assert flags == [objects, objects] and bool(images.any()) is not objects
    with pytest.raises(ValueError, match="needs a feature extractor"):
        DisBackOneStepPipeline(**{**pipes[0].components, "feature_extractor": None})


class Inverting:
    """In place of the watermark, whose package is not there."""

    def apply_watermark(self, images):
        return -images


def test_with_a_watermark(monkeypatch):
    pipes = pair("stable_diffusion_xl")
    assert all(pipe.watermark is None for pipe in pipes)
    before = outcome(pipes[0], dict)
    for pipe in pipes:
        pipe.watermark = Inverting()
    rows = {name: EITHER[name] for name in ("nothing else", "pil", "latent")}
    assert not compared(pipes, rows)[1] and not same(outcome(pipes[0], dict), before)
    # By default it is there where its package is, as of the stock pipeline.
    module = sys.modules[DisBackOneStepPipeline.__module__]
    monkeypatch.setattr(module, "is_invisible_watermark_available", lambda: True)
    monkeypatch.setattr(module, "StableDiffusionXLWatermarker", Inverting)
    for given, found in ((None, Inverting), (True, Inverting), (False, type(None))):
        made = DisBackOneStepPipeline(**pipes[0].components, add_watermarker=given)
        assert isinstance(made.watermark, found)
    teacher = tiny.pipeline_xl()
    for own, found in ((None, type(None)), (Inverting(), Inverting)):
        teacher.watermark = own
        assert isinstance(to_pipeline(teacher.unet, 399, teacher).watermark, found)
    assert pair("stable_diffusion")[0].watermark is None


@both_families
def test_with_words_of_textual_inversion(family):
    pipes = pair(family)
    for pipe in pipes:
        for name in ENCODERS[family]:
            tokenizer = pipe.tokenizer_2 if name.endswith("_2") else pipe.tokenizer
            pipe.load_textual_inversion(
                {"<new>": noise(3, tiny.WIDTH)}, token="<new>", tokenizer=tokenizer, text_encoder=getattr(pipe, name)
            )
    rows = {"word": {"prompt": "a <new> circle"}, "words": {"prompt": ["a <new> star", ONE]}}
    drawn, found = compared(pipes, rows)
    assert len(drawn) == 2 and not found, found
    assert not same(outcome(pipes[0], lambda: rows["word"]), outcome(pipes[0], lambda: {"prompt": "a circle"}))


@both_families
def test_with_memory_savers_and_in_other_precisions(family):
    pipes = pair(family)
    rows = {name: MATRIX[family][name] for name in ("nothing else", "several images", "embeddings")}
    changes = {
        "slicing": lambda pipe: pipe.vae.enable_slicing(),
        "tiling": lambda pipe: pipe.vae.enable_tiling(),
        "attention slicing": lambda pipe: pipe.enable_attention_slicing(),
        "freeu": lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
        "fused projections": lambda pipe: pipe.fuse_qkv_projections(),
        "bfloat16": lambda pipe: pipe.to(torch.bfloat16),
        "float16": lambda pipe: pipe.to(torch.float16),
        "an autoencoder that is said to overflow": lambda pipe: pipe.vae.register_to_config(force_upcast=True),
        "one that is not": lambda pipe: pipe.vae.register_to_config(force_upcast=False),
        "latents of a mean": lambda pipe: pipe.vae.register_to_config(latents_mean=[0.1] * 4, latents_std=[2.0] * 4),
    }
    for what, change in changes.items():
        for pipe in pipes:
            change(pipe)
        drawn, found = compared(pipes, rows)
        assert drawn == list(rows) and not found, (what, found)


@both_families
def test_parts_of_different_precisions_compute_each_in_its_own(family):
    """The stock pipeline fails there; ours draws what all parts in float32 draw, but for rounding."""
    own, _ = pair(family)
    seen = []

    def callback(pipeline, step, timestep, tensors):
        seen.append((sorted(tensors), tensors["prompt_embeds"].dtype))
        return {}

    arguments = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    expected = outcome(own, lambda: {"latents": noise(1, 4, 8, 8)})[1]
    for parts in (ENCODERS[family], ["vae"], ["unet"], ["unet", "vae"]):
        for part in parts:
            getattr(own, part).to(torch.bfloat16)
        drawn = outcome(own, lambda: {"latents": noise(1, 4, 8, 8), **arguments})
        assert not issubclass(drawn[0], Exception), drawn
        assert (drawn[1].float() - expected).abs().mean() < 0.02, parts
        assert seen[-1] == (["prompt_embeds"], own.unet.dtype), "a callback is given what it asked for"
        own.to(torch.float32)
    own.vae.to(torch.bfloat16)
    assert not same(outcome(own, lambda: {"callback_on_step_end": Halving()}), outcome(own, dict))
    assert outcome(own, lambda: {"output_type": "latent"})[1].dtype == torch.float32


def test_without_text_encoders():
    """As where embeddings are made elsewhere; SDXL needs no tokenizers then, either."""
    for family, none in (("stable_diffusion", ["text_encoder"]), ("stable_diffusion_xl", ["text_encoder",
            "text_encoder_2", "tokenizer", "tokenizer_2"])):  # fmt: skip
        pipes = pair(family, lambda components, none=none: components.update(dict.fromkeys(none)))
        drawn, found = compared(pipes, {"embeddings": MATRIX[family]["embeddings"], "none": {"prompt": ONE}})
        assert drawn == ["embeddings"] and not found, found
