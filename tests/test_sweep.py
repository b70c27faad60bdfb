import json

import pytest

from diffusers_disback.cli import main as command


def test_the_timestep_sweep_recommends_the_least_drift(tmp_path, teacher_folder, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = ["timestep-sweep", str(teacher_folder), "--timesteps", "99", "399", "799", "--num_inference_steps", "2"]
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
    assert command([*line[:-2], "--timesteps", "1000"]) == 1
    assert "timestep=1000 is outside" in capsys.readouterr().err
