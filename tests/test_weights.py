"""Files of weights are read whole, into memory of their own, or an error names the file and the remedy."""

import pytest
import torch
from safetensors.torch import save_file

from diffusers_disback.weights import metadata_of, open_weights, read_weights


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
