"""Both stages at tiny size, as functions of their settings."""

from pathlib import Path

import tiny
import torch

from diffusers_disback.backtracking import BacktrackingTrainer
from diffusers_disback.data.captions import image_files
from diffusers_disback.data.conditions import PromptConditions
from diffusers_disback.data.images import RealImages
from diffusers_disback.degradation import DegradationRecorder
from diffusers_disback.families import family_of, network_name_of
from diffusers_disback.models.reference import ModelReference
from diffusers_disback.models.weights import fingerprint
from diffusers_disback.objectives import OBJECTIVES
from diffusers_disback.path.path import DegradationPath
from diffusers_disback.training.config import BacktrackingConfig, DegradationConfig, TrainingConfig
from shapes.dataset import write_image_folder


def training(output_dir: Path, **changes) -> TrainingConfig:
    return TrainingConfig(
        **{
            "output_dir": str(output_dir),
            "train_batch_size": 2,
            "fake_score_learning_rate": 1e-3,
            "lr_warmup_steps": 0,
            "report_to": "none",
            "conditioning_timestep": 399,
            "checkpointing_steps": 2,
            "logging_steps": 1,
            **changes,
        }
    )


def recorder(config, teacher_folder, steps=4, nodes=2, degradation=None, **changes) -> DegradationRecorder:
    teacher = ModelReference(str(teacher_folder)).resolve(network_name_of)
    family = family_of(tiny.pipeline(), teacher)
    generator = family.initial_generator(shared=config.all_adapters)
    if generator is not family.network:
        generator.requires_grad_(True)  # as one that was loaded from elsewhere
    folder = Path(config.output_dir, "path")
    if (folder / "path.json").exists():
        path = DegradationPath.from_pretrained(folder, teacher=teacher)
    else:
        start = {"name_or_path": None, "sha256": fingerprint(generator), "conditioning_timestep": 399}
        path = DegradationPath.create(folder, teacher, fingerprint(family.network), start, {})
    wanted = {"degradation_stop": 0.0, **changes}
    degradation = degradation or DegradationConfig(degradation_steps=steps, num_path_nodes=nodes, **wanted)
    return DegradationRecorder(
        config, degradation, family, generator, PromptConditions(tiny.PROMPTS, family.encode), path
    )


def record(config, teacher_folder, **changes) -> DegradationPath:
    return recorder(config, teacher_folder, **changes).record()


def trainer(config, path, evaluate=None, images=None, **changes) -> BacktrackingTrainer:
    family = family_of(tiny.pipeline())
    backtracking = BacktrackingConfig(
        **{
            "max_train_steps": 4,
            "steps_per_target": 1,
            "target_schedule": "fixed",
            "guidance_scale": 3.0,
            "generator_learning_rate": 1e-3,
            "fake_score_updates": 2,
            **changes,
        }
    )
    data = PromptConditions(tiny.PROMPTS, family.encode)
    generator = family.initial_generator(shared=config.all_adapters)
    if config.has_discriminator and images is None:
        images = real_images(config, family)
    return BacktrackingTrainer(config, backtracking, family, generator, data, path, evaluate, images=images)


def images_for(objective: str, folder: Path) -> dict[str, str]:
    """The setting of an image folder, written here, for an objective that needs a discriminator."""
    if not OBJECTIVES[objective]().needs_discriminator:
        return {}
    write_image_folder(folder, len(tiny.PROMPTS))
    return {"train_data_dir": str(folder), "cache_dir": str(folder.with_name("cache"))}


def real_images(config, family, **changes) -> RealImages:
    """Those of an image folder: one for each of the prompts, written there if there are none."""
    if not Path(config.train_data_dir).exists():
        write_image_folder(config.train_data_dir, len(tiny.PROMPTS))
    files = image_files(config.train_data_dir, [], config.cache_dir)
    size, device = family.resolution(config.resolution), torch.device("cpu")
    return RealImages(files, family.encode_images, size, len(tiny.PROMPTS), device, **changes)


def weights(network) -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in network.state_dict().items()}


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def close(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], atol: float) -> bool:
    return one.keys() == two.keys() and all(torch.allclose(one[key], two[key], atol=atol) for key in one)


def interrupted_at(number: int, train_step):
    """A stage's `train_step`, bound or not, that is interrupted as by Ctrl-C before step `number`."""

    def wrapped(*arguments):
        if arguments[-2] == number:
            raise KeyboardInterrupt
        return train_step(*arguments)

    return wrapped
