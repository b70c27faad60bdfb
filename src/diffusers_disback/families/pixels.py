"""Unconditional and class-conditional denoisers on pixels, with a variance-preserving schedule."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import ConsistencyModelPipeline, DDIMPipeline, DiffusionPipeline
from torch import Tensor, nn

from ..data.conditions import ClassLabels, ConditionSource, NoCondition, labels_of
from ..hub.cards import UNCONDITIONAL, Usage
from ..models.batch import NO_LABEL, Condition
from .base import ModelFamily
from .checks import check_prediction_type


class Pixels(ModelFamily):
    """A `UNet2DModel` on pixels, without a condition, or with class labels (`num_class_embeds` of its config).

    Which label stands for no class is in no config: `--null_class_label` says it. Without it all labels are classes, and nothing
    guides. Images have three channels, or one, which evaluators are shown three times.
    """

    pipeline_classes: tuple[str, ...] = ("DDPMPipeline", "DDIMPipeline", "ConsistencyModelPipeline")
    agree_in = ("in_channels", "out_channels", "num_class_embeds")
    takes_null_class_label = True
    usage = replace(UNCONDITIONAL, condition="class_labels={label}", example=NO_LABEL)

    def check(self) -> None:
        super().check()
        number, null_label = self.num_labels, self.null_class_label
        if null_label is not None and not null_label < (number or 0):
            labels = "no class labels" if number is None else f"the labels 0..{number - 1}"
            raise ValueError(f"--null_class_label is {null_label}, but the teacher's UNet has {labels}.")

    @classmethod
    def check_network(cls, config: Any, what: str) -> None:
        channels = config["in_channels"], config["out_channels"]
        if channels not in ((1, 1), (3, 3)):
            raise ValueError(
                f"{what} takes {channels[0]} channels and gives {channels[1]}: supported are three each, or one. (Twice as many "
                "outputs as inputs are a predicted variance, other numbers are latents.)"
            )
        for key, usual in (("class_embed_type", None), ("time_embedding_type", "positional")):
            if config.get(key, usual) != usual:
                raise ValueError(f"{what} has {key}={config[key]!r}, which is not supported: {usual!r} is.")

    @classmethod
    def usage_with(cls, config: Any) -> Usage:
        # Of diffusers' pipelines only ConsistencyModelPipeline can be called with labels, and it does not sample these teachers.
        return UNCONDITIONAL if config.num_class_embeds is None else replace(cls.usage, calls_teacher=False)

    @property
    def num_labels(self) -> int | None:
        """The class labels that the denoiser takes, the one for none among them; `None` if it takes none."""
        return self.network.config.num_class_embeds

    @property
    def null_class_label(self) -> int | None:
        """That stands for no class, if it was said."""
        return None if self.model is None else self.model.reference.null_class_label

    def conditions(self, prompts: Sequence[str] | None = None, resolution: int | None = None) -> ConditionSource:
        if self.num_labels is None:
            return NoCondition()
        return ClassLabels(self.num_labels, self.null_class_label)

    @classmethod
    def example_condition(cls, config: Any, batch: int) -> Condition:
        if config.num_class_embeds is None:
            return {}
        return {"class_labels": torch.empty(batch, dtype=torch.long, device="meta")}

    def arguments(self, captions: list[str]) -> dict[str, Tensor]:
        """As of `ModelFamily`: labels, if there are classes.

        Raises:
            ValueError: If a caption is none.
        """
        if self.num_labels is None:
            return {}
        return {"class_labels": labels_of(captions, self.num_labels)}

    def one_step(self, network: nn.Module, timestep: int) -> DiffusionPipeline:
        """As of `ModelFamily`; with labels a `ConsistencyModelPipeline`, which is the one that can be called with them."""
        self.check_network(network.config, "The student's network")
        made = DDIMPipeline if self.num_labels is None else ConsistencyModelPipeline
        return made(unet=network, scheduler=self.one_step_scheduler(timestep))

    def decode(self, x0: Tensor) -> Tensor:
        return super().decode(x0).expand(-1, 3, -1, -1)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """As of `ModelFamily`; of a teacher with one channel the mean of three."""
        return pixels if self.network.config.in_channels == 3 else pixels.mean(dim=1, keepdim=True)

    def check_schedule(self) -> str | None:
        source = self.conditions()
        return check_prediction_type(self, self.device, source.condition([0], [False]))
