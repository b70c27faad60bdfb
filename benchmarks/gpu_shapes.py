"""A shapes teacher that is trained five times as long as the shipped one, distilled as in the quickstart, with and without a path.

    python benchmarks/gpu_shapes.py teacher --work_dir outputs/shapes --figures teacher.json
    python benchmarks/gpu_shapes.py distil --arm path --work_dir outputs/shapes --figures path.json

Autoencoder and classifier are the shipped ones, and the evaluation is the quickstart's, so that distances compare with those of its
report. Three seeds are distilled side by side, each in a process of its own. See `gpu.py`.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from gpu_distil import figures_of, main, measured_teacher


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "text_to_image"))

from diffusers_disback import DisBackConfig, Evaluation, ModelReference, load_family  # noqa: E402
from diffusers_disback.commands.command_line import read_flags  # noqa: E402
from shapes import make_teacher as maker  # noqa: E402
from shapes.evaluator import shapes_evaluation  # noqa: E402


GUIDANCE = 4.0  # the shipped teacher's, and the quickstart's
TINY = {
    "train_batch_size": 2,
    "max_train_steps": 2,
    "validation_steps": 1,
    "checkpointing_steps": 1,
    "degradation_steps": 2,
    "num_path_nodes": 1,
    "steps_per_target": 1,
}


def evaluation(tiny: bool) -> Evaluation:
    return shapes_evaluation(8, 80) if tiny else shapes_evaluation()


def make_teacher(parsed: argparse.Namespace) -> dict[str, Any]:
    """Trains the teacher, or goes on with it, and measures it."""
    folders = ["--work_dir", str(parsed.work_dir), "--output_dir", str(parsed.work_dir)]
    sizes = {"denoiser_steps": 2, "num_latents": 100} if parsed.tiny else {"denoiser_steps": parsed.steps}
    maker.main(["--denoiser_only", *folders, *(word for k, v in sizes.items() for word in (f"--{k}", str(v)))])
    family, one = load_family(ModelReference(str(parsed.work_dir / "teacher"))), evaluation(parsed.tiny)
    teacher = measured_teacher(family, one, 2 if parsed.tiny else 25, GUIDANCE)
    training = json.loads((parsed.work_dir / "denoiser.json").read_text())
    return {"steps": training["step"], "seconds": training["seconds"], "teacher": teacher, **one.references}


def distil(parsed: argparse.Namespace) -> dict[str, Any]:
    """Distils one seed."""
    shapes = ROOT / "examples" / "text_to_image" / "shapes"
    settings = read_flags(DisBackConfig, (shapes / "quickstart.args").read_text().split())
    changes = {**(TINY if parsed.tiny else {}), **({"num_path_nodes": 0} if parsed.arm == "none" else {})}
    config = DisBackConfig(
        **{
            **settings,
            "pretrained_model_name_or_path": str(parsed.work_dir / "teacher"),
            "prompts_file": str(shapes / "prompts.txt"),
            "output_dir": str(parsed.work_dir / f"run-{parsed.arm}-{parsed.seed}"),
            "seed": parsed.seed,
            "report_to": "none",
            "resume_from_checkpoint": "latest",
            **changes,
        }
    )
    return figures_of(config, lambda: evaluation(parsed.tiny))


if __name__ == "__main__":
    main(__doc__, make_teacher, distil, teacher_steps=60_000)
