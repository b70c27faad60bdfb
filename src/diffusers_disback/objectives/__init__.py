"""How the generator learns from two scores, and how the fake score follows the generator. Mathematics only."""

from .base import Objective
from .variational import DiffInstruct, DistributionMatching, VariationalScoreDistillation


OBJECTIVES: dict[str, type[Objective]] = {
    "diff_instruct": DiffInstruct,
    "dmd": DistributionMatching,
}

__all__ = ["OBJECTIVES", "DiffInstruct", "DistributionMatching", "Objective", "VariationalScoreDistillation"]
