"""How a run is launched: accelerate's configs, `uv run`, and a tracker that needs a server. All on the CPU."""

import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from script import SCRIPT, SHORT, arguments, student


ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "examples" / "accelerate_configs"
ACCELERATE = Path(sys.executable).with_name("accelerate")
PIXELS = ROOT / "examples" / "unconditional_image_generation" / "train_disback.py"


def environment(**changes) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **changes}


def finished(processes: list[subprocess.Popen], timeout: float = 500) -> str:
    """What processes print, which all end well."""
    try:
        told = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(told)[-4000:]
    return "".join(told)


def begun(command: list, **changes) -> subprocess.Popen:
    how = {"env": environment(**changes), "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(list(map(str, command)), **how)


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as free:
        return free.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu", "one_gpu", "eight_gpus", "two_machines", "fsdp2"])
def test_a_config_is_launched(name, tmp_path, teacher_folder, prompts_file):
    """Where there are no GPUs, with two gloo processes in place of as many as a config says."""
    line = arguments(tmp_path / "run", teacher_folder, prompts_file, **SHORT, train_batch_size=1)
    launcher = [ACCELERATE, "launch", "--config_file", CONFIGS / f"{name}.yaml", "--main_process_port", free_port()]
    launcher += ["--num_cpu_threads_per_process", 1]
    if name in ("eight_gpus", "two_machines", "fsdp2"):
        launcher += ["--num_processes", 2]
    launches = [launcher]
    if name == "two_machines":
        launches = [[*launcher, "--main_process_ip", "localhost", "--machine_rank", rank] for rank in (0, 1)]
    finished([begun([*launch, SCRIPT, *line]) for launch in launches])
    assert all(weight.isfinite().all() for weight in student(tmp_path / "run").values())


@pytest.mark.slow
def test_what_is_not_supported_is_refused(tmp_path, teacher_folder, prompts_file):
    line = arguments(tmp_path / "run", teacher_folder, prompts_file, **SHORT)
    first = [ACCELERATE, "launch", "--use_fsdp", "--fsdp_version", 1, "--num_processes", 2]
    process = begun([*first, "--num_machines", 1, "--main_process_port", free_port(), SCRIPT, *line])
    told = process.communicate(timeout=300)[0]
    assert process.returncode and "--fsdp_version 2" in told and not (tmp_path / "run" / "unet").exists()


def metadata(script: Path) -> str:
    """The inline metadata of a script, as PEP 723 finds it."""
    (found,) = re.finditer(r"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$", script.read_text())
    return "".join(line.removeprefix("#").removeprefix(" ") for line in found["content"].splitlines(keepends=True))


@pytest.mark.parametrize("script", [SCRIPT, PIXELS], ids=lambda script: script.parent.name)
def test_scripts_say_what_they_need(script):
    import tomllib

    said = tomllib.loads(metadata(script))
    assert said["requires-python"] in (ROOT / "setup.py").read_text()
    assert said["dependencies"] == ["diffusers-disback[train,eval]"]
    assert (script.parent / said["tool"]["uv"]["sources"]["diffusers-disback"]["path"] / "setup.py").is_file()


@pytest.mark.slow
def test_the_script_of_a_job_trains_and_publishes(repo, alice, tmp_path, teacher_folder, monkeypatch, small_pictures):
    """That of the docs, at tiny size."""
    (script,) = re.findall(r"(?s)```python\n(# /// script.+?)```", (ROOT / "docs" / "zero_setup.md").read_text())
    tiny = {**SHORT, "report_to": "none", "lora_rank": 2, "num_validation_images": 1, "train_batch_size": 2}
    script, count = re.subn(r"lora_rank=64,", f"**{tiny!r},", script.replace("max_train_steps=16000,", ""))
    assert count == 1
    for name, value in {"OUTPUT_DIR": tmp_path / "student", "TEACHER": teacher_folder, "STUDENT": repo}.items():
        monkeypatch.setenv(name, str(value))
    exec(compile(script, "distil.py", "exec"), {"__name__": "__main__"})
    assert "model_index.json" in HfApi().list_repo_files(repo)


@pytest.fixture
def beside(tmp_path):
    """A virtual environment that sees the packages of this one, and may have others of its own: its command to install."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "beside"], check=True)
    (site,) = (tmp_path / "beside" / "lib").glob("python*/site-packages")
    (site / "beside.pth").write_text(sysconfig.get_paths()["purelib"])
    yield tmp_path / "beside" / "bin"
    shutil.rmtree(tmp_path / "beside")


def installed(place: Path, *packages: str) -> None:
    line = [place / "python", "-m", "pip", "install", "--quiet", *packages]
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_a_run_is_tracked_by_trackio(tmp_path, teacher_folder, prompts_file):
    """On this machine alone, without the Hub."""
    line = arguments(tmp_path / "run", teacher_folder, prompts_file, **SHORT, report_to="trackio", logging_steps=1)
    where = {"TRACKIO_DIR": str(tmp_path / "tracked"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src")}
    finished([begun([sys.executable, SCRIPT, *line, "--tracker_project_name", "shapes"], **where)])
    (database,) = (tmp_path / "tracked").glob("shapes*.db")
    with sqlite3.connect(database) as connection:
        rows = [str(row) for row in connection.execute("select * from metrics")]
    for name in ("degradation/fake_score_loss", "backtracking/generator_loss"):
        assert any(name in row for row in rows), name


@pytest.mark.slow
@pytest.mark.network
def test_uv_runs_a_script_without_an_installation(beside, tmp_path, teacher_folder, prompts_file):
    """From uv's cache, into which it first downloads several GB."""
    installed(beside, "uv")
    line = arguments(tmp_path / "run", teacher_folder, prompts_file, **SHORT)
    wheels = {f"UV_{name}": os.environ[f"PIP_{name}"] for name in ("FIND_LINKS",) if f"PIP_{name}" in os.environ}
    alone = {"UV_CONSTRAINT": str(ROOT / "constraints.txt"), "PYTHONPATH": "", "VIRTUAL_ENV": ""}
    finished(
        [begun([beside / "uv", "run", "--python", sys.executable, SCRIPT, *line], **wheels, **alone)], timeout=1800
    )
    assert student(tmp_path / "run")
