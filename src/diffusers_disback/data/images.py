"""Real images, which a discriminator learns from: read, cropped, and as samples of the teacher's denoiser."""

import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.auto import tqdm

from .conditions import CAPACITY, Draw


class RealImages:
    """Real samples by number. What a sample is depends on its file alone.

    If there are few, each is encoded once, beforehand, and kept in CPU memory; otherwise each is read and encoded when it is
    needed. Either way one at a time, so that no sample depends on its batch.

    Args:
        files (`Sequence[Path]`): Of the images: one for each row of the conditions, or any number for a single row.
        encode (`Callable`): Pixels in -1..1, `[1, 3, H, W]` -> samples of the denoiser, `[1, C, h, w]`.
        size (`int`): The side in pixels that images are brought to.
        num_conditions (`int`): Rows of the conditions.
        device (`torch.device`): Where images are encoded.
        capacity (`int`): The number of images up to which samples are kept (64 kB each for SD 1.5).
        show_progress (`bool`): While they are encoded beforehand.

    Raises:
        ValueError: If there are rows without an image, or an image cannot be read.
    """

    def __init__(
        self,
        files: Sequence[Path],
        encode: Callable[[Tensor], Tensor],
        size: int,
        num_conditions: int,
        device: torch.device,
        capacity: int = CAPACITY,
        show_progress: bool = False,
    ):
        if not files or (num_conditions != 1 and len(files) != num_conditions):
            raise ValueError(f"There are {len(files)} images, but conditions of {num_conditions} rows.")
        self.files = files
        self.encode = encode
        self.size = size
        self.device = device
        self.is_by_row = len(files) == num_conditions
        self.table: Tensor | None = None
        if len(files) <= capacity:
            bar = tqdm(files, desc="encoding images", unit="image", disable=not show_progress, file=sys.stderr)
            self.table = torch.cat([self._sample(file) for file in bar])

    def __len__(self) -> int:
        return len(self.files)

    def samples(self, draw: Draw) -> Tensor:
        """Real samples of a draw's rows, `[B, C, h, w]`; of a single row any, each drawn by its sample's own generator."""
        numbers = draw.rows
        if not self.is_by_row:
            numbers = [int(torch.randint(len(self), (), generator=generator)) for generator in draw.generators]
        if self.table is not None:
            return self.table[numbers]
        return torch.cat([self._sample(self.files[number]) for number in numbers])

    def _sample(self, file: Path) -> Tensor:
        return self.encode(read_image(file, self.size)[None].to(self.device)).cpu()


def read_image(file: Path, size: int) -> Tensor:
    """An image in -1..1, `[3, size, size]`: the right way up, its shorter side resized, and the middle taken.

    Raises:
        ValueError: With the file's name, if it is no image that can be read.
    """
    pixels = np.asarray(ImageOps.fit(_opened(file), (size, size), Image.Resampling.LANCZOS), np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)


def open_image(file: Path) -> Tensor:
    """An image as it is, the right way up: RGB in 0..255, `[3, H, W]` uint8.

    Raises:
        ValueError: With the file's name, if it is no image that can be read.
    """
    return torch.from_numpy(np.array(_opened(file))).permute(2, 0, 1)


def _opened(file: Path) -> Image.Image:
    try:
        with Image.open(file) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    # Pillow lets through what its decoders raise of damaged files.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"The image {file} cannot be read ({type(error).__name__}: {error}).") from error


def digest_of_images(files: Sequence[Path], folder: str | Path) -> str:
    """A SHA-256 of the files' names in their folder and of their sizes, in their order: contents are not read."""
    content = hashlib.sha256()
    for file in files:
        content.update(f"{Path(file).relative_to(folder).as_posix()}\0{os.stat(file).st_size}\n".encode())
    return content.hexdigest()
