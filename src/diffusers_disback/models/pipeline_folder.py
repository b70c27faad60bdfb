"""A pipeline in somebody else's folder: the names, classes and files of its components, checked before anything reads them."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from ..hub.files import check_no_pointer, inside, read_json
from ..hub.repository import is_licence
from .weights import open_weights


INDEX = "model_index.json"
UNREADABLE = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, ImportError),
    *(RuntimeError, SafetensorError, StrictDataclassError),
)
"""What diffusers and transformers raise on files whose content is wrong; each becomes a `ValueError` where they are called."""

_STEM = "(?:diffusion_pytorch_)?model"
WEIGHTS = re.compile(
    rf"{_STEM}(?:\.([\w-]+?))?(?:-\d+-of-\d+)?\.safetensors|{_STEM}\.safetensors\.index(?:\.([\w-]+))?\.json"
)
"""The names of files of weights; groups 1 and 2 are the variant. What is named otherwise is another program's copy."""

_SHARDS = re.compile(r".+\.safetensors\.index(\.[\w-]+)?\.json")
_COMPONENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
# What diffusers may load as a component: others could be pipelines or programs of their own, with files of their own.
_CLASSES = {
    "unet": ({"diffusers"}, r"UNet\w+"),
    "transformer": ({"diffusers"}, r"\w+Model"),
    "vae": ({"diffusers"}, r"\w*Autoencoder\w+|ConsistencyDecoderVAE"),
    "scheduler": ({"diffusers"}, r"\w+Scheduler"),
    "text_encoder": ({"transformers"}, r"(?!Auto)\w+Model\w*"),
    "tokenizer": ({"transformers"}, r"(?!Auto)\w+Tokenizer\w*"),
    "image_encoder": ({"transformers"}, r"(?!Auto)\w+Model\w*"),
    "feature_extractor": ({"transformers"}, r"(?!Auto)\w+(FeatureExtractor|ImageProcessor)\w*"),
    "safety_checker": ({"stable_diffusion", "diffusers"}, r"StableDiffusionSafetyChecker"),
}
_CLASSES |= {f"{name}_{number}": _CLASSES[name] for name in ("text_encoder", "tokenizer") for number in (2, 3)}
WITHOUT_A_ROLE = ("safety_checker", "feature_extractor", "image_encoder")
"""Components that distillation does not need: one that cannot be read is left out."""

# transformers reads the weights of the model that the one names, and puts the other upon the component's own, without a word.
_ADAPTER = re.compile(r"adapter_config\.json|adapter_model\..+")
_NAMES_A_FILE = re.compile(r"\w*_file|transformers_weights")
_NOT_READ = ("special_tokens_map_file",)  # where its author had it; the one in the folder is read

_READ = {
    *("config.json", "scheduler_config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json"),
    *("vocab.json", "special_tokens_map.json", "added_tokens.json"),
}


def read_index(folder: Path, source: str) -> dict[str, Any]:
    """`model_index.json` of a folder, each component of which has a plain name.

    Args:
        folder (`Path`): Of a pipeline.
        source (`str`): Whose it is, for messages.

    Raises:
        ValueError: If there is none, or it is not as diffusers writes it, or names what is no component.
    """
    what, file = f"{INDEX} of {source}", inside(folder, INDEX, source)
    if not file.is_file():
        raise ValueError(f"{source} has no {INDEX}: it is no diffusers pipeline's folder.")
    index = read_json(file, what)
    for name, kind in index.items():
        if name.startswith("_") or (not isinstance(kind, list) and name not in _CLASSES):
            continue
        if not _COMPONENT.fullmatch(name):
            raise ValueError(
                f"{what} names the component {name!r}, which is no plain name. Nothing of it was read or written; do not use "
                "this model unless you know who made it."
            )
        if name in _CLASSES and not _is_pair(kind):
            raise ValueError(f"{what} says {kind!r} of the component {name}, in place of a library and a class.")
    return index


def components_of(index: dict[str, Any]) -> dict[str, list[str]]:
    """The components that a pipeline has, by name: the library and the class of each."""
    return {
        name: kind
        for name, kind in index.items()
        if not name.startswith("_") and _is_pair(kind) and kind[0] is not None
    }


def _is_pair(kind: Any) -> bool:
    """Whether a value of `model_index.json` says a component's library and class, or that there is none."""
    return isinstance(kind, list) and len(kind) == 2 and all(isinstance(part, str | None) for part in kind)


def check_classes(index: dict[str, Any], source: str) -> None:
    """Sees that a pipeline asks for nothing but diffusers' and transformers' own classes, each in its place.

    Raises:
        ValueError: With what else it asks for.
    """
    if not isinstance(index.get("_class_name"), str):
        raise ValueError(
            f"{INDEX} of {source} asks for the pipeline {index.get('_class_name')!r}, which is code of its own. It is not run; "
            "use the model's stock pipeline."
        )
    for name, (library, kind) in components_of(index).items():
        libraries, classes = _CLASSES.get(name, ({"diffusers", "transformers", "stable_diffusion"}, r"[A-Za-z]\w*"))
        if library not in libraries or not re.fullmatch(classes, kind or "", re.ASCII):
            raise ValueError(
                f"{INDEX} of {source} asks for {library}.{kind} as its {name}, which is no class that diffusers "
                "has for it. Nothing of it was loaded or run; do not use this model unless you know who made it."
            )


def files_of(folder: Path, source: str, root: Path | None = None) -> list[Path]:
    """The files of a component's folder, sorted. None of them, and no shard that an index among them names, lies elsewhere.

    Args:
        folder (`Path`): Of the component; checked itself, if it has a root.
        source (`str`): Whose it is, for messages.
        root (`Path`, *optional*): The pipeline's folder, in which links may lead to one another; by default the component's.

    Raises:
        ValueError: If there is no such folder, or it holds a link that leads out, or none of a regular file.
    """
    root = folder if root is None else root
    if folder != root:
        inside(root, folder.relative_to(root).as_posix(), source)
    if not folder.is_dir():
        raise ValueError(f"{source} has no folder {folder.name}, which belongs to it: it is not whole.")
    files = []
    for entry in sorted(folder.iterdir()):
        file = inside(root, entry.relative_to(root).as_posix(), source)
        if file.is_dir():
            continue
        if not file.is_file():
            raise ValueError(f"{source} holds {entry.relative_to(root)}, which is no file, or a link to none.")
        if _ADAPTER.fullmatch(file.name):
            raise ValueError(
                f"{source} holds {entry.relative_to(root)}, an adapter, for which other weights would be loaded than the "
                "component's own. Nothing of it was read; take it away, or merge the adapter into the weights."
            )
        if _SHARDS.fullmatch(file.name):
            check_shards(file, f"{file.relative_to(root)} of {source}")
        files.append(file)
    return files


def check_shards(file: Path, what: str) -> dict[str, Any]:
    """Sees that an index of weights names files beside it, in safetensors. Returns its content.

    Raises:
        ValueError: If it names others, or is not as an index is.
    """
    index = read_json(file, what)
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{what} is no index of weights: it has no weight_map of names.")
    for name in sorted(set(shards.values())):
        inside(file.parent, name, what)
        if "/" in name or not name.endswith(".safetensors"):
            raise ValueError(f"{what} names {name!r}, which is no safetensors file beside it. Nothing of it was read.")
    return index


def licences_of(folder: Path, source: str) -> dict[str, Path]:
    """The files at the root of a model that hold the text of its licence.

    Raises:
        ValueError: If one is a link that leads out.
    """
    names = sorted(entry.name for entry in folder.iterdir() if is_licence(entry.name))
    files = {name: inside(folder, name, source) for name in names}
    return {name: file for name, file in files.items() if file.is_file()}


def check_pipeline(folder: Path, index: dict[str, Any], variant: str | None, source: str) -> None:
    """Sees that all that diffusers will read of a pipeline lies in its folder and can be read; see `check_component`.

    Raises:
        ValueError: With the file, and what to do.
    """
    check_classes(index, source)
    if (
        folder / "None.py"
    ).exists():  # which is the name that diffusers looks for when no custom pipeline is asked for
        raise ValueError(f"{source} holds None.py, which diffusers could take for a pipeline's code. Take it away.")
    for name, (library, _) in components_of(index).items():
        if name in _CLASSES and name not in WITHOUT_A_ROLE:
            check_component(folder, name, variant, source, library)
        elif inside(folder, name, source).is_dir():
            check_own(folder, name, source, library)


def check_component(root: Path, name: str, variant: str | None, source: str, library: str | None = None) -> None:
    """Sees that a component's files are its own and can be read: its configs, and the headers of the weights of a variant.

    Args:
        root (`Path`): The pipeline's folder.
        name (`str`): The component.
        variant (`str`, *optional*): That is taken if there are weights of it.
        source (`str`): Whose it is, for messages.
        library (`str`, *optional*): From which its class is.

    Raises:
        ValueError: With the file, and what to do.
    """
    for file in of_variant(check_own(root, name, source, library), variant):
        what = f"{name}/{file.name} of {source}"
        if file.name in _READ:
            read_json(file, what)
        elif file.suffix == ".safetensors":
            with open_weights(file):
                pass
        elif file.suffix in (".json", ".txt"):
            check_no_pointer(file, what)


def check_own(root: Path, name: str, source: str, library: str | None = None) -> list[Path]:
    """Sees that nothing but a component's own files is read or run when it is loaded: no code, no adapter, and no file that
    its configs name elsewhere. Whether it can be read is not looked at.

    Args:
        root, name, source, library: As of `check_component`.

    Returns:
        `list[Path]`: `files_of` the component.

    Raises:
        ValueError: With the file, and what to do.
    """
    files = files_of(root / name, source, root)
    if any(file.name == f"{library}.py" for file in files):
        raise ValueError(f"{source} holds {name}/{library}.py, code of its own in place of {library}. It is not run.")
    for file in files:
        if file.name.endswith("config.json"):
            for value in _named_files(_content(file)):
                inside(root / name, value, f"{name}/{file.name} of {source}")
    return files


def _content(file: Path) -> dict[str, Any]:
    """Of a config; empty if nobody can read it, which is told when it is loaded."""
    try:
        return read_json(file)
    except ValueError:
        return {}


def _named_files(content: dict[str, Any]) -> list[str]:
    """What a config says in places where file names stand, at any depth."""
    named: list[str] = []
    left: list[dict | list] = [content]
    while left:
        inner = left.pop()
        for key, value in inner.items() if isinstance(inner, dict) else enumerate(inner):
            if isinstance(value, dict | list):
                left.append(value)
            elif value and isinstance(value, str) and _NAMES_A_FILE.fullmatch(str(key)) and key not in _NOT_READ:
                named.append(value)
    return named


def of_variant(files: list[Path], variant: str | None) -> list[Path]:
    """A component's files without the weights of other variants than the one that is loaded: the wanted one if it is there."""
    wanted, kinds = variant_taken(files, variant), of_variants(files)
    others = {file for kind, own in kinds.items() if kind != wanted for file in own}
    return [file for file in files if file not in others]


def variant_taken(files: Iterable[Path], variant: str | None) -> str | None:
    """The variant that is taken of a component's weights: the one that is asked for, if it is there."""
    return variant if variant in of_variants(files) else None


def of_variants(files: Iterable[Path]) -> dict[str | None, list[Path]]:
    """The files of weights among a component's by their variant, in their order; `None` stands for those without one."""
    found: dict[str | None, list[Path]] = {}
    for file in files:
        match = WEIGHTS.fullmatch(file.name)
        if match:
            found.setdefault(match.group(1) or match.group(2), []).append(file)
    return found
