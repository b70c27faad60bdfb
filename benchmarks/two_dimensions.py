"""The two-dimensional data of the benchmark, grids and rings of Gaussians, and networks of many seeds side by side.

A network's weights are `[S, in, out]`, one row per seed: a batched product runs all seeds at once, and Adam, which works
element by element, keeps them apart. Every seed draws from generators of its own, so that its run does not depend on which
others run beside it.
"""

import math

import torch
from torch import Tensor


SIDE = 5
SPACING = 2.0
MODE_STD = 0.2
RING = 16
SIGMA_DATA = math.sqrt(SPACING**2 * (SIDE**2 - 1) / 12 + MODE_STD**2)
RADIUS = SPACING * math.sqrt((SIDE**2 - 1) / 6)  # a ring's standard deviation is the grid's
SIGMA_MIN, SIGMA_MAX = 0.1, 40.0  # of the noise that score models are fitted at
WIDTH = 96
WAVES = (1.0, 2.0)

Weights = list[Tensor]
"""Of an MLP: matrices `[S, in, out]` and biases `[S, 1, out]`, in turn."""


class Draws:
    """Random numbers of many seeds side by side.

    Args:
        seeds (`list[int]`): One generator each.
        purpose (`int`): Another purpose of the same seed draws other numbers.
    """

    def __init__(self, seeds: list[int], purpose: int):
        self.generators = [torch.Generator().manual_seed(1_000_003 * seed + purpose) for seed in seeds]

    def normal(self, *shape: int) -> Tensor:
        """`[S, *shape]`."""
        return torch.stack([torch.randn(shape, generator=generator) for generator in self.generators])

    def uniform(self, *shape: int) -> Tensor:
        """`[S, *shape]`, in [0, 1)."""
        return torch.stack([torch.rand(shape, generator=generator) for generator in self.generators])

    def sigma(self, n: int, low: float = SIGMA_MIN, high: float = SIGMA_MAX) -> Tensor:
        """Noise levels, log-uniform, `[S, n, 1]`."""
        return low * (high / low) ** self.uniform(n, 1)

    def data(self, n: int, dataset: str = "grid") -> Tensor:
        """Points of a data set, `[S, n, 2]`: `grid` has 5 x 5 modes, `ring` 16 on a circle."""
        if dataset == "grid":
            place = SPACING * ((self.uniform(n, 2) * SIDE).floor() - (SIDE - 1) / 2)
        else:
            turn = 2 * math.pi / RING * (self.uniform(n, 1) * RING).floor()
            place = RADIUS * torch.cat([turn.cos(), turn.sin()], -1)
        return place + MODE_STD * self.normal(n, 2)


def new_weights(draws: Draws, layers: int = 3) -> Weights:
    """An MLP's start, uniform within one over the root of the fan-in."""
    sizes = [2 + 4 * len(WAVES) + 6, *[WIDTH] * layers, 2]
    weights = []
    for fan_in, fan_out in zip(sizes, sizes[1:], strict=False):
        weights.append((2 * draws.uniform(fan_in, fan_out) - 1) / math.sqrt(fan_in))
        weights.append((2 * draws.uniform(1, fan_out) - 1) / math.sqrt(fan_in))
    return weights


def denoise(weights: Weights, x: Tensor, sigma: Tensor) -> Tensor:
    """E[x0 | x0 + sigma * noise = x], `[S, n, 2]`, preconditioned (EDM, arXiv 2206.00364, Table 1).

    Args:
        weights (`Weights`): Of S seeds, or of one for all.
        x (`Tensor`): `[S, n, 2]`.
        sigma (`Tensor`): `[S, n, 1]`.
    """
    total = sigma**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / total * x + sigma * SIGMA_DATA * total.rsqrt() * _network(weights, x * total.rsqrt(), sigma)


def _network(weights: Weights, x: Tensor, sigma: Tensor) -> Tensor:
    level = sigma.log() / 4
    waves = [f(2 * math.pi * k * x / 2) for k in WAVES for f in (torch.sin, torch.cos)]
    waves += [f(k * level) for k in (1, 2, 4) for f in (torch.sin, torch.cos)]
    h = torch.cat([x, *waves], -1)
    for matrix, bias in zip(weights[:-2:2], weights[1:-2:2], strict=True):
        h = torch.nn.functional.silu(h @ matrix + bias)
    return h @ weights[-2] + weights[-1]


def denoising_loss(weights: Weights, x0: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
    """Of each seed, `[S]`: the mean squared error of the network's own output, which weighs all noise levels alike."""
    error = (denoise(weights, x0 + sigma * noise, sigma) - x0) / _scale(sigma)
    return error.square().mean((1, 2))


def gap(one: Tensor, two: Tensor, sigma: Tensor) -> Tensor:
    """Of each seed, `[S]`: the mean square of the difference of two networks' outputs, from what they denoised."""
    return ((one - two) / _scale(sigma)).square().mean((1, 2))


def _scale(sigma: Tensor) -> Tensor:
    return sigma * SIGMA_DATA * (sigma**2 + SIGMA_DATA**2).rsqrt()


def generate(weights: Weights, noise: Tensor, asked: float) -> Tensor:
    """One step: noise of the level `asked` goes in, x0 comes out, `[S, n, 2]`."""
    return denoise(weights, asked * noise, torch.full_like(noise[..., :1], asked))


@torch.no_grad()
def sample(weights: Weights, noise: Tensor, steps: int = 60) -> Tensor:
    """What a score model draws in many deterministic steps (Euler, levels spaced evenly in their logarithm)."""
    levels = torch.logspace(math.log10(SIGMA_MAX), math.log10(SIGMA_MIN), steps)
    x = SIGMA_MAX * noise
    for now, then in zip(levels, levels[1:], strict=False):
        x0 = denoise(weights, x, now.expand(x[..., :1].shape))
        x = x0 + then / now * (x - x0)
    return denoise(weights, x, levels[-1].expand(x[..., :1].shape))


def sliced_wasserstein(x: Tensor, y: Tensor, directions: int = 32) -> Tensor:
    """The distance of clouds of equally many points, averaged over directions, `[S]`."""
    turn = torch.arange(directions) * math.pi / directions
    across = torch.stack([turn.cos(), turn.sin()])
    return ((x @ across).sort(1).values - (y @ across).sort(1).values).abs().mean((1, 2))


def modes_found(x: Tensor, dataset: str = "grid") -> Tensor:
    """The share of the modes near which at least a quarter of the points are that belong there, `[S]`."""
    if dataset == "grid":
        place = (x / SPACING).round()
        inside = place.abs().amax(-1) <= (SIDE - 1) / 2
        index, modes = ((place + (SIDE - 1) / 2) @ torch.tensor([SIDE, 1.0])).long(), SIDE**2
        place = SPACING * place
    else:
        turn = (torch.atan2(x[..., 1], x[..., 0]) * RING / (2 * math.pi)).round()
        inside, index, modes = torch.ones_like(turn, dtype=torch.bool), turn.long() % RING, RING
        place = RADIUS * torch.stack([(turn * 2 * math.pi / RING).cos(), (turn * 2 * math.pi / RING).sin()], -1)
    near = ((x - place).norm(dim=-1) < 4 * MODE_STD) & inside
    counts = [row[ok].bincount(minlength=modes) for row, ok in zip(index, near, strict=True)]
    return (torch.stack(counts) >= x.shape[1] / modes / 4).float().mean(1)


def train_teacher(
    dataset: str = "grid", seed: int = 0, steps: int = 12_000, batch: int = 1024, learning_rate: float = 3e-3
) -> Weights:
    """A score model of a data set, for all seeds, `[1, in, out]`: Adam, its learning rate falling to nothing."""
    draws = Draws([seed], 0)
    weights = [tensor.requires_grad_() for tensor in new_weights(draws)]
    optimizer = torch.optim.Adam(weights, learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        loss = denoising_loss(weights, draws.data(batch, dataset), draws.sigma(batch), draws.normal(batch, 2)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return [tensor.detach() for tensor in weights]
