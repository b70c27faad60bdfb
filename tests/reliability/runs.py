"""The runs that are disturbed, what two of them have to have in common, and a notebook of what was measured."""

import functools
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import forks
import tiny
from forks import ROOT, Ended, ForkServer


RESULTS = ROOT / "benchmarks" / "results" / "reliability"
WORK = ROOT / "outputs" / "reliability"
LATEST = ["--resume_from_checkpoint", "latest"]
# Both stages, an average, the adaptive schedule, and a checkpoint of every step, of which the oldest are deleted.
SETTINGS = {
    "degradation_steps": 4,
    "num_path_nodes": 3,
    "max_train_steps": 6,
    "steps_per_target": 2,
    "target_schedule": "adaptive",
    "mismatch_steps": 1,
    "target_share": 0.1,
    "use_ema": True,
    "checkpointing_steps": 1,
    "checkpoints_total_limit": 2,
    "validation_steps": 2,
}
# The same with as few operations on files as there are kinds of them.
SHORT = {
    **SETTINGS,
    "degradation_steps": 2,
    "num_path_nodes": 2,
    "max_train_steps": 3,
    "steps_per_target": 1,
    "checkpoints_total_limit": 1,
}
MODES: dict[str, dict[str, Any]] = {
    "full": {},
    "adapter": {"lora_rank": 2},
    # The best student is kept and training ends early: after each step, whose evaluation takes longer than the step.
    "best": {
        "validation_steps": 1,
        "num_evaluation_prompts": 24,
        "metric_for_best_model": "drift_mean",
        "load_best_model_at_end": True,
        "early_stopping_patience": 3,
        "max_train_steps": 12,
    },
}
# What two equal runs differ in: time (`waits` has a row for each time that a target was loaded, after a resumption, too),
# memory, a path's random id, and where they were written.
_OWN = {"seconds", "seconds_per_image", "peak_memory_mb", "waits", "id"}
_OWN |= {"output_dir", "resume_from_checkpoint", "command"}
_ASIDE = {"checkpoints", "settings", "logs", "evaluation"}


class Runs:
    """A teacher, prompts, and the command lines of runs of it.

    Args:
        folder (`Path`): For everything; emptied.
    """

    def __init__(self, folder: Path):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.folder = folder
        self.teacher = tiny.save_teacher(folder / "teacher")
        self.prompts = tiny.write_prompts(folder)

    def arguments(self, output: Path, /, **changes: Any) -> list[str]:
        from script import arguments

        return arguments(output, self.teacher, self.prompts, **{**SETTINGS, **changes})

    def server(self, hash_seed: int = 0, **environment: str) -> ForkServer:
        return ForkServer(self.folder / "server", hash_seed, **environment)

    def undisturbed(self, server: ForkServer, output: Path, **changes: Any) -> Ended:
        """A run that nothing befalls.

        Raises:
            RuntimeError: If it fails; nothing can be measured then.
        """
        ended = server.run(self.arguments(output, **changes))
        if ended.code:
            raise RuntimeError(f"An undisturbed run failed:\n{ended.output}")
        return ended


def differences(one: Path, two: Path) -> list[str]:
    """The files in which two runs' results differ: weights, nodes, images and configs byte for byte; `report.json`,
    `path.json` and `node.json` in all but time, memory, ids and places; the card in all but its tables and these."""
    first, second = contents(one), contents(two)
    return sorted(name for name in first.keys() | second.keys() if first.get(name) != second.get(name))


def contents(folder: Path) -> dict[str, str]:
    """The results in a run's folder: a file's name -> what has to be equal in it."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        if "draft" in file.name:
            found[str(name)] = "a draft that was left behind"
        elif file.is_file() and name.parts[0] not in _ASIDE and not name.name.endswith(".lock"):
            found[str(name)] = _told(file, folder)
    return found


def _told(file: Path, folder: Path) -> str:
    if file.suffix == ".json":
        try:
            content = _common(json.loads(file.read_text()))
        except ValueError as error:
            return f"no JSON: {error}"
        if file.name == "node.json":
            content.pop("path", None)
        text = json.dumps(content, sort_keys=True)
    elif file.name == "settings.yaml":
        text = re.sub(r"^output_dir: .*$", "", file.read_text(), flags=re.MULTILINE)
    elif file.name == "README.md":
        lines = file.read_text().splitlines()
        text = "\n".join(
            line for line in lines if not re.match(r"\||accelerate launch|- `(output_dir|resume_from)", line)
        )
    else:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    return re.sub(rf"\b{re.escape(folder.name)}\b", "RUN", text.replace(str(folder), "FOLDER"))


def _common(content: Any) -> Any:
    if isinstance(content, dict):
        sizes = all(isinstance(value, int) for value in content.values())  # of files that have time and places in them
        return {k: None if sizes and "." in k else _common(v) for k, v in content.items() if k not in _OWN}
    return [_common(value) for value in content] if isinstance(content, list) else content


def snapshot(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file of a folder with its SHA-256 and the time of its last change."""
    return {
        str(file.relative_to(folder)): (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns)
        if file.is_file()
        else ("", 0)
        for file in sorted(folder.rglob("*"))
    }


def is_clear(ended: Ended, *named: str, lines: int = 3) -> list[str]:
    """What speaks against an error's being clear: an empty list for one that ends with 2, tells what is wrong in so many
    lines at most, names what was asked for, and shows no traceback."""
    problems = []
    if ended.code != 2:
        problems.append(f"exit status {ended.code}")
    if "Traceback" in ended.output:
        problems.append("a traceback")
    told = errors(ended)
    if not told:
        problems.append("nothing is told")
    if len(told) > lines:
        problems.append(f"{len(told)} lines")
    problems += [f"{name!r} is not named" for name in named if name not in " ".join(told)]
    return problems


def errors(ended: Ended) -> list[str]:
    """The lines in which an attempt tells what went wrong: its last ones, from the one that begins with a program's name or
    an exception's on."""
    lines = ended.told
    starts = [number for number, line in enumerate(lines) if _ERROR.match(line)]
    return lines[starts[-1] :] if starts else []


_ERROR = re.compile(
    r"(train_disback(\.py)?|diffusers-disback|usage|[\w.]*(Error|Exception|Interrupt)): ", re.IGNORECASE
)


# What was measured -------------------------------------------------------------------------------------------------


class Notebook:
    """The rows of a measurement, one a case, so that it can be resumed after a break; and its result.

    Rows lie in `outputs/reliability` and are kept for as long as the sources are the same.

    Args:
        name (`str`): Of the measurement.
    """

    def __init__(self, name: str):
        self.name = name
        self.file = WORK / f"{name}-{sources_digest()}.jsonl"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict[str, Any]] = []
        if self.file.exists():
            self.rows = [json.loads(line) for line in self.file.read_text().splitlines() if line.endswith("}")]

    def __contains__(self, key: str) -> bool:
        return any(row["key"] == key for row in self.rows)

    def add(self, key: str, **row: Any) -> None:
        """Writes down a case."""
        self.rows.append({"key": key, **row})
        with open(self.file, "a") as stream:
            stream.write(json.dumps(self.rows[-1]) + "\n")

    def publish(self, **result: Any) -> dict[str, Any]:
        """Writes the result into the repository, with the rows of what went wrong."""
        RESULTS.mkdir(parents=True, exist_ok=True)
        wrong = [row for row in self.rows if row.get("problems")]
        content = {"sources": sources_digest(), **result, "wrong": wrong}
        (RESULTS / f"{self.name}.json").write_text(json.dumps(content, indent=2) + "\n")
        return content


@functools.cache
def sources_digest() -> str:
    """Of the library, the script and this harness."""
    digest = hashlib.sha256()
    for folder in (ROOT / "src", forks.SCRIPT.parent, forks.HERE):
        for file in sorted(folder.rglob("*.py")):
            digest.update(f"{file.relative_to(ROOT)} {hashlib.sha256(file.read_bytes()).hexdigest()}".encode())
    return digest.hexdigest()[:12]


@contextmanager
def scratch(name: str) -> Iterator[Path]:
    """A folder for one measurement, deleted afterwards."""
    folder = WORK / name
    for line in Path("/proc/mounts").read_text().splitlines():  # of a measurement that was killed
        if Path(line.split()[1]).is_relative_to(folder):
            subprocess.run(["umount", "-l", line.split()[1]], check=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
