"""Defaults that depend on a run's folder or on its teacher, and are numbers as soon as these are known."""

from dataclasses import replace
from typing import TypeVar

from ..families import ModelFamily
from .config import TrainingConfig
from .run_folder import RunFolder


Config = TypeVar("Config", bound=TrainingConfig)


def as_begun(config: Config) -> Config:
    """The settings with the conditioning timestep of the run that was begun in their output folder, if there is one and they
    name none: a default that has changed since does not make it another run.

    Raises:
        ValueError: If the folder's settings cannot be read.
    """
    if config.conditioning_timestep is not None:
        return config
    return replace(config, conditioning_timestep=RunFolder(config.output_dir).settings().get("conditioning_timestep"))


def with_defaults(config: Config, family: ModelFamily) -> Config:
    """The settings with a conditioning timestep: the one that they name, or that of the run that was begun in their output
    folder, or else the family's default."""
    config = as_begun(config)
    if config.conditioning_timestep is not None:
        return config
    return replace(config, conditioning_timestep=family.default_timestep())
