"""DisBack (arXiv 2408.15991) for diffusers: distils a text-to-image teacher into a one-step generator.

Names are imported when they are first asked for, so that `import diffusers_disback` costs nothing.
"""

import importlib


__version__ = "0.1.0"

_MODULE_OF_NAME = {
    "BacktrackingConfig": "backtracking",
    "BacktrackingTrainer": "backtracking",
    "ConditionCache": "condition_cache",
    "Batch": "batch",
    "DegradationConfig": "degradation",
    "DegradationPath": "path",
    "DegradationRecorder": "degradation",
    "DisBackOneStepPipeline": "pipeline",
    "DriftEvaluator": "evaluation.drift",
    "EVALUATORS": "evaluation",
    "Evaluation": "evaluation",
    "Evaluator": "evaluation",
    "FAMILIES": "families",
    "FrechetDistance": "evaluation.distance",
    "HubError": "repository",
    "Measure": "target_schedule",
    "MismatchProbe": "mismatch",
    "ModelFamily": "families",
    "ModelReference": "model_reference",
    "NoiseSchedule": "noise_schedule",
    "OBJECTIVES": "objectives",
    "Objective": "objectives",
    "OneStepGenerator": "generator",
    "PromptBatches": "data",
    "PromptData": "data",
    "PromptFile": "data",
    "ScoreModel": "score_model",
    "Learner": "learner",
    "Stage": "trainer",
    "TARGET_SCHEDULES": "target_schedule",
    "TargetSchedule": "target_schedule",
    "TrainingConfig": "config",
    "family_of": "families",
    "load_family": "families",
    "one_step_scheduler": "generator",
    "pull": "hub",
    "push_run": "hub",
}

__all__ = [*_MODULE_OF_NAME, "__version__"]


def __getattr__(name: str):
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF_NAME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
