"""Text-to-image transformers of flow matching, from the stock pipelines that they have to agree with to a pushed path."""

import json
import subprocess
import sys

import pytest
import tiny
import torch
from diffusers import (
    AutoPipelineForText2Image,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    PixArtSigmaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
)
from safetensors.torch import load_file, save_file
from script import SHORT, arguments, in_two_processes
from stages import equal, weights

import diffusers_disback
from diffusers_disback import (
    BacktrackingConfig,
    ConditionCache,
    DegradationPath,
    ModelReference,
    OneStepGenerator,
    PromptConditions,
    TrainingConfig,
    load_family,
)
from diffusers_disback.commands.cli import main as command
from diffusers_disback.data.truncation import truncation
from diffusers_disback.families import FAMILIES, family_of
from diffusers_disback.models.adapters import SharedNetwork, lora_config
from diffusers_disback.models.discriminator import bottleneck_features
from diffusers_disback.planning.allocations import Allocations, checkpointed, pass_memory
from diffusers_disback.planning.plan import Planner, example_inputs


# Teachers: a family, and what its tiny pipeline is made with.
CASES = {
    "stable_diffusion_3": {},
    "stable_diffusion_3 without T5": {"t5": False},
    "stable_diffusion_3 shifted by size": {"flow": {"use_dynamic_shifting": True}},
    "stable_diffusion_3 of an odd shift": {"flow": {"shift": 1.73}},
    "sana": {},
    "sana with Euler's steps": {"flow": FlowMatchEulerDiscreteScheduler(shift=3.0)},
    "sana with scaled times": {"flow": FlowMatchEulerDiscreteScheduler(), "timestep_scale": 0.001},
}
every_case = pytest.mark.parametrize("name", CASES)
every_family = pytest.mark.parametrize("name", tiny.FLOW)
ONE_STEP = {"num_inference_steps": 1, "guidance_scale": 0}
SIDE = {"stable_diffusion_3": 16, "sana": 32}  # of images, in pixels


def teacher_of(name, **changes):
    return tiny.FLOW[name.split()[0]](**CASES[name], **changes)


def own_class(family):
    return getattr(diffusers_disback, family.usage.own_pipeline)


def loading(name):
    """Without which the stock pipeline does not load what lacks a component."""
    return {"text_encoder_3": None, "tokenizer_3": None} if name.endswith("without T5") else {}


def noise_of(family, number=2, seed=3):
    return torch.randn(number, *family.latent_shape(), generator=torch.Generator().manual_seed(seed))


def call_of(family):
    """The arguments of the stock pipeline's call, so that it draws at the tiny size."""
    side = family.resolution()
    given = {name: value for name, value in family.call_settings.items() if name != "negative_prompt"}
    return {"height": side, "width": side, **given}


@every_case
def test_the_network_is_asked_as_the_stock_pipeline_asks_it(name):
    """Two prompts, with guidance: the first step of three of the stock pipeline from given noise, bit for bit."""
    pipe = teacher_of(name)
    family = family_of(pipe)
    seen, forward = [], pipe.transformer.forward

    def spy(hidden_states, **given):
        seen.append((hidden_states, given))
        return forward(hidden_states, **given)

    pipe.transformer.forward = lambda hidden_states=None, **given: spy(hidden_states, **given)
    call = {**call_of(family), "latents": noise_of(family), "num_inference_steps": 3, "output_type": "latent"}
    pipe(tiny.PROMPTS[:2], guidance_scale=3.0, **call)
    pipe.transformer.forward = forward
    sample, given = seen[0]
    with torch.no_grad():
        stock = forward(sample, **given)[0]
        condition, negative = family.encode(tiny.PROMPTS[:2]), family.encode(["", ""])
        both = {key: torch.cat([negative[key], condition[key]]) for key in condition}
        own = family.call(family.network, sample, given["timestep"], both)
        asked = family.score_model().predict(sample, torch.full((4,), 999), both)
    assert all(torch.equal(given[key], both[key]) for key in both)
    assert torch.equal(own, stock)
    if isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
        assert torch.equal(asked, stock), "its first time is the schedule's last"
    # The schedule holds these times, but for the step between two of a thousand, or to a whole one of a thousand.
    times = family.schedule.time_of(torch.arange(1000))
    for _, given in seen:
        assert (times - given["timestep"][0]).abs().min() <= times[-1] / 1000


@every_case
def test_the_deployed_student_is_the_generator_bit_for_bit(name, tmp_path):
    teacher = teacher_of(name)
    family = family_of(teacher)
    noise = noise_of(family)
    with torch.no_grad():
        x0 = OneStepGenerator(family.score_model(), 999)(noise, family.encode(tiny.PROMPTS[:2]))
    pipe = family.one_step(family.network, 999)
    pipe.set_progress_bar_config(disable=True)
    given = {**call_of(family), "latents": noise, "output_type": "latent"}
    assert torch.equal(pipe(tiny.PROMPTS[:2], **given).images, x0)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == family.pipeline_classes[0] and (tmp_path / "pipeline.py").is_file()
    for kind in (DiffusionPipeline, AutoPipelineForText2Image):
        stock = kind.from_pretrained(tmp_path, **loading(name))
        assert type(stock) is type(teacher)
        assert torch.equal(stock(tiny.PROMPTS[:2], **ONE_STEP, **given).images, x0)
    own = own_class(family).from_pretrained(tmp_path)
    call = {"latents": noise, "output_type": "pt"}
    images = own(tiny.PROMPTS[:2], **call).images
    assert torch.equal(stock(tiny.PROMPTS[:2], **ONE_STEP, **call_of(family), **call).images, images)
    student = family_of(stock)  # which takes gradients from its weights: torch's convolutions then round otherwise
    images = stock(tiny.PROMPTS[:2], **ONE_STEP, **call_of(family), **call).images
    assert torch.equal(student.sample(stock, student.arguments(tiny.PROMPTS[:2]), noise), images)
    assert torch.allclose(student.schedule.sigma, family.schedule.sigma), "a student is a teacher, too"


@every_family
def test_the_one_step_pipeline_refuses_what_a_student_cannot_do(name, caplog, monkeypatch):
    import logging

    monkeypatch.setattr(logging.getLogger("diffusers_disback"), "propagate", True)
    family = family_of(tiny.FLOW[name]())
    pipe = family.one_step(family.network, 999)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is own_class(family) and pipe.conditioning_timestep == 999
    for given, message in (
        ({"num_inference_steps": 2}, "num_inference_steps=2: a one-step student makes an image in one step"),
        ({"guidance_scale": 4.5}, "guidance_scale=4.5: the student has the teacher's guidance built in"),
        ({"sigmas": [0.5]}, "`sigmas`: a one-step student has one noise level"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe("a", **given)
    with pytest.raises(TypeError, match="nothing"):
        pipe("a", nothing=1)
    half = pipe(tiny.PROMPTS[0], latents=noise_of(family, 1), output_type="latent").images
    pipe.transformer.to(torch.bfloat16)
    mixed = pipe(tiny.PROMPTS[0], latents=noise_of(family, 1), output_type="latent").images
    assert (mixed.float() - half).abs().mean() < 0.05
    for timestep in (0, 399, 1000):
        with pytest.raises(ValueError, match="begins at pure noise; pass 999"):
            family.one_step(family.network, timestep)


@every_family
def test_a_schedule_of_another_length_ends_at_its_own_last_timestep(name):
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=500)
    family = family_of(tiny.FLOW[name](flow=scheduler if name == "sana" else dict(scheduler.config)))
    assert family.default_timestep() == 499
    given, noise = family.encode(tiny.PROMPTS[:2]), noise_of(family)
    with torch.no_grad():
        x0 = OneStepGenerator(family.score_model(), 499)(noise, given)
    pipe = family.one_step(family.network, 499)
    drawn = pipe(tiny.PROMPTS[:2], **call_of(family), latents=noise, output_type="latent").images
    assert torch.equal(drawn, x0)


@every_family
def test_several_images_of_several_prompts_are_those_of_single_calls(name):
    """Prompts of different lengths, each with its own mask."""
    family = family_of(tiny.FLOW[name]())
    pipe = family.one_step(family.network, 999)
    prompts, noise = ["a red circle on a navy background", "a star"], noise_of(family, 4)
    call = {**call_of(family), "output_type": "latent"}
    many = pipe(prompts, num_images_per_prompt=2, latents=noise, **call).images
    for index in range(4):
        (one,) = pipe(prompts[index // 2], latents=noise[index : index + 1], **call).images
        assert torch.allclose(many[index], one, atol=1e-5), index


@every_family
def test_a_teacher_is_sampled_as_its_stock_pipeline_samples_it(name):
    pipe = tiny.FLOW[name]()
    family = family_of(pipe)
    noise = noise_of(family)
    call = {**call_of(family), "latents": noise, "num_inference_steps": 3, "output_type": "pt"}
    for guidance in (1.0, 3.0):
        stock = pipe(tiny.PROMPTS[:2], guidance_scale=guidance, **call).images
        own = family.sample(family.sampler(), family.arguments(tiny.PROMPTS[:2]), noise, 3, guidance)
        assert torch.equal(own, stock)


@every_family
def test_images_are_encoded_as_the_stock_pipeline_decodes_them(name):
    family = family_of(tiny.FLOW[name]())
    shown = torch.rand(2, 3, SIDE[name], SIDE[name]) * 2 - 1
    latents, vae = family.encode_images(shown), family.pipeline.vae
    assert latents.shape == (2, *family.latent_shape())
    shift = vae.config.get("shift_factor") or 0.0
    with torch.no_grad():
        encoded = vae.encode(shown)
        plain = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
    assert torch.allclose(latents / vae.config.scaling_factor + shift, plain, atol=1e-5)


@every_family
def test_a_discriminator_looks_at_the_images_tokens_in_the_middle_block(name):
    family = family_of(tiny.FLOW[name]())
    inputs = noise_of(family), torch.tensor([3, 700]), family.encode(tiny.PROMPTS[:2])
    with torch.no_grad():
        features = bottleneck_features(family.score_model(), family.bottleneck(family.network), *inputs)
    config = family.network.config
    tokens = (config.sample_size // config.patch_size) ** 2
    assert features.shape == (2, tokens, config.num_attention_heads * config.attention_head_dim)


@every_family
def test_a_default_condition_of_the_planner_has_the_shapes_of_a_real_one(name):
    """But for the number of tokens, which the tiny tokenizers make fewer."""
    family = family_of(tiny.FLOW[name]())
    made, real = family.example_condition(family.network.config, 2), family.encode(tiny.PROMPTS[:2])
    assert made.keys() == real.keys()
    for key in real:
        assert made[key].dtype == real[key].dtype and made[key].ndim == real[key].ndim
        assert made[key].ndim == 2 or made[key].shape[-1] == real[key].shape[-1]


@every_family
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("checkpoints", [False, True])
def test_activations_are_what_a_pass_allocates(name, adapted, checkpoints):
    """On the meta device as on a CPU: the peak of a real forward and backward pass, followed operation by operation."""
    family = family_of(tiny.FLOW[name]())
    real, condition = family.network.requires_grad_(True), family.encode(tiny.PROMPTS[:2])
    with torch.device("meta"):
        meta = type(real).from_config(real.config).requires_grad_(True)
    for network in (real, meta):
        if adapted:
            shared = SharedNetwork(network)
            with torch.device(next(network.parameters()).device):
                shared.add("generator", lora_config(2, None, family.lora_target_modules))
            shared.activate("generator")
        if checkpoints:
            network.enable_gradient_checkpointing(None if network is real else checkpointed(None))
    x_t, t = noise_of(family), torch.tensor([1, 2])
    with Allocations([*real.parameters(), x_t, t, *condition.values()]) as allocations:
        family.call(real, x_t, t, condition).square().mean().backward()

    def inputs():
        side = family.network.config.sample_size
        made_x_t, made_t, _ = example_inputs(type(family), meta.config, 2, side, torch.float32)
        return made_x_t, made_t, {key: value.to("meta") for key, value in condition.items()}

    planned = pass_memory(meta, family.call, inputs)
    held = sum(value.numel() * value.element_size() for value in (x_t, t, *condition.values()))
    # Of a tiny block that is run again, what CPU kernels allocate for themselves is a fifth.
    assert planned.peak - held == pytest.approx(allocations.peak, rel=0.25 if adapted and checkpoints else 0.1)


@every_case
def test_conditions_are_kept_on_disk_and_encoders_leave_memory(name, tmp_path):
    family = family_of(teacher_of(name))
    expected, given = family.encode([tiny.PROMPTS[2], ""]), family.arguments(tiny.PROMPTS[:1])
    cache = ConditionCache(tmp_path, tiny.PROMPTS, family.encode, family.encoder_id)
    cache.build(show_progress=False)
    source = PromptConditions(tiny.PROMPTS, family.encode, cache=cache)
    family.release_encoders()
    assert not family.text_encoders and source.is_encoded
    found = source.condition([2, 0], [False, True])
    for key, values in found.items():
        assert values.dtype == expected[key].dtype
        assert torch.allclose(values.float(), expected[key].float(), rtol=1e-3, atol=1e-3), key
    images = family.sample(family.one_step(family.network, 999), given, noise_of(family, 1))
    assert images.shape[-1] == SIDE[name.split()[0]]


@pytest.mark.parametrize("make", [tiny.pipeline, tiny.pipeline_xl, tiny.pipeline_3, tiny.sana, tiny.pixart])
def test_text_encoders_may_be_in_half_precision(make, tmp_path):
    """Nothing else is, and what they encode is float32: nearly the embeddings of float32."""
    make().save_pretrained(tmp_path)
    whole, half = load_family(str(tmp_path)), load_family(str(tmp_path), text_encoder_dtype=torch.bfloat16)
    assert all(encoder.dtype == torch.bfloat16 for encoder in half.text_encoders)
    assert half.network.dtype == half.pipeline.vae.dtype == torch.float32
    assert half.encoder_id() != whole.encoder_id(), "or conditions of another precision were taken from the disk"
    for name in ("encode", "arguments"):
        expected, found = getattr(whole, name)(["a star", ""]), getattr(half, name)(["a star", ""])
        for key, value in expected.items():
            assert found[key].dtype == value.dtype
            assert torch.allclose(found[key].float(), value.float(), atol=0.1), key
    given = half.arguments(["a star"])
    images = half.sample(half.sampler(), given, noise_of(half, 1), num_inference_steps=2, guidance_scale=2)
    assert images.isfinite().all()


@pytest.mark.parametrize(
    ("make", "lengths"),
    [
        (tiny.pipeline_3, [16, 16, 256]),
        (lambda: tiny.pipeline_3(t5=False), [16, 16]),
        (tiny.sana, [299]),
        (tiny.pixart, [120]),
        (lambda: tiny.pixart(kind=PixArtSigmaPipeline), [300]),
        (tiny.pipeline_xl, [16, 16]),
    ],
)
def test_prompts_are_as_long_as_the_stock_call_reads(make, lengths):
    pipe = make()
    for one in pipe.components.values():
        if hasattr(one, "model_max_length") and type(pipe).__name__ != "StableDiffusionXLPipeline":
            one.model_max_length = 10**30  # as of Gemma's
    if type(pipe).__name__ == "StableDiffusion3Pipeline":
        pipe.tokenizer.model_max_length = pipe.tokenizer_2.model_max_length = 16
    tokenizers = family_of(pipe).tokenizers
    assert [one.model_max_length for one in tokenizers] == lengths
    told = truncation(tokenizers, ["a red circle", "a red circle " * 150])
    assert told == f"1 of 2 prompts is longer than the text encoder's {min(lengths)} tokens: the rest is cut off."


# Parts that do not fit ----------------------------------------------------------------------------------------------


def with_parts(pipe, **parts):
    for name, part in parts.items():
        setattr(pipe, name, part)
    return pipe


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny.pipeline_3(in_channels=8, out_channels=8), "takes 8 channels, but its autoencoder makes 4"),
        (lambda: tiny.pipeline_3(out_channels=8), "takes 4 channels and gives 8"),
        (lambda: tiny.pipeline_3(joint_attention_dim=128), "of width 128, but its text encoders make 64 and 96"),
        (lambda: tiny.pipeline_3(t5=False, joint_attention_dim=48), "of width 48, but its text encoders make 64:"),
        (
            lambda: tiny.pipeline_3(pooled_projection_dim=32),
            "pooled embedding of width 32, but its text encoders make 64",
        ),
        (
            lambda: with_parts(tiny.pipeline_3(), text_encoder=tiny.pipeline().text_encoder),
            "A text encoder of the teacher is a CLIPTextModel, which makes no pooled embedding",
        ),
        (lambda: with_parts(tiny.pipeline_3(), tokenizer_3=None), "has a text_encoder_3, but no tokenizer_3"),
        (lambda: with_parts(tiny.pipeline_3(), text_encoder_2=None), "is without text_encoder_2; a whole one"),
        (
            lambda: with_parts(tiny.pipeline_3(), scheduler=tiny.scheduler()),
            "DDPMScheduler has use_flow_sigmas=None and prediction_type='epsilon': it is none of flow matching",
        ),
    ],
)
def test_parts_of_different_models_are_told(make, message):
    with pytest.raises(ValueError, match=message):
        family_of(make())


def test_sizes_that_stable_diffusion_3_has_no_positions_for_are_refused():
    family = family_of(tiny.pipeline_3())
    assert family.resolution() == 16 and family.latent_shape(48) == (4, 24, 24)
    for side in (18, 52):
        with pytest.raises(
            ValueError, match=f"--resolution {side}: this transformer has patches of 4 x 4 pixels, and pos"
        ):
            family.resolution(side)


def test_noise_levels_of_a_size_follow_the_stock_pipeline(tmp_path):
    """mu grows linearly with the number of patches: exp(mu) is the shift."""
    family = family_of(tiny.pipeline_3(flow={"use_dynamic_shifting": True}))
    for resolution, patches in ((None, 16), (48, 144)):
        family.at_resolution(resolution)
        mu = 0.5 + (1.15 - 0.5) * (patches - 256) / (4096 - 256)
        s = torch.tensor(mu).exp()
        assert family.schedule.sigma[499] == pytest.approx((s * 0.5 / (1 + (s - 1) * 0.5)).item(), abs=1e-6)


def test_without_t5_there_are_zeros_in_its_place():
    with_, without = (family_of(tiny.pipeline_3(t5=t5)).encode(tiny.PROMPTS[:1]) for t5 in (True, False))
    states, zeros = (condition["encoder_hidden_states"] for condition in (with_, without))
    assert states.shape[-1] == zeros.shape[-1] and torch.equal(states[:, :16], zeros[:, :16])
    assert (zeros[:, 16:] == 0).all() and (states[:, 16:] != 0).any()
    ids = [family_of(tiny.pipeline_3(t5=t5)).encoder_id() for t5 in (True, False)]
    assert ids[0] != ids[1] and len({len(family_of(tiny.pipeline_3(t5=t5)).tokenizers) for t5 in (True, False)}) == 2


def test_sana_encodes_what_the_stock_call_encodes_and_the_empty_prompt_without_instruction():
    pipe = tiny.sana()
    family, seen = family_of(pipe), []
    forward = pipe.transformer.forward

    def spy(sample, **given):
        seen.append(given)
        return forward(sample, **given)

    pipe.transformer.forward = spy
    call = {**call_of(family), "latents": noise_of(family, 1), "output_type": "latent"}
    pipe("a red circle", **ONE_STEP, **call)
    pipe("", **ONE_STEP, **call, complex_human_instruction=None)
    condition = family.encode(["a red circle", ""])
    for key, values in condition.items():
        assert torch.equal(values[:1], seen[0][key]) and torch.equal(values[1:], seen[1][key]), key
    assert condition["encoder_attention_mask"].dtype == torch.long and condition["encoder_attention_mask"][1].sum() < 5
    plain = family.pipeline.encode_prompt(["a red circle"], False, device="cpu")[0]
    assert not torch.equal(plain, condition["encoder_hidden_states"][:1]), "without the instruction"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny.sana(caption_channels=16), "text embeddings of width 16, but its text encoder makes 32"),
        (lambda: tiny.sana(guidance_embeds=True), "has guidance_embeds=True: .* as SANA-Sprint does"),
        (lambda: tiny.sana(in_channels=8, out_channels=8), "takes 8 channels, but its autoencoder makes 4"),
        (
            lambda: tiny.sana(flow=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)),
            "pipeline tells it of none",
        ),
    ],
)
def test_parts_of_sana_that_do_not_fit_are_told(make, message):
    with pytest.raises(ValueError, match=message):
        family_of(make())


def test_sizes_of_sana():
    family = family_of(tiny.sana())
    assert family.latent_shape(64) == (4, 16, 16)
    with pytest.raises(ValueError, match="--resolution 48: .* multiples of 32 pixels"):
        family.resolution(48)
    placed = family_of(tiny.sana(interpolation_scale=1))
    assert placed.resolution(32) == 32
    with pytest.raises(ValueError, match="--resolution 64: the positions of this transformer are made for 32 pixels"):
        placed.resolution(64)


# From the script to the Hub -------------------------------------------------------------------------------------------

RUNS = [
    ("sana", {}),
    ("stable_diffusion_3", {"lora_rank": 2, "gradient_checkpointing": True}),
    pytest.param("sana", {"lora_rank": 2, "gradient_checkpointing": True}, marks=pytest.mark.slow),
    *(pytest.param(name, {}, marks=pytest.mark.slow) for name in CASES if name != "sana"),
    pytest.param("stable_diffusion_3 without T5", {"lora_rank": 2}, marks=pytest.mark.slow),
]


def distil(folder, teacher, prompts, /, **flags):
    """The training script, by its command line."""
    import train_disback

    train_disback.main(arguments(folder, teacher, prompts, **flags))
    return folder


@pytest.mark.parametrize(("name", "flags"), RUNS)
def test_from_a_teacher_to_a_card_a_pushed_path_and_its_replay(
    name, flags, tmp_path, repo, hub, prompts_file, monkeypatch, small_pictures
):
    """Both stages by the script; the student and a node of the path by stock classes; the path again, from the Hub."""
    teacher, where = teacher_of(name), tmp_path / "teacher"
    teacher.save_pretrained(where)
    push = {"push_to_hub": True, "hub_model_id": repo}
    folder = distil(tmp_path / "run", where, prompts_file, **push, **flags)
    student = DiffusionPipeline.from_pretrained(repo, **loading(name))
    assert type(student) is type(teacher)
    was, is_ = weights(teacher.transformer), weights(student.transformer)
    assert was.keys() == is_.keys() and not equal(was, is_)
    family = load_family(str(folder))
    given = {**call_of(family), "latents": noise_of(family, 1), "output_type": "pt"}
    image = student(tiny.PROMPTS[0], **ONE_STEP, **given).images
    own = own_class(family).from_pretrained(repo)
    assert torch.equal(own(tiny.PROMPTS[0], **given).images, image)

    path = DegradationPath.from_pretrained(repo, teacher=ModelReference(str(where)))
    assert path.denoiser == "transformer" and path.kind == ("adapter" if flags else "full")
    path.verify(path.local_teacher().meta_network())
    assert any(file.startswith("transformer/") for file in hub.files(repo, "degradation-000004"))
    if not flags:
        node = DiffusionPipeline.from_pretrained(repo, revision="degradation-000004", **loading(name))
        assert type(node) is type(teacher) and not equal(weights(node.transformer), was)
        assert not node.scheduler.config.get("stochastic_sampling"), "a degraded teacher, with its own scheduler"
    path.load(0, into=student.transformer)
    assert equal(weights(student.transformer), was)
    again = distil(tmp_path / "again", where, prompts_file, stage="backtrack", degradation_path=repo, **flags)
    assert equal(weights(load_family(str(again)).network), weights(family.network))

    card = hub.files(repo)["README.md"].decode()
    assert "pipeline_tag: text-to-image" in card and family.usage.own_pipeline in card
    monkeypatch.chdir(tmp_path)  # where the teacher lies by the name that is published
    snippets = card.split("```python")[1:]
    assert len(snippets) == (3 if flags else 2)
    for snippet in snippets:
        scope = {}
        exec(snippet.split("```")[0], scope)
        assert scope["image"].size == (SIDE[name.split()[0]],) * 2


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        pytest.param(name, flags, marks=pytest.mark.slow)
        for name in tiny.FLOW
        for flags in ({}, {"lora_rank": 2, "timestep_sampling": "logit_normal"})
    ],
)
def test_a_resumed_run_ends_where_an_unbroken_one_does(name, flags, tmp_path, prompts_file, small_pictures):
    tiny.FLOW[name]().save_pretrained(tmp_path / "teacher")
    steps = {"num_path_nodes": 1, "steps_per_target": 1, "checkpointing_steps": 1, **flags}
    distil(tmp_path / "whole", tmp_path / "teacher", prompts_file, **steps)
    distil(tmp_path / "half", tmp_path / "teacher", prompts_file, max_train_steps=2, **steps)
    distil(tmp_path / "half", tmp_path / "teacher", prompts_file, resume_from_checkpoint="latest", **steps)
    one, two = (load_family(str(tmp_path / folder)).network for folder in ("whole", "half"))
    assert equal(weights(one), weights(two))


@pytest.mark.slow
def test_two_processes_train_a_network_that_has_buffers(tmp_path, prompts_file):
    """One of them asks the student alone, at validations: to send the positions of patches then was to wait for ever."""
    tiny.pipeline_3().save_pretrained(tmp_path / "teacher")
    line = arguments(tmp_path / "run", tmp_path / "teacher", prompts_file, **SHORT, validation_steps=1)
    one, two = in_two_processes(tmp_path / "ranks", line)
    assert one and equal(one, two)


ALONE = """
import sys
sys.modules["diffusers_disback"] = None  # an import of it fails
import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline
from safetensors.torch import load_file, save_file
student, teacher, node, lora, noise, images = {files!r}
call = dict(num_inference_steps=1, guidance_scale=0, latents=load_file(noise)["noise"], output_type="pt", **{call!r})
auto = AutoPipelineForText2Image.from_pretrained(student)
drawn = dict(student=auto("a red circle", **call).images)
drawn["node"] = DiffusionPipeline.from_pretrained(node)("a red circle", **call).images
if {takes_lora}:
    pipe = DiffusionPipeline.from_pretrained(teacher)
    pipe.load_lora_weights(lora, weight_name="pytorch_lora_weights.safetensors")
    pipe.scheduler = type(auto.scheduler).from_pretrained(student, subfolder="scheduler")
    drawn["lora"] = pipe("a red circle", **call).images
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    drawn["fused"] = pipe("a red circle", **call).images
save_file({{name: image.contiguous() for name, image in drawn.items()}}, images)
print(type(auto).__name__)
"""


def drawn_by_stock_classes_alone(family, tmp_path, prompts_file, repo):
    """Images of a student, a node of its path, and of the teacher with its LoRA: here, and where there is no package."""
    family.pipeline.save_pretrained(tmp_path / "teacher")
    takes_lora = family.usage.takes_lora
    run = distil(tmp_path / "run", tmp_path / "teacher", prompts_file, **SHORT, lora_rank=2 if takes_lora else None)
    push = {"push_to_hub": True, "hub_model_id": repo}
    distil(tmp_path / "full", tmp_path / "teacher", prompts_file, **SHORT, **push)
    node = DiffusionPipeline.download(repo, revision="degradation-000002")
    noise = noise_of(family, 1)
    save_file({"noise": noise}, tmp_path / "noise.safetensors")
    places = [run, tmp_path / "teacher", node, run / "lora", tmp_path / "noise.safetensors", tmp_path / "images"]
    program = ALONE.format(files=[str(place) for place in places], call=call_of(family), takes_lora=takes_lora)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == type(family.pipeline).__name__
    student = load_family(str(run))
    here = student.sample(student.pipeline, student.arguments(["a red circle"]), noise)
    return here, load_file(tmp_path / "images")


@pytest.mark.slow
@every_family
def test_a_process_that_cannot_import_this_package_draws_the_same(
    name, tmp_path, prompts_file, repo, hub, small_pictures
):
    here, drawn = drawn_by_stock_classes_alone(family_of(tiny.FLOW[name]()), tmp_path, prompts_file, repo)
    assert torch.equal(drawn["student"], here)
    assert torch.equal(drawn["fused"], here)
    assert torch.allclose(drawn["lora"], here, atol=1e-5), "not fused, products are rounded otherwise"
    assert not torch.equal(drawn["node"], here)


@every_family
def test_its_exports_load_in_the_stock_pipeline(name, tmp_path, capsys):
    """In half precision, and as a LoRA of the teacher, which of full rank leaves nothing of matrices."""
    teacher, student = tiny.FLOW[name](), tiny.FLOW[name](seed=1)
    family = family_of(teacher)
    teacher.save_pretrained(tmp_path / "teacher")
    family.one_step(student.transformer, 999).save_pretrained(tmp_path / "student")
    places = [str(tmp_path / folder) for folder in ("student", "teacher", "lora")]
    assert command(["extract-lora", *places, "--rank", "64", "--denoiser", "transformer"]) == 0
    assert [file.name for file in (tmp_path / "lora").iterdir()] == ["pytorch_lora_weights.safetensors"]
    teacher.load_lora_weights(tmp_path / "lora")
    teacher.fuse_lora()
    teacher.unload_lora_weights()
    was, is_ = weights(teacher.transformer), weights(student.transformer)
    linear = [f"{key}.weight" for key, part in student.transformer.named_modules() if type(part) is torch.nn.Linear]
    assert linear and all((was[key] - is_[key]).abs().max() < 1e-2 for key in linear)
    assert command(["half", places[0]]) == 0
    half = DiffusionPipeline.from_pretrained(places[0], variant="fp16", torch_dtype=torch.float16)
    assert half.transformer.dtype == half.vae.dtype == torch.float16
    assert (half.transformer.proj_out.weight - student.transformer.proj_out.weight).abs().max() < 1e-3


def test_the_plan_counts_tables_of_positions():
    """Of Stable Diffusion 3.5 Medium they are 0.9 GB in float32, in each network and in each node."""
    kind, config, parameters, _ = SIZES["Stable Diffusion 3.5 Medium"]

    def skeleton():
        with torch.device("meta"):
            return kind(**config)

    backtracking, table = BacktrackingConfig(), 384 * 384 * 1536
    whole = Planner(skeleton, FAMILIES["stable_diffusion_3"], TrainingConfig(), backtracking)
    held = {row.name: row.bytes for row in whole.rows(2)}
    assert held["target"] == held["student"] == held["fake score"] == 4 * (parameters + table)
    adapters = TrainingConfig(lora_rank=4, mixed_precision="bf16")
    shared = Planner(skeleton, FAMILIES["stable_diffusion_3"], adapters, backtracking)
    held = {row.name: row.bytes for row in shared.rows(2)}
    assert held["base of the scores, the teacher"] == 2 * (parameters + table) > held["student, adapter of rank 4"]


@every_family
def test_the_plan_knows_it(name, tmp_path, capsys):
    """From configs alone."""
    tiny.FLOW[name]().save_pretrained(tmp_path)
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    assert command(["plan", "--pretrained_model_name_or_path", str(tmp_path), "--lora_rank", "2"]) == 0
    out = capsys.readouterr().out
    assert "conditioning timestep 999\n" in out and "peak on the device" in out
    assert f"{SIDE[name]} x {SIDE[name]} pixels" in out


@every_family
def test_a_start_that_predicts_otherwise_is_refused(name, tmp_path):
    family = family_of(tiny.FLOW[name]())
    tiny.FLOW[name](seed=1).save_pretrained(tmp_path / "same")
    start = ModelReference(str(tmp_path / "same")).resolve_denoiser("transformer")
    assert not equal(weights(family.initial_generator(start)), weights(family.network))
    file = tmp_path / "same" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": "DDIMScheduler"}))
    with pytest.raises(ValueError, match="says that it predicts epsilon, but the teacher predicts flow_prediction"):
        family.initial_generator(ModelReference(str(tmp_path / "same")).resolve_denoiser("transformer"))


# At size, without weights -------------------------------------------------------------------------------------------

SD_3 = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 192,
}
# Of the published configs: the network's class, its config, and its numbers of parameters and tensors, of which
# the table of positions of Stable Diffusion 3 is no parameter.
SANA = {"num_attention_heads": 70, "attention_head_dim": 32, "num_layers": 20}
SIZES = {
    "SANA 1.6B": (SanaTransformer2DModel, SANA, 1_604_462_752, 396),
    "SANA 0.6B": (
        SanaTransformer2DModel,
        {
            "num_attention_heads": 36,
            "attention_head_dim": 32,
            "num_layers": 28,
            "num_cross_attention_heads": 16,
            "cross_attention_head_dim": 72,
            "cross_attention_dim": 1152,
        },
        591_747_872,
        548,
    ),
    "Stable Diffusion 3 Medium": (SD3Transformer2DModel, SD_3, 2_028_328_000, 683),
    "Stable Diffusion 3.5 Medium": (
        SD3Transformer2DModel,
        {**SD_3, "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"},
        2_243_171_520,
        909,
    ),
}


@pytest.mark.parametrize("name", SIZES)
def test_full_size_networks_are_adapted_and_counted(name):
    kind, config, parameters, tensors = SIZES[name]
    with torch.device("meta"):
        network, adapted = kind(**config), kind(**config)
    family = next(one for one in FAMILIES.values() if one.usage.network_class == kind.__name__)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert len(network.state_dict()) == tensors
    shared = SharedNetwork(adapted)
    with torch.device("meta"):
        shared.add("generator", lora_config(64, None, family.lora_target_modules))
    layers = len(shared.parameters("generator")) // 2
    assert layers >= 4 * len(network.transformer_blocks), f"{layers}"
    shared.release()
    original = {key: value.shape for key, value in network.state_dict().items()}
    assert {key: value.shape for key, value in adapted.state_dict().items()} == original
