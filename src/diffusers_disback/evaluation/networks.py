"""Networks whose features images are compared in: DINOv2, CLIP and SigLIP, from the Hub or from a folder."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..data.images import open_image
from ..hub.files import inside, printable, read_json
from ..models.model_files import locate
from ..models.pipeline_folder import UNREADABLE, check_component, of_variants
from ..models.weights import PICKLES, fingerprint, owned
from .preprocessing import ImagePreprocessing


_CLASSES = {
    "dinov2": "Dinov2Model",
    "clip": "CLIPModel",
    "clip_vision_model": "CLIPVisionModel",
    "siglip": "SiglipModel",
    "siglip_vision_model": "SiglipVisionModel",
}
"""Which class of transformers is loaded, by the `model_type` of its config."""

_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_TOKENIZER = re.compile(r"(tokenizer|vocab|tokenizer_config|special_tokens_map|added_tokens)\.json|merges\.txt")
_UNREAD = (*PICKLES, ".msgpack", ".h5")


class FeatureNetwork:
    """A network of transformers that gives features of images, and of texts if it is a CLIP.

    It is loaded exactly, from safetensors, all of it from one commit; its weights stay in CPU memory, and are on the device
    only while features are computed, so that training has that memory. Features of the same tensor of images are computed
    once for as long as it lives: what is measured is not to be written to.

    Args:
        name (`str`): A folder, or a model on the Hub, of which `user/repo@revision` is a branch, tag or commit.
        processor (`str`, *optional*): Where its preprocessor and tokenizer lie, if not beside it.
        device (`torch.device` or `str`): Where features are computed, in float32.
        cache_dir (`str`, *optional*): Where downloads are kept.
        batch_size (`int`): Images or texts per forward pass.

    Attributes:
        label (`str`): Its name for people: of a folder the last part.
        commit (`str`, *optional*): Of a model on the Hub.
        num_features (`int`): Of an image, F.
        preprocessing (`ImagePreprocessing`): How it takes images.

    Raises:
        ValueError: If it is not there, has no weights in safetensors, is of a class that is not supported, or does not fit its
            own config in anything.
    """

    def __init__(
        self,
        name: str,
        processor: str | None = None,
        device: torch.device | str = "cpu",
        cache_dir: str | None = None,
        batch_size: int = 32,
    ):
        self.name, self.device, self.batch_size = name, torch.device(device), batch_size
        self.what = f"the feature network {name!r}"
        self.label = _label(name)
        own = processor is None
        self.folder, self.commit = _locate(name, lambda names: _needed(names, True, own, self.what), cache_dir)
        check_component(self.folder, ".", None, self.what, "transformers")
        config = read_json(self.folder / "config.json", f"config.json of {self.what}")
        self.model_type = config.get("model_type")
        if self.model_type not in _CLASSES:
            raise ValueError(
                f"{self.what} is a {self.model_type!r}. Features can be those of {', '.join(_CLASSES)} (model_type in its "
                "config.json)."
            )
        self._processor_folder = self.folder
        if processor is not None:
            where = f"the processor {processor!r}"
            self._processor_folder, _ = _locate(processor, lambda names: _needed(names, False, True, where), cache_dir)
            _check_processor_files(self._processor_folder, where)
        self.preprocessing = _preprocessing(self._processor_folder, processor or self.what)
        self.model = _load(self.folder, _CLASSES[self.model_type], self.what)
        self.num_features = self._check_sizes()
        self._tokenizer: Any = None
        self._of_images = WeakTensorKeyDictionary()
        self._of_texts: dict[str, Tensor] = {}

    def image_features(self, images: Tensor) -> Tensor:
        """Of whole images, `[N, 3, H, W]` uint8: `[N, F]` float32 on the CPU."""
        return self._features("whole", self.preprocessing, images)

    def patch_features(self, images: Tensor) -> Tensor:
        """Of the middle of images at full resolution (`ImagePreprocessing.patch`), `[N, 3, H, W]` uint8: `[N, F]` float32 on
        the CPU."""
        return self._features("patch", self.preprocessing.patch, images)

    def features_of_files(self, files: Sequence[Path]) -> Tensor:
        """Of whole images in files, of any sizes: `[N, F]` float32 on the CPU.

        Raises:
            ValueError: With the name of a file that is no image.
        """
        parts = [files[first : first + self.batch_size] for first in range(0, len(files), self.batch_size)]
        with self._on_device():
            read = (torch.cat([self.preprocessing(open_image(file)[None]) for file in part]) for part in parts)
            return torch.cat([self._embed(values.to(self.device)).cpu() for values in read])

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Of texts, cut at the tokenizer's length: `[N, F]` float32 on the CPU.

        Raises:
            ValueError: If the network has no text encoder, or its tokenizer cannot be loaded.
        """
        self.check_takes_text()
        new = [text for text in dict.fromkeys(texts) if text not in self._of_texts]
        with self._on_device():
            for first in range(0, len(new), self.batch_size):
                part = new[first : first + self.batch_size]
                tokens = self._tokenizer(part, padding=True, truncation=True, return_tensors="pt").to(self.device)
                pooled = self.model.text_model(**tokens).pooler_output
                self._of_texts |= dict(zip(part, self.model.text_projection(pooled).cpu(), strict=True))
        return torch.stack([self._of_texts[text] for text in texts])

    def check_takes_text(self) -> None:
        """Loads the tokenizer.

        Raises:
            ValueError: If there is none, or no text encoder.
        """
        if self._tokenizer is not None:
            return
        if self.model_type != "clip":
            raise ValueError(f"{self.what} is a {self.model_type}, which has no text encoder; a clip is needed.")
        from transformers import CLIPTokenizer

        there = {file.name for file in self._processor_folder.iterdir()}
        if "tokenizer.json" not in there and not {"vocab.json", "merges.txt"} <= there:
            # of which transformers would make one without words
            raise ValueError(f"{self.what} has no tokenizer.json, and no vocab.json with merges.txt.")
        try:
            tokenizer = CLIPTokenizer.from_pretrained(self._processor_folder, local_files_only=True)
        except UNREADABLE as error:
            raise ValueError(f"The tokenizer of {self.what} cannot be loaded ({_first_line(error)}).") from error
        text = self.model.config.text_config
        if len(tokenizer) > text.vocab_size:
            raise ValueError(
                f"The tokenizer of {self.what} has {len(tokenizer)} tokens, its text encoder {text.vocab_size}: they do not "
                "belong together."
            )
        tokenizer.model_max_length = min(tokenizer.model_max_length, text.max_position_embeddings)
        self._tokenizer = tokenizer

    @property
    def logit_scale(self) -> float:
        """Of a CLIP, what cosines are multiplied by."""
        return self.model.logit_scale.exp().item()

    def metadata(self) -> dict[str, str]:
        """What features depend on, as texts: the name for people, and a hash of the weights and the preprocessing."""
        weights = fingerprint(self.model)
        return {"feature_model": self.label, "weights": weights, "preprocessing": self.preprocessing.text()}

    @torch.no_grad()
    def _features(self, kind: str, preprocess: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        known = self._of_images.setdefault(images, {})
        if kind not in known:
            with self._on_device():
                parts = images.split(self.batch_size)
                known[kind] = torch.cat([self._embed(preprocess(part.to(self.device))).cpu() for part in parts])
        return known[kind]

    @torch.no_grad()
    def _embed(self, pixel_values: Tensor) -> Tensor:
        """`[B, F]` of what `preprocessing` gives."""
        if self.model_type in ("clip", "siglip"):
            pooled = self.model.vision_model(pixel_values=pixel_values).pooler_output
            return self.model.visual_projection(pooled) if self.model_type == "clip" else pooled
        return self.model(pixel_values=pixel_values).pooler_output

    def _check_sizes(self) -> int:
        """Sees that the network takes what the preprocessing gives. Returns the number of features."""
        config = self.model.config
        vision = config.vision_config if self.model_type in ("clip", "siglip") else config
        side, taken = vision.image_size, self.preprocessing.input_size
        if self.model_type != "dinov2" and taken != (side, side):  # which interpolates its positions
            raise ValueError(f"{self.what} takes images of {side} pixels, but its preprocessor gives {taken}.")
        return config.projection_dim if self.model_type == "clip" else vision.hidden_size

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        self.model.to(self.device)
        try:
            yield
        finally:
            self.model.to("cpu")


class FeatureNetworks:
    """Feature networks by name, each loaded once.

    Args:
        device, cache_dir, batch_size: As of `FeatureNetwork`.
    """

    def __init__(self, device: torch.device | str = "cpu", cache_dir: str | None = None, batch_size: int = 32):
        self._common: dict[str, Any] = {"device": device, "cache_dir": cache_dir, "batch_size": batch_size}
        self._loaded: dict[tuple[str, str | None], FeatureNetwork] = {}

    def load(self, name: str, processor: str | None = None) -> FeatureNetwork:
        """The network of a name.

        Raises:
            ValueError: If it cannot be loaded; see `FeatureNetwork`.
        """
        if (name, processor) not in self._loaded:
            self._loaded[name, processor] = FeatureNetwork(name, processor, **self._common)
        return self._loaded[name, processor]


def _locate(name: str, choose: Callable[[list[str]], list[str]], cache_dir: str | None) -> tuple[Path, str | None]:
    """The folder of a model on this machine, after a download, and its commit if it is one on the Hub."""
    if Path(name).is_dir():
        return locate(name, None, choose, cache_dir)[0], None
    repo_id, _, revision = name.partition("@")
    root, _ = locate(repo_id, revision or None, choose, cache_dir)
    return root, root.name


def _needed(names: list[str], weights: bool, processor: bool, what: str) -> list[str]:
    """The files that are read, among all of a model.

    Raises:
        ValueError: If one of them is not there.
    """
    own = [Path(name) for name in names if "/" not in name]
    needed = []
    if weights:
        if "config.json" not in names:
            raise ValueError(f"{what} has no config.json: it is no model of transformers.")
        found = of_variants([file for file in own if file.name.startswith("model")])
        if None not in found:
            pickled = [file.name for file in own if file.suffix in _UNREAD]
            hint = (
                f" There are pickled ones ({pickled[0]}), which can run code when they are read, and are not."
                if pickled
                else ""
            )
            raise ValueError(f"{what} has no weights in safetensors (model.safetensors).{hint}")
        needed = ["config.json", *(file.name for file in found[None])]
    if processor:
        configs = [name for name in _PROCESSORS if name in names]
        if not configs:
            raise ValueError(f"{what} has no {_PROCESSORS[0]}, which says how it takes images.")
        needed += [*configs, *(file.name for file in own if _TOKENIZER.fullmatch(file.name))]
    return needed


def _check_processor_files(folder: Path, what: str) -> None:
    """Sees that the files which are read lie in the folder."""
    for file in folder.iterdir():
        if file.name in _PROCESSORS or _TOKENIZER.fullmatch(file.name):
            inside(folder, file.name, what)


def _preprocessing(folder: Path, what: str) -> ImagePreprocessing:
    name = next(name for name in _PROCESSORS if (folder / name).is_file())
    config = read_json(folder / name, f"{name} of {what}")
    if name == _PROCESSORS[1]:  # as transformers writes a processor of images and texts from its version 5 on
        config = config.get("image_processor")
        if not isinstance(config, dict):
            raise ValueError(f"{name} of {what} has no image_processor, which says how images are taken.")
    return ImagePreprocessing.of_config(config, f"{name} of {what}")


def _load(folder: Path, class_name: str, what: str) -> Any:
    """The network in float32, in memory of its own.

    Raises:
        ValueError: If it cannot be read, or anything is missing from, left over of or different in its weights.
    """
    import transformers

    model_class = getattr(transformers, class_name)
    try:
        network, info = model_class.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    except UNREADABLE as error:
        raise ValueError(f"{what} cannot be loaded as a {class_name} ({_first_line(error)}).") from error
    wrong = {kind: sorted(map(str, keys))[:3] for kind, keys in info.items() if keys}
    if wrong:
        raise ValueError(f"{what} does not fit its own config as a {class_name}: {wrong}.")
    made: nn.Module = owned(network.eval().requires_grad_(False), what)
    return made


def _label(name: str) -> str:
    """A network's name on plots and cards. Where a folder of this machine lies is nobody's business."""
    told = Path(name).resolve().name if Path(name).is_dir() else name
    return printable(told).replace("$", "")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
