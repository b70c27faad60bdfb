#!/usr/bin/env python
"""SDXL at 1024 x 1024 on one GPU, batches of one, adapters of rank 64: 50 steps of both stages, their speed and memory.

    python benchmarks/bench_gpu.py

Needs a GPU, bitsandbytes, about 32 GB of CPU memory and 12 GB of disk; weights are random. It says whether the peak is at
most 24 GB with the base in bf16, and 16 GB with the base in nf4.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch


LIMITS_GB = {"adapters, checkpointing": 24, "adapters, nf4, checkpointing": 16}


def main(line: list[str]) -> int:
    if not torch.cuda.is_available():
        print("This benchmark needs a GPU; bench_step.py --memory is its like for a CPU.", file=sys.stderr)
        return 1
    folder = Path(__file__).parent
    output = folder / "results" / "gpu.json"
    modes = ["adapters", *LIMITS_GB]
    command = [
        *(sys.executable, str(folder / "bench_step.py"), "--memory", "--models", "sdxl", "--stages", "1", "2"),
        *("--factor", "1", "--latents", "128", "--batch_size", "1", "--lora_rank", "64", "--precision", "bf16"),
        *("--steps", "50", "--modes", *modes, "--output", str(output), *line),
    ]
    subprocess.run(command, check=True)
    failed = False
    for row in json.loads(output.read_text())["results"]:
        limit = LIMITS_GB.get(row["mode"])
        peak = row["peak_mb"] / 1e3 if "peak_mb" in row else float("inf")
        said = "" if limit is None else f", {'at most' if peak <= limit else 'MORE THAN'} {limit} GB"
        failed = failed or (limit is not None and peak > limit)
        print(f"stage {row['stage']}, {row['mode']}: {peak:.1f} GB{said}; {row.get('seconds_per_step')} s a step")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
