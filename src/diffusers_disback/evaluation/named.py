"""Evaluators by name: those of `EVALUATORS`, and a user's own by the place from which they are imported."""

import importlib
import os
import sys
from collections.abc import Sequence

from . import EVALUATORS
from .base import Evaluator


def known_evaluators(names: Sequence[str]) -> dict[str, type[Evaluator]]:
    """`EVALUATORS`, and those of the names that are `module:Class` of a user's own, whose module may lie in the current folder.
    Such a name runs code: it has to come from the user, and never from a file of others.

    Raises:
        ValueError: If there is no such class.
    """
    return {**EVALUATORS, **{name: imported(name) for name in names if ":" in name}}


def imported(name: str) -> type[Evaluator]:
    """The evaluator of `module:Class`; modules of the current folder come last.

    Raises:
        ValueError: If there is none.
    """
    module, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"--evaluators {name}: there is no module {error.name} to import, also not in the current folder."
        ) from error
    if not isinstance(found, type) or Evaluator not in found.__mro__:
        raise ValueError(f"--evaluators {name}: {module} has no Evaluator {attribute!r}.")
    return found
