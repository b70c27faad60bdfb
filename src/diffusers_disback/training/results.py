"""What a stage found out, as report and card read it."""

from dataclasses import dataclass, field
from typing import Any

from ..models.adapters import Lora


@dataclass(frozen=True)
class BacktrackingResult:
    """What stage 2 found out.

    Args:
        cost (`dict[str, float]`): Steps, seconds and the peak of memory in MB.
        curve (`list[dict]`): Measures of the student over generator updates.
        switches (`list[int]`): The updates from which nodes N-2, ..., 0 were the target.
        waits (`list[dict]`): How long the run waited for each node.
        measures (`list[dict]`): The mismatches that the adaptive schedule decided by.
        rate_changes (`list[dict]`): Learning rates with which it was resumed, if they were others.
        mixed_precision (`str`): Of the run.
        lora (`Lora`, *optional*): The adapter that was trained, and its config.
        outcome (`dict`): Of `Validation`: the best student, and an early end.
    """

    cost: dict[str, float]
    curve: list[dict[str, float]]
    switches: list[int]
    waits: list[dict[str, float]]
    measures: list[dict[str, Any]]
    rate_changes: list[dict[str, Any]]
    mixed_precision: str
    lora: Lora | None = None
    outcome: dict[str, Any] = field(default_factory=dict)

    def content(self) -> dict[str, Any]:
        """What `report.json` holds of it."""
        content: dict[str, Any] = {"curve": self.curve, "switches": self.switches, "waits": self.waits}
        content["measures"] = self.measures
        if self.lora is not None:
            config = self.lora[1]
            content["lora"] = {"rank": config.r, "alpha": config.lora_alpha, "folder": "lora"}
        if self.rate_changes:
            content["rate_changes"] = self.rate_changes
        return content | self.outcome
