"""Flags that several commands have, and what is made of them."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from ..families import ModelFamily
    from ..models.reference import ModelReference

TEACHER = "--pretrained_model_name_or_path"
"""The flag by which every command, and the training script, names a teacher."""


def add_command(group: Any, name: str, function: Callable[[argparse.Namespace], int | None], **how: Any) -> Any:
    """Adds a command to a group of them. Its help is the function's docstring, of which the overview has the first sentence.

    Args:
        group (`Any`): What `add_subparsers` returns.
        name (`str`): Of the command.
        function (`Callable`): Does what the parsed flags say; may return an exit code.
        **how: Of the `ArgumentParser`.

    Returns:
        `ArgumentParser`: To add flags to.
    """
    text = " ".join((function.__doc__ or "").split())
    parser = group.add_parser(name, help=text.split(". ")[0].rstrip("."), description=text, **how)
    parser.set_defaults(function=function)
    return parser


def add_cache_dir(parser: Any) -> None:
    """Adds `--cache_dir`."""
    parser.add_argument(
        "--cache_dir", metavar="FOLDER", help="where downloads are kept (default: the Hub's cache, see HF_HOME)"
    )


def add_token(parser: Any) -> None:
    """Adds `--token`."""
    parser.add_argument("--token", help="access token of the Hub (default: that of `hf auth login`, which is safer)")


def add_teacher(parser: Any) -> None:
    """Adds the flags that name a teacher, and what is to be taken otherwise than its files say."""
    group = parser.add_argument_group("the teacher")
    _add_name(group)
    group.add_argument("--revision", help="branch, tag or commit of the teacher on the Hub (default: main)")
    group.add_argument(
        "--teacher_lora", metavar="LORA", help="a LoRA to fuse into the teacher: file, folder or Hub id"
    )
    _add_form(group)


def add_teacher_place(parser: Any) -> None:
    """Adds the flags of a path's teacher that has moved."""
    group = parser.add_argument_group("the teacher, if it is not where the path says")
    _add_name(group)
    _add_form(group)


def _add_name(group: Any) -> None:
    group.add_argument(
        TEACHER, metavar="TEACHER", help="a folder, a model on the Hub (user/name), or a checkpoint file"
    )


def _add_form(group: Any) -> None:
    group.add_argument("--variant", help="variant of the teacher's weight files, such as fp16")
    group.add_argument(
        "--single_file_config",
        metavar="MODEL",
        help="for a teacher in one file: the folder or Hub id of a pipeline of the same kind, whose configs are read",
    )


def teacher_of(parsed: argparse.Namespace, **otherwise: Any) -> "ModelReference":
    """The teacher of a command line, and what is to be taken otherwise than its files say.

    Raises:
        ValueError: If none is named.
    """
    from ..models.reference import ModelReference

    if parsed.pretrained_model_name_or_path is None:
        raise ValueError(f"Name the teacher: {TEACHER} TEACHER.")
    return ModelReference(
        parsed.pretrained_model_name_or_path,
        parsed.revision,
        parsed.variant,
        lora=parsed.teacher_lora,
        single_file_config=parsed.single_file_config,
        **otherwise,
    )


def moved(teacher: "ModelReference", parsed: argparse.Namespace) -> "ModelReference":
    """A path's teacher where it is now: what was taken otherwise than its files say stays so."""
    place = {
        "name_or_path": parsed.pretrained_model_name_or_path,
        "revision": None,
        "variant": parsed.variant,
        "single_file_config": parsed.single_file_config,
    }
    return teacher if place["name_or_path"] is None else replace(teacher, **place)


def device() -> str:
    """The GPU, if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def prompts_for(family: "ModelFamily", prompts: list[str] | None) -> list[str]:
    """The prompts or labels that images are drawn of, by default two. Says if prompts are longer than the text encoders read."""
    from ..data.truncation import truncation

    if not family.takes_prompts:
        return prompts or list(family.conditions().captions[:2])
    prompts = prompts or ["a photograph of a cat", "a red house by the sea"]
    if message := truncation(family.tokenizers, prompts):
        print(message, file=sys.stderr)
    return prompts
