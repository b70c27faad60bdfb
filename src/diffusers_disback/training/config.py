"""The settings of a run: what both stages share, each stage's own, and all of them in one."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ..hub.repository import is_repo_id
from ..models.reference import ModelReference
from ..models.timestep_sampling import TimestepSampling
from ..objectives import OBJECTIVES, make_objective
from ..path.node_spacing import AUTO_NODES, evenly_spaced_steps
from ..path.target_schedule import FALL, SHARE, TARGET_SCHEDULES, AdaptiveSchedule, TargetSchedule
from .settings.fields import Settings, default_of, free_setting, named, setting
from .settings.groups import (
    TEACHER_FLAGS,
    AdapterSettings,
    DataSettings,
    HubSettings,
    LoggingSettings,
    ModelSettings,
    OptimisationSettings,
    PathSettings,
)


# Fields are collected from the last base to the first.
@dataclass(kw_only=True)
class TrainingConfig(
    LoggingSettings, OptimisationSettings, AdapterSettings, HubSettings, PathSettings, DataSettings, ModelSettings
):
    """What both stages share: the groups of `training.settings.groups`.

    Raises:
        ValueError: If a setting does not take its value, or two settings contradict each other.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        sources = [name for name in ("prompts_file", "dataset_name", "train_data_dir") if getattr(self, name)]
        if len(sources) > 1:
            raise ValueError(
                f"Prompts come from one place, but {' and '.join('--' + name for name in sources)} are given."
            )
        if self.objective not in OBJECTIVES:
            raise ValueError(f"--objective {self.objective!r} is none of {', '.join(OBJECTIVES)}.")
        make_objective(self.objective, self.objective_args, self.timestep_sampling_law)
        if self.has_discriminator:
            self._check_discriminator()
        if self.lora_rank is None and (
            self.lora_alpha is not None or set(self.lora_roles) != {"generator", "fake_score"}
        ):
            raise ValueError(
                "--lora_alpha and --lora_roles are of adapters: pass --lora_rank, too, or leave them out."
            )
        if not self.lora_roles:
            raise ValueError("--lora_roles names no role: it takes generator, fake_score or both.")
        if self.base_quantization is not None and not self.all_adapters:
            raise ValueError(
                f"--base_quantization {self.base_quantization} is for adapters on one shared network: pass --lora_rank, "
                "and leave --lora_roles out."
            )
        if self.offload_idle_role and self.use_paged_adam:
            raise ValueError("--use_paged_adam moves the optimisers' states by itself; leave --offload_idle_role out.")
        if not self.path_is_shared:
            for name in ("degradation_path_revision", "path_disk_budget_gb"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"--{name} is for a path on the Hub, but --degradation_path is {self.degradation_path!r}."
                    )
        self._check_best_model()
        if self.hub_model_id is not None and not self.push_to_hub:
            raise ValueError("--hub_model_id says where to, but nothing is pushed without --push_to_hub.")
        if self.hub_token is not None and self.report_to not in ("none", "tensorboard"):
            raise ValueError(
                f"--hub_token together with --report_to {self.report_to} is refused: such trackers upload the command "
                "line, and the token in it. Log in with `hf auth login` instead."
            )

    def _check_best_model(self) -> None:
        if self.metric_for_best_model is None:
            given = [name for name in ("load_best_model_at_end", "early_stopping_patience") if getattr(self, name)]
            if given:
                raise ValueError(
                    f"--{given[0]} needs to know what is best: pass --metric_for_best_model, a metric of the evaluators."
                )
        if self.early_stopping_threshold and self.early_stopping_patience is None:
            raise ValueError(
                "--early_stopping_threshold is for --early_stopping_patience: pass both, or leave it out."
            )

    def _check_discriminator(self) -> None:
        why = self.discriminator_setting
        if self.train_data_dir is None:
            raise ValueError(
                f"{why} needs a discriminator, which learns from real images: pass --train_data_dir, an image folder with a "
                "metadata.jsonl, in place of other prompts."
            )
        if self.dataset_streaming:
            raise ValueError(f"{why} needs images, but --dataset_streaming reads captions alone; leave it out.")

    @property
    def has_discriminator(self) -> bool:
        """Whether stage 2 trains a discriminator: for the adversarial term, or for the objective itself."""
        objective = make_objective(self.objective, self.objective_args)
        return self.adversarial_weight > 0 or objective.needs_discriminator

    @property
    def discriminator_setting(self) -> str:
        """The setting that asks for the discriminator, if there is one, as it is written on a command line."""
        return "--adversarial_weight" if self.adversarial_weight else f"--objective {self.objective}"

    @property
    def teacher(self) -> ModelReference:
        """Where the teacher lies, and what is to be taken otherwise than it says."""
        otherwise = {name: getattr(self, flag) for name, flag in TEACHER_FLAGS.items()}
        return ModelReference(self.pretrained_model_name_or_path, self.revision, **otherwise)

    def is_adapter(self, role: str) -> bool:
        """Whether a role, `generator` or `fake_score`, is an adapter."""
        return self.lora_rank is not None and role in self.lora_roles

    @property
    def all_adapters(self) -> bool:
        """Whether all roles share one network."""
        return self.is_adapter("generator") and self.is_adapter("fake_score")

    def adam_betas(self, role: str) -> tuple[float, float]:
        """AdamW's betas of a role: `generator`, `fake_score` or `discriminator`, which has the fake score's."""
        role = "fake_score" if role == "discriminator" else role
        own = (getattr(self, f"{role}_adam_beta1"), getattr(self, f"{role}_adam_beta2"))
        beta1, beta2 = (getattr(self, f"adam_beta{i}") if beta is None else beta for i, beta in enumerate(own, 1))
        return float(beta1), float(beta2)  # torch refuses 0 beside 0.999

    @property
    def timestep_sampling_law(self) -> TimestepSampling:
        """At which timesteps the generator is trained."""
        if self.min_noise > self.max_noise:
            raise ValueError(f"--min_noise {self.min_noise} is above --max_noise {self.max_noise}.")
        shape = (self.logit_mean, self.logit_std, self.timestep_shift, self.mode_scale)
        return TimestepSampling(self.timestep_sampling, self.min_noise, self.max_noise, *shape)

    @property
    def path_is_shared(self) -> bool:
        """Whether the path is one on the Hub, to be replayed."""
        return self.degradation_path is not None and is_repo_id(self.degradation_path)

    @property
    def path_folder(self) -> Path:
        """The folder of a path that lies on this machine."""
        return Path(self.degradation_path or Path(self.output_dir, "path"))


@dataclass(kw_only=True)
class DegradationConfig(Settings):
    """The settings of stage 1.

    Raises:
        ValueError: If there are more nodes than steps.
    """

    degradation_steps: int = setting(
        1000,
        "Fake-score updates of stage 1, with --degradation_stop at most. DisBack, for SDXL: 1,000 (its scripts; the "
        "paper's are not known to us).",
        minimum=1,
    )
    num_path_nodes: int | Literal["auto"] = setting(
        "auto",
        "N, the nodes recorded, evenly spaced; fewer if stage 1 ends by itself. 0 records nothing: plain DMD or Diff-Instruct. "
        "auto: 10 where the initial student is far from the teacher (after the first tenth of stage 1 the teacher's "
        "denoising loss on its samples is more than twice the fake score's); otherwise stage 1 ends there, and there is no "
        "path. DisBack, for SDXL: 10.",
        minimum=0,
    )
    degradation_lr_multiplier: float = setting(
        1.0,
        "Learning rate of stage 1 over --fake_score_learning_rate. Where that is low, 5 records the same path in a fifth of "
        "the steps.",
        above=0,
        is_rate=True,
    )
    degradation_stop: float = setting(
        0.2,
        "End stage 1 when its denoising loss has flattened: when doubling the updates brought less than this share of "
        "all that it has fallen by; not before a tenth of --degradation_steps, or twice the warm-up. The path then has "
        "fewer nodes. 0: never before --degradation_steps.",
        minimum=0,
        below=1,
    )
    proportion_empty_prompts: float = setting(
        0.1,
        "Share of stage 1's prompts that are dropped, if a node is used with guidance: without it a node's "
        "unconditional branch is never fitted.",
        minimum=0,
        below=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.most_path_nodes > self.degradation_steps:
            raise ValueError(
                f"--num_path_nodes {self.num_path_nodes} is more than --degradation_steps {self.degradation_steps}: "
                "there is at most one node per step."
            )

    @property
    def most_path_nodes(self) -> int:
        """N, if stage 1 does not end by itself."""
        return min(AUTO_NODES, self.degradation_steps) if self.num_path_nodes == "auto" else self.num_path_nodes

    @property
    def node_steps(self) -> list[int]:
        """The steps after which nodes are recorded; the last is the last step."""
        return evenly_spaced_steps(self.degradation_steps, self.most_path_nodes)


@dataclass(kw_only=True)
class BacktrackingConfig(Settings):
    """The settings of stage 2.

    Raises:
        ValueError: If a number is out of its range, or a name is unknown.
    """

    max_train_steps: int = free_setting(
        20000,
        "Generator updates of stage 2. DisBack, for SDXL: 100,000 steps with one generator update in five.",
        minimum=1,
    )
    steps_per_target: int = setting(
        200,
        "Generator updates with each of the targets N-1..1; the teacher takes the rest. DisBack, for SDXL: 1,000 "
        "steps with one generator update in five.",
        minimum=1,
    )
    target_schedule: str = setting(
        "adaptive",
        "When to leave a node: fixed after --steps_per_target; adaptive as soon as it is hardly nearer to the student than "
        "the next node is, or the student is on its way to it, after --steps_per_target at the latest.",
    )
    target_share: float = setting(
        SHARE,
        "Of the adaptive schedule: leave a node when its mismatch with the student is above this share of the next one's.",
        above=0,
        maximum=1,
    )
    target_fall: float = setting(
        FALL,
        "Of the adaptive schedule: leave a node when its mismatch with the student has fallen by this share of its "
        "highest, at two measures running. 1: never.",
        above=0,
        maximum=1,
    )
    mismatch_steps: int | None = setting(
        None,
        "Of the adaptive schedule: measure the mismatch every so many generator updates; by default a tenth of "
        "--steps_per_target. It takes three measures to see a fall.",
        minimum=1,
    )
    guidance_scale: float = setting(
        8.0, "The teacher's classifier-free guidance, w. DMD2 and DisBack, for SDXL: 8.", minimum=1
    )
    guidance_schedule: Literal["ramp", "constant"] = setting(
        "ramp",
        "Guidance of the targets: ramp grows from 1 at the most degraded target to w at the teacher; constant is w on "
        "all of them, as in the published code.",
    )
    fake_score_guidance_scale: float = setting(
        1.0,
        "Classifier-free guidance of the fake score in the generator's loss; 1 is none. SiD-LSG, for SD 1.5: 1.5 to 2, as much as "
        "the teacher's. 0 is the unconditional branch alone (Zero-CFG), below 0 is Anti-CFG.",
        minimum=-100,
        maximum=100,
    )
    fake_score_training_guidance_scale: float | None = setting(
        None,
        "Classifier-free guidance of the fake score in its own loss, in stage 2; by default --fake_score_guidance_scale.",
        minimum=-100,
        maximum=100,
    )
    generator_loss_warmup_steps: int = setting(
        0,
        "Scale the generator's loss up from 0.03 to 1, geometrically, over so many of its updates: Adam's second moment stays "
        "small behind small gradients, and later updates are larger.",
        minimum=0,
    )
    generator_learning_rate: float = setting(5e-7, "Of the generator. DMD2, for SDXL: 5e-7.", above=0, is_rate=True)
    fake_score_updates: int = setting(5, "Fake-score updates per generator update. DMD2: five.", minimum=1)
    use_ema: bool = setting(False, "Keep an average of the student's weights, and publish it.")
    ema_decay: float = setting(0.999, "Of that average.", minimum=0, below=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_schedule not in TARGET_SCHEDULES:
            raise ValueError(f"--target_schedule {self.target_schedule!r} is none of {', '.join(TARGET_SCHEDULES)}.")

    @property
    def training_guidance_of_fake_score(self) -> float:
        """Classifier-free guidance of the fake score in its own loss."""
        own = self.fake_score_training_guidance_scale
        return self.fake_score_guidance_scale if own is None else own

    @property
    def mismatch_every(self) -> int:
        """After how many generator updates the adaptive schedule measures the mismatch."""
        return max(self.steps_per_target // 10, 1) if self.mismatch_steps is None else self.mismatch_steps


@dataclass(kw_only=True)
class DisBackConfig(BacktrackingConfig, DegradationConfig, TrainingConfig):
    """All settings of a run. It is each of the three configs that it is made of, and can be given in place of any of them.

    Raises:
        ValueError: If a setting does not take its value, or two settings contradict each other.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if not nodes_are_guided(self, self.most_path_nodes):  # then no node's unconditional branch is evaluated
            self.proportion_empty_prompts = 0.0


def target_schedule(config: BacktrackingConfig, num_nodes: int) -> TargetSchedule:
    """The policy that its settings name, for a path of N nodes.

    Raises:
        ValueError: If the teacher would get fewer than `steps_per_target` of the updates.
    """
    policy = TARGET_SCHEDULES[config.target_schedule]
    own = {"share": config.target_share, "fall": config.target_fall} if issubclass(policy, AdaptiveSchedule) else {}
    return policy(num_nodes, config.steps_per_target, config.max_train_steps, **own)


def guidance_of_node(node: int, num_nodes: int, config: BacktrackingConfig) -> float:
    """The guidance of a target: on the ramp, linear from 1 at node N-1 to the teacher's w at node 0.

    Node N, which is no target, has 1: nodes are fitted without guidance.
    """
    w = config.guidance_scale
    if node == 0 or config.guidance_schedule == "constant":
        return w
    if num_nodes == 1:
        return 1.0
    return max(1.0, 1 + (w - 1) * (num_nodes - 1 - node) / (num_nodes - 1))


LOSS_SCALE = 0.03
"""Of the generator's first update under `--generator_loss_warmup_steps`."""


def loss_scale(step: int, config: BacktrackingConfig) -> float:
    """What the generator's loss is multiplied by at an update: `LOSS_SCALE` at the first, 1 from the warm-up's end on."""
    warmup = config.generator_loss_warmup_steps
    return 1.0 if step >= warmup else LOSS_SCALE ** (1 - step / warmup)


def nodes_are_guided(config: BacktrackingConfig, num_nodes: int) -> bool:
    """Whether any recorded node is a target with guidance above 1, so that its unconditional branch is evaluated."""
    return any(guidance_of_node(node, num_nodes, config) > 1 for node in range(1, num_nodes))


# The settings of a run that was begun before -------------------------------------------------------------------------

_FREE = named(DisBackConfig, changes_result=False)
_RATES = named(DisBackConfig, is_rate=True)
_DEFAULTS = {one.name: default_of(one) for one in fields(DisBackConfig)}
_IMPLIED = {"node_spacing": "steps"}  # settings that older versions had, and the value that is always meant now


def that_count(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without those that a resumed run may change freely."""
    return {name: value for name, value in settings.items() if name not in _FREE}


def without_rates(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without learning rates, which a resumed run takes from its checkpoint on."""
    return {name: value for name, value in settings.items() if name not in _RATES}


def changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Those of the present settings that count and were others: name -> what it was and is. One that an older version did
    not have was what it is by default."""
    defaults = _DEFAULTS | _IMPLIED
    pairs = {
        name: (before.get(name, defaults.get(name)), value) for name, value in (that_count(now) | _IMPLIED).items()
    }
    return {name: (was, is_) for name, (was, is_) in pairs.items() if was != is_}
