"""The training script at tiny size, as functions of its flags."""

import socket
from pathlib import Path

import torch
import train_disback
from safetensors.torch import load_file

from processes import start_python


SCRIPT = Path(train_disback.__file__)
TINY = {
    "degradation_steps": 4,
    "degradation_stop": 0.0,
    "num_path_nodes": 2,
    "max_train_steps": 4,
    "steps_per_target": 2,
    "target_schedule": "fixed",
    "fake_score_updates": 1,
    "train_batch_size": 2,
    "fake_score_learning_rate": 1e-3,
    "generator_learning_rate": 1e-3,
    "lr_warmup_steps": 0,
    "num_validation_images": 1,
    "report_to": "none",
}
# Half of the steps and nodes, where what is trained matters and how long does not.
SHORT = {"degradation_steps": 2, "num_path_nodes": 1, "max_train_steps": 2, "steps_per_target": 1}


def arguments(folder: Path, teacher: Path, prompts: Path, /, **changes) -> list[str]:
    """The command line of a tiny run; `None` leaves a flag out, a list gives it several values."""
    flags = {
        "pretrained_model_name_or_path": teacher,
        "prompts_file": prompts,
        "output_dir": folder,
        **TINY,
        **changes,
    }
    line = []
    for name, value in flags.items():
        if value is not None and value is not False:
            values = value if isinstance(value, list) else [] if value is True else [value]
            line += [f"--{name}", *map(str, values)]
    return line


def student(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def in_two_processes(
    folder: Path, line: list, program: str = "two_processes.py", **environment: str
) -> list[dict[str, torch.Tensor]]:
    """Runs a program, by default the script, in two gloo processes, forks of this one, which have imported all. Returns what
    each rank holds at the end."""
    with socket.create_server(("localhost", 0)) as free:
        place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), **environment}
    command = [str(Path(__file__).with_name(program)), str(folder), *map(str, line)]
    folder.mkdir()
    logs = [folder / f"{rank}.log" for rank in (0, 1)]
    processes = [
        start_python(command, True, log, **place, WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank))
        for rank, log in enumerate(logs)
    ]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0], "".join(log.read_text()[-3000:] for log in logs)
    return [load_file(folder / f"{rank}.safetensors") for rank in (0, 1)]
