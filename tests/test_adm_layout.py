"""EDM checkpoints in OpenAI's layout, from a file of an independent network to a student in the stock pipeline."""

import json

import adm
import pytest
import torch
import train_disback
from diffusers import ConsistencyModelPipeline, EDMEulerScheduler, UNet2DModel
from safetensors.torch import save_file
from script import arguments

from diffusers_disback import ModelReference, OneStepGenerator, load_family
from diffusers_disback.commands.cli import main as command
from diffusers_disback.hub.files import sha256_of
from diffusers_disback.models.adm_layout import _config, read_checkpoint, to_unet


FLAGS = ["--resolution", "16", "--attention_head_dim", str(adm.HEAD)]
KINDS = {
    "imagenet": {"classes": 5},
    "lsun": {"scale_shift": False},
    "legacy": {"order": "legacy", "layers": 2},
}


def converted(network, **changes):
    return to_unet(network.state_dict(), "it", **{"resolution": 16, "attention_head_dim": adm.HEAD, **changes})


@pytest.fixture
def teacher(tmp_path):
    """The reference, and the folder that the command makes of its file."""
    network = adm.Adm(classes=5)
    torch.save(network.state_dict(), tmp_path / "edm_tiny_ema.pt")
    assert command(["convert-edm", str(tmp_path / "edm_tiny_ema.pt"), str(tmp_path / "teacher"), *FLAGS]) == 0
    return network, tmp_path / "teacher"


@pytest.mark.parametrize("kind", KINDS)
def test_the_converted_network_is_the_same_function(kind):
    how = KINDS[kind]
    network = adm.Adm(**how)
    unet = converted(network, attention_order=how.get("order", "new"))
    x = torch.randn(4, 3, 16, 16)
    labels = torch.tensor([0, 4, 2, 2]) if "classes" in how else None
    for sigma in (0.002, 0.3, 2.5, 80.0):
        time = 250 * torch.full((4,), sigma).log()
        with torch.no_grad():
            ours, theirs = unet(x, time, labels, return_dict=False)[0], network(x, time, labels)
            other = unet(x, time / 1000, labels, return_dict=False)[0]
        assert (ours - theirs).abs().max() < 1e-5 < 1e-3 < (other - theirs).abs().max(), "the time matters"
    wrong = converted(network, attention_order="new" if kind == "legacy" else "legacy")
    with torch.no_grad():
        assert (wrong(x, time, labels, return_dict=False)[0] - theirs).abs().max() > 1e-3, "the order matters"


@pytest.mark.parametrize(
    ("network", "resolution", "known"),
    [
        (
            {"classes": 1000, "layers": 3, "levels": (192, 384, 576, 768), "attending": 1},
            64,
            (1000, "scale_shift"),
        ),
        (
            {"layers": 2, "levels": (256, 256, 512, 512, 1024, 1024), "attending": 3, "scale_shift": False},
            256,
            (None, "default"),
        ),
    ],
    ids=["edm_imagenet64", "edm_cat256"],
)
def test_the_published_sizes_are_recognised(network, resolution, known):
    """As the flags in `scripts/launch.sh` of openai/consistency_models build them."""
    with torch.device("meta"):
        found = adm.Adm(**network)
        config = _config(found.state_dict(), "it", resolution, 64)
        unet = UNet2DModel(**config)
    assert config["block_out_channels"] == network["levels"] and config["layers_per_block"] == network["layers"]
    assert (config["num_class_embeds"], config["resnet_time_scale_shift"]) == known
    attends = [kind == "AttnDownBlock2D" for kind in config["down_block_types"]]
    assert attends == [level >= network["attending"] for level in range(len(attends))]
    counts = [sum(tensor.numel() for tensor in made.parameters()) for made in (found, unet)]
    assert counts[0] == counts[1]


def test_both_forms_of_a_file_and_half_precision(tmp_path):
    weights = {name: tensor.half() for name, tensor in adm.Adm().state_dict().items()}
    torch.save(weights, tmp_path / "it.pt")
    save_file(weights, tmp_path / "it.safetensors")
    one, two = (
        to_unet(read_checkpoint(tmp_path / name), name, 16, adm.HEAD).state_dict()
        for name in ("it.pt", "it.safetensors")
    )
    assert all(torch.equal(one[key], two[key]) and one[key].dtype == torch.float32 for key in one)
    assert sum(tensor.numel() for tensor in one.values()) == sum(tensor.numel() for tensor in weights.values())


def test_the_command_says_where_the_folder_comes_from(teacher, tmp_path, capsys):
    _, folder = teacher
    card = (folder / "README.md").read_text()
    assert "`edm_tiny_ema.pt`" in card and sha256_of(tmp_path / "edm_tiny_ema.pt") in card
    assert "--resolution 16 --attention_head_dim 16 --attention_order new" in card and str(tmp_path) not in card
    assert not (tmp_path / "teacher.draft").exists()
    assert command(["convert-edm", str(tmp_path / "edm_tiny_ema.pt"), str(folder), *FLAGS]) == 2
    assert "is not empty; nothing was written" in capsys.readouterr().err


def test_a_teacher_denoises_and_is_sampled_as_the_reference(teacher):
    network, folder = teacher
    family = load_family(str(folder))
    assert type(family).__name__ == "RescaledEdm" and family.conditions().captions == list("01234")
    noise, labels = torch.randn(2, 3, 16, 16), torch.tensor([1, 3])
    given, model = family.arguments(["1", "3"]), family.score_model()
    for t in (0, 499, 999):
        sigma = family.schedule.sigma[t].item()
        x_t = sigma * noise
        with torch.no_grad():
            x0 = model.denoise(x_t, torch.full((2,), t), given)
        assert (x0 - network.denoise(x_t, sigma, labels)).abs().max() < 1e-4 * max(1, sigma)
    ours = family.sample(family.sampler(), given, noise, 20)
    theirs = adm.euler(lambda x, sigma: network.denoise(x, sigma, labels), noise, 20)
    assert (ours - family.decode(theirs)).abs().max() < 1e-3
    assert ours.std() > 0.01, "images that are not clamped away"


def test_a_student_runs_in_the_stock_pipeline(teacher, tmp_path, small_pictures):
    """Distilled by the script, it is the generator bit for bit."""
    _, folder = teacher
    flags = {
        "prompts_file": None,
        "max_train_steps": 2,
        "degradation_steps": 2,
        "num_path_nodes": 1,
        "guidance_scale": 1,
    }
    train_disback.main(arguments(tmp_path / "run", folder, None, steps_per_target=1, **flags))
    student = ConsistencyModelPipeline.from_pretrained(tmp_path / "run")
    student.set_progress_bar_config(disable=True)
    family = load_family(str(folder))
    t = json.loads((tmp_path / "run" / "report.json").read_text())["settings"]["conditioning_timestep"]
    assert t == family.default_timestep() and abs(family.schedule.sigma[t] - 2.5) < 0.02
    noise = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        x0 = OneStepGenerator(family.score_model(student.unet), t)(noise, family.arguments(["1", "3"]))
    call = {"class_labels": [1, 3], "latents": noise, "output_type": "pt"}
    images = student(batch_size=2, num_inference_steps=1, **call).images
    assert torch.equal(images, family.decode(x0)) and torch.equal(images, student(batch_size=2, **call).images)
    assert not torch.equal(student.unet.conv_out.weight, family.network.conv_out.weight)


# What is refused -----------------------------------------------------------------------------------------------------


class Runs:
    """A pickle of it would make a folder."""

    def __init__(self, place):
        self.place = str(place)

    def __reduce__(self):
        import os

        return os.mkdir, (self.place,)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("edm.pkl", {}, "NVIDIA's checkpoints are pickles of classes, which run code .* with an EDMEulerScheduler"),
        ("it.pt", Runs, "Anything but tensors in it would run code, and is not read"),
        ("it.pt", b"not a pickle", "is no whole state dict of torch.save"),
        ("it.pt", {"model": {"a": torch.ones(1)}}, "holds a dict, and not dense tensors by their names alone"),
        ("it.pt", {"a": torch.ones(1).to_sparse()}, "holds a dict, and not dense tensors"),
        ("it.pt", torch.ones(1), "holds a Tensor, and not dense tensors"),
        ("it.safetensors", b"nothing", "is no whole safetensors file"),
        ("it.pt", b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
        ("it.pt", None, "There is no file"),
    ],
)
def test_files_that_are_refused(name, content, message, tmp_path, capsys):
    file = tmp_path / name
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(Runs(tmp_path / "ran") if content is Runs else content, file)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(file)
    assert not (tmp_path / "ran").exists()
    assert command(["convert-edm", str(file), str(tmp_path / "teacher"), *FLAGS]) == 2
    said = capsys.readouterr().err
    assert str(file) in said and said.count("\n") == 1 and not (tmp_path / "teacher").exists()


def without(name):
    return lambda weights: weights.pop(name)


def with_(name, *shape, **how):
    return lambda weights: weights.update({name: torch.zeros(*shape, **how)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("middle_block.1.qkv.bias"), r"1 tensors \(middle_block.1.qkv.bias\) missing, 0 tensors unexpected"),
        (without("out.2.weight"), "it has no tensor out.2.weight"),
        (without("input_blocks.1.0.out_layers.3.weight"), "it has no tensor input_blocks.1.0.out_layers.3.weight"),
        (with_("encoder.weight", 1), r"0 tensors missing, 1 tensors \(encoder.weight\) unexpected"),
        (
            with_("middle_block.1.qkv.weight", 96, 64, 1),
            r"\(middle_block.1.qkv.weight \(96, 64, 1\)\) of another shape",
        ),
        (with_("time_embed.0.weight", 128, 64), r"\(time_embed.0.weight \(128, 64\)\) of another shape"),
        (with_("out.2.weight", 6, 32, 3, 3), "takes 3 channels and gives 6: as of a learned variance"),
        (
            with_("input_blocks.2.0.op.weight", 1),
            r"by convolutions \(input_blocks.2.0.op.weight\), which is not supported",
        ),
        (with_("output_blocks.4.0.in_layers.0.weight", 1), "of 5 output blocks .1. double the resolution"),
        (with_("out.2.bias", 3, dtype=torch.int64), r"has 1 tensors \(out.2.bias\) in torch.int64"),
        (lambda weights: weights["out.2.bias"].fill_(float("nan")), "3 of 3 numbers of its weight out.2.bias are NaN"),
        (lambda weights: weights.clear(), "it is no ADM UNet|it has no tensor|double the resolution"),
    ],
)
def test_weights_that_are_refused(change, message):
    weights = dict(adm.Adm().state_dict())
    change(weights)
    with pytest.raises(ValueError, match=f"^it .*{message}"):
        to_unet(weights, "it", 16, adm.HEAD)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"resolution": 15}, "--resolution 15 cannot be halved 1 times"),
        (
            {"attention_head_dim": 48},
            "attends in .64. channels, which are not all divisible by --attention_head_dim 48",
        ),
        ({"attention_order": "old"}, "attention_order='old' is none of new, legacy"),
    ],
)
def test_flags_that_do_not_fit(given, message):
    with pytest.raises(ValueError, match=message):
        converted(adm.Adm(), **given)


def test_a_consistency_model_and_a_start_of_another_time_are_refused(teacher, tmp_path):
    _, folder = teacher
    file = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(file.read_text())
    pipe = ConsistencyModelPipeline.from_pretrained(folder)
    pipe.scheduler = EDMEulerScheduler()
    pipe.save_pretrained(tmp_path / "edm")
    start = ModelReference(str(tmp_path / "edm")).resolve_denoiser("unet")
    with pytest.raises(ValueError, match="says that it predicts edm, but the teacher predicts edm_rescaled_time"):
        load_family(str(folder)).initial_generator(start)
    for said in ("v_prediction", "epsilon"):
        with pytest.raises(ValueError, match="CMStochasticIterativeScheduler has no prediction_type"):
            load_family(ModelReference(str(folder), prediction_type=said))
    file.write_text(json.dumps({**config, "sigma_min": 0.002}))
    with pytest.raises(
        ValueError, match="has sigma_min=0.002: that is a consistency model, which was distilled already"
    ):
        load_family(str(folder))
