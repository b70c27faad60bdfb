"""Defaults that depend on a run's folder or on its teacher, and are numbers as soon as these are known."""

from dataclasses import replace
from typing import TypeVar

from ..families import ModelFamily
from .config import TrainingConfig
from .run_folder import RunFolder


Config = TypeVar("Config", bound=TrainingConfig)
# What they are if nothing is said.
_UNNAMED = {"conditioning_timestep": None, "lora_target_modules": None, "num_path_nodes": "auto"}


def as_begun(config: Config) -> Config:
    """The settings with the conditioning timestep, the adapters' layers and the number of nodes of the run that was begun in their
    output folder, if there is one and they name none: a default that has changed since does not make it another run.

    Raises:
        ValueError: If the folder's settings cannot be read.
    """
    unnamed = {name for name, value in _UNNAMED.items() if getattr(config, name, ...) == value}
    if not unnamed:
        return config
    begun = RunFolder(config.output_dir).settings()
    return replace(config, **{name: begun[name] for name in unnamed & begun.keys()})


def with_defaults(config: Config, family: ModelFamily) -> Config:
    """The settings with layers for adapters, by default the family's, and with a conditioning timestep: the one that they name, by
    number or by `sigma_init`, or that of the run that was begun in their output folder, or else the family's default.

    Raises:
        ValueError: If number and `sigma_init` name different ones.
    """
    config = as_begun(config)
    if config.lora_target_modules is None:
        config = replace(config, lora_target_modules=family.lora_target_modules)
    asked = config.conditioning_timestep
    if config.sigma_init is None:
        return config if asked is not None else replace(config, conditioning_timestep=family.default_timestep())
    named = family.timestep_of(config.sigma_init)
    if asked not in (None, named):
        raise ValueError(
            f"--sigma_init {config.sigma_init:g} names timestep {named}, but --conditioning_timestep is {asked}, or was where the "
            "run was begun: pass one of them."
        )
    return replace(config, conditioning_timestep=named)
