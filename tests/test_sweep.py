import json

import pytest
import tiny
from script import TINY, arguments
from test_export import changed

from diffusers_disback.commands.cli import main as command
from diffusers_disback.families import load_family
from diffusers_disback.hub.publish.export import extract_lora, save_lora
from diffusers_disback.hub.publish.student import save_student


def test_the_timestep_sweep_recommends_the_least_drift(tmp_path, teacher_folder, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = [
        "timestep-sweep",
        "--pretrained_model_name_or_path",
        str(teacher_folder),
        "--timesteps",
        "99",
        "399",
        "799",
        "--num_inference_steps",
        "2",
    ]
    assert command([*line, "--prompt", "a", "--prompt", "b", "--num_images_per_prompt", "2"]) == 0
    out = capsys.readouterr().out
    table = json.loads((tmp_path / "timesteps.json").read_text())
    totals = {int(t): values["total"] for t, values in table["timesteps"].items()}
    assert list(totals) == [99, 399, 799] and table["num_pictures"] == 4
    assert totals[table["recommended"]] == min(totals.values()) and len(set(totals.values())) == 3
    assert f"recommended: --conditioning_timestep {table['recommended']}" in out
    for values in table["timesteps"].values():
        assert values["total"] == pytest.approx(
            values["drift_mean"] + values["drift_std"] + abs(values["drift_saturation"])
        )
    assert (tmp_path / "timesteps.png").stat().st_size > 1000
    assert command([*line[:-2], "--timesteps", "1000"]) == 2
    assert "timestep=1000 is outside" in capsys.readouterr().err


def test_the_sweep_asks_the_teacher_that_training_would(tmp_path, teacher_folder, monkeypatch):
    """With another prediction type, autoencoder and LoRA than its files say."""
    monkeypatch.chdir(tmp_path)
    other = tiny.pipeline("v_prediction", seed=7)
    other.save_pretrained("other")
    save_lora(extract_lora(changed(tiny.unet(), rank=2), tiny.unet(), 2)[0], 2, "lora", tiny.unet())
    line = ["timestep-sweep", str(teacher_folder), "--timesteps", "399", "--num_inference_steps", "2", "--prompt", "a"]
    drifts = []
    for flags in (
        [],
        ["--prediction_type", "v_prediction"],
        ["--rescale_betas_zero_snr"],
        ["--pretrained_vae_model_name_or_path", "other"],
        ["--teacher_lora", "lora/pytorch_lora_weights.safetensors"],
    ):
        assert command([*line, *flags]) == 0
        drifts.append(json.loads((tmp_path / "timesteps.json").read_text())["timesteps"]["399"]["total"])
    assert len(set(drifts)) == 5


@pytest.mark.parametrize("what", ["timestep-sweep", "plan", "training"])
def test_a_one_step_student_is_no_teacher(what, tmp_path, teacher_folder, prompts_file, capsys):
    """And its schedule, which ends at its timestep, is not what is told."""
    import train_disback

    teacher = load_family(str(teacher_folder))
    save_student(teacher.one_step(tiny.unet(seed=3), 399), teacher.local_model, tmp_path / "student")
    line = ["--pretrained_model_name_or_path", str(tmp_path / "student")]
    with pytest.raises(ValueError, match="student is a one-step student, which is no teacher: .*generator_model_name"):
        if what == "training":
            train_disback.main(arguments(tmp_path / "run", tmp_path / "student", prompts_file, **TINY))
        elif command([what, *line]) == 2:
            raise ValueError(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
