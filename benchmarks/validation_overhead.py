"""What measuring costs beside training: the quickstart, with 200 images measured every 200 updates.

    python benchmarks/validation_overhead.py
    python benchmarks/validation_overhead.py --prompts 500 --every 100

Both are timed in the same run, so that a busy machine slows both. Written to `benchmarks/results/validation_overhead.json`.
"""

import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from scripts import set_threads


ROOT = Path(__file__).parents[1]
SHAPES = ROOT / "examples" / "text_to_image" / "shapes"
sys.path.insert(0, str(SHAPES.parent))

from diffusers_disback import DisBackConfig, DisBackTrainer  # noqa: E402
from diffusers_disback.backtracking import BacktrackingTrainer  # noqa: E402
from diffusers_disback.commands.command_line import read_flags  # noqa: E402
from diffusers_disback.evaluation.report import Report  # noqa: E402
from diffusers_disback.hub.files import write_json  # noqa: E402
from shapes.evaluator import shapes_evaluation  # noqa: E402


RESULT = ROOT / "benchmarks" / "results" / "validation_overhead.json"


def timed(owner: type, name: str, seconds: dict[str, list[float]]) -> None:
    """Notes the seconds of each call of a method."""
    method: Callable[..., Any] = getattr(owner, name)

    def wrapped(self: Any, *given: Any, **named: Any) -> Any:
        started = time.monotonic()
        try:
            return method(self, *given, **named)
        finally:
            seconds.setdefault(name, []).append(round(time.monotonic() - started, 3))

    setattr(owner, name, wrapped)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--every", type=int, default=200, help="updates of the generator")
    parser.add_argument("--updates", type=int, help="of the generator; by default the quickstart's")
    parsed = parser.parse_args()
    set_threads()
    seconds: dict[str, list[float]] = {}
    timed(BacktrackingTrainer, "validate", seconds)
    timed(Report, "add_teacher", seconds)

    with tempfile.TemporaryDirectory() as folder:
        given = read_flags(DisBackConfig, shlex.split((SHAPES / "quickstart.args").read_text()))
        given |= {"validation_steps": parsed.every, "output_dir": folder, "report_to": "none"}
        given |= {} if parsed.updates is None else {"max_train_steps": parsed.updates}
        places = {
            "pretrained_model_name_or_path": str(SHAPES / "teacher"),
            "prompts_file": str(SHAPES / "prompts.txt"),
        }
        trainer = DisBackTrainer(
            args=DisBackConfig(**{**given, **places}), evaluation=partial(shapes_evaluation, parsed.prompts)
        )
        trainer.train()
        assert trainer.result is not None
        training = trainer.result.cost["seconds"]
    validations = seconds["validate"]
    found = {
        "command": shlex.join(["python", "benchmarks/validation_overhead.py", *sys.argv[1:]]),
        "prompts": parsed.prompts,
        "every": parsed.every,
        "seconds_of_training": training,
        "seconds_of_validations": validations,
        "share_of_validations": round(sum(validations) / training, 4),
        "seconds_of_teacher": seconds["add_teacher"],
        "share_with_teacher": round((sum(validations) + sum(seconds["add_teacher"])) / training, 4),
    }
    write_json(RESULT, found)
    print(found)


if __name__ == "__main__":
    main()
