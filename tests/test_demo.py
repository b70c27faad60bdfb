"""The demo, as far as it needs neither gradio nor a browser; see test_demo_browser.py."""

import copy
import json
import re
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
import yaml
from packaging.specifiers import SpecifierSet
from peft import LoraConfig

from diffusers_disback.commands.cli import main
from diffusers_disback.commands.demo import loading
from diffusers_disback.commands.demo.loading import load
from diffusers_disback.commands.demo.sampling import MOST_CHARACTERS, Latest, Sampler, Superseded, Wanted
from diffusers_disback.families import family_of, load_family
from diffusers_disback.hub.errors import HubError
from diffusers_disback.hub.publish.space import TAG, push_space, space_files
from diffusers_disback.hub.publish.student import save_student
from diffusers_disback.hub.repository import Repository
from diffusers_disback.path.path import DegradationPath


ROOT = Path(__file__).parent.parent
REPORT = ROOT / "docs" / "quickstart_report.json"
TWO_STEPS = Wanted("a red circle", steps=2)


def student_of(pipeline):
    """As it is loaded: of the teacher's class, with the one-step scheduler."""
    teacher = family_of(pipeline)
    return family_of(
        teacher.assemble(copy.deepcopy(teacher.network), teacher.one_step_scheduler(teacher.default_timestep()))
    )


def write_report(folder, path, teacher):
    """A report of a student of the path, of two nodes."""
    report = json.loads(REPORT.read_text())
    report["path"] |= {"id": path.manifest["id"], "num_nodes": 2}
    report["settings"] |= {"pretrained_model_name_or_path": str(teacher)}
    (folder / "report.json").write_text(json.dumps(report))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, teacher_folder):
    """A student of a path of two nodes, as a run leaves it."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    teacher = load_family(str(teacher_folder))
    save_student(teacher.one_step(tiny.unet(seed=3), 399), teacher.local_model, folder)
    path = tiny.path(folder / "path", teacher_folder)
    write_report(folder, path, teacher_folder)
    return folder


@pytest.fixture
def sampler(run_folder):
    return load(str(run_folder))[0]


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ({"prompt": "a" * (MOST_CHARACTERS + 1)}, "1001 characters; at most 1000"),
        ({"prompt": None}, "has to be a text"),
        ({"prompt": "\ud800"}, "not UTF-8"),
        ({"prompt": "a\0b"}, "NUL"),
        ({"number": 9}, "number has to be"),
        ({"number": 1.5}, "number has to be a whole number"),
        ({"seed": -1}, "seed has to be"),
        ({"steps": 101}, "steps has to be"),
        ({"guidance": float("nan")}, "guidance has to be"),
    ],
)
def test_what_is_out_of_bounds_is_refused(wanted, told):
    with pytest.raises(ValueError, match=told):
        Wanted(**{"prompt": "a red circle", **wanted})


def test_the_newest_request_of_a_visitor_supersedes_the_others():
    latest = Latest()
    with latest.request("alice") as first, latest.request("bob") as other:
        assert first() and other()
        with latest.request("alice") as second:
            assert second() and not first() and other()
        assert not first()
    assert not latest._newest, "a visitor who asks for nothing is not kept"


def test_a_student_samples_as_its_pipeline_does(sampler, run_folder):
    sample = sampler.one_step(Wanted("a red  circle", seed=5, number=2))
    assert sample.images.shape == (2, 3, 16, 16) and sample.images.dtype == torch.uint8 and sample.seconds > 0
    noise = torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(6))
    stock = sampler.student.pipeline
    one = stock("a red circle", latents=noise[None], num_inference_steps=1, guidance_scale=0, output_type="pt").images
    assert (one * 255 - sample.images[1]).abs().max() <= 0.51, "image j has the seed + j"


def test_the_path_is_walked_and_left_again(sampler):
    teacher, *nodes = [sampler.many_steps(TWO_STEPS, node).images for node in (0, 2, 1)]
    assert not torch.equal(teacher, nodes[0]) and not torch.equal(nodes[0], nodes[1])
    own = sampler._network.state_dict()
    assert all(torch.equal(own[key], tensor) for key, tensor in tiny.unet(seed=1).state_dict().items())
    assert torch.equal(sampler.many_steps(TWO_STEPS, 0).images, teacher)
    with pytest.raises(ValueError, match="node has to be"):
        sampler.many_steps(TWO_STEPS, 3)


def test_a_path_of_adapters_is_walked_in_any_order(tmp_path, teacher_folder):
    teacher = load_family(str(teacher_folder))
    path = DegradationPath.create(tmp_path / "path", teacher.local_model, "0" * 64, tiny.START, {})
    for step in (1, 2):
        network = tiny.unet()
        torch.manual_seed(step)
        network.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), adapter_name="node")
        path.append(network, step=step, loss=0.5, adapter="node")
    sampler = Sampler(student_of(tiny.pipeline()), teacher, path)
    there, back = ([sampler.many_steps(TWO_STEPS, node).images for node in order] for order in ((0, 1, 2), (2, 0, 1)))
    assert not torch.equal(there[0], there[1]) and not torch.equal(there[1], there[2])
    assert all(map(torch.equal, back, (there[2], there[0], there[1])))


def test_after_a_node_that_cannot_be_loaded_others_can(sampler, monkeypatch):
    before, load_node = sampler.many_steps(TWO_STEPS, 1).images, sampler.path.load

    def fails_once(*_):
        monkeypatch.setattr(sampler.path, "load", load_node)
        raise ValueError("damaged")

    monkeypatch.setattr(sampler.path, "load", fails_once)
    with pytest.raises(ValueError, match="damaged"):
        sampler.many_steps(TWO_STEPS, 2)
    assert torch.equal(sampler.many_steps(TWO_STEPS, 1).images, before)


def test_a_superseded_teacher_gives_up_between_two_steps(sampler):
    asked = []

    def is_wanted():
        asked.append(1)
        return len(asked) < 4

    with pytest.raises(Superseded):
        sampler.many_steps(Wanted("a red circle", steps=50), 0, is_wanted)
    assert len(asked) == 4
    assert sampler.many_steps(TWO_STEPS).images.shape == (1, 3, 16, 16)


def test_superseded_requests_do_not_wait_for_the_teacher_of_another(sampler):
    """Or they would fill the queue, from which other visitors are turned away then."""
    runs, may_end, ended, samples = threading.Event(), threading.Event(), [], []

    def is_slow():
        runs.set()
        return may_end.wait(timeout=60)

    def ask(number):
        with sampler.latest.request("alice") as is_newest:
            try:
                samples.append(sampler.many_steps(TWO_STEPS, 0, is_newest))
            except Superseded:
                ended.append(number)

    bob = threading.Thread(target=sampler.many_steps, args=(TWO_STEPS, 0, is_slow))
    bob.start()
    assert runs.wait(timeout=60)
    requests = []
    for number in range(3):
        requests.append(threading.Thread(target=ask, args=(number,)))
        requests[-1].start()
        time.sleep(0.05)  # the order in which they enter
    for request in requests[:2]:
        request.join(timeout=1)
    before, newest_waits = sorted(ended), requests[2].is_alive()
    may_end.set()
    for thread in (bob, *requests):
        thread.join(timeout=60)
    assert before == [0, 1] and newest_waits
    assert len(samples) == 1 and ended == before


def test_a_student_does_not_wait_for_its_teacher(sampler):
    """Its images come while the teacher stands between two evaluations."""
    drawn = []

    def is_wanted():
        student = threading.Thread(target=lambda: drawn.append(sampler.one_step(Wanted("a blue star"))))
        student.start()
        student.join(timeout=20)
        return True

    sampler.many_steps(Wanted("a red circle", steps=1), 0, is_wanted)
    assert len(drawn) == 2


def test_class_labels_are_chosen_by_their_names_and_of_nothing_nothing_is():
    family = student_of(tiny.dit())
    assert Sampler(family).choices[:2] == [("0", "0"), ("1", "1")]
    family.model = type("Files", (), {"index": {"id2label": {"0": "tench"}}})()
    sampler = Sampler(family)
    assert sampler.choices[:2] == [("0: tench", "0"), ("1", "1")] and not sampler.is_guided
    assert not torch.equal(*(sampler.one_step(Wanted(label)).images for label in "01"))
    with pytest.raises(ValueError, match="no class label"):
        sampler.one_step(Wanted("a red circle"))
    assert Sampler(family, family_of(tiny.dit())).is_guided

    sampler = Sampler(student_of(tiny.pixels()), family_of(tiny.pixels()))
    assert sampler.choices == [] and not sampler.is_guided
    assert sampler.one_step(Wanted("")).images.shape == sampler.many_steps(Wanted("", steps=1)).images.shape


@pytest.mark.slow
@pytest.mark.parametrize("made", ["pipeline_xl", "pipeline_3", "sana", "pixart", "edm", "rescaled_edm"])
def test_every_family_is_shown_beside_its_teacher(made):
    sampler = Sampler(student_of(getattr(tiny, made)()), family_of(getattr(tiny, made)()))
    label = sampler.choices[0][1] if sampler.choices else "a red circle"
    images = sampler.one_step(Wanted(label, number=2)).images
    assert images.shape == sampler.many_steps(Wanted(label, number=2, steps=2)).images.shape


def test_a_run_knows_its_teacher_its_path_and_how_they_are_shown(run_folder, teacher_folder, tmp_path, capsys):
    sampler, settings = load(str(run_folder))
    assert settings == {"steps": 25, "guidance": 4.0, "prompt": "a red circle on a navy background"}
    assert len(sampler.path) == 2 and sampler.teacher is not None and sampler.is_guided
    alone = load(str(run_folder), student_only=True)[0]
    assert alone.teacher is None and alone.path is None
    assert "demo is without" not in capsys.readouterr().err


@pytest.fixture
def changed(run_folder, monkeypatch):
    """Changes the run's report."""

    def change(**values):
        report = json.loads((run_folder / "report.json").read_text())
        monkeypatch.setattr(loading, "read_report", lambda _: {**report, **values})
        return report

    return change


def test_a_teacher_that_is_nowhere_is_left_out_and_told(run_folder, teacher_folder, changed, capsys):
    report = changed(path=None)
    settings = {**report["settings"], "pretrained_model_name_or_path": "teacher"}
    changed(path=None, settings=settings)
    assert load(str(run_folder))[0].teacher is None
    assert "The teacher teacher is not on this machine" in capsys.readouterr().err
    sampler = load(str(run_folder), teacher=str(teacher_folder))[0]
    assert sampler.teacher is not None and sampler.path is None


def test_another_path_and_what_is_no_student_are_refused(run_folder, teacher_folder, changed):
    changed(path={"id": "0" * 32, "num_nodes": 2})
    with pytest.raises(ValueError, match="not the one that .* went along; --student_only leaves it out"):
        load(str(run_folder))
    with pytest.raises(ValueError, match="is no one-step student"):
        load(str(teacher_folder))


def test_a_student_on_the_hub_is_found_with_its_report(run_folder, repo, hub, teacher_folder):
    repository = Repository(repo)
    repository.create()
    files = {str(file.relative_to(run_folder)): file for file in run_folder.rglob("*.*") if "path" not in file.parts}
    report = json.loads((run_folder / "report.json").read_text()) | {"path": None}
    repository.commit({**files, "report.json": json.dumps(report).encode()}, "Add a student")
    sampler, settings = load(repo)
    assert sampler.teacher is not None and settings["guidance"] == 4
    assert sampler.one_step(Wanted("a red circle")).images.shape == (1, 3, 16, 16)


def test_a_space_runs_the_same_command(repo, hub, monkeypatch):
    from diffusers_disback.commands import cli

    address = push_space(repo, f"{repo}-demo")
    assert address.endswith(f"/spaces/{repo}-demo")
    push_space(repo, f"{repo}-demo")  # it can be repeated
    files = hub.files(f"spaces/{repo}-demo")
    assert files.keys() - {".gitattributes"} == space_files(repo).keys()
    assert f"- {TAG}" in files["README.md"].decode() and b"diffusers-disback[demo]" in files["requirements.txt"]
    ran = []
    monkeypatch.setattr(cli, "main", ran.append)
    with pytest.raises(SystemExit):
        exec(files["app.py"], {})
    assert ran == [["demo", repo]]


def test_a_space_has_a_python_that_the_package_takes():
    front = yaml.safe_load(space_files("alice/student")["README.md"].decode().split("---")[1])
    (wanted,) = re.findall(r'python_requires="(.+)"', (ROOT / "setup.py").read_text())
    assert isinstance(front["python_version"], str), "3.10 would be read as 3.1"
    assert front["python_version"] in SpecifierSet(wanted)


def test_a_space_takes_flags_of_the_demo(tmp_path, capsys):
    app = space_files("alice/student", ["--student_only", "--mixed_precision", "bf16"])["app.py"]
    assert b"main(['demo', 'alice/student', '--student_only', '--mixed_precision', 'bf16'])" in app
    assert main(["push", str(tmp_path), "alice/student", "--demo_student_only"]) == 2
    assert "pass --push_demo, too" in capsys.readouterr().err


def test_what_the_hub_refuses_is_left_out_and_told(run_folder, repo, hub, changed, capsys, monkeypatch):
    repository = Repository(repo)
    repository.create()
    commit = repository.commit({"path.json": b"{}"}, "Add a path")
    hub.repos[repo].gated = True
    monkeypatch.setenv("HF_TOKEN", hub.add_user("bob"))
    report = changed(path={"id": "0" * 32, "num_nodes": 2, "repo_id": repo, "commit": commit})
    sampler = load(str(run_folder))[0]
    told = capsys.readouterr().err
    assert sampler.teacher is not None and sampler.path is None
    assert f"{repo} is gated" in told and "without the path" in told

    settings = {**report["settings"], "pretrained_model_name_or_path": "alice/nowhere"}
    changed(path=None, settings=settings)
    monkeypatch.setattr(loading.RunFolder, "settings", lambda _: None)
    assert load(str(run_folder))[0].teacher is None
    assert "The demo is without the teacher" in capsys.readouterr().err
    with pytest.raises(ValueError, match="alice/elsewhere"):
        load(str(run_folder), teacher="alice/elsewhere")


def test_the_command_samples_in_the_precision_that_is_asked_for(run_folder, monkeypatch):
    from diffusers_disback.commands import demo

    shown = []
    page = SimpleNamespace(build=lambda sampler, *_: shown.append(sampler), serve=lambda *_: None, check_port=None)
    monkeypatch.setitem(sys.modules, "diffusers_disback.commands.demo.app", page)
    monkeypatch.setattr(demo, "find_spec", lambda _: True)
    assert not main(["demo", str(run_folder), "--mixed_precision", "bf16"])
    assert shown[0]._network.dtype == shown[0]._one_step.unet.dtype == torch.bfloat16


def test_a_space_with_another_app_is_not_overwritten(repo, hub):
    from huggingface_hub import CommitOperationAdd, HfApi

    HfApi().create_repo(repo, repo_type="space", space_sdk="gradio")
    HfApi().create_commit(repo, [CommitOperationAdd("app.py", b"")], commit_message="Add", repo_type="space")
    with pytest.raises(HubError, match="holds another app"):
        push_space("alice/student", repo)


def test_without_gradio_it_says_what_is_needed(monkeypatch, capsys):
    from diffusers_disback.commands import demo

    monkeypatch.setattr(demo, "find_spec", lambda _: None)
    assert main(["demo", "nowhere"]) == 2
    assert "pip install 'diffusers-disback[demo]'" in capsys.readouterr().err


def test_a_path_alone_has_no_demo(tmp_path, capsys):
    assert main(["push", str(tmp_path), "alice/student", "--push_demo"]) == 2
    assert "--push_demo shows a student" in capsys.readouterr().err


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["demo", "nowhere", "--port", str(port)]) == 2
    assert f"--port {port} of 127.0.0.1 cannot be had (Address already in use" in capsys.readouterr().err
