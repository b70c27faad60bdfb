"""Evaluators that compare images in the features of a network, with tiny networks of the real classes."""

import copy
import inspect
import json
import shutil

import numpy as np
import pytest
import scipy.linalg
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from diffusers_disback import DisBackConfig, DisBackTrainer
from diffusers_disback.evaluation import (
    EVALUATORS,
    DriftEvaluator,
    Evaluation,
    FeatureEvaluator,
    FrechetDistance,
    check_evaluators,
    make_evaluators,
    write_reference_statistics,
)
from diffusers_disback.evaluation.base import groups_of
from diffusers_disback.evaluation.feature_distance import FeatureStatistics, frechet_distance
from diffusers_disback.evaluation.networks import FeatureNetwork, FeatureNetworks
from diffusers_disback.evaluation.preprocessing import ImagePreprocessing
from shapes.denoisers import make_tokenizer


SIDE = 16  # of what the tiny networks take
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
PREPROCESSOR = {
    "do_resize": True,
    "size": {"shortest_edge": 20},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": SIDE, "width": SIDE},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.3, 0.25],
}
TO_TEACHER = ("fid_to_teacher", "kid_to_teacher", "patch_fid_to_teacher")
SCORES = ("clip_score", "pick_score", "hps_v2")


def saved(network, folder, **changes):
    """A network's folder, with a preprocessor's config."""
    for parameter in network.parameters():  # real ones have features of all sizes
        parameter.data.mul_(5)
    network.save_pretrained(folder)
    config = {key: value for key, value in (PREPROCESSOR | changes).items() if value is not None}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return folder


def save_dinov2(folder):
    torch.manual_seed(0)
    return saved(Dinov2Model(Dinov2Config(**SMALL, image_size=24)), folder)


def save_clip(folder):
    torch.manual_seed(1)
    tokenizer = make_tokenizer()
    text = {key: value for key, value in SMALL.items() if key != "patch_size"} | {
        "intermediate_size": 32,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {**SMALL, "intermediate_size": 32, "image_size": SIDE}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    model.logit_scale.data.fill_(0.5)
    saved(model, folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    return save_dinov2(tmp_path_factory.mktemp("networks") / "dinov2")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("networks") / "clip")


@pytest.fixture(scope="module")
def arguments(dinov2, clip, tmp_path_factory):
    """What makes every registered evaluator measure with tiny networks."""
    reference = write_images(images(7, 40), tmp_path_factory.mktemp("reference"))
    scores = {f"{name}_{part}": str(clip) for name in ("pick", "hps") for part in ("model", "processor")}
    return {
        "feature_model": str(dinov2),
        "clip_model": str(clip),
        "reference_images": str(reference),
        **scores,
    }


def make(name, arguments, **others):
    """One evaluator, with those of the arguments that it takes."""
    taken = inspect.signature(EVALUATORS[name]).parameters
    (made,) = make_evaluators([name], {key: value for key, value in (arguments | others).items() if key in taken})
    return made


def images(seed, count=24, shift=0.0, side=24):
    """Smooth ones of random colours: `[count, 3, side, side]`."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, side, mode="bilinear")
    return ((0.8 * smooth + shift).clamp(0, 1) * 255).to(torch.uint8)


def write_images(several, folder):
    folder.mkdir(exist_ok=True)
    for number, image in enumerate(several):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:03}.png")
    return folder


def prompts(count, of_each=2):
    return [f"{tiny.PROMPTS[row // of_each % 3]} {row // of_each}" for row in range(count)]


# Features ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("processor", "changes", "size"),
    [
        (CLIPImageProcessorPil, {}, (50, 40)),
        (CLIPImageProcessorPil, {"size": 20, "crop_size": SIDE, "do_rescale": None}, (13, 31)),
        (CLIPImageProcessorPil, {"size": {"height": 16, "width": 16}, "do_center_crop": False}, (64, 48)),
        (BitImageProcessorPil, {"resample": 2}, (33, 70)),
        (BitImageProcessorPil, {}, (20, 20)),
    ],
)
def test_images_are_taken_as_transformers_takes_them(processor, changes, size):
    """Pillow's weights are rounded: a level of 255 in few pixels."""
    config = {key: value for key, value in (PREPROCESSOR | changes).items() if value is not None}
    ours = ImagePreprocessing.of_config(config, "it")
    noise = torch.randint(0, 256, (3, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    theirs = processor(**config)([image.permute(1, 2, 0).numpy() for image in noise], return_tensors="pt")
    levels = (ours(noise) - theirs["pixel_values"]) * 255 * torch.tensor(PREPROCESSOR["image_std"])[:, None, None]
    assert ours(noise).shape == (3, 3, *ours.input_size) and ours(noise).dtype == torch.float32
    assert levels.abs().max() < 1.01 and levels.abs().mean() < 0.05


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"do_pad": True}, "asks for padding"),
        ({"resample": 1}, "resizes by Pillow's method 1"),
        ({"size": {"shortest_edge": 0}}, r"size of it is 0, where a number of pixels in 1\.\.4096"),
        ({"size": {"height": 8}}, "size of it is None"),
        ({"crop_size": 21}, r"crops \(21, 21\) from images of \(20, 20\)"),
        ({"image_mean": None}, "image_mean of it has to be 3 numbers, but is None"),
        ({"image_std": [1, 0, 1]}, "image_std of it is not above 0"),
        ({"image_std": [1, float("nan"), 1]}, "image_std of it has to be 3 numbers"),
        ({"do_resize": False, "do_center_crop": False}, "brings images to no size"),
    ],
)
def test_a_preprocessor_that_is_something_else_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        ImagePreprocessing.of_config(PREPROCESSOR | changes, "it")


def test_a_patch_is_the_middle_at_full_resolution():
    taken = ImagePreprocessing.of_config(PREPROCESSOR | {"image_mean": [0] * 3, "image_std": [1] * 3}, "it")
    large, small = images(0, side=40), images(0, side=SIDE)
    assert torch.equal((taken.patch(large) * 255).round(), large[..., 12:28, 12:28].float())
    half = taken.patch(small)
    assert half.shape == (24, 3, SIDE, SIDE)
    assert (half.mean((2, 3)) * 255 - small[..., 4:12, 4:12].float().mean((2, 3))).abs().max() < 2, "half its side"
    assert not torch.allclose(taken.patch(images(0, side=24)), taken(images(0, side=24)))


def test_features_are_those_of_transformers(dinov2, clip, tmp_path):
    several = images(0, 5)
    network = FeatureNetwork(str(dinov2), batch_size=2)
    values = network.preprocessing(several)
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(dinov2)(values).pooler_output
    torch.testing.assert_close(network.image_features(several), expected, rtol=1e-4, atol=1e-4)
    assert network.num_features == 16 and network.commit is None and network.label == "dinov2"
    vision = {**SMALL, "intermediate_size": 32, "image_size": SIDE}
    others = {
        "clip_vision": CLIPVisionModel(CLIPVisionConfig(**vision)),
        "siglip": SiglipVisionModel(SiglipVisionConfig(**vision)),
    }
    for name, model in others.items():
        own = FeatureNetwork(str(saved(model, tmp_path / name)))
        with torch.no_grad():
            expected = model.eval()(pixel_values=values).pooler_output
        torch.testing.assert_close(own.image_features(several), expected, rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="has no text encoder; a clip is needed"):
            own.text_features(["a prompt"])


def test_features_of_the_same_images_are_computed_once(dinov2, monkeypatch):
    networks, several = FeatureNetworks(), images(0)
    network = networks.load(str(dinov2))
    assert networks.load(str(dinov2)) is network
    first = network.image_features(several)
    monkeypatch.setattr(network, "_embed", lambda *_: pytest.fail("computed again"))
    assert network.image_features(several) is first
    with pytest.raises(pytest.fail.Exception):
        network.image_features(several.clone())
    assert len(network._of_images) == 1, "features leave with their images"


def test_evaluators_share_networks(arguments):
    args = {key: value for key, value in arguments.items() if key in ("feature_model", "clip_model")}
    made = make_evaluators(["fid_to_teacher", "kid_to_teacher", "diversity", "clip_score"], args)
    assert len({id(one.network) for one in made[:3]}) == 1 and made[3].network is not made[0].network


# Measures ------------------------------------------------------------------------------------------------------------


def frechet(one, two):
    c1, c2 = np.cov(one, rowvar=False), np.cov(two, rowvar=False)
    root = scipy.linalg.sqrtm(c1 @ c2).real
    return ((one.mean(0) - two.mean(0)) ** 2).sum() + np.trace(c1 + c2 - 2 * root)


def kernel(one, two):
    def k(x, y):
        return (x @ y.T / x.shape[1] + 1) ** 3

    n, m = len(one), len(two)
    within = [(k(x, x).sum() - np.trace(k(x, x))) / (len(x) * (len(x) - 1)) for x in (one, two)]
    return sum(within) - 2 * k(one, two).sum() / (n * m)


@pytest.mark.parametrize(("name", "by_numpy"), zip(TO_TEACHER, (frechet, kernel, frechet), strict=True))
def test_distances_are_numpys(name, by_numpy, arguments):
    evaluator = make(name, arguments)
    teacher, student = images(0, 60), images(1, 50, shift=0.1)
    evaluator.prepare(teacher, prompts(60))
    one, two = (evaluator.features(each, []).double().numpy() for each in (student, teacher))
    assert evaluator(student, prompts(50))[name] == pytest.approx(by_numpy(one, two), rel=1e-6)
    assert evaluator(student, prompts(50)) == evaluator(student, prompts(50)), "it can be asked again"


def test_a_frechet_distance_of_fewer_images_than_features_is_exact():
    """Of points on two lines it is known: that of two normals in one dimension, and what is at right angles."""
    line = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None]
    one = torch.cat([line, torch.zeros(9, 49, dtype=torch.float64)], 1)
    std = line.std().item()
    for other, expected in ((3 * one + 0.5, 50 * 0.25 + (2 * std) ** 2), (one.roll(1, 1), 2 * std**2), (one, 0.0)):
        two = [FeatureStatistics.of_features(each) for each in (one, other)]
        assert frechet_distance(*two) == pytest.approx(expected, rel=1e-12, abs=1e-14)


def test_identical_sets(arguments):
    several = images(0, 10)
    for name in ("fid_to_teacher", "patch_fid_to_teacher"):
        evaluator = make(name, arguments)
        evaluator.prepare(several, prompts(10))
        scale = evaluator.features(several).double().var(0).sum().item()
        assert abs(evaluator(several, prompts(10))[name]) < 1e-9 * scale
    evaluator = make("kid_to_teacher", arguments)
    evaluator.prepare(several, prompts(10))
    value, features = evaluator(several, prompts(10))["kid_to_teacher"], evaluator.features(several).double().numpy()
    assert value == pytest.approx(kernel(features, features), rel=1e-9) and value < 0, "as the unbiased estimate is"


@pytest.mark.parametrize("name", [*TO_TEACHER, "fid"])
def test_a_worse_set_is_farther(name, arguments):
    evaluator = make(name, arguments)
    evaluator.prepare(images(7, 40), prompts(40))
    near, far, farther = (evaluator(images(1, 40, shift), prompts(40))[name] for shift in (0.0, 0.1, 0.3))
    collapsed = evaluator(images(1, 1).expand(40, -1, -1, -1), prompts(40))[name]
    assert near < far < farther and near < collapsed


def test_diversity(arguments):
    evaluator = make("diversity", arguments)
    said = prompts(24)
    evaluator.prepare(images(0), said)
    several = images(0)
    features = normalize(evaluator.network.image_features(several).double())
    pairs = [1 - features[row] @ features[row + 1] for row in range(0, 24, 2)]
    assert evaluator(several, said)["diversity"] == pytest.approx(torch.stack(pairs).mean().item(), rel=1e-6)
    collapsed = several[::2].repeat_interleave(2, 0)
    assert evaluator(collapsed, said)["diversity"] == pytest.approx(0, abs=1e-6)
    alike = ((several.float() + 3 * collapsed.float()) / 4).to(torch.uint8)
    assert 1e-6 < evaluator(alike, said)["diversity"] < evaluator(several, said)["diversity"]
    of_three = [*said[:21], "alone", "alone too", "alone as well"]  # a prompt with one image does not count
    assert evaluator(several, of_three)["diversity"] == pytest.approx(torch.stack(pairs[:10]).mean().item(), rel=1e-6)
    one_prompt = ["a"] * 3
    between = 1 - features[:3] @ features[:3].T
    assert evaluator(several[:3], one_prompt)["diversity"] == pytest.approx(between.sum().item() / 6, rel=1e-6)
    with pytest.raises(ValueError, match="no prompt has two: raise --num_validation_images to 2 or more"):
        evaluator.prepare(images(0), [str(row) for row in range(24)])
    with pytest.raises(ValueError, match="No prompt has two images"):
        evaluator(several[:2], ["a", "b"])


def test_scores_are_those_of_transformers(clip, arguments):
    said = [tiny.PROMPTS[0], "a blue star " * 20, tiny.PROMPTS[0], "an orange square"]
    several = images(0, 4, side=48)
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), make_tokenizer()
    values = FeatureNetwork(str(clip)).preprocessing(several)
    tokens = tokenizer(said, padding=True, truncation=True, return_tensors="pt")
    assert tokens["input_ids"].shape[1] == 16, "cut at the text encoder's length"
    with torch.no_grad():
        logits = model(**tokens, pixel_values=values).logits_per_image.diagonal()
    cosines = logits / model.logit_scale.exp().item()
    expected = {"clip_score": 100 * cosines.clamp_min(0), "pick_score": logits, "hps_v2": 100 * cosines}
    for name in SCORES:
        evaluator = make(name, arguments)
        torch.testing.assert_close(evaluator.features(several, said), expected[name], rtol=1e-4, atol=1e-4)
        assert evaluator(several, said)[name] == pytest.approx(expected[name].mean().item(), rel=1e-4, abs=1e-4)
    best = values_of_prompts(make("hps_v2", arguments), several, said)
    assert best.max(0).values.mean() > best.diagonal().mean() > best.min(0).values.mean()


def values_of_prompts(evaluator, several, said):
    """The score of each image (column) with each prompt (row)."""
    return torch.stack([evaluator.features(several, [prompt] * len(several)) for prompt in said])


def test_an_image_that_goes_with_another_prompt_scores_worse(arguments):
    """Each image with the prompt that it goes best with, and with that which it goes worst with."""
    several = images(3, 6)
    for name in SCORES:
        evaluator = make(name, arguments)
        scores = values_of_prompts(evaluator, several, tiny.PROMPTS)
        best, worst = ([tiny.PROMPTS[row] for row in each] for each in (scores.argmax(0), scores.argmin(0)))
        good, bad = evaluator(several, best)[name], evaluator(several, worst)[name]
        assert evaluator.metrics[name].is_worse(bad, good), name


@pytest.mark.parametrize("name", EVALUATORS)
def test_every_evaluator_gives_named_numbers_and_features_of_each_image(name, arguments):
    evaluator, said, several = make(name, arguments), prompts(24), images(1)
    evaluator.prepare(images(0), said)
    measures = evaluator(several, said)
    assert measures.keys() == evaluator.metrics.keys() and all(isinstance(value, float) for value in measures.values())
    for metric in evaluator.metrics.values():
        assert metric.label and metric.panel and metric.direction in ("higher", "lower", "zero")
        assert "/" not in metric.label, "where a folder lies is not told"
    assert isinstance(evaluator, FeatureEvaluator)
    features, order = evaluator.features(several, said), torch.randperm(24)
    assert len(features) == 24 and not features.requires_grad
    assert evaluator.measure(features, groups_of(said)) == measures
    shuffled = [said[row] for row in order]
    alone = torch.cat([evaluator.features(several[row : row + 1], said[row : row + 1]) for row in order])
    torch.testing.assert_close(alone, features[order], rtol=1e-4, atol=1e-4)
    assert evaluator.measure(features[order], groups_of(shuffled)) == pytest.approx(measures, rel=1e-6, abs=1e-9)


def test_ported_evaluators_have_the_numbers_that_they_had():
    reference, several = images(0, 60), images(1, 50, shift=0.1)
    drift = DriftEvaluator()
    drift.prepare(reference)
    values = [each.float() / 255 for each in (several, reference)]
    mean, std = ([each.mean((0, 2, 3)) for each in values], [each.std((0, 2, 3)) for each in values])
    saturation = [(each.amax(1) - each.amin(1)).mean() for each in values]
    assert drift(several) == pytest.approx(
        {
            "drift_mean": (mean[0] - mean[1]).abs().mean().item(),
            "drift_std": (std[0] - std[1]).abs().mean().item(),
            "drift_saturation": (saturation[0] - saturation[1]).item(),
        },
        abs=1e-6,
    )
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Means(torch.nn.Module):
        num_features = 3

        def forward(self, images):
            return images.mean((2, 3))

    theirs = FrechetInceptionDistance(Means(), normalize=True)
    theirs.update(reference.float() / 255, real=True)
    theirs.update(several.float() / 255, real=False)
    assert FrechetDistance(Means(), reference)(several)["distance"] == pytest.approx(theirs.compute().item(), rel=1e-6)


@pytest.mark.parametrize("name", [*TO_TEACHER, "fid"])
def test_one_image_has_no_distance(name, arguments):
    evaluator = make(name, arguments)
    if name != "fid":
        with pytest.raises(ValueError, match="needs two images at least, but has 1"):
            evaluator.prepare(images(0, 1), ["a"])
    evaluator.prepare(images(0), prompts(24))
    with pytest.raises(ValueError, match="needs two images at least, but has 1"):
        evaluator(images(0, 1), ["a"])


# Real images ---------------------------------------------------------------------------------------------------------


def test_reference_statistics_are_written_and_read(dinov2, clip, arguments, tmp_path):
    folder, file = write_images(images(7, 40), tmp_path / "images"), tmp_path / "statistics.safetensors"
    (folder / "more").mkdir()
    Image.new("RGB", (90, 31)).save(folder / "more" / "wide.JPG", "JPEG")
    Image.new("L", (17, 40)).save(folder / "grey.png")
    statistics = write_reference_statistics(folder, file, str(dinov2))
    tensors = load_file(file)
    assert {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()} == {
        "mean": (torch.float64, [16]),
        "covariance": (torch.float64, [16, 16]),
    }
    assert statistics.num_images == 42
    by_folder = make("fid", arguments, reference_images=str(folder))
    by_file = make("fid", arguments, reference_images=str(file))
    assert by_file.reference.num_images == by_folder.reference.num_images == 42
    assert by_file.metrics["fid"].label == "FID to 42 real images (dinov2)"
    values = [each(images(1), prompts(24))["fid"] for each in (by_folder, by_file)]
    assert values[0] == pytest.approx(values[1], rel=1e-9)
    with pytest.raises(ValueError, match="of features of dinov2, and not of clip .* the weights differ"):
        make("fid", arguments, reference_images=str(file), feature_model=str(clip))
    copied = shutil.copytree(dinov2, tmp_path / "renamed")
    assert make("fid", arguments, reference_images=str(file), feature_model=str(copied)), "its name does not count"
    other = json.dumps(PREPROCESSOR | {"resample": 2})
    (copied / "preprocessor_config.json").write_text(other)
    with pytest.raises(ValueError, match="the preprocessing differ"):
        make("fid", arguments, reference_images=str(file), feature_model=str(copied))


@pytest.fixture(scope="module")
def statistics_file(dinov2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("statistics")
    write_reference_statistics(write_images(images(7, 20), folder / "images"), folder / "it.safetensors", str(dinov2))
    return folder / "it.safetensors"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mean": None}, r"has to hold mean \[F\] and covariance \[F, F\], but holds"),
        ({"mean": torch.zeros(16)}, "has to hold float64 numbers"),
        ({"mean": torch.full((16,), torch.nan, dtype=torch.float64)}, "NaN or infinite"),
        ({"covariance": -torch.eye(16, dtype=torch.float64)}, "a covariance that is none"),
        ({"covariance": torch.eye(16, dtype=torch.float64).roll(1, 0)}, "a covariance that is none"),
        ({"num_images": "1"}, "says that it is of '1' images"),
        ({"num_images": "-5"}, "says that it is of '-5' images"),
        ({"weights": None}, "its metadata lack weights"),
        ({"mean": torch.zeros(4).double(), "covariance": torch.eye(4).double()}, "is of 4 features; .* has 16"),
    ],
)
def test_statistics_that_make_no_sense_are_refused(changes, words, statistics_file, arguments, tmp_path):
    from diffusers_disback.models.weights import metadata_of

    tensors, metadata = load_file(statistics_file), metadata_of(statistics_file)
    for key, value in changes.items():
        kind = metadata if key in metadata else tensors
        kind.pop(key)
        if value is not None:
            kind[key] = value
    save_file(tensors, tmp_path / "changed.safetensors", metadata)
    with pytest.raises(ValueError, match=words):
        make("fid", arguments, reference_images=str(tmp_path / "changed.safetensors"))


def test_reference_images_that_cannot_be_read_are_refused(arguments, dinov2, tmp_path):
    def refused(words):
        with pytest.raises(ValueError, match=f"--evaluators fid: .*{words}"):
            make("fid", arguments, reference_images=str(tmp_path))

    refused("holds 0 images")
    write_images(images(0, 3), tmp_path)
    (tmp_path / "bad.png").write_bytes(b"no image")
    refused("bad.png cannot be read")
    (tmp_path / "bad.png").unlink()
    (tmp_path / "link.png").symlink_to("/etc/passwd")
    refused("'link.png', a link that leads out of its folder")
    for name in ("nowhere", str(dinov2 / "config.json")):
        with pytest.raises(ValueError, match="is no folder of images, and no .safetensors file"):
            make("fid", arguments, reference_images=name)
    with pytest.raises(ValueError, match=r"Statistics are written as a \.safetensors file"):
        write_reference_statistics(tmp_path, tmp_path / "x.npz", str(dinov2))


# Networks that cannot be had -----------------------------------------------------------------------------------------


def refused(folder, words, kind="fid_to_teacher", key="feature_model"):
    with pytest.raises(ValueError, match=words) as caught:
        make_evaluators([kind], {key: str(folder)})
    assert str(caught.value).startswith(f"--evaluators {kind}: ") and "\n" not in str(caught.value)


def test_networks_that_cannot_be_loaded_are_refused(dinov2, tmp_path, caplog):
    folder = tmp_path / "network"

    def changed(change, words):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(dinov2, folder)
        change()
        refused(folder, words)

    def with_weights(change):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    def config(**changes):
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | changes))

    first = "layernorm.weight"
    changed(lambda: (folder / "config.json").unlink(), "has no config.json: it is no model of transformers")
    changed(lambda: (folder / "preprocessor_config.json").unlink(), "has no preprocessor_config.json, which says how")
    changed(lambda: (folder / "model.safetensors").unlink(), r"has no weights in safetensors \(model.safetensors\)\.$")
    changed(
        lambda: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        r"has no weights in safetensors .* pickled ones \(pytorch_model.bin\), which can run code",
    )
    changed(
        lambda: with_weights(lambda weights: weights.pop(first)),
        "does not fit its own config .*missing_keys.*layernorm",
    )
    changed(
        lambda: with_weights(lambda w: w.update(foreign=w[first].clone())), "does not fit .*unexpected_keys.*foreign"
    )
    changed(lambda: with_weights(lambda w: w.update({first: torch.ones(3)})), "Dinov2Model")
    changed(lambda: with_weights(lambda w: w[first].fill_(torch.nan)), "cannot be used: 16 of 16 .* are NaN")
    changed(lambda: (folder / "model.safetensors").write_bytes(b"garbage" * 9), "cannot be read")
    changed(lambda: (folder / "config.json").write_text("{"), "no valid JSON")
    changed(lambda: config(model_type="vit"), r"is a 'vit'. Features can be those of dinov2, clip, clip_vision_model")
    changed(lambda: config(auto_map={"AutoModel": "code.Model"}, model_type="mine"), "is a 'mine'")
    changed(lambda: config(weights_file="../../x"), "which is no place inside of its folder")
    changed(lambda: (folder / "adapter_config.json").write_text("{}"), "an adapter, for which other weights")
    changed(
        lambda: ((folder / "model.safetensors").unlink(), (folder / "model.safetensors").symlink_to("/etc/passwd")),
        "a link that leads out of its folder",
    )


def test_another_architecture_is_refused(tmp_path):
    saved(ViTModel(ViTConfig(**SMALL, intermediate_size=32, image_size=SIDE)), tmp_path / "vit")
    refused(tmp_path / "vit", "is a 'vit'")


def test_a_clip_that_does_not_fit_its_processor_is_refused(clip, tmp_path):
    folder = shutil.copytree(clip, tmp_path / "clip")
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR | {"crop_size": 8}))
    refused(folder, r"takes images of 16 pixels, but its preprocessor gives \(8, 8\)")
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": PREPROCESSOR}))
    assert make_evaluators(["clip_score"], {"clip_model": str(folder)}), "as transformers 5 writes it"
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor"}))
    refused(folder, "has no image_processor", "clip_score", "clip_model")
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": PREPROCESSOR}))
    (folder / "tokenizer.json").write_text("{}")
    refused(folder, "tokenizer of the feature network .* cannot be loaded", "clip_score", "clip_model")
    (folder / "tokenizer.json").unlink()
    refused(folder, "has no tokenizer.json, and no vocab.json with merges.txt", "clip_score", "clip_model")


def test_a_score_needs_a_text_encoder(dinov2):
    refused(dinov2, "is a dinov2, which has no text encoder; a clip is needed", "clip_score", "clip_model")


def test_networks_on_the_hub(alice, repo, dinov2, tmp_path, monkeypatch):
    from huggingface_hub import HfApi, constants

    refused("alice/nothing", "The Hub knows no alice/nothing")
    refused("./no/where", "is no name of a repository")
    api = HfApi()
    api.create_repo(repo)
    first = api.upload_folder(repo_id=repo, folder_path=dinov2).oid
    other = copy.deepcopy(PREPROCESSOR) | {"resample": 2}
    second = api.upload_file(
        repo_id=repo, path_or_fileobj=json.dumps(other).encode(), path_in_repo="preprocessor_config.json"
    ).oid
    cache = str(tmp_path / "cache")
    latest, pinned = (FeatureNetwork(name, cache_dir=cache) for name in (repo, f"{repo}@{first}"))
    assert (latest.commit, pinned.commit) == (second, first)
    assert (latest.preprocessing.mode, pinned.preprocessing.mode) == ("bilinear", "bicubic")
    assert latest.label == repo and pinned.label == f"{repo}@{first}"
    refused(f"{repo}@nothing", "has no such branch, tag or commit")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert FeatureNetwork(repo, cache_dir=cache).commit == second, "it is in the cache"
    refused("alice/nothing", "not in the cache, and HF_HUB_OFFLINE forbids to ask the Hub")


# By name -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "arguments", "words"),
    [
        (["drift"], {"feature_model": "x"}, "feature_model: no evaluator that was chosen takes it. drift takes none"),
        (
            ["pick_score", "diversity"],
            {"networks": "x"},
            "networks: no evaluator .* pick_score takes pick_model, pick_processor; diversity takes feature_model",
        ),
        (["fid"], {}, "--evaluators fid needs --evaluator_args reference_images=...; it has no default"),
        (["fid", "drift"], {"reference_images": 3}, "fid takes reference_images: str, but not 3"),
    ],
)
def test_arguments_that_are_not_taken_are_refused_before_anything_is_loaded(names, arguments, words):
    with pytest.raises(ValueError, match=words):
        check_evaluators(names, arguments)
    with pytest.raises(ValueError, match=words):
        DisBackTrainer("nowhere", DisBackConfig(evaluators=names, evaluator_args=arguments), ["a prompt"])


def test_an_evaluation_measures_by_name(arguments):
    evaluation = Evaluation(prompts(24))
    chosen = {key: arguments[key] for key in ("feature_model", "clip_model")}
    evaluation.add(["fid_to_teacher", "diversity", "clip_score"], chosen)
    evaluation.prepare(images(0))
    measures = evaluation.measure(images(1))
    assert measures.keys() == evaluation.metrics.keys() == {"fid_to_teacher", "diversity", "clip_score"}
    assert evaluation.metrics["clip_score"].label == "CLIP score (clip)"


def test_a_run_measures_by_name_and_keeps_the_best(run, arguments):
    """All that a user's own teacher is measured by, from flags to the report's intervals and the card's index."""
    names = ["kid_to_teacher", "diversity", "clip_score"]
    given = [f"{key}={arguments[key]}" for key in ("feature_model", "clip_model")]
    folder = run(
        evaluators=names,
        evaluator_args=given,
        num_validation_images=3,
        metric_for_best_model="kid_to_teacher",
        load_best_model_at_end=True,
    )
    report = json.loads((folder / "report.json").read_text())
    assert all(
        report[who][name] == pytest.approx(report[who][name]) for who in ("teacher", "student") for name in names
    )
    assert report["teacher"]["kid_to_teacher"] != 0, "the teacher is compared with other images of its own"
    assert report["intervals"]["student"].keys() == report["intervals"]["teacher"].keys() == set(names)
    assert report["best_model"]["is_student"] and report["best_model"]["metric"] == "kid_to_teacher"
    assert (folder / "best" / "best.json").is_file() and (folder / "status.json").is_file()
    card = (folder / "README.md").read_text()
    assert all(
        f"name: {label}" in card
        for label in ("KID to the teacher (dinov2)", "diversity (dinov2)", "CLIP score (clip)")
    )
