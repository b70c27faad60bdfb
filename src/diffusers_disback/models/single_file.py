"""A checkpoint in one file, as fine-tunes are shared: made once into a diffusers folder, which then is the model."""

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import torch
from torch import nn

from ..hub.files import inside, known_sha256, read_json, sha256_of, write_json
from ..hub.repository import HubError, Repository, is_repo_id
from .noise_schedule import with_said_otherwise
from .pipeline_folder import INDEX, UNREADABLE, check_classes, components_of, files_of, read_index
from .weights import HALVES, layout_of, open_weights, save_weights


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

# What diffusers takes a checkpoint for -> the pipeline that it becomes.
SUPPORTED = {
    "v1": "StableDiffusionPipeline",
    "v2": "StableDiffusionPipeline",
    "xl_base": "StableDiffusionXLPipeline",
}
_PARTS = {
    "UNet": ("model.diffusion_model.",),
    "autoencoder": ("first_stage_model.", "vae."),
    "text encoder": ("cond_stage_model.", "conditioner.embedders."),
}
# What a header says of a prediction -> diffusers' word; and how it begins to name the kinds.
_PREDICTIONS = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
    "sample": "sample",
}
_ARCHITECTURES = {"v1": "stable-diffusion-v1", "v2": "stable-diffusion-v2", "xl_base": "stable-diffusion-xl-v1"}
_ADDRESS = re.compile(
    r"(?:https?://)?(?:huggingface\.co|hf\.co)/([^/]+/[^/]+)/(?:blob|resolve)/([^/]+)/([^?]+)(\?.*)?"
)
_IN_REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)/(.+)")
_SUFFIXES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth", ".gguf")
_CONFIGS = (".json", ".txt", ".model")
_EIGHTHS = ("F8_E4M3", "F8_E5M2")  # float16 has every one of their values
_QUANTISED = (
    ".scale_weight",
    ".scale_input",
    ".weight_scale",
    ".input_scale",
    ".comfy_quant",
    ".absmax",
    ".quant_map",
)
# Some programs leave out what CLIP's own class puts before its parts.
_SHORT = re.compile(
    r"(cond_stage_model|conditioner\.embedders\.0)\.transformer\.(?=embeddings|encoder|final_layer_norm)"
)
# Beside an encoder's weights: buffers of the text model, and of the picture's model that it was trained with.
_BUFFER = re.compile(r"(^|\.)(position_ids|attn_mask|logit_scale|logit_bias)$")
_ENCODERS = {
    "v1": {"text_encoder": ("cond_stage_model.",)},
    "v2": {"text_encoder": ("cond_stage_model.",)},
    "xl_base": {"text_encoder": ("conditioner.embedders.0.",), "text_encoder_2": ("conditioner.embedders.1.",)},
}
# How a part's tensors begin in a file of its own, or in another layout -> what to do with it.
_ALONE = {
    (
        "down_blocks.",
        "mid_block.",
        "up_blocks.",
    ): "It is a UNet alone, in the layout of diffusers: put it into a copy of "
    "its pipeline's folder as unet/diffusion_pytorch_model.safetensors, and pass the folder.",
    (
        "input_blocks.",
        "middle_block.",
        "output_blocks.",
    ): "It is a UNet alone, without the prefix model.diffusion_model.: "
    "put it into a whole checkpoint of its kind in place of the tensors with that prefix, and pass that.",
    ("diffusion_model.", "model.model.diffusion_model."): "Its UNet's tensors have another prefix: rename it to "
    "model.diffusion_model., and see that text encoders and autoencoder are in the file.",
    (
        "unet.",
    ): "It is in no layout that other programs read: rename unet. to model.diffusion_model. if the names behind it "
    "are the original ones, or save the pipeline as a diffusers folder.",
    ("encoder.", "decoder.", "quant_conv."): "It is an autoencoder alone: pass it with "
    "--pretrained_vae_model_name_or_path, beside its teacher.",
    (
        "text_model.",
        "transformer.text_model.",
        "transformer.resblocks.",
    ): "It is a text encoder alone: put it into a copy of its pipeline's folder, and pass the folder.",
}
_MISSING = {
    frozenset(
        {"autoencoder"}
    ): "Its autoencoder is missing, as of a file that is used with a separate one: bake that into "
    "the file under the prefix first_stage_model., as checkpoint mergers do, or pass a diffusers folder of the model.",
    frozenset(
        {"autoencoder", "text encoder"}
    ): "Text encoder and autoencoder are missing: pass the whole checkpoint that "
    "its UNet (the tensors with the prefix model.diffusion_model.) belongs into.",
    frozenset({"text encoder"}): "Its text encoder is missing: put it into the file under the prefix "
    "cond_stage_model.transformer. (of SDXL conditioner.embedders.0.transformer. and conditioner.embedders.1.model.).",
    frozenset({"UNet"}): "Its UNet is missing, whose tensors have the prefix model.diffusion_model.",
}


@dataclass(frozen=True)
class SingleFile:
    """Where a checkpoint lies: a file on this machine, or one in a repository on the Hub.

    Args:
        path (`str`): On this machine, or in the repository.
        repo_id (`str`, *optional*): The repository.
        revision (`str`, *optional*): Of the repository, if the address names one.
    """

    path: str
    repo_id: str | None = None
    revision: str | None = None

    def fetch(self, revision: str | None = None, cache_dir: str | None = None) -> Path:
        """The file on this machine, after a download if need be.

        Raises:
            ValueError: If there is none.
        """
        if self.repo_id is None:
            if not os.path.isfile(self.path):
                raise ValueError(
                    f"There is no file {self.path}. A file on the Hub is named user/repo/{os.path.basename(self.path)}, or "
                    "by its address."
                )
            return Path(self.path)
        revision = revision or self.revision
        file = Repository(self.repo_id).file(self.path, revision, cache_dir)
        if file is None:
            raise ValueError(f"{self.repo_id} has no file {self.path} at {revision or 'main'}.")
        return file

    def commit(self, revision: str | None = None, cache_dir: str | None = None) -> str | None:
        """The commit that a downloaded file is of; `None` for one of this machine's, or if it was not downloaded."""
        from huggingface_hub import try_to_load_from_cache

        if self.repo_id is None:
            return None
        file = try_to_load_from_cache(self.repo_id, self.path, cache_dir, revision or self.revision or "main")
        depth = len(PurePosixPath(self.path).parts)
        return Path(file).parents[depth - 1].name if isinstance(file, str) else None


def single_file_of(name: str) -> SingleFile | None:
    """The checkpoint that a model's name means: a file, `user/repo/file.safetensors`, or that file's address on the Hub;
    `None` if it means a folder or a repository."""
    if os.path.isdir(name):
        return None
    address, inside = _ADDRESS.fullmatch(name), _IN_REPOSITORY.fullmatch(name)
    if os.path.isfile(name):
        return SingleFile(name)
    if address:
        return SingleFile(unquote(address[3]), address[1], unquote(address[2]))
    if not name.lower().endswith(_SUFFIXES):
        return None
    return SingleFile(inside[2], inside[1]) if inside and ".." not in name else SingleFile(name)


def repo_of(name: str) -> str | None:
    """The repository on the Hub that a model's name means: its own, or that of a single file; `None` if it means none."""
    file = single_file_of(name)
    if file is not None:
        return file.repo_id
    return name if is_repo_id(name) else None


def to_folder(name: str, config: str | None, revision: str | None, cache_dir: str | None) -> Path:
    """A checkpoint as a diffusers folder, made once: it is named by the file's and the config's content.

    Args:
        name (`str`): Of a single file.
        config (`str`, *optional*): The folder or Hub id of a pipeline that says how the model is built; by default
            diffusers knows one on the Hub.
        revision (`str`, *optional*): Of a file on the Hub.
        cache_dir (`str`, *optional*): Where downloads and the folder are kept; by default where the Hub's client does.

    Raises:
        ValueError: If it is no checkpoint of a supported model, is pickled, or does not fit the config in anything.
    """
    file = single_file_of(name).fetch(revision, cache_dir)
    shapes, dtypes = _read_header(file, name)
    kind = _kind(shapes, name)
    configs = _config_folder(config, shapes, cache_dir)
    declared = read_index(configs, f"the config of {name}").get("_class_name")
    if declared != SUPPORTED[kind]:
        raise ValueError(
            f"{name} is a checkpoint of a {SUPPORTED[kind]}, but the config {config!r} is of a {declared}. Pass the folder "
            "or Hub id of a pipeline of its kind with --single_file_config."
        )
    sha256, said = known_sha256(file), _said_otherwise(_said(file, kind, name), configs, name)
    content = f"{sha256} {_digest(configs)}" + (f" {sorted(said.items())}" if said else "")

    def write(draft: Path) -> None:
        plain = draft.with_suffix(".plain.safetensors")
        try:
            pipeline = _convert(_plain(file, plain, name), kind, configs, shapes, dtypes, name)
            pipeline.scheduler = with_said_otherwise(
                pipeline.scheduler, said.get("prediction_type"), said.get("rescale_betas_zero_snr", False)
            )
            save_portable(pipeline, draft)
        finally:
            plain.unlink(missing_ok=True)
        note = {"file": os.path.basename(file), "sha256": sha256, "kind": kind, "said": said}
        write_json(draft / "single_file.json", note)

    return made_once(content, name, write, cache_dir)


def made_once(content: str, name: str, write: Callable[[Path], None], cache_dir: str | None = None) -> Path:
    """A folder that is made of a file once, whole or not at all; one that is there is taken, from a cache that cannot be
    written to, too.

    Args:
        content (`str`): What the folder is made of, as text: it is named by that.
        name (`str`): Of the file, for messages.
        write (`Callable[[Path], None]`): Makes the folder, at the place that it is given, and fills it.
        cache_dir (`str`, *optional*): Where the folder is kept; by default where the Hub's client keeps its own.

    Raises:
        ValueError: If it cannot be written.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import WeakFileLock

    key = hashlib.sha256(content.encode()).hexdigest()[:16]
    folder = Path(cache_dir or constants.HF_HOME, "single_files", key)
    if folder.exists():  # it was put there whole
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(folder.with_suffix(".lock")):  # of several processes, one makes it
            if not folder.exists():
                draft = folder.with_suffix(".draft")
                shutil.rmtree(draft, ignore_errors=True)  # of one that was cut off
                try:
                    write(draft)
                    os.replace(draft, folder)
                finally:
                    shutil.rmtree(draft, ignore_errors=True)
    except OSError as error:
        raise ValueError(
            f"{name} is made into a folder once, and that cannot be written to {folder.parent} "
            f"({error.strerror or error}). Pass a folder on a disk with room that can be written to with --cache_dir."
        ) from error
    return folder


def save_portable(pipeline: "DiffusionPipeline", folder: Path) -> None:
    """Writes a pipeline's folder, in safetensors, in the form that older transformers read too.

    transformers 5 writes CLIP's text encoder without its `text_model.` prefix and its tokenizer as one file; older ones
    take the first for random weights, without an error, and cannot read the second.

    Args:
        pipeline (`DiffusionPipeline`): In any precision.
        folder (`Path`): New.
    """
    pipeline.save_pretrained(folder)
    for name, component in pipeline.components.items():
        if name.startswith("tokenizer") and component is not None and not (folder / name / "vocab.json").exists():
            component.backend_tokenizer.model.save(str(folder / name))
        if not name.startswith("text_encoder") or component is None:
            continue
        if type(component).__name__ == "CLIPTextModel":
            weights = {
                key if key.startswith("text_model.") else f"text_model.{key}": value.contiguous()
                for key, value in component.state_dict().items()
            }
            save_weights(weights, folder / name / "model.safetensors", {"format": "pt"})
        # By default transformers 5 loads what the config declares, and diffusers float32: the two have to agree.
        file = folder / name / "config.json"
        config = read_json(file)
        write_json(file, {**config, "dtype" if "dtype" in config else "torch_dtype": "float32"})


def _read_header(file: Path, name: str) -> tuple[dict[str, torch.Size], dict[str, str]]:
    """The shape and the type of every tensor in a file; nothing else of it is read."""
    if file.suffix.lower() != ".safetensors":
        raise ValueError(
            f"{name} is no .safetensors file. Pickled checkpoints (.ckpt, .bin, .pt) can run code when they are read, and "
            "are not; find or make a safetensors version of it."
        )
    shapes, dtypes = ({_plain_name(key): one for key, one in part.items()} for part in layout_of(file))
    quantised = [key for key in shapes if key.endswith(_QUANTISED) or key == "scaled_fp8"]
    known = ("F64", "F32", *HALVES, *_EIGHTHS)
    foreign = [k for k, dtype in dtypes.items() if dtype not in known and _part_of(k) and not _BUFFER.search(k)]
    if quantised or foreign:
        what = (
            f"the scales of quantised weights ({quantised[0]})"
            if quantised
            else f"{foreign[0]} as {dtypes[foreign[0]]}"
        )
        raise ValueError(
            f"{name} holds {what}, which is not supported. Pass the checkpoint in float32, float16, bfloat16 or plain float8."
        )
    return shapes, {key: "F16" if dtype in _EIGHTHS else dtype for key, dtype in dtypes.items()}


def _plain_name(key: str) -> str:
    """A tensor's name in the layout that diffusers reads."""
    return _SHORT.sub(r"\1.transformer.text_model.", key)


def _part_of(key: str) -> str | None:
    """The part of a checkpoint that a tensor is of; `None` for what stands beside: averages, schedules, losses."""
    return next((part for part in _PARTS if _belongs(key, part)), None)


def _plain(file: Path, target: Path, name: str) -> Path:
    """The file, or, where its names or types are not those that diffusers reads, one written anew, of the same values.

    Args:
        file (`Path`): A checkpoint.
        target (`Path`): Where to write another, if need be.
        name (`str`): Of the checkpoint, for messages.

    Raises:
        ValueError: If a value is lost in float32.
    """
    weights, changed = {}, file.suffix != ".safetensors"  # in capitals, diffusers would take it for a pickled file
    with open_weights(file) as stream:
        for key in stream.keys():  # noqa: SIM118, it is no dictionary
            dtype = stream.get_slice(key).get_dtype()
            changed = changed or _plain_name(key) != key or dtype in ("F64", *_EIGHTHS)
        if not changed:
            return file
        for key in stream.keys():  # noqa: SIM118, it is no dictionary
            if _part_of(_plain_name(key)) is None:
                continue
            tensor = stream.get_tensor(key)
            if stream.get_slice(key).get_dtype() in _EIGHTHS:
                tensor = tensor.half()
            elif tensor.dtype == torch.float64:
                rounded = tensor.float()
                if not torch.equal(rounded.double(), tensor):
                    raise ValueError(
                        f"{key} of {name} has values in float64 that float32 has not; save it in float32."
                    )
                tensor = rounded
            weights[_plain_name(key)] = tensor
    save_weights(weights, target)
    return target


def _kind(shapes: dict[str, torch.Size], name: str) -> str:
    """What diffusers takes a checkpoint for, if that is supported.

    Raises:
        ValueError: With what was found and what is supported.
    """
    supported = (
        "Supported are whole checkpoints of Stable Diffusion 1.x, 2.x and SDXL base for text-to-image: a UNet, an "
        "autoencoder and the text encoders in the original layout, as from_single_file of "
        f"{' and '.join(dict.fromkeys(SUPPORTED.values()))} reads them."
    )
    if any(".lora_" in key or ".lora." in key or key.startswith("lora_") for key in shapes):
        raise ValueError(f"{name} is a LoRA; pass it with --teacher_lora, beside its teacher. {supported}")
    if any(word in key for key in shapes for word in ("time_stack", "temopral_conv", "motion_modules")):
        raise ValueError(f"{name} is a model for video. {supported}")
    kind = _inferred(shapes)
    if kind not in SUPPORTED:
        raise ValueError(f"{name} is a checkpoint of the kind that diffusers calls {kind!r}. {supported}")
    found = {part: any(key.startswith(prefixes) for key in shapes) for part, prefixes in _PARTS.items()}
    if not all(found.values()):
        parts = " and ".join(part for part, there in found.items() if there)
        what = f"only {parts}" if parts else "none of a checkpoint's parts"
        alone = [advice for prefixes, advice in _ALONE.items() if any(key.startswith(prefixes) for key in shapes)]
        missing = _MISSING.get(frozenset(part for part, there in found.items() if not there), "")
        raise ValueError(
            f"{name} holds {what} (its first tensor is {min(shapes, default='missing')}). "
            f"{alone[0] if alone else missing}{' ' if alone or missing else ''}{supported}"
        )
    for number in ("0", "1"):  # without one, diffusers takes it for another kind
        theirs = kind == "xl_base" or any(key.startswith("conditioner.embedders.") for key in shapes)
        if theirs and not any(key.startswith(f"conditioner.embedders.{number}.") for key in shapes):
            which = ("first", "second")[int(number)]
            raise ValueError(
                f"{name} is a checkpoint of SDXL without its {which} text encoder: put it into the file under the prefix "
                f"conditioner.embedders.{number}. {supported}"
            )
    return kind


def _said(file: Path, kind: str, name: str) -> dict[str, Any]:
    """What a checkpoint says itself of its schedule, as other programs read it; its config is overruled by that.

    Empty tensors named `v_pred` and `ztsnr` mark v-prediction and zero terminal SNR (A1111, Forge, ComfyUI); the header may
    have the fields of the ModelSpec standard (Stability AI). Markers overrule the header, which merges often carry along.

    Raises:
        ValueError: If it says that its times are no steps of betas.
    """
    with open_weights(file) as stream:
        keys, header = set(stream.keys()), stream.metadata() or {}
    edm = sorted(key for key in keys if key.startswith("edm_"))
    if edm:
        raise ValueError(
            f"{name} says by its tensor {edm[0]} that it is of EDM's noise levels. Supported are teachers with a "
            "variance-preserving schedule."
        )
    said: dict[str, Any] = {}
    for field in ("modelspec.prediction_type", "modelspec.predict_key"):
        value = header.get(field, "").strip().lower()
        if value and value not in _PREDICTIONS:
            logger.warning(f"The header of {name} says {field}={value!r}, which is not known; see --prediction_type.")
        elif value:
            said.setdefault("prediction_type", _PREDICTIONS[value])
    architecture = header.get("modelspec.architecture", "").strip().lower()
    if architecture and not architecture.startswith(_ARCHITECTURES[kind]):
        logger.warning(
            f"The header of {name} says modelspec.architecture={architecture!r}, but it is built as a {SUPPORTED[kind]} of "
            f"kind {kind}, and is read as one."
        )
    if architecture == "stable-diffusion-v2-768-v" and kind == "v2":
        said.setdefault("prediction_type", "v_prediction")
    if architecture == "stable-diffusion-v2-512" and kind == "v2":
        said.setdefault("prediction_type", "epsilon")
    if "v_pred" in keys:
        if said.get("prediction_type", "v_prediction") != "v_prediction":
            logger.warning(
                f"{name} has the marker v_pred, but its header says {said['prediction_type']}: v_pred counts."
            )
        said["prediction_type"] = "v_prediction"
    if "ztsnr" in keys:
        said["rescale_betas_zero_snr"] = True
    return said


def _said_otherwise(said: dict[str, Any], configs: Path, name: str) -> dict[str, Any]:
    """What of it the scheduler's config does not say, with a word on it."""
    file = configs / "scheduler" / "scheduler_config.json"
    was = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False} | (read_json(file) if file.is_file() else {})
    changed = {key: value for key, value in said.items() if was[key] != value}
    if changed:
        words = " and ".join(f"{key} {value}" for key, value in changed.items())
        logger.warning(
            f"{name} says itself {words} (by v_pred, ztsnr or its header), and is taken at its word, not at its config's. "
            "--prediction_type overrules it."
        )
    return changed


def _inferred(shapes: dict[str, torch.Size]) -> str:
    """diffusers' own word for a checkpoint; `v1` is also what it calls all that it does not know."""
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    return infer_diffusers_model_type(_hollow(shapes))


def _hollow(shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Tensors of these shapes that take no memory."""
    return {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}


def _config_folder(config: str | None, shapes: dict[str, torch.Size], cache_dir: str | None) -> Path:
    """The folder with the configs of a pipeline that is built as the checkpoint is."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    if config is not None and os.path.isdir(config):
        folder = Path(config)
    else:
        wanted = config or fetch_diffusers_config(_hollow(shapes))["pretrained_model_name_or_path"]
        patterns = [f"*{suffix}" for suffix in _CONFIGS]
        try:
            folder = Repository(wanted).download(patterns, None, cache_dir)
        except HubError as error:
            raise ValueError(
                f"The config of the single file cannot be had from {wanted}. Pass the folder or Hub id of a diffusers "
                f"pipeline of its kind (its configs and tokenizers, no weights) with --single_file_config. {error}"
            ) from error
    what = f"--single_file_config {config or folder}"
    index = read_index(folder, what)
    check_classes(index, what)
    for name in components_of(index):
        if inside(folder, name, what).is_dir():
            files_of(folder / name, what, folder)
    return folder


def _digest(configs: Path) -> str:
    """A SHA-256 of the configs in a folder."""
    content = hashlib.sha256()
    for file in [configs / INDEX, *sorted(configs.glob("*/*"))]:
        if file.suffix in _CONFIGS and not file.name.endswith(".index.json"):
            content.update(f"{file.relative_to(configs)} {sha256_of(file)}\n".encode())
    return content.hexdigest()


def _convert(
    file: Path, kind: str, configs: Path, shapes: dict[str, torch.Size], dtypes: dict[str, str], name: str
) -> "DiffusionPipeline":
    """The pipeline of a checkpoint, each part in the file's own precision.

    Raises:
        ValueError: If a tensor is missing or left over, or of another shape than the config says.
    """
    import diffusers
    from diffusers.loaders.single_file_utils import SingleFileComponentError

    what = f"{name} does not fit the config in {configs}"
    advice = "Pass that of a pipeline of its kind with --single_file_config."
    for component, part, model in (("unet", "UNet", "UNet2DConditionModel"), ("vae", "autoencoder", "AutoencoderKL")):
        model_class = getattr(diffusers, model)
        try:
            with torch.device("meta"):
                expected = model_class.from_config(model_class.load_config(configs, subfolder=component)).state_dict()
        except UNREADABLE as error:
            raise ValueError(
                f"The config of the {part} in {configs} cannot be read ({type(error).__name__}: {error}). {advice}"
            ) from error
        wanted = sum(tensor.numel() for tensor in expected.values())
        stored = sum(shape.numel() for key, shape in shapes.items() if _belongs(key, part))
        if stored != wanted:  # diffusers would pass over what is left over
            raise ValueError(f"{what}: its {part} has {stored:,} numbers, by the config it has {wanted:,}. {advice}")
    without = {}
    if SUPPORTED[kind] == "StableDiffusionPipeline":  # a file has no safety checker
        without = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    try:
        pipeline = getattr(diffusers, SUPPORTED[kind]).from_single_file(
            str(file), config=str(configs), local_files_only=True, **without
        )
    except (SingleFileComponentError, *UNREADABLE) as error:
        raise ValueError(f"{what}. {advice} ({type(error).__name__}: {error})") from error
    for component, module in pipeline.components.items():
        if not isinstance(module, nn.Module):
            continue
        missing = [key for key, tensor in module.state_dict().items() if tensor.is_meta]
        if missing:
            raise ValueError(f"{what}: {len(missing)} tensors of its {component} are missing ({missing[0]}). {advice}")
        part = {"unet": "UNet", "vae": "autoencoder"}.get(component, "text encoder")
        prefixes = _ENCODERS[kind].get(component)
        if prefixes is not None:
            _check_encoder(
                module, {k: s for k, s in shapes.items() if k.startswith(prefixes)}, component, what, advice
            )
        kinds = {dtype for key, dtype in dtypes.items() if _belongs(key, part) and not _BUFFER.search(key)}
        if len(kinds) == 1 and kinds <= HALVES.keys():  # then the folder is no larger than the file
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.is_floating_point():
                    tensor.data = tensor.data.to(HALVES[next(iter(kinds))])
    return pipeline


def _check_encoder(module: nn.Module, shapes: dict[str, torch.Size], component: str, what: str, advice: str) -> None:
    """Whether nothing of a text encoder was passed over; what SD 2.x leaves unused on purpose, its last layer, may be.

    Raises:
        ValueError: With the numbers of both.
    """
    layers, own = module.config.num_hidden_layers, {key.removeprefix("text_model.") for key in module.state_dict()}
    idle = re.compile(rf"\.resblocks\.{layers}\.")
    stored = sum(
        shape.numel()
        for key, shape in shapes.items()
        if not _BUFFER.search(key)
        and not idle.search(key)
        and not ("text_projection" in key and "text_projection.weight" not in own)
    )
    wanted = sum(tensor.numel() for key, tensor in module.state_dict().items() if not _BUFFER.search(key))
    if stored != wanted:
        raise ValueError(f"{what}: its {component} has {stored:,} numbers, by the config it has {wanted:,}. {advice}")


def _belongs(key: str, part: str) -> bool:
    """Whether a tensor is one of a part's own weights; beside an autoencoder's may stand those of its training."""
    prefix = next((prefix for prefix in _PARTS[part] if key.startswith(prefix)), None)
    own = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    return prefix is not None and (part != "autoencoder" or key.removeprefix(prefix).startswith(own))
