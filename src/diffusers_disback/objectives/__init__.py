"""How the generator learns from two scores, and how the fake score follows the generator. Mathematics only."""

import inspect
from collections.abc import Mapping
from typing import Any, get_args

from ..models.timestep_sampling import TimestepSampling
from .base import Objective
from .f_divergence import FDivergence
from .score_identity import ScoreIdentityDistillation
from .variational import DiffInstruct, DistributionMatching, VariationalScoreDistillation


OBJECTIVES: dict[str, type[Objective]] = {
    "diff_instruct": DiffInstruct,
    "dmd": DistributionMatching,
    "f_distill": FDivergence,
    "sid": ScoreIdentityDistillation,
}

__all__ = [
    "OBJECTIVES",
    "DiffInstruct",
    "DistributionMatching",
    "FDivergence",
    "Objective",
    "ScoreIdentityDistillation",
    "VariationalScoreDistillation",
    "make_objective",
]


def make_objective(name: str, arguments: Mapping[str, Any], timesteps: TimestepSampling | None = None) -> Objective:
    """Makes an objective with arguments of somebody who cannot see its constructor.

    Args:
        name (`str`): In `OBJECTIVES`.
        arguments (`Mapping[str, Any]`): Keyword arguments: numbers, booleans and texts.
        timesteps (`TimestepSampling`, *optional*): At which the generator is trained; by default the objective's own.

    Raises:
        ValueError: If the constructor does not take them; with what it takes.
    """
    signature = inspect.signature(OBJECTIVES[name], eval_str=True)
    what = f"--objective_args: {name} takes {signature}"
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise ValueError(f"{what}; {error}.") from error
    for key, value in arguments.items():
        kind = signature.parameters[key].annotation if key in signature.parameters else Any
        kinds = set(get_args(kind) or (kind,))
        kinds |= {int} if float in kinds else set()
        if kinds & {bool, int, float, str} and type(value) not in kinds:
            raise ValueError(f"{what}; {key} cannot be {value!r}.")
    try:
        objective = OBJECTIVES[name](**arguments)
    except ValueError as error:
        raise ValueError(f"{what}. {error}") from error
    if timesteps is not None:
        objective.timesteps = timesteps
    return objective
