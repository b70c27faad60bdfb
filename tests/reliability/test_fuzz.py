"""Mutated files are read or refused by a `ValueError`; a sample of `fuzz.py`."""

import fuzz
import pytest


pytestmark = pytest.mark.slow


def test_mutated_files_are_read_or_refused(tmp_path, alice, impatient):
    found = fuzz.fuzz(1000, 1, tmp_path)
    assert not found.wrong, {what: (told["times"], told["content"][:200]) for what, told in found.wrong.items()}
    assert sum(found.cases.values()) >= 990 and all(found.cases.values())


def test_the_watch_sees_native_code(tmp_path):
    from safetensors.torch import load_file

    targets = fuzz.Targets(tmp_path)
    assert targets.watch.seen() == []
    load_file(tmp_path / fuzz.SECRET / "secret.safetensors")
    assert "secret.safetensors" in targets.watch.seen()
    (tmp_path / "beside").write_text("x")
    assert "beside" in targets.watch.seen()


def test_a_partial_load_is_seen(tmp_path, monkeypatch):
    def by_half(network, weights, what):
        network.conv_in.weight.data.zero_()
        raise ValueError(what)

    targets = fuzz.Targets(tmp_path)
    monkeypatch.setattr("diffusers_disback.path.path.fill", by_half)
    with pytest.raises(fuzz.PartialLoad):
        targets.path_json((targets.full.folder / "path.json").read_bytes())
