"""DiT: a transformer on latents, with class labels, whose outputs are a prediction and a variance."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn

from ..data.conditions import ClassLabels, ConditionSource, labels_of
from ..hub.cards import UNCONDITIONAL, Usage
from ..models.batch import Condition
from ..models.weights import fingerprint
from .checks import check_prediction_type
from .latents import encode_to_latents, stride_of_autoencoder
from .transformer import LearnedVarianceFamily, prediction_of


class Dit(LearnedVarianceFamily):
    """A `DiTTransformer2DModel` on an autoencoder's latents (arXiv 2212.09748), with the label after the last class for none."""

    pipeline_classes = ("DiTPipeline",)
    noun = "DiT"
    needed = ("transformer", "vae", "scheduler")
    agree_in = ("in_channels", "out_channels", "num_embeds_ada_norm", "sample_size", "patch_size")
    usage = replace(UNCONDITIONAL, condition="class_labels=[{label}]", example="0", takes_guidance=True)

    @classmethod
    def usage_with(cls, config: Any) -> Usage:
        # The stock pipeline guides away from label 1000, whatever the number of classes.
        return replace(cls.usage, calls_teacher=config.num_embeds_ada_norm == 1000)

    @staticmethod
    def call(network: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        output = network(x_t, timestep=t, return_dict=False, **condition)[0]
        return prediction_of(output, x_t)

    @property
    def num_classes(self) -> int:
        """The classes; the label of this number stands for none."""
        return self.network.config.num_embeds_ada_norm

    def conditions(self, prompts: Sequence[str] | None = None, resolution: int | None = None) -> ConditionSource:
        return ClassLabels(self.num_classes, self.num_classes)

    @classmethod
    def example_condition(cls, config: Any, batch: int) -> Condition:
        return {"class_labels": torch.empty(batch, dtype=torch.long, device="meta")}

    def arguments(self, captions: list[str]) -> dict[str, Tensor]:
        return {"class_labels": labels_of(captions, self.num_classes)}

    def inputs(self, resolution: int | None = None) -> dict[str, str]:
        return {"autoencoder": fingerprint(self.pipeline.vae)}

    @property
    def stride(self) -> int:
        return stride_of_autoencoder(self.pipeline.vae)

    @classmethod
    def stride_of(cls, others: dict[str, nn.Module]) -> int:
        return stride_of_autoencoder(others["vae"])

    def assemble(self, network: nn.Module, scheduler: SchedulerMixin) -> DiffusionPipeline:
        """As of `ModelFamily`; what its classes are called, in `model_index.json`, comes along."""
        names = {} if self.model is None else {"id2label": self.model.index.get("id2label")}
        pipeline = type(self.pipeline)(network, self.pipeline.vae, scheduler, **names)
        pipeline.register_to_config(**names)
        return pipeline

    def decode(self, x0: Tensor) -> Tensor:
        vae = self.pipeline.vae
        return super().decode(vae.decode(1 / vae.config.scaling_factor * x0).sample)

    def encode_images(self, pixels: Tensor) -> Tensor:
        return encode_to_latents(self.pipeline.vae, pixels)

    def check_schedule(self) -> str | None:
        return check_prediction_type(self, self.device, self.conditions().empty)
