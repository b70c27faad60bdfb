"""`diffusers-disback`: what is not training. Training has one door, `examples/text_to_image/train_disback.py`."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..hub.files import printable
from . import convert_edm
from .command_line import THEIRS, number, read_flags, run
from .evaluate import add_flags, evaluate


if TYPE_CHECKING:
    from ..families import ModelFamily
    from ..models.reference import ModelReference
    from ..path.path import DegradationPath
    from ..training.config import DisBackConfig


def open_path(parsed: argparse.Namespace) -> "DegradationPath":
    from ..path.path import DegradationPath

    path = DegradationPath.from_pretrained(
        parsed.path, parsed.revision, cache_dir=parsed.cache_dir, token=parsed.token
    )
    path.teacher = elsewhere(path.teacher, parsed)
    return path


def elsewhere(teacher: "ModelReference", parsed: argparse.Namespace) -> "ModelReference":
    """A path's teacher where it is now: what was taken otherwise than its files say stays so."""
    place = {
        "name_or_path": parsed.pretrained_model_name_or_path,
        "revision": None,
        "variant": parsed.variant,
        "single_file_config": parsed.single_file_config,
    }
    return teacher if place["name_or_path"] is None else replace(teacher, **place)


def teacher_asked_for(parsed: argparse.Namespace, **otherwise: Any) -> "ModelReference":
    """The teacher of a command line, and what is to be taken otherwise than its files say."""
    from ..models.reference import ModelReference

    return ModelReference(
        parsed.pretrained_model_name_or_path,
        parsed.revision,
        parsed.variant,
        lora=parsed.teacher_lora,
        single_file_config=parsed.single_file_config,
        **otherwise,
    )


def device() -> str:
    """The GPU, if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def device_memory() -> int | None:
    """Bytes of the GPU, if there is one."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def path_show(parsed: argparse.Namespace) -> None:
    """Prints a table of a path's nodes, and draws what each of them paints."""
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
    """What the teacher and each node paint, side by side, from the same noise."""
    from diffusers.utils.logging import disable_progress_bar

    from ..evaluation import Evaluation
    from ..evaluation.report import sample_nodes
    from ..families import load_family

    disable_progress_bar()
    family = load_family(path.local_teacher())
    prompts = prompts_for(family, prompts)
    sample_nodes(path, family, family.sampler(), Evaluation(prompts), [guidance_scale] * (len(path) + 1), steps, file)


def prompts_for(family: "ModelFamily", prompts: list[str] | None) -> list[str]:
    """The prompts or labels that images are drawn of, by default two. Says if prompts are longer than the text encoders read."""
    from ..data.truncation import truncation

    if not family.takes_prompts:
        return prompts or list(family.conditions().captions[:2])
    prompts = prompts or ["a photograph of a cat", "a red house by the sea"]
    if message := truncation(family.tokenizers, prompts):
        print(message, file=sys.stderr)
    return prompts


def path_verify(parsed: argparse.Namespace) -> None:
    """Checks every hash of a path, and that each node fits the teacher's architecture in everything."""
    path = open_path(parsed)
    network = path.teacher.resolve_configs(lambda _: path.denoiser, parsed.cache_dir).meta_network()
    for index, node in enumerate(path.nodes, 1):
        tensors = path.verify_node(index, network)
        print(f"node {index}: {node['name']}, {tensors} tensors, whole, and fits the teacher")
    print(f"{path.where}: {len(path)} nodes, {'complete' if path.complete else 'unfinished'}")


def timestep_sweep(parsed: argparse.Namespace) -> None:
    """Asks a teacher once at each of a range of timesteps: a table, an image, and the one that is nearest to it."""
    from diffusers.utils.logging import disable_progress_bar

    from ..data.prompts import PromptFile
    from ..evaluation import Evaluation
    from ..evaluation.sweep import recommended
    from ..evaluation.sweep import timestep_sweep as sweep
    from ..families import load_family
    from ..hub.files import write_json

    disable_progress_bar()
    teacher = teacher_asked_for(
        parsed,
        prediction_type=parsed.prediction_type,
        vae=parsed.pretrained_vae_model_name_or_path,
        rescale_betas_zero_snr=parsed.rescale_betas_zero_snr,
        null_class_label=parsed.null_class_label,
    )
    family = load_family(teacher, parsed.cache_dir)
    for t in parsed.timesteps:
        family.check_timestep(t)
    prompts = (
        parsed.prompt if parsed.prompts_file is None else list(PromptFile(parsed.prompts_file, parsed.num_prompts))
    )
    prompts = prompts_for(family, prompts)
    repeated = [prompt for prompt in prompts for _ in range(parsed.num_images_per_prompt)]
    family.to(device()).network.to(device())
    evaluation, image = Evaluation(repeated, batch_size=parsed.batch_size), Path(parsed.output)
    measures = sweep(family, parsed.timesteps, evaluation, parsed.guidance_scale, parsed.num_inference_steps, image)
    names = list(next(iter(measures.values())))
    print(f"{'timestep':>8}  " + "  ".join(f"{name:>16}" for name in names))
    for t, values in measures.items():
        print(f"{t:>8}  " + "  ".join(f"{values[name]:>16.4f}" for name in names))
    best = recommended(measures)
    write_json(image.with_suffix(".json"), {"recommended": best, "timesteps": measures, "num_pictures": len(repeated)})
    print(f"recommended: --conditioning_timestep {best} (least drift, over {len(repeated)} images)")
    print(f"see {image} and {image.with_suffix('.json')}")


def half(parsed: argparse.Namespace) -> None:
    """Writes float16 weights beside a student's own, as the variant fp16."""
    from ..hub.publish.export import add_half_variant

    for file in add_half_variant(parsed.folder):
        print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")


def extract_lora(parsed: argparse.Namespace) -> None:
    """Writes the LoRA that comes nearest to a student from its teacher, for diffusers and for other programs."""
    from ..hub.publish.export import denoiser_of, extract_lora, save_lora
    from ..models.reference import ModelReference

    student, teacher = (
        denoiser_of(reference, parsed.denoiser, parsed.cache_dir).to(device())
        for reference in (ModelReference(parsed.student), teacher_asked_for(parsed))
    )
    layers, residual = extract_lora(student, teacher, parsed.rank, parsed.svd)
    halves = {key: value.half().cpu() for key, value in layers.items()}
    files = save_lora(halves, parsed.rank, parsed.output, student, parsed.denoiser)
    print(f"rank {parsed.rank}: leaves {residual:.1%} of the difference between student and teacher")
    for file in files:
        print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")


def plan(parsed: argparse.Namespace) -> int:
    """Prints what a training run will take, before anything is loaded, and whether it fits the device. Takes the training
    script's own flags."""
    from ..planning.plan import REMARKS, Planner, table
    from ..planning.verdict import verdict
    from ..training.config import DisBackConfig
    from ..training.defaults import as_begun

    flags = read_flags(DisBackConfig, parsed.flags, prog="diffusers-disback plan", description=plan.__doc__)
    config = as_begun(DisBackConfig(**flags))
    if config.pretrained_model_name_or_path is None:
        raise ValueError("Say whose distillation is planned: --pretrained_model_name_or_path.")
    planner = Planner.of(config, config)
    print(
        f"{config.pretrained_model_name_or_path}: {planner.resolution} x {planner.resolution} pixels, batches of "
        f"{config.train_batch_size}, mixed precision {config.mixed_precision or 'no'}"
        f"{_evaluated_at(config, planner.family.conditioning_timestep)}\n\n{table(planner)}\n\n{REMARKS}"
    )
    memory = device_memory() if parsed.device_memory_gb is None else parsed.device_memory_gb * 1e9
    if memory is None:
        return 0
    found = verdict(planner, memory)
    print(f"\n{found}")
    return 0 if found.fits else THEIRS


def _evaluated_at(config: "DisBackConfig", default: int | None) -> str:
    """Where a student is evaluated, as far as it is known without the teacher's schedule."""
    if config.sigma_init is not None:
        return f", sigma_init {config.sigma_init:g}"
    timestep = default if config.conditioning_timestep is None else config.conditioning_timestep
    return "" if timestep is None else f", conditioning timestep {timestep}"


def push(parsed: argparse.Namespace) -> None:
    """Pushes a run's folder, or a path's, to the Hub. It can be repeated."""
    from ..hub.publish.run import path_of_run, push_run
    from ..hub.repository import Repository
    from ..models.reference import ModelReference

    path, name = path_of_run(parsed.folder), parsed.pretrained_model_name_or_path
    teacher = None
    if name is not None:
        teacher = ModelReference(name) if path is None else elsewhere(path.teacher, parsed)
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


def pull(parsed: argparse.Namespace) -> None:
    """Downloads a pushed run or path into a new folder."""
    from ..hub.publish.run import pull

    path = pull(parsed.repo_id, parsed.folder, parsed.revision, parsed.token, parsed.cache_dir)
    print(
        f"{parsed.folder}: "
        + ("no degradation path" if path is None else f"a path of {len(path)} nodes in {path.where}")
    )


def parser() -> argparse.ArgumentParser:
    """All commands and their flags."""
    top = argparse.ArgumentParser(prog="diffusers-disback", description=__doc__)
    top.add_argument("--debug", action="store_true", help="show the traceback of an error; may stand anywhere")
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True)

    def flags(**helps: str) -> argparse.ArgumentParser:
        """Flags that several commands have."""
        made = argparse.ArgumentParser(add_help=False)
        for name, text in helps.items():
            made.add_argument(f"--{name}", help=text)
        return made

    def command(group: Any, name: str, function: Any, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        made = group.add_parser(name, help=function.__doc__, description=function.__doc__, parents=parents)
        made.set_defaults(function=function)
        return made

    cache = flags(cache_dir="where downloads are kept")
    token = flags(token="of the Hub; by default that of `hf auth login`, which is safer")
    form = flags(
        variant="of the teacher's weights' files, such as fp16",
        single_file_config="of a teacher in one file: a pipeline of its kind, for its configs",
    )
    place = flags(pretrained_model_name_or_path="where the teacher is, if not where the path says")
    version = flags(
        revision="branch, tag or commit of the teacher on the Hub",
        teacher_lora="a LoRA that is fused into the teacher",
    )

    pushing = command(commands, "push", push, token, cache, place, form)
    pushing.add_argument("folder", help="a run's --output_dir, or the folder with path.json")
    pushing.add_argument("repo_id", help="user/name on the Hub; made if it is not there")
    pushing.add_argument("--private", action="store_true", help="make a new repository private")
    pushing.add_argument("--create_pr", action="store_true", help="propose what goes to main as a pull request")
    pushing.add_argument("--commit_message", help="of the commit to main")
    pulling = command(commands, "pull", pull, token, cache)
    pulling.add_argument("repo_id", help="user/name on the Hub")
    pulling.add_argument("folder", help="new, or empty")
    pulling.add_argument("--revision", help="branch, tag or commit of main")

    planning = command(commands, "plan", plan)
    planning.usage = "diffusers-disback plan --pretrained_model_name_or_path TEACHER [any flag of the training script]"
    planning.add_argument(
        "--device_memory_gb",
        type=number(False, above=0),
        help="say whether the run fits a device of so many GB (10^9 bytes), by default the GPU's, if there is one; exit "
        "code 2 if it does not",
    )

    sweep = command(commands, "timestep-sweep", timestep_sweep, cache, version, form)
    sweep.add_argument("pretrained_model_name_or_path", help="the teacher: a folder, a model on the Hub, or a file")
    sweep.add_argument(
        "--prediction_type",
        choices=["epsilon", "v_prediction", "sample"],
        help="if not what its scheduler's config says",
    )
    sweep.add_argument(
        "--rescale_betas_zero_snr",
        action="store_true",
        help="rescale its betas to zero terminal SNR, if its scheduler's config does not say so",
    )
    sweep.add_argument(
        "--null_class_label", type=number(True, minimum=0), help="of class labels: the one that stands for no class"
    )
    sweep.add_argument("--pretrained_vae_model_name_or_path", help="an autoencoder in place of the teacher's own")
    sweep.add_argument(
        "--timesteps",
        type=number(True, minimum=0),
        nargs="+",
        default=[99, 199, 299, 399, 499, 599, 699, 799, 899, 999],
    )
    sweep.add_argument("--prompt", action="append", help="can be given several times")
    sweep.add_argument("--prompts_file", help="a text file with one prompt a line, instead")
    sweep.add_argument("--num_prompts", type=number(True, minimum=1), default=16, help="of the file, from the top")
    sweep.add_argument("--num_images_per_prompt", type=number(True, minimum=1), default=4)
    sweep.add_argument("--batch_size", type=number(True, minimum=1), default=4, help="images drawn at once")
    sweep.add_argument(
        "--guidance_scale", type=number(False, minimum=1), default=7.5, help="of the teacher's many-step images"
    )
    sweep.add_argument(
        "--num_inference_steps", type=number(True, minimum=1, maximum=1000), default=25, help="of their sampler (DDIM)"
    )
    sweep.add_argument("--output", default="timesteps.png", help="the image; the table goes beside it, as JSON")

    add_flags(command(commands, "evaluate", evaluate, cache))
    convert_edm.add_flags(command(commands, "convert-edm", convert_edm.convert_edm))

    halving = command(commands, "half", half)
    halving.add_argument("folder", help="a student's, as training wrote it")
    lora = command(commands, "extract-lora", extract_lora, cache, version, form)
    lora.add_argument("student", help="a folder, or a model on the Hub")
    lora.add_argument("pretrained_model_name_or_path", help="its teacher: a folder, a model on the Hub, or a file")
    lora.add_argument("output", help="the folder to write into")
    lora.add_argument("--denoiser", choices=("unet", "transformer"), default="unet", help="the component, in both")
    lora.add_argument(
        "--rank", type=number(True, minimum=1, maximum=4096), default=64, help="of every layer; alpha is the same"
    )

    lora.add_argument(
        "--svd",
        choices=("exact", "fast"),
        default="exact",
        help="how: fast is randomised, with a fixed seed, for large models on a CPU; it may leave a little more",
    )

    path = commands.add_parser("path", help="look at a degradation path").add_subparsers(dest="verb", required=True)
    for name, function in (("show", path_show), ("verify", path_verify)):
        made = command(path, name, function, token, cache, place, form)
        made.add_argument("path", help="the folder with path.json, or user/name on the Hub")
        made.add_argument("--revision", help="branch, tag or commit of a path on the Hub")
        if name == "show":
            made.add_argument("--table", action="store_true", help="draw nothing, and do not load the teacher")
            made.add_argument("--prompt", action="append", help="a row of the image; can be given several times")
            made.add_argument(
                "--guidance_scale", type=number(False, minimum=1), default=1.0, help="of the teacher and of every node"
            )
            made.add_argument(
                "--num_inference_steps",
                type=number(True, minimum=1, maximum=1000),
                default=25,
                help="of the sampler (DDIM)",
            )
            made.add_argument("--output", default="path.png", help="the image")
    return top


def execute(arguments: list[str]) -> int | None:
    """Parses a command line and does what it says. Errors are raised."""
    parsed, parsed_not = parser().parse_known_args(arguments)
    if parsed.command == "plan":
        parsed.flags = parsed_not
    elif parsed_not:
        parser().error(f"unrecognized arguments: {' '.join(parsed_not)}")
    parsed.arguments = arguments
    return parsed.function(parsed)


def main(arguments: list[str] | None = None) -> int:
    """The command. Returns its exit code; see `diffusers_disback.command.run`."""
    return run(execute, sys.argv[1:] if arguments is None else arguments, "diffusers-disback")


if __name__ == "__main__":
    sys.exit(main())
