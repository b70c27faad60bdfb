"""What is added from outside: an objective and families, each in a few lines, from a command line to a card and a pushed path."""

import inspect
import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    LDMPipeline,
    VQModel,
)
from script import arguments
from transformers import UMT5Config, UMT5EncoderModel

from diffusers_disback import (
    EVALUATORS,
    FAMILIES,
    OBJECTIVES,
    DegradationPath,
    FlowFamily,
    FlowSchedule,
    ModelFamily,
    ModelReference,
    Objective,
    OneStepGenerator,
    family_of,
)
from diffusers_disback.models.generator import many_step_scheduler


class ScoreIdentity(Objective):
    """Score identity distillation (arXiv 2404.04057): the gradient passes through both scores."""

    def __init__(self, alpha: float = 1.2):
        self.alpha = alpha

    def generator_loss(self, x0, batch, target, fake_score):
        t = batch.draw_timesteps(20, target.schedule.num_timesteps * 4 // 5)
        x_t = target.schedule.diffuse(x0, batch.draw_noise(), t)
        x0_target = target.denoise(x_t, t, batch.condition, batch.negative)
        difference = x0_target - fake_score.denoise(x_t, t, batch.condition)
        weight = (x0 - x0_target).abs().mean(dim=(1, 2, 3), keepdim=True).detach().clamp_min(1e-6)
        return (difference * (x0_target - x0 - self.alpha * difference) / weight).mean()


class AuraFlow(FlowFamily):
    """Text by one encoder, and times from 0 to 1. The condition is `encoder_hidden_states`."""

    pipeline_classes = ("AuraFlowPipeline",)
    agree_in = ("in_channels", "out_channels", "joint_attention_dim")
    encoded_as = ("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")
    lora_target_modules = ["to_q", "to_k", "to_v"]
    usage = replace(FlowFamily.usage, network_class="AuraFlowTransformer2DModel", takes_size=True)

    def noise_schedule(self):
        return FlowSchedule.of(self.pipeline.scheduler, timestep_scale=1 / 1000)

    @torch.no_grad()
    def encode(self, prompts, resolution=None):
        return {"encoder_hidden_states": self.encode_prompt(prompts)[0]}


def latent_diffusion() -> LDMPipeline:
    """Unconditional, on the latents of a `VQModel`."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vqvae = VQModel(**blocks, block_out_channels=(8, 8), norm_num_groups=4, num_vq_embeddings=8).eval()
    return LDMPipeline(vqvae, tiny.unet_2d(sample_size=8), many_step_scheduler(tiny.scheduler()))


def aura_flow() -> AuraFlowPipeline:
    one = tiny.pipeline()
    torch.manual_seed(0)
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=tiny.WIDTH,
        caption_projection_dim=16,
        pos_embed_max_size=16,
    )
    size = {"d_model": tiny.WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(one.tokenizer), **size)).eval()
    # Of T5 there is no tokenizer to be had offline.
    return AuraFlowPipeline(one.tokenizer, encoder, one.vae, transformer, FlowMatchEulerDiscreteScheduler(shift=1.73))


TEACHERS = {"aura_flow": aura_flow, "stable_diffusion": tiny.pipeline}
LORA = {"lora_rank": 2}
RUNS = [("stable_diffusion", "sid", {**LORA, "gradient_checkpointing": True})]
RUNS += [
    ("aura_flow", "dmd", {}),
    ("aura_flow", "sid", LORA),
    pytest.param("stable_diffusion", "sid", {}, marks=pytest.mark.slow),
]


@pytest.fixture(autouse=True)
def extensions(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "sid", ScoreIdentity)
    monkeypatch.setitem(FAMILIES, "aura_flow", AuraFlow)


def distil(folder, teacher, prompts, /, **flags):
    """The training script, by its command line."""
    import train_disback

    train_disback.main(arguments(folder, teacher, prompts, **flags))


def test_each_is_a_few_lines():
    for extension in (ScoreIdentity, AuraFlow):
        assert len(inspect.getsource(extension).splitlines()) <= 40


@pytest.mark.parametrize(("name", "objective", "flags"), RUNS, ids=lambda value: value if type(value) is str else None)
def test_from_settings_to_a_card_and_a_pushed_path(
    tmp_path, repo, hub, prompts_file, monkeypatch, small_pictures, name, objective, flags
):
    teacher = TEACHERS[name]()
    teacher.save_pretrained(tmp_path / "teacher")
    denoiser, timestep = ("transformer", 999) if name == "aura_flow" else ("unet", 625)  # by default
    changes = {"objective": objective, **flags, "push_to_hub": True, "hub_model_id": repo}
    distil(tmp_path / "run", tmp_path / "teacher", prompts_file, **changes)

    student = DiffusionPipeline.from_pretrained(repo)
    assert type(student) is type(teacher)
    network = family_of(student).network
    was, is_ = getattr(teacher, denoiser).state_dict(), network.state_dict()
    assert was.keys() == is_.keys() and any(not torch.equal(was[key], is_[key]) for key in was)

    # In one step the stock pipeline is the generator.
    family = family_of(teacher)
    noise = torch.randn(2, *family.latent_shape(), generator=torch.Generator().manual_seed(3))
    source = family.conditions(tiny.PROMPTS)
    with torch.no_grad():
        x0 = OneStepGenerator(family.score_model(network), timestep)(noise, source.condition([0, 0], [False, False]))
    call = {"num_inference_steps": 1, "guidance_scale": 0, "output_type": "latent"}
    stock = student([source.captions[0]] * 2, latents=noise, **call).images
    assert torch.allclose(stock, x0, atol=1e-5)

    path = DegradationPath.from_pretrained(repo, teacher=ModelReference(str(tmp_path / "teacher")))
    assert (
        path.denoiser == denoiser and len(path) == 2 and path.kind == ("adapter" if "lora_rank" in flags else "full")
    )
    assert sorted(hub.repos[repo].branches) == ["degradation-000002", "degradation-000004", "main"]
    assert any(file.startswith(f"{denoiser}/") for file in hub.files(repo, "degradation-000004"))
    path.verify(path.local_teacher().meta_network())
    path.load(0, into=network)
    assert all(torch.equal(was[key], tensor) for key, tensor in network.state_dict().items())

    card = hub.files(repo)["README.md"].decode()
    assert "pipeline_tag: text-to-image" in card and ("DisBackOneStepPipeline" in card) == (name == "stable_diffusion")
    monkeypatch.chdir(tmp_path)  # where the teacher lies by the name that is published
    for snippet in card.split("```python")[1:]:
        scope = {}
        exec(snippet.split("```")[0], scope)
        assert scope["image"].size == (16, 16)
    report = json.loads(hub.files(repo)["report.json"])
    assert report["component"] == denoiser and report["student"].keys() >= {"drift_mean", "seconds_per_image"}
    assert {"samples.png", "path.png", "convergence.png"} <= hub.files(repo).keys()


def test_the_snippets_of_the_docs_are_taken_up(tmp_path, prompts_file, monkeypatch, small_pictures):
    """An objective, a family and an evaluator, as the page on how to add them has them."""
    for registry, name in ((OBJECTIVES, "mean_shift"), (EVALUATORS, "sharpness"), (FAMILIES, "latent_diffusion")):
        monkeypatch.setitem(registry, name, None)  # so that it is gone when the test is over
        del registry[name]
    page = (Path(__file__).parent.parent / "docs" / "how_to_add.md").read_text()
    snippets = [part.split("```")[0] for part in page.split("```python")[1:]]
    for snippet in snippets[:3]:  # the fourth is of a setting
        exec(snippet, {})
    latent_diffusion().save_pretrained(tmp_path / "teacher")
    flags = {"objective": "mean_shift", "objective_args": "strength=0.5", "evaluators": ["drift", "sharpness"]}
    distil(tmp_path / "run", tmp_path / "teacher", prompts_file, prompts_file=None, **flags)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["pipeline_class"] == "LDMPipeline" and report["student"]["sharpness"] > 0
    assert report["resolution"] == 16 and "sharpness" in (tmp_path / "run" / "README.md").read_text()


def test_what_a_family_does_not_take_is_refused(tmp_path, prompts_file):
    tiny.pixels().save_pretrained(tmp_path / "pixels")
    aura_flow().save_pretrained(tmp_path / "flow")
    with pytest.raises(ValueError, match="a DDPMPipeline, which takes no prompts; leave --prompts_file out"):
        distil(tmp_path / "run", tmp_path / "pixels", prompts_file)
    with pytest.raises(ValueError, match="There are no prompts: pass --prompts_file"):
        distil(tmp_path / "other", tmp_path / "flow", prompts_file, prompts_file=None)
    with pytest.raises(ValueError, match="the stock pipeline begins at pure noise; pass 999"):
        distil(tmp_path / "other", tmp_path / "flow", prompts_file, conditioning_timestep=399)


def test_a_teacher_of_no_family_is_told_the_families_and_what_one_answers(tmp_path, prompts_file):
    latent_diffusion().save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="^The teacher is a LDMPipeline; supported are stable_diffusion: ") as told:
        distil(tmp_path / "run", tmp_path / "teacher", prompts_file)
    for name, family in FAMILIES.items():
        assert f" {name}: {', '.join(family.pipeline_classes)}" in str(told.value)
    for answer in ("pipeline_classes", "network_name", "noise_schedule", "conditions", "call", "one_step", "sample"):
        assert answer in str(told.value) and hasattr(ModelFamily, answer)
    assert not (tmp_path / "run").exists()
