"""The format of `report.json`: it is read, and checked before anything in it is believed."""

from pathlib import Path
from typing import Any

from ..hub.files import inside, read_json
from ..hub.published import REPORT
from ..path.manifest import Kinds, check_fields, is_component, is_count, is_number


def read_report(folder: Path) -> dict[str, Any]:
    """The content of a folder's `report.json`; empty if there is none.

    Raises:
        ValueError: If it is not as `Report.write` writes it.
    """
    file = inside(folder, REPORT, str(folder))
    if not file.exists():
        return {}
    report = read_json(file)
    check_report(report, str(file))
    return report


def check_report(report: dict[str, Any], what: str) -> None:
    """Sees that a report, which somebody else may have written, holds what is read of it, in the right kinds.

    Raises:
        ValueError: With the first that is missing or wrong.
    """
    check_fields(report, {"files?": _are_counts, "component?": is_component, "stages?": dict, "settings?": dict}, what)
    for name, fields in _OF_AN_OUTCOME.items():
        if name in report:
            check_fields(report[name] if isinstance(report[name], dict) else {}, fields, f"{what}, {name},")
    has_student = "student" in report
    if has_student:
        check_fields(report, _OF_A_STUDENT, what)
    stages = report.get("stages", {})
    measures = {name: report[name] for name in ("floor", "teacher", "initial", "student") if name in report}
    for name, values in [*measures.items(), *stages.items()]:
        if not isinstance(values, dict) or not all(type(v) is float or is_number(v) for v in values.values()):
            raise ValueError(f"{what} is not as its format says: {name!r} holds no numbers by name.")
    for name, stage in stages.items():
        check_fields(stage, {"steps": is_count, "seconds": is_number, "peak_memory_mb": is_number}, f"{what}, {name},")
    needed = _OF_SETTINGS if has_student else {f"{name}?": kind for name, kind in _OF_SETTINGS.items()}
    check_fields(report.get("settings", {}), {**needed, "degradation_path?": str | None}, what)
    if not has_student:
        return
    check_fields(report["evaluation"], _OF_AN_EVALUATION, what)
    for name, metric in report["evaluation"].get("metrics", {}).items():
        check_fields(metric if isinstance(metric, dict) else {}, _OF_A_METRIC, f"{what}, {name},")
    check_fields(report["versions"], {"diffusers_disback": str}, what)
    if report["path"] is not None:
        kinds: Kinds = {"id": str, "num_nodes": is_count, "repo_id?": str}
        check_fields(report["path"], {**kinds, **({"commit": str} if "repo_id" in report["path"] else {})}, what)


def _are_counts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(is_count, value.values()))


def _are_names(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in value.values()
    )


def _are_intervals(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(named, dict)
        and all(isinstance(ends, list) and all(map(is_number, ends)) for ends in named.values())
        for named in value.values()
    )


_OF_A_STUDENT: Kinds = {
    **dict.fromkeys(("evaluation", "settings", "teacher_card", "teacher", "stages", "machine", "versions"), dict),
    **dict.fromkeys(("example_prompt", "pipeline_class", "command"), str),
    **{"resolution": is_count, "seed": is_number, "path": dict | None},
    "intervals?": _are_intervals,
    "behind?": _are_names,  # reports of earlier versions have neither this nor metrics
}
_OF_AN_EVALUATION: Kinds = {
    "name": str,
    "type": str,
    "num_pictures": is_count,
    "seed": is_number,
    "metrics?": dict,
}
_OF_A_METRIC: Kinds = {"label": str, "panel": str, "direction": lambda value: value in ("higher", "lower", "zero")}
_OF_AN_OUTCOME: dict[str, Kinds] = {
    "best_model": {"step": is_count, "metric": str, "value": is_number, "is_student": bool},
    "early_stopping": {"step": is_count, "max_steps": is_count, "metric": str, "patience": is_count},
}
_OF_SETTINGS: Kinds = {
    **{"pretrained_model_name_or_path": str, "output_dir": str, "conditioning_timestep": is_count},
    **dict.fromkeys(("revision", "variant", "generator_model_name_or_path", "teacher_lora"), str | None),
    **dict.fromkeys(("pretrained_vae_model_name_or_path", "single_file_config"), str | None),
}
