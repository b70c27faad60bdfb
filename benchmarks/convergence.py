"""Does the path help, how much, and when should the target change: the same task with and without, several seeds each.

    python benchmarks/convergence.py --task toy                     # what is not there yet, then tables and plots
    python benchmarks/convergence.py --task shapes --seeds 0 1 2 3 4
    python benchmarks/convergence.py --task mnist                   # the judged world of pictures; digits is the one before it
    python benchmarks/convergence.py --task toy --report            # tables and plots of what is there
    python benchmarks/convergence.py --task toy --small --output /tmp/small

Every arm and seed is one line of `benchmarks/results/convergence/<task>/<regime>.jsonl`, written as it ends: a run that was cut
off goes on, and several processes share the work. Costs include stage 1, on three axes: generator updates (of stage
1: the fake score's), network evaluations (forward 1, backward 2; per sample of a batch), seconds.
"""

import argparse
import fcntl
import importlib
import itertools
import json
import math
import os
import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from scripts import set_threads

from diffusers_disback.evaluation.plots import pyplot


HERE = Path(__file__).parent
PICTURES = ("digits", "mnist")
AXES = ("updates", "evaluations", "seconds")
Result = dict[str, Any]


@contextmanager
def locked(file: Path, wait: bool = True) -> Iterator[bool]:
    """Whether this process holds a lock file. The lock ends with the process, however it ends."""
    with open(file, "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


@contextmanager
def claimed(file: Path, arm: str, seed: int) -> Iterator[bool]:
    """Whether this process is the one to run an arm's seed, of which the file has no line yet."""
    lock = file.with_suffix(f".{arm}-{seed}.lock")
    with locked(lock, wait=False) as ours:
        yield ours and not any(row["seed"] == seed for row in read(file).get(arm, []))
        if ours:
            lock.unlink(missing_ok=True)


def run(task: Any, regimes: list[str], arms: list[str], seeds: list[int], folder: Path, small: bool) -> None:
    """Runs what is missing: the seeds of an arm side by side where the task can, else one after the other."""
    groups = [seeds] if task.SIDE_BY_SIDE else [[seed] for seed in seeds]
    folder.mkdir(parents=True, exist_ok=True)
    arms_of = getattr(task, "arms_of", lambda regime: arms)  # of a task whose regimes do not have all of them
    for regime, group, arm in itertools.product(regimes, groups, arms):
        if arm not in arms_of(regime):
            continue
        file = folder / f"{regime}.jsonl"
        with ExitStack() as claims:
            ours = [seed for seed in group if claims.enter_context(claimed(file, arm, seed))]
            if not ours:
                continue
            print(f"{regime}: {arm}, seeds {' '.join(map(str, ours))}", file=sys.stderr, flush=True)
            settings, results = task.run(regime, arm, ours, small)
            write(
                file,
                [
                    {"regime": regime, "arm": arm, "seed": s, **settings, **r}
                    for s, r in zip(ours, results, strict=True)
                ],
            )


def write(file: Path, results: list[Result]) -> None:
    """Adds lines to a regime's file, in the order of arms and seeds: all of it whole, or as it was."""
    lock = file.with_suffix(".lock")
    with locked(lock):
        there = [row for rows in read(file).values() for row in rows]
        rows = sorted([*there, *results], key=lambda row: (row["arm"], row["seed"]))
        draft = file.with_suffix(".draft")
        draft.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(draft, file)


def read(file: Path) -> dict[str, list[Result]]:
    """Arm -> the results of its seeds, in order."""
    found: dict[str, list[Result]] = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        result = json.loads(line)
        found.setdefault(result["arm"], []).append(result)
    return {arm: sorted(results, key=lambda result: result["seed"]) for arm, results in found.items()}


# What is read off a curve ------------------------------------------------------------------------------------------


def crossing(result: Result, threshold: float) -> int | None:
    """The first place of the curve from which on the distance stays at or below the threshold; `None` if it does not."""
    distances, place = result["curve"]["distance"], None
    for k in range(len(distances) - 1, -1, -1):
        if distances[k] > threshold:
            break
        place = k
    return place


def cost(result: Result, threshold: float, axis: str) -> float:
    """What it took to cross the threshold for good, stage 1 included; the whole budget if it never did."""
    place = crossing(result, threshold)
    value = result["curve"][axis][-1 if place is None else place]
    return value + (result["stage_1"]["updates"] if axis == "updates" else 0)  # the other two count from the start


def final(result: Result) -> float:
    """The distance that a run settles at: the median of the curve's last fifth."""
    distances = result["curve"]["distance"]
    return median(distances[-max(len(distances) // 5, 1) :])


def settled(results: list[Result]) -> float:
    """The distance that runs settle at: the median over seeds."""
    return median(final(result) for result in results)


def bootstrap(values: list[float], level: float = 0.9, draws: int = 2000) -> tuple[float, float]:
    """The interval of the median, from resampled seeds."""
    rng = random.Random(0)
    medians = sorted(median(rng.choices(values, k=len(values))) for _ in range(draws))
    tail = (1 - level) / 2
    return medians[math.floor(tail * draws)], medians[math.ceil((1 - tail) * draws) - 1]


def ratio_interval(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """The median over seeds of their cost over ours (above 1: ours is cheaper), and its 90 % interval."""
    ratios = [max(b, 1) / max(a, 1) for a, b in zip(ours, theirs, strict=True)]
    return median(ratios), *bootstrap(ratios)


# What is shown -----------------------------------------------------------------------------------------------------


def thresholds(found: dict[str, list[Result]]) -> list[float]:
    """2 x and 1.25 x the distance that the runs without a path are at in the end: of the budget, or of the longer runs of a
    held-out task."""
    level = settled(found.get("reference", found["none"]))
    return [float(f"{factor * level:.3g}") for factor in (2.0, 1.25)]


def within_budget(found: dict[str, list[Result]], budget: int) -> dict[str, list[Result]]:
    """The arm without a path cut off at the budget, the whole of it as `reference`, if it was run for longer."""
    if all(result["curve"]["updates"][-1] <= budget for result in found["none"]):
        return found
    cut = []
    for result in found["none"]:
        rows = sum(updates <= budget for updates in result["curve"]["updates"])
        cut.append({**result, "curve": {name: column[:rows] for name, column in result["curve"].items()}})
    return {**found, "none": cut, "reference": found["none"]}


def table(found: dict[str, list[Result]], arms: list[str], measures: list[str]) -> str:
    """Costs to fixed distances and the end, a row for each arm: medians with 90 % intervals over seeds."""
    levels = thresholds(found)
    heads = ["arm", "seeds"] + [f"{axis} to {level:g}" for level in levels for axis in AXES]
    heads += [f"never {level:g}" for level in levels] + ["final distance", *[f"final {m}" for m in measures]]
    lines = ["| " + " | ".join(heads) + " |", "| " + " | ".join(["---"] * len(heads)) + " |"]
    for arm in (arm for arm in arms if arm in found):
        results, cells = found[arm], [arm, str(len(found[arm]))]
        for level in levels:
            cells += [interval([cost(result, level, axis) for result in results]) for axis in AXES]
        cells += [str(sum(crossing(result, level) is None for result in results)) for level in levels]
        for measure in ["distance", *measures]:
            tails = [median(r["curve"][measure][-max(len(r["curve"][measure]) // 10, 1) :]) for r in results]
            cells.append(interval(tails))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def paired(found: dict[str, list[Result]], arm: str, control: str, level: float) -> tuple[float, float, float]:
    """How many times fewer evaluations an arm takes to a threshold than a control: the median over their common seeds, and its 90 %
    interval."""
    own = {name: {r["seed"]: cost(r, level, "evaluations") for r in found[name]} for name in (arm, control)}
    both = sorted(own[arm].keys() & own[control].keys())
    return ratio_interval([own[arm][seed] for seed in both], [own[control][seed] for seed in both])


def told(ratio: tuple[float, float, float]) -> str:
    return "{:.2f} ({:.2f}-{:.2f})".format(*ratio)


def interval(values: list[float], form: str = ".4g") -> str:
    low, high = bootstrap(values)
    return f"{median(values):{form}} ({low:{form}}-{high:{form}})"


def comparison(found: dict[str, list[Result]], arms: list[str]) -> str:
    """How many times fewer network evaluations than without a path, and than a warm fake score, seed by seed; and whether an
    arm's interval reaches to within 10 % of the better of none and warm, and of the better of warm and path."""
    level = thresholds(found)[-1]
    lines = [
        f"| arm | against none, to {level:g} | against warm | evaluations, 90 % interval | 1.1 x better of none, warm | 1.1 x "
        "better of warm, path |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    costs = {arm: {r["seed"]: cost(r, level, "evaluations") for r in results} for arm, results in found.items()}
    for arm in (arm for arm in arms if arm in found):
        cells = [arm]
        for other in ("none", "warm"):
            cells.append(told(paired(found, arm, other, level)) if other in found else "")
        low, high = bootstrap(list(costs[arm].values()))
        cells.append(f"{low:.4g}-{high:.4g}")
        for controls in (("none", "warm"), ("warm", "path")):
            there = [median(costs[control].values()) for control in controls if control in costs]
            cells.append(f"{1.1 * min(there):.4g}: {'yes' if low <= 1.1 * min(there) else 'no'}" if there else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(found: dict[str, list[Result]], arms: list[str], title: str, file: Path) -> None:
    """Distance over each axis: medians over seeds, with the spread from the smallest to the largest."""
    plt = pyplot()
    figure, axes = plt.subplots(1, len(AXES), figsize=(15, 4), sharey=True)
    for panel, axis in zip(axes, AXES, strict=True):
        for colour, arm in enumerate(arm for arm in arms if arm in found):
            curves = [result["curve"] for result in found[arm]]
            extra = [result["stage_1"]["updates"] if axis == "updates" else 0 for result in found[arm]]
            across = [
                median(curve[axis][k] + more for curve, more in zip(curves, extra, strict=True))
                for k in range(len(curves[0]["updates"]))
            ]
            distances = list(zip(*(curve["distance"] for curve in curves), strict=True))
            panel.plot(
                across,
                [median(values) for values in distances],
                color=f"C{colour % 10}",
                lw=1.2,
                ls="-" if colour < 10 else "--",
                label=arm,
            )
            spread = zip(*((min(values), max(values)) for values in distances), strict=True)
            panel.fill_between(across, *spread, color=f"C{colour % 10}", alpha=0.12, lw=0)
        for level in thresholds(found):
            panel.axhline(level, color="0.6", lw=0.8, ls=":")
        panel.set(yscale="log", xlabel=f"{axis}, stage 1 included")
    axes[0].set_ylabel("distance")
    axes[0].set_title(title, loc="left", fontsize=9)
    axes[-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=90)
    plt.close(figure)


def report(task: Any, regimes: list[str], arms: list[str], folder: Path) -> None:
    """Prints the tables and writes them, and a plot of each regime, beside the results."""
    parts = []
    for regime in regimes:
        found = read(folder / f"{regime}.jsonl")
        if "none" not in found:
            continue
        found = within_budget(found, task.REGIMES[regime].updates)
        parts.append(f"## {regime}\n\n{table(found, arms, task.MEASURES)}\n\n{comparison(found, arms)}\n")
        plot(found, arms, regime, folder / f"{regime}.png")
    (folder / "tables.md").write_text("\n".join(parts))
    print("\n".join(parts))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", "--world", choices=("toy", "shapes", *PICTURES), required=True)
    parser.add_argument("--regimes", nargs="+", help="by default all")
    parser.add_argument("--arms", nargs="+", help="by default all")
    parser.add_argument("--seeds", nargs="+", type=int, help="by default the task's own")
    parser.add_argument("--output", default=HERE / "results" / "convergence", type=Path)
    parser.add_argument("--small", action="store_true", help="a setting of seconds, to see that everything runs")
    parser.add_argument("--report", action="store_true", help="run nothing")
    options = parser.parse_args(arguments)
    set_threads()
    task: Any = importlib.import_module("pictures_task" if options.task in PICTURES else f"{options.task}_task")
    if options.task in PICTURES:
        task = task.Task(options.task)
    folder = options.output / options.task
    regimes, arms = options.regimes or list(task.REGIMES), options.arms or list(task.ARMS)
    if not options.report:
        run(task, regimes, arms, options.seeds or task.SEEDS, folder, options.small)
    getattr(task, "report", report)(task, regimes, arms, folder)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    main(sys.argv[1:])
