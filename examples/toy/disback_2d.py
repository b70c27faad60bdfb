"""DisBack on one page: a ring of Gaussians, a teacher, its degradation path, and the way back. Seconds on a CPU.

    python examples/toy/disback_2d.py --output toy.png

x_t = alpha(t) * x0 + sigma(t) * noise with t in (0, 1); every network predicts x0. The names are the library's.
"""

import argparse
import copy
import math

import torch
from torch import Tensor, nn


class Denoiser(nn.Module):
    """E[x0 | x_t], for points in the plane."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)
        )

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        waves = [f(k * x_t) for k in (2, 4) for f in (torch.sin, torch.cos)]
        waves += [f(k * math.pi * t) for k in (0.5, 1, 2) for f in (torch.sin, torch.cos)]
        return self.layers(torch.cat([x_t, *waves], 1))


def data(n: int) -> Tensor:
    """Six narrow Gaussians on a circle."""
    turn = torch.randint(6, (n, 1)) * math.tau / 6
    return torch.cat([turn.cos(), turn.sin()], 1) + 0.08 * torch.randn(n, 2)


def diffuse(x0: Tensor, t: Tensor) -> Tensor:
    return (t * math.pi / 2).cos() * x0 + (t * math.pi / 2).sin() * torch.randn_like(x0)


def draw_t(n: int, low: float = 0.001, high: float = 0.999) -> Tensor:
    return low + (high - low) * torch.rand(n, 1)


def denoising_loss(model: nn.Module, x0: Tensor) -> Tensor:
    """Score matching on the samples of whatever `x0` comes from."""
    t = draw_t(len(x0))
    return (model(diffuse(x0, t), t) - x0).square().mean()


def generate(generator: nn.Module, n: int) -> Tensor:
    """One step: noise goes in as if it were x_t at the last timestep, x0 comes out."""
    return generator(torch.randn(n, 2), torch.full((n, 1), 0.98))


@torch.no_grad()
def sample(model: nn.Module, n: int, steps: int = 50) -> Tensor:
    """What a score model draws in many deterministic steps (DDIM)."""
    x = torch.randn(n, 2)
    times = torch.linspace(0.98, 0.0, steps + 1)
    for now, then in zip(times, times[1:], strict=False):
        a, b = now * math.pi / 2, then * math.pi / 2
        x0 = model(x, now.expand(n, 1))
        x = b.cos() * x0 + b.sin() * (x - a.cos() * x0) / a.sin()
    return x


def train(model: nn.Module, draw, steps: int, lr: float, record_every: int | None = None) -> list[nn.Module]:
    """Fits a model to samples; returns copies on the way."""
    optimizer, copies = torch.optim.Adam(model.parameters(), lr), []
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        denoising_loss(model, draw(256)).backward()
        optimizer.step()
        if record_every and step % record_every == 0:
            copies.append(copy.deepcopy(model))
    return copies


def sliced_wasserstein(x: Tensor, y: Tensor) -> float:
    """The distance of two clouds of equally many points, averaged over 64 directions."""
    turn = torch.arange(64) * math.pi / 64
    directions = torch.stack([turn.cos(), turn.sin()])
    return ((x @ directions).sort(0).values - (y @ directions).sort(0).values).abs().mean().item()


def backtrack(generator: nn.Module, path: list[nn.Module], steps_per_target: int, last_steps: int) -> list[tuple]:
    """Algorithm 2: `path` is teacher, node 1, ..., node N. Returns (target, samples) at the end of each phase."""
    fake_score = copy.deepcopy(path[-1])
    g_optimizer = torch.optim.Adam(generator.parameters(), 3e-4)
    f_optimizer = torch.optim.Adam(fake_score.parameters(), 6e-4)
    phases = []
    for node in reversed(range(max(len(path) - 1, 1))):  # N-1, ..., 0
        for _ in range(steps_per_target if node else last_steps):
            x0 = generate(generator, 256)
            t = draw_t(256, 0.02, 0.98)
            with torch.no_grad():
                x_t = diffuse(x0, t)
                direction = fake_score(x_t, t) - path[node](x_t, t)
            g_optimizer.zero_grad()
            (direction * x0).sum(1).mean().backward()  # its gradient with respect to x0 is `direction`
            g_optimizer.step()
            for samples in (x0.detach(), generate(generator, 256).detach()):
                f_optimizer.zero_grad()
                denoising_loss(fake_score, samples).backward()
                f_optimizer.step()
        phases.append((node, generate(generator, 1000).detach()))
    return phases


def main() -> None:
    parser = argparse.ArgumentParser(description="DisBack in two dimensions.")
    parser.add_argument("--output", default="toy.png", help="the image")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_path_nodes", type=int, default=3, help="0 for no path")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    nodes, real = arguments.num_path_nodes, data(1000)

    teacher = Denoiser()
    train(teacher, data, 4000, 2e-3)
    generator = copy.deepcopy(teacher)
    clouds = [("data", real), ("teacher,\n50 steps", sample(teacher, 1000))]
    clouds.append(("initial student,\n1 step", generate(generator, 1000).detach()))

    # Algorithm 1: the fake score walks from the teacher to the frozen initial student.
    def initial_samples(n: int) -> Tensor:
        return generate(generator, n).detach()

    walker = copy.deepcopy(teacher)
    path = [teacher, *train(walker, initial_samples, 60, 2e-4, 60 // nodes if nodes else None)]
    clouds += [(f"node {i},\n50 steps", sample(node, 1000)) for i, node in enumerate(path[1:], 1)]

    for node, samples in backtrack(generator, path, steps_per_target=100, last_steps=1000):
        clouds.append((f"student after\ntarget {node}", samples))
    for title, points in clouds:
        distance = sliced_wasserstein(points, real)
        print(f"{title.replace(chr(10), ' '):<26} sliced Wasserstein distance to the data {distance:.3f}")

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(clouds), figsize=(1.8 * len(clouds), 2.2))
    for axis, (title, points) in zip(axes, clouds, strict=True):
        axis.scatter(*points.T, s=1, alpha=0.4)
        axis.set(xlim=(-1.6, 1.6), ylim=(-1.6, 1.6), xticks=[], yticks=[], aspect="equal")
        axis.set_title(title, fontsize=8)
    figure.tight_layout()
    figure.savefig(arguments.output, dpi=100)


if __name__ == "__main__":
    main()
