"""Measures everything that docs/reliability.md promises, writes the figures, prints the page's tables and puts them there.

    python tests/reliability/measure.py                 # all; what was measured of these sources is not measured again
    python tests/reliability/measure.py --jobs 2        # two measurements at once, on two cores
    python tests/reliability/measure.py --only fuzz soak-full
    python tests/reliability/measure.py --tables        # the tables alone, of the figures that are there

A measurement that was broken off is resumed where it was. The figures lie in `benchmarks/results/reliability`.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from forks import HERE, ROOT
from runs import RESULTS, Notebook, sources_digest


PAGE = ROOT / "docs" / "reliability.md"
# Name of the result -> the command that makes it.
MEASUREMENTS = {
    "bad-inputs": ["bad_inputs.py"],
    "kills-adapter-0": ["kills.py", "--kills", "100", "--seed", "0", "--mode", "adapter"],
    "faults-full": ["machine_faults.py", "--mode", "full"],
    "kills-full-0": ["kills.py", "--kills", "100", "--seed", "0", "--mode", "full"],
    "kills-best-0": ["kills.py", "--kills", "30", "--seed", "0", "--mode", "best"],
    "boundaries-full": ["kills.py", "--boundaries", "--mode", "full", "--every", "3"],
    "fuzz": ["fuzz.py", "--cases", "10000", "--seed", "0"],
    "soak-full": ["soak.py", "--steps", "2000"],
    "boundaries-adapter": ["kills.py", "--boundaries", "--mode", "adapter", "--every", "8"],
    "faults-adapter": ["machine_faults.py", "--mode", "adapter", "--every", "11"],
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


def tables() -> dict[str, str]:
    """The page's tables by name, of the results that are there."""
    made: dict[str, str] = {}
    kills = [found for found in map(result, ("kills-full-0", "kills-adapter-0", "kills-best-0")) if found]
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
        made["kills"] = table("roles", "kills", "runs", "resumed", "equal", "where they fell", rows=rows)
    boundaries = [found for found in (result("boundaries-full"), result("boundaries-adapter")) if found]
    if boundaries:
        rows = [[b["mode"], b["operations"], b["states"], b["tried"], b["resumed"], b["equal"]] for b in boundaries]
        names = ("roles", "operations on files", "different states of the folder", "tried", "resumed", "equal")
        made["boundaries"] = table(*names, rows=rows)
    faults = [found for found in (result("faults-full"), result("faults-adapter")) if found]
    if faults:
        rows = [
            [_KINDS[kind], found["mode"], count["cases"], count["as_promised"]]
            for kind in _KINDS
            for found in faults
            if (count := found["counts"].get(kind))
        ]
        rows += [
            [f"{kind}: left out, {why}", found["mode"], 0, 0]
            for found in faults
            for kind, why in found["skipped"].items()
        ]
        made["faults"] = table("fault", "roles", "cases", "as promised", rows=rows)
    if fuzz := result("fuzz"):
        rows = [[name, count["cases"], count["refused"]] for name, count in fuzz["targets"].items()]
        rows.append(["**all**", fuzz["cases"], fuzz["refused"]])
        made["fuzz"] = table("mutated", "cases", "refused by a `ValueError`", rows=rows)
        made["fuzz"] += f"\n\nKinds of other exceptions, partial loads and files outside: {fuzz['kinds_of_wrong']}."
        made["fuzz"] += f" The slowest case took {fuzz['slowest_seconds']} s."
    if bad := result("bad-inputs"):
        rows = [[bad["inputs"], bad["clear"], f"{bad['slowest_seconds']} s"]]
        made["bad inputs"] = table("bad inputs", "clear", "slowest", rows=rows)
    if soak := result("soak-full"):
        counts = [f"{soak[name][0]:g} and {soak[name][1]:g}" for name in ("open_files", "threads")]
        rows = [[soak["steps"], *soak["resident_mb"], f"{soak['growth']:.2%}", *counts]]
        names = ("steps", "MB after 500 steps", "MB at the end", "growth", "open files then", "threads then")
        made["soak"] = table(*names, rows=rows)
    return made


def fill_page(made: dict[str, str]) -> None:
    """Puts tables into docs/reliability.md, each beneath its mark, in place of what stands there up to the next heading."""
    page = PAGE.read_text()
    for name, text in made.items():
        mark = f"<!-- table: {name} -->"
        before, after = page.split(mark)
        heading = re.search(r"^#+ ", after, re.MULTILINE)
        rest = "\n" + after[heading.start() :] if heading else ""
        page = f"{before}{mark}\n\n{text}\n{rest}"
    PAGE.write_text(page)


def table(*names: str, rows: list[list[Any]]) -> str:
    """A Markdown table."""
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(MEASUREMENTS))
    parser.add_argument("--jobs", type=int, default=1, help="measurements at once; each keeps a core busy")
    parser.add_argument("--afresh", action="store_true", help="forget what was measured of these sources")
    parser.add_argument("--tables", action="store_true", help="measure nothing")
    parsed = parser.parse_args(arguments)
    wanted = [] if parsed.tables else parsed.only or list(MEASUREMENTS)
    for name in wanted if parsed.afresh else []:
        (RESULTS / f"{name}.json").unlink(missing_ok=True)
        Notebook(name).file.unlink(missing_ok=True)
    left = [name for name in wanted if not was_measured(name)]
    with ThreadPoolExecutor(parsed.jobs) as jobs:
        right = all(list(jobs.map(run, left)))
    made = tables()
    print("\n\n".join(made.values()))
    fill_page(made)
    return 0 if right else 1


def was_measured(name: str) -> bool:
    """Whether there is a result of these very sources, with nothing wrong."""
    found = result(name)
    return found is not None and found["sources"] == sources_digest() and not found["wrong"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
