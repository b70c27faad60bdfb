"""DisBack (arXiv 2408.15991) for diffusers: distils a text-to-image teacher into a one-step generator.

Names are imported when they are first asked for, so that `import diffusers_disback` costs nothing.
"""

import importlib
from typing import Any


__version__ = "0.2.0"

_MODULE_OF_NAME = {
    "BacktrackingConfig": "training.config",
    "BacktrackingTrainer": "backtracking",
    "ConditionCache": "data.cache",
    "Batch": "models.batch",
    "Batches": "data.conditions",
    "ClassLabels": "data.conditions",
    "ConditionSource": "data.conditions",
    "NoCondition": "data.conditions",
    "TextFamily": "families",
    "DegradationConfig": "training.config",
    "DegradationPath": "path.path",
    "DegradationRecorder": "degradation",
    "DisBackConfig": "training.config",
    "DisBackOneStepPipeline": "pipelines.one_step",
    "DisBackOneStepPixArtAlphaPipeline": "pipelines.one_step_pixart",
    "DisBackOneStepPixArtSigmaPipeline": "pipelines.one_step_pixart",
    "DisBackOneStepSanaPipeline": "pipelines.one_step_sana",
    "DisBackOneStepStableDiffusion3Pipeline": "pipelines.one_step_stable_diffusion_3",
    "DisBackTrainer": "session",
    "DriftEvaluator": "evaluation.drift",
    "EVALUATORS": "evaluation",
    "Evaluation": "evaluation",
    "Evaluator": "evaluation",
    "FAMILIES": "families",
    "FlowFamily": "families",
    "FlowSchedule": "models.flow_schedule",
    "FeatureEvaluator": "evaluation",
    "FrechetDistance": "evaluation.distance",
    "HubError": "hub.repository",
    "LocalModel": "models.reference",
    "Measure": "path.target_schedule",
    "Metric": "evaluation",
    "MismatchProbe": "training.probe",
    "ModelFamily": "families",
    "ModelReference": "models.reference",
    "NoiseSchedule": "models.noise_schedule",
    "OBJECTIVES": "objectives",
    "Objective": "objectives",
    "OneStepGenerator": "models.generator",
    "PromptConditions": "data.conditions",
    "PromptFile": "data.prompts",
    "ScoreModel": "models.score_model",
    "Learner": "training.learner",
    "Stage": "training.stage",
    "TARGET_SCHEDULES": "path.target_schedule",
    "TargetSchedule": "path.target_schedule",
    "TrainingConfig": "training.config",
    "family_of": "families",
    "load_family": "families",
    "one_step_scheduler": "models.generator",
    "pull": "hub.publish.run",
    "push_run": "hub.publish.run",
}

__all__ = [*_MODULE_OF_NAME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF_NAME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF_NAME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
