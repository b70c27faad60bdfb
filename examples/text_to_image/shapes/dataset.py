"""A data set of captioned images: one shape, of one colour, on one background.

Image `index` of the data set of `seed` is a pure function of the two numbers. Run as a module, it writes an image folder:

    cd examples/text_to_image && python -m shapes.dataset --output_dir shapes_folder --num_images 1000
"""

import argparse
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from PIL import Image, ImageDraw


RESOLUTION = 64
OVERSAMPLING = 4
MAX_TILT = math.radians(20)
ANY_TILT = math.pi

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {
    "red": (220, 40, 40),
    "orange": (245, 145, 30),
    "yellow": (240, 225, 50),
    "green": (40, 165, 70),
    "blue": (50, 110, 230),
    "purple": (150, 60, 190),
}
BACKGROUNDS = {
    "navy": (22, 28, 84),
    "gray": (122, 122, 122),
    "white": (245, 245, 245),
    "black": (14, 14, 14),
}


@dataclass(frozen=True)
class Scene:
    """What a caption says. `str(scene)` is the caption."""

    shape: str
    colour: str
    background: str

    def __str__(self) -> str:
        article = "an" if self.colour[0] in "aeiou" else "a"
        return f"{article} {self.colour} {self.shape} on a {self.background} background"


SCENES = tuple(Scene(*words) for words in itertools.product(SHAPES, COLOURS, BACKGROUNDS))
CAPTIONS = tuple(str(scene) for scene in SCENES)
SCENE_OF_CAPTION = dict(zip(CAPTIONS, SCENES, strict=True))


def _polygon(shape: str) -> list[tuple[float, float]]:
    """Corners on the unit disc, `(x, y)`, in order."""
    if shape == "star":
        turns, radii = [k / 10 for k in range(10)], [1.0, 0.42] * 5
    else:
        corners = {"triangle": 3, "square": 4}[shape]
        first = {"triangle": 0, "square": 1 / 8}[shape]
        turns, radii = [first + k / corners for k in range(corners)], [1.0] * corners
    return [(r * math.sin(math.tau * a), -r * math.cos(math.tau * a)) for a, r in zip(turns, radii, strict=True)]


def draw(scene: Scene, rng: np.random.Generator, max_tilt: float = MAX_TILT) -> Image.Image:
    """An anti-aliased RGB image of the scene, with jittered place, size, tilt (in radians) and tones."""
    side = RESOLUTION * OVERSAMPLING
    radius = rng.uniform(0.24, 0.36) * side
    x, y = rng.uniform(radius + 2, side - radius - 2, size=2)
    tilt = rng.uniform(-max_tilt, max_tilt)
    colour, background = (
        tuple(int(v) for v in np.clip(np.array(tone) + rng.integers(-8, 9, size=3), 0, 255))
        for tone in (COLOURS[scene.colour], BACKGROUNDS[scene.background])
    )
    image = Image.new("RGB", (side, side), background)
    canvas = ImageDraw.Draw(image)
    if scene.shape == "circle":
        # A disc of the same area as the others' average, so that size does not give the shape away.
        r = 0.85 * radius
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    else:
        cos, sin = math.cos(tilt), math.sin(tilt)
        corners = [
            (x + radius * (cos * u - sin * v), y + radius * (sin * u + cos * v)) for u, v in _polygon(scene.shape)
        ]
        canvas.polygon(corners, fill=colour)
    return image.resize((RESOLUTION, RESOLUTION), Image.Resampling.BOX)


def example(index: int, seed: int, max_tilt: float = MAX_TILT) -> tuple[Image.Image, Scene]:
    """Image `index` of the data set of `seed`, and what it shows."""
    rng = np.random.default_rng([seed, index])
    scene = SCENES[rng.integers(len(SCENES))]
    return draw(scene, rng, max_tilt), scene


def pixels(num_images: int, seed: int, max_tilt: float = MAX_TILT) -> tuple[np.ndarray, np.ndarray]:
    """The first `num_images` images of the data set of `seed`, tilted by `max_tilt` radians at most.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: Pixels in 0..255, `[N, 3, 64, 64]` uint8, and the index of each image's
        scene in `SCENES`, `[N]`.
    """
    images = np.empty((num_images, 3, RESOLUTION, RESOLUTION), np.uint8)
    scenes = np.empty(num_images, np.int64)
    for index in range(num_images):
        image, scene = example(index, seed, max_tilt)
        images[index] = np.asarray(image).transpose(2, 0, 1)
        scenes[index] = SCENES.index(scene)
    return images, scenes


def shapes_dataset(num_images: int, seed: int = 0) -> datasets.Dataset:
    """The images and captions as a `datasets.Dataset` with the columns `image` and `text`."""

    def rows():
        for index in range(num_images):
            image, scene = example(index, seed)
            yield {"image": image, "text": str(scene)}

    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    return datasets.Dataset.from_list(list(rows()), features=features)


def write_image_folder(folder: str | Path, num_images: int, seed: int = 0) -> None:
    """The images as PNG files beside a `metadata.jsonl`, as `load_dataset("imagefolder", data_dir=folder)` reads."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metadata.jsonl", "w") as metadata:
        for index in range(num_images):
            image, scene = example(index, seed)
            name = f"{index:06d}.png"
            image.save(folder / name)
            metadata.write(json.dumps({"file_name": name, "text": str(scene)}) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write shapes as an image folder.")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--num_images", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_image_folder(arguments.output_dir, arguments.num_images, arguments.seed)
