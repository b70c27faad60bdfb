"""One thread per process (two that spin on two cores are far slower), the CPU even where there is a GPU (tests compare
bit for bit), and a fresh accelerate state for each test."""

import os


os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["ACCELERATE_USE_CPU"] = "true"
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402


torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory):
    return tiny.save_teacher(tmp_path_factory.mktemp("tiny") / "teacher")


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory):
    return tiny.write_prompts(tmp_path_factory.mktemp("prompts"))
