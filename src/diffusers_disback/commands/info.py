"""`diffusers-disback info`: what a folder, a file or a repository on the Hub is, from its configs and headers of weights."""

import argparse
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..hub.files import inside, printable, read_json
from ..hub.markdown import python, shell
from ..hub.published import REPORT
from .options import TEACHER, add_cache_dir, add_command


if TYPE_CHECKING:
    import torch

    from ..hub.repository import Repository

Section = tuple[str, dict[str, Any]]
"""What something is, and what is known of it by name."""

_SCHEDULER = "scheduler/scheduler_config.json"


def add_commands(group: Any) -> None:
    """Adds `info` to the commands."""
    parser = add_command(group, "info", info)
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a teacher, a student, a degradation path, a LoRA, or the --output_dir of a training run: a folder, a model on "
        "the Hub (user/name), or a .safetensors file",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub (default: main)")
    add_cache_dir(parser)


def info(parsed: argparse.Namespace) -> None:
    """Tells what a folder, a file or a model on the Hub is, and how it is used. Weights are neither loaded nor downloaded: configs and
    the headers of safetensors files are read."""
    name = parsed.model
    if os.path.isfile(name):
        sections = [describe_file(Path(name))]
    else:
        sections = list(describe(Place.find(name, parsed.revision, parsed.cache_dir)))
    for number, (title, rows) in enumerate(sections):
        print("\n" * (number > 0) + printable(title))
        for key, value in rows.items():
            if value is not None:
                print(f"  {printable(key)}: {printable(value)}")


@dataclass
class Place:
    """A folder, or a repository on the Hub of which the configs are here.

    Args:
        name (`str`): As its user calls it.
        root (`Path`): The folder with the configs.
        names (`list[str]`): All of its files.
        repository (`Repository`, *optional*): On the Hub.
        cache_dir (`str`, *optional*): Where downloads are kept.
    """

    name: str
    root: Path
    names: list[str] = field(default_factory=list)
    repository: "Repository | None" = None
    cache_dir: str | None = None

    @classmethod
    def find(cls, name: str, revision: str | None, cache_dir: str | None) -> "Place":
        """Looks for a folder or repository, and downloads its configs.

        Raises:
            ValueError: If there is none, or a folder is asked for a revision.
        """
        from ..hub.repository import Repository, is_repo_id
        from ..models.model_files import locate
        from ..models.pipeline_folder import INDEX
        from ..path.manifest import MANIFEST

        is_folder = os.path.isdir(name)
        names: list[str] = []
        if not is_folder and not is_repo_id(name):
            raise ValueError(f"{name!r} is no folder or file, and no name of a repository on the Hub (user/name).")
        if is_folder and revision is not None:
            raise ValueError(f"{name} is a folder, which has no revisions; leave --revision {revision} out.")

        def choose(found: list[str]) -> list[str]:
            names[:] = found
            return [one for one in found if one in (INDEX, MANIFEST, REPORT) or one.endswith("config.json")]

        root, _ = locate(name, revision, choose, cache_dir)
        return cls(name, root, names, None if is_folder else Repository(name), cache_dir)

    @property
    def commit(self) -> str | None:
        """Of a repository."""
        return None if self.repository is None else self.root.name

    def json(self, name: str) -> dict[str, Any]:
        """The content of a config; empty if there is none."""
        file = inside(self.root, name, self.name)
        return read_json(file, f"{name} of {self.name}") if file.is_file() else {}

    def header(self, name: str) -> dict[str, tuple[str, list[int]]]:
        """The precision and the shape of every tensor of a file of weights."""
        if self.repository is not None:
            return self.repository.header(name, self.root.name)
        return header_of(inside(self.root, name, self.name))


def header_of(file: Path) -> dict[str, tuple[str, list[int]]]:
    """The precision and the shape of every tensor of a file of weights on this machine."""
    from ..models.weights import layout_of

    return _tensors(*layout_of(file))


def _tensors(shapes: "dict[str, torch.Size]", dtypes: dict[str, str]) -> dict[str, tuple[str, list[int]]]:
    return {key: (dtypes[key], list(shape)) for key, shape in shapes.items()}


def describe(place: Place) -> Iterator[Section]:
    """All that a folder or repository is: a run, for example, may hold a student and a path, too.

    Raises:
        ValueError: If it is nothing that is known here, or a file in it is not as its format says.
    """
    from ..evaluation.report_format import read_report
    from ..models.pipeline_folder import INDEX
    from ..path.manifest import ADAPTER, MANIFEST

    report, known = read_report(place.root), False
    if place.repository is None and any(name.startswith("settings/") for name in place.names):
        known = True
        yield describe_run(place, report)
    if "student" in report:
        known = True
        yield describe_student(place, report)
    if INDEX in place.names:
        known = True
        yield describe_pipeline(place, "student" in report)
    for name in (MANIFEST, f"path/{MANIFEST}"):
        if name in place.names:
            known = True
            yield describe_path(place, name)
    for name in (ADAPTER, f"lora/{ADAPTER}"):
        if name in place.names:
            known = True
            yield describe_lora(name, place.header(name))
    if not known:
        held = ", ".join(place.names[:8]) or "no file that could say what it is"
        raise ValueError(f"{place.name} is no pipeline, path, LoRA or training run of this library. It holds {held}.")


def describe_file(file: Path) -> Section:
    """What a file of weights is.

    Raises:
        ValueError: If it is neither a LoRA nor a checkpoint that can be a teacher.
    """
    from ..models.original_layout import SUPPORTED, kind_of, read_header, settings_in

    shapes, dtypes = read_header(file, str(file))
    header = _tensors(shapes, dtypes)
    if any("lora" in key for key in header):
        return describe_lora(file.name, header)
    kind = kind_of(shapes, str(file))
    said = ", ".join(f"{name} {value}" for name, value in settings_in(file, kind, str(file)).items())
    return "A checkpoint in one file, which can be a teacher", {
        "pipeline": SUPPORTED[kind],
        "its own settings": said or None,
        "weights": _size(header),
        "distil it": f"{TEACHER} {file}",
    }


def describe_pipeline(place: Place, has_report: bool) -> Section:
    """What a pipeline's configs say of it: a teacher; or a student, of which a report says more."""
    from ..families import FAMILIES, family_class, network_name_of, usage_of
    from ..models.batch import NO_LABEL
    from ..models.generator import is_one_step_scheduler
    from ..models.noise_schedule import predicted_by, scheduler_of
    from ..models.pipeline_folder import components_of, of_variants, read_index
    from ..models.reference import ModelReference
    from ..planning.plan import meta_networks_beside

    index = read_index(place.root, place.name)
    kind, scheduler = str(index.get("_class_name")), components_of(index).get("scheduler", ["", ""])[1]
    supported = [family for family in FAMILIES.values() if kind in family.pipeline_classes]
    if not supported:
        classes = sorted({name for family in FAMILIES.values() for name in family.pipeline_classes})
        return f"A {kind}, which is of no family that can be distilled here", {"supported": ", ".join(classes)}
    family = family_class(kind, scheduler)
    model = ModelReference(place.name, place.commit).resolve_configs(network_name_of, place.cache_dir)
    network, others = model.meta_network(), meta_networks_beside(model)
    family.check_network(network.config, f"The {family.network_name} of {place.name}")
    config = place.json(_SCHEDULER) or place.json("scheduler_config.json")
    is_student = has_report or is_one_step_scheduler(scheduler_of(config, f"The scheduler's config of {place.name}"))
    rows: dict[str, Any] = {
        "pipeline": kind,
        "family": next(name for name, one in FAMILIES.items() if one is family),
        "prediction": predicted_by(config),
        "schedule": _schedule(config),
    }
    if isinstance(network.config.sample_size, int):
        side = network.config.sample_size
        rows["images"] = f"{side * family.stride_of(others)} pixels a side"
        rows["samples of the denoiser"] = f"{network.config.in_channels} x {side} x {side}"
    folder = f"{family.network_name}/" if any(one.startswith(f"{family.network_name}/") for one in place.names) else ""
    own = [Path(one) for one in place.names if one.startswith(folder) and one.count("/") == folder.count("/")]
    for variant, files in of_variants(own).items():
        weights = [file for file in files if file.suffix == ".safetensors"]
        header = {key: tensor for file in weights for key, tensor in place.header(file.as_posix()).items()}
        name = family.network_name if variant is None else f"{family.network_name}, variant {variant}"
        rows[name] = f"{type(network).__name__}, {_size(header)}"
    for name, part in others.items():
        rows[name] = f"{type(part).__name__}, {sum(one.numel() for one in part.parameters()) / 1e6:.4g} M parameters"
    rows["commit"] = place.commit
    if is_student:
        usage = usage_of(kind, network.config, scheduler, index)
        caption = NO_LABEL if "{label}" in usage.condition else usage.example
        rows["load it"] = f"DiffusionPipeline.from_pretrained({python(place.name)}{usage.loading})"
        rows["call it"] = f"pipe({usage.call(caption, 1)})"
        return "A one-step student, as a pipeline", rows
    if family.conditioning_timestep is not None:
        rows["conditioning timestep"] = f"{family.conditioning_timestep} by default"
    rows["distil it"] = f"train_disback.py {shell([TEACHER, place.name])} --output_dir outputs/student"
    return "A teacher", rows


def _schedule(config: dict[str, Any]) -> str:
    """A scheduler's config in words."""
    names = ["num_train_timesteps", "shift", "sigma_min", "sigma_max", "sigma_data"]
    names += ["beta_schedule", "beta_start", "beta_end", "rescale_betas_zero_snr"]
    if config.get("trained_betas") is not None:
        names = ["num_train_timesteps", "timestep_spacing"]
    said = [
        f"{name} {config[name]}" for name in names if config.get(name) and isinstance(config[name], str | int | float)
    ]
    return ", ".join([str(config.get("_class_name")), *said])


def _size(header: dict[str, tuple[str, list[int]]]) -> str:
    """The number of parameters in files of weights, and their precisions."""
    counts: dict[str, int] = {}
    for dtype, shape in header.values():
        counts[dtype] = counts.get(dtype, 0) + math.prod(shape)
    return f"{sum(counts.values()) / 1e6:.4g} M parameters in {' and '.join(sorted(counts)) or 'no precision'}"


def describe_student(place: Place, report: dict[str, Any]) -> Section:
    """What the report of a student says of it."""
    settings, stages, path = report["settings"], report["stages"], report["path"]
    rows: dict[str, Any] = {
        "teacher": settings["pretrained_model_name_or_path"],
        "conditioning timestep": settings["conditioning_timestep"],
        "images": f"{report['resolution']} pixels a side",
        "path": "none" if path is None else f"{path['num_nodes']} nodes{_on_the_hub(path)}",
    }
    rows |= {f"steps of {name}": stage["steps"] for name, stage in stages.items()}
    if "best_model" in report and report["best_model"]["is_student"]:
        rows["taken at step"] = f"{report['best_model']['step']}, the best by {report['best_model']['metric']}"
    evaluation = report["evaluation"]
    rows["measured on"] = f"{evaluation['num_pictures']} images ({evaluation['name']}), seed {evaluation['seed']}"
    for name, value in report["student"].items():
        beside = [
            f"{which} {report[which][name]:.4g}" for which in ("teacher", "initial") if name in report.get(which, {})
        ]
        rows[name] = f"{value:.4g}" + (f" ({', '.join(beside)})" if beside else "")
    rows["example prompt"] = report["example_prompt"]
    rows["made by"] = f"diffusers-disback {report['versions']['diffusers_disback']}"
    return f"A one-step student of {settings['pretrained_model_name_or_path']}", rows


def _on_the_hub(path: dict[str, Any]) -> str:
    return f" of {path['repo_id']}" if "repo_id" in path else ""


def describe_path(place: Place, name: str) -> Section:
    """What the manifest of a degradation path says of it."""
    from ..path.manifest import MANIFEST, read_manifest

    manifest = read_manifest(inside(place.root, name, place.name), place.name, pinned=place.repository is not None)
    teacher, start, nodes = manifest["teacher"], manifest["generator"], manifest["nodes"]
    where = place.name if name == MANIFEST else f"{place.name}/path"
    return f"A degradation path of {len(nodes)} nodes", {
        "teacher": teacher["name_or_path"],
        "start": f"{start['name_or_path'] or 'the teacher'} at timestep {start['conditioning_timestep']}",
        "state": "complete" if manifest["complete"] else "unfinished",
        "steps of the nodes": " ".join(str(node["step"]) for node in nodes) or None,
        "kinds of nodes": ", ".join(sorted({f"{node['kind']} in {node['dtype']}" for node in nodes})) or None,
        "size": f"{sum(node['bytes'] for node in nodes) / 1e9:.3g} GB",
        "id": manifest["id"],
        "go along it": shell(["train_disback.py", "--stage", "backtrack", "--degradation_path", where]),
    }


def describe_lora(name: str, header: dict[str, tuple[str, list[int]]]) -> Section:
    """What the header of a LoRA says of it."""
    down = {key: shape for key, (_, shape) in header.items() if re.search(r"lora_(A|down)\b|lora\.down", key)}
    ranks = sorted({shape[0] for shape in down.values() if shape})
    # `unet.…` of diffusers; `lora_unet_…` of other programs.
    parts = sorted({re.split(r"[._]", key.removeprefix("lora_"))[0] for key in header})
    return f"A LoRA ({name})", {
        "layers": len(down),
        "rank": ", ".join(map(str, ranks)) or "not known",
        "weights": _size(header),
        "of": ", ".join(parts[:8]),
    }


def describe_run(place: Place, report: dict[str, Any]) -> Section:
    """Where a training run stands, by what it has left."""
    from ..hub.publish.student import has_ended
    from ..training.checkpoint import damage
    from ..training.run_folder import RunFolder

    run = RunFolder(place.root)
    settings, status = run.settings(), place.json("status.json")
    rows: dict[str, Any] = {"teacher": settings.get("pretrained_model_name_or_path")}
    for stage, steps in (("degradation", "degradation_steps"), ("backtracking", "max_train_steps")):
        if not run.settings_file(stage).is_file():
            continue
        whole = [one for one in run.checkpoints(stage) if damage(one, sizes_only=True) is None]
        done = f"{report['stages'][stage]['steps']} updates" if stage in report.get("stages", {}) else "begun"
        last = f", last whole checkpoint {whole[-1].name}" if whole else ""
        rows[stage] = f"{done} of {settings.get(steps)}{last}"
    if status:
        rows["last validation"] = f"{status.get('stage')}, update {status.get('step')} of {status.get('max_steps')}"
        alarms = status.get("alarms")
        rows["alarms"] = ", ".join(alarms) if isinstance(alarms, dict) and alarms else None
    wanted = settings.get("max_train_steps")
    ended = "student" in report and isinstance(wanted, int) and has_ended(report, wanted)
    if not ended:
        rows["go on"] = "run its command again with --resume_from_checkpoint latest"
    return f"A training run that is {'finished' if ended else 'not finished'}", rows
