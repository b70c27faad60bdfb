"""Images of prompts from noise that is always the same, whatever samples them, by one process or by several."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather, pad_across_processes
from torch import Tensor


T = TypeVar("T")


@dataclass(frozen=True)
class Sampled:
    """Images, and how long they took.

    Args:
        images (`Tensor`): RGB in 0..255, `[N, 3, H, W]` uint8 on the CPU. Of several processes the main one has them; those
            of the others are none, `[0, 3, 0, 0]`.
        seconds (`list[float]`): That each batch took.
        sizes (`list[int]`): Images of each batch.
    """

    images: Tensor
    seconds: list[float]
    sizes: list[int]

    @property
    def mean_seconds(self) -> float:
        """Seconds per image, over all of them."""
        return sum(self.seconds) / sum(self.sizes)

    @property
    def median_seconds(self) -> float:
        """The median over batches of the seconds per image."""
        return statistics.median(s / size for s, size in zip(self.seconds, self.sizes, strict=True))


@torch.no_grad()
def sample_batches(
    prompts: list[str],
    batch_size: int,
    seed: int,
    shape: tuple[int, ...],
    sample: Callable[[list[str], Tensor], Tensor],
    device: torch.device,
    state: PartialState | None = None,
    warm_up: bool = False,
    done: Callable[[int], Any] | None = None,
) -> Sampled:
    """Samples an image of each prompt. All noise comes from one generator, batch after batch, so that it is the same for all
    models of one shape. What a sampler draws besides (stochastic ones do) is seeded for each batch, by its number.

    Several processes sample different batches of the same composition, and so the same images as one process.

    Args:
        prompts (`list[str]`): An image each.
        batch_size (`int`): Images sampled at once.
        seed (`int`): Of the noise.
        shape (`tuple[int, ...]`): Of the noise of an image.
        sample (`Callable`): Prompts, B, and standard normal noise in float32, `[B, *shape]` -> images in 0..1,
            `[B, 3, H, W]`.
        device (`torch.device`): Of the noise.
        state (`PartialState`, *optional*): This process among those that share the batches; by default it samples all.
        warm_up (`bool`): Whether the first batch is sampled once before, which is not timed.
        done (`Callable`, *optional*): Is told how many images more there are, such as the `update` of a progress bar.
    """
    processes, rank = (1, 0) if state is None else (state.num_processes, state.process_index)
    generator = torch.Generator().manual_seed(seed)
    firsts = range(0, len(prompts), batch_size)
    sampled = Sampled(torch.empty(0, 3, 0, 0, dtype=torch.uint8), [], [])
    images: list[Tensor] = []
    for number in range(0, len(firsts), processes):
        batches = [prompts[first : first + batch_size] for first in firsts[number : number + processes]]
        # The same noise in any precision, and in any process.
        noise = [torch.randn(len(batch), *shape, generator=generator) for batch in batches]
        own = min(
            rank, len(batches) - 1
        )  # where fewer batches are left than processes, the last one is sampled by several
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for _ in range(2 if warm_up and number == 0 else 1):
                torch.manual_seed(seed + number + own)
                started = time.monotonic()
                part = sample(batches[own], noise[own].to(device))
                part = (part.float().clamp(0, 1) * 255).round()
                part = part.to("cpu", torch.uint8).contiguous()  # which waits for the device
                seconds = time.monotonic() - started
        parts, times = _gathered(part, seconds, len(batches), state) if processes > 1 else ([part], [seconds])
        sampled.seconds.extend(times)
        sampled.sizes.extend(map(len, batches))
        if done is not None:
            done(sum(map(len, batches)))
        if rank == 0:
            images += [part[: len(batch)] for part, batch in zip(parts, batches, strict=True)]
    return Sampled(torch.cat(images), sampled.seconds, sampled.sizes) if images else sampled


def is_main(state: PartialState | None) -> bool:
    """Whether this process is the one that measures and writes."""
    return state is None or state.is_main_process


def agreed(value: T, state: PartialState | None) -> T:
    """The main process's value, on every process that shares the sampling."""
    return value if state is None else broadcast_object_list([value])[0]


def _gathered(
    images: Tensor, seconds: float, num_batches: int, state: PartialState | None
) -> tuple[list[Tensor], list[float]]:
    """The images and seconds of the first processes, one for each batch; images are padded to as many as any has."""
    assert state is not None
    padded = pad_across_processes(images.to(state.device))
    parts = gather(padded).to("cpu").split(len(padded))
    times = gather(torch.tensor([seconds], device=state.device)).tolist()
    return list(parts[:num_batches]), times[:num_batches]
