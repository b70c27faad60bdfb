"""A long run: resident memory, open files and threads have to stay what they are once the run has settled.

    python tests/reliability/soak.py --steps 2000

Stage 2 with the adaptive schedule, validation, checkpoints and an average, after a short stage 1, at tiny size.
"""

import argparse
import json
import statistics
import sys
import time
from typing import Any

from runs import MODES, Notebook, Runs, scratch


EVERY = 20  # steps between two looks
SETTLED = 500  # steps
GROWTH = 0.05  # at most, of the memory once it has settled


def measure(steps: int = 2000, mode: str = "full", settled: int = SETTLED) -> dict[str, Any]:
    """Runs so many steps of stage 2 and looks at the process every 20."""
    notes, started = Notebook(f"soak-{mode}"), time.monotonic()
    with scratch(f"soak-{mode}") as folder:
        runs = Runs(folder / "inputs")
        settings = {
            **MODES[mode],
            "degradation_steps": 40,
            "num_path_nodes": 4,
            "max_train_steps": steps,
            "steps_per_target": steps // 8,
            "mismatch_steps": 25,
            "checkpointing_steps": 100,
            "validation_steps": 100,
            "report_to": "tensorboard",
        }
        with runs.server() as server:
            noted = {"file": str(folder / "memory.jsonl"), "every": EVERY}
            ended = server.run(runs.arguments(folder / "soak-run", **settings), note_memory=noted)
        if ended.code:
            raise RuntimeError(f"The run failed:\n{ended.output[-3000:]}")
        rows = [json.loads(line) for line in (folder / "memory.jsonl").read_text().splitlines()]
    result = {"mode": mode, "steps": steps, **growth(rows, settled)}
    notes.rows = [{"key": problem, "problems": [problem]} for problem in problems(result)]
    return notes.publish(**result, seconds=round(time.monotonic() - started))


def growth(rows: list[dict[str, Any]], settled: int) -> dict[str, Any]:
    """What grew in stage 2 after it had settled: medians of the 100 steps then, and of the last 100."""
    rows = [row for row in rows if row["stage"] == "backtracking"]
    last = rows[-1]["step"]
    early = [row for row in rows if settled <= row["step"] < settled + 100]
    late = [row for row in rows if row["step"] > last - 100]

    def middle(part: list[dict[str, Any]], name: str) -> float:
        return statistics.median(row[name] for row in part)

    before, after = middle(early, "resident_mb"), middle(late, "resident_mb")
    result = {"resident_mb": [before, after], "growth": round(after / before - 1, 4)}
    for name in ("open_files", "threads"):
        result[name] = [middle(early, name), middle(late, name)]
    curve = [[row["step"], row["resident_mb"]] for row in rows if row["step"] % 200 == 0]
    return {**result, "curve": curve}


def problems(result: dict[str, Any]) -> list[str]:
    """What was not flat."""
    wrong = [f"memory grew by {result['growth']:.1%}"] if result["growth"] >= GROWTH else []
    for name in ("open_files", "threads"):
        before, after = result[name]
        wrong += [f"{name}: {before:g}, then {after:g}"] if after > before else []
    return wrong


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--mode", choices=list(MODES), default="full")
    parsed = parser.parse_args(arguments)
    result = measure(parsed.steps, parsed.mode)
    print(json.dumps(result, indent=2))
    for problem in problems(result):
        print(problem)
    return 1 if problems(result) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
