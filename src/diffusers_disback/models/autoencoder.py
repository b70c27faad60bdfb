"""An autoencoder from elsewhere: a folder, a repository or one file, held to what a teacher is held to."""

import shutil
from pathlib import Path

from diffusers import AutoencoderKL

from ..hub.files import known_sha256, read_json, sha256_of
from .components import meta_model
from .model_files import locate
from .original_layout import OF_VAE, check_no_tensor_is_missing, check_numbers, to_precision_of
from .pipeline_folder import UNREADABLE, check_shards, files_of, of_variants, variant_taken
from .single_file import made_once, single_file_of
from .weights import NO_PICKLES, PICKLES, layout_of, save_weights


_STEM = "diffusion_pytorch_model"
_PREFIXES = ("first_stage_model.", "vae.", "")  # of its names in one file
# In one file, beside an autoencoder's own weights in the original layout: those of its training.
_OF_TRAINING = ("loss.", "model_ema.")


def autoencoder_folder(name: str, variant: str | None, config: Path, cache_dir: str | None = None) -> Path:
    """Where an autoencoder's `config.json` and weights lie on this machine, after a download or a conversion.

    Args:
        name (`str`): A folder or a repository, in which it is at the root or in `vae/`; or a `.safetensors` file.
        variant (`str`, *optional*): Of the weights' files; those without one are taken where it is not there.
        config (`Path`): The folder of the teacher's own autoencoder, as which one in a single file is built.
        cache_dir (`str`, *optional*): Where downloads and conversions are kept.

    Raises:
        ValueError: If there is none, it is pickled, it has weights of another variant alone, or it is no AutoencoderKL.
    """
    source = single_file_of(name)
    if source is not None:
        return _converted(source.fetch(None, cache_dir), name, config, cache_dir)
    root, chosen = locate(name, None, lambda names: _choose(names, variant, name), cache_dir)
    folder, what = (root / chosen[0]).parent, f"the autoencoder {name!r}"
    files_of(folder, what, root)
    class_name = read_json(folder / "config.json", f"config.json of {what}").get("_class_name")
    if class_name != "AutoencoderKL":
        raise ValueError(f"{name} is a {class_name}; an AutoencoderKL is needed.")
    for index in (one for one in chosen[1:] if one.endswith(".json")):
        shards = set(check_shards(root / index, f"{index} of the autoencoder {name}")["weight_map"].values())
        missing = sorted(shard for shard in shards if not (folder / shard).is_file())
        if missing or not shards:
            raise ValueError(f"The autoencoder {name} is not whole: there is no {(missing or ['shard'])[0]}.")
    return folder


def _choose(names: list[str], variant: str | None, name: str) -> list[str]:
    """The files of an autoencoder among all of a model, its `config.json` first.

    Raises:
        ValueError: If there is none, or there are no weights of the variant, nor without one.
    """
    place = next((place for place in ("", "vae/") if f"{place}config.json" in names), None)
    if place is None:
        raise ValueError(f"{name} holds no autoencoder: it has no config.json, at its root or in vae/.")
    own = [Path(one) for one in names if one.startswith(place) and one.count("/") == place.count("/")]
    variants = of_variants([file for file in own if file.name.startswith(_STEM)])
    taken = variants.get(variant) or variants.get(None)
    if taken:
        return [f"{place}config.json", *(file.as_posix() for file in taken)]
    if variants:
        first = sorted(filter(None, variants))[0]
        raise ValueError(
            f"The autoencoder {name} has weights of the variant {' and '.join(sorted(filter(None, variants)))} alone: pass "
            f"--variant {first}, or the file itself, {variants[first][-1].name}."
        )
    pickled = [file.name for file in own if file.suffix in PICKLES]
    if pickled:
        raise ValueError(f"The autoencoder {name} is there as a pickle alone ({', '.join(pickled[:3])}). {NO_PICKLES}")
    raise ValueError(f"The autoencoder {name} has no weights: there is no {_STEM}.safetensors beside its config.json.")


def variant_of(folder: Path, variant: str | None) -> str | None:
    """The variant that is taken of the weights in a folder: the one that is asked for, if it is there."""
    return variant_taken(folder.glob(f"{_STEM}*"), variant)


def _converted(file: Path, name: str, config: Path, cache_dir: str | None) -> Path:
    """One file as a folder, made once: it is named by the file's and the config's content."""
    if file.suffix.lower() != ".safetensors":
        raise ValueError(f"The autoencoder {name} is no .safetensors file. {NO_PICKLES}")
    shapes, types = layout_of(file)
    prefix = next(prefix for prefix in _PREFIXES if not prefix or any(key.startswith(prefix) for key in shapes))
    own = {key: shape for key, shape in shapes.items() if key.startswith(tuple(prefix + part for part in OF_VAE))}
    foreign = sorted(
        key for key in shapes.keys() - own.keys() if not key.startswith((*_OF_TRAINING, f"{prefix}loss."))
    )
    if not own or foreign:
        raise ValueError(
            f"{name} is no autoencoder ({(foreign or ['it is empty'])[0]}). In one file an autoencoder is its weights alone, in "
            "diffusers' layout or the original one; of a whole pipeline's folder its vae/ is taken."
        )

    def write(draft: Path) -> None:
        what = f"The autoencoder {name} is not built as the teacher's own is, of which a single file has to have the config"
        advice = "Pass it as a folder or a model on the Hub, with its own config.json."
        check_numbers(meta_model(AutoencoderKL, config), own, f"{what}: it", advice)
        try:
            vae = AutoencoderKL.from_single_file(str(file), config=str(config), local_files_only=True)
        except UNREADABLE as error:
            raise ValueError(f"{what} ({type(error).__name__}: {error}). {advice}") from error
        check_no_tensor_is_missing(vae, f"{what}: it", advice)
        to_precision_of(vae, set(types.values()))
        draft.mkdir()
        shutil.copyfile(config / "config.json", draft / "config.json")
        weights = {key: tensor.contiguous() for key, tensor in vae.state_dict().items()}
        save_weights(weights, draft / f"{_STEM}.safetensors", {"format": "pt"})

    content = f"autoencoder {known_sha256(file)} {sha256_of(config / 'config.json')}"
    return made_once(content, name, write, cache_dir)


def check_divides(stride: int, resolution: int | None) -> None:
    """Raises a `ValueError` that names sizes which are possible, unless a stride divides a resolution, both in pixels."""
    if resolution is not None and resolution % stride:
        below = resolution // stride * stride
        near = " or ".join(str(side) for side in (below, below + stride) if side)
        raise ValueError(
            f"resolution={resolution} is not divisible by {stride}, the autoencoder's stride: take {near}."
        )
