"""Families with prompts, seen from the pipelines of diffusers that it has to agree with."""

import itertools
import json
from dataclasses import replace

import pytest
import tiny
import torch
from diffusers import (
    AutoPipelineForText2Image,
    DiffusionPipeline,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from safetensors.torch import save_file
from script import SHORT, student
from stages import close, equal, images_for, weights
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffusers_disback import DisBackOneStepPipeline
from diffusers_disback.families import FAMILIES, family_of, network_name_of, to_pipeline
from diffusers_disback.families.checks import slope_of_noise
from diffusers_disback.models.generator import OneStepGenerator
from diffusers_disback.models.noise_schedule import NoiseSchedule
from diffusers_disback.objectives import OBJECTIVES


PREDICTIONS = ["epsilon", "v_prediction", "sample"]
# By default one of each family (tests/test_matrix.py has each pair, slow): the full product is slow.
QUICK = [("stable_diffusion", "v_prediction", "dmd"), ("stable_diffusion_xl", "epsilon", "sid")]
PRODUCT = list(itertools.product(tiny.TEXT, PREDICTIONS, OBJECTIVES))
ONE_OF_TEXT = [
    name if place == 0 else pytest.param(name, marks=pytest.mark.slow) for place, name in enumerate(tiny.TEXT)
]
CELLS = [cell if cell in QUICK else pytest.param(*cell, marks=pytest.mark.slow) for cell in PRODUCT]


def test_every_family_has_a_tiny_pipeline():
    assert tiny.PIPELINES.keys() == FAMILIES.keys()
    for name, make in tiny.PIPELINES.items():
        assert type(family_of(make())) is FAMILIES[name]


@pytest.mark.parametrize("name", tiny.TEXT)
def test_the_network_is_asked_as_the_stock_pipeline_asks_it(name):
    """Two prompts, with guidance: one step of the stock pipeline from given noise."""
    pipe = tiny.PIPELINES[name]()
    family = family_of(pipe)
    seen, forward = [], pipe.unet.forward

    def spy(sample, timestep, **arguments):
        seen.append((sample, timestep, arguments))
        return forward(sample, timestep, **arguments)

    pipe.unet.forward = spy
    noise = torch.randn(2, 4, 8, 8)
    pipe(tiny.PROMPTS[:2], latents=noise, num_inference_steps=1, guidance_scale=3.0, output_type="latent")
    ((sample, t, _),) = seen
    pipe.unet.forward = forward
    stock = forward(sample, t, **{**seen[0][2], "return_dict": False})[0]
    condition, negative = family.encode(tiny.PROMPTS[:2]), family.encode(["", ""])
    both = {key: torch.cat([negative[key], condition[key]]) for key in condition}
    own = family.call(family.network, sample, t.expand(4), both)
    assert torch.equal(own, stock)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", tiny.TEXT)
@pytest.mark.parametrize("t", [0, 399, 999])
def test_the_deployed_student_is_the_generator_bit_for_bit(name, prediction, t, tmp_path):
    teacher = tiny.PIPELINES[name](prediction)
    family = family_of(teacher)
    generator = OneStepGenerator(family.score_model(), t)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        x0 = generator(noise, family.encode(tiny.PROMPTS[:2]))
    pipe = to_pipeline(family.network, t, teacher)
    arguments = {"latents": noise, "output_type": "latent"}
    assert torch.equal(pipe(tiny.PROMPTS[:2], **arguments).images, x0)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == family.pipeline_classes[0]
    stock = {"num_inference_steps": 1, "guidance_scale": 0, **arguments}
    for cls in (DiffusionPipeline, AutoPipelineForText2Image):
        assert torch.equal(cls.from_pretrained(tmp_path)(tiny.PROMPTS[:2], **stock).images, x0)
    own = DisBackOneStepPipeline.from_pretrained(tmp_path)
    assert torch.equal(own(tiny.PROMPTS[:2], **arguments).images, x0)
    lcm = DiffusionPipeline.from_pretrained(tmp_path)
    lcm.scheduler = LCMScheduler.from_config(teacher.scheduler.config)
    drawn = lcm(tiny.PROMPTS[:2], timesteps=[t], guidance_scale=0, **arguments).images
    # LCM mixes in its input at low noise (its boundary condition): 0.25 / (t^2 / 0.01 + 0.25).
    assert t == 0 or torch.allclose(drawn, x0, atol=1e-5 * x0.abs().max())


@pytest.mark.parametrize("name", tiny.TEXT)
def test_pictures_are_those_of_the_stock_pipeline(name, tmp_path):
    to_pipeline(tiny.PIPELINES[name]().unet, 399, tiny.PIPELINES[name]()).save_pretrained(tmp_path)
    one = DisBackOneStepPipeline.from_pretrained(tmp_path)
    two = DiffusionPipeline.from_pretrained(tmp_path)
    call = {"num_images_per_prompt": 2, "output_type": "pt"}
    images = one(tiny.PROMPTS[:2], generator=torch.Generator().manual_seed(3), **call).images
    stock = {"num_inference_steps": 1, "guidance_scale": 0, **call}
    assert torch.equal(two(tiny.PROMPTS[:2], generator=torch.Generator().manual_seed(3), **stock).images, images)
    half = DisBackOneStepPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    # Drawn in one precision: older versions of torch draw other noise in another.
    call["latents"] = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    in_half, in_full = (pipe(tiny.PROMPTS[:2], **call).images.float() for pipe in (half, one))
    assert (in_half - in_full).abs().mean() < 0.02


@pytest.mark.parametrize(("name", "prediction", "objective"), CELLS)
def test_every_teacher_is_distilled(run, tmp_path, name, prediction, objective):
    """Both stages by the script, without a flag that names a family; the result loads in its stock pipeline."""
    tiny.PIPELINES[name](prediction).save_pretrained(tmp_path / "teacher")
    images = images_for(objective, tmp_path / "images")
    prompts = {"prompts_file": None} if images else {}
    folder = run(pretrained_model_name_or_path=tmp_path / "teacher", objective=objective, **images, **prompts, **SHORT)
    own, stock = DisBackOneStepPipeline.from_pretrained(folder), DiffusionPipeline.from_pretrained(folder)
    assert type(stock).__name__ in FAMILIES[name].pipeline_classes
    noise = torch.randn(1, 4, 8, 8)
    arguments = {"latents": noise, "output_type": "pt"}
    one = own(tiny.PROMPTS[0], **arguments).images
    assert torch.equal(stock(tiny.PROMPTS[0], num_inference_steps=1, guidance_scale=0, **arguments).images, one)
    snippets = (folder / "README.md").read_text().split("```python")[1:]
    scope = {}
    exec(snippets[2].split("```")[0], scope)
    assert scope["image"].size == (16, 16)


@pytest.mark.parametrize("name", ONE_OF_TEXT)
def test_a_teacher_with_zero_terminal_snr_is_asked_where_there_is_no_signal(run, tmp_path, name):
    teacher = tiny.PIPELINES[name]("v_prediction")
    teacher.scheduler = tiny.scheduler("v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    teacher.save_pretrained(tmp_path / "teacher")
    folder = run(pretrained_model_name_or_path=tmp_path / "teacher", conditioning_timestep=999, **SHORT)
    own, stock = DisBackOneStepPipeline.from_pretrained(folder), DiffusionPipeline.from_pretrained(folder)
    arguments = {"latents": torch.randn(1, 4, 8, 8), "output_type": "pt"}
    one = own(tiny.PROMPTS[0], **arguments).images
    assert torch.equal(stock(tiny.PROMPTS[0], num_inference_steps=1, guidance_scale=0, **arguments).images, one)
    assert own.scheduler.alphas_cumprod[-1] == 0 and one.isfinite().all()
    teacher.scheduler = tiny.scheduler("epsilon", rescale_betas_zero_snr=True)
    teacher.save_pretrained(tmp_path / "epsilon")
    with pytest.raises(ValueError, match="timestep=999 has zero signal"):
        run("b", pretrained_model_name_or_path=tmp_path / "epsilon", conditioning_timestep=999)


@pytest.mark.parametrize("name", ONE_OF_TEXT)
def test_a_student_may_be_smaller_than_its_teacher(run, tmp_path, name):
    tiny.PIPELINES[name]().save_pretrained(tmp_path / "teacher")
    tiny.PIPELINES[name](seed=5, block_out_channels=(4, 8), down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D")).save_pretrained(tmp_path / "smaller")  # fmt: skip
    flags = {
        "pretrained_model_name_or_path": tmp_path / "teacher",
        "generator_model_name_or_path": tmp_path / "smaller",
    }
    folder = run(**flags, **SHORT)
    sizes = [
        sum(tensor.numel() for tensor in UNet2DConditionModel.from_pretrained(place, subfolder="unet").parameters())
        for place in (folder, tmp_path / "smaller", folder / "path" / "degradation-000002", tmp_path / "teacher")
    ]
    assert sizes[0] == sizes[1] < sizes[2] == sizes[3]
    DiffusionPipeline.from_pretrained(folder)(tiny.PROMPTS[0], num_inference_steps=1, guidance_scale=0)


# SDXL ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zeros", [True, False])
def test_the_empty_prompt_of_sdxl_is_zero_where_its_config_says_so(zeros):
    pipe = tiny.pipeline_xl()
    pipe.register_to_config(force_zeros_for_empty_prompt=zeros)
    condition = family_of(pipe).encode(["", "a red circle"])
    for key in ("encoder_hidden_states", "text_embeds"):
        assert (condition[key][0] == 0).all() == zeros and (condition[key][1] != 0).any()


def test_sdxl_is_told_the_resolution():
    family = family_of(tiny.pipeline_xl())
    assert family.encode(["a"])["time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]]
    assert family.encode(["a"], resolution=32)["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]]


def test_sdxl_arguments_are_those_of_the_stock_pipeline(tmp_path):
    to_pipeline(tiny.pipeline_xl().unet, 399, tiny.pipeline_xl()).save_pretrained(tmp_path)
    own, stock = DisBackOneStepPipeline.from_pretrained(tmp_path), StableDiffusionXLPipeline.from_pretrained(tmp_path)
    noise = torch.randn(1, 4, 8, 12)
    for arguments in (
        {"prompt_2": "a blue star"},
        {"clip_skip": 1},
        {"original_size": (64, 32), "crops_coords_top_left": (3, 5), "target_size": (48, 24)},
    ):
        call = {
            "prompt": "a red circle",
            "height": 16,
            "width": 24,
            "latents": noise,
            "output_type": "pt",
            **arguments,
        }
        assert torch.equal(own(**call).images, stock(num_inference_steps=1, guidance_scale=0, **call).images)
    embeds, _, pooled, _ = stock.encode_prompt("a red circle", do_classifier_free_guidance=False)
    given = own(
        prompt_embeds=embeds, pooled_prompt_embeds=pooled, latents=noise, height=16, width=24, output_type="pt"
    )
    plain = own("a red circle", latents=noise, height=16, width=24, output_type="pt")
    assert torch.equal(given.images, plain.images)
    with pytest.raises(ValueError, match="`pooled_prompt_embeds` also have to be passed"):
        own(prompt_embeds=embeds)


def test_an_autoencoder_that_overflows_in_half_precision_computes_in_float32():
    teacher = tiny.pipeline_xl()
    pipe = to_pipeline(teacher.unet, 399, teacher)
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "a red circle", "latents": torch.randn(1, 4, 8, 8), "output_type": "pt"}
    expected = pipe(**call).images
    pipe.vae.half()
    pipe.vae.register_to_config(force_upcast=True)
    assert (pipe(**call).images - expected).abs().max() < 1e-2 and pipe.vae.dtype == torch.float16


# Parts that do not fit ----------------------------------------------------------------------------------------------


def with_parts(pipe, **parts):
    for name, part in parts.items():
        setattr(pipe, name, part)
    return pipe


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: tiny.pipeline(in_channels=9), "UNet takes 9 channels, but its autoencoder makes 4"),
        (lambda: tiny.pipeline(cross_attention_dim=48), "text embeddings of width 48, but its text encoder makes 32"),
        (lambda: with_parts(tiny.pipeline_xl(), unet=tiny.unet()), "width 32, but its text encoders make 64"),
        (
            lambda: with_parts(tiny.pipeline_xl(), unet=tiny.unet(cross_attention_dim=64)),
            "addition_embed_type is None",
        ),
        (lambda: tiny.pipeline_xl(projection_class_embeddings_input_dim=64), "pooled embedding of width 16, but its"),
        (
            lambda: with_parts(tiny.pipeline_xl(), text_encoder_2=tiny.pipeline().text_encoder),
            "second text encoder is a CLIPTextModel, which makes no pooled embedding",
        ),
        (
            lambda: with_parts(tiny.pipeline_xl(), text_encoder_2=None, tokenizer_2=None),
            "without text_encoder_2 and tok",
        ),
        (lambda: with_parts(tiny.pipeline(), vae=None), "is without vae; a whole one is needed"),
    ],
    ids=["inpainting", "text-encoder", "unet-of-sd", "no-pooled", "other-pooled", "unpooled", "one-encoder", "no-vae"],
)
def test_parts_of_different_models_are_told(make, message):
    with pytest.raises(ValueError, match=message):
        family_of(make())


# UNets that ask for more than latents, timestep and the text's condition, of which some would run without a word.
ASKING = [
    ({"time_cond_proj_dim": 8}, "has time_cond_proj_dim=8: it embeds the guidance scale"),
    ({"class_embed_type": "timestep"}, "has class_embed_type='timestep': it is conditioned on classes"),
    ({"num_class_embeds": 10}, "has num_class_embeds=10: it is conditioned on classes"),
    ({"encoder_hid_dim": 32, "encoder_hid_dim_type": "text_proj"}, "has encoder_hid_dim_type='text_proj'"),
    ({"attention_type": "gated"}, "has attention_type='gated': it takes boxes"),
    ({"out_channels": 8}, "takes 4 channels and gives 8 .out_channels"),
]


@pytest.mark.parametrize("name", tiny.TEXT)
def test_a_network_that_asks_for_more_is_refused(name, tmp_path):
    """As a teacher, as a student's start, as a student, and in a plan."""
    from diffusers_disback import BacktrackingConfig, ModelReference, TrainingConfig
    from diffusers_disback.planning.plan import Planner

    plain = tiny.PIPELINES[name]()
    family = family_of(plain)
    for config, message in ASKING:
        pipe = tiny.PIPELINES[name](**config)
        pipe.unet.save_pretrained(tmp_path / "start" / "unet")
        start = ModelReference(str(tmp_path / "start"))
        for call, arguments in (
            (family_of, (pipe,)),
            (to_pipeline, (pipe.unet, 399, plain)),
            (family.initial_generator, (start.resolve_denoiser("unet"),)),
            (
                lambda unet: Planner(lambda: unet, type(family), TrainingConfig(), BacktrackingConfig()).network,
                (pipe.unet,),
            ),
        ):
            with pytest.raises(ValueError, match=message):
                call(*arguments)
    added = {"addition_embed_type": "text", "addition_embed_type_num_heads": 2}
    if name == "stable_diffusion":  # which the text's states feed
        fed = family_of(tiny.pipeline(**added))
        with torch.no_grad():
            fed.score_model().denoise(torch.randn(1, 4, 8, 8), torch.tensor([399]), fed.encode(["a"]))
        other, kind = tiny.pipeline(), "text_time"
        other.unet.register_to_config(addition_embed_type=kind)
    else:
        other, kind = tiny.pipeline_xl(**added), "text"
    with pytest.raises(ValueError, match=f"its addition_embed_type is '{kind}': it is of another family"):
        family_of(other)
    tiny.PIPELINES[name](**added).unet.save_pretrained(tmp_path / "start" / "unet")
    with pytest.raises(ValueError, match="has addition_embed_type text, the teacher has (None|text_time)"):
        family.initial_generator(ModelReference(str(tmp_path / "start")).resolve_denoiser("unet"))


def test_a_start_that_predicts_otherwise_is_refused(run, tmp_path, repo, alice):
    """A folder's and a repository's; one without a scheduler says nothing, and one that agrees is taken."""
    from huggingface_hub import HfApi

    from diffusers_disback import ModelReference

    for prediction in ("epsilon", "v_prediction"):
        tiny.pipeline(prediction, seed=1).save_pretrained(tmp_path / prediction)
    HfApi().create_repo(repo)
    HfApi().upload_folder(repo_id=repo, folder_path=tmp_path / "v_prediction")
    for start in (tmp_path / "v_prediction", repo):
        with pytest.raises(ValueError, match="says that it predicts v_prediction, but the teacher predicts epsilon"):
            run(generator_model_name_or_path=start)
    assert not (tmp_path / "run").exists()
    noise, v = (family_of(tiny.pipeline(prediction)) for prediction in ("epsilon", "v_prediction"))
    v.initial_generator(ModelReference(repo).resolve_denoiser("unet"))
    noise.initial_generator(ModelReference(str(tmp_path / "epsilon")).resolve_denoiser("unet"))
    (tmp_path / "v_prediction" / "scheduler" / "scheduler_config.json").unlink()
    noise.initial_generator(ModelReference(str(tmp_path / "v_prediction")).resolve_denoiser("unet"))


def test_a_teacher_that_does_not_say_its_size_is_asked_for_it():
    family = family_of(tiny.pipeline(sample_size=None))
    with pytest.raises(
        ValueError, match="sample_size None in its config, which is no side of a square: pass --resolution"
    ):
        family.latent_shape()
    assert family.latent_shape(16) == (4, 8, 8)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"latent_channels": 16}, "has latent_channels 16, the teacher's own has 4: it belongs to another family"),
        (
            {"scaling_factor": 0.13025},
            "has scaling_factor 0.13025, the teacher's own has 0.18215: it belongs to another",
        ),
        ({"shift_factor": 0.1}, "has shift_factor 0.1, the teacher's own has None"),
        (
            {
                "down_block_types": ["DownEncoderBlock2D"] * 3,
                "up_block_types": ["UpDecoderBlock2D"] * 3,
                "block_out_channels": [8, 8, 8],
            },
            "makes one latent of 4 x 4 pixels, the teacher's own of 2 x 2",
        ),
    ],
    ids=["channels", "scaling", "shift", "stride"],
)
def test_an_autoencoder_of_another_family_is_told(run, tmp_path, changes, message):
    vae = tiny.pipeline().vae
    config = {key: value for key, value in vae.config.items() if not key.startswith("_")}
    type(vae)(**{**config, **changes}).save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match=message):
        run(pretrained_vae_model_name_or_path=tmp_path / "vae")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name",
    [
        *("StableDiffusion3InpaintPipeline", "FluxPipeline", "HunyuanDiTPipeline", "LattePipeline", "WanPipeline"),
        *(
            "StableVideoDiffusionPipeline",
            "StableDiffusionXLInpaintPipeline",
            "StableDiffusionUpscalePipeline",
            "Mine",
        ),
    ],
)
def test_a_pipeline_of_another_family_is_told_before_its_weights_are_asked_for(repo, hub, tmp_path, name):
    from huggingface_hub import HfApi

    from diffusers_disback import ModelReference, load_family

    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": name, "_diffusers_version": "0.40.0"}))
    HfApi().create_repo(repo)
    HfApi().upload_folder(repo_id=repo, folder_path=tmp_path)
    for where in (str(tmp_path), repo):
        with pytest.raises(ValueError, match=f"is a {name}; supported are stable_diffusion: StableDiff.*XLPipeline"):
            load_family(ModelReference(where))


def test_weights_of_a_variant_alone_are_told(run, tmp_path, repo, hub):
    """A folder's and a repository's, as the teacher and as the student's start."""
    from huggingface_hub import HfApi

    tiny.pipeline().to(dtype=torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    HfApi().create_repo(repo)
    HfApi().upload_folder(repo_id=repo, folder_path=tmp_path / "half")
    for where in (tmp_path / "half", repo):
        for flag in ("pretrained_model_name_or_path", "generator_model_name_or_path"):
            with pytest.raises(
                ValueError, match="There are weights of the variant fp16: pass --variant fp16 if it is the"
            ):
                run(**{flag: where})
    assert not (tmp_path / "run").exists()
    run(pretrained_model_name_or_path=repo, variant="fp16")


# At size, without weights -------------------------------------------------------------------------------------------

# The modules that LCM-LoRA adapts (arXiv 2311.05556): attention, feed-forward, convolutions and time embeddings.
LCM_LORA = [
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
]
SIZES = {
    "SD 1.5": (
        {
            "sample_size": 64,
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
            "block_out_channels": (320, 640, 1280, 1280),
        },
        859_520_964,
        686,
    ),
    "SD 2.1": (
        {
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "block_out_channels": (320, 640, 1280, 1280),
            "use_linear_projection": True,
        },
        865_910_724,
        686,
    ),
    "SDXL": (
        {
            "sample_size": 128,
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        2_567_463_684,
        1_680,
    ),
}


def shapes_of(network) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in network.state_dict().items()}


def full_size(name) -> DiffusionPipeline:
    """A pipeline of full size, all but its autoencoder on the meta device."""
    config, xl = SIZES[name][0], name == "SDXL"
    small = tiny.pipeline_xl() if xl else tiny.pipeline()
    width = 768 if xl else config["cross_attention_dim"]
    with torch.device("meta"):
        text = {**small.text_encoder.config.to_dict(), "num_attention_heads": 4}
        parts = {
            "unet": UNet2DConditionModel(**config),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**{**text, "hidden_size": width})),
        }
        if xl:
            second = CLIPTextConfig(**{**text, "hidden_size": 1280, "projection_dim": 1280})
            parts["text_encoder_2"] = CLIPTextModelWithProjection(second)
    return with_parts(small, **parts)


@pytest.mark.parametrize(
    "name", ["SD 1.5", pytest.param("SD 2.1", marks=pytest.mark.slow), pytest.param("SDXL", marks=pytest.mark.slow)]
)
def test_full_size_networks_have_the_names_and_shapes_of_the_originals(name):
    """The teacher, the student, a node of the path (a copy of the fake score, which is a copy of the teacher), and a
    network that all of LCM-LoRA's modules were adapted and fused in."""
    config, parameters, tensors = SIZES[name]
    with torch.device("meta"):
        network = UNet2DConditionModel(**config)
    assert sum(p.numel() for p in network.parameters()) == parameters
    original = shapes_of(network)
    assert len(original) == tensors
    family = family_of(full_size(name))
    student = to_pipeline(family.initial_generator(), 399, family.pipeline).unet
    node = family.score_model().copy().network
    adapted = family.score_model().copy().network
    adapted.add_adapter(LoraConfig(r=64, lora_alpha=64, target_modules=LCM_LORA))
    assert len(shapes_of(adapted)) > 2 * len(original) - tensors / 2
    adapted.fuse_lora()
    adapted.unload_lora()
    for made in (student, node, adapted):
        assert shapes_of(made) == original
        assert all(parameter.is_meta for parameter in made.parameters())


NARROW = {
    **SIZES["SDXL"][0],
    "sample_size": 8,
    "block_out_channels": (10, 20, 40),
    "norm_num_groups": 5,
    "cross_attention_dim": 2 * tiny.WIDTH,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + tiny.WIDTH,
}


@pytest.mark.slow
def test_a_narrow_sdxl_with_the_true_blocks_goes_every_way(run, tmp_path, capsys):
    """Both stages, from a teacher with a LoRA on all of LCM-LoRA's modules; half precision and a LoRA of the student. All
    that is saved has SDXL's 1,680 names."""
    from safetensors.torch import load_file

    from diffusers_disback import DegradationPath
    from diffusers_disback.commands.cli import main as command

    pipe = with_parts(tiny.pipeline_xl(), unet=UNet2DConditionModel(**NARROW).eval())
    pipe.save_pretrained(tmp_path / "teacher")
    original = shapes_of(pipe.unet)
    with torch.device("meta"):
        assert original.keys() == shapes_of(UNet2DConditionModel(**SIZES["SDXL"][0])).keys() and len(original) == 1680
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=LCM_LORA, init_lora_weights=False))
    pipe.unet.save_lora_adapter(tmp_path / "lora")
    stored = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    save_file({f"unet.{key}": value for key, value in stored.items()}, tmp_path / "lora.safetensors")
    pipe.unet.fuse_lora()
    pipe.unet.unload_lora()
    steps = {"degradation_steps": 2, "num_path_nodes": 1, "max_train_steps": 2, "train_batch_size": 1}
    flags = {"pretrained_model_name_or_path": tmp_path / "teacher", "teacher_lora": tmp_path / "lora.safetensors"}
    folder = run(**flags, **steps)
    assert {key: value.shape for key, value in student(folder).items()} == original
    path, network = DegradationPath.from_pretrained(folder / "path"), UNet2DConditionModel(**NARROW)
    node = path.read(1)
    assert {key: value.shape for key, value in node.items()} == original
    assert path.verify_node(1, path.teacher.resolve_configs(network_name_of).meta_network()) == 1680
    path.load(0, into=network)
    assert close(weights(network), weights(pipe.unet), atol=1e-6), "node 0 is the fused teacher"
    assert not close(node, weights(network), atol=1e-6) and not close(student(folder), weights(network), atol=1e-6)
    assert command(["half", str(folder)]) == 0
    assert (
        command(
            [
                "extract-lora",
                str(folder),
                str(tmp_path / "out"),
                "--pretrained_model_name_or_path",
                str(tmp_path / "teacher"),
                "--rank",
                "2",
            ]
        )
        == 0
    )
    assert "rank 2: leaves" in capsys.readouterr().out
    call = {"num_inference_steps": 1, "guidance_scale": 0, "output_type": "latent"}
    call["latents"] = torch.randn(1, 4, 8, 8)
    whole = StableDiffusionXLPipeline.from_pretrained(folder)
    half = StableDiffusionXLPipeline.from_pretrained(folder, variant="fp16")
    assert close(weights(half.unet), weights(whole.unet), atol=1e-2) and shapes_of(half.unet) == original
    one = DisBackOneStepPipeline.from_pretrained(folder)(
        tiny.PROMPTS[0], output_type="latent", latents=call["latents"]
    )
    assert torch.equal(whole(tiny.PROMPTS[0], **call).images, one.images)
    for file in ("pytorch_lora_weights.safetensors", "kohya.safetensors"):
        stock = StableDiffusionXLPipeline.from_pretrained(tmp_path / "teacher")
        stock.load_lora_weights(tmp_path / "out", weight_name=file)
        stock.fuse_lora()
        stock.unload_lora_weights()
        assert shapes_of(stock.unet) == original


# What a teacher's files say, and what is said otherwise ---------------------------------------------------------------


def test_a_wrong_prediction_type_can_be_overridden(run, tmp_path, repo, hub):
    """A v-prediction teacher whose config says epsilon is distilled as the one whose config is right."""
    tiny.pipeline("v_prediction").save_pretrained(tmp_path / "right")
    tiny.pipeline("epsilon").save_pretrained(tmp_path / "wrong")
    right = run("a", pretrained_model_name_or_path=tmp_path / "right", **SHORT)
    flags = {"prediction_type": "v_prediction", "push_to_hub": True, "hub_model_id": repo}
    wrong = run("b", pretrained_model_name_or_path=tmp_path / "wrong", **flags, **SHORT)
    assert equal(student(wrong), student(right))
    plain = run("c", pretrained_model_name_or_path=tmp_path / "wrong", **SHORT)
    assert not equal(student(plain), student(right))
    node = json.loads(hub.files(repo, "degradation-000002")["scheduler/scheduler_config.json"])
    assert node["prediction_type"] == "v_prediction", "the degraded teacher draws as it was asked"
    manifest = json.loads((wrong / "path" / "path.json").read_text())
    assert manifest["teacher"]["prediction_type"] == "v_prediction"


@pytest.fixture
def without_a_word(tmp_path):
    """A teacher with zero terminal SNR that predicts v, and one whose config says neither, in SD 1.5's PNDM."""
    right, wrong = tiny.pipeline("v_prediction"), tiny.pipeline("epsilon")
    right.scheduler = tiny.scheduler("v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing")
    right.save_pretrained(tmp_path / "right")
    wrong.scheduler = PNDMScheduler.from_config(wrong.scheduler.config)
    wrong.save_pretrained(tmp_path / "wrong")
    return tmp_path / "right", tmp_path / "wrong"


@pytest.mark.parametrize("name", tiny.PIPELINES)
def test_a_timestep_outside_the_schedule_is_refused_with_the_familys_own(name):
    family = family_of(tiny.PIPELINES[name]())
    last, own = family.schedule.num_timesteps - 1, family.default_timestep()
    told = (
        rf"--t={last + 1} is outside the teacher's schedule \(0\.\.{last}\); the default for this teacher is {own}\."
    )
    with pytest.raises(ValueError, match=told):
        family.check_timestep(last + 1, "--t")
    family.check_timestep(own)


def test_zero_terminal_snr_can_be_said(without_a_word, tmp_path):
    """In training, in what nodes and the student are drawn with, and in the path, which is of this flag alone."""
    from diffusers_disback import DegradationPath, ModelReference, TrainingConfig, load_family

    right, wrong = without_a_word
    flags = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    teacher = TrainingConfig(pretrained_model_name_or_path=str(wrong), **flags).teacher
    own, expected = load_family(teacher), load_family(ModelReference(str(right)))
    assert torch.equal(own.schedule.alpha, expected.schedule.alpha) and own.schedule.alpha[-1] == 0
    assert own.schedule.prediction_type == "v_prediction"
    own.schedule.check_timestep(999)
    node = json.loads(teacher.resolve(network_name_of).component_files("float32")["scheduler/scheduler_config.json"])
    assert node["rescale_betas_zero_snr"] and node["timestep_spacing"] == "trailing" and not node["clip_sample"]
    assert node["_class_name"] == "DDIMScheduler" and node["prediction_type"] == "v_prediction"
    student = to_pipeline(own.network, 999, own.pipeline).scheduler
    assert student.alphas_cumprod[-1] == 0 and student.config.prediction_type == "v_prediction"
    path = DegradationPath.create(tmp_path / "path", teacher.resolve(network_name_of), "0" * 64, tiny.START, {})
    path.begin()
    assert path.manifest["teacher"]["rescale_betas_zero_snr"] is True
    assert DegradationPath.from_pretrained(tmp_path / "path").teacher == teacher
    for changes, message in [
        ({"rescale_betas_zero_snr": False}, "with --rescale_betas_zero_snr True, but is to be replayed without"),
        ({"prediction_type": None}, "with --prediction_type v_prediction, but is to be replayed without"),
    ]:
        other = DegradationPath.from_pretrained(tmp_path / "path", teacher=replace(teacher, **changes))
        with pytest.raises(ValueError, match=message):
            other.check("0" * 64, tiny.START, "unet")
    DegradationPath.from_pretrained(tmp_path / "path", teacher=teacher).check("0" * 64, tiny.START, "unet")


@pytest.mark.slow
def test_a_teacher_that_is_said_to_have_zero_terminal_snr_is_distilled_as_it_is(without_a_word, run):
    right, wrong = without_a_word
    flags = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    expected = student(run("a", pretrained_model_name_or_path=right, conditioning_timestep=999))
    folder = run("b", pretrained_model_name_or_path=wrong, conditioning_timestep=999, **flags)
    assert equal(student(folder), expected)
    assert DisBackOneStepPipeline.from_pretrained(folder).scheduler.alphas_cumprod[-1] == 0


def test_a_config_that_contradicts_the_network_is_told(run, capsys, tmp_path):
    from train_disback import SHAPES

    from diffusers_disback import ModelReference, load_family

    shapes = ModelReference(str(SHAPES / "teacher"))  # which predicts the noise
    assert load_family(shapes).check_schedule() is None
    for other in ("v_prediction", "sample"):
        doubt = load_family(replace(shapes, prediction_type=other)).check_schedule()
        assert f"says prediction_type={other!r}" in doubt and "try --prediction_type epsilon" in doubt
    doubt = family_of(tiny.pipeline("epsilon")).check_schedule()  # random weights predict nothing
    assert "is not the noise" in doubt and "try --prediction_type v_prediction or sample" in doubt


class Converted(torch.nn.Module):
    """A network that predicts otherwise, made of one that predicts the noise."""

    def __init__(self, network, schedule, prediction_type):
        super().__init__()
        self.network, self.schedule, self.config = network, schedule, network.config
        self.target = NoiseSchedule(schedule.alpha, schedule.sigma, prediction_type)

    def forward(self, x_t, timestep, **arguments):
        noise = self.network(x_t, timestep=timestep, **arguments)[0]
        return (self.target.regression_target(self.schedule.x0_of_output(noise, x_t, timestep), noise, timestep),)


LINEAR = {"beta_schedule": "linear"}
# Of docs/teachers.md: betas, and the slopes of the shapes teacher and of the same as networks that predict v and x0.
BETAS = {
    "own": ({}, (1.02, 1.02, 1.02)),
    "zero-snr": ({"rescale_betas_zero_snr": True}, (1.00, 1.01, 1.03)),
    "linear": (LINEAR, (0.93, 0.94, 1.05)),
    "linear-wide": ({**LINEAR, "beta_start": 1e-4, "beta_end": 0.02}, (0.88, 0.90, 1.06)),
    "scaled-wide": ({"beta_start": 1e-4, "beta_end": 0.02}, (1.15, 1.14, 0.98)),
    "scaled-high": ({"beta_start": 1.5e-3, "beta_end": 0.0195}, (0.89, 0.90, 1.05)),
    "linear-high": ({**LINEAR, "beta_start": 1.5e-3, "beta_end": 0.0195}, (0.82, 0.85, 1.06)),
    "cosine": ({"beta_schedule": "squaredcos_cap_v2"}, (1.14, 1.10, 0.96)),
    "v-as-x0": (None, (None, 0.86, None)),
    "x0-as-v": (None, (None, None, 1.28)),
}


QUICK = ("own", "linear-wide", "cosine", "v-as-x0")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in BETAS]
)
def test_betas_that_the_network_was_not_trained_with_are_told(name):
    """The shapes teacher under other schedules than its own."""
    from train_disback import SHAPES

    from diffusers_disback import ModelReference, load_family

    changes, slopes = BETAS[name]
    pipe = load_family(ModelReference(str(SHAPES / "teacher"))).pipeline
    network, config = pipe.unet, pipe.scheduler.config
    own = NoiseSchedule.from_scheduler(pipe.scheduler)
    for prediction, slope in zip(PREDICTIONS, slopes, strict=True):
        if slope is None:
            continue
        pipe.register_modules(unet=Converted(network, own, prediction))
        declared = (
            prediction if changes is not None else {"v_prediction": "sample", "sample": "v_prediction"}[prediction]
        )
        pipe.scheduler = type(pipe.scheduler).from_config(config, prediction_type=declared, **(changes or {}))
        family, state = family_of(pipe), torch.get_rng_state()
        doubt = family.check_schedule()
        assert torch.equal(torch.get_rng_state(), state)
        with torch.no_grad():
            measured = slope_of_noise(family, family.score_model(), torch.device("cpu"), family.encode([""]))
        assert measured == pytest.approx(slope, abs=0.011), prediction
        if abs(slope - 1) < 0.08:
            assert doubt is None
        else:
            word = "less" if slope > 1 else "more"
            assert f"for {word} noisy than they are (by a factor of {measured:.2f}): its betas, or its pred" in doubt


def test_another_autoencoder(run, tmp_path, repo, hub):
    torch.manual_seed(77)
    other = tiny.pipeline(seed=77).vae
    other.save_pretrained(tmp_path / "alone")
    tiny.pipeline(seed=77).save_pretrained(tmp_path / "inside")
    folders = [
        run(
            f"run-{name}",
            pretrained_vae_model_name_or_path=tmp_path / name,
            push_to_hub=True,
            hub_model_id=f"{repo}-{name}",
            **SHORT,
        )
        for name in ("alone", "inside")
    ]
    for folder, name in zip(folders, ("alone", "inside"), strict=True):
        weights = DiffusionPipeline.from_pretrained(folder).vae.state_dict()
        assert equal(weights, other.state_dict())
        node = DiffusionPipeline.from_pretrained(f"{repo}-{name}", revision="degradation-000002")
        assert equal(node.vae.state_dict(), other.state_dict())
    with pytest.raises(ValueError, match="holds no autoencoder: it has no config.json"):
        run("c", pretrained_vae_model_name_or_path=tmp_path)
    with pytest.raises(ValueError, match="is a UNet2DConditionModel; an AutoencoderKL is needed"):
        run("c", pretrained_vae_model_name_or_path=tmp_path / "inside" / "unet")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stable_diffusion", "stable_diffusion_xl"])
def test_a_lora_is_fused_into_the_teacher(run, tmp_path, name):
    """The run is that of a teacher that was saved with the LoRA fused by diffusers."""
    from test_export import changed

    from diffusers_disback import DegradationPath
    from diffusers_disback.hub.publish.export import extract_lora, save_lora

    plain = tiny.PIPELINES[name]()
    plain.save_pretrained(tmp_path / "plain")
    save_lora(extract_lora(changed(plain.unet, rank=2), plain.unet, 2)[0], 2, tmp_path / "lora", plain.unet)
    plain.load_lora_weights(tmp_path / "lora", weight_name="pytorch_lora_weights.safetensors")
    plain.fuse_lora()
    plain.unload_lora_weights()
    plain.save_pretrained(tmp_path / "fused")
    expected = student(run("a", pretrained_model_name_or_path=tmp_path / "fused"))
    common = {"pretrained_model_name_or_path": tmp_path / "plain"}
    folder = run("b", **common, teacher_lora=tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert close(student(folder), expected, atol=1e-5)
    assert close(
        student(run("c", **common, teacher_lora=tmp_path / "lora" / "kohya.safetensors")), expected, atol=1e-5
    )
    assert not close(student(run("d", **common)), expected, atol=1e-3)
    network = tiny.PIPELINES[name](seed=3).unet
    DegradationPath.from_pretrained(folder / "path").load(0, into=network)
    assert close(weights(network), weights(plain.unet), atol=1e-6), "node 0 is the fused teacher"


def test_loras_that_cannot_be_fused(run, tmp_path):
    from safetensors.torch import load_file
    from test_export import changed

    from diffusers_disback.hub.publish.export import extract_lora, save_lora

    plain = tiny.pipeline()
    file = save_lora(extract_lora(changed(plain.unet, rank=2), plain.unet, 2)[0], 2, tmp_path / "lora", plain.unet)[0]
    stored = load_file(file)
    save_file({**stored, "text_encoder.x.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "text.safetensors")
    save_file(
        {key.replace("mid_block", "middle"): value for key, value in stored.items()}, tmp_path / "keys.safetensors"
    )
    wide = tiny.pipeline(block_out_channels=(8, 24))
    save_lora(extract_lora(changed(wide.unet, rank=2), wide.unet, 2)[0], 2, tmp_path / "wide", wide.unet)
    for lora, message in [
        (tmp_path / "text.safetensors", "adapts more than the UNet .text_encoder.x"),
        (tmp_path / "keys.safetensors", "belongs to another model: unet.middle"),
        (tmp_path / "wide" / "pytorch_lora_weights.safetensors", "belongs to another model"),
        (tmp_path / "nothing.safetensors", "cannot be read"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(teacher_lora=lora)
    assert not (tmp_path / "run").exists()
