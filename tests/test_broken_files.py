"""Files of others that are broken, or say what cannot be: each is one of the project's own errors, and names the file."""

import contextlib
import copy
import json
import random
import shutil

import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import save_file
from test_doors import REPORT

from diffusers_disback.commands.cli import main as command
from diffusers_disback.commands.cli import parser
from diffusers_disback.commands.path import path_show
from diffusers_disback.evaluation.report import read_report
from diffusers_disback.families import load_family
from diffusers_disback.hub.cards import STABLE_DIFFUSION, path_card, student_card
from diffusers_disback.hub.publish.run import path_of_run, push_run
from diffusers_disback.models.adapters import config_of
from diffusers_disback.models.reference import ModelReference
from diffusers_disback.path.manifest import check_manifest
from diffusers_disback.path.path import DegradationPath


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 492265168\n".encode()
DEEP = b'{"a":' * 100_000
BROKEN = {
    "a pointer": (POINTER, "git lfs pull"),
    "cut off": (None, ""),
    "empty": (b"", ""),
    "nested": (DEEP, ""),
    "no text": (b"\xff\xfe" * 40, ""),
    "a list": (b"[1, 2]", ""),
}
FILES = [
    *(
        "model_index.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer.json",
        "tokenizer/tokenizer_config.json",
    ),
    *(f"{part}/config.json" for part in ("unet", "vae", "text_encoder")),
    *("unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"),
    "text_encoder/model.safetensors",
]


def test_a_teachers_broken_file_is_named(tmp_path, teacher_folder, capsys):
    folder = tmp_path / "teacher"
    shutil.copytree(teacher_folder, folder)
    for name in FILES:
        own = (folder / name).read_bytes()
        for kind, (content, words) in BROKEN.items():
            (folder / name).write_bytes(own[: len(own) // 2] if content is None else content)
            with pytest.raises(ValueError) as error:
                load_family(ModelReference(str(folder)))
            assert name.split("/")[-1] in str(error.value) and words in str(error.value), (
                f"{name}, {kind}: {error.value}"
            )
            if name.startswith("unet"):
                with pytest.raises(ValueError, match=name.split("/")[-1]):
                    ModelReference(str(folder)).resolve_denoiser("unet").load_network(UNet2DConditionModel)
        (folder / name).write_bytes(own)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(POINTER)
    assert command(["timestep-sweep", str(folder), "--timesteps", "399"]) == 2
    assert "git lfs pull" in capsys.readouterr().err


def test_a_teachers_config_of_wrong_kinds_is_an_error_of_ours(tmp_path, teacher_folder):
    folder = tmp_path / "teacher"
    shutil.copytree(teacher_folder, folder)
    for name, key, value in [
        ("unet/config.json", "block_out_channels", "x"),
        ("unet/config.json", "down_block_types", ["NoBlock2D"]),
        ("unet/config.json", "norm_num_groups", 0),
        ("vae/config.json", "latent_channels", None),
        ("text_encoder/config.json", "hidden_size", "wide"),
        ("text_encoder/config.json", "num_attention_heads", 0),
        ("scheduler/scheduler_config.json", "num_train_timesteps", "many"),
        ("scheduler/scheduler_config.json", "beta_schedule", {}),
        ("model_index.json", "unet", None),
        ("model_index.json", "vae", ["diffusers"]),
        ("model_index.json", "_class_name", 3),
    ]:
        own = (folder / name).read_text()
        (folder / name).write_text(json.dumps({**json.loads(own), key: value}))
        with pytest.raises(ValueError, match=r"teacher|model"):
            load_family(ModelReference(str(folder)))
        (folder / name).write_text(own)


def test_weights_of_another_variant_that_are_broken_play_no_role(tmp_path, teacher_folder):
    folder = tmp_path / "teacher"
    shutil.copytree(teacher_folder, folder)
    (folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(POINTER)
    load_family(ModelReference(str(folder)))


# path.json, report.json and adapters ---------------------------------------------------------------------------------------

VALUES = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        0.5,
        10**30,
        10**400,
        float("nan"),
        float("inf"),
        "",
        "x",
        "../x",
        "a\0b",
        "\ud800",
    ),
    *([], [1], ["a", None], {}, {"a": 1}, {"": {}}, "9" * 5000),
]


def places(content, at=()):
    """Where values stand in a JSON's content."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inner:
        yield (*at, key)
        yield from places(value, (*at, key))


def with_value(content, place, value):
    """A copy with another value at a place; without one if the value is `KeyError`."""
    content = copy.deepcopy(content)
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    if value is KeyError:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return content


def test_every_value_of_a_manifest_has_its_kind(tmp_path, teacher_folder):
    """At each place each value is an error of ours, or the manifest can be shown and described with it."""
    path = tiny.path(tmp_path / "path", teacher_folder)
    node = {
        "branch": path.nodes[0]["name"],
        "commit": "0" * 40,
        "mismatch": {"fake": [0.1, 0.2]},
        "rounding_error": 0.0,
    }
    path.nodes[0].update(node)
    path.manifest["recording"] = {"seed": 0, "prompts": ["a"]}
    taken, shown = 0, parser().parse_args(["path", "show", str(path.folder), "--table"])
    draw = random.Random(0)
    for place in places(path.manifest):
        for value in (*draw.sample(VALUES, 12), KeyError):
            manifest = with_value(path.manifest, place, value)
            try:
                check_manifest(manifest, "somewhere", pinned=False)
            except ValueError as error:
                assert "path.json of somewhere" in str(error) and len(str(error)) < 500
                continue
            taken += 1
            (path.folder / "path.json").write_text(json.dumps(manifest))
            path_show(shown)
            if taken % 5 == 0:  # which takes longer
                path_card(manifest, "user/repo", {}, image=False, usage=STABLE_DIFFUSION)
    assert 50 < taken < 300  # names and settings, which may be any


def test_every_value_of_a_report_has_its_kind(tmp_path):
    full = {
        **REPORT,
        "path": {"id": "a", "num_nodes": 1, "repo_id": "user/repo", "commit": "0" * 40},
        "stages": {"backtracking": {"steps": 1, "seconds": 1.0, "peak_memory_mb": 1.0}},
        "lora": {"rank": 2, "alpha": 2, "folder": "lora"},
        "files": {"model_index.json": 2, "unet/config.json": 3},
        "behind": {"teacher": ["drift_psnr"], "initial": []},
    }
    metric = {"label": "drift", "panel": "drift", "direction": "lower"}
    full["evaluation"] = {**full["evaluation"], "metrics": {"drift_psnr": metric}}
    assert "user/repo" in student_card(full, "title", "user/repo", path_image=False, usage=STABLE_DIFFUSION)
    draw = random.Random(0)
    for place in places(full):
        for value in (*draw.sample(VALUES, 12), KeyError):
            report = with_value(full, place, value)
            (tmp_path / "report.json").write_text(json.dumps(report))
            try:
                path_of_run(tmp_path)
                report = read_report(tmp_path)
            except ValueError as error:
                assert "report.json" in str(error) or "went along is not at" in str(error)
                continue
            if "student" in report:
                with contextlib.suppress(ValueError):  # of the Hub's own tools, of a measure without a name
                    student_card(report, "title", "user/repo", path_image=False, usage=STABLE_DIFFUSION)


def test_a_reports_files_are_sizes_by_name(tmp_path):
    for files in (["a"], "a", 3, None, {"a": "b"}, {"a": None}, {"a": -1}, {"a": True}):
        for report in ({**REPORT, "files": files}, {"files": files}):
            (tmp_path / "report.json").write_text(json.dumps(report))
            with pytest.raises(ValueError, match=r"report\.json.*'files' cannot be"):
                read_report(tmp_path)
            with pytest.raises(ValueError, match=r"report\.json is damaged .*'files' cannot be"):
                push_run(tmp_path, "user/repo")


def test_what_an_adapter_says_of_itself_has_its_kind(tmp_path):
    file = tmp_path / "x.safetensors"
    good = {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["to_q"],
        "rank_pattern": {"to_k": 1},
        "alpha_pattern": {"to_k": 1.5},
    }
    weights = {"a.to_q.lora_A.weight": torch.zeros(2, 8), "a.to_q.lora_B.weight": torch.zeros(8, 2)}

    def config(said):
        save_file(weights, file, {"lora_adapter_metadata": said if isinstance(said, str) else json.dumps(said)})
        return config_of(file)

    assert isinstance(config(good), LoraConfig) and config(good).r == 2
    for change in (
        *({"r": value} for value in (0, 3, 10**9, 2.0, True, "2", None, [2])),
        *({"lora_alpha": value} for value in (0, -1, "x", float("nan"), 10**400, True)),
        *({"target_modules": value} for value in ("to_q", [], [1], ["(a+)+$"], {"to_q": 1}, None)),
        *({"rank_pattern": value} for value in ([1], {"to_k": 9}, {"to_k": "x"}, {"(": 1}, {"to_k": None})),
        *({"alpha_pattern": value} for value in ([1], {"to_k": "x"}, {"(": 1})),
    ):
        with pytest.raises(ValueError, match=r"x\.safetensors"):
            config({**good, **change})
    for said in ("", "{", "[]", "null", "[" * 100_000, "9" * 5000):
        with pytest.raises(ValueError, match=r"x\.safetensors"):
            config(said)
    file.write_bytes(POINTER)
    with pytest.raises(ValueError, match=r"x\.safetensors.*git lfs pull"):
        config_of(file)


def test_a_node_whose_header_was_changed_is_an_error_of_ours(tmp_path, teacher_folder):
    """Two hundred changes of its bytes, with a hash to match: as if somebody else had written it."""
    import hashlib

    path = tiny.path(tmp_path / "path", teacher_folder, nodes=1)
    file, network, draw = (
        path.node_folder(1) / "unet" / "diffusion_pytorch_model.safetensors",
        tiny.unet(),
        random.Random(0),
    )
    whole = file.read_bytes()
    for _ in range(200):
        content = bytearray(whole)
        length = 8 + int.from_bytes(whole[:8], "little")
        for _ in range(draw.choice([1, 3, 30])):
            content[draw.randrange(length)] = draw.choice(b'0123456789{}[]",:aF\x00\xff')
        file.write_bytes(content[: draw.choice([len(content), len(content), length, 7])])
        path.nodes[0]["files"][file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
        try:
            path.load(1, into=network)
        except ValueError as error:
            assert str(file) in str(error) or "node 1" in str(error)


def test_a_manifest_in_a_folder_that_is_no_manifest(tmp_path):
    for content in (POINTER, DEEP, b"[]", b"\xff", b"9" * 5000, b""):
        (tmp_path / "path.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"path\.json"):
            DegradationPath.from_pretrained(tmp_path)
