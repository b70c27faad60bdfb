"""A checkpoint in the layout of the original programs (CompVis, Stability), which diffusers reads: what kind it is of, what it
says of itself, and its parts, of which no number may be left over."""

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..hub.files import read_json
from .components import meta_model
from .pipeline_folder import UNREADABLE
from .weights import HALVES, layout_of, open_weights, save_weights


if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)
SUPPORTED = {
    "v1": "StableDiffusionPipeline",
    "v2": "StableDiffusionPipeline",
    "xl_base": "StableDiffusionXLPipeline",
}
"""What diffusers takes a checkpoint for -> the pipeline that it becomes."""

OF_VAE = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
"""How an autoencoder's own tensors begin; beside them may stand those of its training."""

_PARTS = {
    "UNet": ("model.diffusion_model.",),
    "autoencoder": ("first_stage_model.", "vae."),
    "text encoder": ("cond_stage_model.", "conditioner.embedders."),
}
_COMPONENTS = {
    "unet": _PARTS["UNet"],
    "vae": _PARTS["autoencoder"],
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0."),
    "text_encoder_2": ("conditioner.embedders.1.",),
}
# What a header says of a prediction -> diffusers' word; and how it begins to name the kinds.
_PREDICTIONS = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
_PREDICTIONS["sample"] = "sample"
_ARCHITECTURES = {"v1": "stable-diffusion-v1", "v2": "stable-diffusion-v2", "xl_base": "stable-diffusion-xl-v1"}
_OF_ARCHITECTURE = {"stable-diffusion-v2-768-v": "v_prediction", "stable-diffusion-v2-512": "epsilon"}
_EIGHTHS = ("F8_E4M3", "F8_E5M2")  # float16 has every one of their values
_QUANTISED = re.compile(
    r".*\.(scale_weight|scale_input|weight_scale|input_scale|comfy_quant|absmax|quant_map)|scaled_fp8", re.DOTALL
)
# Some programs leave out what CLIP's own class puts before its parts.
_SHORT = re.compile(
    r"(cond_stage_model|conditioner\.embedders\.0)\.transformer\.(?=embeddings|encoder|final_layer_norm)"
)
# Beside an encoder's weights: buffers of the text model, and of the image's model that it was trained with.
_BUFFER = re.compile(r"(^|\.)(position_ids|attn_mask|logit_scale|logit_bias)$")
# How tensors begin in a file of one part, or in another layout, and what to do with it.
_ALONE = [
    (r"(down|up)_blocks\.|mid_block\.", "It is a UNet alone, in the layout of diffusers: put it into a copy of its pipeline's "
        "folder as unet/diffusion_pytorch_model.safetensors, and pass the folder."),
    (r"(input|output)_blocks\.|middle_block\.", "It is a UNet alone, without the prefix model.diffusion_model.: put it into a "
        "whole checkpoint of its kind in place of the tensors with that prefix, and pass that."),
    (r"diffusion_model\.|model\.model\.diffusion_model\.", "Its UNet's tensors have another prefix: rename it to "
        "model.diffusion_model., and see that text encoders and autoencoder are in the file."),
    (r"unet\.", "It is in no layout that other programs read: rename unet. to model.diffusion_model. if the names behind it are "
        "the original ones, or save the pipeline as a diffusers folder."),
    (r"(encoder|decoder|quant_conv)\.", "It is an autoencoder alone: pass it with --pretrained_vae_model_name_or_path, beside its "
        "teacher."),
    (r"(transformer\.)?text_model\.|transformer\.resblocks\.", "It is a text encoder alone: put it into a copy of its pipeline's "
        "folder, and pass the folder."),
]  # fmt: skip
_MISSING = {
    ("autoencoder",): "Its autoencoder is missing, as of a file that is used with a separate one: bake that into the file under "
        "the prefix first_stage_model., as checkpoint mergers do, or pass a diffusers folder of the model.",
    ("autoencoder", "text encoder"): "Text encoder and autoencoder are missing: pass the whole checkpoint that its UNet (the "
        "tensors with the prefix model.diffusion_model.) belongs into.",
    ("text encoder",): "Its text encoder is missing: put it into the file under the prefix cond_stage_model.transformer. (of SDXL "
        "conditioner.embedders.0.transformer. and conditioner.embedders.1.model.).",
    ("UNet",): "Its UNet is missing, whose tensors have the prefix model.diffusion_model.",
}  # fmt: skip


def read_header(file: Path, name: str) -> tuple[dict[str, torch.Size], dict[str, str]]:
    """The shape and the type of every tensor in a file; nothing else of it is read."""
    if file.suffix.lower() != ".safetensors":
        raise ValueError(
            f"{name} is no .safetensors file. Pickled checkpoints (.ckpt, .bin, .pt) can run code when they are read, and "
            "are not; find or make a safetensors version of it."
        )
    shapes, dtypes = layout_of(file)
    shapes = {_plain_name(key): shape for key, shape in shapes.items()}
    dtypes = {_plain_name(key): dtype for key, dtype in dtypes.items()}
    quantised = [key for key in shapes if _QUANTISED.fullmatch(key)]
    known = ("F64", "F32", *HALVES, *_EIGHTHS)
    foreign = [k for k, dtype in dtypes.items() if dtype not in known and _part_of(k) and not _BUFFER.search(k)]
    if quantised or foreign:
        scales = quantised and f"the scales of quantised weights ({quantised[0]})"
        what = scales or f"{foreign[0]} as {dtypes[foreign[0]]}"
        raise ValueError(
            f"{name} holds {what}, which is not supported. Pass the checkpoint in float32, float16, bfloat16 or plain float8."
        )
    return shapes, {key: "F16" if dtype in _EIGHTHS else dtype for key, dtype in dtypes.items()}


def _plain_name(key: str) -> str:
    """A tensor's name in the layout that diffusers reads."""
    return _SHORT.sub(r"\1.transformer.text_model.", key)


def _part_of(key: str) -> str | None:
    """The part of a checkpoint that a tensor is of; `None` for what stands beside: averages, schedules, losses."""
    return next((part for part, prefixes in _PARTS.items() if _is_of(key, prefixes)), None)


def _is_of(key: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a tensor is one of the own weights of the part that has these prefixes."""
    prefix = next((prefix for prefix in prefixes if key.startswith(prefix)), None)
    is_vae = prefixes == _PARTS["autoencoder"]
    return prefix is not None and (not is_vae or key.removeprefix(prefix).startswith(OF_VAE))


def readable_copy(file: Path, target: Path, name: str) -> Path:
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


def kind_of(shapes: dict[str, torch.Size], name: str) -> str:
    """What diffusers takes a checkpoint for, if that is supported.

    Raises:
        ValueError: With what was found and what is supported.
    """
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    supported = (
        "Supported are whole checkpoints of Stable Diffusion 1.x, 2.x and SDXL base for text-to-image: a UNet, an "
        "autoencoder and the text encoders in the original layout, as from_single_file of "
        f"{' and '.join(dict.fromkeys(SUPPORTED.values()))} reads them."
    )
    if any(".lora_" in key or ".lora." in key or key.startswith("lora_") for key in shapes):
        raise ValueError(f"{name} is a LoRA; pass it with --teacher_lora, beside its teacher. {supported}")
    if any(word in key for key in shapes for word in ("time_stack", "temopral_conv", "motion_modules")):
        raise ValueError(f"{name} is a model for video. {supported}")
    kind = infer_diffusers_model_type(empty_tensors(shapes))  # `v1` is also what it calls all that it does not know
    if kind not in SUPPORTED:
        raise ValueError(f"{name} is a checkpoint of the kind that diffusers calls {kind!r}. {supported}")
    missing = sorted(part for part, prefixes in _PARTS.items() if not any(key.startswith(prefixes) for key in shapes))
    if missing:
        parts = " and ".join(part for part in _PARTS if part not in missing)
        alone = [advice for pattern, advice in _ALONE if any(re.match(pattern, key) for key in shapes)]
        held = f"only {parts}" if parts else "none of a checkpoint's parts"
        advice = [*alone, _MISSING.get(tuple(missing), "")][0]
        raise ValueError(
            f"{name} holds {held} (its first tensor is "
            f"{min(shapes, default='missing')}). {advice}{' ' if advice else ''}{supported}"
        )
    embedders = [key.split(".")[2] for key in shapes if key.startswith("conditioner.embedders.")]
    for number, which in (("0", "first"), ("1", "second")):  # without one, diffusers takes it for another kind
        if (kind == "xl_base" or embedders) and number not in embedders:
            raise ValueError(
                f"{name} is a checkpoint of SDXL without its {which} text encoder: put it into the file under the prefix "
                f"conditioner.embedders.{number}. {supported}"
            )
    return kind


def settings_in(file: Path, kind: str, name: str) -> dict[str, Any]:
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
    declared: dict[str, Any] = {}
    for field in ("modelspec.prediction_type", "modelspec.predict_key"):
        value = header.get(field, "").strip().lower()
        if value and value not in _PREDICTIONS:
            logger.warning(f"The header of {name} says {field}={value!r}, which is not known; see --prediction_type.")
        elif value:
            declared.setdefault("prediction_type", _PREDICTIONS[value])
    architecture = header.get("modelspec.architecture", "").strip().lower()
    if architecture and not architecture.startswith(_ARCHITECTURES[kind]):
        logger.warning(
            f"The header of {name} says modelspec.architecture={architecture!r}, but it is built as a {SUPPORTED[kind]} of "
            f"kind {kind}, and is read as one."
        )
    if architecture in _OF_ARCHITECTURE and kind == "v2":
        declared.setdefault("prediction_type", _OF_ARCHITECTURE[architecture])
    if "v_pred" in keys:
        if declared.get("prediction_type", "v_prediction") != "v_prediction":
            logger.warning(
                f"{name} has the marker v_pred, but its header says {declared['prediction_type']}: v_pred counts."
            )
        declared["prediction_type"] = "v_prediction"
    if "ztsnr" in keys:
        declared["rescale_betas_zero_snr"] = True
    return declared


def not_in_config(declared: dict[str, Any], configs: Path, name: str) -> dict[str, Any]:
    """What of it the scheduler's config does not say, with a word on it."""
    file = configs / "scheduler" / "scheduler_config.json"
    was = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False} | (read_json(file) if file.is_file() else {})
    changed = {key: value for key, value in declared.items() if was[key] != value}
    if changed:
        words = " and ".join(f"{key} {value}" for key, value in changed.items())
        logger.warning(
            f"{name} says itself {words} (by v_pred, ztsnr or its header), and is taken at its word, not at its config's. "
            "--prediction_type overrules it."
        )
    return changed


def empty_tensors(shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Tensors of these shapes that take no memory."""
    return {key: torch.zeros(()).expand(shape) for key, shape in shapes.items()}


def convert(
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
    of = {name: {key: shape for key, shape in shapes.items() if _is_of(key, own)} for name, own in _COMPONENTS.items()}
    for component, model_class in (("unet", diffusers.UNet2DConditionModel), ("vae", diffusers.AutoencoderKL)):
        try:
            expected = meta_model(model_class, configs, subfolder=component)
        except UNREADABLE as error:
            raise ValueError(
                f"The config of the {component} in {configs} cannot be read ({type(error).__name__}: {error}). {advice}"
            ) from error
        check_numbers(expected, of[component], f"{what}: its {component}", advice)
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
        if isinstance(module, nn.Module):
            check_no_tensor_is_missing(module, f"{what}: its {component}", advice)
            check_numbers(module, of[component], f"{what}: its {component}", advice)
            to_precision_of(module, {dtypes[key] for key in of[component] if not _BUFFER.search(key)})
    return pipeline


def check_no_tensor_is_missing(module: nn.Module, what: str, advice: str) -> None:
    """Raises a `ValueError` unless diffusers found all tensors of a part in a file: what is missing is on the meta device."""
    missing = [key for key, tensor in module.state_dict().items() if tensor.is_meta]
    if missing:
        raise ValueError(f"{what} is without {len(missing)} of its tensors ({missing[0]}). {advice}")


def check_numbers(module: nn.Module, shapes: dict[str, torch.Size], what: str, advice: str) -> None:
    """Sees that a file has as many numbers as a part: diffusers passes over what is left over. What SD 2.x leaves unused of its
    text encoder on purpose, its last layer, may be.

    Args:
        module (`nn.Module`): On any device.
        shapes (`dict[str, torch.Size]`): Of the part's tensors in the file.
        what, advice (`str`): How the message begins and ends.

    Raises:
        ValueError: With the numbers of both.
    """
    weights = module.state_dict()
    layers = {int(match[1]) for match in map(re.compile(r".*\.layers\.(\d+)\.").match, weights) if match}
    unused = [_BUFFER.pattern, rf"\.resblocks\.{len(layers)}\."]
    unused += [] if any("text_projection" in key for key in weights) else ["text_projection"]
    left_out = re.compile("|".join(unused))
    stored = sum(shape.numel() for key, shape in shapes.items() if not left_out.search(key))
    wanted = sum(tensor.numel() for key, tensor in weights.items() if not _BUFFER.search(key))
    if stored != wanted:
        raise ValueError(f"{what} has {stored:,} numbers, by the config it has {wanted:,}. {advice}")


def to_precision_of(module: nn.Module, dtypes: set[str]) -> None:
    """Casts a part to the half precision that its file has throughout, so that its folder is no larger than the file."""
    if len(dtypes) == 1 and dtypes <= HALVES.keys():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(HALVES[next(iter(dtypes))])
