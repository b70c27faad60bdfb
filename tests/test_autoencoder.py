"""Autoencoders from elsewhere, in the forms in which they are shared, and in those that are refused."""

import errno
import json
import shutil
from pathlib import Path

import original_layout
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from stages import equal, weights

from diffusers_disback.families import load_family, network_name_of, to_pipeline
from diffusers_disback.hub.publish.student import save_student
from diffusers_disback.models.components import check_whole
from diffusers_disback.models.pipeline_folder import files_of, variant_taken
from diffusers_disback.models.reference import ModelReference


WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def other():
    return tiny.pipeline(seed=5).vae


def loaded(teacher_folder, vae, cache, variant=None):
    """An autoencoder as a run would load it, and the names of its files in a student."""
    local = ModelReference(str(teacher_folder), vae=str(vae), variant=variant).resolve(network_name_of, str(cache))
    files = local.component_files("float32")
    return (
        local.load_vae(),
        sorted(path.removeprefix("vae/") for path in files if path.startswith("vae/")),
        files,
    )


def halved(network):
    return {key: tensor.half().float() for key, tensor in network.state_dict().items()}


def test_the_forms_in_which_autoencoders_are_shared(other, teacher_folder, tmp_path):
    plain, twice, half = tmp_path / "plain", tmp_path / "twice", tmp_path / "half"
    other.save_pretrained(plain)
    shutil.copytree(plain, twice)  # a repository with the same weights once more, for other programs
    for name in (
        "sdxl_vae.safetensors",
        "sdxl.vae.safetensors",
        "model-ema.safetensors",
        "diffusion_pytorch_model.bin",
    ):
        shutil.copy(plain / WEIGHTS, twice / name)
    halves = {key: tensor.half() for key, tensor in load_file(plain / WEIGHTS).items()}
    shutil.copytree(plain, half)
    (half / WEIGHTS).unlink()
    save_file(halves, half / "diffusion_pytorch_model.fp16.safetensors")
    both = shutil.copytree(half, tmp_path / "both")
    shutil.copy(plain / WEIGHTS, both)
    tiny.pipeline(seed=5).save_pretrained(tmp_path / "inside")
    other.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    save_file(original_layout.original_vae(other), tmp_path / "first_stage.safetensors")
    bare = {key.removeprefix("first_stage_model."): v for key, v in original_layout.original_vae(other).items()}
    save_file({**bare, "loss.logvar": torch.zeros(1)}, tmp_path / "bare.safetensors")
    save_file({key: tensor.half() for key, tensor in bare.items()}, tmp_path / "bare_half.safetensors")
    whole, usual = weights(other), ["config.json", WEIGHTS]
    for name, expected, names in [
        ("plain", whole, usual),
        ("twice", whole, usual),
        ("both", whole, usual),
        ("inside", whole, usual),
        ("plain/" + WEIGHTS, whole, usual),
        ("half/diffusion_pytorch_model.fp16.safetensors", halved(other), usual),
        ("first_stage.safetensors", whole, usual),
        ("bare.safetensors", whole, usual),
        ("bare_half.safetensors", halved(other), usual),
        ("shards", whole, None),
    ]:
        vae, found, files = loaded(teacher_folder, tmp_path / name, tmp_path / "cache")
        assert equal(weights(vae), expected) and vae.dtype == torch.float32, name
        assert names is None or found == names, name
        check_whole(files, "the student", ("unet",))
    assert len(found) > 3, "all shards and their index"
    save_teacher_variant(tmp_path / "teacher")
    for name in ("half", "both"):  # the variant that --variant names is taken, and goes along without its name
        vae, found, _ = loaded(tmp_path / "teacher", tmp_path / name, tmp_path / "cache", "fp16")
        assert equal(weights(vae), halved(other)) and found == usual, name
    assert equal(weights(loaded(tmp_path / "teacher", plain, tmp_path / "cache", "fp16")[0]), whole)


def save_teacher_variant(folder):
    tiny.pipeline().to(dtype=torch.float16).save_pretrained(folder, variant="fp16")


def test_autoencoders_that_are_refused(other, run, repo, alice, tmp_path):
    """Before training, with what is wrong with them: as folders, as files, and on the Hub."""
    from huggingface_hub import HfApi

    def made(name):
        other.save_pretrained(tmp_path / name)
        return tmp_path / name

    torch.save(load_file(made("pickled") / WEIGHTS), tmp_path / "pickled" / "diffusion_pytorch_model.bin")
    (tmp_path / "pickled" / WEIGHTS).unlink()
    (made("half") / WEIGHTS).rename(tmp_path / "half" / "diffusion_pytorch_model.fp16.safetensors")
    (made("empty") / WEIGHTS).unlink()
    (made("named") / WEIGHTS).rename(tmp_path / "named" / "vae.safetensors")
    stored = load_file(made("lacking") / WEIGHTS)
    key = "decoder.conv_in.bias"
    save_file({k: v for k, v in stored.items() if k != key}, tmp_path / "lacking" / WEIGHTS)
    save_file({**stored, "decoder.more": torch.ones(1)}, made("more") / WEIGHTS)
    other.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    sorted((tmp_path / "shards").glob("*-of-*"))[0].unlink()
    other.save_pretrained(tmp_path / "out", max_shard_size="20KB")
    index = tmp_path / "out" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../plain.safetensors"}}))
    save_file({k: v for k, v in stored.items() if k != key}, tmp_path / "lacking.safetensors")
    save_file({**stored, "decoder.more": torch.ones(3)}, tmp_path / "more.safetensors")
    moved = {k: v for k, v in stored.items() if k != key} | {"decoder.other": stored[key]}
    save_file(moved, tmp_path / "moved.safetensors")
    original_layout.write(tiny.pipeline(), "v1", tmp_path / "whole.safetensors")
    save_file({"model.x": torch.ones(1)}, tmp_path / "unet.safetensors")
    torch.save(stored, tmp_path / "vae.pt")
    api = HfApi()
    api.create_repo(repo)
    api.upload_folder(repo_id=repo, folder_path=tmp_path / "pickled")
    for where, message in {
        tmp_path / "pickled": "is there as a pickle alone .diffusion_pytorch_model.bin.. Pickles can run code",
        repo: "is there as a pickle alone .diffusion_pytorch_model.bin.",
        tmp_path / "half": "has weights of the variant fp16 alone: pass --variant fp16, or the file itself",
        tmp_path / "empty": "has no weights: there is no diffusion_pytorch_model.safetensors",
        tmp_path / "named": "has no weights: there is no diffusion_pytorch_model.safetensors",
        tmp_path / "lacking": "does not fit its own config: .*missing_keys",
        tmp_path / "more": "does not fit its own config: .*unexpected_keys",
        tmp_path / "shards": "is not whole: there is no diffusion_pytorch_model-00001",
        tmp_path / "out": "names '../plain.safetensors', which is no place inside of its folder",
        tmp_path / "lacking.safetensors": "it has .* numbers, by the config it has .* Pass it as a folder",
        tmp_path / "more.safetensors": "it has .* numbers, by the config it has",
        tmp_path
        / "moved.safetensors": "is not built as the teacher's own is, of which a single file has to have the config",
        tmp_path / "whole.safetensors": "whole.safetensors is no autoencoder .cond_stage_model",
        tmp_path / "unet.safetensors": "is no autoencoder .model.x",
        tmp_path / "vae.pt": "is no .safetensors file. Pickles can run code",
        tmp_path / "none.safetensors": "There is no file .*none.safetensors",
    }.items():
        with pytest.raises(ValueError, match=message):
            run(pretrained_vae_model_name_or_path=where, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "run").exists()
    assert not [path for path in (tmp_path / "cache").glob("single_files/*") if path.suffix != ".lock"]


def test_a_student_holds_one_copy_of_an_autoencoder(other, teacher_folder, tmp_path):
    """Of a repository with a second copy for other programs; what is written loads stock."""
    other.save_pretrained(tmp_path / "vae")
    shutil.copy(tmp_path / "vae" / WEIGHTS, tmp_path / "vae" / "sdxl_vae.safetensors")
    reference = ModelReference(str(teacher_folder), vae=str(tmp_path / "vae"))
    pipe = load_family(reference).pipeline
    save_student(to_pipeline(pipe.unet, 399, pipe), reference.resolve(network_name_of), tmp_path / "student")
    assert sorted(file.name for file in (tmp_path / "student" / "vae").iterdir()) == ["config.json", WEIGHTS]
    assert equal(weights(DiffusionPipeline.from_pretrained(tmp_path / "student").vae), weights(other))


def test_an_autoencoder_stays_as_it_was_resolved(other, teacher_folder, hub, repo, impatient, tmp_path):
    """What a run began with is what its student gets: whatever is committed in between, and though the Hub is down."""
    from hub_server import Fault
    from huggingface_hub import HfApi

    api, cache = HfApi(), str(tmp_path / "cache")
    for name in (repo, f"{repo}-file"):
        api.create_repo(name)
        other.save_pretrained(tmp_path / "vae")
        api.upload_folder(repo_id=name, folder_path=tmp_path / "vae")
    models = [
        ModelReference(str(teacher_folder), vae=vae).resolve(network_name_of, cache)
        for vae in (repo, f"{repo}-file/diffusion_pytorch_model.safetensors")
    ]
    tiny.pipeline(seed=9).vae.save_pretrained(tmp_path / "changed")
    for name in (repo, f"{repo}-file"):
        api.upload_folder(repo_id=name, folder_path=tmp_path / "changed")
    requests = len(hub.requests)
    for fault in (None, lambda request: Fault(status=503)):
        hub.fault = fault
        for model in models:
            assert equal(weights(model.load_vae()), weights(other))
            file = model.component_files("float32")[f"vae/{WEIGHTS}"]
            assert equal(load_file(file), dict(weights(other)))
    assert len(hub.requests) == requests
    with pytest.raises(ValueError, match="cannot (be reached for|serve) alice/none"):  # at once, not after minutes
        ModelReference(str(teacher_folder), vae="alice/none").resolve(network_name_of, cache)


def test_a_folder_of_this_machine_is_read_anew(other, teacher_folder, tmp_path):
    other.save_pretrained(tmp_path / "vae")
    reference = ModelReference(str(teacher_folder), vae=str(tmp_path / "vae"))
    assert equal(weights(reference.resolve(network_name_of).load_vae()), weights(other))
    changed = tiny.pipeline(seed=9).vae
    changed.save_pretrained(tmp_path / "vae")
    assert equal(weights(reference.resolve(network_name_of).load_vae()), weights(changed))


def test_a_conversion_is_read_where_nothing_can_be_written(other, teacher_folder, monkeypatch, tmp_path):
    other.save_pretrained(tmp_path / "vae")
    cache = str(tmp_path / "cache")
    reference = ModelReference(str(teacher_folder), vae=str(tmp_path / "vae" / WEIGHTS))
    folder = reference.resolve(network_name_of, cache).vae_folder

    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    hashed = []
    with monkeypatch.context() as context:
        context.setattr("huggingface_hub.utils.WeakFileLock", refuse)
        context.setattr(Path, "mkdir", refuse)
        context.setattr("diffusers_disback.hub.files.sha256_of", lambda file: hashed.append(file) or 64 * "0")
        assert reference.resolve(network_name_of, cache).vae_folder == folder
        assert not hashed, "a large file is hashed once in a process"
        with pytest.raises(ValueError, match="cannot be written to .*single_files .Read-only .*--cache_dir"):
            reference.resolve(network_name_of, str(tmp_path / "another"))
    with monkeypatch.context() as context:
        context.setattr("diffusers_disback.models.autoencoder.save_weights", refuse)  # as on a disk that is full
        with pytest.raises(ValueError, match="cannot be written to .*--cache_dir"):
            reference.resolve(network_name_of, str(tmp_path / "full"))
    assert [file.suffix for file in (tmp_path / "full" / "single_files").iterdir()] == [".lock"]


def test_variants_of_any_name_are_looked_into(other, teacher_folder, tmp_path):
    """A hyphen in it hides no index from the check that its shards lie beside it."""
    other.save_pretrained(tmp_path / "vae", variant="fp16-x", max_shard_size="20KB")
    reference = ModelReference(str(teacher_folder), vae=str(tmp_path / "vae"), variant="fp16-x")
    folder = reference.resolve(network_name_of).vae_folder
    assert [variant_taken(folder.iterdir(), name) for name in ("fp16-x", "fp16")] == ["fp16-x", None]
    index = folder / "diffusion_pytorch_model.safetensors.index.fp16-x.json"
    index.write_text(json.dumps({"weight_map": {"a": "../out.safetensors"}}))
    with pytest.raises(ValueError, match="names '../out.safetensors', which is no place inside"):
        files_of(folder, "the autoencoder")
