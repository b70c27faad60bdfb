"""Runs the training script and writes what each rank holds at the end: `two_processes.py <folder> <flags>`."""

import sys
from pathlib import Path


sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "examples" / "text_to_image")]

import torch  # noqa: E402
import train_disback  # noqa: E402
from accelerate import PartialState  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402

from diffusers_disback.backtracking import BacktrackingTrainer  # noqa: E402
from diffusers_disback.degradation import DegradationRecorder  # noqa: E402


folder, *line = sys.argv[1:]
torch.set_num_threads(1)
weights = {}


def remembered(method, role):
    """The weights of a stage's networks at its end."""

    def wrapped(self):
        networks = [(f"{role}.{learner.name}", learner) for learner in self.learners]
        result = method(self)
        for name, learner in networks:
            for key, value in learner.unwrapped().state_dict().items():
                weights[f"{name}.{key}"] = value.full_tensor() if isinstance(value, DTensor) else value.clone()
        return result

    return wrapped


BacktrackingTrainer.run = remembered(BacktrackingTrainer.run, "backtracking")
DegradationRecorder.run = remembered(DegradationRecorder.run, "degradation")
train_disback.main(line)
assert PartialState().num_processes == 2
Path(folder).mkdir(exist_ok=True)
save_file(weights, Path(folder) / f"{PartialState().process_index}.safetensors")
PartialState().destroy_process_group()
