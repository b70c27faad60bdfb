"""`diffusers-disback push` and `pull`: a run or a path, to the Hub and back."""

import argparse
from pathlib import Path
from typing import Any

from .options import add_cache_dir, add_command, add_teacher_place, add_token, moved


def add_commands(group: Any) -> None:
    """Adds `push` and `pull` to the commands."""
    pushing, pulling = add_command(group, "push", push), add_command(group, "pull", pull)
    pushing.add_argument("folder", metavar="FOLDER", help="a run's --output_dir, or the folder with path.json")
    pushing.add_argument("repo_id", metavar="REPO", help="user/name on the Hub; created if it does not exist")
    pushing.add_argument("--private", action="store_true", help="make a new repository private")
    pushing.add_argument("--create_pr", action="store_true", help="open a pull request in place of a commit to main")
    pushing.add_argument("--commit_message", metavar="TEXT", help="message of the commit to main")
    pushing.add_argument(
        "--push_demo",
        nargs="?",
        const="",
        metavar="SPACE",
        help="create a Space with the demo (default name: REPO-demo)",
    )
    pushing.add_argument(
        "--demo_student_only", action="store_true", help="the Space loads neither the teacher nor the path"
    )
    pushing.add_argument(
        "--demo_mixed_precision",
        choices=["no", "bf16", "fp16"],
        help="precision of the Space's denoisers (default: no)",
    )
    pulling.add_argument("repo_id", metavar="REPO", help="user/name on the Hub")
    pulling.add_argument("folder", metavar="FOLDER", help="the folder to write into; new, or empty")
    pulling.add_argument("--revision", help="branch, tag or commit of main (default: main)")
    for parser in (pushing, pulling):
        add_cache_dir(parser)
        add_token(parser)
    add_teacher_place(pushing)


def push(parsed: argparse.Namespace) -> None:
    """Uploads a run's folder, or a path's, to the Hub. It can be repeated: what is there already is not sent again."""
    from ..hub.publish.run import path_of_run, push_run
    from ..hub.publish.space import push_space
    from ..hub.repository import Repository
    from ..models.reference import ModelReference

    demo_of_nothing = parsed.create_pr or not Path(parsed.folder, "model_index.json").is_file()
    if parsed.push_demo is not None and demo_of_nothing:
        raise ValueError("--push_demo shows a student that is pushed to main: not a path alone, nor a pull request.")
    flags = ["--student_only"] if parsed.demo_student_only else []
    if parsed.demo_mixed_precision is not None:
        flags += ["--mixed_precision", parsed.demo_mixed_precision]
    if flags and parsed.push_demo is None:
        raise ValueError("--demo_student_only and --demo_mixed_precision are of a Space; pass --push_demo, too.")
    path, name = path_of_run(parsed.folder), parsed.pretrained_model_name_or_path
    teacher = None
    if name is not None:
        teacher = ModelReference(name) if path is None else moved(path.teacher, parsed)
    repo_id = push_run(
        parsed.folder,
        parsed.repo_id,
        parsed.private or None,
        parsed.create_pr,
        parsed.commit_message,
        parsed.token,
        parsed.cache_dir,
        teacher,
    )
    print(f"pushed to {Repository(repo_id).url}")
    if parsed.push_demo is not None:
        space_id = parsed.push_demo or f"{repo_id}-demo"
        space = push_space(repo_id, space_id, parsed.private or None, parsed.token, flags)
        print(f"demo: {space}")


def pull(parsed: argparse.Namespace) -> None:
    """Downloads a run or a path from the Hub into a new folder."""
    from ..hub.publish.run import pull

    path = pull(parsed.repo_id, parsed.folder, parsed.revision, parsed.token, parsed.cache_dir)
    print(
        f"{parsed.folder}: "
        + ("no degradation path" if path is None else f"a path of {len(path)} nodes in {path.where}")
    )
