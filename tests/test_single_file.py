"""Checkpoints in one file, written in the original layout from tiny pipelines."""

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path

import original_layout
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from script import student
from stages import equal, weights
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffusers_disback import DegradationPath, DisBackOneStepPipeline, ModelReference, load_family
from diffusers_disback.commands.cli import main as command
from diffusers_disback.families import FAMILIES, family_of, network_name_of
from diffusers_disback.models import single_file
from diffusers_disback.models.original_layout import SUPPORTED, not_in_config, settings_in
from diffusers_disback.models.single_file import SingleFile, repo_of, single_file_of


def encoder_config(pipe, **changes) -> CLIPTextConfig:
    return CLIPTextConfig(**{**pipe.text_encoder.config.to_dict(), **changes})


def pipeline_2(**unet_config):
    """As SD 2.x is known by: text embeddings of 1,024 numbers, from the UNet's first block on."""
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 2, "cross_attention_dim": 1024, "use_linear_projection": True}  # fmt: skip
    pipe = tiny.pipeline("v_prediction", **blocks, **unet_config)
    pipe.text_encoder = CLIPTextModel(encoder_config(pipe, hidden_size=1024, num_hidden_layers=1)).eval()
    return pipe


def pipeline_xl(**unet_config):
    """As SDXL is known by: a second text encoder of ten layers or more, of another width than the first."""
    pipe = tiny.pipeline_xl(cross_attention_dim=80, projection_class_embeddings_input_dim=96, **unet_config)
    config = encoder_config(pipe, hidden_size=48, num_hidden_layers=10, projection_dim=48)
    pipe.text_encoder_2 = CLIPTextModelWithProjection(config).eval()
    return pipe


PIPELINES = {"v1": tiny.pipeline, "v2": pipeline_2, "xl_base": pipeline_xl}


@pytest.fixture
def checkpoint(tmp_path):
    """Writes a pipeline of a kind, its single file and, without weights, its config."""

    def checkpoint(kind, dtype=torch.float32, **changes):
        pipe = PIPELINES[kind]().to(dtype=dtype)
        pipe.save_pretrained(tmp_path / "config")
        for file in (tmp_path / "config").rglob("*.safetensors"):
            file.unlink()
        return pipe, original_layout.write(pipe, kind, tmp_path / "model.safetensors", **changes)

    return checkpoint


def flags(tmp_path, file):
    return {"pretrained_model_name_or_path": file, "single_file_config": tmp_path / "config"}


def reference(tmp_path, file) -> ModelReference:
    return ModelReference(str(file), single_file_config=str(tmp_path / "config"))


def test_what_is_supported_has_a_family():
    """Of transformers none is read."""
    kinds = [family for family in FAMILIES.values() if family.takes_prompts and family.network_name == "unet"]
    assert set(SUPPORTED.values()) == {name for family in kinds for name in family.pipeline_classes}
    assert PIPELINES.keys() == SUPPORTED.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("kind", PIPELINES)
def test_a_file_is_the_pipeline_that_it_was_made_of(checkpoint, kind, dtype, tmp_path):
    pipe, file = checkpoint(kind, dtype)
    family = load_family(reference(tmp_path, file), str(tmp_path / "cache"))
    assert type(family.pipeline) is type(pipe)
    for name, component in pipe.to(dtype=torch.float32).components.items():
        if isinstance(component, torch.nn.Module):
            assert equal(weights(family.pipeline.components[name]), weights(component)), name
    call = {"latents": torch.randn(2, 4, 8, 8), "num_inference_steps": 2, "output_type": "pt"}
    family.pipeline.set_progress_bar_config(disable=True)
    family_of(pipe)  # it wants no gradients: where they are wanted, torch multiplies matrices in another order
    drawn = [p(tiny.PROMPTS[:2], generator=torch.manual_seed(0), **call).images for p in (family.pipeline, pipe)]
    assert torch.equal(*drawn)
    (folder,) = (path for path in (tmp_path / "cache" / "single_files").iterdir() if path.is_dir())
    stored = {key: value for part in folder.rglob("*.safetensors") for key, value in load_file(part).items()}
    assert all(value.dtype == dtype for value in stored.values() if value.is_floating_point())
    encoder = load_file(folder / "text_encoder" / "model.safetensors")
    assert all(key.startswith("text_model.") for key in encoder) and (folder / "tokenizer" / "merges.txt").exists()
    assert json.loads((folder / "text_encoder" / "config.json").read_text())["dtype"] == "float32"
    stock = DiffusionPipeline.from_pretrained(folder)
    assert equal(weights(stock.unet), weights(pipe.unet)) and stock.text_encoder.dtype == torch.float32


@pytest.mark.parametrize("kind", ["v1", *(pytest.param(k, marks=pytest.mark.slow) for k in ("v2", "xl_base"))])
def test_a_file_is_distilled_as_its_folder_is(checkpoint, run, kind, tmp_path):
    """Both stages by the script; the path's nodes and the student load stock, and the path knows its teacher."""
    pipe, file = checkpoint(kind)
    pipe.save_pretrained(tmp_path / "folder")
    cache = {"cache_dir": tmp_path / "cache"}
    folder = run("a", **flags(tmp_path, file), **cache)
    assert equal(student(folder), student(run("b", pretrained_model_name_or_path=tmp_path / "folder")))
    own, stock = DisBackOneStepPipeline.from_pretrained(folder), DiffusionPipeline.from_pretrained(folder)
    assert type(stock) is type(pipe) and equal(weights(stock.text_encoder), weights(pipe.text_encoder))
    call = {"latents": torch.randn(1, 4, 8, 8), "output_type": "pt"}
    one = own(tiny.PROMPTS[0], **call).images
    assert torch.equal(stock(tiny.PROMPTS[0], num_inference_steps=1, guidance_scale=0, **call).images, one)
    teacher = json.loads((folder / "path" / "path.json").read_text())["teacher"]
    assert teacher["name_or_path"] == str(file) and teacher["single_file_config"] == str(tmp_path / "config")
    assert f"`{file.name}`" in (folder / "README.md").read_text()
    network = type(pipe.unet).from_config(pipe.unet.config)
    DegradationPath.from_pretrained(folder / "path", cache_dir=str(tmp_path / "cache")).load(0, into=network)
    assert equal(weights(network), weights(pipe.unet))
    assert len(list((tmp_path / "cache" / "single_files").glob("*/"))) == 1, "it was converted once"


def test_commands_take_a_file(checkpoint, run, capsys, tmp_path):
    _, file = checkpoint("v1")
    cache = {"cache_dir": tmp_path / "cache"}
    folder = run(**flags(tmp_path, file), **cache, generator_learning_rate=1e-2)
    teacher = [str(file), "--single_file_config", str(tmp_path / "config"), "--cache_dir", str(tmp_path / "cache")]
    lines = [
        ["extract-lora", str(folder), teacher[0], str(tmp_path / "lora"), "--rank", "2", *teacher[1:]],
        ["timestep-sweep", *teacher, "--timesteps", "399", "--num_inference_steps", "1", "--num_images_per_prompt", "1",
            "--output", str(tmp_path / "sweep.png")],
        ["path", "show", str(folder / "path"), "--output", str(tmp_path / "path.png"), "--num_inference_steps", "1",
            *teacher[3:]],
        ["path", "verify", str(folder / "path"), "--pretrained_model_name_or_path", *teacher],
        ["half", str(folder)],
    ]  # fmt: skip
    for line in lines:
        assert command(line) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "rank 2: leaves" in out and f"teacher: {file}" in out and "whole, and fits the teacher" in out
    assert (tmp_path / "path.png").exists() and (tmp_path / "sweep.json").exists()


@pytest.mark.slow
def test_a_start_may_be_a_file(checkpoint, run, tmp_path):
    pipe, file = checkpoint("v1")
    pipe.save_pretrained(tmp_path / "folder")
    teacher = {"pretrained_model_name_or_path": tiny.save_teacher(tmp_path / "teacher", seed=3)}
    start = {"generator_model_name_or_path": file, "single_file_config": tmp_path / "config"}
    expected = student(run("b", **teacher, generator_model_name_or_path=tmp_path / "folder"))
    assert equal(student(run("a", **teacher, **start)), expected)


def test_a_conversion_that_was_broken_off_is_done_again(checkpoint, tmp_path, monkeypatch):
    pipe, file = checkpoint("v1")
    arguments = (SingleFile(str(file)), str(file), str(tmp_path / "config"), None, str(tmp_path / "cache"))

    def broken_off(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(single_file, "write_json", broken_off)
        with pytest.raises(KeyboardInterrupt):
            single_file.to_folder(*arguments)
    assert not [
        path for path in (tmp_path / "cache" / "single_files").iterdir() if path.suffix not in (".draft", ".lock")
    ]
    folder = single_file.to_folder(*arguments)
    assert not list(folder.parent.glob("*.draft"))
    assert equal(weights(DiffusionPipeline.from_pretrained(folder).unet), weights(pipe.unet))
    before = {part: part.stat().st_mtime_ns for part in folder.rglob("*")}
    assert single_file.to_folder(*arguments) == folder
    assert {part: part.stat().st_mtime_ns for part in folder.rglob("*")} == before, "it is found again"
    original_layout.write(tiny.pipeline(seed=8), "v1", file)
    assert single_file.to_folder(*arguments) != folder, "another file of that name is another model"


# What a file says of itself ------------------------------------------------------------------------------------------

V, EPSILON = {"modelspec.prediction_type": "v"}, {"modelspec.prediction_type": "epsilon"}
MARKS = [
    # kind, tensors, header, what is taken, what is told
    ("v1", ["v_pred"], {}, ("v_prediction", False), "prediction_type v_prediction"),
    ("xl_base", ["v_pred", "ztsnr"], {}, ("v_prediction", True), "v_prediction and rescale_betas_zero_snr True"),
    ("xl_base", ["ztsnr"], V, ("v_prediction", True), "v_prediction and rescale_betas_zero_snr True"),
    ("xl_base", [], {"modelspec.predict_key": "v"}, ("v_prediction", False), "prediction_type v_prediction"),
    ("xl_base", [], EPSILON, ("epsilon", False), None),
    ("xl_base", ["v_pred"], EPSILON, ("v_prediction", False), "has the marker v_pred, but its header says epsilon"),
    ("v2", [], {"modelspec.architecture": "stable-diffusion-v2-768-v"}, ("v_prediction", False), "v_prediction"),
    ("v2", [], {"modelspec.architecture": "stable-diffusion-v2-512"}, ("epsilon", False), None),
    ("v1", [], {"modelspec.architecture": "stable-diffusion-xl-v1-base"}, ("epsilon", False), "is built as a Stable"),
    (
        "v1",
        [],
        {"modelspec.prediction_type": "rectified flow"},
        ("epsilon", False),
        "'rectified flow', which is not kn",
    ),
    ("v1", [], {"ss_v_parameterization": "True"}, ("epsilon", False), None),
]


def test_what_a_file_says_of_itself(tmp_path, caplog):
    """By the markers and the header that other programs read; what its config says already is no matter."""
    tiny.pipeline().save_pretrained(tmp_path / "config")
    for kind, keys, header, (prediction_type, zero), told in MARKS:
        file = tmp_path / "model.safetensors"
        save_file({"x": torch.ones(1), **{key: torch.tensor([]) for key in keys}}, file, header)
        caplog.clear()
        said = not_in_config(settings_in(file, kind, "it"), tmp_path / "config", "it")
        expected = {"prediction_type": prediction_type, "rescale_betas_zero_snr": zero}
        assert said == {key: value for key, value in expected.items() if value not in ("epsilon", False)}, (
            keys,
            header,
        )
        assert (told in caplog.text) if told else not caplog.text, (keys, header)
    save_file({"edm_vpred.sigma_max": torch.tensor(120.0)}, tmp_path / "edm.safetensors")
    with pytest.raises(ValueError, match="says by its tensor edm_vpred.sigma_max that it is of EDM's noise levels"):
        settings_in(tmp_path / "edm.safetensors", "xl_base", "it")


def test_a_file_is_taken_at_its_word(checkpoint, tmp_path):
    """Over its config, and `--prediction_type` over it."""
    _, file = checkpoint("v1", v_pred=torch.tensor([]), ztsnr=torch.tensor([]))
    cache, where = str(tmp_path / "cache"), reference(tmp_path, file)
    for teacher, prediction_type in ((where, "v_prediction"), (replace(where, prediction_type="sample"), "sample")):
        schedule = load_family(teacher, cache).schedule
        assert schedule.prediction_type == prediction_type and schedule.alpha[-1] == 0
    stock = DiffusionPipeline.from_pretrained(where.resolve(network_name_of, cache).folder).scheduler.config
    assert stock.prediction_type == "v_prediction" and stock.rescale_betas_zero_snr
    plain = checkpoint("v1")[1].rename(tmp_path / "plain.safetensors")
    assert load_family(reference(tmp_path, plain), cache).schedule.prediction_type == "epsilon"


# Layouts ------------------------------------------------------------------------------------------------------------


def converted(tmp_path, file):
    """The folder's pipeline, in a cache of its own."""
    cache = tmp_path / f"cache-{len(list(tmp_path.iterdir()))}"
    folder = single_file.to_folder(SingleFile(str(file)), str(file), str(tmp_path / "config"), None, str(cache))
    assert sorted(path.suffix for path in folder.parent.iterdir()) == ["", ".lock"], "nothing else is left"
    return DiffusionPipeline.from_pretrained(folder)


def shortened(weights):
    """As some programs name CLIP's tensors."""
    return {key.replace(".transformer.text_model.", ".transformer."): value for key, value in weights.items()}


def modules(pipe):
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


BESIDE = {
    "v1": {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(16)[None],
        "cond_stage_model.logit_scale": torch.ones(()), "betas": torch.ones(1000), "log_one_minus_alphas": torch.ones(9),
        "embedding_manager.x": torch.ones(2), "mine": torch.ones(2, dtype=torch.int8),
        **{f"model_ema.diffusion_modelx{number}": torch.ones(2) for number in range(120)}},
    "v2": {"cond_stage_model.model.logit_scale": torch.ones(()), "cond_stage_model.model.attn_mask": torch.ones(16, 16),
        "cond_stage_model.model.text_projection": torch.ones(1024, 1024),
        "cond_stage_model.model.transformer.resblocks.1.mlp.c_fc.bias": torch.ones(32)},
    "xl_base": {"denoiser.sigmas": torch.ones(1000), "conditioner.embedders.1.model.logit_scale": torch.ones(()),
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(16.0)[None]},
}  # fmt: skip


@pytest.mark.parametrize("kind", ["v1", *(pytest.param(k, marks=pytest.mark.slow) for k in ("v2", "xl_base"))])
def test_every_layout_is_read_exactly(checkpoint, kind, tmp_path):
    """What stands beside the parts is passed over; short names, types of eight bits, and doubles that are floats are not."""
    pipe, file = checkpoint(kind)
    state = original_layout.state_dict(pipe, kind)
    expected = {name: weights(part) for name, part in modules(pipe).items()}
    exact = {"beside": {**state, **BESIDE[kind]}, "short names": shortened(state)}
    if kind == "v1":
        exact["doubles"] = {key: value.double() for key, value in state.items()}
    if kind == "v2":  # its text encoder in the layout of SD 1.x
        exact["clip"] = {
            **{key: value for key, value in state.items() if not key.startswith("cond_stage_model.")},
            **{
                k: v.clone()
                for k, v in original_layout.clip(pipe.text_encoder, "cond_stage_model.transformer.").items()
            },
        }
    for what, changed in exact.items():
        save_file(changed, file)
        for name, part in modules(converted(tmp_path, file)).items():
            assert equal(weights(part), expected[name]), (what, name)
    if kind != "v1":
        return
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        save_file({**{key: value.to(dtype) for key, value in state.items()}, "position_ids": torch.arange(3)}, file)
        for name, part in modules(converted(tmp_path, file)).items():
            rounded = {key: value.to(dtype).float() for key, value in expected[name].items()}
            assert equal(weights(part), rounded), (dtype, name)


@pytest.mark.parametrize(
    "changed, message",
    [
        (lambda state: {**state, "scaled_fp8": torch.ones(2).to(torch.float8_e4m3fn)}, "scales of quantised .*scaled_fp8"),
        (lambda state: {**state, "model.diffusion_model.x.scale_weight": torch.ones(1)}, "quantised weights .*scale_weight"),
        (lambda state: {key: value.to(torch.int8) for key, value in state.items()}, "as I8, which is not supported"),
        (lambda state: {key: value.double() * (1 + 1e-12) for key, value in state.items()}, "float64 that float32 has not"),
        (
            lambda state: {**state, "cond_stage_model.transformer.text_model.more.bias": torch.ones(3)},
            "its text_encoder has .* numbers, by the config it has",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_read_exactly_is_told(checkpoint, changed, message, tmp_path):
    pipe, file = checkpoint("v1")
    save_file(changed(original_layout.state_dict(pipe, "v1")), file)
    with pytest.raises(ValueError, match=message):
        converted(tmp_path, file)
    assert not [path for path in tmp_path.glob("cache*/single_files/*") if path.suffix not in (".lock", ".draft")]


def test_a_file_may_have_any_name(checkpoint, tmp_path):
    pipe, file = checkpoint("v1")
    for name in (
        "CAPITALS.SAFETENSORS",
        " a b#c%20d?é 模型.safetensors",
        "no.dots.v1.5.Safetensors",
        "-x.safetensors",
    ):
        file = file.rename(tmp_path / name)
        assert single_file_of(str(file)) == SingleFile(str(file))
        assert equal(weights(converted(tmp_path, file).unet), weights(pipe.unet)), name


def test_a_cache_that_cannot_be_written_to_is_read(checkpoint, tmp_path, monkeypatch):
    pipe, file = checkpoint("v1")
    arguments = (SingleFile(str(file)), str(file), str(tmp_path / "config"), None, str(tmp_path / "cache"))
    folder = single_file.to_folder(*arguments)

    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    with monkeypatch.context() as context:
        context.setattr("huggingface_hub.utils.WeakFileLock", refuse)
        context.setattr(Path, "mkdir", refuse)
        assert single_file.to_folder(*arguments) == folder
    with monkeypatch.context() as context:
        context.setattr("huggingface_hub.utils.WeakFileLock", refuse)
        with pytest.raises(
            ValueError, match="cannot be written to .*single_files .Read-only file system.*--cache_dir"
        ):
            single_file.to_folder(*arguments[:4], str(tmp_path / "other"))
    (tmp_path / "taken").write_text("a file in the folder's place")
    with pytest.raises(ValueError, match="cannot be written to .*taken.*--cache_dir"):
        single_file.to_folder(*arguments[:4], str(tmp_path / "taken"))


# On the Hub ---------------------------------------------------------------------------------------------------------


def test_names_of_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine.safetensors").touch()
    for name, expected in {
        "user/repo": None,
        "models": None,
        "models/mine.safetensors": SingleFile("models/mine.safetensors"),
        "missing.safetensors": SingleFile("missing.safetensors"),
        "./a/b/missing.safetensors": SingleFile("./a/b/missing.safetensors"),
        "user/repo/file.safetensors": SingleFile("file.safetensors", "user/repo"),
        "user/repo/sub/file.ckpt": SingleFile("sub/file.ckpt", "user/repo"),
        "https://huggingface.co/u/r/blob/main/a.safetensors": SingleFile("a.safetensors", "u/r", "main"),
        "https://huggingface.co/u/r/resolve/refs%2Fpr%2F1/s/a%20b.safetensors?download=true": SingleFile(
            "s/a b.safetensors", "u/r", "refs/pr/1"
        ),
        "hf.co/u/r/blob/v1/a.safetensors": SingleFile("a.safetensors", "u/r", "v1"),
    }.items():
        assert single_file_of(name) == expected, name
        assert repo_of(name) == ("user/repo" if name == "user/repo" else expected and expected.repo_id), name


@pytest.mark.parametrize(
    "form",
    [
        pytest.param("{}/sub/model.safetensors", marks=pytest.mark.slow),
        "https://huggingface.co/{}/blob/main/sub/model.safetensors",
    ],
)
def test_a_file_on_the_hub(checkpoint, run, repo, hub, form, tmp_path):
    from huggingface_hub import HfApi

    pipe, file = checkpoint("v1")
    (tmp_path / "up" / "sub").mkdir(parents=True)
    shutil.move(file, tmp_path / "up" / "sub" / "model.safetensors")
    (tmp_path / "up" / "README.md").write_text("---\nlicense: openrail\n---\nA fine-tune.\n")
    (tmp_path / "up" / "LICENSE").write_text("Be kind.\n")
    api, config = HfApi(), f"{repo}-config"
    for name, folder in ((f"{repo}-teacher", tmp_path / "up"), (config, tmp_path / "config")):
        api.create_repo(name, private=name != config)
        api.upload_folder(repo_id=name, folder_path=folder)
    name = form.format(f"{repo}-teacher")
    common = {"pretrained_model_name_or_path": name, "single_file_config": config, "cache_dir": tmp_path / "cache"}
    folder = run(**common, push_to_hub=True, hub_model_id=repo, hub_private_repo=True)
    assert equal(weights(DiffusionPipeline.from_pretrained(folder).text_encoder), weights(pipe.text_encoder))
    assert (folder / "LICENSE").read_text() == "Be kind.\n"
    card = (folder / "README.md").read_text()
    assert "license: openrail" in card and f"base_model: {repo}-teacher" in card and name in card
    teacher = json.loads((folder / "path" / "path.json").read_text())["teacher"]
    assert teacher["commit"] == api.model_info(f"{repo}-teacher").sha
    node = DiffusionPipeline.from_pretrained(repo, revision="degradation-000002", cache_dir=tmp_path / "fresh")
    assert equal(weights(node.text_encoder), weights(pipe.text_encoder))
    assert command(["push", str(folder), f"{repo}-public", "--cache_dir", str(tmp_path / "cache")]) == 2, (
        "it is private"
    )
    with pytest.raises(ValueError, match="has no file other.safetensors at main"):
        run("b", **{**common, "pretrained_model_name_or_path": f"{repo}-teacher/other.safetensors"})


# What is refused ----------------------------------------------------------------------------------------------------


def hollow(tmp_path, **shapes):
    save_file({key.replace("/", "."): torch.zeros(shape) for key, shape in shapes.items()}, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize(
    "shapes, message",
    [
        ({"joint_blocks/37/x_block/mlp/fc1/weight": (2, 2)}, "diffusers calls 'sd35_large'"),
        ({"double_blocks/0/img_attn/norm/key_norm/scale": (2,)}, "diffusers calls 'flux-schnell'"),
        ({"model/diffusion_model/head/modulation": (1,), "model/diffusion_model/patch_embedding/weight": (1536, 1)},
            "diffusers calls 'wan-t2v-1.3B'"),
        ({"model/diffusion_model/input_blocks/0/0/weight": (4, 9, 3, 3)}, "diffusers calls 'inpainting'"),
        ({"model/diffusion_model/input_blocks/0/0/weight": (4, 8, 3, 3)}, "diffusers calls 'instruct-pix2pix'"),
        ({"conditioner/embedders/0/model/transformer/resblocks/9/mlp/c_proj/bias": (2,)}, "calls 'xl_refiner'"),
        ({"edm_mean": (4,)}, "diffusers calls 'playground-v2-5'"),
        ({"model/diffusion_model/input_blocks/1/0/time_stack/in_layers/0/weight": (2,)}, "is a model for video"),
        ({"lora_unet_mid_block/lora_down/weight": (2, 2)}, "is a LoRA; pass it with --teacher_lora"),
        ({"unet/mid_block/to_q/lora_A/weight": (2, 2)}, "is a LoRA; pass it with --teacher_lora"),
        ({"first_stage_model/decoder/conv_in/weight": (2, 2)}, "holds only autoencoder"),
        ({"model/diffusion_model/out/2/weight": (2, 2)}, "holds only UNet"),
        ({"decoder/conv_in/weight": (2, 2)}, "holds none of a checkpoint's parts .* is an autoencoder alone: pass it"),
        ({"input_blocks/0/0/weight": (4, 4, 3, 3)}, "is a UNet alone, without the prefix model.diffusion_model"),
        ({"down_blocks/0/resnets/0/conv1/weight": (2, 2)}, "a UNet alone, in the layout of diffusers: put it into a copy"),
        ({"text_model/embeddings/token_embedding/weight": (2, 2)}, "is a text encoder alone: put it"),
        ({"unet/mid_block/x/weight": (2,)}, "rename unet"),
        ({"diffusion_model/out/2/weight": (2, 2), "first_stage_model/decoder/conv_in/weight": (2, 2),
            "cond_stage_model/transformer/text_model/final_layer_norm/bias": (2,)}, "rename it to model.diffusion_model"),
        ({"model/diffusion_model/out/2/weight": (2, 2), "cond_stage_model/x": (2,)}, "Its autoencoder is missing"),
        ({"model/diffusion_model/out/2/weight": (2, 2), "first_stage_model/x": (2,)}, "Its text encoder is missing"),
        ({"cond_stage_model/x": (2, 2), "first_stage_model/x": (2,)}, "Its UNet is missing, whose"),
        ({"model/diffusion_model/x": (2,), "first_stage_model/x": (2,), "conditioner/embedders/0/x": (2,)},
            "of SDXL without its second text encoder"),
        ({"model/diffusion_model/x": (2,), "first_stage_model/x": (2,),
            "conditioner/embedders/1/model/transformer/resblocks/9/mlp/c_proj/bias": (2,)},
            "of SDXL without its first text encoder"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value.split()[-1].strip("'"),
)  # fmt: skip
def test_files_of_other_models_are_told(tmp_path, shapes, message):
    file = hollow(tmp_path, **shapes)
    with pytest.raises(ValueError, match=message) as caught:
        load_family(ModelReference(str(file)))
    assert "Supported are whole checkpoints of Stable Diffusion 1.x, 2.x and SDXL base" in str(caught.value)


def test_files_that_cannot_be_read_are_told(checkpoint, run, tmp_path):
    pipe, file = checkpoint("v1")
    torch.save({}, tmp_path / "model.ckpt")
    (tmp_path / "half.safetensors").write_bytes(file.read_bytes()[:5000])
    pipeline_xl().save_pretrained(tmp_path / "xl")
    tiny.pipeline(block_out_channels=(8, 24)).save_pretrained(tmp_path / "wide")
    tiny.pipeline(layers_per_block=2).save_pretrained(tmp_path / "deep")
    wide = "does not fit the config in .* Pass that of a pipeline of its kind with --single_file_config"
    for changes, message in [
        ({"pretrained_model_name_or_path": tmp_path / "model.ckpt"}, "Pickled checkpoints .* can run code"),
        ({"pretrained_model_name_or_path": tmp_path / "none.safetensors"}, "There is no file .*none.safetensors"),
        ({"pretrained_model_name_or_path": tmp_path / "half.safetensors"}, "it is no whole safetensors file"),
        ({"single_file_config": tmp_path}, "has no model_index.json"),
        ({"single_file_config": "nobody/nothing"}, "cannot be had from nobody/nothing. Pass the folder or Hub id"),
        ({"single_file_config": None}, "cannot be had from stable-diffusion-v1-5/stable-diffusion-v1-5"),
        (
            {"single_file_config": tmp_path / "xl"},
            "checkpoint of a StableDiffusionPipeline, but the config .*XLPipeline",
        ),
        ({"single_file_config": tmp_path / "wide"}, wide),
        ({"single_file_config": tmp_path / "deep"}, wide),
        ({"variant": "fp16"}, "is one file, which has no variants"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(**{**flags(tmp_path, file), "cache_dir": tmp_path / "cache", **changes})
    assert not (tmp_path / "run").exists()
    assert not [path for path in (tmp_path / "cache").glob("single_files/*") if path.suffix != ".lock"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model.diffusion_model.out.2.bias": None}, "its unet has .* numbers, by the config it has"),
        (
            {"model.diffusion_model.input_blocks.9.0.op.bias": torch.zeros(3)},
            "its unet has .* numbers, by the config it has",
        ),
        ({"first_stage_model.quant_conv.bias": None}, "its vae has .* numbers"),
        ({"first_stage_model.decoder.more.bias": torch.zeros(3)}, "its vae has .* numbers"),
        (
            {"cond_stage_model.transformer.text_model.final_layer_norm.bias": None},
            "its text_encoder is without 1 of its tensors",
        ),
        ({"first_stage_model.loss.logvar": torch.zeros(1), "model_ema.decay": torch.zeros(1)}, None),
    ],
    ids=["missing", "left-over", "autoencoder", "left-over-there", "text-encoder", "of-training"],
)
def test_a_file_fits_its_config_exactly(checkpoint, changes, message, tmp_path):
    _, file = checkpoint("v1", **changes)
    if message is None:
        load_family(reference(tmp_path, file), str(tmp_path / "cache"))
        return
    with pytest.raises(ValueError, match=message):
        load_family(reference(tmp_path, file), str(tmp_path / "cache"))
