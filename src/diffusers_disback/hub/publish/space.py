"""A Space on the Hub that runs the demo of a pushed student: `diffusers-disback demo`, with the same page."""

from typing import TYPE_CHECKING

from ... import __version__
from ..errors import HubError, explain
from ..repository import Files, Repository


if TYPE_CHECKING:
    from huggingface_hub import HfApi

GRADIO = "6.31.0"  # that the demo is tested with
PYTHON = "3.11"  # the oldest of setup.py; the Hub would take an older one
TAG = "disback-demo"  # by which a Space is known as one of these


def space_files(student: str, flags: list[str] = []) -> Files:
    """The files of a student's Space.

    Args:
        student (`str`): On the Hub.
        flags (`list[str]`): Of `diffusers-disback demo`.
    """
    import yaml

    front = {
        "title": student.split("/")[-1],
        "sdk": "gradio",
        "sdk_version": GRADIO,
        "python_version": PYTHON,
        "app_file": "app.py",
        "models": [student],
        "tags": [TAG],
    }
    app = f"import sys\n\nfrom diffusers_disback.commands.cli import main\n\n\nsys.exit(main({['demo', student, *flags]!r}))\n"
    return {
        "README.md": f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n".encode(),
        "app.py": app.encode(),
        "requirements.txt": f"diffusers-disback[demo]=={__version__}\n".encode(),
    }


def push_space(
    student: str, space_id: str, private: bool | None = None, token: str | None = None, flags: list[str] = []
) -> str:
    """Makes a student's Space, or brings it up to date. Returns its address.

    Args:
        student (`str`): On the Hub.
        space_id (`str`): `user/name`. It is made if it is not there.
        private (`bool`, *optional*): Of a new Space; by default as the account has it.
        token (`str`, *optional*): By default that of `hf auth login`. It is never written anywhere.
        flags (`list[str]`): As of `space_files`.

    Raises:
        HubError: If the Space is there and holds another app, or the Hub fails.
    """
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.errors import HTTPError

    api = Repository(space_id, token).api
    operations = [CommitOperationAdd(path, content) for path, content in space_files(student, flags).items()]
    try:
        made = api.create_repo(space_id, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        head = _own_head(api, made.repo_id)
        message = f"Show {student}"
        api.create_commit(made.repo_id, operations, commit_message=message, repo_type="space", parent_commit=head)
    except (HTTPError, OSError, RuntimeError) as error:
        raise explain(error, space_id) from error
    return f"{api.endpoint}/spaces/{made.repo_id}"


def _own_head(api: "HfApi", space_id: str) -> str | None:
    """The head of a Space that is empty, or a demo of this library."""
    info = api.space_info(space_id)
    if "app.py" in [file.rfilename for file in info.siblings or []] and TAG not in (info.tags or []):
        raise HubError(
            f"The Space {space_id} holds another app, which is not overwritten. Choose another name for the demo's."
        )
    return info.sha
