"""How the generator learns from two scores, and how the fake score follows the generator. Mathematics only."""

import inspect
from collections.abc import Mapping
from typing import Any, get_args

from .base import Objective
from .variational import DiffInstruct, DistributionMatching, VariationalScoreDistillation


OBJECTIVES: dict[str, type[Objective]] = {
    "diff_instruct": DiffInstruct,
    "dmd": DistributionMatching,
}

__all__ = [
    "OBJECTIVES",
    "DiffInstruct",
    "DistributionMatching",
    "Objective",
    "VariationalScoreDistillation",
    "make_objective",
]


def make_objective(name: str, arguments: Mapping[str, Any]) -> Objective:
    """Makes an objective with arguments of somebody who cannot see its constructor.

    Args:
        name (`str`): In `OBJECTIVES`.
        arguments (`Mapping[str, Any]`): Keyword arguments: numbers, booleans and texts.

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
        return OBJECTIVES[name](**arguments)
    except ValueError as error:
        raise ValueError(f"{what}. {error}") from error
