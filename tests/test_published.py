"""Nothing of this machine is published: neither by name, nor in a config, nor by what a file holds besides."""

import json
import os
import platform
import re
import shlex
import shutil
import socket
from pathlib import Path

import pytest
import tiny

from diffusers_disback import DegradationPath
from diffusers_disback.backtracking import BacktrackingTrainer
from diffusers_disback.families import network_name_of, to_pipeline
from diffusers_disback.hub.publish.student import check_teacher_files, save_student
from diffusers_disback.hub.published import (
    clean_configs,
    published,
    published_command,
    published_files,
    published_report,
)
from diffusers_disback.models.card import read_card
from diffusers_disback.models.reference import ModelReference
from diffusers_disback.path.manifest import identity


def test_a_place_on_this_machine_is_its_own_name(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/bob")
    monkeypatch.chdir(tmp_path)
    for value, told in {
        "/home/bob/models/sd15": "sd15",
        "/home/bob/models/sd15/": "sd15",
        "//server/share/x.safetensors": "x.safetensors",
        "~/models/my model": "my model",
        "~alice/x": "x",
        "../x": "x",
        "../../bob": "folder",
        "a/../../x": "x",
        "./..": "folder",
        "..": "folder",
        "/": "folder",
        "~": "folder",
        "~bob": "folder",
        "/home/bob": "folder",
        "/scratch/bob/": "folder",
        "C:\\Users\\bob\\x": "x",
        "c:/Users/bob/x": "x",
        "C:\\": "folder",
        "\\\\server\\share\\x": "x",
        "..\\x": "x",
        "file:///home/bob/x": "x",
        "FILE:/home/bob/x": "x",
        "https://bob:secret@huggingface.co/user/repo/blob/main/x.safetensors": "https://huggingface.co/user/repo/blob/main/x.safetensors",
    }.items():
        assert published(value) == told and published(told) == told, value
    same = [
        "user/repo",
        "user/repo/x.safetensors",
        "prompts.txt",
        "runs/student",
        "./a/b",
        "a..b/c",
        "fp16",
        "",
        "main",
    ]
    same += ["https://huggingface.co/user/repo/blob/main/x.safetensors", "cosine", "v1.0", 3, 0.5, True, None, "a: b"]
    assert [published(value) for value in same] == same
    assert published({"a": ["/x/y", {"b": ("/x/z",)}], "validation_prompts": ["/imagine a cat"]}) == {
        "a": ["y", {"b": ["z"]}],
        "validation_prompts": ["/imagine a cat"],
    }


def test_a_relative_path_from_above_the_home_folder(monkeypatch, tmp_path):
    (tmp_path / "bob" / "runs").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "bob"))
    monkeypatch.chdir(tmp_path)
    assert published("bob/runs") == "runs" and published("bob/repo") == "bob/repo", "an id, where there is no folder"
    monkeypatch.chdir(tmp_path / "bob")
    assert published("runs/x") == "runs/x"


def test_a_command_line_names_no_place_and_keeps_its_prompts():
    line = ["--output_dir", "/x/run", "--prompts-file=/x/prompts.txt", "--validation-prompts", "/imagine", "../b"]
    line += [
        "--lora_rank",
        "4",
        "--push_to_hub",
        "--validation_prompts=/c",
        "--teacher_lora",
        "/x/a.safetensors",
        "../b",
        "--objective_args",
        "alpha=1.5",
        "statistics=/x/a.npz",
    ]
    told = ["--output_dir", "run", "--prompts-file=prompts.txt", "--validation-prompts", "/imagine", "../b"]
    told += ["--lora_rank", "4", "--push_to_hub", "--validation_prompts=/c", "--teacher_lora", "a.safetensors", "b"]
    told += ["--objective_args", "alpha=1.5", "statistics=a.npz"]
    assert published_command(line) == told
    report = {"settings": {"output_dir": "/x/run"}, "command": shlex.join(["python", "train.py", *line]), "seed": 0}
    assert published_report(report) == {
        "settings": {"output_dir": "run"},
        "command": shlex.join(["python", "train.py", *told]),
        "seed": 0,
    }
    assert published_report({"settings": {}}) == {"settings": {}}


def test_configs_lose_their_places_and_nothing_else(tmp_path):
    places = {
        "_name_or_path": "/home/bob/x",
        "special_tokens_map_file": "../x",
        "text_config": {"_name_or_path": "~/x"},
    }
    kept = {"_class_name": "X", "pad_token": "/", "unk_token": "~", "act_fn": "silu", "layers": ["/", ".."], "size": 3}
    kept |= {
        "added_tokens_decoder": {"1": {"content": "/home"}},
        "base": "openai/clip-vit-large-patch14",
        "text": {"a": 1},
    }
    expected = {**kept, "text_config": {}}
    names = ["config.json", "a/tokenizer_config.json", "scheduler_config.json", "model_index.json"]
    content = json.dumps({**places, **kept}).encode()
    (tmp_path / "config.json").write_bytes(content)
    files = {**dict.fromkeys(names, content), "b/config.json": tmp_path / "config.json"}
    for told in published_files(files).values():
        assert json.loads(told) == expected
    vocabulary = {"tokenizer/vocab.json": content, "tokenizer/tokenizer.json": content, "README.md": b"/home/bob"}
    clean = {"config.json": json.dumps(kept).encode()}
    assert published_files({**vocabulary, **clean}) == {**vocabulary, **clean}, "byte for byte"
    clean_configs(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == expected
    with pytest.raises(ValueError, match="a/config.json is no valid JSON"):
        published_files({"a/config.json": b"{"})


def test_a_student_and_a_node_do_not_say_where_they_came_from(tmp_path, teacher_folder):
    """The teacher's own configs, too, as tools before have written them."""
    teacher = shutil.copytree(teacher_folder, tmp_path / "teacher")
    for name in (
        "text_encoder/config.json",
        "tokenizer/tokenizer_config.json",
        "model_index.json",
        "unet/config.json",
    ):
        file = teacher / name
        file.write_text(json.dumps({**json.loads(file.read_text()), "_name_or_path": str(tmp_path / "somewhere")}))
    local = ModelReference(str(teacher)).resolve(network_name_of)
    network = local.load_network(type(tiny.unet()))
    assert network.config["_name_or_path"], "diffusers notes it"
    save_student(to_pipeline(network, 399, tiny.pipeline()), local, tmp_path / "student")
    path = DegradationPath.create(tmp_path / "path", local, "0" * 64, tiny.START, {})
    path.append(network, step=100, loss=0.5)
    written = [*(tmp_path / "student").rglob("*"), *path.node_folder(1).rglob("*")]
    assert len([file for file in written if file.name == "config.json"]) == 4
    for file in written:
        assert file.is_dir() or os.fsencode(tmp_path) not in file.read_bytes(), file


def test_paths_of_one_recording_are_one_wherever_their_files_lay():
    manifest = {
        "id": "x",
        "teacher": {"sha256": "0" * 64},
        "generator": {"sha256": "1" * 64, "conditioning_timestep": 399},
        "recording": {"teacher_lora": "/a/lora.safetensors", "seed": 0},
    }
    other = {**manifest, "recording": {"teacher_lora": "lora.safetensors", "seed": 0}}
    assert identity(manifest) == identity(other)
    assert identity(manifest) != identity({**manifest, "recording": {"teacher_lora": "/a/b.safetensors", "seed": 0}})


def test_what_a_run_with_absolute_flags_publishes_names_nothing_of_the_machine(
    run, repo, hub, tmp_path, teacher_folder, prompts_file, monkeypatch
):
    """In adapter mode, which writes most; no file of any branch, and none that a later push by hand sends."""
    from diffusers_disback.commands.cli import main as command

    secret = tmp_path / "users" / "robertina" / "work"
    secret.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(secret.parent))
    for library, name in ((socket, "gethostname"), (platform, "node")):
        monkeypatch.setattr(library, name, lambda: "some-machine")
    teacher = shutil.copytree(teacher_folder, secret / "teacher")
    vae = shutil.copytree(teacher_folder / "vae", secret / "vae")
    prompts = shutil.copy(prompts_file, secret / "prompts.txt")
    folder = run(
        secret / "run",
        pretrained_model_name_or_path=teacher,
        pretrained_vae_model_name_or_path=vae,
        prompts_file=prompts,
        cache_dir=secret / "cache",
        lora_rank=2,
        push_to_hub=True,
        hub_model_id=repo,
    )
    card, local = (folder / "README.md").read_text(), json.loads((folder / "path" / "path.json").read_text())
    assert local["teacher"]["name_or_path"] == str(teacher), "what lies here leads to the teacher without a flag"
    DegradationPath.from_pretrained(folder / "path").load(0, into=tiny.unet())
    assert json.loads(hub.files(repo)["path.json"])["teacher"]["name_or_path"] == "teacher"
    assert "--pretrained_model_name_or_path teacher --prompts_file prompts.txt --output_dir run" in card
    (folder / "README.md").write_text(card.replace("## Use", "## How to use it"))
    assert command(["push", str(folder), repo, "--cache_dir", str(secret / "cache")]) == 0, "it is the same run"
    assert b"## How to use it" in hub.files(repo)["README.md"]
    words = [str(tmp_path), "robertina", "some-machine"]
    published_now = {name: hub.files(repo, name) for name in hub.repos[repo].branches}
    assert len(published_now) == 3
    for branch, files in published_now.items():
        for name, content in files.items():
            for word in words:
                assert word.encode() not in content, (branch, name, word)


# A teacher's card ----------------------------------------------------------------------------------------------------


def declared(folder: Path, content: bytes) -> dict:
    (folder / "README.md").write_bytes(content)
    return read_card(folder, str(folder))


def test_a_teachers_card_gives_what_it_declares(tmp_path, caplog):
    other = {"license": "other", "license_name": "house", "license_link": "LICENSE.md", "base_model": ["a/b", "gpt2"]}
    for content, expected in [
        (b"---\nlicense: mit\n---\n# hi\n", {"license": "mit"}),
        (b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\n# hi\r\n", {"license": "mit"}),
        (b"\n---\nlicense:\n- mit\n- openrail\n---\n", {"license": ["mit", "openrail"]}),
        (b"---\nlicense: other\nlicense_name: house\nlicense_link: LICENSE.md\nbase_model: [a/b, gpt2]\n---", other),
        (b"---\nlicense: no\ntags: [a]\nbase_model:\nlicense_name: null\nlicense_link: ''\n---\n", {"license": "no"}),
        (b"---\nlicense: 'a\n\n  ---\n\n  b'\n---\n", {"license": "a\n---\nb"}),
        (b"---\n---\n# hi\n", {}),
        (b"# hi\n\n---\nlicense: mit\n---\n", {}),
        (b"---\nnothing closes it\n", {}),
        (b"", {}),
    ]:
        assert declared(tmp_path, content) == expected, content
    assert not caplog.records


def test_a_teachers_card_that_cannot_be_read_is_told_and_taken_for_empty(tmp_path, caplog):
    merges = "a0: &a0 {x: y}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 40))
    for content, message in [
        (b"---\nlicense: openrail: see below\n---\n# hi\n", "no valid YAML"),
        (b"---\njust a line\n---\n# hi\n", "are a str, no names and values"),
        (b"---\n- a\n- b\n---\n", "are a list, no names and values"),
        ("---\nlicense: mit\n---\n# caf\u00e9\n".encode("latin-1"), "is not UTF-8"),
        ("---\nlicense: mit\n---\n".encode("utf-16"), "is not UTF-8"),
        (b"---\nlicense: *nothing\n---\n", "no valid YAML"),
        (b"---\nlicense: \x1b[31m\n---\n", "no valid YAML"),
        (b"---\na: " + b"[" * 20_000 + b"\n---\n", "no valid YAML"),
        (b"---\na: " + b"x" * 300_000 + b"\n---\n", "begins with more than 256,000 characters"),
        (b"x" * 10_000_001, "is larger than 10 MB"),
        (b"---\nlicense: {a: b}\n---\n", "declares license by something that is no name"),
        (b"---\nlicense: [[a]]\nlicense_link: [a]\n---\n", "declares license and license_link by"),
        (b"---\nlicense: " + b"x" * 2000 + b"\n---\n", "declares license by"),
        (b"---\nbase_model: 'no model: at all'\n---\n", "declares base_model by"),
    ]:
        caplog.clear()
        assert declared(tmp_path, content) == {} and re.search(message, caplog.text), content[:40]
    assert declared(tmp_path, f"---\nlicense: mit\n{merges}---\n".encode()) == {"license": "mit"}
    assert declared(tmp_path, b"---\nlicense: !!python/object/apply:os.system [ls]\n---\n") == {"license": ["ls"]}
    (tmp_path / "outside.md").write_text("---\nlicense: mit\n---\n")
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "README.md").symlink_to(tmp_path / "outside.md")
    with pytest.raises(ValueError, match="leads out of its folder"):
        read_card(tmp_path / "teacher", "teacher")
    (tmp_path / "teacher" / "README.md").unlink()
    os.mkfifo(tmp_path / "teacher" / "README.md")
    assert read_card(tmp_path / "teacher", "teacher") == {} and "is no regular file" in caplog.text


def test_a_teachers_card_is_read_before_training_and_stops_nothing(run, tmp_path, teacher_folder, caplog, monkeypatch):
    teacher = shutil.copytree(teacher_folder, tmp_path / "teacher")
    (teacher / "README.md").write_bytes(b"---\nlicense: openrail: see below\n---\n")
    order, train = [], BacktrackingTrainer.train

    def noted(self):
        order.append(caplog.text)
        (teacher / "README.md").write_text("---\nlicense: changed-meanwhile\n---\n")
        return train(self)

    monkeypatch.setattr(BacktrackingTrainer, "train", noted)
    folder = run(pretrained_model_name_or_path=teacher, num_path_nodes=0, max_train_steps=2)
    assert "no valid YAML" in order[0], "it was told before"
    assert "declares no licence" in (folder / "README.md").read_text()
    assert json.loads((folder / "report.json").read_text())["teacher_card"] == {}


def test_what_a_student_takes_over_is_looked_at_before_training(tmp_path, teacher_folder):
    teacher = shutil.copytree(teacher_folder, tmp_path / "teacher")
    check_teacher_files(ModelReference(str(teacher)).resolve(network_name_of))
    (teacher / "tokenizer" / "tokenizer_config.json").write_text("{} and more")
    with pytest.raises(ValueError, match="tokenizer/tokenizer_config.json .*is no valid JSON"):
        check_teacher_files(ModelReference(str(teacher)).resolve(network_name_of))


def test_a_file_of_the_teacher_that_was_written_to_during_the_run_is_not_taken_over(tmp_path, teacher_folder):
    teacher = shutil.copytree(teacher_folder, tmp_path / "teacher")
    reference, pipe = ModelReference(str(teacher)), to_pipeline(tiny.unet(seed=1), 399, tiny.pipeline())
    local, file = reference.resolve(network_name_of), teacher / "text_encoder" / "model.safetensors"
    before = file.read_bytes()
    with open(file, "r+b") as stream:
        stream.seek(-8, os.SEEK_END)
        stream.write(b"\x01" * 8)
    with pytest.raises(ValueError, match="text_encoder/model.safetensors of .* was written to since the run began"):
        save_student(pipe, local, tmp_path / "student")
    assert not (tmp_path / "student").exists()
    file.write_bytes(before)
    save_student(pipe, reference.resolve(network_name_of), tmp_path / "student")
    assert (tmp_path / "student" / "text_encoder" / "model.safetensors").read_bytes() == before
