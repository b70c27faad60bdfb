"""Parts of a teacher that play no role, and pipelines that are not whole."""

import json
import shutil

import pytest
import tiny
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from diffusers_disback.families import load_family, network_name_of, to_pipeline
from diffusers_disback.hub.publish.student import save_student
from diffusers_disback.hub.repository import HubError
from diffusers_disback.models.components import check_whole, parts_left_out
from diffusers_disback.models.reference import ModelReference


SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
VISION = {**SMALL, "image_size": 32, "patch_size": 16}


@pytest.fixture(scope="module")
def with_all_parts(tmp_path_factory):
    """A teacher with a safety checker, its feature extractor and an image encoder, all whole."""
    text = {**SMALL, "vocab_size": 50000}
    pipe = tiny.pipeline()
    whole = StableDiffusionPipeline(
        **{
            **pipe.components,
            "safety_checker": StableDiffusionSafetyChecker(
                CLIPConfig(text_config=text, vision_config=VISION, projection_dim=8)
            ),
            "feature_extractor": CLIPImageProcessor(),
            "image_encoder": CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION, projection_dim=8)),
        }
    )
    folder = tmp_path_factory.mktemp("parts") / "teacher"
    whole.save_pretrained(folder)
    return folder


def edited(folder, **changes):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **changes}))


def pickled(folder, part):
    file = folder / part / "model.safetensors"
    torch.save(load_file(file), folder / part / "pytorch_model.bin")
    file.unlink()


def cut(folder, part):
    file = folder / part / "model.safetensors"
    file.write_bytes(file.read_bytes()[:200])


def lacking(folder, part):
    file = folder / part / "model.safetensors"
    save_file(dict(sorted(load_file(file).items())[1:]), file, {"format": "pt"})


SAFETY = {"safety_checker", "feature_extractor"}
BROKEN = {
    "checker pickled": (lambda f: pickled(f, "safety_checker"), {"safety_checker"}),
    "checker cut": (lambda f: cut(f, "safety_checker"), {"safety_checker"}),
    "checker lacking a tensor": (lambda f: lacking(f, "safety_checker"), {"safety_checker"}),
    "checker missing": (lambda f: shutil.rmtree(f / "safety_checker"), {"safety_checker"}),
    "checker of no config": (lambda f: (f / "safety_checker/config.json").write_text("{"), {"safety_checker"}),
    "extractor missing": (lambda f: shutil.rmtree(f / "feature_extractor"), SAFETY),
    "extractor older": (lambda f: edited(f, feature_extractor=["transformers", "CLIPFeatureExtractor"]), SAFETY),
    "encoder pickled": (lambda f: pickled(f, "image_encoder"), {"image_encoder"}),
    "encoder missing": (lambda f: shutil.rmtree(f / "image_encoder"), {"image_encoder"}),
    "none": (lambda f: None, set()),
}


QUICK = ("checker pickled", "extractor missing", "encoder pickled", "none")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in BROKEN])
def test_parts_without_a_role_are_left_out_with_a_word(with_all_parts, tmp_path, caplog, name):
    """Of the teacher, of what a node's branch holds, and of the student, which both load stock."""
    (damage, expected), folder, student = BROKEN[name], tmp_path / "teacher", tmp_path / "student"
    shutil.copytree(with_all_parts, folder)
    damage(folder)
    caplog.clear()
    reference = ModelReference(str(folder))
    pipe = load_family(reference).pipeline
    said = {part for part in BROKEN_PARTS if f"The {part} of {folder}" in caplog.text}
    assert said == expected, name
    assert {part for part in BROKEN_PARTS if pipe.components[part] is None} == expected, name
    assert pipe.config.requires_safety_checker == ("safety_checker" not in expected)
    files = reference.resolve(network_name_of).component_files("float32")
    content = files["model_index.json"]
    index = json.loads(content if isinstance(content, bytes) else content.read_text())
    assert {part for part in BROKEN_PARTS if index[part][0] is None} == expected, name
    assert index["requires_safety_checker"] == ("safety_checker" not in expected), name
    assert not any(path.startswith(tuple(f"{part}/" for part in expected)) for path in files if expected), name
    save_student(to_pipeline(pipe.unet, 399, pipe), reference.resolve(network_name_of), student)
    index = json.loads((student / "model_index.json").read_text())
    kept = set(BROKEN_PARTS) - expected
    assert {part for part in BROKEN_PARTS if index[part][0] is not None} == kept, name
    assert index["requires_safety_checker"] == ("safety_checker" in kept)
    assert {part for part in BROKEN_PARTS if (student / part).exists()} == kept, name
    stock = DiffusionPipeline.from_pretrained(student)
    assert {part for part in BROKEN_PARTS if stock.components[part] is not None} == kept, name


BROKEN_PARTS = ("safety_checker", "feature_extractor", "image_encoder")


def test_a_part_that_was_mended_is_taken(with_all_parts, tmp_path):
    folder = shutil.copytree(with_all_parts, tmp_path / "teacher")
    pickled(folder, "safety_checker")
    assert load_family(ModelReference(str(folder))).pipeline.safety_checker is None
    shutil.copy(with_all_parts / "safety_checker" / "model.safetensors", folder / "safety_checker")
    assert load_family(ModelReference(str(folder))).pipeline.safety_checker is not None


def test_a_pickled_part_does_not_block_a_teacher_on_the_hub(with_all_parts, alice, repo, tmp_path):
    from huggingface_hub import HfApi

    folder = shutil.copytree(with_all_parts, tmp_path / "teacher")
    pickled(folder, "safety_checker")
    HfApi().create_repo(repo)
    HfApi().upload_folder(repo_id=repo, folder_path=folder)
    reference = ModelReference(repo)
    assert load_family(reference).pipeline.safety_checker is None
    files = reference.resolve(network_name_of).component_files("float32")
    assert not any(path.startswith("safety_checker") for path in files)
    assert any(path.startswith("feature_extractor/") for path in files)


def test_a_folder_that_is_not_whole_is_told(teacher_folder, tmp_path):
    """What a teacher lacks for its student is found when it is loaded; what a student lacks, when it is written."""
    shards = tmp_path / "shards"
    tiny.pipeline().save_pretrained(shards, max_shard_size="20KB")
    for name, remove, message in [
        ("vae", "vae/*", "names vae, but there is nothing of it"),
        ("weights", "vae/*.safetensors", "its vae is without weights in safetensors"),
        ("config", "text_encoder/config.json", "its text_encoder is without config.json"),
        ("tokenizer", "tokenizer/*", "names tokenizer, but there is nothing"),
        ("shard", "vae/*-00001-of-*.safetensors", "its vae is without diffusion_pytorch_model-00001"),
    ]:
        folder = shutil.copytree(shards if name == "shard" else teacher_folder, tmp_path / name)
        for file in list(folder.glob(remove)):
            file.unlink()
        files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
        with pytest.raises(ValueError, match=message):
            check_whole(files, "The folder")
    pipe, reference = tiny.pipeline(), ModelReference(str(teacher_folder))
    check_whole(reference.resolve(network_name_of).component_files("float32"), "The teacher", ("unet",))
    student = to_pipeline(pipe.unet, 399, pipe)
    broken = shutil.copytree(teacher_folder, tmp_path / "broken")
    (broken / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="is not whole: its text_encoder is without weights"):
        save_student(student, ModelReference(str(broken)).resolve(network_name_of), tmp_path / "student")


def upload(folder, repo):
    from huggingface_hub import HfApi

    HfApi().create_repo(repo, exist_ok=True)
    return HfApi().upload_folder(repo_id=repo, folder_path=folder).oid


def test_a_part_that_the_hub_fails_to_serve_is_not_taken_for_broken(with_all_parts, hub, repo, impatient, tmp_path):
    """Else a safety checker would be lacking in what is published, for a minute's outage."""
    from hub_server import Fault

    upload(with_all_parts, repo)
    hub.fault = lambda request: Fault(status=503) if "safety_checker" in request.path else None
    reference, cache = ModelReference(repo), str(tmp_path / "cache")
    with pytest.raises(HubError, match="The Hub cannot be reached for") as caught:
        reference.resolve(network_name_of, cache)
    assert caught.value.kind == "unreachable"
    hub.fault = None
    assert "safety_checker/model.safetensors" in reference.resolve(network_name_of, cache).files


def test_what_a_hub_model_has_not_is_known_when_the_hub_is_down(with_all_parts, hub, repo, impatient, tmp_path):
    from hub_server import Fault

    folder = shutil.copytree(with_all_parts, tmp_path / "teacher")
    pickled(folder, "safety_checker")
    shutil.rmtree(folder / "image_encoder")
    upload(folder, repo)
    cache = str(tmp_path / "cache")
    local = ModelReference(repo, variant="fp16").resolve(network_name_of, cache)
    hub.fault = lambda request: Fault(status=503)
    assert ModelReference(repo, variant="fp16").resolve(network_name_of, cache) == local
    assert local.left_out == {"safety_checker": None, "image_encoder": None, "requires_safety_checker": False}
    found = sorted(
        file.relative_to(local.folder).as_posix() for p in BROKEN_PARTS for file in local.folder.glob(f"{p}/*")
    )
    assert found == ["feature_extractor/preprocessor_config.json", "safety_checker/config.json"]


def test_a_part_of_a_variant_is_taken_as_it_is_there(with_all_parts, repo, tmp_path):
    """In shards, and of the variant or without one."""
    folder = shutil.copytree(with_all_parts, tmp_path / "teacher")
    checker = StableDiffusionSafetyChecker.from_pretrained(folder / "safety_checker")
    (folder / "safety_checker" / "model.safetensors").unlink()
    checker.save_pretrained(folder / "safety_checker", variant="fp16", max_shard_size="2KB")
    names = {file.name for file in (folder / "safety_checker").iterdir()}
    assert "model.safetensors.index.fp16.json" in names and len(names) > 3
    upload(folder, repo)
    for name in (str(folder), repo):
        local = ModelReference(name, variant="fp16").resolve(network_name_of, str(tmp_path / "cache"))
        assert {file.name for file in (local.folder / "safety_checker").iterdir()} == names
        assert local.left_out == {}


def test_parts_are_checked_without_reading_their_numbers(with_all_parts, monkeypatch):
    """Which for a safety checker is 1.2 GB; and what is no fault of the files stops the run."""
    devices = []

    def watched(whole):
        def load(*arguments, **options):
            loaded = whole(*arguments, **options)
            devices.extend({tensor.device.type for tensor in loaded[0].parameters()})
            return loaded

        return load

    index = json.loads((with_all_parts / "model_index.json").read_text())
    with monkeypatch.context() as context:
        for kind in (StableDiffusionSafetyChecker, CLIPVisionModelWithProjection):
            context.setattr(kind, "from_pretrained", watched(kind.from_pretrained))
        assert parts_left_out(index, with_all_parts, None, "it") == {}
    assert devices == ["meta", "meta"]

    def full(*_, **__):
        raise MemoryError

    monkeypatch.setattr(StableDiffusionSafetyChecker, "from_pretrained", full)
    with pytest.raises(MemoryError):
        parts_left_out(index, with_all_parts, None, "it")
