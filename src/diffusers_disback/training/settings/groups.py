"""The settings that both stages share, in groups. Names and meanings are those of diffusers' text-to-image scripts where
these have one."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from diffusers.optimization import SchedulerType

from .fields import Settings, free_setting, setting


TARGET_MODULES = [
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
]
"""The layers that are adapted by default, of UNets: those of diffusers' script for an LCM-LoRA of SDXL."""


@dataclass(kw_only=True)
class ModelSettings(Settings):
    """The models."""

    pretrained_model_name_or_path: str = setting(
        None,
        "The teacher: a folder, a model on the Hub, or a checkpoint in one .safetensors file, on this machine or on the Hub "
        "(user/repo/file.safetensors, or its address). The script's own default is the embedded shapes teacher.",
        by_content=True,
    )
    revision: str | None = setting(None, "Branch, tag or commit of the teacher on the Hub.")
    variant: str | None = setting(None, "Variant of the teacher's weights' files, such as fp16.", teacher_as="variant")
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = setting(
        None,
        "What the teacher predicts, if its scheduler's config says something else, as of some fine-tunes.",
        teacher_as="prediction_type",
    )
    pretrained_vae_model_name_or_path: str | None = setting(
        None,
        "An autoencoder in place of the teacher's own: a folder, a model on the Hub, or one .safetensors file, on this "
        "machine or on the Hub. Of its weights the variant is taken that --variant names, if there is one.",
        teacher_as="vae",
    )
    teacher_lora: str | None = setting(
        None,
        "A LoRA to fuse into the teacher's UNet before anything else: a file, on this machine or on the Hub "
        "(user/repo/file.safetensors, or its address), or a folder or repository that holds one.",
        teacher_as="lora",
    )
    single_file_config: str | None = setting(
        None,
        "Of a teacher or start in one file: the folder or Hub id of a diffusers pipeline of its kind, for configs and "
        "tokenizers; by default the original model's on the Hub.",
        by_content=True,
        teacher_as="single_file_config",
    )
    rescale_betas_zero_snr: bool = setting(
        False,
        "Rescale the teacher's betas to zero terminal SNR, if it was trained so and its scheduler's config does not say it.",
        teacher_as="rescale_betas_zero_snr",
    )
    null_class_label: int | None = setting(
        None,
        "Of a teacher with class labels on pixels: the label that it was trained with for no class. With it there is guidance; "
        "without it all labels are classes, and --guidance_scale has to be 1.",
        minimum=0,
        teacher_as="null_class_label",
    )
    generator_model_name_or_path: str | None = setting(
        None,
        "Start the student from the UNet of this folder, Hub model or file instead of the teacher's copy.",
        by_content=True,
    )
    conditioning_timestep: int = setting(
        None,
        "The timestep at which the student is evaluated; by default that of the teacher's family: 625 for Stable Diffusion "
        '1.x and 2.x (SiD-LSG: t_init = 625), 399 for SDXL (DMD2: "conditioned at timestep 399"). '
        "diffusers-disback timestep-sweep shows what a teacher draws at others.",
        minimum=0,
    )
    sigma_init: float | None = setting(
        None,
        "Names the conditioning timestep by its ratio of noise to signal, which is EDM's sigma: 2.5 (SiD), 80 (DMD2), 1 "
        "(Diff-Instruct).",
        above=0,
    )
    resolution: int | None = setting(
        None, "The images' side in pixels; by default what the teacher was made for.", minimum=8, maximum=16384
    )
    cache_dir: str | None = free_setting(None, "Where downloaded models and data sets are kept.")


TEACHER_FLAGS = {one.metadata["teacher_as"]: one.name for one in fields(ModelSettings) if one.metadata["teacher_as"]}
"""What a teacher may be taken otherwise in than its files say, as `ModelReference` names it, and the flag that says so."""


@dataclass(kw_only=True)
class DataSettings(Settings):
    """The prompts."""

    prompts_file: str | None = setting(None, "A text file with one prompt a line.", by_content=True)
    dataset_name: str | None = setting(None, "A data set on the Hub, or a folder; only its captions are read.")
    dataset_config_name: str | None = setting(None, "The data set's config, if it has several.")
    dataset_split: str = setting("train", "The data set's split.")
    dataset_streaming: bool = setting(
        False, "Do not store the data set: read its captions once into captions.txt in the output folder."
    )
    train_data_dir: str | None = setting(
        None,
        "An image folder with a metadata.jsonl, of captions. Its images are read for a discriminator alone: see "
        "--adversarial_weight.",
    )
    caption_column: str = setting("text", "The data set's column of captions.")
    max_train_samples: int | None = setting(None, "Use this many prompts at most, from the top.", minimum=1)
    cache_conditions: Literal["auto", "disk", "off"] = setting(
        "auto",
        "Encode prompts once and keep their conditions: auto keeps few in memory and many on disk if they take at most "
        "half of what is free; disk is always on disk; off encodes every batch when it is needed.",
    )


@dataclass(kw_only=True)
class PathSettings(Settings):
    """The run and its path."""

    stage: Literal["all", "record", "backtrack"] = free_setting(
        "all", "Record the degradation path, backtrack along one, or both."
    )
    output_dir: str = free_setting("disback-model", "Where everything is written.")
    seed: int = setting(0, "All of a run's randomness follows from it.", minimum=0, maximum=2**32 - 1)
    resume_from_checkpoint: str | None = free_setting(
        None, '"latest", or the folder of a checkpoint of this run: go on from there.'
    )
    checkpointing_steps: int = free_setting(500, "Save what is needed to resume every so many steps.", minimum=1)
    checkpoints_total_limit: int | None = free_setting(
        None, "Keep this many checkpoints of each stage at most.", minimum=1
    )
    degradation_path: str | None = free_setting(
        None,
        "The folder of the path, by default `path` in the output folder; or a shared path on the Hub, user/repo. A new "
        "folder's name that looks like the latter is written ./a/b.",
    )
    degradation_path_revision: str | None = free_setting(None, "Branch, tag or commit of a path on the Hub.")
    path_disk_budget_gb: float | None = free_setting(
        None, "Of a path on the Hub: delete nodes that are behind when downloads take more than this.", above=0
    )


@dataclass(kw_only=True)
class OptimisationSettings(Settings):
    """Optimisation."""

    objective: str = setting(
        "dmd",
        "How the generator learns from two scores: diff_instruct, dmd, f_distill or sid, or one that was added to OBJECTIVES.",
    )
    objective_args: dict[str, Any] = setting(
        {}, "Arguments of the objective, such as alpha=1.2 of sid; see docs/method.md for what each takes."
    )
    min_noise: float = setting(
        0.02, "Where in the schedule the generator is trained, from this share of it. DMD2: 0.02.", minimum=0, below=1
    )
    max_noise: float = setting(
        0.98,
        "Where in the schedule the generator is trained, up to this share of it. DMD2: 0.98.",
        minimum=0,
        maximum=1,
    )
    timestep_sampling: Literal["uniform", "logit_normal", "mode"] = setting(
        "uniform",
        "The distribution of timesteps, which diffusers' scripts call --weighting_scheme: the generator's within that range, the "
        "fake score's over the whole schedule.",
    )
    logit_mean: float = setting(0.0, "Of logit_normal: the mean of the normal.", minimum=-100, maximum=100)
    logit_std: float = setting(1.0, "Of logit_normal: the standard deviation of the normal.", above=0, maximum=100)
    mode_scale: float = setting(
        1.29, "Of mode: above 0 it draws more of the middle. diffusers: 1.29.", minimum=-1, maximum=1.75
    )
    timestep_shift: float = setting(
        1.0,
        "Shift timesteps towards noise, as flow schedulers do: u -> s u / (1 + (s - 1) u). Leave it at 1 for a teacher whose "
        "scheduler has a shift of its own.",
        above=0,
        maximum=1000,
    )
    adversarial_weight: float = setting(
        0.0,
        "Of the adversarial term in the generator's loss, for any objective; it needs images, in --train_data_dir. 0 is "
        "none.",
        minimum=0,
    )
    discriminator_weight: float = setting(
        1e-2,
        "Of the discriminator's loss in the fake score's, where there is a discriminator. DMD2: 0.01.",
        above=0,
    )
    discriminator_learning_rate: float | None = setting(
        None,
        "Of the discriminator's head; by default --fake_score_learning_rate.",
        above=0,
        is_rate=True,
    )
    train_batch_size: int = setting(1, "Samples per process and forward pass.", minimum=1)
    gradient_accumulation_steps: int = setting(1, "Forward passes per update, of each network.", minimum=1)
    gradient_checkpointing: bool = free_setting(False, "Recompute activations in the backward pass: slower, smaller.")
    fake_score_learning_rate: float = setting(
        5e-7,
        "Of the fake score; in stage 1 times --degradation_lr_multiplier. DMD2, for SDXL: 5e-7.",
        above=0,
        is_rate=True,
    )
    lr_scheduler: str = setting(
        "constant_with_warmup",
        "As of diffusers.optimization.get_scheduler.",
        choices=tuple(kind.value for kind in SchedulerType),
    )
    lr_warmup_steps: int = setting(
        500,
        "Updates of each network until its learning rate is reached; in stage 1 a tenth of its updates at most. DMD2: 500.",
        minimum=0,
    )
    adam_beta1: float = setting(0.9, "AdamW's first beta.", minimum=0, below=1)
    adam_beta2: float = setting(0.999, "AdamW's second beta.", minimum=0, below=1)
    generator_adam_beta1: float | None = setting(
        None, "The generator's first beta; by default --adam_beta1.", minimum=0, below=1
    )
    generator_adam_beta2: float | None = setting(
        None, "The generator's second beta; by default --adam_beta2.", minimum=0, below=1
    )
    fake_score_adam_beta1: float | None = setting(
        None, "The fake score's first beta, in both stages; by default --adam_beta1.", minimum=0, below=1
    )
    fake_score_adam_beta2: float | None = setting(
        None, "The fake score's second beta, in both stages; by default --adam_beta2.", minimum=0, below=1
    )
    adam_weight_decay: float = setting(1e-2, "AdamW's weight decay. DMD2: 0.01.", minimum=0)
    adam_epsilon: float = setting(1e-8, "AdamW's epsilon.", above=0, maximum=1)
    max_grad_norm: float = setting(10.0, "Gradients are clipped to this norm. DMD2: 10.", above=0)
    mixed_precision: Literal["no", "fp16", "bf16"] | None = free_setting(
        None, "Precision inside the networks; by default that of `accelerate config`."
    )
    text_encoder_precision: Literal["no", "fp16", "bf16"] = setting(
        "no",
        "Precision of the text encoders, by default float32. What they encode is kept in float32. T5-XXL, as of Stable Diffusion "
        "3, takes 19 GB in float32.",
    )
    allow_tf32: bool = free_setting(False, "Let Ampere and newer GPUs multiply float32 matrices in TF32.")
    use_8bit_adam: bool = setting(False, "AdamW with states of 8 bits, of bitsandbytes.")
    use_paged_adam: bool = setting(False, "AdamW whose states move out of a full GPU by themselves, of bitsandbytes.")
    offload_idle_role: bool = free_setting(
        False, "Keep the optimiser of the network that is not trained just now, and the target, in CPU memory: slower."
    )
    offload_ema: bool = free_setting(False, "Keep the average of the student's weights in CPU memory: slower.")
    enable_xformers_memory_efficient_attention: bool = free_setting(
        False, "Attention of xformers, if that is installed, in place of torch's own."
    )
    attention_backend: str | None = free_setting(
        None,
        "Attention of a transformer whose layers diffusers' dispatcher serves, by the dispatcher's names: native, flash, sage, "
        "_native_cudnn, ...",
    )
    channels_last: bool = free_setting(False, "Lay networks out in memory with channels last: faster on some GPUs.")
    compile: bool = free_setting(False, "Compile the networks' repeated blocks by torch.compile.")
    dataloader_num_workers: int = free_setting(
        0, "Processes that draw noise and prompts ahead.", minimum=0, maximum=256
    )


@dataclass(kw_only=True)
class AdapterSettings(Settings):
    """Adapters on one shared network, in place of whole networks."""

    lora_rank: int | None = setting(
        None,
        "Train adapters of this rank on one frozen teacher, in place of whole networks: far less memory.",
        minimum=1,
        maximum=4096,
    )
    lora_alpha: float | None = setting(
        None, "Scales an adapter's update by alpha / rank; by default the rank.", above=0
    )
    lora_target_modules: list[str] | None = setting(
        None,
        "Ends of the names of the adapted layers; by default those of the teacher's family: of UNets those of diffusers' script "
        "for an LCM-LoRA of SDXL.",
    )
    lora_roles: list[str] = setting(
        ["generator", "fake_score"],
        "Which of the two are adapters: generator, fake_score or both.",
        choices=("generator", "fake_score"),
    )
    base_quantization: Literal["nf4", "int8"] | None = setting(
        None, "Keep the shared network in 4 or 8 bits by bitsandbytes; needs a GPU, and both roles as adapters."
    )
    node_precision: Literal["fp32", "fp16"] | None = setting(
        None, "In which nodes of the path are written; by default fp32 for whole networks and fp16 for adapters."
    )


@dataclass(kw_only=True)
class HubSettings(Settings):
    """The Hub."""

    push_to_hub: bool = free_setting(False, "Push the path, node by node as it is recorded, and the student.")
    hub_model_id: str | None = free_setting(
        None, "The repository, user/name; by default the output folder's name, of the token's user."
    )
    hub_token: str | None = free_setting(
        None, "Of the Hub. `hf auth login` is safer: others can see a command line.", is_secret=True
    )
    hub_private_repo: bool = free_setting(False, "Make a new repository private.")


@dataclass(kw_only=True)
class LoggingSettings(Settings):
    """What is seen of it."""

    report_to: str = free_setting("tensorboard", "Any tracker that accelerate knows, all, or none.")
    logging_dir: str = free_setting("logs", "Folder of the tracker's files, in the output folder.")
    logging_steps: int = free_setting(10, "Log losses every so many steps.", minimum=1)
    tracker_project_name: str = free_setting("diffusers-disback", "The project's name at the tracker.")
    validation_prompts: list[str] = free_setting(
        [], "Prompts of the sample images; by default the first of the data.", may_be_empty=True, is_free_text=True
    )
    evaluators: list[str] = free_setting(
        ["drift"],
        "What samples are measured by, besides the shapes teacher's own classifier: names of EVALUATORS, such as drift, "
        "fid_to_teacher and clip_score. See docs/evaluation.md.",
    )
    evaluator_args: dict[str, Any] = free_setting(
        {}, "Arguments of the evaluators, such as feature_model=facebook/dinov2-large; see docs/evaluation.md."
    )
    num_validation_images: int = free_setting(
        4,
        "Images of each validation prompt that are measured. (The shapes teacher is measured on 2,000 others.)",
        minimum=1,
    )
    validation_steps: int = free_setting(
        500, "Measure and draw the student every so many generator updates.", minimum=1
    )
    evaluation_prompts_file: str | None = free_setting(
        None,
        "A text file with one prompt a line: what evaluators measure, an image each; by default the validation prompts, "
        "--num_validation_images each.",
    )
    num_evaluation_prompts: int | None = free_setting(
        None,
        "Measure so many images, of prompts evenly spaced over --evaluation_prompts_file, or over the run's own. Where there are "
        "fewer prompts, each has several.",
        minimum=1,
    )
    metric_for_best_model: str | None = setting(
        None,
        "Keep the best student by this metric of the chosen evaluators in best/, beside the last. Which direction is better "
        "is the metric's own.",
    )
    load_best_model_at_end: bool = setting(
        False, "Save the best student in place of the last; see --metric_for_best_model."
    )
    early_stopping_patience: int | None = setting(
        None,
        "End stage 2 when --metric_for_best_model has not improved at so many validations in a row with the teacher as the target.",
        minimum=1,
    )
    early_stopping_threshold: float = setting(
        0.0, "What is an improvement for --early_stopping_patience: by more than this.", minimum=0
    )
