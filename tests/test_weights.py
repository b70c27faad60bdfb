"""Files of weights are read whole, into memory of their own, or an error names the file and the remedy; equal ones are
written as equal files."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from diffusers_disback.hub.publish import export
from diffusers_disback.models import adapters
from diffusers_disback.models.weights import (
    adapter_text,
    cast_files,
    metadata_of,
    open_weights,
    read_weights,
    save_weights,
)


def test_what_was_read_does_not_change_with_the_file(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(64, 64)}, file, {"said": "so"})
    weights = read_weights(file)
    with open(file, "r+b") as stream:
        size = len(stream.read())
        stream.seek(200)
        stream.write(bytes(size - 200))
    assert torch.equal(weights["a"], torch.ones(64, 64)) and metadata_of(file) == {"said": "so"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>Log in</html>", "web page"),
        (b"", "no whole safetensors"),
        (b"\x08\0\0\0\0\0\0\0{}", "no whole safetensors"),
        (b"\x00" * 7, "no whole safetensors"),
        (b"\xff" * 64, "no whole safetensors"),
        (len(b"[" * 90_000).to_bytes(8, "little") + b"[" * 90_000, "no whole safetensors"),
        (None, "no such file"),
    ],
)
@pytest.mark.parametrize("read", [read_weights, open_weights, metadata_of])
def test_what_is_no_file_of_weights_is_told(tmp_path, read, content, words):
    file = tmp_path / "x.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        read(file)
    assert "x.safetensors" in str(error.value)


def test_a_folder_is_no_file_of_weights(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_weights(tmp_path)


TEXTS = {word: f'{word}: "ä" \n\t\\ \x1f\x7f {{}} €' for word in ("format", "lora", "b", "a", "more")}


def test_equal_weights_are_equal_files(tmp_path):
    """safetensors alone writes several texts in an order that changes from call to call, within one process, too."""
    weights = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(3, dtype=torch.float16), "ä": torch.zeros(0)}
    written = set()
    for texts in (TEXTS, dict(reversed(TEXTS.items())), TEXTS, TEXTS):
        save_weights(weights, tmp_path / "x.safetensors", texts)
        written.add((tmp_path / "x.safetensors").read_bytes())
    assert len(written) == 1
    assert metadata_of(tmp_path / "x.safetensors") == TEXTS
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == weights.keys() and all(torch.equal(read[key], weights[key]) for key in weights)
    for texts in (None, {}, {"format": "pt"}):
        save_weights(weights, tmp_path / "x.safetensors", texts)
        save_file(weights, tmp_path / "y.safetensors", texts)
        assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()


def test_sets_of_a_config_are_sorted_at_any_depth():
    config = {
        "layers": {"to_q", "to_k", "to_v"},
        "more": {"z": frozenset("cab"), "y": [{"b", "a"}, ("x",)]},
        "n": None,
    }
    assert json.loads(adapter_text(config)) == {
        "layers": ["to_k", "to_q", "to_v"],
        "more": {"y": [["a", "b"], ["x"]], "z": ["a", "b", "c"]},
        "n": None,
    }


def write_all(folder: Path) -> dict[str, str]:
    """Every kind of file that is written with metadata, from equal weights. Returns their hashes."""
    network = adapters.SharedNetwork(tiny.unet())
    network.add("student", adapters.lora_config(2))
    adapters.write_adapter(network.network, "student", folder / "node")
    cast_files([folder / "node" / "pytorch_lora_weights.safetensors"], torch.float16)
    adapters.save_lora(network.weights("student"), network.config("student"), folder / "lora", "unet")
    layers = {key: value + 1 for key, value in network.weights("student").items()}
    export.save_lora(layers, 2, folder / "extracted", network.network)
    network.release().save_pretrained(folder / "pipeline" / "unet")
    (folder / "pipeline" / "model_index.json").write_text("{}")
    save_file({"x": torch.ones(2)}, folder / "pipeline" / "unet" / "model.safetensors", TEXTS)
    export.add_half_variant(folder / "pipeline")
    (folder / "pipeline" / "unet" / "model.safetensors").unlink()  # not by us
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.slow
def test_files_do_not_follow_the_hash_seed(tmp_path):
    program = (
        "import json, pathlib, sys, test_weights\nprint(json.dumps(test_weights.write_all(pathlib.Path(sys.argv[1]))))"
    )
    said = []
    for seed in ("0", "1", "42"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        line = [sys.executable, "-c", program, str(tmp_path / seed)]
        said.append(subprocess.run(line, check=True, capture_output=True, text=True, env=environment).stdout)
    assert len(json.loads(said[0])) == 9 and len(set(said)) == 1, said


def test_files_written_twice_are_equal(tmp_path):
    assert write_all(tmp_path / "a") == write_all(tmp_path / "b")
