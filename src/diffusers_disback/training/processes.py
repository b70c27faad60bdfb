"""This process among the others of a launch, and the memory that it takes."""

import resource
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env


T = TypeVar("T")


def process_state() -> PartialState:
    """This process among the others, as `accelerate launch` set them up. To be called before any Accelerator is made."""
    # Others wait while the main process draws images or fills a cache, which may take hours.
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=timedelta(hours=24))


def decided_by_main(decide: Callable[[], T]) -> T:
    """What the main process decides, on every process; so is its error.

    Args:
        decide (`Callable`): Called on the main process alone.

    Raises:
        ValueError: As `decide` does.
    """
    state = process_state()
    decided: T | None = None
    problem: Exception | None = None
    if state.is_main_process:
        try:
            decided = decide()
        except (ValueError, OSError) as error:
            problem = error
    decided, message = broadcast_object_list([decided, problem and str(problem)])
    if problem is not None:
        raise problem
    if message is not None:
        raise ValueError(message)
    return decided


def peak_memory_mb(device: torch.device) -> float:
    """The peak of allocated GPU memory since the stage began, or of the process's resident memory, in MB (10^6 bytes)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
