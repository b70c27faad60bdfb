"""Measures images on the first of two processes alone, as a run does: `one_measures.py <folder>`."""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from torch import nn

from diffusers_disback.evaluation import FrechetDistance


state, measured = PartialState(cpu=True), {}
if state.is_main_process:
    images = torch.randint(256, (2, 20, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    colours = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    colours.num_features = 3
    evaluator = FrechetDistance(colours, images[0])
    measured = {name: torch.tensor(value) for name, value in evaluator(images[1]).items()}
save_file(measured, Path(sys.argv[1]) / f"{state.process_index}.safetensors")
state.destroy_process_group()
