"""The embedded teacher of captioned shapes, by the library's own stages."""

import functools
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from experimental import DenseDegradation, keep_evenly_spaced
from torch import Tensor, nn
from toy_task import shuffled


EXAMPLES = Path(__file__).parent.parent / "examples" / "text_to_image"
sys.path.insert(0, str(EXAMPLES))

from diffusers_disback import (  # noqa: E402
    BacktrackingConfig,
    BacktrackingTrainer,
    DegradationConfig,
    DegradationPath,
    DegradationRecorder,
    ModelFamily,
    ModelReference,
    PromptConditions,
    PromptFile,
    TrainingConfig,
    load_family,
)
from diffusers_disback.models.weights import fingerprint  # noqa: E402
from diffusers_disback.training.config import target_schedule  # noqa: E402
from shapes.evaluator import NUM_PICTURES, shapes_evaluation, shapes_prompts  # noqa: E402


@dataclass(frozen=True)
class Regime:
    """A task and the settings that all arms share: those of the quickstart of version 0.1, but for smaller batches and constant learning
    rates, of which the generator's is the best of three for the arm without a path (`python benchmarks/looks.py --shapes`).

    Args:
        student_widths (`tuple[int, int]`, *optional*): The student starts as a UNet of these widths with random weights; by
            default as the teacher, whose are 64 and 112.
        conditioning_timestep (`int`): At which it is asked.
        generator_learning_rate, fake_score_learning_rate (`float`): Constant.
        updates (`int`): Of the generator: the budget.
        reference (`int`): How many times the budget the arm without a path is run for, to see where it settles.
        degradation_steps, num_path_nodes, steps_per_target (`int`): Of the arms that have them.
        default (`tuple[int, int, int]`): The same three for the arm `default`, which may end stage 1 and phases earlier.
        batch (`int`): Samples of an update.
        mismatch_every, evaluate_every (`int`): Updates.
        images (`int`): Of each evaluation.
    """

    student_widths: tuple[int, int] | None = None
    conditioning_timestep: int = 399
    generator_learning_rate: float = 1e-4
    fake_score_learning_rate: float = 5e-4
    updates: int = 150
    reference: int = 1
    degradation_steps: int = 45
    num_path_nodes: int = 3
    steps_per_target: int = 15
    default: tuple[int, int, int] = (80, 8, 15)
    batch: int = 16
    mismatch_every: int = 3
    evaluate_every: int = 10
    images: int = 200


REGIMES = {
    "shapes": Regime(),
    "far": Regime(  # held out: docs/evidence.md
        student_widths=(32, 64),
        generator_learning_rate=3e-4,
        updates=300,
        reference=3,
        degradation_steps=20,
        num_path_nodes=4,
        steps_per_target=25,
        default=(160, 8, 30),
        mismatch_every=5,
        evaluate_every=20,
    ),
}
SMALL = Regime(
    updates=4,
    degradation_steps=4,
    num_path_nodes=2,
    steps_per_target=1,
    default=(4, 2, 2),
    batch=2,
    evaluate_every=2,
    images=80,
)


@dataclass(frozen=True)
class Arm:
    """What is compared.

    Args:
        degradation (`dict`): Changed settings of stage 1.
        backtracking (`dict`): Of stage 2.
        shuffled (`bool`): Nodes 1..N-1 are targets in a random order.
        is_default (`bool`): The regime's `default` lengths, and all policies as they are if nothing is said.
        direct (`bool`): The path is not used but for its end: the teacher is the only target.
        spaced_by_mismatch (`bool`): Nodes are evenly spaced in mismatch, not in steps.
    """

    degradation: dict[str, Any] = field(default_factory=dict)
    backtracking: dict[str, Any] = field(default_factory=dict)
    shuffled: bool = False
    is_default: bool = False
    direct: bool = False
    spaced_by_mismatch: bool = False


ARMS = {
    "none": Arm({"num_path_nodes": 0}),
    "warm": Arm({"num_path_nodes": 1}),
    "path": Arm(),
    "shuffled": Arm(shuffled=True),
    "adaptive": Arm({}, {"target_schedule": "adaptive"}),
    "mismatch": Arm(spaced_by_mismatch=True),
    "default": Arm(is_default=True),
    "warm_default": Arm(is_default=True, direct=True),
}
SIDE_BY_SIDE = False
SEEDS = list(range(5))
MEASURES = ["shape_accuracy", "colour_accuracy", "background_accuracy"]


class Counter:
    """Network evaluations per sample of a batch: 1 for a forward pass, 2 more if it is to be gone back through."""

    def __init__(self, family: ModelFamily, batch: int):
        self.total, call = 0.0, family.call

        def counted(network, x_t, t, condition):
            self.total += len(x_t) / batch * (3 if torch.is_grad_enabled() else 1)
            return call(network, x_t, t, condition)

        family.call = counted


class Trainer(BacktrackingTrainer):
    """Stage 2, with the evaluations so far in its curve, and if asked for with its targets out of order."""

    counter: Counter
    order: dict[int, int] = {}

    def fill_target(self, node: int) -> None:
        super().fill_target(self.order.get(node, node))

    def validate(self, done: int) -> dict[str, float]:
        evaluations = self.counter.total  # what is only looked at does not count
        row = {"evaluations": evaluations, **super().validate(done)}
        self.counter.total = evaluations
        return row


def untrained(teacher: ModelFamily, widths: tuple[int, int], seed: int) -> nn.Module:
    """A UNet for the teacher's latents and conditions, as it is before any training."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return type(teacher.network).from_config(teacher.network.config, block_out_channels=widths)


@functools.cache
def _evaluation(images: int):
    return shapes_evaluation(images) if images == NUM_PICTURES else _fewer(images)


def pictures_of(teacher: ModelFamily, images: int, **arguments: Any) -> Tensor:
    """What a teacher samples at the evaluation's prompts and noise with its own scheduler, `[N, 3, H, W]` uint8."""
    return _evaluation(images).sample(teacher, teacher.undecorated(teacher.pipeline), **arguments)[0]


def _fewer(images: int):
    evaluation = shapes_evaluation(NUM_PICTURES)
    evaluation.prompts = shapes_prompts(images)
    return evaluation


def run(regime: str, arm: str, seeds: list[int], small: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The settings, and the record of each seed."""
    task = SMALL if small else REGIMES[regime]
    return {"settings": asdict(task) | {"arm": asdict(ARMS[arm])}}, [one(task, ARMS[arm], seed) for seed in seeds]


def one(
    task: Regime, arm: Arm, seed: int, look: Callable[[Tensor], dict[str, float]] = lambda images: {}
) -> dict[str, Any]:
    """The record of a run of both stages; `look` takes more measures of the images of each evaluation."""
    evaluation = _evaluation(task.images)
    with tempfile.TemporaryDirectory() as folder:
        training = TrainingConfig(
            pretrained_model_name_or_path=str(EXAMPLES / "shapes" / "teacher"),
            output_dir=folder,
            seed=seed,
            conditioning_timestep=task.conditioning_timestep,
            train_batch_size=task.batch,
            fake_score_learning_rate=task.fake_score_learning_rate,
            lr_scheduler="constant",
            lr_warmup_steps=0,
            adam_weight_decay=0.0,
            report_to="none",
            checkpointing_steps=10**6,
            validation_steps=task.evaluate_every,
        )
        steps, nodes, per_target = task.degradation_steps, task.num_path_nodes, task.steps_per_target
        if arm.is_default:
            steps, nodes, per_target = task.default
        degradation = (DenseDegradation if arm.spaced_by_mismatch else DegradationConfig)(
            **{
                "degradation_steps": steps,
                "num_path_nodes": nodes,
                "proportion_empty_prompts": 0.0,
                **({} if arm.is_default else {"degradation_stop": 0.0}),
                **arm.degradation,
            }
        )
        backtracking = BacktrackingConfig(
            **{
                "max_train_steps": task.updates * (task.reference if degradation.num_path_nodes == 0 else 1),
                "steps_per_target": per_target,
                "mismatch_steps": task.mismatch_every,
                "guidance_scale": 4.0,
                "generator_learning_rate": task.generator_learning_rate,
                "fake_score_updates": 1,
                "use_ema": True,
                "ema_decay": 0.95,
                **({} if arm.is_default else {"target_schedule": "fixed"}),
                **arm.backtracking,
            }
        )
        teacher = load_family(ModelReference(training.pretrained_model_name_or_path))
        counter = Counter(teacher, task.batch)
        data = PromptConditions(PromptFile(EXAMPLES / "shapes" / "prompts.txt"), teacher.encode)
        widths = task.student_widths
        generator = teacher.initial_generator() if widths is None else untrained(teacher, widths, seed)
        path, stage_1 = None, {"updates": 0, "evaluations": 0.0, "seconds": 0.0}
        if degradation.num_path_nodes:
            timestep = task.conditioning_timestep
            start = {"name_or_path": None, "sha256": fingerprint(generator), "conditioning_timestep": timestep}
            own = fingerprint(teacher.network)
            path = DegradationPath.create(training.path_folder, teacher.model, own, start, {})
            path = DegradationRecorder(training, degradation, teacher, generator, data, path).record()
            if arm.spaced_by_mismatch:
                keep_evenly_spaced(path, nodes)
            cost = path.manifest["cost"]
            stage_1 = {"updates": cost["steps"], "evaluations": counter.total, "seconds": cost["seconds"]}

        def measure(network: nn.Module) -> dict[str, float]:
            pipeline = teacher.undecorated(teacher.one_step(network, training.conditioning_timestep))
            images = evaluation.sample(teacher, pipeline)[0]
            return {**evaluation.measure(images), **look(images)}

        first = {"evaluations": counter.total, **measure(generator)}
        trainer = Trainer(training, backtracking, teacher, generator, data, path, measure, first)
        trainer.counter = counter
        if arm.direct:
            trainer.schedule = target_schedule(backtracking, 1)
        if arm.shuffled:
            inner = list(range(1, len(path)))
            trainer.order = dict(zip(inner, shuffled(inner, seed), strict=True))
        counter.total = stage_1["evaluations"]
        trainer.train()
    names = [name for name in trainer.curve[-1] if name != "step"]
    columns = {name: [float(f"{row[name]:.5g}") for row in trainer.curve if name in row] for name in names}
    columns["seconds"] = [round(seconds + stage_1["seconds"], 2) for seconds in columns["seconds"]]
    nodes = [] if path is None else [{"step": n["step"], "mismatch": n["mismatch"]} for n in path.nodes]
    curve = {"updates": [row["step"] for row in trainer.curve], **columns}
    return {"stage_1": stage_1, "nodes": nodes, "switches": trainer.result().switches, "curve": curve}
