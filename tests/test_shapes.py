"""The embedded default: the data, the shipped teacher and its classifier."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from safetensors import safe_open

from diffusers_disback import Evaluation, ModelReference, load_family
from diffusers_disback.families import FAMILIES, family_of
from shapes import dataset
from shapes.evaluator import HERE, is_shapes_teacher, shapes_prompts


TEACHER = HERE / "teacher"


def test_a_picture_is_a_function_of_its_numbers():
    one, two, other = (np.asarray(dataset.example(i, seed)[0]) for i, seed in ((3, 0), (3, 0), (3, 1)))
    assert (one == two).all() and (one != other).any()
    assert one.shape == (64, 64, 3)


def test_captions_say_what_is_drawn():
    assert len(dataset.SHAPES) >= 3 and len(dataset.COLOURS) >= 6 and len(dataset.BACKGROUNDS) >= 4
    assert len(set(dataset.CAPTIONS)) == 96
    assert str(dataset.Scene("circle", "red", "navy")) == "a red circle on a navy background"
    assert str(dataset.Scene("star", "orange", "gray")) == "an orange star on a gray background"
    rng = np.random.default_rng(0)
    for scene in dataset.SCENES:
        image = np.asarray(dataset.draw(scene, rng)).reshape(-1, 3).astype(int)
        for tone, share in ((dataset.COLOURS[scene.colour], 0.03), (dataset.BACKGROUNDS[scene.background], 0.4)):
            assert (np.abs(image - tone).max(1) <= 8).mean() > share, scene


def test_edges_are_anti_aliased():
    image = np.asarray(dataset.draw(dataset.Scene("circle", "red", "black"), np.random.default_rng(0)))
    assert len(np.unique(image[..., 0])) > 4


def test_the_data_as_a_data_set():
    rows = dataset.shapes_dataset(3, seed=5)
    assert rows.column_names == ["image", "text"]
    image, scene = dataset.example(1, 5)
    assert rows[1]["text"] == str(scene) and (np.asarray(rows[1]["image"]) == np.asarray(image)).all()


def test_the_data_as_an_image_folder(tmp_path):
    from datasets import load_dataset

    dataset.write_image_folder(tmp_path / "images", 3, seed=5)
    rows = load_dataset("imagefolder", data_dir=str(tmp_path / "images"), split="train", cache_dir=str(tmp_path))
    assert rows["text"][:] == [str(dataset.example(i, 5)[1]) for i in range(3)]


def test_the_prompts_are_the_captions():
    assert (HERE / "prompts.txt").read_text().splitlines() == list(dataset.CAPTIONS)


def test_the_teacher_is_small_and_in_half_precision():
    files = [file for folder in (TEACHER, HERE / "classifier") for file in folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 8 * 2**20
    for file in files:
        assert file.suffix in (".safetensors", ".json", ".txt", ".md", ".png"), file
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as weights:
                assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"F16"}  # noqa: SIM118


def test_the_teacher_is_an_ordinary_pipeline():
    pipe = StableDiffusionPipeline.from_pretrained(TEACHER)
    assert pipe.unet.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == torch.float32
    scheduler = pipe.scheduler
    assert isinstance(scheduler, DDPMScheduler) and scheduler.config.prediction_type == "epsilon"
    assert scheduler.config.beta_schedule == "scaled_linear" and scheduler.config.num_train_timesteps == 1000
    assert scheduler.config.clip_sample is False
    assert pipe.unet.config.sample_size == 8 and pipe.vae_scale_factor == 8
    assert is_shapes_teacher(str(TEACHER)) and not is_shapes_teacher(str(HERE))


def test_older_transformers_can_read_the_teacher():
    with safe_open(TEACHER / "text_encoder" / "model.safetensors", "pt") as weights:
        assert all(key.startswith("text_model.") for key in weights.keys())  # noqa: SIM118
    assert (TEACHER / "tokenizer" / "vocab.json").exists() and (TEACHER / "tokenizer" / "merges.txt").exists()


def test_every_word_is_one_token():
    tokenizer = StableDiffusionPipeline.from_pretrained(TEACHER).tokenizer
    for caption in dataset.CAPTIONS:
        assert tokenizer.tokenize(caption) == [f"{word}</w>" for word in caption.split()]
    assert len(tokenizer(["a pink cow!"]).input_ids[0]) > 5, "unknown words are spelled"


def test_the_card_tells_the_measured_quality():
    quality = json.loads((TEACHER / "quality.json").read_text())
    for name in ("shape", "colour", "background"):
        assert quality["quality"]["real"][f"{name}_accuracy"] >= 0.99
        assert quality["quality"]["reconstructed"][f"{name}_accuracy"] >= 0.98
        assert quality["quality"]["teacher"][f"{name}_accuracy"] >= 0.97
    card = (TEACHER / "README.md").read_text()
    assert f"Its guidance scale is {quality['guidance_scale']:g}." in card
    assert f"{quality['quality']['teacher']['distance']:.4g}" in card


@pytest.mark.slow
def test_the_teacher_draws_what_it_is_told():
    """A hundred images; the whole measure is `python -m shapes.measure_teacher`."""
    from shapes.evaluator import ShapesEvaluator, load_classifier

    quality = json.loads((TEACHER / "quality.json").read_text())
    family = family_of(StableDiffusionPipeline.from_pretrained(TEACHER))
    evaluation = Evaluation(shapes_prompts(100))
    drawn, _ = evaluation.sample(
        family, family.sampler(), num_inference_steps=25, guidance_scale=quality["guidance_scale"]
    )
    measures = ShapesEvaluator(load_classifier(), num_reference=100)(drawn, evaluation.prompts)
    accuracies = {name: value for name, value in measures.items() if name.endswith("_accuracy")}
    assert all(value >= 0.92 for value in accuracies.values()), accuracies


def test_a_collapsed_generator_rings_the_diversity_alarm_and_real_images_do_not():
    from diffusers_disback.training.alarms import alarms
    from shapes.evaluator import ShapesEvaluator, held_out, load_classifier

    evaluator = ShapesEvaluator(load_classifier(), num_reference=100)
    images, captions = held_out(400)
    first = {caption: images[captions.index(caption)] for caption in captions}
    collapsed = torch.stack([first[caption] for caption in captions])
    teacher, real, alike = (evaluator(shown, captions) for shown in (images.flip(3), images, collapsed))
    assert alike["shape_accuracy"] > 0.98, "each image by itself is right"
    assert alike["caption_diversity"] < 1e-6 < 0.9 * teacher["caption_diversity"] < real["caption_diversity"]
    for measures, ring in ((real, []), (alike, ["diversity"])):
        assert [*alarms([{"step": 1, "node": 0, **measures}], evaluator.metrics, teacher)] == ring


def test_making_a_teacher_resumes_exactly(tmp_path, monkeypatch):
    """The makers' loop gives the weights of an unbroken one wherever it ends: in a step, or while it saves."""
    from shapes import fit

    def make(name, break_at=None):
        def loss(model, step):
            if step == break_at:
                raise KeyboardInterrupt
            return (model(torch.full((1, 4), float(step % 7))) - 1).square().mean()

        (tmp_path / name).mkdir(exist_ok=True)
        torch.manual_seed(0)
        return fit.fit("part", torch.nn.Linear(4, 4), loss, 40, 1e-2, tmp_path / name, 0.9, save_every=10)

    whole = make("whole")
    with pytest.raises(KeyboardInterrupt):
        make("broken", break_at=25)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(fit, "save_file", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        make("broken")
    assert json.loads((tmp_path / "broken" / "part.json").read_text())["step"] == 20
    assert torch.equal(make("broken").weight, whole.weight)
    assert [folder.name for folder in (tmp_path / "broken").glob("part-*")] == ["part-40"]


OTHER_TEACHERS = {
    "stable_diffusion": ["--prediction_type", "v_prediction", "--zero_terminal_snr"],
    "stable_diffusion_xl": [],
    "stable_diffusion_3": [],
}


@pytest.mark.parametrize("family", OTHER_TEACHERS)
def test_teachers_of_other_kinds_are_made_from_flags(family, tmp_path):
    """The library takes them for what they are, and gives their networks the very arguments of their training."""
    from shapes.denoisers import KINDS
    from shapes.make_teacher import main

    sizes = ["--num_latents", "100", "--denoiser_steps", "2"]
    folders = ["--work_dir", str(tmp_path), "--output_dir", str(tmp_path)]
    main(["--denoiser_only", "--family", family, *OTHER_TEACHERS[family], *sizes, *folders])
    assert is_shapes_teacher(str(tmp_path / "teacher")) and not (tmp_path / "classifier").exists()

    teacher = load_family(ModelReference(str(tmp_path / "teacher")))
    assert type(teacher) is FAMILIES[family]
    predicts, first_spacing = {
        "stable_diffusion": ("v_prediction", "trailing"),
        "stable_diffusion_xl": ("epsilon", "leading"),
        "stable_diffusion_3": ("flow_prediction", None),
    }[family]
    assert teacher.schedule.prediction_type == predicts
    assert (teacher.schedule.alpha[-1] == 0) == (predicts != "epsilon")
    assert teacher.pipeline.scheduler.config.get("timestep_spacing") == first_spacing

    shipped = StableDiffusionPipeline.from_pretrained(TEACHER)
    for mine, theirs in zip(teacher.pipeline.vae.parameters(), shipped.vae.parameters(), strict=True):
        assert torch.equal(mine, theirs)

    prompts = ["", *dataset.CAPTIONS[:3]]
    tokens = teacher.pipeline.tokenizer(prompts, padding="max_length", return_tensors="pt")
    parts = teacher.pipeline.components.items()
    encoders = {name: part for name, part in parts if name.startswith("text_encoder") and part is not None}
    empty = torch.tensor([prompt == "" for prompt in prompts])
    arguments = KINDS[family].arguments(torch.nn.ModuleDict(encoders), tokens.input_ids, empty)
    arguments |= arguments.pop("added_cond_kwargs", {})
    condition = teacher.encode(prompts)
    assert arguments.keys() == condition.keys()
    for name, value in condition.items():
        assert torch.equal(value, arguments[name]), name
    networks = torch.nn.ModuleDict({**encoders, teacher.network_name: teacher.network})
    x_t, t = torch.randn(4, 4, 8, 8), torch.tensor([999, 500, 20, 0])
    with torch.no_grad():
        predicted = KINDS[family]().predict(networks, x_t, teacher.schedule.time_of(t), tokens.input_ids, empty)
        expected = teacher.call(teacher.network, x_t, teacher.schedule.time_of(t), condition)
    assert torch.allclose(predicted, expected, atol=1e-5)

    for name, encoder in encoders.items():
        folder = tmp_path / "teacher" / name
        with safe_open(folder / "model.safetensors", "pt") as weights:
            keys = set(weights.keys())
        prefixed = {key.removeprefix("text_model.") for key in keys if key.startswith("text_model.")}
        assert prefixed == {key.removeprefix("text_model.") for key in encoder.state_dict()} - {
            "text_projection.weight"
        }
        assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
        tokenizer = tmp_path / "teacher" / name.replace("text_encoder", "tokenizer")
        assert (tokenizer / "vocab.json").exists() and (tokenizer / "merges.txt").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--zero_terminal_snr"], "needs --prediction_type v_prediction or sample"),
        (["--denoiser_only"], "needs an --output_dir of its own"),
        (["--family", "stable_diffusion_3", "--prediction_type", "epsilon"], "is of flow matching"),
        (["--family", "sana"], "invalid choice"),
    ],
)
def test_teachers_that_cannot_be_made_are_refused(flags, says, tmp_path, capsys):
    from shapes.make_teacher import main

    with pytest.raises(SystemExit):
        main([*flags, "--work_dir", str(tmp_path / "work")])
    assert says in capsys.readouterr().err
    assert not (tmp_path / "work").exists()
