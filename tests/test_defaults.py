"""Defaults of the teacher's family, which are numbers wherever they are told."""

import json
import shlex
from dataclasses import replace

import pytest
import tiny
import torch
from diffusers import DDPMScheduler
from script import student
from stages import equal

from diffusers_disback import DisBackConfig
from diffusers_disback.families import FAMILIES, family_of
from diffusers_disback.models.noise_schedule import FLOW, NoiseSchedule
from diffusers_disback.training.defaults import as_begun, with_defaults
from diffusers_disback.training.run_folder import RunFolder
from diffusers_disback.training.settings_file import read_settings


@pytest.mark.parametrize(("name", "timestep"), [("stable_diffusion", 625), ("stable_diffusion_xl", 399)])
def test_a_family_says_where_its_students_are_evaluated(name, timestep, tmp_path):
    config = DisBackConfig(output_dir=str(tmp_path))
    assert config.conditioning_timestep is None
    family = family_of(tiny.PIPELINES[name]())
    assert with_defaults(config, family).conditioning_timestep == timestep
    for asked in (0, 999):
        own = DisBackConfig(output_dir=str(tmp_path), conditioning_timestep=asked)
        assert with_defaults(own, family) == replace(own, lora_target_modules=family.lora_target_modules)


@pytest.mark.parametrize(
    ("schedule", "timestep"),
    [
        (NoiseSchedule.from_scheduler(tiny.scheduler()), 625),  # Stable Diffusion's: what its family names
        (NoiseSchedule.from_scheduler(DDPMScheduler()), 440),
        (NoiseSchedule.from_scheduler(DDPMScheduler(num_train_timesteps=10)), 9),
        (NoiseSchedule.from_scheduler(tiny.scheduler(rescale_betas_zero_snr=True)), 589),
        (NoiseSchedule(1 - torch.arange(1, 1001) / 1000, torch.arange(1, 1001) / 1000, FLOW), 713),
        (NoiseSchedule(torch.ones(1), torch.zeros(1), "sample"), 0),
    ],
    ids=["stable diffusion", "linear", "short", "zero snr", "flow", "one"],
)
def test_without_a_recipe_there_is_two_and_a_half_times_as_much_noise_as_signal(schedule, timestep, monkeypatch):
    monkeypatch.setattr(FAMILIES["stable_diffusion"], "conditioning_timestep", None)
    family = family_of(tiny.pipeline())
    family.schedule = schedule
    assert family.default_timestep() == timestep
    schedule.check_timestep(timestep)


def test_a_run_goes_on_where_it_was_begun_whatever_the_default_is_now(tmp_path):
    config = DisBackConfig(output_dir=str(tmp_path))
    assert as_begun(config) == config
    RunFolder(tmp_path).claim("degradation", {"conditioning_timestep": 399})
    assert as_begun(config).conditioning_timestep == 399
    assert with_defaults(config, family_of(tiny.pipeline())).conditioning_timestep == 399
    assert as_begun(config).num_path_nodes == "auto"
    RunFolder(tmp_path).claim("degradation", {"conditioning_timestep": 399, "num_path_nodes": 10})
    assert as_begun(config).num_path_nodes == 10 and as_begun(replace(config, num_path_nodes=3)).num_path_nodes == 3
    RunFolder(tmp_path).claim("degradation", {"conditioning_timestep": "399"})
    with pytest.raises(ValueError, match="--conditioning_timestep has to be a whole number, but is '399'"):
        as_begun(config)


def test_the_default_is_a_number_in_all_that_a_run_leaves(run):
    for name, begun, timestep in (("new", None, 625), ("old", 399, 399)):
        steps = {"num_path_nodes": 1, "steps_per_target": 1, "checkpointing_steps": 1}
        if begun:  # as by a version in which that was the default
            run(name, max_train_steps=2, conditioning_timestep=begun, **steps)
        folder = run(name, resume_from_checkpoint="latest", **steps)
        settings = [
            json.loads((folder / f"settings/{stage}.json").read_text()) for stage in ("degradation", "backtracking")
        ]
        report = json.loads((folder / "report.json").read_text())
        manifest = json.loads((folder / "path" / "path.json").read_text())
        told = [*settings, report["settings"], manifest["generator"], manifest["recording"]]
        told.append(read_settings(folder / "settings.yaml", DisBackConfig))
        assert [one["conditioning_timestep"] for one in told] == [timestep] * 6
        assert shlex.split(report["command"])[-2:] == ["--conditioning_timestep", str(timestep)]
        card = (folder / "README.md").read_text()
        assert f"--conditioning_timestep {timestep}" in card
        scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        assert scheduler["num_train_timesteps"] == timestep + 1
    whole = run("whole", conditioning_timestep=399, **steps)
    assert equal(student(folder), student(whole))
    with pytest.raises(ValueError, match="is 399, this one's is 625.* or pass --conditioning_timestep 399"):
        run("b", stage="backtrack", degradation_path=folder / "path")
