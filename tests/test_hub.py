import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub import HfApi
from script import student
from write_faults import Fault, full, killed

from diffusers_disback.families import network_name_of, to_pipeline
from diffusers_disback.hub.publish.student import save_student
from diffusers_disback.hub.repository import HubError, Repository
from diffusers_disback.models.reference import ModelReference
from diffusers_disback.pipelines.one_step import DisBackOneStepPipeline


def test_the_teachers_files_are_copied_as_they_are(tmp_path, teacher_folder):
    (tmp_path / "teacher").symlink_to(teacher_folder)
    pipe = to_pipeline(tiny.unet(seed=1), 399, tiny.pipeline())
    save_student(pipe, ModelReference(str(tmp_path / "teacher")).resolve(network_name_of), tmp_path / "student")
    for component in ("text_encoder", "tokenizer", "vae"):
        files = {file.name for file in (teacher_folder / component).iterdir()}
        assert {file.name for file in (tmp_path / "student" / component).iterdir()} == files
        for name in files - {"config.json"}:
            own, teachers = tmp_path / "student" / component / name, teacher_folder / component / name
            assert own.read_bytes() == teachers.read_bytes()


@pytest.mark.parametrize("wanted", [None, "fp16"])
@pytest.mark.parametrize("shard_size", [None, "50KB"], ids=["whole", "sharded"])
def test_of_two_variants_the_asked_one_is_copied_and_loads_without_its_name(tmp_path, wanted, shard_size):
    folder = tmp_path / "teacher"
    for variant, dtype in ((None, torch.float32), ("fp16", torch.float16)):
        tiny.pipeline().to(dtype=dtype).save_pretrained(folder, variant=variant, max_shard_size=shard_size)
    (folder / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"pickled")
    save_student(
        to_pipeline(tiny.unet(seed=1), 399, tiny.pipeline()),
        ModelReference(str(folder), None, wanted).resolve(network_name_of),
        tmp_path / "out",
    )
    names = {file.name for file in (tmp_path / "out" / "vae").iterdir()}
    assert not any("fp16" in name or name.endswith(".bin") for name in names)
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "out")
    assert pipe.unet.dtype == pipe.vae.dtype == pipe.text_encoder.dtype == torch.float32
    expected = tiny.pipeline().to(dtype=torch.float16 if wanted else torch.float32).vae.state_dict()
    assert all(torch.equal(pipe.vae.state_dict()[key], value.float()) for key, value in expected.items())


def test_a_safety_checker_is_carried_over(tmp_path):
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=small, vision_config={**small, "image_size": 16, "patch_size": 8}, projection_dim=16
    )
    teacher = tiny.pipeline()
    teacher = StableDiffusionPipeline(
        **{
            **teacher.components,
            "safety_checker": StableDiffusionSafetyChecker(config).eval(),
            "feature_extractor": CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16),
        }
    )
    teacher.save_pretrained(tmp_path / "teacher")
    save_student(
        to_pipeline(tiny.unet(seed=1), 399, teacher),
        ModelReference(str(tmp_path / "teacher")).resolve(network_name_of),
        tmp_path / "student",
    )
    assert json.loads((tmp_path / "student" / "model_index.json").read_text())["requires_safety_checker"] is True
    pipe = DisBackOneStepPipeline.from_pretrained(tmp_path / "student")
    assert isinstance(pipe.safety_checker, StableDiffusionSafetyChecker)
    assert pipe(tiny.PROMPTS[0]).nsfw_content_detected in ([True], [False])


def test_a_student_is_written_whole_or_not_at_all(tmp_path, teacher_folder):
    """In place of an older one: on a full disk that stays as it was; after a kill there is the one, the other or none."""
    teacher, folder = ModelReference(str(teacher_folder)).resolve(network_name_of), tmp_path / "student"
    pipes = [to_pipeline(tiny.unet(seed=seed), 399, tiny.pipeline()) for seed in (1, 2)]
    older, newer = (pipe.unet.state_dict() for pipe in pipes)

    def held():
        """Which student is there: every file of it, and no other."""
        if not (folder / "model_index.json").exists():
            return None
        index = json.loads((folder / "model_index.json").read_text())
        names = {name for name, kind in index.items() if isinstance(kind, list) and kind[0] is not None}
        assert names <= {file.name for file in folder.iterdir() if file.is_dir() and any(file.iterdir())}
        json.loads((folder / "unet" / "config.json").read_text())
        weights = student(folder)
        (is_newer,) = {
            torch.equal(weights[key], newer[key]) for key in weights if not torch.equal(older[key], newer[key])
        }
        return "newer" if is_newer else "older"

    def save(pipe):
        save_student(pipe, teacher, folder)

    save(pipes[0])
    assert held() == "older"
    (folder / "mine.txt").write_text("stays")
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    shutil.copytree(folder, tmp_path / "copy")
    with Fault(-1, full).injected() as counted:
        save(pipes[1])
    moved = len([item for item in folder.iterdir() if item.name != "mine.txt"])
    assert held() == "newer" and counted.writes > 20
    seen = set()
    for at in range(counted.writes):
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "copy", folder)
        if at < counted.writes - 2 * moved:  # before the first is moved
            with pytest.raises(OSError, match="No space left"), Fault(at, full).injected():
                save(pipes[1])
            assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before, at
        if at % 3 == 0 or at >= counted.writes - 2 * moved:
            assert killed(lambda: save(pipes[1]), at)
            seen.add(held())
            save(pipes[1])  # and again
            assert held() == "newer" and not (folder / "student.draft").exists()
    assert seen >= {"older", None}
    assert (folder / "mine.txt").read_text() == "stays"


def test_writers_of_weights_tell_of_a_full_disk_as_python_does(tmp_path):
    """Weights of safetensors, and torch's moments, in a process whose files may not grow."""
    import subprocess
    import sys

    program = """
import resource, signal, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from diffusers_disback.hub.files import writing
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
for write in (save_file, torch.save):
    try:
        with writing(Path(sys.argv[1], "new", "file")):
            write({"a": torch.zeros(10_000)}, sys.argv[1] + "/file")
    except OSError as error:
        print(error.strerror, error.filename)
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        f"File too large {tmp_path}/new/file",
        f"Input/output error {tmp_path}/new/file",
    ], done.stderr[-2000:]


def test_what_is_in_a_cache_that_cannot_be_written_to_is_read(alice, repo, tmp_path, monkeypatch, caplog):
    """Also where the repository has moved on meanwhile, with a word; what is not there is an error that says what to do."""
    api, cache = HfApi(), tmp_path / "cache"
    api.create_repo(repo)

    def upload(content):
        for name in ("a.json", "b.json"):
            api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id=repo)

    upload(b"1")
    repository = Repository(repo)
    folder, file = repository.download(["a.json"], None, str(cache)), repository.file("a.json", None, str(cache))
    before = {path: path.lstat().st_mtime_ns for path in cache.rglob("*")}
    # Root may write everywhere: what the client makes is refused by its own doors in place of the file system.
    real_mkdir, real_open, real_makedirs = os.mkdir, os.open, os.makedirs

    def refused(path):
        return str(path).startswith(str(cache)) and OSError(errno.EROFS, "Read-only file system", str(path))

    def mkdir(path, *arguments, **keywords):
        if not os.path.isdir(path) and refused(path):
            raise refused(path)
        return real_mkdir(path, *arguments, **keywords)

    def makedirs(path, *arguments, **keywords):
        if not os.path.isdir(path) and refused(path):
            raise refused(path)
        return real_makedirs(path, *arguments, **keywords)

    def opened(path, flags, *arguments, **keywords):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and refused(path):
            raise refused(path)
        return real_open(path, flags, *arguments, **keywords)

    def written(path, *arguments, **keywords):
        raise refused(path) or AssertionError(path)

    for name, function in (("mkdir", mkdir), ("makedirs", makedirs), ("open", opened)):
        monkeypatch.setattr(os, name, function)
    monkeypatch.setattr(Path, "write_text", written)
    assert repository.download(["a.json"], None, str(cache)) == folder
    assert repository.file("a.json", None, str(cache)) == file
    with pytest.raises(HubError, match="cannot be written to or read..*Read-only file system.*--cache_dir"):
        repository.file("b.json", None, str(cache))
    upload(b"2")
    assert repository.download(["a.json"], None, str(cache)) == folder
    assert repository.file("a.json", None, str(cache)) == file and file.read_bytes() == b"1"
    assert any("cannot be written to" in message for message in caplog.messages)
    assert {path: path.lstat().st_mtime_ns for path in cache.rglob("*")} == before
