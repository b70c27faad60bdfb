"""The settings that both stages share. Each stage's own are beside it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diffusers.optimization import SchedulerType

from .model_reference import ModelReference
from .objectives import OBJECTIVES
from .repository import is_repo_id


def setting(default: Any, help: str) -> Any:
    """A dataclass field with its help on the command line."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass
class TrainingConfig:
    """What both stages share. Names and meanings are those of diffusers' text-to-image scripts where these have one.

    Raises:
        ValueError: If a number is out of its range, a name is unknown, or prompts come from two places.
    """

    # The models
    pretrained_model_name_or_path: str = setting(
        None,
        "The teacher: a folder, a model on the Hub, or a checkpoint in one .safetensors file, on this machine or on the Hub "
        "(user/repo/file.safetensors, or its address). The script's own default is the embedded shapes teacher.",
    )
    single_file_config: str | None = setting(
        None,
        "Of a teacher or start in one file: the folder or Hub id of a diffusers pipeline of its kind, for configs and "
        "tokenizers; by default the original model's on the Hub.",
    )
    revision: str | None = setting(None, "Branch, tag or commit of the teacher on the Hub.")
    variant: str | None = setting(None, "Variant of the teacher's weights' files, such as fp16.")
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = setting(
        None, "What the teacher predicts, if its scheduler's config says something else, as of some fine-tunes."
    )
    pretrained_vae_model_name_or_path: str | None = setting(
        None, "An autoencoder in place of the teacher's own: a folder, or a model on the Hub."
    )
    teacher_lora: str | None = setting(
        None, "A LoRA to fuse into the teacher's UNet before anything else: a file, a folder, or a model on the Hub."
    )
    generator_model_name_or_path: str | None = setting(
        None, "Start the student from the UNet of this folder, Hub model or file instead of the teacher's copy."
    )
    conditioning_timestep: int = setting(
        399, 'The timestep at which the student is asked. DMD2, for SDXL: "conditioned at timestep 399".'
    )

    # The prompts
    prompts_file: str | None = setting(None, "A text file with one prompt a line.")
    dataset_name: str | None = setting(None, "A data set on the Hub, or a folder; only its captions are read.")
    dataset_config_name: str | None = setting(None, "The data set's config, if it has several.")
    dataset_split: str = setting("train", "The data set's split.")
    dataset_streaming: bool = setting(
        False, "Do not store the data set: read its captions once into captions.txt in the output folder."
    )
    train_data_dir: str | None = setting(None, "An image folder with a metadata.jsonl; only its captions are read.")
    caption_column: str = setting("text", "The data set's column of captions.")
    max_train_samples: int | None = setting(None, "Use this many prompts at most, from the top.")
    cache_conditions: Literal["auto", "disk", "off"] = setting(
        "auto",
        "Encode prompts once and keep their conditions: auto keeps few in memory and many on disk if they take at most "
        "half of what is free; disk is always on disk; off encodes every batch when it is needed.",
    )
    resolution: int | None = setting(None, "The pictures' side in pixels; by default what the teacher was made for.")
    cache_dir: str | None = setting(None, "Where downloaded models and data sets are kept.")

    # The run
    stage: Literal["all", "record", "backtrack"] = setting(
        "all", "Record the degradation path, backtrack along one, or both."
    )
    degradation_path: str | None = setting(
        None,
        "The folder of the path, by default `path` in the output folder; or a shared path on the Hub, user/repo. A new "
        "folder's name that looks like the latter is written ./a/b.",
    )
    degradation_path_revision: str | None = setting(None, "Branch, tag or commit of a path on the Hub.")
    path_disk_budget_gb: float | None = setting(
        None, "Of a path on the Hub: delete nodes that are behind when downloads take more than this."
    )
    output_dir: str = setting("disback-model", "Where everything is written.")
    seed: int = setting(0, "All of a run's randomness follows from it.")
    resume_from_checkpoint: str | None = setting(
        None, '"latest", or the folder of a checkpoint of this run: go on from there.'
    )
    checkpointing_steps: int = setting(500, "Save what is needed to resume every so many steps.")
    checkpoints_total_limit: int | None = setting(None, "Keep this many checkpoints of each stage at most.")

    # The Hub
    push_to_hub: bool = setting(False, "Push the path, node by node as it is recorded, and the student.")
    hub_model_id: str | None = setting(
        None, "The repository, user/name; by default the output folder's name, of the token's user."
    )
    hub_token: str | None = field(
        default=None,
        repr=False,
        metadata={"help": "Of the Hub. `hf auth login` is safer: others can see a command line."},
    )
    hub_private_repo: bool = setting(False, "Make a new repository private.")

    # Optimisation
    objective: str = setting("dmd", f"How the generator learns from two scores: {', '.join(OBJECTIVES)}.")
    train_batch_size: int = setting(1, "Samples per process and forward pass.")
    gradient_accumulation_steps: int = setting(1, "Forward passes per update, of each network.")
    gradient_checkpointing: bool = setting(False, "Recompute activations in the backward pass: slower, smaller.")
    fake_score_learning_rate: float = setting(5e-7, "Of the fake score, in both stages. DMD2, for SDXL: 5e-7.")
    lr_scheduler: str = setting("constant_with_warmup", "As of diffusers.optimization.get_scheduler.")
    lr_warmup_steps: int = setting(500, "Updates of each network until its learning rate is reached. DMD2: 500.")
    adam_beta1: float = setting(0.9, "AdamW's first beta.")
    adam_beta2: float = setting(0.999, "AdamW's second beta.")
    adam_weight_decay: float = setting(1e-2, "AdamW's weight decay. DMD2: 0.01.")
    adam_epsilon: float = setting(1e-8, "AdamW's epsilon.")
    max_grad_norm: float = setting(10.0, "Gradients are clipped to this norm. DMD2: 10.")
    mixed_precision: Literal["no", "fp16", "bf16"] | None = setting(
        None, "Precision inside the networks; by default that of `accelerate config`."
    )
    allow_tf32: bool = setting(False, "Let Ampere and newer GPUs multiply float32 matrices in TF32.")
    dataloader_num_workers: int = setting(0, "Processes that draw noise and prompts ahead.")

    # What is seen of it
    report_to: str = setting("tensorboard", "Any tracker that accelerate knows, all, or none.")
    logging_dir: str = setting("logs", "Folder of the tracker's files, in the output folder.")
    logging_steps: int = setting(10, "Log losses every so many steps.")
    tracker_project_name: str = setting("diffusers-disback", "The project's name at the tracker.")
    validation_prompts: list[str] = setting([], "Prompts of the sample pictures; by default the first of the data.")
    num_validation_images: int = setting(
        4, "Pictures of each validation prompt that are measured. (The shapes teacher is measured on 2,000 others.)"
    )
    validation_steps: int = setting(500, "Measure and draw the student every so many generator updates.")

    @property
    def teacher(self) -> ModelReference:
        """Where the teacher lies, and what is to be taken otherwise than it says."""
        return ModelReference(
            self.pretrained_model_name_or_path,
            self.revision,
            self.variant,
            self.prediction_type,
            self.pretrained_vae_model_name_or_path,
            self.teacher_lora,
            self.single_file_config,
        )

    @property
    def path_is_shared(self) -> bool:
        """Whether the path is one on the Hub, to be replayed."""
        return self.degradation_path is not None and is_repo_id(self.degradation_path)

    @property
    def path_folder(self) -> Path:
        """The folder of a path that lies on this machine."""
        return Path(self.degradation_path or Path(self.output_dir, "path"))

    def __post_init__(self):
        sources = [name for name in ("prompts_file", "dataset_name", "train_data_dir") if getattr(self, name)]
        if len(sources) > 1:
            raise ValueError(
                f"Prompts come from one place, but {' and '.join('--' + name for name in sources)} are given."
            )
        for name in (
            "checkpointing_steps",
            "train_batch_size",
            "gradient_accumulation_steps",
            "logging_steps",
            "num_validation_images",
            "validation_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} has to be at least 1, but is {getattr(self, name)}.")
        for name, known in (("objective", list(OBJECTIVES)), ("lr_scheduler", [kind.value for kind in SchedulerType])):
            if getattr(self, name) not in known:
                raise ValueError(f"--{name} {getattr(self, name)!r} is none of {', '.join(known)}.")
        if not self.path_is_shared:
            for name in ("degradation_path_revision", "path_disk_budget_gb"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"--{name} is for a path on the Hub, but --degradation_path is {self.degradation_path!r}."
                    )
        if self.hub_model_id is not None and not self.push_to_hub:
            raise ValueError("--hub_model_id says where to, but nothing is pushed without --push_to_hub.")
        if self.hub_token is not None and self.report_to not in ("none", "tensorboard"):
            raise ValueError(
                f"--hub_token together with --report_to {self.report_to} is refused: such trackers upload the command "
                "line, and the token in it. Log in with `hf auth login` instead."
            )
        if self.checkpoints_total_limit is not None and self.checkpoints_total_limit < 1:
            raise ValueError(f"--checkpoints_total_limit has to be at least 1, but is {self.checkpoints_total_limit}.")
        if self.max_train_samples is not None and self.max_train_samples < 1:
            raise ValueError(f"--max_train_samples has to be at least 1, but is {self.max_train_samples}.")
