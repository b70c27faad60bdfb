"""Whether a planned run fits the memory of a device, and which settings would help if it does not."""

from dataclasses import dataclass, field, replace
from typing import Any

from ..training.config import TrainingConfig
from .plan import Planner


HEADROOM = 0.1  # share of a device kept free for what is not counted; see `plan.REMARKS`


@dataclass(frozen=True)
class Verdict:
    """Whether a run fits a device.

    Args:
        peak (`int`): What the plan counts at the worst moment of either stage, in bytes.
        device_memory (`int`): Of the device, in bytes.
        savings (`dict[str, int]`): If it does not fit: flags, and the peak with each of them alone, the least first.
    """

    peak: int
    device_memory: int
    savings: dict[str, int] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        """Whether the peak leaves `HEADROOM` of the device free."""
        return self.peak <= (1 - HEADROOM) * self.device_memory

    def __str__(self) -> str:
        what = f"peak {self.peak / 1e9:.1f} GB of {self.device_memory / 1e9:g} GB on the device: "
        if self.fits:
            return what + f"fits, with {HEADROOM:.0%} kept free for what is not counted"
        text = what + f"does not fit; {HEADROOM:.0%} are kept free for what is not counted"
        peaks = "".join(f"\n  {flag}: {peak / 1e9:.1f} GB" for flag, peak in self.savings.items())
        return text + (
            f". The peak with one setting changed:{peaks}" if peaks else "; no setting that we know of helps"
        )


def verdict(planner: Planner, device_memory: float) -> Verdict:
    """Compares a plan with the memory of a device.

    Args:
        planner (`Planner`): Of the run, as one process has it.
        device_memory (`float`): In bytes.
    """
    peak, memory = max(planner.total(stage) for stage in (1, 2)), int(device_memory)
    if Verdict(peak, memory).fits:
        return Verdict(peak, memory)
    peaks = {flag: max(changed.total(stage) for stage in (1, 2)) for flag, changed in _alternatives(planner).items()}
    return Verdict(
        peak, memory, {flag: peaks[flag] for flag in sorted(peaks, key=peaks.__getitem__) if peaks[flag] < peak}
    )


def _alternatives(planner: Planner) -> dict[str, Planner]:
    """Plans with one setting changed that saves memory, by its flag."""
    training: TrainingConfig = planner.training
    changes: dict[str, dict[str, Any]] = {}
    if not training.gradient_checkpointing:
        changes["--gradient_checkpointing"] = {"gradient_checkpointing": True}
    if not training.offload_idle_role and not training.use_paged_adam:
        changes["--offload_idle_role"] = {"offload_idle_role": True}
    if not training.use_8bit_adam:
        changes["--use_8bit_adam"] = {"use_8bit_adam": True}
    if training.lora_rank is None:
        changes["--lora_rank 64"] = {"lora_rank": 64}
    if training.train_batch_size > 1:
        steps = training.train_batch_size * training.gradient_accumulation_steps
        changes[f"--train_batch_size 1 --gradient_accumulation_steps {steps}"] = {
            "train_batch_size": 1,
            "gradient_accumulation_steps": steps,
        }
    return {flag: replace(planner, training=replace(training, **change)) for flag, change in changes.items()}
