"""How a feature network takes images: resized, cropped and normalised as its own preprocessor's config says."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..hub.files import to_bytes


_MODES = {2: "bilinear", 3: "bicubic"}  # of Pillow's numbers
_LARGEST = 4096


@dataclass(frozen=True)
class ImagePreprocessing:
    """What transformers' image processors of CLIP, SigLIP and DINOv2 do, on tensors and without torchvision.

    Resizing differs from Pillow's, whose weights are rounded, by one level of 255 in few pixels.

    Args:
        shortest_edge (`int`, *optional*): The shorter side that images are resized to.
        size (`tuple[int, int]`, *optional*): In its place the height and width that they are resized to.
        crop (`tuple[int, int]`, *optional*): Height and width that are taken of the middle.
        mode (`str`): Of resizing: `bicubic` or `bilinear`.
        scale (`float`): That values in 0..255 are multiplied by.
        mean, std (`tuple[float, ...]`): Of the channels, after that.
    """

    shortest_edge: int | None
    size: tuple[int, int] | None
    crop: tuple[int, int] | None
    mode: str
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of_config(cls, config: dict[str, Any], what: str) -> "ImagePreprocessing":
        """Reads a `preprocessor_config.json`, or the `image_processor` of a `processor_config.json`.

        Args:
            config (`dict`): Its content. Entries that it leaves out are as in transformers' processor of CLIP, except
                mean and standard deviation, which have to be there.
            what (`str`): It is, for messages.

        Raises:
            ValueError: If it asks for anything else than this class does, or its numbers make no sense.
        """
        if config.get("do_pad"):
            raise ValueError(f"{what} asks for padding, which no supported network needs.")
        size, crop = config.get("size", 224), config.get("crop_size", 224)
        shortest, resized, cropped = None, None, None
        if config.get("do_resize", True):
            if isinstance(size, dict) and "shortest_edge" not in size:
                resized = _pair(size, f"size of {what}")
            else:
                shortest = _side(size["shortest_edge"] if isinstance(size, dict) else size, f"size of {what}")
        if config.get("do_center_crop", "crop_size" in config or resized is None):
            cropped = _pair(crop, f"crop_size of {what}")
        if resized is None and cropped is None:
            raise ValueError(f"{what} brings images to no size that all of them have.")
        least = (shortest, shortest) if shortest is not None else resized
        if cropped is not None and least is not None and (cropped[0] > least[0] or cropped[1] > least[1]):
            raise ValueError(f"{what} crops {cropped} from images of {least}.")
        mode = _MODES.get(config.get("resample", 3))
        if mode is None:
            raise ValueError(f"{what} resizes by Pillow's method {config['resample']!r}; 2 and 3 are known.")
        scale = 1.0
        mean: tuple[float, ...] = (0.0,) * 3
        std: tuple[float, ...] = (1.0,) * 3
        if config.get("do_rescale", True):
            (scale,) = _numbers([config.get("rescale_factor", 1 / 255)], 1, f"rescale_factor of {what}")
        if config.get("do_normalize", True):
            mean, std = (_numbers(config.get(key), 3, f"{key} of {what}") for key in ("image_mean", "image_std"))
            if min(std) <= 0:
                raise ValueError(f"image_std of {what} is not above 0: {list(std)}.")
        return cls(shortest, resized, cropped, mode, scale, mean, std)

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of what the network takes."""
        size = self.crop or self.size
        if size is None:
            raise AssertionError("of_config sees that there is one of them")
        return size

    def __call__(self, images: Tensor) -> Tensor:
        """Whole images, `[N, 3, H, W]` uint8, as the network takes them: float32, `[N, 3, *input_size]`."""
        height, width = images.shape[-2:]
        size = self.size
        if self.shortest_edge is not None:
            short, long = self.shortest_edge, int(self.shortest_edge * max(height, width) / min(height, width))
            size = (long, short) if width <= height else (short, long)
        values = images.float() if size is None else self._resized(images, size)
        return self._normalised(values if self.crop is None else _centre(values, self.crop))

    def patch(self, images: Tensor) -> Tensor:
        """The middle of images, `[N, 3, H, W]` uint8, at their full resolution: as much of it as the network takes at
        once. Of images that are not larger than that, it is the middle square of half their shorter side, resized.

        Returns:
            `Tensor`: Float32, `[N, 3, *input_size]`.
        """
        height, width = images.shape[-2:]
        if height > self.input_size[0] and width > self.input_size[1]:
            return self._normalised(_centre(images, self.input_size).float())
        side = max(min(height, width) // 2, 1)
        return self._normalised(self._resized(_centre(images, (side, side)), self.input_size))

    def text(self) -> str:
        """Its settings in one line of JSON, for comparing."""
        return " ".join(to_bytes(asdict(self)).decode().split())

    def _resized(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Images in another size, in whole numbers of 0..255, as Pillow has them."""
        values = images.float()
        for each in (
            (images.shape[-2], size[1]),
            size,
        ):  # one direction after the other, rounded in between as Pillow does
            if each != tuple(values.shape[-2:]):
                values = interpolate(values, each, mode=self.mode, align_corners=False, antialias=True)
                values = values.round().clamp(0, 255)
        return values

    def _normalised(self, values: Tensor) -> Tensor:
        mean, std = (torch.tensor(each, device=values.device)[:, None, None] for each in (self.mean, self.std))
        return (values * self.scale - mean) / std


def _centre(images: Tensor, size: tuple[int, int]) -> Tensor:
    top, left = ((have - want) // 2 for have, want in zip(images.shape[-2:], size, strict=True))
    if top < 0 or left < 0:
        raise ValueError(f"Images of {tuple(images.shape[-2:])} pixels are too small for a crop of {size}.")
    return images[..., top : top + size[0], left : left + size[1]]


def _pair(value: Any, what: str) -> tuple[int, int]:
    """Height and width, as a config says them: in a dictionary, or one number for both."""
    sides = [value.get("height"), value.get("width")] if isinstance(value, dict) else [value] * 2
    return _side(sides[0], what), _side(sides[1], what)


def _side(value: Any, what: str) -> int:
    if type(value) is not int or not 1 <= value <= _LARGEST:
        raise ValueError(f"{what} is {value!r}, where a number of pixels in 1..{_LARGEST} has to be.")
    return value


def _numbers(values: Any, count: int, what: str) -> tuple[float, ...]:
    is_right = isinstance(values, list) and len(values) == count
    if not is_right or not all(type(value) in (int, float) and math.isfinite(value) for value in values):
        raise ValueError(f"{what} has to be {count} numbers, but is {values!r}.")
    return tuple(float(value) for value in values)
