"""What the pages on life after distillation report, measured on the shapes teacher. Each part adds its figures to one file.

    python benchmarks/after.py prompts     # how many prompts are enough: three students of equal budgets
    python benchmarks/after.py lora        # a student's LoRA, fused by the tests' own reader into a second teacher
    python benchmarks/after.py svd         # extract-lora with --svd exact and fast
    python benchmarks/after.py images      # image to image by a student of one step
    python benchmarks/after.py speed       # half precision and torch.compile, on this CPU

`OMP_NUM_THREADS` says how many threads; by default one. `--tiny` rehearses a part.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionImg2ImgPipeline
from safetensors.torch import load_file
from scripts import set_threads
from torch import Tensor
from tqdm.auto import tqdm


ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "examples" / "text_to_image"), str(ROOT / "tests")]

from kohya_reader import merge  # noqa: E402

from diffusers_disback import (  # noqa: E402
    DisBackConfig,
    DisBackOneStepPipeline,
    DisBackTrainer,
    DriftEvaluator,
    load_family,
)
from diffusers_disback.commands.command_line import read_flags  # noqa: E402
from diffusers_disback.hub.publish.export import SVDS, extract_lora  # noqa: E402
from shapes.dataset import SCENES, pixels  # noqa: E402
from shapes.evaluator import ShapesEvaluator, held_out, shapes_evaluation, shapes_prompts  # noqa: E402


SHAPES = ROOT / "examples" / "text_to_image" / "shapes"
RESULTS = ROOT / "benchmarks" / "results" / "after.json"
UPDATES = 200
SECOND_SEED = 99  # of data of its own
CAPTION = "a red circle on a navy background"
Figures = dict[str, Any]


def distilled(folder: Path, tiny: bool, **changes: Any) -> Path:
    """The quickstart without a path, shortened; its folder. What is finished is left as it is."""
    settings = read_flags(DisBackConfig, (SHAPES / "quickstart.args").read_text().split())
    config = DisBackConfig(
        **{
            **settings,
            "pretrained_model_name_or_path": str(SHAPES / "teacher"),
            "prompts_file": str(SHAPES / "prompts.txt"),
            "output_dir": str(folder),
            "num_path_nodes": 0,
            "max_train_steps": 4 if tiny else UPDATES,
            "validation_steps": 4 if tiny else UPDATES,
            "report_to": "none",
            "resume_from_checkpoint": "latest",
            **changes,
        }
    )
    trainer = DisBackTrainer(args=config, evaluation=lambda: shapes_evaluation(200, 80))
    trainer.train()
    trainer.save_model()
    return folder


def student_of(count: int, parsed: argparse.Namespace) -> tuple[Path, list[str]]:
    """The folder of a student of so many captions, and the captions."""
    captions = (SHAPES / "prompts.txt").read_text().splitlines()
    order = torch.randperm(len(captions), generator=torch.Generator().manual_seed(0)).tolist()
    known = [captions[row] for row in order[:count]]
    file = parsed.work_dir / f"prompts-{count}.txt"
    file.write_text("\n".join(known) + "\n")
    return distilled(parsed.work_dir / f"prompts-{count}", parsed.tiny, prompts_file=str(file)), known


def prompts(parsed: argparse.Namespace) -> Figures:
    """Students of 6, 24 and all 96 captions, with equal updates, measured on all captions."""
    evaluation = shapes_evaluation(200, 80) if parsed.tiny else shapes_evaluation()
    (evaluator,) = evaluation.evaluators
    assert isinstance(evaluator, ShapesEvaluator)
    found: Figures = {"updates": UPDATES}
    for count in (6, 24, 96):
        student, known = student_of(count, parsed)
        family = load_family(str(student))
        images, _ = evaluation.sample(family, family.pipeline)
        right = evaluator.features(images, evaluation.prompts)[:, -3:].mean(1)
        seen = torch.tensor([prompt in known for prompt in evaluation.prompts])
        shares = {"seen": right[seen].mean().item()} | ({"unseen": right[~seen].mean().item()} if count < 96 else {})
        found[str(count)] = {**evaluation.measure(images), **shares}
    return found


def fine_tuned(folder: Path, steps: int) -> Path:
    """A second teacher: the first one, trained on with images of half the brightness; its folder."""
    if (folder / "model_index.json").exists():
        return folder
    family = load_family(str(SHAPES / "teacher"))
    images, scenes = pixels(1000, SECOND_SEED)
    captions = [str(SCENES[scene]) for scene in scenes]
    with torch.no_grad():
        x0 = torch.cat([family.encode_images(dimmed(part)) for part in torch.from_numpy(images).split(50)])
        condition = family.encode(captions)
    model = family.score_model()
    network = model.network.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    for _ in tqdm(range(steps), desc="second teacher", mininterval=10):
        rows = torch.randint(len(x0), (32,), generator=generator)
        noise, t = (
            torch.randn(x0[rows].shape, generator=generator),
            torch.randint(1000, (32,), generator=generator),
        )
        model.denoising_loss(x0[rows], noise, t, {key: value[rows] for key, value in condition.items()}).backward()
        optimizer.step()
        optimizer.zero_grad()
    network.requires_grad_(False).eval()
    family.pipeline.save_pretrained(folder)
    return folder


def dimmed(images: Tensor) -> Tensor:
    """Images of half the brightness, in -1..1, of uint8."""
    return images.float() / 255 - 1


def brightened(images: Tensor) -> Tensor:
    """Twice the brightness, of uint8: what dimmed images would be otherwise."""
    return (images.int() * 2).clamp(0, 255).to(torch.uint8)


def lora(parsed: argparse.Namespace) -> Figures:
    """A LoRA that was trained on the first teacher, read by `tests/kohya_reader.py` and fused into a second one: how far its
    images are from the second teacher's. Of the second teacher's world everything is measured at twice the brightness."""
    rates = {"generator_learning_rate": 2e-3, "fake_score_learning_rate": 3e-3, "adam_beta1": 0.9}
    student = distilled(parsed.work_dir / "lora", parsed.tiny, lora_rank=16, **rates)
    second = fine_tuned(parsed.work_dir / "second", 2 if parsed.tiny else 300)
    layers = load_file(student / "lora" / "kohya.safetensors")
    evaluation = shapes_evaluation(200 if parsed.tiny else 500)
    steps, timestep = 2 if parsed.tiny else 25, 399
    found: Figures = {"updates": UPDATES}
    own: dict[str, dict[str, Tensor]] = {}
    for name, folder in (("first", SHAPES / "teacher"), ("second", second)):
        family = load_family(str(folder))
        own[name] = {key: value.clone() for key, value in family.network.state_dict().items()}
        drift = DriftEvaluator()
        images, _ = evaluation.sample(family, family.sampler(), num_inference_steps=steps, guidance_scale=4.0)
        drift.prepare(images)
        drawn = {"teacher": images}
        drawn["teacher, one step"], _ = evaluation.sample(family, family.one_step(family.network, timestep))
        family.network.load_state_dict(merge(own[name], layers))
        drawn["lora"], _ = evaluation.sample(family, family.one_step(family.network, timestep))
        measured = {key: value if name == "first" else brightened(value) for key, value in drawn.items()}
        found[name] = {key: {**evaluation.measure(measured[key]), **drift(value)} for key, value in drawn.items()}
    found["norms"] = {
        "first to second": norm(own["first"], own["second"]),
        "lora": norm(own["first"], merge(own["first"], layers)),
        "first": norm(own["first"], {key: torch.zeros_like(value) for key, value in own["first"].items()}),
    }
    return found


def norm(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Of the difference of two networks' weights."""
    return sum((one[key].double() - other[key].double()).square().sum() for key in one).sqrt().item()


def svd(parsed: argparse.Namespace) -> Figures:
    """What either decomposition leaves of the difference between a student that was trained in full and its teacher, and how
    long it takes; and how long for one layer of SDXL's size."""
    student = load_family(str(student_of(96, parsed)[0])).network
    teacher = load_family(str(SHAPES / "teacher")).network
    found: Figures = {}
    for rank in (4, 16, 64):
        for name in SVDS:
            started = time.perf_counter()
            residual = extract_lora(student, teacher, rank, name)[1]
            found[f"{name}, rank {rank}"] = {"left": residual, "seconds": round(time.perf_counter() - started, 2)}
    size = (64, 576) if parsed.tiny else (1280, 9 * 1280)
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(*size, generator=generator) * 1e-3
    matrix += torch.randn(size[0], 32, generator=generator) @ torch.randn(32, size[1], generator=generator) * 1e-3
    for name, decompose in SVDS.items():
        started = time.perf_counter()
        up, values, down = decompose(matrix, 64)
        seconds = round(time.perf_counter() - started, 2)
        left = (matrix - up * values @ down).norm() / matrix.norm()
        found[f"{name}, {size[0]} x {size[1]}, rank 64"] = {"left": left.item(), "seconds": seconds}
    return found


def images(parsed: argparse.Namespace) -> Figures:
    """Image to image by a one-step student: shares of shape, colour and background that are the prompt's, and the source's."""
    student, _ = student_of(96, parsed)
    pipe = StableDiffusionImg2ImgPipeline.from_pipe(DisBackOneStepPipeline.from_pretrained(student))
    pipe.set_progress_bar_config(disable=True)
    evaluator, count = ShapesEvaluator(), 20 if parsed.tiny else 500
    sources, captions = held_out(count)
    asked = shapes_prompts(count, seed=1)
    found: Figures = {}
    for steps, strength in ((1, 1.0), (2, 0.5), (4, 0.25)):
        drawn = []
        for first in range(0, count, 20):
            part = slice(first, first + 20)
            how = {"num_inference_steps": steps, "strength": strength, "guidance_scale": 0, "output_type": "pt"}
            generator = torch.Generator().manual_seed(first)
            drawn.append(pipe(asked[part], image=sources[part] / 255, generator=generator, **how).images)
        made = (torch.cat(drawn) * 255).round().to(torch.uint8)
        found[f"at timestep {int(pipe.scheduler.timesteps[-1])}"] = {
            "strength": strength,
            "num_inference_steps": steps,
            "prompt": evaluator.features(made, asked)[:, -3:].mean(0).tolist(),
            "source": evaluator.features(made, captions)[:, -3:].mean(0).tolist(),
        }
    return found


def speed(parsed: argparse.Namespace) -> Figures:
    """Seconds of a call of the shapes student's size, in float32, bfloat16, and compiled; medians of 10 calls."""
    found: Figures = {
        "cpu": next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line)
    }
    for dtype, compiled in ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True)):
        family = load_family(str(SHAPES / "teacher"))
        pipe = DisBackOneStepPipeline(**family.one_step(family.network, 399).components).to(dtype=dtype)
        pipe.set_progress_bar_config(disable=True)
        if compiled:
            pipe.unet.compile()
        for batch in (1, 16):
            seconds = []
            for _ in range(2 if parsed.tiny else 11):
                started = time.perf_counter()
                pipe([CAPTION] * batch, output_type="pt", generator=torch.Generator().manual_seed(0))
                seconds.append(time.perf_counter() - started)
            name = f"{str(dtype)[6:]}{', compiled' if compiled else ''}, batch {batch}"
            found[name] = {"first": round(seconds[0], 3), "median": round(statistics.median(seconds[1:]), 4)}
            print(name, found[name], flush=True)
    return found


PARTS: dict[str, Callable[[argparse.Namespace], Figures]] = {
    "prompts": prompts,
    "lora": lora,
    "svd": svd,
    "images": images,
    "speed": speed,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/after"))
    parser.add_argument("--figures", type=Path, default=RESULTS)
    parser.add_argument("--tiny", action="store_true")
    parsed = parser.parse_args()
    set_threads()
    parsed.work_dir.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    figures = {**PARTS[parsed.part](parsed), "threads": torch.get_num_threads()}
    figures["seconds"] = round(time.monotonic() - started, 1)
    known = json.loads(parsed.figures.read_text()) if parsed.figures.exists() else {}
    parsed.figures.write_text(json.dumps({**known, parsed.part: figures}, indent=1, sort_keys=True) + "\n")
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
