"""PixArt-alpha and PixArt-Sigma, from the stock pipelines that they have to agree with to a pushed path."""

import json

import pytest
import tiny
import torch
from diffusers import AutoPipelineForText2Image, DiffusionPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel
from script import arguments
from stages import equal, weights
from test_flow_families import drawn_by_stock_classes_alone, noise_of

from diffusers_disback import DegradationPath, ModelReference, OneStepGenerator, load_family
from diffusers_disback.commands.cli import main as command
from diffusers_disback.families import family_of
from diffusers_disback.hub.cards import path_card
from diffusers_disback.models.discriminator import bottleneck_features


LARGE = {"sample_size": 128, "patch_size": 16}  # whose size the network is told
CASES = {
    "alpha": {},
    "alpha that is told sizes": LARGE,
    "sigma": {"kind": PixArtSigmaPipeline},
    "sigma of the same size": {"kind": PixArtSigmaPipeline, **LARGE, "use_additional_conditions": False},
    "without a variance": {"out_channels": 4},
    "v": {"prediction_type": "v_prediction"},
}
CALL = {"use_resolution_binning": False}
ONE_STEP = {"num_inference_steps": 1, "guidance_scale": 0}
every_case = pytest.mark.parametrize("name", CASES)


@every_case
def test_the_network_is_asked_as_the_stock_pipeline_asks_it(name):
    """Two prompts, with guidance: the first step of the stock pipeline."""
    pipe = tiny.pixart(**CASES[name])
    family, seen, forward = family_of(pipe), [], pipe.transformer.forward

    def spy(sample, **given):
        seen.append((sample, given))
        return forward(sample, **given)

    pipe.transformer.forward = spy
    call = {**CALL, "latents": noise_of(family), "num_inference_steps": 2, "output_type": "latent"}
    pipe(tiny.PROMPTS[:2], guidance_scale=3.0, **call)
    pipe.transformer.forward = forward
    sample, given = seen[0]
    with torch.no_grad():
        stock = forward(sample, **given)[0][:, :4]
        condition, negative = family.encode(tiny.PROMPTS[:2]), family.encode(["", ""])
        both = {key: torch.cat([negative[key], condition[key]]) for key in condition}
        assert torch.equal(family.call(family.network, sample, given["timestep"], both), stock)
    assert ("resolution" in both) == (name == "alpha that is told sizes")
    for key, value in both.items():
        assert torch.equal(given.get(key, given["added_cond_kwargs"].get(key)), value), key


@every_case
def test_the_deployed_student_is_the_generator_bit_for_bit(name, tmp_path):
    teacher = tiny.pixart(**CASES[name])
    family = family_of(teacher)
    noise = noise_of(family)
    call = {**CALL, **ONE_STEP, "latents": noise, "output_type": "latent"}
    is_large = family.network.config.sample_size == 128
    for t in (399,) if is_large else (0, 399, 999):
        with torch.no_grad():
            x0 = OneStepGenerator(family.score_model(), t)(noise, family.encode(tiny.PROMPTS[:2]))
        family.one_step(family.network, t).save_pretrained(tmp_path / str(t))
        for kind in (DiffusionPipeline,) if is_large else (DiffusionPipeline, AutoPipelineForText2Image):
            student = kind.from_pretrained(tmp_path / str(t))
            student.set_progress_bar_config(disable=True)
            assert type(student) is type(teacher)
            assert torch.equal(student(tiny.PROMPTS[:2], **call).images, x0)
    if is_large:
        return
    own = type(family.one_step(family.network, t)).from_pretrained(tmp_path / str(t))
    own.set_progress_bar_config(disable=True)
    given = {"latents": noise, "output_type": "latent"}
    assert torch.equal(own(tiny.PROMPTS[:2], **given).images, x0) and own.conditioning_timestep == t
    for wrong in ({"num_inference_steps": 2}, {"guidance_scale": 3}, {"timesteps": [5]}):
        with pytest.raises(ValueError, match="leave the argument out"):
            own("a", **wrong)
    deployed = family_of(student)
    images = student(tiny.PROMPTS[:2], **{**call, "output_type": "pt"}).images
    assert torch.equal(deployed.sample(student, deployed.arguments(tiny.PROMPTS[:2]), noise), images)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"in_channels": 8, "out_channels": 16}, "takes 8 channels, but its autoencoder makes 4"),
        ({"out_channels": 12}, "takes 4 channels and gives 12"),
        ({"caption_channels": 16}, "text embeddings of width 16, but its text encoder makes 32"),
        (
            {"use_additional_conditions": True},
            "told images' sizes, which its PixArtAlphaPipeline does not tell one of sam",
        ),
    ],
)
def test_parts_that_do_not_fit_are_told(config, message):
    with pytest.raises(ValueError, match=message):
        family_of(tiny.pixart(**config))


def test_it_is_made_for_one_size():
    family = family_of(tiny.pixart())
    with pytest.raises(ValueError, match="--resolution 32: the positions of this transformer are made for 16 pixels"):
        family.initial_generator(resolution=32)


def test_a_discriminator_looks_at_the_middle_block():
    family = family_of(tiny.pixart())
    inputs = noise_of(family), torch.tensor([3, 700]), family.encode(tiny.PROMPTS[:2])
    with torch.no_grad():
        features = bottleneck_features(family.score_model(), family.bottleneck(family.network), *inputs)
    assert features.shape == (2, 16, 24)


@pytest.mark.parametrize(
    ("name", "rank"),
    [
        ("alpha", 2),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("alpha", None), ("sigma", None), ("sigma", 2))),
    ],
)
def test_from_a_teacher_of_an_older_name_to_a_card_and_a_pushed_path(
    name, rank, tmp_path, repo, hub, prompts_file, monkeypatch, small_pictures, capsys
):
    """Published checkpoints of PixArt name a `Transformer2DModel`."""
    import train_disback

    teacher, where = tiny.pixart(**CASES[name]), tmp_path / "teacher"
    teacher.save_pretrained(where)
    for file, changes in (
        ("model_index.json", {"transformer": ["diffusers", "Transformer2DModel"]}),
        ("transformer/config.json", {"_class_name": "Transformer2DModel"}),
    ):
        content = json.loads((where / file).read_text())
        (where / file).write_text(json.dumps({**content, **changes}))
    flags = {"gradient_checkpointing": True, **({} if rank is None else {"lora_rank": rank})}
    push = {"push_to_hub": True, "hub_model_id": repo}
    train_disback.main(arguments(tmp_path / "run", where, prompts_file, **push, **flags))
    student = DiffusionPipeline.from_pretrained(repo)
    assert type(student) is type(teacher) and not equal(weights(student.transformer), weights(teacher.transformer))
    path = DegradationPath.from_pretrained(repo, teacher=ModelReference(str(where)))
    path.verify(path.local_teacher().meta_network())
    if rank is None:
        node = DiffusionPipeline.from_pretrained(repo, revision="degradation-000004")
        assert type(node) is type(teacher) and not equal(weights(node.transformer), weights(teacher.transformer))
    path.load(0, into=student.transformer)
    assert equal(weights(student.transformer), weights(teacher.transformer))
    replay = {"stage": "backtrack", "degradation_path": repo}
    train_disback.main(arguments(tmp_path / "again", where, prompts_file, **replay, **flags))
    one, two = (load_family(str(tmp_path / folder)).network for folder in ("run", "again"))
    assert equal(weights(one), weights(two))
    monkeypatch.chdir(tmp_path)
    card = hub.files(repo)["README.md"].decode()
    snippets = card.split("```python")[1:]
    assert len(snippets) == 2 and "load_lora" not in card, "no LoRA, which the stock pipeline would not load"
    for snippet in snippets:
        scope = {}
        exec(snippet.split("```")[0], scope)
        assert scope["image"].size == (16, 16)
    family = load_family(str(where))
    about_path = path_card(path.manifest, repo, {}, image=False, usage=type(family).usage)
    scope = {}
    exec(about_path.split("```python")[1].split("```")[0], scope)
    given = family.encode(tiny.PROMPTS[:1])
    noise = torch.randn(1, 4, 8, 8)
    networks = (scope["network"], teacher.transformer)
    outputs = [family.call(network, noise, torch.tensor([500]), given) for network in networks]
    assert not torch.equal(*outputs)
    assert command(["plan", "--pretrained_model_name_or_path", str(where)]) == 0
    assert "16 x 16 pixels" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["alpha", "sigma"])
def test_a_process_that_cannot_import_this_package_draws_the_same(
    name, tmp_path, prompts_file, repo, hub, small_pictures
):
    here, drawn = drawn_by_stock_classes_alone(family_of(tiny.pixart(**CASES[name])), tmp_path, prompts_file, repo)
    assert torch.equal(drawn["student"], here) and not torch.equal(drawn["node"], here)


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"lora_rank": 2}])
@pytest.mark.parametrize("name", ["alpha", "sigma"])
def test_a_resumed_run_ends_where_an_unbroken_one_does(name, more, tmp_path, prompts_file, small_pictures):
    import train_disback

    tiny.pixart(**CASES[name]).save_pretrained(tmp_path / "teacher")
    steps = {"num_path_nodes": 1, "steps_per_target": 1, "checkpointing_steps": 1, **more}
    for folder, flags in (
        ("whole", {}),
        ("half", {"max_train_steps": 2}),
        ("half", {"resume_from_checkpoint": "latest"}),
    ):
        train_disback.main(arguments(tmp_path / folder, tmp_path / "teacher", prompts_file, **steps, **flags))
    one, two = (load_family(str(tmp_path / folder)).network for folder in ("whole", "half"))
    assert equal(weights(one), weights(two))


XL = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "cross_attention_dim": 1152}
SIZES = {  # of the published configs
    "PixArt-alpha XL 2 512": {**XL, "sample_size": 64, "caption_channels": 4096},
    "PixArt-alpha XL 2 1024": {**XL, "sample_size": 128, "caption_channels": 4096},
    "PixArt-Sigma XL 2 1024": {
        **XL, "sample_size": 128, "caption_channels": 4096, "interpolation_scale": 2, "use_additional_conditions": False
    },
}  # fmt: skip
COUNTS = {  # of parameters and tensors
    "PixArt-alpha XL 2 512": (610_856_096, 603),
    "PixArt-alpha XL 2 1024": (611_349_152, 611),
    "PixArt-Sigma XL 2 1024": (610_856_096, 603),
}


@pytest.mark.parametrize("name", SIZES)
def test_full_size_networks_are_counted(name):
    with torch.device("meta"):
        network = PixArtTransformer2DModel(**SIZES[name])
    assert (sum(each.numel() for each in network.parameters()), len(network.state_dict())) == COUNTS[name]
