#!/usr/bin/env python
"""Seconds a step of both stages, ours and a plain baseline's, in turn in one process; and the peak of memory.

python benchmarks/bench_step.py                     # minutes on two CPU cores
python benchmarks/bench_step.py --memory            # one process per mode
python benchmarks/bench_step.py --models sdxl --factor 1 --latents 128 --precision bf16    # on a GPU
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from baseline import Baseline, Wastes
from configurations import UNETS, machine, parameters, random_pipeline, text_share
from diffusers_disback.backtracking import BacktrackingTrainer
from diffusers_disback.data.conditions import PromptConditions, batch_of
from diffusers_disback.degradation import DegradationRecorder
from diffusers_disback.families import family_of
from diffusers_disback.models.adapters import SharedNetwork
from diffusers_disback.models.reference import LocalModel, ModelReference
from diffusers_disback.path.path import DegradationPath
from diffusers_disback.training.config import BacktrackingConfig, DegradationConfig, TrainingConfig
from diffusers_disback.training.networks import add_adapter
from diffusers_disback.training.processes import peak_memory_mb
from diffusers_disback.training.stage import Stage
from processes import start_python


IMPORTED_MB = psutil.Process().memory_info().rss / 1e6
PROMPTS = ["a red house by the sea", "a photograph of a cat", "an old map of an island", "two boats at dawn"]
# Widths and latents that a slow CPU takes in minutes.
SMALL = {"sd15": (0.1, 16), "sd21": (0.1, 16), "sdxl": (0.1, 16)}
RESULTS = Path(__file__).parent / "results"


def ours(pipeline: Any, stage: int, folder: str, arguments: argparse.Namespace, **changes: Any) -> Stage:
    """A stage of the library, ready for its first step. Stage 2 has a path of two nodes, and node 1 is its target."""
    config = TrainingConfig(
        output_dir=folder,
        train_batch_size=arguments.batch_size,
        mixed_precision=arguments.precision,
        report_to="none",
        conditioning_timestep=399,
        **changes,
    )
    family = family_of(pipeline).to(torch.device(arguments.device))
    data = PromptConditions(PROMPTS, family.encode)
    family.release_encoders()
    family.offload_to_cpu()
    generator = family.initial_generator(shared=config.all_adapters)
    if stage == 1:
        own = DegradationConfig(degradation_steps=10**6, num_path_nodes=0)
        return DegradationRecorder(config, own, family, generator, data, None)
    own = BacktrackingConfig(
        max_train_steps=10**6,
        steps_per_target=10**5,
        fake_score_updates=arguments.fake_score_updates,
        guidance_schedule="constant",
    )
    return BacktrackingTrainer(config, own, family, generator, data, path_of(family.network, config, folder))


def path_of(network: torch.nn.Module, config: TrainingConfig, folder: str) -> DegradationPath:
    """A path of two nodes that are the teacher itself."""
    start = {"name_or_path": None, "sha256": "0" * 64, "conditioning_timestep": config.conditioning_timestep}
    place = tempfile.mkdtemp(dir=folder)
    teacher = LocalModel(ModelReference(folder), Path(folder), "unet", commit=None)  # which is in memory alone
    path = DegradationPath.create(place, teacher, "0" * 64, start, {})
    if config.is_adapter("fake_score"):
        shared = SharedNetwork(network)
        add_adapter(shared, "fake_score", config, config.seed)
        for node in (1, 2):
            path.append(network, node, 0.0, "fake_score", torch.float16)
        shared.release()
    else:
        for node in (1, 2):
            path.append(network, node, 0.0)
    path.finish({})
    return path


def step_of(stage: Stage) -> Callable[[], None]:
    """One step of a stage as `Stage.run` makes it."""
    numbers = range(10**6)
    loader = iter(stage.batches.loader(numbers, 0))
    done = [0]

    def step() -> None:
        draws = [next(loader) for _ in range(stage.batches_per_step)]
        stage.train_step(
            done[0], [[batch_of(draw, stage.data, stage.accelerator.device) for draw in each] for each in draws]
        )
        done[0] += 1

    return step


def clock() -> float:
    """Seconds; on a CPU those of this process alone, which other work on the machine does not lengthen as much."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def interleaved(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step, all of them in turn, `rounds` times; a first round warms up and is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            started = clock()
            step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number:
                seconds[name].append(clock() - started)
    return seconds


def speed(name: str, stage: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Ours and the baseline, with each waste switched off alone, and with all switched off."""
    factor, latents = SMALL[name]
    factor, latents = arguments.factor or factor, arguments.latents or latents
    prompts = (PROMPTS * arguments.batch_size)[: arguments.batch_size]

    def pipeline() -> Any:
        return random_pipeline(name, factor, latents)

    modes = {"baseline": Wastes(), **{f"without {each}": Wastes.without(each) for each in Wastes.names()}}
    modes["without any but float32"] = Wastes.without(*(each for each in Wastes.names() if each != "float32"))
    with tempfile.TemporaryDirectory() as folder:
        steps: dict[str, Callable[[], None]] = {}
        for mode, wastes in modes.items():
            if arguments.only and mode not in ("baseline", *arguments.only):
                continue
            made = Baseline(pipeline().to(arguments.device), prompts, wastes, arguments.fake_score_updates)
            steps[mode] = made.stage_1 if stage == 1 else made.stage_2
        changes = {"ours": {}, f"ours, adapters of rank {arguments.lora_rank}": {"lora_rank": arguments.lora_rank}}
        for mode, change in changes.items():
            if arguments.only and mode not in arguments.only:
                continue
            steps[mode] = step_of(ours(pipeline(), stage, folder, arguments, **change))
        seconds = interleaved(steps, arguments.rounds)
    medians = {mode: statistics.median(values) for mode, values in seconds.items()}
    with torch.device("meta"):
        network = random_pipeline(name, factor, latents).unet
    return {
        "model": name,
        "stage": stage,
        "factor": factor,
        "latents": latents,
        "parameters": parameters(network),
        "text_share": text_share(name, factor, latents),
        "text_share_of_original": text_share(name),
        "seconds": {mode: round(value, 4) for mode, value in medians.items()},
        "all_seconds": {mode: [round(value, 4) for value in values] for mode, values in seconds.items()},
        "speedup": {
            mode: round(statistics.median(a / b for a, b in zip(seconds["baseline"], values, strict=True)), 3)
            for mode, values in seconds.items()
        },
    }


# Memory -------------------------------------------------------------------------------------------------------------

MODES: dict[str, dict[str, Any]] = {
    "full": {},
    "full, checkpointing": {"gradient_checkpointing": True},
    "adapters": {"lora_rank": 0},
    "adapters, checkpointing": {"lora_rank": 0, "gradient_checkpointing": True},
    "adapters, nf4": {"lora_rank": 0, "base_quantization": "nf4"},
    "adapters, nf4, checkpointing": {"lora_rank": 0, "base_quantization": "nf4", "gradient_checkpointing": True},
}


def measure(name: str, stage: int, mode: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Peak of memory of one mode in this process: MB (10^6 bytes), on a CPU above what is resident after the imports."""
    changes = {key: value or arguments.lora_rank for key, value in MODES[mode].items()}
    arguments.factor, arguments.latents = arguments.factor or 0.2, arguments.latents or 16
    with tempfile.TemporaryDirectory() as folder:
        made = ours(random_pipeline(name, arguments.factor, arguments.latents), stage, folder, arguments, **changes)
        step, device = step_of(made), made.accelerator.device
        built = psutil.Process().memory_info().rss / 1e6
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        step()
        started = clock()
        for _ in range(arguments.steps - 1):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = (clock() - started) / max(arguments.steps - 1, 1)
    peak = peak_memory_mb(device)
    with torch.device("meta"):
        number = parameters(random_pipeline(name, arguments.factor, arguments.latents).unet)
    found: dict[str, Any] = {
        "model": name,
        "stage": stage,
        "mode": mode,
        "parameters": number,
        "lora_rank": changes.get("lora_rank"),
        "steps": arguments.steps,
        "seconds_per_step": round(seconds, 4),
        "peak_mb": round(peak, 1),
    }
    if device.type == "cuda":
        return found | {"reserved_mb": round(torch.cuda.max_memory_reserved() / 1e6, 1)}
    return found | {
        "imported_mb": round(IMPORTED_MB, 1),
        "built_mb": round(built, 1),
        "above_imports_mb": round(peak - IMPORTED_MB, 1),
    }


def in_processes(arguments: argparse.Namespace, line: list[str]) -> list[dict[str, Any]]:
    """Each mode of each stage in a process of its own, since a process never gives its peak back."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name, stage, mode in itertools.product(arguments.models, arguments.stages, arguments.modes):
            file = Path(folder) / f"{len(found)}.json"
            command = [__file__, *line, "--measure", name, str(stage), mode, "--output", str(file)]
            process = start_python(command, arguments.forked)
            process.join()
            if process.exitcode:
                found.append({"model": name, "stage": stage, "mode": mode, "failed": process.exitcode})
            else:
                found.append(json.loads(file.read_text()))
            print(found[-1], file=sys.stderr, flush=True)
    return found


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--models", nargs="+", choices=UNETS, default=None)
    made.add_argument("--stages", nargs="+", type=int, choices=(1, 2), default=None)
    made.add_argument("--factor", type=float, help="of all widths; 0.2 for --memory")
    made.add_argument("--latents", type=int, help="side of the latents; 16 for --memory")
    made.add_argument("--batch_size", type=int, default=1)
    made.add_argument("--fake_score_updates", type=int, default=5)
    made.add_argument("--lora_rank", type=int, default=64)
    made.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no")
    made.add_argument("--threads", type=int, default=1, help="of PyTorch on the CPU")
    made.add_argument("--rounds", type=int, default=3, help="steps of each mode that are timed")
    made.add_argument("--only", nargs="+", metavar="MODE", help="of the table's rows, besides the baseline")
    made.add_argument("--memory", action="store_true", help="measure the peak of memory, in one process per mode")
    made.add_argument("--modes", nargs="+", choices=MODES, default=["full", "adapters"], help="of --memory")
    made.add_argument("--steps", type=int, default=2, help="of --memory, in each mode")
    made.add_argument(
        "--forked", action="store_true", help="make them forks of this process: sooner, but no peaks of their own"
    )
    made.add_argument("--measure", nargs=3, metavar=("MODEL", "STAGE", "MODE"), help=argparse.SUPPRESS)
    made.add_argument("--output", type=Path, help="a JSON file")
    return made


def main(line: list[str]) -> int:
    arguments = parser().parse_args(line)
    arguments.device = "cuda" if torch.cuda.is_available() else "cpu"  # as accelerate chooses
    torch.set_num_threads(arguments.threads)
    if arguments.measure:
        name, stage, mode = arguments.measure
        arguments.output.write_text(json.dumps(measure(name, int(stage), mode, arguments)))
        return 0
    if arguments.memory:
        arguments.models, arguments.stages = arguments.models or ["sdxl"], arguments.stages or [2]
        found = in_processes(arguments, line)
    else:
        arguments.models, arguments.stages = arguments.models or list(UNETS), arguments.stages or [1, 2]
        found = []
        for name in arguments.models:
            for stage in arguments.stages:
                found.append(speed(name, stage, arguments))
                print(found[-1]["model"], "stage", stage, found[-1]["seconds"], file=sys.stderr, flush=True)
    settings = {
        key: getattr(arguments, key)
        for key in ("batch_size", "fake_score_updates", "precision", "device", "lora_rank", "rounds", "steps")
    }
    output = arguments.output or RESULTS / ("memory.json" if arguments.memory else "step.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"machine": machine(), "settings": settings, "results": found}, indent=2) + "\n")
    print(f"see {output}")
    return int(any("failed" in row for row in found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
