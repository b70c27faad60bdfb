"""Checkpoints that are damaged, and folders beside them that are none. The files are any; what resumes is in test_stages."""

import json
import os
import shutil

import pytest

from diffusers_disback.training.checkpoint import damage
from diffusers_disback.training.run_folder import RunFolder


STAGE = "backtracking"


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path)


def save(folder, step, limit=None):
    """A checkpoint of two files."""
    draft = folder.draft_of_checkpoint(STAGE, step)
    (draft / "generator").mkdir(parents=True)
    (draft / "generator" / "model.safetensors").write_bytes(bytes(range(200)) + bytes([step]))
    (draft / "generator" / "optimizer.bin").write_bytes(b"moments")
    folder.finish_checkpoint(STAGE, step, {"step": step}, limit)
    return folder.stage_folder(STAGE) / f"checkpoint-{step:06d}"


def names(folder):
    return sorted(f.name for f in folder.stage_folder(STAGE).iterdir())


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def empty(file):
    file.write_bytes(b"")


@pytest.mark.parametrize("harm", [cut, flip, empty, os.unlink], ids=["cut", "flipped", "emptied", "missing"])
def test_of_a_damaged_checkpoint_the_file_is_named_and_the_one_before_is_taken(folder, harm, capsys):
    older, newer = save(folder, 2), save(folder, 4)
    kept = newer.with_name("kept")
    shutil.copytree(newer, kept)
    for name in ("generator/model.safetensors", "generator/optimizer.bin", "stage.json", "files.json"):
        harm(newer / name)
        assert folder.checkpoint_to_resume(STAGE, "latest") == older, name
        told = capsys.readouterr().err
        assert f"{newer} is damaged: " in told and f"{older.name} is taken instead" in told
        assert name in told or name == "files.json", told
        with pytest.raises(ValueError, match=f"checkpoint-000004 is damaged: .*{name.split('/')[-1]}"):
            folder.checkpoint_to_resume(STAGE, str(newer))
        shutil.rmtree(newer)
        shutil.copytree(kept, newer)
    assert folder.checkpoint_to_resume(STAGE, "latest") == newer and not capsys.readouterr().err
    assert folder.checkpoint_to_resume(STAGE, str(newer)) == newer
    assert folder.checkpoint_to_resume("degradation", str(newer)) is None


def test_if_none_is_whole_it_is_told_what_to_do(folder):
    for step in (2, 4):
        empty(save(folder, step) / "stage.json")
    with pytest.raises(ValueError, match="None of the .* whole.*000004 is damaged.*000002 is damaged.*anew: remove"):
        folder.checkpoint_to_resume(STAGE, "latest")


def test_a_manifest_that_was_tampered_with_is_damage(folder):
    checkpoint = save(folder, 2)
    written = json.loads((checkpoint / "files.json").read_text())
    for files in ({}, [], None, {"stage.json": 1}, {**written["files"], "../x": {}}, {**written["files"], "\0": {}}):
        (checkpoint / "files.json").write_text(json.dumps({"files": files}))
        assert damage(checkpoint) is not None, files
    (checkpoint / "files.json").write_text("[" * 100_000)
    assert "nested too deeply" in damage(checkpoint)


def test_a_checkpoint_of_an_older_version_is_taken_with_a_word(folder, capsys):
    checkpoint = save(folder, 2)
    (checkpoint / "files.json").unlink()
    (checkpoint / "stage.json").write_text('{"step": 2}')
    assert folder.checkpoint_to_resume(STAGE, "latest") == checkpoint
    assert "was written by an older version, without hashes" in capsys.readouterr().err


def test_only_whole_checkpoints_count_for_the_limit_and_the_last_whole_one_stays(folder):
    save(folder, 2)
    empty(save(folder, 4) / "generator" / "model.safetensors")
    save(folder, 6, limit=2)
    assert names(folder) == ["checkpoint-000002", "checkpoint-000004", "checkpoint-000006"]
    save(folder, 8, limit=2)
    assert names(folder) == ["checkpoint-000006", "checkpoint-000008"]
    flip(folder.stage_folder(STAGE) / "checkpoint-000008" / "generator" / "model.safetensors")  # of the same size
    save(folder, 7, limit=1)
    assert names(folder) == ["checkpoint-000007", "checkpoint-000008"], "the one just saved is the last whole one"
    assert folder.checkpoint_to_resume(STAGE, "latest").name == "checkpoint-000007"
    save(folder, 8, limit=1)
    assert names(folder) == ["checkpoint-000008"] and damage(folder.checkpoints(STAGE)[0]) is None


def test_what_is_written_wrong_costs_no_other_checkpoint(folder, monkeypatch):
    save(folder, 2)
    monkeypatch.setattr(
        "diffusers_disback.training.run_folder.damage", lambda *_, **__: "model.safetensors has 3 bytes"
    )
    with pytest.raises(OSError, match="The checkpoint was written, but model.safetensors has 3 bytes"):
        save(folder, 4, limit=1)
    assert "checkpoint-000002" in names(folder)


def test_a_users_own_things_beside_checkpoints_are_left_alone(folder):
    checkpoint = save(folder, 4)
    place = checkpoint.parent
    own = [
        "checkpoint-000004-backup",
        "checkpoint-foo",
        "checkpoint-",
        "checkpoint-9",
        "draft-mine",
        "checkpoint-٠٠٠٠٠٩",
    ]
    for name in own:
        shutil.copytree(checkpoint, place / name)
    (place / "checkpoint-000099").write_text("a file")
    (place / "discarded-000001").mkdir()
    folder.clear_drafts(STAGE)
    assert folder.checkpoints(STAGE) == [checkpoint] == [folder.checkpoint_to_resume(STAGE, "latest")]
    save(folder, 6, limit=1)
    assert names(folder) == sorted([*own, "checkpoint-000006", "checkpoint-000099"])
    with pytest.raises(ValueError, match="is no checkpoint of this run. It has .*checkpoint-000006.$"):
        folder.check_named_checkpoint(str(place))
    for elsewhere in ("/", "checkpoint-000006", ""):
        with pytest.raises(ValueError, match="is no checkpoint of this run"):
            folder.check_named_checkpoint(elsewhere)


def test_a_checkpoint_that_was_moved_and_linked_is_taken_and_not_deleted(folder, tmp_path):
    checkpoint = save(folder, 2)
    shutil.move(checkpoint, tmp_path / "elsewhere")
    checkpoint.symlink_to(tmp_path / "elsewhere")
    assert folder.checkpoint_to_resume(STAGE, "latest") == checkpoint
    save(folder, 2)
    checkpoint.rename(checkpoint.with_name("checkpoint-000003")) and checkpoint.symlink_to(tmp_path / "elsewhere")
    save(folder, 4, limit=1)
    assert names(folder) == ["checkpoint-000004"] and damage(tmp_path / "elsewhere") is None
