"""What the benchmark's scripts have in common."""

import argparse
import os

import torch


def set_threads() -> None:
    """As many as `OMP_NUM_THREADS` says, or one: these networks are too small to share a pass between cores."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def picture_options(description: str) -> argparse.Namespace:
    """Of a script that draws one image of one seed."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()
