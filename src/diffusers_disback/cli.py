"""`diffusers-disback`: what is not training. Training has one door, `examples/text_to_image/train_disback.py`."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__


if TYPE_CHECKING:
    from .model_reference import ModelReference
    from .path import DegradationPath


def open_path(parsed: argparse.Namespace) -> "DegradationPath":
    from .path import DegradationPath

    return DegradationPath.from_pretrained(
        parsed.path, parsed.revision, teacher_of(parsed), parsed.cache_dir, parsed.token
    )


def teacher_of(parsed: argparse.Namespace) -> "ModelReference | None":
    from .model_reference import ModelReference

    name = parsed.pretrained_model_name_or_path
    return name and ModelReference(name, variant=parsed.variant)


def path_show(parsed: argparse.Namespace) -> None:
    """Prints a table of a path's nodes, and draws what each of them paints."""
    path = open_path(parsed)
    teacher, generator = path.manifest["teacher"], path.manifest["generator"]
    print(f"teacher: {teacher['name_or_path']} (SHA-256 {teacher['sha256'][:12]}, commit {teacher['commit']})")
    print(f"start: {generator['name_or_path'] or 'the teacher'} at timestep {generator['conditioning_timestep']}")
    print(f"{'node':>4}  {'step':>8}  {'loss':>10}  {'kind':<7}  {'dtype':<8}  {'GB':>8}  {'commit':<12}  name")
    for index, node in enumerate(path.nodes, 1):
        size, commit = node["bytes"] / 1e9, node.get("commit", "")[:12]
        kind = f"{node['kind']:<7}  {node['dtype']:<8}  {size:>8.3g}  {commit:<12}"
        print(f"{index:>4}  {node['step']:>8}  {node['loss']:>10.5g}  {kind}  {node['name']}")
    print("complete" if path.complete else "unfinished")
    if not parsed.table and path.nodes:
        draw(path, parsed.prompt, parsed.guidance_scale, parsed.num_inference_steps, Path(parsed.output))
        print(f"see {parsed.output}")


def draw(path: "DegradationPath", prompts: list[str], guidance_scale: float, steps: int, file: Path) -> None:
    """What the teacher and each node paint, side by side, from the same noise."""
    from diffusers.utils.logging import disable_progress_bar

    from .evaluation import Evaluation
    from .evaluation.report import draw_path, many_step_pipeline
    from .families import load_family

    disable_progress_bar()
    pipeline = many_step_pipeline(load_family(path.teacher, path.cache_dir).pipeline)
    draw_path(path, pipeline, Evaluation(prompts), [guidance_scale] * (len(path) + 1), steps, file)


def path_verify(parsed: argparse.Namespace) -> None:
    """Checks every hash of a path, and that each node fits the teacher's architecture in everything."""
    path = open_path(parsed)
    skeleton = path.teacher.skeleton(parsed.cache_dir)
    for index, node in enumerate(path.nodes, 1):
        tensors = path.verify_node(index, skeleton)
        print(f"node {index}: {node['name']}, {tensors} tensors, whole, and fits the teacher")
    print(f"{path.where}: {len(path)} nodes, {'complete' if path.complete else 'unfinished'}")


def push(parsed: argparse.Namespace) -> None:
    """Pushes a run's folder, or a path's, to the Hub. It can be repeated."""
    from .hub import push_run
    from .repository import Repository

    repo_id = push_run(
        parsed.folder,
        parsed.repo_id,
        parsed.private or None,
        parsed.create_pr,
        parsed.commit_message,
        parsed.token,
        parsed.cache_dir,
        teacher_of(parsed),
    )
    print(f"pushed to {Repository(repo_id).url}")


def pull(parsed: argparse.Namespace) -> None:
    """Downloads a pushed run or path into a new folder."""
    from .hub import pull

    path = pull(parsed.repo_id, parsed.folder, parsed.revision, parsed.token, parsed.cache_dir)
    print(
        f"{parsed.folder}: "
        + ("no degradation path" if path is None else f"a path of {len(path)} nodes in {path.where}")
    )


def parser() -> argparse.ArgumentParser:
    """All commands and their flags."""
    top = argparse.ArgumentParser(prog="diffusers-disback", description=__doc__)
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True)

    def add_teacher(made: argparse.ArgumentParser) -> None:
        made.add_argument("--pretrained_model_name_or_path", help="where the teacher is, if not where the path says")
        made.add_argument("--variant", help="of the teacher's weights' files, such as fp16")

    def command(group: Any, name: str, function: Any) -> argparse.ArgumentParser:
        made = group.add_parser(name, help=function.__doc__, description=function.__doc__)
        made.set_defaults(function=function)
        made.add_argument("--token", help="of the Hub; by default that of `hf auth login`, which is safer")
        made.add_argument("--cache_dir", help="where downloads are kept")
        return made

    pushing = command(commands, "push", push)
    pushing.add_argument("folder", help="a run's --output_dir, or the folder with path.json")
    pushing.add_argument("repo_id", help="user/name on the Hub; made if it is not there")
    pushing.add_argument("--private", action="store_true", help="make a new repository private")
    pushing.add_argument("--create_pr", action="store_true", help="propose what goes to main as a pull request")
    pushing.add_argument("--commit_message", help="of the commit to main")
    add_teacher(pushing)
    pulling = command(commands, "pull", pull)
    pulling.add_argument("repo_id", help="user/name on the Hub")
    pulling.add_argument("folder", help="new, or empty")
    pulling.add_argument("--revision", help="branch, tag or commit of main")

    path = commands.add_parser("path", help="look at a degradation path").add_subparsers(dest="verb", required=True)
    for name, function in (("show", path_show), ("verify", path_verify)):
        made = command(path, name, function)
        made.add_argument("path", help="the folder with path.json, or user/name on the Hub")
        made.add_argument("--revision", help="branch, tag or commit of a path on the Hub")
        add_teacher(made)
        if name == "show":
            made.add_argument("--table", action="store_true", help="draw nothing, and do not load the teacher")
            made.add_argument("--prompt", action="append", help="a row of the picture; can be given several times")
            made.add_argument("--guidance_scale", type=float, default=1.0, help="of the teacher and of every node")
            made.add_argument("--num_inference_steps", type=int, default=25, help="of the sampler (DDIM)")
            made.add_argument("--output", default="path.png", help="the picture")
    return top


def main(arguments: list[str] | None = None) -> int:
    parsed = parser().parse_args(arguments)
    if parsed.command == "path" and parsed.verb == "show":
        parsed.prompt = parsed.prompt or ["a photograph of a cat", "a red house by the sea"]
    try:
        parsed.function(parsed)
    except ValueError as error:
        print(f"diffusers-disback: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
