"""Faults of the machine under the training script: a full disk, a read-only one, a folder deleted, checkpoints damaged,
signals, and two processes on one folder. Each has to end in a clear error, and the run to be resumed to an equal end.

    python tests/reliability/machine_faults.py [--mode adapter] [--every 5] [--only disk damage ...]

Full and read-only disks are real ones, in memory (`mount -t tmpfs`, which takes root's rights), and failures of the
operation with a number, which need no rights.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from forks import Ended, ForkServer
from runs import LATEST, MODES, Notebook, Runs, differences, errors, is_clear, scratch, snapshot


SIZES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.75, 0.9, 0.97)  # of what an undisturbed run writes
DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "flipped": lambda file: _flip(file),
    "emptied": lambda file: os.truncate(file, 0),
    "missing": lambda file: file.unlink(),
}


class Faults:
    """A place for faulty runs beside an undisturbed one.

    Args:
        folder (`Path`): For everything.
        server (`ForkServer`): Runs them.
        mode (`str`): `full` or `adapter`.
        notes (`Notebook`): Takes the rows.
        every (`int`): Try every so manieth case.
    """

    def __init__(self, folder: Path, runs: Runs, server: ForkServer, mode: str, notes: Notebook, every: int = 1):
        self.runs = runs
        self.server = server
        self.mode = mode
        self.notes = notes
        self.every = every
        self.whole = folder / "undisturbed-run"
        self.output = folder / "faulty-run"
        self.kept = folder / "kept"  # a run that was killed, to begin with again and again
        self.counted = 0
        self.kind = ""
        runs.undisturbed(server, self.whole, **MODES[mode])

    def attempt(self, *more: str, seconds: float | None = None, output: Path | None = None, **hooks: Any) -> Ended:
        """One attempt at the run, to its end or for some seconds."""
        arguments = self.runs.arguments(output or self.output, **MODES[self.mode])
        return self.server.run([*arguments, *more], seconds, **hooks)

    def case(self, key: str, try_it: Callable[[], list[str]]) -> None:
        """Tries a case, unless it is in the notebook or left out, and notes its problems."""
        self.counted += 1
        if self.counted % self.every or key in self.notes:
            return
        shutil.rmtree(self.output, ignore_errors=True)
        started = time.monotonic()
        problems = try_it()
        self.notes.add(key, kind=self.kind, problems=problems, seconds=round(time.monotonic() - started, 1))
        print(f"{self.notes.name} {key}: {'; '.join(problems) or 'as promised'}", file=sys.stderr, flush=True)

    def goes_on(self, output: Path | None = None) -> list[str]:
        """Resumes a run, now without a fault. What is not as in the undisturbed one."""
        ended = self.attempt(*LATEST, output=output)
        if ended.code:
            return [f"going on: exit status {ended.code}: {' '.join(ended.told[-3:])}"]
        return [f"going on: {name} differs" for name in differences(self.whole, output or self.output)]

    def keep(self, stage: str, step: int) -> None:
        """Makes `kept` a run that was killed before a step of a stage."""
        shutil.rmtree(self.output, ignore_errors=True)
        shutil.rmtree(self.kept, ignore_errors=True)
        ended = self.attempt(signal_at_step={"stage": stage, "step": step, "signal": int(signal.SIGKILL)})
        if not ended.killed:
            raise RuntimeError(f"The run was to be killed in {stage}:\n{ended.output}")
        self.output.rename(self.kept)

    def take(self) -> None:
        """Begins with the run that was kept."""
        shutil.copytree(self.kept, self.output)


def told(ended: Ended, *named: str) -> list[str]:
    """What speaks against an error's being clear, with the error itself."""
    problems = is_clear(ended, *named)
    return [f"{', '.join(problems)}: {' '.join(errors(ended) or ended.told[-2:])[-300:]}"] if problems else []


# Disks -------------------------------------------------------------------------------------------------------------


def can_mount() -> bool:
    """Whether this process may mount a disk in memory."""
    with scratch("mount") as folder:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)], capture_output=True)
        if done.returncode == 0:
            subprocess.run(["umount", str(folder)], check=True)
        return done.returncode == 0


@contextmanager
def disk(folder: Path, size: int) -> Iterator[Callable[[str], None]]:
    """A disk in memory of so many bytes; gives a function to mount it anew with other options."""

    def remount(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)

    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], check=True)
    try:
        yield remount
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def full_disks(faults: Faults) -> None:
    """A disk that fills at ten sizes; with more room the run is resumed."""
    # Whole pages, as the disk counts.
    size = sum(-(-file.stat().st_size // 4096) * 4096 for file in faults.whole.rglob("*") if file.is_file())
    place = faults.output.parent / "disk"

    for share in SIZES:

        def try_it(share: float = share) -> list[str]:
            with disk(place, int(share * size)) as remount:
                ended = faults.attempt(output=place / faults.output.name)
                problems = told(ended, str(place))
                remount(f"size={8 * size}")
                return problems + faults.goes_on(place / faults.output.name)

        faults.case(f"a disk of {share:.0%} of what is written", try_it)


def read_only(faults: Faults) -> None:
    """A disk that can be read only, from the beginning, or when a run is resumed."""
    place = faults.output.parent / "disk"

    def from_the_beginning() -> list[str]:
        with disk(place, 1 << 20) as remount:
            remount("ro")
            return told(faults.attempt(output=place / faults.output.name), str(place))

    def when_resumed() -> list[str]:
        with disk(place, 1 << 28) as remount:
            output = place / faults.output.name
            shutil.copytree(faults.kept, output)
            before = snapshot(output)
            remount("ro")
            problems = told(faults.attempt(*LATEST, output=output), str(place))
            problems += ["files changed"] if snapshot(output) != before else []
            remount("rw")
            return problems + faults.goes_on(output)

    faults.keep("backtracking", 3)
    faults.case("a read-only disk from the beginning", from_the_beginning)
    faults.case("a read-only disk when it is resumed", when_resumed)


def failing_operations(faults: Faults) -> None:
    """The operation on files with a number, and all after it, fail: the disk is full, read-only, forbidden or broken."""
    count = faults.output.parent / "count"
    given = {"folder": str(faults.output), "number": 10**9, "fault": "full", "count": str(count)}
    faults.attempt(fail_at=given)
    total = int(count.read_text())
    for fault, cases in {"full": 10, "read-only": 5, "forbidden": 5, "broken": 5}.items():
        for number in sorted({max(1, round(total * (case + 0.5) / cases)) for case in range(cases)}):

            def try_it(fault: str = fault, number: int = number) -> list[str]:
                hook = {"folder": str(faults.output), "number": number, "fault": fault}
                problems = told(faults.attempt(fail_at=hook), str(faults.output))
                return problems + faults.goes_on()

            faults.case(f"{fault} from operation {number} of {total} on", try_it)


def deleted_folder(faults: Faults) -> None:
    """The output folder is deleted before a step: the run ends in a clear error, or as if nothing had been. What it has left
    since is resumed to an equal end, or refused in a clear error; without it the same command makes it anew."""
    for stage, step in (
        ("degradation", 0),
        ("degradation", 2),
        ("backtracking", 0),
        ("backtracking", 3),
        ("backtracking", 5),
    ):

        def try_it(stage: str = stage, step: int = step) -> list[str]:
            hook = {"stage": stage, "step": step, "folder": str(faults.output)}
            ended = faults.attempt(delete_at_step=hook)
            if ended.code == 0:
                missing = differences(faults.whole, faults.output)
                return [f"calls itself finished without {', '.join(missing)}"] if missing else []
            problems = told(ended, str(faults.output))
            again = faults.attempt(*LATEST)
            if again.code:
                problems += told(again, str(faults.output))
                shutil.rmtree(faults.output)
                again = faults.attempt(*LATEST)
            return problems + (
                [f"exit status {again.code}"] if again.code else differences(faults.whole, faults.output)
            )

        faults.case(f"the folder deleted before step {step} of {stage}", try_it)


# Checkpoints -------------------------------------------------------------------------------------------------------


def damaged_checkpoints(faults: Faults) -> None:
    """Each file of the latest checkpoint, damaged in four ways: `latest` falls back to the one before and says so; asked for
    by name it is refused by name."""
    for stage, step in (("degradation", 3), ("backtracking", 4)):
        faults.keep(stage, step)
        latest = max((faults.kept / "checkpoints" / stage).glob("checkpoint-*"))
        names = sorted(str(file.relative_to(latest)) for file in latest.rglob("*") if file.is_file())
        place = faults.output / latest.relative_to(faults.kept)
        for name in names:
            for damage, do in DAMAGES.items():

                def falls_back(place: Path = place, name: str = name, do: Any = do) -> list[str]:
                    faults.take()
                    do(place / name)
                    ended = faults.attempt(*LATEST)
                    if ended.code:
                        return [f"exit status {ended.code}: {' '.join(ended.told[-3:])}"]
                    silent = [] if any(place.name in line for line in ended.told) else ["not a word of it"]
                    return silent + differences(faults.whole, faults.output)

                def is_refused(place: Path = place, name: str = name, do: Any = do) -> list[str]:
                    faults.take()
                    do(place / name)
                    before = snapshot(faults.output)
                    problems = told(faults.attempt("--resume_from_checkpoint", str(place)), place.name)
                    after = {
                        file: seen for file, seen in snapshot(faults.output).items() if not file.endswith(".lock")
                    }
                    before = {file: seen for file, seen in before.items() if not file.endswith(".lock")}
                    return problems + (["files changed"] if after != before else [])

                faults.case(f"{stage}: {name} {damage}", falls_back)
                if damage == "flipped":
                    faults.case(f"{stage}: {name} {damage}, by name", is_refused)

        def all_damaged(stage: str = stage) -> list[str]:
            faults.take()
            for checkpoint in (faults.output / "checkpoints" / stage).glob("checkpoint-*"):
                _flip(checkpoint / "fake_score" / "optimizer.bin")
            ended = faults.attempt(*LATEST)
            if ended.code:
                return told(ended, "checkpoint-")
            return differences(faults.whole, faults.output)

        faults.case(f"{stage}: every checkpoint damaged", all_damaged)

        def folders_of_a_user(stage: str = stage, place: Path = place) -> list[str]:
            faults.take()
            others = [place.with_name(f"{place.name}-backup"), place.with_name("checkpoint-foo")]
            for other in others:
                shutil.copytree(place, other)
            before = [snapshot(other) for other in others]
            problems = faults.goes_on()
            return problems + (["a user's folder changed"] if [snapshot(other) for other in others] != before else [])

        faults.case(f"{stage}: a user's folders beside checkpoints", folders_of_a_user)


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) * 2 // 3] ^= 0x10
    file.write_bytes(content)


# Signals and other processes ---------------------------------------------------------------------------------------


def signals(faults: Faults) -> None:
    """SIGTERM and SIGINT in both stages: a line, an exit status of their own, and a checkpoint, so that no step is lost."""
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        for stage, step in (("degradation", 2), ("backtracking", 3)):

            def try_it(number: int = number, code: int = code, stage: str = stage, step: int = step) -> list[str]:
                hook = {"stage": stage, "step": step, "signal": int(number)}
                ended = faults.attempt(signal_at_step=hook)
                problems = [] if ended.code == code else [f"exit status {ended.code}, not {code}"]
                problems += ["a traceback"] if "Traceback" in ended.output else []
                saved = list((faults.output / "checkpoints" / stage).glob(f"checkpoint-{step + 1:06d}/stage.json"))
                return problems + ([] if saved else ["the step is not saved"]) + faults.goes_on()

            faults.case(f"{signal.Signals(number).name} in step {step} of {stage}", try_it)


def two_processes(faults: Faults) -> None:
    """Two processes resume one folder at once: one ends as the undisturbed run, the other is refused."""
    faults.keep("backtracking", 2)

    def try_it() -> list[str]:
        faults.take()
        arguments = [*faults.runs.arguments(faults.output, **MODES[faults.mode]), *LATEST]
        both = [faults.server.start(arguments), faults.server.start(arguments)]
        one, other = sorted((attempt.wait() for attempt in both), key=lambda ended: ended.code)
        problems = [f"exit status {one.code}: {' '.join(one.told[-3:])}"] if one.code else []
        return problems + told(other, str(faults.output)) + differences(faults.whole, faults.output)

    faults.case("two processes on one folder", try_it)


KINDS: dict[str, tuple[Callable[[Faults], None], ...]] = {
    "disk": (full_disks, read_only),
    "operations": (failing_operations,),
    "deleted": (deleted_folder,),
    "damage": (damaged_checkpoints,),
    "signals": (signals,),
    "processes": (two_processes,),
}


def measure(mode: str, every: int = 1, only: list[str] | None = None) -> dict[str, Any]:
    """Tries all faults, or some kinds of them."""
    notes, started = Notebook(f"faults-{mode}"), time.monotonic()
    kinds = only or list(KINDS)
    skipped = {}
    if "disk" in kinds and not can_mount():
        kinds.remove("disk")
        skipped["disk"] = "this process may not mount disks"
    with scratch(f"faults-{mode}") as folder:
        runs = Runs(folder / "inputs")
        with runs.server() as server:
            faults = Faults(folder, runs, server, mode, notes, every)
            for function in (function for kind in kinds for function in KINDS[kind]):
                faults.kind = function.__name__
                function(faults)
    counts = {row["kind"]: {"cases": 0, "as_promised": 0} for row in notes.rows}
    for row in notes.rows:
        counts[row["kind"]]["cases"] += 1
        counts[row["kind"]]["as_promised"] += not row["problems"]
    return notes.publish(mode=mode, counts=counts, skipped=skipped, seconds=round(time.monotonic() - started))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", choices=list(MODES), default="full")
    parser.add_argument("--every", type=int, default=1, help="try every so manieth case")
    parser.add_argument("--only", nargs="+", choices=list(KINDS))
    parsed = parser.parse_args(arguments)
    result = measure(parsed.mode, parsed.every, parsed.only)
    print(json.dumps({name: value for name, value in result.items() if name != "wrong"}, indent=2))
    for row in result["wrong"]:
        print(f"{row['key']}: {row['problems']}")
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
