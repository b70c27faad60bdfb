"""The tables of the judged worlds: every arm at equal settings and at its own best, against no path and against the best control."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from convergence import Result, cost, crossing, final, interval, paired, plot, read, settled, told


FACTORS = (2.0, 1.25, 1.0)  # of the distance that the arm without a path settles at
CONTROLS = ("none", "ramp", "warm")
Found = dict[str, list[Result]]


def levels(found: Found) -> list[float]:
    """The thresholds of a regime."""
    return [float(f"{factor * settled(found['none']):.4g}") for factor in FACTORS]


def costs(results: list[Result], level: float) -> list[float]:
    """Evaluations to a threshold, seed by seed."""
    return [cost(result, level, "evaluations") for result in results]


def best_control(found: Found, level: float) -> str:
    """The arm without a path that takes the fewest evaluations to a threshold, in medians."""
    return min((name for name in CONTROLS if name in found), key=lambda name: median(costs(found[name], level)))


def at_path_end(result: Result, measure: str) -> float:
    """A measure of the optimiser when a path of these settings has been walked, on any arm."""
    settings, curve = result["settings"], result["curve"]
    updates = settings["num_path_nodes"] * settings["steps_per_target"]
    place = min(range(1, len(curve["updates"])), key=lambda k: abs(curve["updates"][k] - updates))
    return curve[measure][place]


def table(found: Found, arms: Sequence[str]) -> str:
    """A row for each arm."""
    at = levels(found)
    heads = ["arm", "stage 1's updates; nodes", *(f"evaluations to {level:g}" for level in at)]
    heads += [f"never {level:g}" for level in at]
    heads += [f"none's over its own, to {level:g}" for level in at]
    heads += ["final distance", "lower than none's", "classes", "gradient's norm, second moment's root after N K"]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for arm in (arm for arm in arms if arm in found):
        results = found[arm]
        nodes = sorted(result["stage_1"]["nodes"] for result in results)
        first = median(result["stage_1"]["updates"] for result in results)
        cells = [arm, f"{first:.0f}; {nodes[0]}" + (f"-{nodes[-1]}" if nodes[0] < nodes[-1] else "")]
        cells += [interval(costs(results, level), ".0f") for level in at]
        cells += [str(sum(crossing(result, level) is None for result in results)) for level in at]
        cells += [told(paired(found, arm, "none", level)) for level in at]
        ends = {result["seed"]: final(result) for result in results}
        theirs = {result["seed"]: final(result) for result in found["none"]}
        lower = sum(ends[seed] < theirs[seed] for seed in ends.keys() & theirs.keys())
        cells += [interval(list(ends.values()), ".3g"), f"{lower} of {len(ends)}"]
        cells += [f"{median(result['curve']['classes'][-1] for result in results):.2f}"]
        measures = ("gradient_norm", "second_moment_root")
        cells += [", ".join(f"{median(at_path_end(result, one) for result in results):.2g}" for one in measures)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(regimes: dict[str, Found], arms: Sequence[str] = ("path", "default")) -> str:
    """What the claim comes to: a row for each regime and arm, against no path and against the best control at each threshold."""
    heads = ["start and rates", "arm", *(f"against none, to {factor:g}x" for factor in FACTORS)]
    heads += [f"against the best control, to {factor:g}x" for factor in FACTORS]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for regime, found in regimes.items():
        for arm in (arm for arm in arms if arm in found):
            cells = [regime, arm, *(told(paired(found, arm, "none", level)) for level in levels(found))]
            for level in levels(found):
                control = best_control(found, level)
                cells.append(f"{control}: {told(paired(found, arm, control, level))}")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def found_of(task: Any, regime: str, folder: Path) -> Found:
    """The results of a regime; of arms whose own best settings are those of another regime, its results."""
    found = read(folder / f"{regime}.jsonl")
    shared = task.REGIMES[regime].shares
    return (read(folder / f"{shared}.jsonl") | found) if shared else found


def report(task: Any, regimes: list[str], arms: list[str], folder: Path) -> None:
    """Prints the tables and writes them, and a plot of each regime, beside the results."""
    whole = {regime: found_of(task, regime, folder) for regime in regimes}
    whole = {regime: found for regime, found in whole.items() if "none" in found}
    parts = [summary(whole)] if whole else []
    for regime, found in whole.items():
        parts.append(f"## {regime}\n\n{table(found, arms)}")
        plot(found, arms, regime, folder / f"{regime}.png")
    (folder / "tables.md").write_text("\n\n".join(parts) + "\n")
    print("\n\n".join(parts))
