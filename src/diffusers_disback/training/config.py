"""The settings that both stages share. Each stage's own are beside it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diffusers.optimization import SchedulerType

from ..hub.repository import is_repo_id
from ..models.adapters import TARGET_MODULES
from ..models.reference import ModelReference
from ..objectives import OBJECTIVES
from .ranges import Help, Range, check_settings


def setting(default: Any, help: str, may_be_empty: bool = False, **bounds: float) -> Any:
    """A dataclass field with its help on the command line, and the numbers that it takes.

    Args:
        default (`Any`): Its value if nothing is said.
        help (`str`): On the command line.
        may_be_empty (`bool`): Of a list: whether its texts may be empty.
        bounds (`float`): Of a number's `Range`: `minimum`, `above`, `below`, `maximum`.
    """
    metadata = {"help": Help(help, Range(**bounds), may_be_empty)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


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
    rescale_betas_zero_snr: bool = setting(
        False,
        "Rescale the teacher's betas to zero terminal SNR, if it was trained so and its scheduler's config does not say it.",
    )
    pretrained_vae_model_name_or_path: str | None = setting(
        None,
        "An autoencoder in place of the teacher's own: a folder, a model on the Hub, or one .safetensors file, on this "
        "machine or on the Hub. Of its weights the variant is taken that --variant names, if there is one.",
    )
    teacher_lora: str | None = setting(
        None,
        "A LoRA to fuse into the teacher's UNet before anything else: a file, on this machine or on the Hub "
        "(user/repo/file.safetensors, or its address), or a folder or repository that holds one.",
    )
    generator_model_name_or_path: str | None = setting(
        None, "Start the student from the UNet of this folder, Hub model or file instead of the teacher's copy."
    )
    conditioning_timestep: int = setting(
        399, 'The timestep at which the student is asked. DMD2, for SDXL: "conditioned at timestep 399".', minimum=0
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
    max_train_samples: int | None = setting(None, "Use this many prompts at most, from the top.", minimum=1)
    cache_conditions: Literal["auto", "disk", "off"] = setting(
        "auto",
        "Encode prompts once and keep their conditions: auto keeps few in memory and many on disk if they take at most "
        "half of what is free; disk is always on disk; off encodes every batch when it is needed.",
    )
    resolution: int | None = setting(
        None, "The pictures' side in pixels; by default what the teacher was made for.", minimum=8, maximum=16384
    )
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
        None, "Of a path on the Hub: delete nodes that are behind when downloads take more than this.", above=0
    )
    output_dir: str = setting("disback-model", "Where everything is written.")
    seed: int = setting(0, "All of a run's randomness follows from it.", minimum=0, maximum=2**32 - 1)
    resume_from_checkpoint: str | None = setting(
        None, '"latest", or the folder of a checkpoint of this run: go on from there.'
    )
    checkpointing_steps: int = setting(500, "Save what is needed to resume every so many steps.", minimum=1)
    checkpoints_total_limit: int | None = setting(None, "Keep this many checkpoints of each stage at most.", minimum=1)

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

    # Adapters on one shared network, in place of whole networks
    lora_rank: int | None = setting(
        None,
        "Train adapters of this rank on one frozen teacher, in place of whole networks: far less memory.",
        minimum=1,
        maximum=4096,
    )
    lora_alpha: float | None = setting(
        None, "Scales an adapter's update by alpha / rank; by default the rank.", above=0
    )
    lora_target_modules: list[str] = setting(
        TARGET_MODULES, "Ends of the names of the adapted layers. diffusers, for an LCM-LoRA of SDXL: these."
    )
    lora_roles: list[str] = setting(
        ["generator", "fake_score"], "Which of the two are adapters: generator, fake_score or both."
    )
    base_quantization: Literal["nf4", "int8"] | None = setting(
        None, "Keep the shared network in 4 or 8 bits by bitsandbytes; needs a GPU, and both roles as adapters."
    )
    node_precision: Literal["fp32", "fp16"] | None = setting(
        None, "In which nodes of the path are written; by default fp32 for whole networks and fp16 for adapters."
    )

    # Optimisation
    objective: str = setting("dmd", f"How the generator learns from two scores: {', '.join(OBJECTIVES)}.")
    train_batch_size: int = setting(1, "Samples per process and forward pass.", minimum=1)
    gradient_accumulation_steps: int = setting(1, "Forward passes per update, of each network.", minimum=1)
    gradient_checkpointing: bool = setting(False, "Recompute activations in the backward pass: slower, smaller.")
    fake_score_learning_rate: float = setting(
        5e-7, "Of the fake score; in stage 1 times --degradation_lr_multiplier. DMD2, for SDXL: 5e-7.", above=0
    )
    lr_scheduler: str = setting("constant_with_warmup", "As of diffusers.optimization.get_scheduler.")
    lr_warmup_steps: int = setting(
        500,
        "Updates of each network until its learning rate is reached; in stage 1 a tenth of its updates at most. DMD2: 500.",
        minimum=0,
    )
    adam_beta1: float = setting(0.9, "AdamW's first beta.", minimum=0, below=1)
    adam_beta2: float = setting(0.999, "AdamW's second beta.", minimum=0, below=1)
    adam_weight_decay: float = setting(1e-2, "AdamW's weight decay. DMD2: 0.01.", minimum=0)
    adam_epsilon: float = setting(1e-8, "AdamW's epsilon.", above=0, maximum=1)
    max_grad_norm: float = setting(10.0, "Gradients are clipped to this norm. DMD2: 10.", above=0)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = setting(
        None, "Precision inside the networks; by default that of `accelerate config`."
    )
    allow_tf32: bool = setting(False, "Let Ampere and newer GPUs multiply float32 matrices in TF32.")
    use_8bit_adam: bool = setting(False, "AdamW with states of 8 bits, of bitsandbytes.")
    use_paged_adam: bool = setting(False, "AdamW whose states move out of a full GPU by themselves, of bitsandbytes.")
    offload_idle_role: bool = setting(
        False, "Keep the optimiser of the network that is not trained just now, and the target, in CPU memory: slower."
    )
    offload_ema: bool = setting(False, "Keep the average of the student's weights in CPU memory: slower.")
    enable_xformers_memory_efficient_attention: bool = setting(
        False, "Attention of xformers, if that is installed, in place of torch's own."
    )
    channels_last: bool = setting(False, "Lay networks out in memory with channels last: faster on some GPUs.")
    compile: bool = setting(False, "Compile the networks' repeated blocks by torch.compile.")
    dataloader_num_workers: int = setting(0, "Processes that draw noise and prompts ahead.", minimum=0, maximum=256)

    # What is seen of it
    report_to: str = setting("tensorboard", "Any tracker that accelerate knows, all, or none.")
    logging_dir: str = setting("logs", "Folder of the tracker's files, in the output folder.")
    logging_steps: int = setting(10, "Log losses every so many steps.", minimum=1)
    tracker_project_name: str = setting("diffusers-disback", "The project's name at the tracker.")
    validation_prompts: list[str] = setting(
        [], "Prompts of the sample pictures; by default the first of the data.", may_be_empty=True
    )
    num_validation_images: int = setting(
        4,
        "Pictures of each validation prompt that are measured. (The shapes teacher is measured on 2,000 others.)",
        minimum=1,
    )
    evaluators: list[str] = setting(
        ["drift"],
        "What measures the pictures: names of evaluators, which docs/evaluation.md lists. (The shapes teacher is measured by "
        "its judge, too.)",
    )
    validation_steps: int = setting(500, "Measure and draw the student every so many generator updates.", minimum=1)

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
            self.rescale_betas_zero_snr,
        )

    def is_adapter(self, role: str) -> bool:
        """Whether a role, `generator` or `fake_score`, is an adapter."""
        return self.lora_rank is not None and role in self.lora_roles

    @property
    def all_adapters(self) -> bool:
        """Whether all roles share one network."""
        return self.is_adapter("generator") and self.is_adapter("fake_score")

    @property
    def path_is_shared(self) -> bool:
        """Whether the path is one on the Hub, to be replayed."""
        return self.degradation_path is not None and is_repo_id(self.degradation_path)

    @property
    def path_folder(self) -> Path:
        """The folder of a path that lies on this machine."""
        return Path(self.degradation_path or Path(self.output_dir, "path"))

    def __post_init__(self):
        check_settings(self)
        sources = [name for name in ("prompts_file", "dataset_name", "train_data_dir") if getattr(self, name)]
        if len(sources) > 1:
            raise ValueError(
                f"Prompts come from one place, but {' and '.join('--' + name for name in sources)} are given."
            )
        for name, known in (("objective", list(OBJECTIVES)), ("lr_scheduler", [kind.value for kind in SchedulerType])):
            if getattr(self, name) not in known:
                raise ValueError(f"--{name} {getattr(self, name)!r} is none of {', '.join(known)}.")
        if self.lora_rank is None and (
            self.lora_alpha is not None or set(self.lora_roles) != {"generator", "fake_score"}
        ):
            raise ValueError(
                "--lora_alpha and --lora_roles are of adapters: pass --lora_rank, too, or leave them out."
            )
        unknown = [role for role in self.lora_roles if role not in ("generator", "fake_score")]
        if unknown or not self.lora_roles:
            raise ValueError(f"--lora_roles {' '.join(unknown)}: roles are generator and fake_score.")
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
        if self.hub_model_id is not None and not self.push_to_hub:
            raise ValueError("--hub_model_id says where to, but nothing is pushed without --push_to_hub.")
        if self.hub_token is not None and self.report_to not in ("none", "tensorboard"):
            raise ValueError(
                f"--hub_token together with --report_to {self.report_to} is refused: such trackers upload the command "
                "line, and the token in it. Log in with `hf auth login` instead."
            )
