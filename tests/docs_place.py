"""What the pages of the docs name, at tiny size: folders, files, and models on the Hub."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import original_layout
import tiny
import train_disback
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline, LCMScheduler
from hub_server import HubServer
from huggingface_hub import HfApi
from script import SHORT, arguments
from test_evaluators import save_clip, save_dinov2

from diffusers_disback.families import load_family, to_pipeline
from diffusers_disback.hub.publish.run import push_run
from shapes.dataset import write_image_folder


ROOT = Path(__file__).parent.parent
EXAMPLE = Path("examples", "text_to_image")
Maker = Callable[[Path], object]


def saved(make: Callable[[], DiffusionPipeline]) -> Maker:
    return lambda folder: make().save_pretrained(folder)


def student(teacher: DiffusionPipeline) -> DiffusionPipeline:
    """A teacher's copy that is asked once."""
    return to_pipeline(getattr(teacher, "unet", None) or teacher.transformer, 399, teacher)


def shapes() -> DiffusionPipeline:
    return student(load_family(str(ROOT / EXAMPLE / "shapes" / "teacher")).pipeline)


def lcm() -> DiffusionPipeline:
    pipe = tiny.pipeline()
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    return pipe


def run(folder: Path, **flags) -> None:
    """A run of the script, with its path."""
    teacher = tiny.save_teacher(Path("teachers", "tiny"))
    train_disback.main(arguments(folder, teacher, tiny.write_prompts(teacher), **{**SHORT, **flags}))
    AcceleratorState._reset_state(reset_partial_state=True)  # commands of other precisions follow


def recorded(folder: Path, **flags) -> None:
    """A run that records a path of one node, that of step 200."""
    run(folder, stage="record", degradation_steps=200, **flags)


def move_path(folder: Path) -> None:
    recorded(Path("runs", "recorded"))
    shutil.copytree(Path("runs", "recorded", "path"), folder.parent, dirs_exist_ok=True)


HERE: dict[str, Maker] = {
    "prompts.txt": lambda file: tiny.write_prompts(file.parent),
    "model.safetensors": lambda file: original_layout.write(tiny.pipeline(), "v1", file),
    "coco_val": lambda folder: write_image_folder(folder, 4),
    "teacher-id": saved(tiny.pipeline),
    "other-id": saved(lcm),
    "lcm-id": saved(lcm),
    "path/or/hub-id": saved(tiny.pipeline),
    "path/to/ddpm": saved(tiny.pixels),
    "path/degradation-000200": move_path,
    "outputs/my-student": run,
    "outputs/quickstart": saved(shapes),
    "outputs/initial-student": lambda folder: saved(shapes)(EXAMPLE / folder),
    "outputs/student": lambda folder: saved(shapes)(EXAMPLE / folder),
    "outputs/my-digits": saved(lambda: student(tiny.pixels(num_class_embeds=10))),
    "outputs/my-dit": saved(lambda: student(tiny.dit(num_embeds_ada_norm=1000))),
    "outputs/my-imagenet64": saved(lambda: student(tiny.rescaled_edm(num_class_embeds=1000))),
}
OF_A_PAGE: dict[str, dict[str, Maker]] = {
    "docs/adapters.md": {"path/or/hub-id": saved(tiny.pipeline_xl)},
    "examples/text_to_image/README.md": {"path/or/hub-id": saved(tiny.pipeline_xl)},
    "examples/unconditional_image_generation/README.md": {
        "path/or/hub-id": saved(lambda: tiny.pixels(num_class_embeds=11))
    },
}
ON_THE_HUB: dict[str, Maker] = {
    "facebook/dinov2-base": save_dinov2,
    "facebook/dinov2-large": save_dinov2,
    "google/ddpm-cifar10-32": saved(lambda: tiny.pixels(sample_size=32)),
    "openai/clip-vit-large-patch14": save_clip,
    "stabilityai/stable-diffusion-3.5-medium": saved(tiny.pipeline_3),
    "stabilityai/stable-diffusion-xl-base-1.0": saved(tiny.pipeline_xl),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": saved(tiny.pipeline),
    "user/adapters": lambda folder: recorded(folder, lora_rank=2),
    "user/other-student": saved(lambda: student(tiny.pipeline(seed=1))),
    "user/repo": recorded,
}
# Evaluators by their networks, which a page need not name.
NETWORKS = {"fid_to_teacher": "facebook/dinov2-base", "clip_score": "openai/clip-vit-large-patch14"}

# How many images the embedded teachers' evaluations draw: 70, where 2,000 would take minutes, and a distance in 64 features needs 65.
EVALUATED = {"text_to_image/shapes": "NUM_PICTURES", "unconditional_image_generation/digits": "NUM_IMAGES"}


def lay_out(page: str, code: str, hub: HubServer) -> None:
    """Brings into the current folder and to the Hub what a page's code names and does not make itself.

    Args:
        page (`str`): Its path in the repository.
        code (`str`): Its snippets that are run.
        hub (`HubServer`): Of which each owner becomes a user.
    """
    for folder in ("benchmarks", "examples", "recipes"):  # copies: snippets write beside the examples
        shutil.copytree(ROOT / folder, folder, ignore=shutil.ignore_patterns("outputs", "__pycache__", "results"))
    for name, number in EVALUATED.items():
        evaluator = Path("examples", name, "evaluator.py")
        text, found = re.subn(number + r" = 2000\b", f"{number} = 70", evaluator.read_text())
        assert found == 1, name
        evaluator.write_text(text)
    for folder in ("docs/images", "benchmarks/results"):
        Path(folder).mkdir(parents=True)
    made = set(re.findall(r"--output_dir (\S+)", code))
    code += "".join((ROOT / recipe).read_text() for recipe in re.findall(r"recipes/\w+\.yaml", code))
    code += " ".join(network for evaluator, network in NETWORKS.items() if evaluator in code)

    def named(name: str) -> bool:
        return name not in made and re.search(rf"(?<![\w/.-]){re.escape(name)}(?![\w/-])", code) is not None

    for name, make in {**HERE, **OF_A_PAGE.get(page, {})}.items():
        if named(name):
            make(Path(name))
    for name, make in ON_THE_HUB.items():
        if named(name):
            make(Path("hub", name))
            publish(Path("hub", name), name, hub)


def publish(folder: Path, repo_id: str, hub: HubServer) -> None:
    """A run as a path, by the library; any other model as it lies there."""
    token = hub.add_user(repo_id.split("/")[0])
    if (folder / "path" / "path.json").exists():
        push_run(folder, repo_id, token=token)
    else:
        api = HfApi(token=token)
        api.create_repo(repo_id)
        api.upload_folder(repo_id=repo_id, folder_path=folder)
