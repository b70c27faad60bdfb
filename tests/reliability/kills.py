"""The training script is killed (SIGKILL), at random moments or at every operation on files, resumed, and compared.

    python tests/reliability/kills.py --kills 100 --seed 0 --mode full
    python tests/reliability/kills.py --boundaries --mode adapter

A run is killed up to three times, at moments drawn uniformly over the time that an undisturbed one takes, with loading and
the writing of results; then it is resumed by `--resume_from_checkpoint latest` until it ends, and everything that it leaves
is compared with what the undisturbed run left. The resumed processes have another `PYTHONHASHSEED` than the undisturbed one.
"""

import argparse
import json
import random
import shutil
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from runs import LATEST, MODES, SETTINGS, SHORT, Notebook, Runs, contents, differences, scratch

from diffusers_disback.training.run_folder import RunFolder
from diffusers_disback.training.validation import STATUS


KILLS_PER_RUN = 3


def random_kills(mode: str, kills: int, seed: int) -> dict[str, Any]:
    """Kills runs of a mode until there were so many kills; see the module.

    Returns:
        `dict`: `kills`, `runs`, of these `resumed` (to the end, without an error) and `equal`, and where kills fell.
    """
    notes, started = Notebook(f"kills-{mode}-{seed}"), time.monotonic()
    with scratch(f"kills-{mode}") as folder:
        runs = Runs(folder / "inputs")
        with runs.server(hash_seed=1) as first, runs.server(hash_seed=2) as others:
            whole, durations = folder / "undisturbed-run", []
            for _ in range(2):  # the first warms up
                shutil.rmtree(whole, ignore_errors=True)
                durations.append(runs.undisturbed(first, whole, **MODES[mode]).seconds)
            durations = durations[1:]
            number = 0
            while sum(len(row["killed"]) for row in notes.rows) < kills:
                if str(number) not in notes:
                    row = killed_run(
                        runs, others, mode, f"{seed} {mode} {number}", statistics.median(durations[-5:]), whole
                    )
                    durations += row.pop("durations")
                    notes.add(str(number), **row)
                    tell(notes, number)
                number += 1
    rows = notes.rows
    return notes.publish(
        mode=mode,
        seed=seed,
        kills=sum(len(row["killed"]) for row in rows),
        runs=len(rows),
        resumed=sum(len(row["killed"]) for row in rows if row["code"] == 0),
        equal=sum(len(row["killed"]) for row in rows if not row["problems"]),
        where=dict(Counter(where for row in rows for where in row["killed"]).most_common()),
        seconds=round(time.monotonic() - started),
    )


def killed_run(runs: Runs, server: Any, mode: str, seed: str, duration: float, whole: Path) -> dict[str, Any]:
    """One run, killed up to three times and resumed to its end."""
    draw, output = random.Random(seed), runs.folder.parent / "killed-run"
    shutil.rmtree(output, ignore_errors=True)
    arguments = runs.arguments(output, **MODES[mode])
    killed: list[str] = []
    moments: list[float] = []
    for _ in range(KILLS_PER_RUN):
        moments.append(draw.uniform(0, duration))
        ended = server.run(arguments if not killed else arguments + LATEST, seconds=moments[-1])
        if not ended.killed:
            break
        killed.append(place(ended.output, output, {**SETTINGS, **MODES[mode]}["validation_steps"]))
    durations = [ended.seconds] if not killed and not ended.killed else []
    if ended.killed:
        ended = server.run(arguments + LATEST)
    problems = [f"exit status {ended.code}: {' '.join(ended.told[-3:])}"] if ended.code else []
    problems += differences(whole, output) if not ended.code else []
    return {
        "killed": killed,
        "moments": [round(moment, 3) for moment in moments],
        "code": ended.code,
        "problems": problems,
        "durations": durations,
    }


def place(output: str, folder: Path, validation_steps: int) -> str:
    """Where an attempt was, by what it had printed and left: an evaluation follows the checkpoint of its step, and ends by
    `status.json`."""
    if "backtracking:" in output:
        done = max((int(one.name.split("-")[1]) for one in RunFolder(folder).checkpoints("backtracking")), default=0)
        measured = json.loads((folder / STATUS).read_text())["step"] if (folder / STATUS).exists() else 0
        if done - done % validation_steps > measured:
            return "evaluation"
    stages = {"backtracking: 100%": "results", "backtracking:": "stage 2", "degradation:": "stage 1"}
    return next((place for words, place in stages.items() if words in output), "loading")


def at_boundaries(mode: str, every: int = 1) -> dict[str, Any]:
    """Resumes from what a SIGKILL leaves at each operation on files of a run: before it, and, where a file is opened to be
    written, when it is empty.

    Args:
        mode (`str`): `full` or `adapter`.
        every (`int`): Try every so manieth.
    """
    notes, started = Notebook(f"boundaries-{mode}"), time.monotonic()
    with scratch(f"boundaries-{mode}") as folder:
        runs, copies, output = Runs(folder / "inputs"), folder / "copies", folder / "killed-run"
        settings = {**SHORT, **MODES[mode]}
        with runs.server(hash_seed=1) as server:
            runs.undisturbed(server, folder / "undisturbed-run", **settings)
            noted = {"folder": str(output), "copies": str(copies)}
            ended = server.run(runs.arguments(output, **settings), snapshots=noted)
            if ended.code:
                raise RuntimeError(f"The run that notes its operations failed:\n{ended.output}")
            seen, total, tried = set(), 0, 0
            for told in sorted(copies.glob("*.json")):
                total += 1
                state = json.dumps([contents(told.with_suffix("")), everything(told.with_suffix(""))])
                if state in seen:
                    continue
                seen.add(state)
                if len(seen) % every:
                    continue
                tried += 1
                what = json.loads(told.read_text())
                key = f"{told.stem} {what['operation']} {what['file']}{' (emptied)' if what['torn'] else ''}"
                if key in notes:
                    continue
                shutil.rmtree(output, ignore_errors=True)
                shutil.move(told.with_suffix(""), output)
                ended = server.run(runs.arguments(output, **settings) + LATEST)
                problems = [f"exit status {ended.code}: {' '.join(ended.told[-3:])}"] if ended.code else []
                notes.add(key, code=ended.code, problems=problems or differences(folder / "undisturbed-run", output))
                tell(notes, key)
    rows = notes.rows
    return notes.publish(
        mode=mode,
        operations=total,
        states=len(seen),
        tried=len(rows),
        resumed=sum(row["code"] == 0 for row in rows),
        equal=sum(not row["problems"] for row in rows),
        seconds=round(time.monotonic() - started),
    )


def everything(folder: Path) -> list[tuple[str, int]]:
    """Names and sizes of all in a folder, checkpoints included."""
    return sorted(
        (str(file.relative_to(folder)), file.stat().st_size if file.is_file() else -1) for file in folder.rglob("*")
    )


def tell(notes: Notebook, key: Any) -> None:
    row = notes.rows[-1]
    print(f"{notes.name} {key}: {'; '.join(row['problems']) or 'equal'}", file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mode", choices=list(MODES), default="full")
    parser.add_argument("--boundaries", action="store_true", help="kill at every operation on files")
    parser.add_argument("--every", type=int, default=1, help="of the operations, try every so manieth")
    parsed = parser.parse_args(arguments)
    if parsed.boundaries:
        result = at_boundaries(parsed.mode, parsed.every)
    else:
        result = random_kills(parsed.mode, parsed.kills, parsed.seed)
    print(json.dumps({name: value for name, value in result.items() if name != "wrong"}, indent=2))
    for row in result["wrong"]:
        print(row)
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
