"""Objectives and arms on the shapes teacher, by the quickstart's settings: distance and accuracies over generator updates.

    python benchmarks/objectives.py --name sid --seeds 0 1 2 -- --objective sid
    python benchmarks/objectives.py --name sid_none --seeds 0 -- --objective sid --num_path_nodes 0
    python benchmarks/objectives.py --name f_distill --real_images 2000 -- --objective f_distill --objective_args divergence=jensen_shannon
    python benchmarks/objectives.py --report
    python benchmarks/objectives.py --compare near_dmd low_dmd

What follows `--` are flags of the training script, over those of `benchmarks/objectives.args`, which were the
quickstart's when these runs began. Every seed is
a line of `benchmarks/results/objectives/<name>.jsonl`, written as it ends; seeds that are there are not run again. Nothing but the
student is sampled: the teacher's and the initial student's measures are those of the quickstart.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from scripts import set_threads
from torch import nn


ROOT = Path(__file__).parents[1]
SHAPES = ROOT / "examples" / "text_to_image" / "shapes"
sys.path.insert(0, str(SHAPES.parent))

from diffusers_disback import (  # noqa: E402
    BacktrackingTrainer,
    DegradationPath,
    DegradationRecorder,
    DisBackConfig,
    PromptConditions,
    PromptFile,
    load_family,
)
from diffusers_disback.commands.command_line import read_flags  # noqa: E402
from diffusers_disback.models.weights import fingerprint  # noqa: E402
from diffusers_disback.training.inputs import load_image_files, load_prompts, real_images  # noqa: E402
from diffusers_disback.training.processes import process_state  # noqa: E402
from shapes.dataset import write_image_folder  # noqa: E402
from shapes.evaluator import shapes_evaluation  # noqa: E402


BASE = Path(__file__).with_suffix(".args")
RESULTS = Path(__file__).parent / "results" / "objectives"
INITIAL, TEACHER = (
    208.4,
    0.9715,
)  # docs/quickstart_report.json: the initial student's distance, the teacher's shape accuracy


def run(config: DisBackConfig, evaluation: Any, widths: list[int] | None = None) -> dict[str, Any]:
    """The curve of stage 2 at each of `validation_steps`, stage 1's cost, and the seconds; of a student that starts from the
    teacher's copy, or from random weights as a UNet of other widths."""
    family = load_family(str(config.pretrained_model_name_or_path))
    prompts = load_prompts(config) if config.has_discriminator else PromptFile(SHAPES / "prompts.txt")
    data = PromptConditions(prompts, family.encode)
    images = real_images(config, family, data, load_image_files(config, prompts), process_state())
    generator, path, started = family.initial_generator(), None, time.monotonic()
    if widths is not None:
        torch.manual_seed(config.seed)
        generator = type(generator).from_config(generator.config, block_out_channels=widths)
    if config.num_path_nodes:
        own, timestep = fingerprint(family.network), config.conditioning_timestep
        start = {"name_or_path": None, "sha256": fingerprint(generator), "conditioning_timestep": timestep}
        path = DegradationPath.create(config.path_folder, family.local_model, own, start, {})
        path = DegradationRecorder(config, config, family, generator, data, path).record()

    def measure(network: nn.Module) -> dict[str, float]:
        pipeline = family.undecorated(family.one_step(network, config.conditioning_timestep))
        return evaluation.measure(evaluation.sample(family, pipeline)[0])

    trainer = BacktrackingTrainer(config, config, family, generator, data, path, measure, images=images)
    trainer.train()
    names = ("step", "distance", "shape_accuracy", "colour_accuracy", "background_accuracy")
    curve = [{name: round(float(row[name]), 5) for name in names} for row in trainer.curve]
    stage_1 = 0 if path is None else path.manifest["cost"]["steps"]
    return {"curve": curve, "stage_1_updates": stage_1, "seconds": round(time.monotonic() - started, 1)}


def rows(file: Path) -> list[dict[str, Any]]:
    """The results that a file holds."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def report(folder: Path) -> str:
    """A Markdown table: for each name, medians over seeds at the end, with the range."""
    lines = [
        "| run | flags | seeds | distance | of the initial | shape | colour | updates to 0.25 |",
        "| --- " * 8 + "|",
    ]

    def spread(values: list[float], form: str) -> str:
        low, high = min(values), max(values)
        return f"{median(values):{form}}" + (f" ({low:{form}}-{high:{form}})" if len(values) > 1 else "")

    for file in sorted(folder.glob("*.jsonl")):
        found = rows(file)
        last = [row["curve"][-1] for row in found]
        distances = [row["distance"] for row in last]
        reached = [
            next((str(point["step"]) for point in row["curve"] if point["distance"] <= INITIAL / 4), "never")
            for row in found
        ]
        lines.append(
            f"| {file.stem} | `{' '.join(found[0]['flags'])}` | {len(found)} | {spread(distances, '.2f')} | "
            f"{median(distances) / INITIAL:.3f} | {spread([row['shape_accuracy'] for row in last], '.4f')} | "
            f"{spread([row['colour_accuracy'] for row in last], '.4f')} | {' '.join(reached)} |"
        )
    return "\n".join(lines)


def comparison(folder: Path, prefixes: list[str]) -> str:
    """A Markdown table: the distance of each arm at the end, and how many times that of `none` is its own, seed by seed."""
    lines = [
        "| runs | arm | seeds | distance, median (range) | none / arm, by seed | median | above 1 | |",
        "| --- " * 8 + "|",
    ]
    for prefix in prefixes:
        found = {
            arm: {row["seed"]: row["curve"][-1]["distance"] for row in rows(folder / f"{prefix}_{arm}.jsonl")}
            for arm in ("none", "ramp", "warm", "path")
        }
        for arm, distances in found.items():
            if not distances:
                continue
            seeds, values = sorted(distances.keys() & found["none"].keys()), list(distances.values())
            ratios = [found["none"][seed] / distances[seed] for seed in seeds]
            above = sum(ratio > 1 for ratio in ratios)
            cells = [
                prefix,
                arm,
                str(len(values)),
                f"{median(values):.1f} ({min(values):.1f}-{max(values):.1f})",
                *(
                    ("", "", "", "")
                    if arm == "none"
                    else (
                        " ".join(f"{ratio:.2f}" for ratio in ratios),
                        f"{median(ratios):.2f}",
                        f"{above} of {len(ratios)}",
                        judgement(ratios),
                    )
                ),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def judgement(ratios: list[float]) -> str:
    """By the rule of docs/evidence.md, for five seeds."""
    if len(ratios) < 5:
        return "fewer than 5 seeds"
    if median(ratios) > 1.05 and sum(ratio > 1 for ratio in ratios) >= 4:
        return "helps"
    if median(ratios) < 1 / 1.05 and sum(ratio < 1 for ratio in ratios) >= 4:
        return "hurts"
    return "no difference shown"


def main() -> None:
    place = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    flags = sys.argv[place + 1 :]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", help="of the file with the results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--images", type=int, default=2000, help="of each evaluation")
    parser.add_argument(
        "--real_images", type=int, default=0, help="for a discriminator: so many, with captions of their own"
    )
    parser.add_argument("--student_widths", type=int, nargs=2, help="start from random weights, with these widths")
    parser.add_argument("--report", action="store_true", help="print the table of what is there")
    parser.add_argument("--compare", nargs="+", help="print the arms of these runs side by side, such as near_dmd")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parsed = parser.parse_args(sys.argv[1:place])
    if parsed.report:
        print(report(parsed.output))
        return
    if parsed.compare:
        print(comparison(parsed.output, parsed.compare))
        return
    set_threads()
    file = parsed.output / f"{parsed.name}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    evaluation = shapes_evaluation(parsed.images)
    for seed in parsed.seeds:
        if any(row["seed"] == seed for row in rows(file)):
            continue
        with tempfile.TemporaryDirectory() as folder:
            given = read_flags(DisBackConfig, [*BASE.read_text().split(), *flags])
            if parsed.real_images:
                write_image_folder(Path(folder) / "images", parsed.real_images, seed)
                given |= {"train_data_dir": str(Path(folder) / "images"), "cache_dir": str(Path(folder) / "cache")}
            config = DisBackConfig(**{"pretrained_model_name_or_path": str(SHAPES / "teacher"), **given})
            # Checkpoints are of no use here, and the curve is what is compared.
            config = replace(config, seed=seed, output_dir=folder, report_to="none", checkpointing_steps=10**6)
            result = run(config, evaluation, parsed.student_widths)
        line = {
            "seed": seed,
            "flags": flags,
            "images": parsed.images,
            "student_widths": parsed.student_widths,
            "real_images": parsed.real_images,
            **result,
        }
        with open(file, "a") as stream:
            stream.write(json.dumps(line) + "\n")
        print(parsed.name, seed, result["curve"][-1], f"{result['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
