import argparse
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from diffusers_disback import __version__
from diffusers_disback.commands.cli import main, parser
from diffusers_disback.families import network_name_of


@pytest.fixture
def path(tmp_path, teacher_folder):
    return tiny.path(tmp_path / "path", teacher_folder)


def test_path_show(path, capsys):
    assert main(["path", "show", str(path.folder), "--table"]) == 0
    out = capsys.readouterr().out
    assert "degradation-000100" in out and "0.5" in out and "complete" in out
    assert not (path.folder.parent / "path.png").exists()


def test_path_verify(path, capsys):
    assert main(["path", "verify", str(path.folder)]) == 0
    assert "node 1: degradation-000100, 208 tensors, whole, and fits the teacher" in capsys.readouterr().out
    (path.node_folder(1) / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    assert main(["path", "verify", str(path.folder)]) == 2
    assert "node 1 is damaged" in capsys.readouterr().err


def test_a_path_of_another_architecture_does_not_verify(path, capsys, tmp_path):
    tiny.pipeline(block_out_channels=(8, 24)).save_pretrained(tmp_path / "other")
    line = ["path", "verify", str(path.folder), "--pretrained_model_name_or_path", str(tmp_path / "other")]
    assert main(line) == 2
    assert "does not fit" in capsys.readouterr().err


def test_names_of_others_do_not_command_the_terminal(path, capsys, hub, repo):
    from diffusers_disback.path.path import DegradationPath

    file = path.folder / "path.json"
    manifest = json.loads(file.read_text())
    name = "\x1b]0;title\x07\u202egpj\n"
    manifest["teacher"] |= {"name_or_path": name, "commit": name}
    manifest["generator"]["name_or_path"] = name
    manifest["recording"]["caption_column"] = name
    file.write_text(json.dumps(manifest))
    assert main(["path", "show", str(path.folder), "--table"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("\\x1b]0;title\\x07\\u202egpj\\n") == 3 and shown.isascii()
    assert all(line.isprintable() for line in shown.splitlines())
    theirs = DegradationPath.from_pretrained(path.folder, teacher=path.teacher)
    theirs.push_to_hub(repo)
    with pytest.raises(ValueError, match="its caption_column is .x1b.*, this one's is None") as told:
        path.push_to_hub(repo)
    assert str(told.value).isprintable()


def test_a_teacher_that_moved_is_asked_as_the_path_says(tmp_path, monkeypatch, hub, repo):
    """Its prediction type, which its files do not say, stays that of the recording: in images and in branches."""
    from diffusers_disback import ModelReference
    from diffusers_disback.commands import path as command
    from diffusers_disback.path.path import DegradationPath

    tiny.pipeline("epsilon").save_pretrained(tmp_path / "was")
    teacher = ModelReference(str(tmp_path / "was"), prediction_type="v_prediction", rescale_betas_zero_snr=True)
    path = DegradationPath.create(tmp_path / "path", teacher.resolve(network_name_of), "0" * 64, tiny.START, {})
    path.append(tiny.unet(seed=1), step=100, loss=0.5)
    path.finish({"steps": 100, "seconds": 1.0, "peak_memory_mb": 1.0})
    (tmp_path / "was").rename(tmp_path / "is")
    drawn = []
    monkeypatch.setattr(command, "sample_path", lambda path, *_: drawn.append(path.teacher))
    moved = ["--pretrained_model_name_or_path", str(tmp_path / "is")]
    assert main(["path", "show", str(path.folder), *moved]) == 0
    assert drawn == [replace(teacher, name_or_path=str(tmp_path / "is"))]
    assert main(["push", str(path.folder), repo, *moved]) == 0
    node = json.loads(hub.files(repo, "degradation-000100")["scheduler/scheduler_config.json"])
    assert node["prediction_type"] == "v_prediction"
    card = hub.files(repo, "main")["README.md"].decode()
    assert "--pretrained_model_name_or_path was \\\n  --prediction_type v_prediction \\\n" in card
    assert "  --rescale_betas_zero_snr True \\\n" in card and node["rescale_betas_zero_snr"] is True


def test_the_console_script():
    command = Path(sys.executable).with_name("diffusers-disback")
    assert (
        subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout.strip()
        == __version__
    )


def test_a_wrong_command_line_is_told_in_one_line(capsys):
    for line, told in (
        (["path", "show"], "the following arguments are required: PATH"),
        (["nothing"], "argument COMMAND: invalid choice: 'nothing'"),
        (["half", "x", "--rank", "2"], "unrecognized arguments: --rank 2"),
        (["timestep-sweep"], "Name the teacher: --pretrained_model_name_or_path TEACHER."),
    ):
        assert main(line) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"diffusers-disback: {told}") and said.count("\n") == 1


def test_every_command_and_flag_has_a_help_text_and_names_a_teacher_by_the_same_flag(capsys):
    def commands(made):
        for action in made._actions:
            for each in action.choices.values() if isinstance(action, argparse._SubParsersAction) else ():
                yield each
                yield from commands(each)

    found = list(commands(parser()))
    names = {made.prog.removeprefix("diffusers-disback ") for made in found}
    assert {"plan", "timestep-sweep", "evaluate", "path show", "push", "pull", "half", "extract-lora"} <= names
    for made in found:
        assert made.description and made.description.endswith("."), made.prog
        assert all(action.help for action in made._actions if not isinstance(action, argparse._SubParsersAction))
    with pytest.raises(SystemExit):
        main([])
    overview = capsys.readouterr().out
    assert all(f"    {name} " in f"{overview} " or f"    {name}\n" in overview for name in names if " " not in name)
    words = [a.dest for made in found for a in made._actions if not a.option_strings and a.help != argparse.SUPPRESS]
    assert not any("teacher" in word or "pretrained" in word for word in words)


def test_bash_completes_commands_flags_and_files(capsys, tmp_path):
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "completion.sh"
    script.write_text(capsys.readouterr().out)
    (tmp_path / "teacher-folder").mkdir()
    for words, found in (
        ("extract", "extract-lora"),
        ("plan --lora_ran", "--lora_rank"),
        ("timestep-sweep --pretrained_model_name", "--pretrained_model_name_or_path"),
        ("info teacher-f", "teacher-folder"),
        ("evaluate --mixed_precision bf", "bf16"),
    ):
        line = f"COMP_WORDS=(diffusers-disback {words}); COMP_CWORD=$(({len(words.split())}))"
        program = f'source {script}; {line}; _shtab_diffusers_disback; echo "${{COMPREPLY[*]}}"'
        done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, cwd=tmp_path)
        assert done.stdout.split() == [found], done.stderr
