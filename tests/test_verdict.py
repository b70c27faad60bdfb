"""Whether a plan fits a device."""

import pytest
from test_plan import small

from diffusers_disback.commands.cli import main
from diffusers_disback.planning.verdict import HEADROOM, verdict


def peak(planned) -> int:
    return max(planned.total(1), planned.total(2))


def test_a_run_fits_if_the_headroom_stays_free():
    planned = small()
    room = peak(planned) / (1 - HEADROOM)
    fits, tight = verdict(planned, 1.001 * room), verdict(planned, 0.999 * room)
    assert fits.fits and not fits.savings and str(fits).endswith("fits, with 10% kept free for what is not counted")
    assert not tight.fits and "does not fit" in str(tight)
    assert peak(planned) < 0.999 * room, "what fits without its headroom does not fit"


def test_what_does_not_fit_is_told_what_would_save_most():
    """Each is the plan of the run with that setting alone."""
    settings = {"mixed_precision": "bf16", "train_batch_size": 2, "gradient_accumulation_steps": 3}
    found = verdict(small(**settings), 1e6)
    assert set(found.savings) == {
        "--gradient_checkpointing",
        "--offload_idle_role",
        "--use_8bit_adam",
        "--lora_rank 64",
        "--train_batch_size 1 --gradient_accumulation_steps 6",
    }
    assert found.savings["--use_8bit_adam"] == peak(small(**settings, use_8bit_adam=True))
    assert list(found.savings.values()) == sorted(found.savings.values()) and max(found.savings.values()) < found.peak
    assert all(flag in str(found) for flag in found.savings)


def test_advice_that_is_taken_already_is_not_repeated():
    taken = {"gradient_checkpointing": True, "use_8bit_adam": True, "lora_rank": 2, "use_paged_adam": True}
    found = verdict(small(mixed_precision="bf16", **taken), 1e6)
    assert not found.savings and "no setting that we know of helps" in str(found)


@pytest.mark.parametrize("gb, code, said", [("1", 0, "fits"), ("0.0001", 2, "does not fit")])
def test_the_command_says_whether_it_fits_and_exits_with_it(gb, code, said, teacher_folder, capsys):
    line = ["plan", "--pretrained_model_name_or_path", str(teacher_folder), "--resolution", "32"]
    assert main([*line, "--device_memory_gb", gb]) == code
    last = next(each for each in reversed(capsys.readouterr().out.splitlines()) if each.startswith("peak "))
    assert said in last and f"of {gb} GB on the device" in last
    assert main(line) == 0 and "on the device: " not in capsys.readouterr().out, "no GPU here, and none named"


def test_a_size_that_is_none_is_refused(capsys):
    assert main(["plan", "--device_memory_gb", "0"]) == 2
    assert "above 0" in capsys.readouterr().err
