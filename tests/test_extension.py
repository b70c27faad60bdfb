"""What is added from outside: an objective and three families, each in a few lines, from a command line to a card and a pushed
path."""

import inspect
import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import (
    ConsistencyModelPipeline,
    DDIMPipeline,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UNet2DModel,
)
from script import arguments
from transformers import CLIPTextModelWithProjection, T5Config, T5EncoderModel

from diffusers_disback import (
    EVALUATORS,
    FAMILIES,
    OBJECTIVES,
    ClassLabels,
    DegradationPath,
    ModelFamily,
    ModelReference,
    NoiseSchedule,
    Objective,
    OneStepGenerator,
    TextFamily,
    family_of,
)
from diffusers_disback.commands.cli import main as command
from diffusers_disback.families import family_class
from diffusers_disback.hub.cards import Usage
from diffusers_disback.models.generator import many_step_scheduler
from diffusers_disback.models.noise_schedule import FLOW


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


class Pixels(ModelFamily):
    """An unconditional UNet on pixels: all answers are the defaults."""

    pipeline_classes = ("DDPMPipeline", "DDIMPipeline")


class Labels(ModelFamily):
    """A UNet2DModel of classes, of which the last stands for none."""

    pipeline_classes = ("ConsistencyModelPipeline",)
    agree_in = ("in_channels", "out_channels", "num_class_embeds")
    usage = replace(ModelFamily.usage, condition="class_labels={label}", example="0")

    def conditions(self, prompts=None, resolution=None):
        null_label = self.network.config.num_class_embeds - 1
        return ClassLabels(null_label, null_label)

    def arguments(self, captions):
        return {"class_labels": torch.tensor([int(label) for label in captions])}

    @classmethod
    def example_condition(cls, config, batch):
        return {"class_labels": torch.empty(batch, dtype=torch.long, device="meta")}


class StableDiffusion3(TextFamily):
    """A transformer on straight paths, with pooled and unpooled embeddings of three text encoders; the schedule is not shifted."""

    pipeline_classes = ("StableDiffusion3Pipeline",)
    network_name = "transformer"
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    needed = ("transformer", "vae", *encoders, "tokenizer", "tokenizer_2", "tokenizer_3", "scheduler")
    agree_in = ("in_channels", "out_channels", "joint_attention_dim", "pooled_projection_dim")
    usage = Usage(network_class="SD3Transformer2DModel", scheduler_class="FlowMatchEulerDiscreteScheduler")
    conditioning_timestep = 999

    def noise_schedule(self):
        sigma = self.many_step_scheduler().sigmas.flip(0)  # (t + 1) / 1000
        return NoiseSchedule(1 - sigma, sigma, FLOW)

    @staticmethod
    def call(network, x_t, t, condition):
        return network(x_t, timestep=t + 1, return_dict=False, **condition)[0]

    def encode_prompt(self, prompts, guided=False):
        return self.pipeline.encode_prompt(prompts, prompts, prompts, self.text_encoders[0].device, 1, guided)

    @torch.no_grad()
    def encode(self, prompts, resolution=None):
        embeds, _, pooled, _ = self.encode_prompt(prompts)
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def many_step_scheduler(self):
        return FlowMatchEulerDiscreteScheduler.from_config(self.pipeline.scheduler.config)

    def one_step_scheduler(self, timestep):
        if timestep != self.schedule.num_timesteps - 1:
            raise ValueError(f"conditioning_timestep={timestep}: the stock pipeline begins at pure noise; pass 999.")
        return self.many_step_scheduler()


def pixels() -> DDIMPipeline:
    return DDIMPipeline(unet_2d(), tiny.scheduler())


def labels() -> ConsistencyModelPipeline:
    """Stock, for it is called with `class_labels`; of four classes the last stands for none."""
    return ConsistencyModelPipeline(unet_2d(num_class_embeds=4), many_step_scheduler(tiny.scheduler()))


def unet_2d(**config) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **config,
    )


def flow() -> StableDiffusion3Pipeline:
    xl = tiny.pipeline_xl()
    xl.vae.register_to_config(shift_factor=0.0)
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        caption_projection_dim=16,
        joint_attention_dim=2 * tiny.WIDTH,
        pooled_projection_dim=2 * tiny.WIDTH,
        pos_embed_max_size=8,
    )
    first, second = (CLIPTextModelWithProjection(xl.text_encoder_2.config).eval() for _ in range(2))
    size = {"d_model": 2 * tiny.WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    third = T5EncoderModel(T5Config(vocab_size=len(xl.tokenizer), **size)).eval()
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=xl.vae,
        text_encoder=first,
        tokenizer=xl.tokenizer,
        text_encoder_2=second,
        tokenizer_2=xl.tokenizer_2,
        text_encoder_3=third,
        tokenizer_3=xl.tokenizer,  # of T5 there is none to be had offline
    )


TEACHERS = {
    "pixels": (Pixels, pixels),
    "labels": (Labels, labels),
    "flow": (StableDiffusion3, flow),
    "stable_diffusion": (None, tiny.pipeline),
}
LORA = {"lora_rank": 2}
RUNS = [("stable_diffusion", "sid", {**LORA, "gradient_checkpointing": True})]
RUNS += [
    ("pixels", "sid", {}),
    ("labels", "dmd", {"proportion_empty_prompts": 0.5}),
    ("flow", "dmd", {}),
    ("flow", "sid", LORA),
]
RUNS += [
    pytest.param(*more, marks=pytest.mark.slow) for more in (("stable_diffusion", "sid", {}), ("pixels", "dmd", {}))
]


@pytest.fixture(autouse=True)
def extensions(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "sid", ScoreIdentity)
    monkeypatch.setitem(FAMILIES, "pixels", Pixels)
    monkeypatch.setitem(FAMILIES, "labels", Labels)
    monkeypatch.setitem(FAMILIES, "flow", StableDiffusion3)


def distil(folder, teacher, prompts, /, **flags):
    """The training script, by its command line."""
    import train_disback

    train_disback.main(arguments(folder, teacher, prompts, **flags))


def test_each_is_a_few_lines():
    for extension in (ScoreIdentity, Pixels, Labels, StableDiffusion3):
        assert len(inspect.getsource(extension).splitlines()) <= 40


@pytest.mark.parametrize(("name", "objective", "flags"), RUNS, ids=lambda value: value if type(value) is str else None)
def test_from_settings_to_a_card_and_a_pushed_path(
    tmp_path, repo, hub, prompts_file, monkeypatch, name, objective, flags
):
    kind, make = TEACHERS[name]
    teacher = make()
    teacher.save_pretrained(tmp_path / "teacher")
    denoiser, timestep = ("transformer", 999) if name == "flow" else ("unet", 625)  # by default
    changes = {} if family_class(type(teacher).__name__).takes_prompts else {"prompts_file": None}
    push = {"push_to_hub": True, "hub_model_id": repo}
    changes |= {"objective": objective, **flags, **push}
    distil(tmp_path / "run", tmp_path / "teacher", prompts_file, **changes)

    student = DiffusionPipeline.from_pretrained(repo)
    assert type(student) is type(teacher)
    family = family_of(student)
    network = family.network
    was, is_ = getattr(teacher, denoiser).state_dict(), network.state_dict()
    assert was.keys() == is_.keys() and any(not torch.equal(was[key], is_[key]) for key in was)

    # In one step the stock pipeline is the generator.
    family = family_of(teacher)
    noise = torch.randn(2, *family.latent_shape(), generator=torch.Generator().manual_seed(3))
    source = family.conditions(tiny.PROMPTS if family.takes_prompts else None)
    with torch.no_grad():
        x0 = OneStepGenerator(family.score_model(network), timestep)(noise, source.condition([0, 0], [False, False]))
    if not family.takes_prompts:
        seed = torch.Generator().manual_seed(3)
        call = family.arguments([source.captions[0]] * 2)
        stock = student(batch_size=2, generator=seed, num_inference_steps=1, output_type="pt", **call).images
        assert torch.equal(stock, (x0 / 2 + 0.5).clamp(0, 1))
    else:
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
    task = "text-to-image" if family.takes_prompts else "unconditional-image-generation"
    assert f"pipeline_tag: {task}" in card and ("DisBackOneStepPipeline" in card) == (name == "stable_diffusion")
    monkeypatch.chdir(tmp_path)  # where the teacher lies by the name that is published
    for snippet in card.split("```python")[1:]:
        scope = {}
        exec(snippet.split("```")[0], scope)
        assert scope["image"].size == (16, 16)
    report = json.loads(hub.files(repo)["report.json"])
    assert report["component"] == denoiser and report["student"].keys() >= {"drift_mean", "seconds_per_image"}
    assert {"samples.png", "path.png", "convergence.png"} <= hub.files(repo).keys()


@pytest.mark.parametrize("teacher", [pixels, labels])
def test_commands_know_a_family_without_prompts(tmp_path, prompts_file, capsys, teacher):
    teacher().save_pretrained(tmp_path / "teacher")
    distil(tmp_path / "run", tmp_path / "teacher", prompts_file, prompts_file=None, stage="record")
    path, output = str(tmp_path / "run" / "path"), str(tmp_path / "nodes.png")
    assert command(["path", "verify", path]) == 0
    assert command(["path", "show", path, "--output", output, "--num_inference_steps", "2"]) == 0
    assert (tmp_path / "nodes.png").is_file()
    assert command(["plan", "--pretrained_model_name_or_path", str(tmp_path / "teacher")]) == 0
    out = capsys.readouterr().out
    assert "fits the teacher" in out and "peak on the device" in out and "16 x 16 pixels" in out


def test_labels_without_one_for_none_are_distilled_without_guidance(tmp_path, prompts_file, monkeypatch):
    monkeypatch.setattr(Labels, "conditions", lambda self, prompts=None, resolution=None: ClassLabels(4))
    labels().save_pretrained(tmp_path / "teacher")
    flags = {"prompts_file": None, "stage": "record"}
    with pytest.raises(ValueError, match="guidance_scale=8.0 needs the condition of the empty prompt, or of no class"):
        distil(tmp_path / "run", tmp_path / "teacher", prompts_file, **flags)
    distil(tmp_path / "other", tmp_path / "teacher", prompts_file, guidance_scale=1, **flags)
    assert (tmp_path / "other" / "path" / "path.json").is_file()


def test_the_snippets_of_the_docs_are_taken_up(tmp_path, prompts_file, monkeypatch):
    """An objective, two families and an evaluator, as the page on how to add them has them."""
    for registry, name in (
        *((OBJECTIVES, "mean_shift"), (EVALUATORS, "sharpness")),
        *((FAMILIES, "pixels"), (FAMILIES, "labels")),
    ):
        monkeypatch.setitem(registry, name, None)  # so that it is gone when the test is over
        del registry[name]
    page = (Path(__file__).parent.parent / "docs" / "how_to_add.md").read_text()
    snippets = [part.split("```")[0] for part in page.split("```python")[1:]]
    for snippet in snippets[:4]:  # the fifth is of a setting
        exec(snippet, {})
    pixels().save_pretrained(tmp_path / "teacher")
    flags = {"objective": "mean_shift", "objective_args": "strength=0.5", "evaluators": ["drift", "sharpness"]}
    distil(tmp_path / "run", tmp_path / "teacher", prompts_file, prompts_file=None, **flags)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["pipeline_class"] == "DDIMPipeline" and report["student"]["sharpness"] > 0
    assert "sharpness" in (tmp_path / "run" / "README.md").read_text()
    assert family_of(labels()).conditions().captions == ["0", "1", "2"]


def test_what_a_family_does_not_take_is_refused(tmp_path, prompts_file):
    pixels().save_pretrained(tmp_path / "pixels")
    flow().save_pretrained(tmp_path / "flow")
    with pytest.raises(ValueError, match="a DDIMPipeline, which takes no prompts; leave --prompts_file out"):
        distil(tmp_path / "run", tmp_path / "pixels", prompts_file)
    with pytest.raises(ValueError, match="A UNet2DModel takes no adapters: .* Leave --lora_rank out"):
        distil(tmp_path / "run", tmp_path / "pixels", prompts_file, prompts_file=None, lora_rank=2)
    with pytest.raises(ValueError, match="There are no prompts: pass --prompts_file"):
        distil(tmp_path / "other", tmp_path / "flow", prompts_file, prompts_file=None)
    with pytest.raises(ValueError, match="the stock pipeline begins at pure noise; pass 999"):
        distil(tmp_path / "other", tmp_path / "flow", prompts_file, conditioning_timestep=399)


def test_a_teacher_of_no_family_is_told_what_a_family_answers(tmp_path, prompts_file, monkeypatch):
    monkeypatch.delitem(FAMILIES, "pixels")
    pixels().save_pretrained(tmp_path / "pixels")
    with pytest.raises(
        ValueError, match="is a DDIMPipeline; supported are stable_diffusion: StableDiffusionPipeline"
    ) as told:
        distil(tmp_path / "run", tmp_path / "pixels", prompts_file)
    for answer in ("pipeline_classes", "network_name", "noise_schedule", "conditions", "call", "one_step", "sample"):
        assert answer in str(told.value) and hasattr(ModelFamily, answer)
