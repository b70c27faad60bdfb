"""Measures everything that docs/reliability.md promises, writes the figures, and prints the page's tables.

    python tests/reliability/measure.py                 # all; what was measured of these sources is not measured again
    python tests/reliability/measure.py --only fuzz soak
    python tests/reliability/measure.py --tables        # the tables alone, of the figures that are there

A measurement that was broken off is gone on with where it was. The figures lie in `benchmarks/results/reliability`.
"""

import argparse
import json
import subprocess
import sys
import time
from typing import Any

from forks import HERE
from runs import RESULTS, sources_digest


# Name of the result -> the command that makes it.
MEASUREMENTS = {
    "bad-inputs": ["bad_inputs.py"],
    "kills-full-0": ["kills.py", "--kills", "100", "--seed", "0", "--mode", "full"],
    "kills-adapter-0": ["kills.py", "--kills", "100", "--seed", "0", "--mode", "adapter"],
    "boundaries-full": ["kills.py", "--boundaries", "--mode", "full"],
    "boundaries-adapter": ["kills.py", "--boundaries", "--mode", "adapter", "--every", "4"],
    "faults-full": ["faults.py", "--mode", "full"],
    "faults-adapter": ["faults.py", "--mode", "adapter", "--every", "6"],
    "fuzz": ["fuzz.py", "--cases", "10000", "--seed", "0"],
    "soak-full": ["soak.py", "--steps", "2000"],
}
_KINDS = {
    "full_disks": "disk full, at ten sizes",
    "read_only": "disk read-only, from the start and when resumed",
    "failing_operations": "an operation on files fails, and all after it",
    "deleted_folder": "output folder deleted during the run",
    "damaged_checkpoints": "checkpoint's file truncated, flipped, emptied or missing",
    "signals": "SIGTERM or SIGINT, in either stage",
    "two_processes": "two processes on one folder",
}


def run(name: str) -> bool:
    """Makes a result. Whether all was as promised."""
    started = time.monotonic()
    command = MEASUREMENTS[name]
    done = subprocess.run([sys.executable, str(HERE / command[0]), *command[1:]], stdout=subprocess.PIPE, text=True)
    print(
        f"{name}: {'as promised' if done.returncode == 0 else 'NOT AS PROMISED'}, {time.monotonic() - started:.0f} s"
    )
    if done.returncode:
        print(done.stdout[-4000:])
    return done.returncode == 0


def result(name: str) -> dict[str, Any] | None:
    """A result that was written, if it was."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else None


def tables() -> str:
    """The page's tables, of the results that are there."""
    parts = []
    kills = [found for found in (result("kills-full-0"), result("kills-adapter-0")) if found]
    if kills:
        rows = [
            [
                k["mode"],
                k["kills"],
                k["runs"],
                k["resumed"],
                k["equal"],
                ", ".join(f"{v} {n}" for n, v in k["where"].items()),
            ]
            for k in kills
        ]
        parts.append(table("roles", "kills", "runs", "resumed", "equal", "where they fell", rows=rows))
    boundaries = [found for found in (result("boundaries-full"), result("boundaries-adapter")) if found]
    if boundaries:
        rows = [[b["mode"], b["operations"], b["states"], b["tried"], b["resumed"], b["equal"]] for b in boundaries]
        names = ("roles", "operations on files", "different states of the folder", "tried", "resumed", "equal")
        parts.append(table(*names, rows=rows))
    faults = [found for found in (result("faults-full"), result("faults-adapter")) if found]
    if faults:
        rows = [
            [_KINDS[kind], f["mode"], count["cases"], count["as_promised"]]
            for kind in _KINDS
            for f in faults
            if (count := f["counts"].get(kind))
        ]
        parts.append(table("fault", "roles", "cases", "as promised", rows=rows))
    if fuzz := result("fuzz"):
        rows = [[name, count["cases"], count["refused"]] for name, count in fuzz["targets"].items()]
        rows.append(["**all**", fuzz["cases"], fuzz["refused"]])
        parts.append(table("mutated", "cases", "refused by a `ValueError`", rows=rows))
        wrong = fuzz["kinds_of_wrong"]
        parts.append(f"Other exceptions, partial loads, files outside: {wrong}. Slowest: {fuzz['slowest_seconds']} s.")
    if bad := result("bad-inputs"):
        rows = [[bad["inputs"], bad["clear"], f"{bad['slowest_seconds']} s"]]
        parts.append(table("bad inputs", "clear", "slowest", rows=rows))
    if soak := result("soak-full"):
        before, after = soak["resident_mb"]
        files, threads = soak["open_files"], soak["threads"]
        counts = [f"{files[0]:g} -> {files[1]:g}", f"{threads[0]:g} -> {threads[1]:g}"]
        rows = [[soak["steps"], before, after, f"{soak['growth']:.2%}", *counts]]
        names = ("steps", "MB after 500 steps", "MB at the end", "growth", "open files", "threads")
        parts.append(table(*names, rows=rows))
    return "\n\n".join(parts)


def table(*names: str, rows: list[list[Any]]) -> str:
    """A Markdown table."""
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(MEASUREMENTS))
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    parsed = parser.parse_args(arguments)
    right = True
    for name in [] if parsed.tables else parsed.only or MEASUREMENTS:
        found = result(name)
        if found and found["sources"] == sources_digest() and not found["wrong"]:
            print(f"{name}: was measured of these sources")
            continue
        right &= run(name)
    print(tables())
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
