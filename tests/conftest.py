"""One thread per process (two that spin on two cores are far slower), the CPU even where there is a GPU (tests compare
bit for bit), a fresh accelerate state for each test, and a Hub on this machine in place of the real one."""

import gc
import os
import tempfile
import time
from types import SimpleNamespace

from hub_server import HubServer


HUB = HubServer()
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["ACCELERATE_USE_CPU"] = "true"
# The client reads these when it is imported, here and in processes that tests start.
os.environ["HF_ENDPOINT"] = HUB.url
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hf-home-")
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_OFFLINE"):
    os.environ.pop(name, None)

import pytest  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState, GradientState, PartialState  # noqa: E402


torch.set_num_threads(1)


def pytest_collection_finish():
    """What was imported is not looked through again: each stage collects garbage when it frees memory, half a second a time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fresh_accelerate_state():
    """After a module's fixtures, too, which may have trained in another precision."""
    reset_accelerate_state()
    yield
    reset_accelerate_state()


def reset_accelerate_state():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()


@pytest.fixture(autouse=True)
def teachers_that_draw_in_two_steps(monkeypatch):
    """Tiny ones: their images were half of a run's time."""
    monkeypatch.setattr("diffusers_disback.evaluation.report.TEACHER_STEPS", 2)


@pytest.fixture(autouse=True)
def mismatch_is_measured_on_few_samples(monkeypatch, request):
    """On four a band: batches of two made measuring the longest part of a tiny stage."""
    if not request.module.__name__.endswith("test_mismatch"):
        monkeypatch.setattr("diffusers_disback.training.probe.SAMPLES", 16)


@pytest.fixture
def hub():
    """An empty Hub."""
    HUB.clear()
    yield HUB
    HUB.fault = None


@pytest.fixture
def impatient(monkeypatch):
    """The client's and our own waits cost nothing."""
    import huggingface_hub.utils._http as http

    from diffusers_disback.hub import repository

    clock = SimpleNamespace(monotonic=time.monotonic, time=time.time, sleep=lambda seconds: None)
    monkeypatch.setattr(http, "time", clock)
    monkeypatch.setattr(repository, "time", clock)


@pytest.fixture
def alice(hub, monkeypatch):
    """Logged in as Alice."""
    monkeypatch.setenv("HF_TOKEN", hub.add_user("alice"))
    return hub


@pytest.fixture
def repo(alice, request):
    """A repository's name of its own, because the client's cache outlives the test."""
    words = request.node.name.split("[")[0].removeprefix("test_").split("_")
    return f"alice/{'-'.join(words[:6])}-{abs(hash(request.node.name)) % 10**6}"


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory):
    return tiny.save_teacher(tmp_path_factory.mktemp("tiny") / "teacher")


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory):
    return tiny.write_prompts(tmp_path_factory.mktemp("prompts"))


@pytest.fixture
def small_pictures(monkeypatch):
    """A run's images are of two pixels each: drawing and plotting them was half of a tiny run. Runs in processes of their
    own draw real ones."""
    from PIL import Image

    from diffusers_disback.evaluation.report import Report
    from diffusers_disback.hub.files import written_whole

    def written(report, *arguments):
        with written_whole(arguments[-1]) as draft:
            Image.new("RGB", (2, 2)).save(draft)

    for name in ("write_samples", "write_path", "write_convergence"):
        monkeypatch.setattr(Report, name, written)


@pytest.fixture
def run(tmp_path, teacher_folder, prompts_file, small_pictures):
    """Runs the training script; returns the output folder."""
    import train_disback
    from script import arguments

    def run(name="run", **changes):
        train_disback.main(arguments(tmp_path / name, teacher_folder, prompts_file, **changes))
        return tmp_path / name

    run.folder = tmp_path
    return run
