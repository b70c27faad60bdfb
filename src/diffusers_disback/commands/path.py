"""`diffusers-disback path`: a degradation path, looked at and checked."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..hub.files import printable
from .command_line import number
from .options import add_cache_dir, add_command, add_teacher_place, add_token, moved, prompts_for


if TYPE_CHECKING:
    from ..path.path import DegradationPath


def add_commands(group: Any) -> None:
    """Adds `path show` and `path verify` to the commands."""
    verbs = group.add_parser(
        "path", help="Shows or verifies a degradation path", description="Shows or verifies a degradation path."
    )
    verbs = verbs.add_subparsers(dest="verb", required=True, title="commands", metavar="COMMAND")
    showing, verifying = add_command(verbs, "show", path_show), add_command(verbs, "verify", path_verify)
    for parser in (showing, verifying):
        parser.add_argument("path", metavar="PATH", help="the folder with path.json, or a path on the Hub (user/name)")
        parser.add_argument("--revision", help="branch, tag or commit of a path on the Hub (default: main)")
        add_cache_dir(parser)
        add_token(parser)
        add_teacher_place(parser)
    showing.add_argument(
        "--table", action="store_true", help="print the table only: draw nothing, do not load the teacher"
    )
    showing.add_argument(
        "--prompt", action="append", help="a row of the image; repeat it for more (default: two prompts)"
    )
    showing.add_argument(
        "--guidance_scale",
        type=number(False, minimum=1),
        default=1.0,
        metavar="SCALE",
        help="classifier-free guidance of the teacher and of every node (default: 1, none)",
    )
    showing.add_argument(
        "--num_inference_steps",
        type=number(True, minimum=1, maximum=1000),
        default=25,
        metavar="STEPS",
        help="steps of the sampler, DDIM (default: 25)",
    )
    showing.add_argument("--output", metavar="FILE", default="path.png", help="the image to write (default: path.png)")


def open_path(parsed: argparse.Namespace) -> "DegradationPath":
    from ..path.path import DegradationPath

    path = DegradationPath.from_pretrained(
        parsed.path, parsed.revision, cache_dir=parsed.cache_dir, token=parsed.token
    )
    path.teacher = moved(path.teacher, parsed)
    return path


def path_show(parsed: argparse.Namespace) -> None:
    """Prints a table of a path's nodes and draws an image from each of them. The teacher is loaded for the image alone."""
    path = open_path(parsed)
    teacher, generator = path.manifest["teacher"], path.manifest["generator"]
    name, commit = printable(teacher["name_or_path"]), printable(teacher["commit"])
    print(f"teacher: {name} (SHA-256 {printable(teacher['sha256'][:12])}, commit {commit})")
    start, timestep = printable(generator["name_or_path"] or "the teacher"), generator["conditioning_timestep"]
    print(f"start: {start} at timestep {printable(timestep)}")
    print(f"{'node':>4}  {'step':>8}  {'loss':>10}  {'kind':<7}  {'dtype':<8}  {'GB':>8}  {'commit':<12}  name")
    for index, node in enumerate(path.nodes, 1):
        size, commit = node["bytes"] / 1e9, node.get("commit", "")[:12]
        kind = f"{node['kind']:<7}  {printable(node['dtype']):<8}  {size:>8.3g}  {commit:<12}"
        print(f"{index:>4}  {node['step']:>8}  {node['loss']:>10.5g}  {kind}  {node['name']}")
    print("complete" if path.complete else "unfinished")
    if not parsed.table and path.nodes:
        sample_path(path, parsed.prompt, parsed.guidance_scale, parsed.num_inference_steps, Path(parsed.output))
        print(f"see {parsed.output}")


def sample_path(
    path: "DegradationPath", prompts: list[str] | None, guidance_scale: float, steps: int, file: Path
) -> None:
    """Draws images of the teacher and of each node, side by side, from the same noise."""
    from diffusers.utils.logging import disable_progress_bar

    from ..evaluation import Evaluation
    from ..evaluation.report import sample_nodes
    from ..families import load_family

    disable_progress_bar()
    family = load_family(path.local_teacher())
    prompts = prompts_for(family, prompts)
    sample_nodes(path, family, family.sampler(), Evaluation(prompts), [guidance_scale] * (len(path) + 1), steps, file)


def path_verify(parsed: argparse.Namespace) -> None:
    """Checks the hash of every file of a path, and that each node fits the teacher's architecture."""
    path = open_path(parsed)
    network = path.teacher.resolve_configs(lambda _: path.denoiser, parsed.cache_dir).meta_network()
    for index, node in enumerate(path.nodes, 1):
        tensors = path.verify_node(index, network)
        print(f"node {index}: {node['name']}, {tensors} tensors, whole, and fits the teacher")
    print(f"{path.where}: {len(path)} nodes, {'complete' if path.complete else 'unfinished'}")
