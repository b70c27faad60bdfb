"""The teacher's many-step images, which are sampled once a run: they are kept in its folder."""

import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..hub.files import writing, written_whole
from ..models.weights import metadata_of, read_weights, save_weights
from . import Evaluation


class TeacherImages:
    """A folder of samples, in files that are named by all that they depend on.

    Args:
        folder (`Path`): Made when something is written.
        inputs (`Mapping[str, Any]`): What samples depend on besides prompts and the sampler: hashes of the teacher's parts.
    """

    def __init__(self, folder: Path, inputs: Mapping[str, Any]):
        self.folder = folder
        self.inputs = dict(inputs)

    def read(self, evaluation: Evaluation, **sampler: Any) -> tuple[Tensor, float] | None:
        """The images of an evaluation's prompts, `[N, 3, H, W]` uint8, and the seconds that one took; `None` if they are not
        there. A file that is not as it was written is told.

        Args:
            evaluation (`Evaluation`): Its prompts and its size.
            **sampler: Steps, guidance, seed and precision, as JSON has them.
        """
        key = self._key(evaluation, sampler)
        file = self._file(key)
        if not file.exists():
            return None
        try:
            metadata, tensors = metadata_of(file), read_weights(file)
            if metadata.get("key") != key or tensors.keys() != {"images"}:
                raise ValueError(f"{file} holds something else than its name says.")
            images, seconds = tensors["images"], float(metadata["seconds_per_image"])
            wanted = (len(evaluation.prompts), 3, evaluation.size, evaluation.size)
            if images.dtype != torch.uint8 or images.shape != wanted:
                raise ValueError(
                    f"{file} holds {images.dtype} of {tuple(images.shape)} in place of uint8 of {wanted}."
                )
        except (ValueError, KeyError) as error:
            tqdm.write(f"The teacher's images are sampled again. {error}", file=sys.stderr)
            return None
        return images, seconds

    def write(self, images: Tensor, seconds: float, evaluation: Evaluation, **sampler: Any) -> None:
        """Keeps images; arguments as of `read`."""
        key = self._key(evaluation, sampler)
        file = self._file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        with writing(file), written_whole(file) as draft:
            save_weights({"images": images}, draft, {"key": key, "seconds_per_image": repr(seconds)})

    def _key(self, evaluation: Evaluation, sampler: Mapping[str, Any]) -> str:
        of = {"inputs": self.inputs, "prompts": evaluation.prompts, "batch_size": evaluation.batch_size}
        content = {**of, "size": evaluation.size, "sampler": sampler}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def _file(self, key: str) -> Path:
        return self.folder / f"teacher-{key[:16]}.safetensors"
