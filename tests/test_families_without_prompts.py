"""Families without prompts, from the stock pipelines that they have to agree with to a card and a pushed path."""

import json
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import tiny
import torch
import train_disback
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDPMPipeline,
    DiffusionPipeline,
    DiTPipeline,
)
from script import arguments
from stages import equal, weights

from diffusers_disback import DegradationPath, DisBackConfig, ModelReference, OneStepGenerator, load_family
from diffusers_disback.commands.cli import main as command
from diffusers_disback.families import family_of, usage_of
from diffusers_disback.models.discriminator import bottleneck_features
from diffusers_disback.training.defaults import with_defaults


PREDICTIONS = ["epsilon", "v_prediction", "sample"]


@dataclass
class Case:
    """A tiny teacher.

    Args:
        make (`Callable`): Makes it, of a prediction type.
        student (`type`): The stock pipeline of its students.
        flags (`dict`): Without which it cannot be distilled.
        captions (`list[str]`): Its conditions.
        timestep (`int`): By default, where there is 2.5 times as much noise as signal.
    """

    make: Any
    student: type
    flags: dict[str, Any] = field(default_factory=dict)
    captions: list[str] = field(default_factory=lambda: ["sample"])
    timestep: int = 440


GREY = {"in_channels": 1, "out_channels": 1}
LABELLED = partial(tiny.pixels, kind=DDIMPipeline, num_class_embeds=4)
CASES = {
    "pixels": Case(tiny.pixels, DDIMPipeline),
    "grey": Case(partial(tiny.pixels, **GREY), DDIMPipeline),
    "labels": Case(LABELLED, ConsistencyModelPipeline, {"guidance_scale": 1}, list("0123")),
    "null label": Case(
        partial(tiny.pixels, num_class_embeds=4, **GREY),
        ConsistencyModelPipeline,
        {"null_class_label": 1, "guidance_scale": 3, "proportion_empty_prompts": 0.5},
        list("023"),
    ),
    "dit": Case(
        tiny.dit, DiTPipeline, {"guidance_scale": 3, "proportion_empty_prompts": 0.5}, list("0123456789"), 625
    ),
    "edm": Case(tiny.edm, ConsistencyModelPipeline, {"sigma_init": 2.5}, timestep=499),
    "edm rescaled": Case(tiny.rescaled_edm, ConsistencyModelPipeline, {"sigma_init": 2.5}, timestep=499),
    "edm labels": Case(
        partial(tiny.edm, num_class_embeds=4),
        ConsistencyModelPipeline,
        {"null_class_label": 1, "guidance_scale": 3, "proportion_empty_prompts": 0.5},
        list("023"),
        499,
    ),
}


def some(*quick):
    """All cases, of which only these are run by default."""
    names = [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
    return pytest.mark.parametrize("name", names)


@pytest.fixture
def teacher(name, tmp_path):
    """The folder of a case's teacher."""
    CASES[name].make().save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def reference(folder, name) -> ModelReference:
    return ModelReference(str(folder), null_class_label=CASES[name].flags.get("null_class_label"))


def distil(folder, teacher, /, name, **flags):
    """The training script, by its command line."""
    train_disback.main(arguments(folder, teacher, None, prompts_file=None, **{**CASES[name].flags, **flags}))
    return folder


def asked_once(student, noise, condition):
    """What a stock pipeline makes of noise before it decodes: its denoiser's prediction, and its scheduler's step."""
    network = student.components.get("unet") or student.transformer
    student.scheduler.set_timesteps(1)
    (t,) = student.scheduler.timesteps
    noise = noise * student.scheduler.init_noise_sigma
    given = student.scheduler.scale_model_input(noise, t)
    with torch.no_grad():
        output = network(given, timestep=t.expand(len(noise)), return_dict=False, **condition)[0]
    return student.scheduler.step(output[:, : noise.shape[1]], t, noise, return_dict=False)[0]


def stock_call(student, condition):
    """Two images by the stock pipeline's own call, from the noise of seed 3."""
    call = {"num_inference_steps": 1, "output_type": "pt", "generator": torch.Generator().manual_seed(3)}
    if isinstance(student, DiTPipeline):
        return student(condition["class_labels"].tolist(), guidance_scale=1, **call).images
    return student(batch_size=2, **call, **condition).images


# The student --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "prediction"),
    [(name, one) for name in CASES for one in PREDICTIONS if one == "epsilon" or not name.startswith("edm")],
)
def test_the_deployed_student_is_the_generator_bit_for_bit(name, prediction, tmp_path):
    """Teachers' schedulers clip; the student's does not, and its images are the generator's before and after the clamp."""
    pipe = CASES[name].make(prediction)
    assert pipe.scheduler.config.get("clip_sample", name.startswith("edm")), "of EDM's schedulers none clips"
    family = family_of(pipe)
    noise = torch.randn(2, *family.latent_shape(), generator=torch.Generator().manual_seed(3))
    condition = family.conditions().condition([0, 0], [False, False])
    for t in (0, 399, 499, 999):
        with torch.no_grad():
            x0 = OneStepGenerator(family.score_model(), t)(noise, condition)
        family.one_step(family.network, t).save_pretrained(tmp_path / str(t))
        student = DiffusionPipeline.from_pretrained(tmp_path / str(t))
        student.set_progress_bar_config(disable=True)
        assert type(student) is CASES[name].student
        assert (asked_once(student, noise, condition) - x0).abs().max() == 0.0
        deployed = family_of(student)  # with an autoencoder of its own, if there is one
        with torch.no_grad():
            images = deployed.decode(x0)
        assert torch.equal(stock_call(student, condition).expand(-1, 3, -1, -1), images)
        assert torch.equal(deployed.sample(student, deployed.arguments(["0", "0"]), noise), images)


@some("pixels", "null label", "dit", "edm")
def test_from_settings_to_a_card_and_a_pushed_path(name, teacher, tmp_path, repo, hub, monkeypatch, small_pictures):
    case, pipe = CASES[name], CASES[name].make()
    push = {"push_to_hub": True, "hub_model_id": repo, "num_evaluation_prompts": 5, "validation_steps": 2}
    folder = distil(tmp_path / "run", teacher, name, validation_prompts=case.captions[-1:], **push)

    student = DiffusionPipeline.from_pretrained(repo)
    assert type(student) is case.student
    network, teachers = family_of(student).network, family_of(pipe).network
    assert not equal(weights(network), weights(teachers))
    report = json.loads(hub.files(repo)["report.json"])
    timestep = report["settings"]["conditioning_timestep"]
    assert timestep == family_of(pipe).default_timestep() == case.timestep
    assert report["example_prompt"] == case.captions[-1] and report["evaluation"]["num_pictures"] == 5
    assert [row["step"] for row in report["curve"]] == [0, 2, 4]
    assert {"samples.png", "path.png", "convergence.png"} <= hub.files(repo).keys()
    deployed = load_family(reference(folder, name))
    assert deployed.conditions().captions == case.captions, "a student is a teacher, too"

    path = DegradationPath.from_pretrained(repo, teacher=reference(teacher, name))
    path.verify(path.local_teacher().meta_network())
    assert sorted(hub.repos[repo].branches) == ["degradation-000002", "degradation-000004", "main"]
    path.load(0, into=network)
    assert equal(weights(network), weights(teachers))

    card = hub.files(repo)["README.md"].decode()
    assert "pipeline_tag: unconditional-image-generation" in card and "DisBackOneStepPipeline" not in card
    assert ("class_labels=" in card) == (case.captions != ["sample"])
    (snippet,) = card.split("```python")[1:]
    scope = {}
    exec(snippet.split("```")[0], scope)
    assert scope["image"].size == (16, 16)


@some("edm labels")
def test_a_resumed_run_ends_where_an_unbroken_one_does(name, teacher, tmp_path, small_pictures):
    steps = {"num_path_nodes": 1, "steps_per_target": 1, "checkpointing_steps": 1, "validation_steps": 4}
    distil(tmp_path / "whole", teacher, name, **steps)
    distil(tmp_path / "half", teacher, name, max_train_steps=2, **steps)
    distil(tmp_path / "half", teacher, name, resume_from_checkpoint="latest", **steps)
    one, two = (load_family(str(tmp_path / folder)).network for folder in ("whole", "half"))
    assert equal(weights(one), weights(two))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["null label", "dit", "edm"])
def test_adapters_are_trained_where_diffusers_loads_none_and_the_student_is_whole(
    name, teacher, tmp_path, repo, hub, small_pictures
):
    """Both stages, a path of adapters, and its replay from the Hub; the student by the stock pipeline."""
    push = {"push_to_hub": True, "hub_model_id": repo}
    folder = distil(tmp_path / "run", teacher, name, lora_rank=2, **push)
    family, was = load_family(reference(folder, name)), load_family(reference(teacher, name))
    assert weights(family.network).keys() == weights(was.network).keys()
    assert not equal(weights(family.network), weights(was.network))
    assert type(DiffusionPipeline.from_pretrained(repo)) is CASES[name].student
    assert "load_lora" not in hub.files(repo)["README.md"].decode()
    path = DegradationPath.from_pretrained(repo, teacher=reference(teacher, name))
    assert path.kind == "adapter" and len(path) == 2
    replay = {"stage": "backtrack", "degradation_path": repo, "lora_rank": 2}
    again = distil(tmp_path / "again", teacher, name, **replay)
    assert equal(weights(load_family(reference(again, name)).network), weights(family.network))


@pytest.mark.parametrize("name", ["pixels", "null label", pytest.param("edm rescaled", marks=pytest.mark.slow)])
def test_a_path_of_its_own_has_a_card_and_nodes_that_load(
    name, teacher, tmp_path, repo, hub, monkeypatch, small_pictures
):
    """A stock pipeline that cannot be called with labels, or samples otherwise, is not said to be."""
    folder = distil(tmp_path / "run", teacher, name, stage="record")
    assert command(["push", str(folder), repo, "--pretrained_model_name_or_path", str(teacher)]) == 0
    card = hub.files(repo)["README.md"].decode()
    node = DiffusionPipeline.from_pretrained(repo, revision="degradation-000004")
    assert type(node) is type(CASES[name].make()) and not equal(weights(node.unet), weights(CASES[name].make().unet))
    assert ("--null_class_label 1" in card) == (name == "null label")
    monkeypatch.chdir(tmp_path)
    snippets = [part.split("```")[0] for part in card.split("```python")[1:]]
    assert len(snippets) == (2 if name == "pixels" else 1)
    for snippet in snippets:
        exec(snippet.replace("num_inference_steps=25", "num_inference_steps=1"), {})


def test_a_model_that_lies_flat_is_read(tmp_path, repo, hub, small_pictures):
    """As `google/ddpm-cifar10-32` does: all files beside `model_index.json`, a pickle of the same weights among them."""
    from huggingface_hub import HfApi

    flat, pipe = tmp_path / "flat", tiny.pixels()
    pipe.save_pretrained(tmp_path / "teacher")
    flat.mkdir()
    for file in (tmp_path / "teacher").rglob("*.*"):
        file.replace(flat / file.name)
    (flat / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    (flat / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert equal(weights(DDPMPipeline.from_pretrained(flat).unet), weights(pipe.unet)), "as diffusers reads it"
    HfApi().create_repo(repo)
    commit = HfApi().upload_folder(repo_id=repo, folder_path=flat).oid
    flags = {"push_to_hub": True, "hub_model_id": f"{repo}-student", "cache_dir": tmp_path / "cache"}
    folder = distil(tmp_path / "run", repo, "pixels", **flags)
    manifest = json.loads((folder / "path" / "path.json").read_text())
    assert manifest["teacher"]["name_or_path"] == repo and manifest["teacher"]["commit"] == commit
    assert "license: apache-2.0" in (folder / "README.md").read_text()
    node = DDPMPipeline.from_pretrained(f"{repo}-student", revision="degradation-000004")
    assert not equal(weights(node.unet), weights(pipe.unet))
    for where in (repo, str(flat)):
        assert equal(weights(load_family(where, str(tmp_path / "cache")).network), weights(pipe.unet))
    assert command(["plan", "--pretrained_model_name_or_path", str(flat), "--cache_dir", str(tmp_path / "cache")]) == 0
    start = ModelReference(repo).resolve_denoiser("unet", str(tmp_path / "cache"))
    assert equal(weights(start.load_network(type(pipe.unet))), weights(pipe.unet))
    (tmp_path / "elsewhere.json").write_text((flat / "config.json").read_text())
    (flat / "config.json").unlink()
    (flat / "config.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(ValueError, match="config.json"):
        load_family(str(flat), str(tmp_path / "cache"))


# Commands ------------------------------------------------------------------------------------------------------------


@some("dit", "edm labels")
def test_commands_know_it(name, teacher, tmp_path, capsys, small_pictures):
    case, null_label = CASES[name], CASES[name].flags.get("null_class_label")
    folder = distil(tmp_path / "run", teacher, name)
    path, output = str(folder / "path"), str(tmp_path / "nodes.png")
    assert command(["path", "verify", path]) == 0
    assert command(["path", "show", path, "--output", output, "--num_inference_steps", "2"]) == 0
    assert (tmp_path / "nodes.png").is_file()
    assert command(["plan", "--pretrained_model_name_or_path", str(teacher)]) == 0
    out = capsys.readouterr().out
    assert "fits the teacher" in out and "peak on the device" in out and "16 x 16 pixels" in out
    flags = ["--timesteps", "399", "--num_inference_steps", "2", "--output", str(tmp_path / "sweep.png")]
    guidance = case.flags.get("guidance_scale", 1)
    flags += ["--guidance_scale", str(guidance)]
    flags += [] if null_label is None else ["--null_class_label", str(null_label)]
    assert command(["timestep-sweep", str(teacher), *flags]) == 0
    prompts = tmp_path / "captions.txt"
    prompts.write_text("\n".join(case.captions[:2]))
    settings = f",guidance={guidance}" + ("" if null_label is None else f",null_class_label={null_label}")
    flags = ["--prompts_file", str(prompts), "--num_images_per_prompt", "2", "--output", str(tmp_path / "evaluation")]
    assert command(["evaluate", str(folder), "--reference", f"{teacher}@2{settings}", *flags]) == 0, (
        capsys.readouterr()
    )
    measured = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert measured["num_images"] == 2 * len(case.captions[:2]) and measured["size"] == [16, 16]


# Labels --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["null label"])
def test_a_label_that_is_said_to_be_none_is_what_guidance_leads_away_from(name, teacher):
    assert family_of(CASES[name].make()).conditions().captions == list("0123"), "which is in no config"
    family = load_family(reference(teacher, name))
    source = family.conditions()
    assert source.captions == list("023") and source.empty["class_labels"].tolist() == [1]
    assert source.condition([0, 1, 2, 2], [False, False, False, True])["class_labels"].tolist() == [0, 2, 3, 1]
    sampler, noise = family.sampler(), torch.randn(2, *family.latent_shape())
    plain, guided, without = (
        family.sample(sampler, family.arguments(labels), noise, 2, scale)
        for labels, scale in ((["2", "3"], 1.0), (["2", "3"], 3.0), (["1", "1"], 1.0))
    )
    assert plain.shape == (2, 3, 16, 16) and not torch.equal(plain, guided) and not torch.equal(plain, without)
    assert torch.equal(family.sample(sampler, family.arguments(["2", "3"]), noise, 2, 0.0), without)


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        (
            "labels",
            {"guidance_scale": 8},
            "--guidance_scale is 8, but no class label of the teacher stands for no class",
        ),
        ("labels", {"fake_score_guidance_scale": 2}, "--fake_score_guidance_scale is 2, but no class label"),
        ("labels", {"null_class_label": 4}, "--null_class_label is 4, but the teacher's UNet has the labels 0..3"),
        ("pixels", {"null_class_label": 0}, "--null_class_label is 0, but the teacher's UNet has no class labels"),
        ("labels", {"validation_prompts": ["4"]}, "--validation_prompts has '4', but .* are called 0, 1, 2 .. 3"),
        ("null label", {"validation_prompts": ["0", "1"]}, "--validation_prompts has '1', but .* are called 0, 2, 3."),
        ("pixels", {"validation_prompts": ["a cat"]}, "--validation_prompts has 'a cat', but .* are called sample."),
    ],
)
def test_what_a_teacher_does_not_take_is_refused_before_anything_is_measured(
    name, flags, message, teacher, tmp_path, monkeypatch
):
    monkeypatch.setattr("diffusers_disback.evaluation.report.Report.add_teacher", None)
    with pytest.raises(ValueError, match=message):
        distil(tmp_path / "run", teacher, name, **flags)


def test_a_label_for_none_is_for_pixels(teacher_folder, tmp_path):
    with pytest.raises(
        ValueError, match="has no class labels of which one could be said .* leave --null_class_label out"
    ):
        load_family(ModelReference(str(teacher_folder), null_class_label=0))


@pytest.mark.parametrize("name", ["null label"])
def test_a_path_belongs_to_its_label_for_none(name, teacher, tmp_path, small_pictures):
    """0 is a label as any other."""
    folder = distil(tmp_path / "run", teacher, name, stage="record", null_class_label=0)
    assert DegradationPath.from_pretrained(folder / "path").teacher.null_class_label == 0
    flags = {"stage": "backtrack", "degradation_path": folder / "path"}
    with pytest.raises(
        ValueError, match="recorded with --null_class_label 0, but is to be replayed with --null_cl.* 1"
    ):
        distil(tmp_path / "other", teacher, name, **flags)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"out_channels": 6}, "takes 3 channels and gives 6"),
        ({"in_channels": 4, "out_channels": 4}, "takes 4 channels and gives 4"),
        ({"class_embed_type": "timestep"}, "has class_embed_type='timestep', which is not supported"),
        ({"time_embedding_type": "fourier"}, "has time_embedding_type='fourier'"),
    ],
)
def test_networks_that_ask_for_something_else_are_refused(config, message):
    with pytest.raises(ValueError, match=f"The teacher's UNet {message}"):
        family_of(tiny.pixels(**config))


def test_captions_that_are_no_labels_are_told():
    family = family_of(LABELLED())
    for caption in ("4", "-1", "a cat", ""):
        with pytest.raises(ValueError, match="is no class label of the teacher: these are the numbers 0..3"):
            family.arguments(["0", caption])


def test_grey_images_are_shown_in_three_channels():
    family = family_of(tiny.pixels(**GREY))
    shown = torch.rand(2, 3, 16, 16) * 2 - 1
    assert torch.equal(family.encode_images(shown), shown.mean(dim=1, keepdim=True))
    images = family.decode(family.encode_images(shown))
    assert images.shape == shown.shape and torch.equal(images[:, 0], images[:, 2])


def test_a_scheduler_that_contradicts_the_network_is_told():
    """Networks of random weights predict no noise, with and without labels."""
    for pipe in (tiny.pixels(), LABELLED()):
        assert "at the highest noise level its output is not the noise" in family_of(pipe).check_schedule()


def test_cards_of_a_class_of_pipelines_are_called_as_their_captions_are():
    rescaled = tiny.rescaled_edm()
    named = ("ConsistencyModelPipeline", rescaled.unet.config)
    assert usage_of(*named).calls_teacher and not usage_of(*named, type(rescaled.scheduler).__name__).calls_teacher
    usage = usage_of("DDPMPipeline")
    assert usage.call("sample", 1) == "num_inference_steps=1"
    assert usage.call("3", 1) == "class_labels=3, num_inference_steps=1"
    with pytest.raises(ValueError):
        usage.call("__import__('os')", 1)


# DiT -----------------------------------------------------------------------------------------------------------------


def test_dit_is_asked_as_the_stock_pipeline_asks_it():
    """With guidance: one step of the stock pipeline, whose null label is 1000."""
    pipe = tiny.dit(num_embeds_ada_norm=1000, num_layers=1)
    family, seen, forward = family_of(pipe), [], pipe.transformer.forward

    def spy(sample, **arguments):
        seen.append((sample, arguments))
        return forward(sample, **arguments)

    pipe.transformer.forward = spy
    pipe([3, 5], guidance_scale=4.0, num_inference_steps=1, output_type="pt")
    ((sample, given),) = seen
    pipe.transformer.forward = forward
    with torch.no_grad():
        stock = forward(sample, **given).sample[:, :4]
    source = family.conditions()
    condition, negative = source.condition([3, 5], [False, False]), source.empty["class_labels"].expand(2)
    both = {"class_labels": torch.cat([condition["class_labels"], negative])}
    assert torch.equal(given["class_labels"], both["class_labels"])
    with torch.no_grad():
        assert torch.equal(family.call(family.network, sample, given["timestep"], both), stock)


def test_dit_names_its_classes_and_may_be_called_by_its_older_name(tmp_path):
    """`facebook/DiT-XL-2-256` names a `Transformer2DModel`."""
    tiny.dit().save_pretrained(tmp_path / "teacher")
    for file, changes in (
        ("model_index.json", {"transformer": ["diffusers", "Transformer2DModel"], "id2label": {"7": "hen, bird"}}),
        ("transformer/config.json", {"_class_name": "Transformer2DModel"}),
    ):
        content = json.loads((tmp_path / "teacher" / file).read_text())
        (tmp_path / "teacher" / file).write_text(json.dumps({**content, **changes}))
    family = load_family(str(tmp_path / "teacher"))
    assert family.local_model.meta_network().state_dict().keys() == family.network.state_dict().keys()
    family.one_step(family.network, 589).save_pretrained(tmp_path / "student")
    student = DiffusionPipeline.from_pretrained(tmp_path / "student")
    assert student.get_label_ids(["bird"]) == [7] and student.transformer.config.out_channels == 8


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"in_channels": 3, "out_channels": 6}, "takes 3 channels, but its autoencoder makes 4"),
        ({"out_channels": 12}, "takes 4 channels and gives 12"),
    ],
)
def test_a_dit_of_other_channels_is_refused(config, message):
    with pytest.raises(ValueError, match=f"The teacher's transformer {message}"):
        family_of(tiny.dit(**config))


def test_dit_without_a_variance_is_taken_and_its_middle_is_a_bottleneck():
    family = family_of(tiny.dit(out_channels=None))
    with torch.no_grad():
        condition = family.conditions().condition([9], [True])
        features = bottleneck_features(
            family.score_model(),
            family.bottleneck(family.network),
            torch.randn(1, 4, 8, 8),
            torch.tensor([3]),
            condition,
        )
    assert family.bottleneck(family.network) is family.network.transformer_blocks[1]
    assert features.shape == (1, 16, 16) and condition["class_labels"].tolist() == [10]
    shown = torch.rand(2, 3, 16, 16) * 2 - 1
    assert family.encode_images(shown).shape == (2, *family.latent_shape())


# EDM -----------------------------------------------------------------------------------------------------------------


def test_pipelines_of_one_class_are_told_apart_by_their_scheduler(tmp_path):
    consistency = ConsistencyModelPipeline(tiny.unet_2d(), CMStochasticIterativeScheduler())
    with pytest.raises(ValueError, match="CMStochasticIterativeScheduler has sigma_min=0.002: that is a consistency"):
        family_of(consistency)
    with pytest.raises(ValueError, match="EDMEulerScheduler has no beta schedule"):
        family_of(DDPMPipeline(tiny.unet_2d(), tiny.edm().scheduler))
    for make, kind in (
        (tiny.edm, "Edm"),
        (tiny.rescaled_edm, "RescaledEdm"),
        (partial(tiny.pixels, kind=ConsistencyModelPipeline), "Pixels"),
    ):
        make().save_pretrained(tmp_path / kind)
        family = load_family(str(tmp_path / kind))
        family.one_step(family.network, 399).save_pretrained(tmp_path / "student")
        assert type(family).__name__ == type(load_family(str(tmp_path / "student"))).__name__ == kind
    with pytest.raises(ValueError, match="has prediction_type='v_prediction': supported is EDM's own precond"):
        family_of(tiny.edm("v_prediction"))
    with pytest.raises(ValueError, match="is of networks that predict edm: leave --prediction_type v_prediction out"):
        load_family(ModelReference(str(tmp_path / "Edm"), prediction_type="v_prediction"))
    start = ModelReference(str(tmp_path / "Pixels")).resolve_denoiser("unet")
    with pytest.raises(ValueError, match="says that it predicts epsilon, but the teacher predicts edm"):
        load_family(str(tmp_path / "Edm")).initial_generator(start)


def test_a_teacher_of_edm_is_sampled_as_its_stock_pipeline_samples_it():
    pipe = tiny.edm(num_class_embeds=4)
    family = family_of(pipe)
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    call = {"num_inference_steps": 5, "generator": torch.Generator().manual_seed(3), "output_type": "pt"}
    stock = pipe(batch_size=2, class_labels=torch.tensor([1, 3]), **call).images
    assert torch.equal(family.sample(family.sampler(), family.arguments(["1", "3"]), noise, 5), stock)


def test_sigma_names_the_timestep(tmp_path):
    config = DisBackConfig(output_dir=str(tmp_path), sigma_init=80)
    edm, pixels = family_of(tiny.edm()), family_of(tiny.pixels())
    assert with_defaults(config, edm).conditioning_timestep == 999
    assert [edm.timestep_of(sigma) for sigma in (0.002, 1.0, 2.5)] == [0, 403, 499]
    assert abs(edm.schedule.sigma[edm.timestep_of(1.0)] - 1) < 0.005
    assert with_defaults(replace(config, sigma_init=2.5), pixels).conditioning_timestep == pixels.default_timestep()
    both = replace(config, sigma_init=2.5, conditioning_timestep=499)
    assert with_defaults(both, edm).conditioning_timestep == 499, "as the command says it that is written down"
    with pytest.raises(ValueError, match="--sigma_init 2.5 names timestep 440, but --conditioning_timestep is 499"):
        with_defaults(both, pixels)


def test_a_dit_is_made_for_one_size():
    """Its positions would be others when the student is loaded again."""
    family = family_of(tiny.dit())
    own = family.resolution()
    assert family.resolution(own) == own and family.latent_shape(own)[-1] == family.network.config.sample_size
    with pytest.raises(
        ValueError, match=f"--resolution {2 * own}: the positions of this DiT are made for {own} pixels"
    ):
        family.initial_generator(resolution=2 * own)


@pytest.mark.parametrize(("make", "sigma"), [(tiny.edm, 200), (tiny.edm, 1e-4), (tiny.dit, 1e4)])
def test_a_noise_level_outside_the_schedule_is_refused(make, sigma):
    with pytest.raises(ValueError, match=f"--sigma_init {sigma:g} is outside the teacher's schedule"):
        family_of(make()).timestep_of(sigma)


def test_files_that_lie_flat_in_a_folder_of_an_odd_name(tmp_path):
    """A local folder's name is no part of the place where its copy lies, and its files are copied, not linked."""
    from diffusers_disback.models.reference import ModelReference

    folder = tmp_path / "models" / "inner"
    flat = folder / ".."
    tiny.pixels().save_pretrained(tmp_path / "usual")
    folder.mkdir(parents=True)
    for file in ("model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"):
        (flat / file.split("/")[-1]).write_bytes((tmp_path / "usual" / file).read_bytes())
    (flat / "scheduler_config.json").write_bytes((tmp_path / "usual/scheduler/scheduler_config.json").read_bytes())
    family = load_family(ModelReference(str(flat)), cache_dir=str(tmp_path / "cache"))
    made = list((tmp_path / "cache" / "single_files").glob("*/model/unet/*.safetensors"))
    assert len(made) == 1 and made[0].stat().st_nlink == 1
    assert family.network.config.sample_size == tiny.pixels().unet.config.sample_size
