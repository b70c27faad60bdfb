"""What is written at the end of a run, and whether all of it is there."""

import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ...evaluation.report import Report, read_report, summary, versions
from ...families import ModelFamily
from ...models.pipeline_folder import INDEX
from ...path.manifest import MANIFEST
from ...path.path import DegradationPath
from ...path.storage import HubNodes
from ...training.config import DisBackConfig, guidance_of_node
from ...training.results import BacktrackingResult
from ...training.run_folder import RunFolder
from ...training.settings.fields import values
from ..files import write_json, written_whole
from ..published import REPORT, published, published_command
from ..repository import HubError
from .run import write_model_card
from .student import has_ended, missing_results, results


def is_finished(config: DisBackConfig) -> bool:
    """Whether all that a run leaves of the steps that are asked for is there. What is damaged or missing is told: it is
    made anew from the last checkpoint; if that was thrown away, a student that is whole is not trained again for it."""
    folder, state = Path(config.output_dir), PartialState()
    try:
        report = read_report(folder)
    except ValueError as error:
        state.print(f"{folder / REPORT} is damaged and is made anew ({error}).", file=sys.stderr)
        return False
    stages = report.get("stages", {})
    if config.stage == "record":
        done = "degradation" in stages and _nodes_are_there(config.path_folder)
        remakes = done and (config.path_folder / MANIFEST).exists()
    else:
        done = has_ended(report, config.max_train_steps)
        checkpoints = RunFolder(folder).checkpoints("backtracking")
        last = stages["backtracking"]["steps"] if done else config.max_train_steps
        remakes = bool(checkpoints) and checkpoints[-1].name == f"checkpoint-{last:06d}"
    missing = missing_results(folder, report) if done else []
    if not missing:
        return done
    keeps = not remakes and not any(name == INDEX or name.endswith(".safetensors") for name in missing)
    what = f"{folder} has no {', '.join(missing)}"
    state.print(
        f"{what}. The last checkpoint, from which it could be made, is gone, too; the student is whole."
        if keeps
        else f"{what}: made anew from the last checkpoint.",
        file=sys.stderr,
    )
    return keeps


def _nodes_are_there(folder: Path) -> bool:
    """Whether a folder holds a complete path, every file of which is there."""
    if not (folder / MANIFEST).is_file():
        return False
    path = DegradationPath.from_pretrained(folder)
    files = [folder / node["name"] / path.denoiser / name for node in path.nodes for name in node["files"]]
    return path.complete and all(file.is_file() for file in files)


def write_results(
    report: Report,
    family: ModelFamily,
    path: DegradationPath | None,
    result: BacktrackingResult | None,
    config: DisBackConfig,
    command: Sequence[str],
    teacher_card: dict[str, Any],
) -> str:
    """Writes report, images and model card. Returns a summary.

    Args:
        report (`Report`): With what was measured.
        family (`ModelFamily`): The teacher.
        path (`DegradationPath`, *optional*): The complete path.
        result (`BacktrackingResult`, *optional*): Of stage 2, if it was run.
        config (`DisBackConfig`): All settings.
        command (`Sequence[str]`): The script and its arguments that repeat the run.
        teacher_card (`dict`): What the teacher's card declares, as it was read before training.
    """
    folder, state = Path(config.output_dir), PartialState()
    stages: dict[str, Any] = {}
    report.write_samples(folder / "samples.png")
    if path is not None:
        stages["degradation"] = path.manifest["cost"]
        if not (config.path_is_shared and config.path_disk_budget_gb):  # or it would be downloaded once more
            scales = [guidance_of_node(node, len(path), config) for node in range(len(path) + 1)]
            try:
                report.write_path(path, scales, folder / "path.png")
            except HubError as error:  # nodes may have left the cache since
                print(f"path.png is not made. {error}")
            if config.stage == "record":
                with written_whole(path.folder / "path.png") as draft:
                    shutil.copyfile(folder / "path.png", draft)
    content = {
        "teacher_card": teacher_card,
        "stages": stages,
        "path": None if path is None else _origin(path),
        "pipeline_class": type(family.pipeline).__name__,
        "component": family.network_name,
        "resolution": family.resolution(config.resolution),
        "seed": config.seed,
        "versions": versions(),
        "machine": {"device": device_name(state.device), "num_processes": state.num_processes},
        "settings": published(values(config)),
    }
    if result is not None:
        stages["backtracking"] = result.cost
        content |= result.content()
        content["machine"]["mixed_precision"] = result.mixed_precision
        report.write_convergence(result.curve, result.switches, folder / "convergence.png")
        launch = ["accelerate", "launch", "--num_processes", str(state.num_processes)]
        launch += ["--mixed_precision", result.mixed_precision]
        content["command"] = shlex.join([*launch, *published_command(command)])
    written = report.content(**content)
    if result is not None:
        write_model_card(folder, written)
    # The last, with the names of all others: what it does not name, or is not there, is not finished.
    write_json(folder / REPORT, {**written, "files": results(folder)})
    return summary(folder)


def _origin(path: DegradationPath) -> dict[str, Any]:
    """Where a path came from, for the report."""
    origin = {"id": path.manifest["id"], "num_nodes": len(path), "nodes": path.nodes}
    if isinstance(path.folders, HubNodes):
        origin |= {"repo_id": path.where, "commit": path.folders.commit}
    return origin


def device_name(device: torch.device) -> str:
    """The GPU's name, or the number of threads on the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
