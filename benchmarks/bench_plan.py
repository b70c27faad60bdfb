#!/usr/bin/env python
"""The planner's estimate of activations and gradients against what a training pass takes on a CPU.

    python benchmarks/bench_plan.py
    python benchmarks/bench_plan.py --tables    # what is planned for the originals at full size

Of a forward and a backward pass in float32, one process per case: what its operations allocate, and by how much the
process's resident memory peaks above what it was before (Linux only).
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from diffusers import UNet2DConditionModel

from configurations import UNETS, machine, unet_config
from diffusers_disback import BacktrackingConfig, TrainingConfig
from diffusers_disback.families import ModelFamily, StableDiffusion, StableDiffusionXL
from diffusers_disback.models.adapters import SharedNetwork, lora_config
from diffusers_disback.planning.allocations import Allocations
from diffusers_disback.planning.plan import Planner


SETTINGS = {
    "full, bf16": {},
    "full, + --gradient_checkpointing": {"gradient_checkpointing": True},
    "full, + --offload_idle_role": {"gradient_checkpointing": True, "offload_idle_role": True},
    "rank 64, bf16": {"lora_rank": 64},
    "rank 64, + --gradient_checkpointing": {"lora_rank": 64, "gradient_checkpointing": True},
}
SMALL = {"sd15": (0.2, 48), "sd21": (0.2, 48), "sdxl": (0.1, 64)}
CASES = {
    "full": (None, False),
    "full, checkpointing": (None, True),
    "adapters": (16, False),
    "adapters, checkpointing": (16, True),
}


def family_of_config(config: dict[str, Any]) -> type[ModelFamily]:
    """The family of a UNet's config."""
    return StableDiffusionXL if config.get("addition_embed_type") == "text_time" else StableDiffusion


def planner(config: dict[str, Any], **settings: Any) -> Planner:
    """What is planned for a UNet of a config."""

    def skeleton() -> torch.nn.Module:
        with torch.device("meta"):
            return UNet2DConditionModel(**config)

    return Planner(skeleton, family_of_config(config), TrainingConfig(**settings), BacktrackingConfig())


def network_of(name: str, case: str) -> torch.nn.Module:
    """A UNet that is trained, or on which an adapter is."""
    rank, checkpoints = CASES[case]
    network = UNet2DConditionModel(**unet_config(name, *SMALL[name])).eval()
    if rank is not None:
        shared = SharedNetwork(network)
        shared.add("generator", lora_config(rank))
        shared.activate("generator")
    if checkpoints:
        network.enable_gradient_checkpointing()
    return network


def run(network: torch.nn.Module, side: int) -> None:
    """A forward and a backward pass."""
    config = network.config
    arguments: dict[str, Any] = {"encoder_hidden_states": torch.randn(1, 77, config.cross_attention_dim)}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        arguments["added_cond_kwargs"] = {"text_embeds": torch.randn(1, pooled), "time_ids": torch.zeros(1, 6)}
    output = network(torch.randn(1, 4, side, side), torch.tensor([399]), return_dict=False, **arguments)[0]
    output.square().mean().backward()


def measure(name: str, case: str) -> dict[str, float]:
    """In this process. A small network is run first, so that libraries are in memory."""
    torch.set_num_threads(1)
    side = SMALL[name][1]
    run(UNet2DConditionModel(**unet_config(name, 0.1, 8)), 8)
    network = network_of(name, case)
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    run(network, side)
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    network.zero_grad(set_to_none=True)
    with Allocations(network.parameters()) as allocations:
        run(network, side)
    return {"allocated_mb": allocations.peak / 1e6, "resident_mb": (peak - before) / 1e6}


def main(line: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=UNETS, default=["sd15", "sdxl"])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "plan.json")
    parser.add_argument(
        "--tables", action="store_true", help="print peaks of both stages for the originals, and measure nothing"
    )
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args(line)
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return
    if arguments.tables:
        for name in arguments.models:
            for what, settings in SETTINGS.items():
                planned = planner(unet_config(name), mixed_precision="bf16", **settings)
                print(name, what, *(f"{planned.total(stage) / 1e9:.1f} GB" for stage in (1, 2)), sep=", ", flush=True)
        return
    found = []
    for name in arguments.models:
        for case, (rank, checkpoints) in CASES.items():
            config = unet_config(name, *SMALL[name])
            planned = planner(config, lora_rank=rank, gradient_checkpointing=checkpoints)
            peak = planned.updates["fake_score"].peak
            row: dict[str, Any] = {"model": name, "case": case, "planned_mb": peak / 1e6}
            command = [sys.executable, __file__, "--measure", name, case]
            row |= json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
            for what in ("allocated", "resident"):
                row[f"error_to_{what}"] = round(row["planned_mb"] / row[f"{what}_mb"] - 1, 4)
            found.append({key: round(value, 2) if key.endswith("_mb") else value for key, value in row.items()})
            print(found[-1], file=sys.stderr, flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"machine": machine(), "results": found}, indent=2) + "\n")
    print(f"see {arguments.output}")


if __name__ == "__main__":
    main(sys.argv[1:])
