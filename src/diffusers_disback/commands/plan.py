"""`diffusers-disback plan`: what a training run will take, before anything is loaded."""

import argparse
from typing import TYPE_CHECKING, Any

from .command_line import THEIRS, number, read_flags
from .options import TEACHER, add_command


if TYPE_CHECKING:
    from ..training.config import DisBackConfig

USAGE = f"diffusers-disback plan {TEACHER} TEACHER [any flag of the training script]"


def add_commands(group: Any) -> None:
    """Adds `plan` to the commands. It reads flags of the training script, and `--help`, itself."""
    parser = add_command(group, "plan", plan, usage=USAGE, add_help=False)
    add_own_flags(parser)


def add_own_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `plan` that the training script does not have."""
    parser.add_argument(
        "--device_memory_gb",
        type=number(False, above=0),
        metavar="GB",
        help="also say whether the run fits a device with this memory, in GB of 10^9 bytes; exit code 2 if it does not "
        "(default: that of the GPU, if there is one)",
    )


def device_memory() -> int | None:
    """Bytes of the GPU, if there is one."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def plan(parsed: argparse.Namespace) -> int:
    """Predicts the memory and the disk space of a training run. It takes all flags of the training script (see its --help), and loads
    no weights."""
    from ..planning.plan import REMARKS, Planner, table
    from ..planning.verdict import verdict
    from ..training.config import DisBackConfig
    from ..training.defaults import as_begun

    own = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    add_own_flags(own)
    flags = read_flags(DisBackConfig, parsed.flags, usage=USAGE, description=plan.__doc__, parents=[own])
    config = as_begun(DisBackConfig(**flags))
    if config.pretrained_model_name_or_path is None:
        raise ValueError("Say whose distillation is planned: --pretrained_model_name_or_path.")
    planner = Planner.of(config, config)
    print(
        f"{config.pretrained_model_name_or_path}: {planner.resolution} x {planner.resolution} pixels, batches of "
        f"{config.train_batch_size}, mixed precision {config.mixed_precision or 'no'}"
        f"{_evaluated_at(config, planner.family.conditioning_timestep)}\n\n{table(planner)}\n\n{REMARKS}"
    )
    memory = device_memory() if parsed.device_memory_gb is None else parsed.device_memory_gb * 1e9
    if memory is None:
        return 0
    found = verdict(planner, memory)
    print(f"\n{found}")
    return 0 if found.fits else THEIRS


def _evaluated_at(config: "DisBackConfig", default: int | None) -> str:
    """Where a student is evaluated, as far as it is known without the teacher's schedule."""
    if config.sigma_init is not None:
        return f", sigma_init {config.sigma_init:g}"
    timestep = default if config.conditioning_timestep is None else config.conditioning_timestep
    return "" if timestep is None else f", conditioning timestep {timestep}"
