"""Everything that only a GPU can show, in parts of at most nine minutes, each of which is skipped where its result is there.

    python benchmarks/gpu.py                      # all parts, one after another
    python benchmarks/gpu.py --parts sdxl step
    python benchmarks/gpu.py --tiny               # a rehearsal of all of it on a CPU, in a minute

A part is a command; its result is `PART.json` in `--output`: the command, the seconds, the exit status, the device, the end of what
it printed, and the figures that it wrote. A part that was cut off by its time is resumed by the next call, where its command
can be. Needs 80 GB of GPU memory at most, bitsandbytes, 40 GB of CPU memory and 12 GB of disk; weights are random or made here.

A rehearsal forks its processes, which import nothing again, and hides a GPU from them. Peaks of memory are then no figures.
"""

import argparse
import gc
import importlib
import json
import os
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from processes import start_python


HERE = Path(__file__).parent
ROOT = HERE.parent
PATHS = [str(place) for place in (ROOT / "src", ROOT / "examples" / "text_to_image")]
LIMIT = 540  # seconds of a part
TAIL = 4000  # characters of what a part printed that are kept
SDXL = ["--memory", "--models", "sdxl", "--stages", "1", "2", "--batch_size", "1"]
FULL = ["--factor", "1", "--latents", "128", "--lora_rank", "64", "--precision", "bf16", "--steps", "50"]
TINY = ["--factor", "0.05", "--latents", "8", "--lora_rank", "2", "--fake_score_updates", "1", "--steps", "2"]
IMPORTED = ["baseline", "diffusers_disback", "peft", "pytest", "shapes.make_teacher", "torchmetrics"]
BF16, NF4 = "adapters, checkpointing", "adapters, nf4, checkpointing"


@dataclass
class Part:
    """A command, and what is left out of it or changed for a rehearsal.

    Args:
        command (`list[str]`): Arguments of Python; `{out}` and `{work}` are the folders for figures and for what is resumed.
        full, tiny (`list[str]`): What is added on a GPU, and in a rehearsal.
        figures (`str`, *optional*): The JSON file that it writes, in `{out}`.
    """

    command: list[str]
    full: list[str] = field(default_factory=list)
    tiny: list[str] = field(default_factory=list)
    figures: str | None = None


def bench_step(*flags: str, name: str, full: list[str], tiny: list[str]) -> Part:
    output = ["--output", f"{{out}}/{name}"]
    return Part([str(HERE / "bench_step.py"), *flags, *output], full, tiny, name)


def distilled(data: str, what: str, *flags: str) -> Part:
    name = f"{data}-{'-'.join([what, *flags[1::2]])}.figures.json"
    common = ["--work_dir", f"{{work}}/{data}", "--figures", f"{{out}}/{name}"]
    return Part([str(HERE / f"gpu_{data}.py"), what, *flags, *common], [], ["--tiny"], name)


PARTS = {
    "tests": Part(
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"],
        [str(ROOT / "tests")],
        ["--collect-only", str(ROOT / "tests" / "test_pipeline.py")],
    ),
    "sdxl-bf16": bench_step(
        *SDXL, "--modes", BF16, name="sdxl-bf16.figures.json", full=FULL, tiny=[*TINY, "--stages", "2", "--forked"]
    ),
    # Quantised kernels are of a GPU: the rehearsal is without them.
    "sdxl-nf4": bench_step(
        *SDXL,
        name="sdxl-nf4.figures.json",
        full=[*FULL, "--modes", NF4],
        tiny=[*TINY, "--stages", "1", "--modes", "adapters", "--forked"],
    ),
    "step": bench_step(
        *("--models", "sd15", "--stages", "2"),
        name="step.figures.json",
        full=["--factor", "1", "--latents", "64", "--batch_size", "4", "--precision", "bf16", "--rounds", "10"],
        tiny=["--factor", "0.05", "--latents", "8", "--fake_score_updates", "1", "--rounds", "1", "--only", "ours"],
    ),
    **{
        f"{data}-{name}": distilled(data, *line)
        for data in ("pixels", "shapes")
        for name, line in {
            "teacher": ["teacher"],
            "none": ["distil", "--arm", "none"],
            "path": ["distil", "--arm", "path"],
        }.items()
    },
}


def arguments_of(name: str, output: Path, tiny: bool) -> list[str]:
    """What Python is called with for a part."""
    part, places = PARTS[name], {"out": str(output), "work": str(output / "work")}
    return [word.format(**places) for word in [*part.command, *(part.tiny if tiny else part.full)]]


def is_there(name: str, output: Path, tiny: bool) -> bool:
    """Whether a part's result is there, of this very command."""
    file = output / f"{name}.json"
    return file.exists() and json.loads(file.read_text())["command"] == command_of(arguments_of(name, output, tiny))


def command_of(arguments: list[str]) -> str:
    return shlex.join(["python", *arguments])


def run(name: str, output: Path, tiny: bool, limit: float = LIMIT) -> dict:
    """Runs a part, and writes its result if it ended in its time."""
    part, arguments = PARTS[name], arguments_of(name, output, tiny)
    (output / "work").mkdir(parents=True, exist_ok=True)
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if tiny else {}
    log = output / f"{name}.log"
    log.write_text("")  # a process that is ended at once has none
    started = time.monotonic()
    process = start_python(arguments, tiny, log, PYTHONPATH=os.pathsep.join(PATHS), **hidden)
    process.join(limit)
    status = process.exitcode
    if status is None:
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            one.kill()
        process.join()
    said = log.read_text(errors="replace")
    figures = output / part.figures if part.figures else None
    result = {
        "part": name,
        "command": command_of(arguments),
        "seconds": round(time.monotonic() - started, 1),
        "status": status,
        "device": "CPU" if tiny else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "figures": json.loads(figures.read_text()) if figures is not None and figures.is_file() else None,
        "printed": said[-TAIL:],
    }
    if status == 0:
        (output / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def main(line: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--output", type=Path, help="by default benchmarks/results/gpu, of a rehearsal outputs/gpu-tiny"
    )
    parser.add_argument("--tiny", action="store_true", help="rehearse on a CPU")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no part after so long")
    parsed = parser.parse_args(line)
    if not parsed.tiny and not torch.cuda.is_available():
        print("There is no GPU: --tiny rehearses on a CPU.", file=sys.stderr)
        return 1
    if parsed.tiny:  # imported once: processes are forks of this one
        sys.path[:0] = PATHS
        for module in IMPORTED:
            importlib.import_module(module)
        gc.freeze()
    output = parsed.output or (ROOT / "outputs" / "gpu-tiny" if parsed.tiny else HERE / "results" / "gpu")
    started, failed = time.monotonic(), False
    for name in parsed.parts:
        if is_there(name, output, parsed.tiny):
            print(f"{name}: is there")
            continue
        if time.monotonic() - started > parsed.seconds:
            print(f"{name}: not begun")
            continue
        result = run(name, output, parsed.tiny)
        ended = {0: "done", None: "not done in its time; call again"}.get(result["status"], "FAILED")
        print(f"{name}: {ended}, {result['seconds']} s", flush=True)
        if result["status"] not in (0, None):
            failed = True
            print(result["printed"][-1500:], file=sys.stderr)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
