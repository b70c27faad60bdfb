import copy
import os
import random
import signal
import time
from pathlib import Path

import pytest
import tiny
import torch

from diffusers_disback.data import cache as condition_cache
from diffusers_disback.data.cache import ConditionCache, choose_cache
from diffusers_disback.data.conditions import Batches, PromptConditions, batch_of
from diffusers_disback.data.prompts import PromptFile
from diffusers_disback.families import family_of


MANY = [f"a {colour} {number}" for number in range(1000) for colour in ("red", "blue", "green", "gray", "navy")]


@pytest.fixture(scope="module", params=tiny.TEXT)
def family(request):
    return family_of(tiny.PIPELINES[request.param]())


def make(folder, family, prompts, **arguments):
    return ConditionCache(folder, prompts, family.encode, family.encoder_id, **arguments)


def test_rows_are_the_conditions_in_half_precision(tmp_path, family):
    cache = make(tmp_path, family, MANY[:70], shard_size=32)
    cache.build(show_progress=False)
    rows = [69, 0, 31, 32, 5, 69]
    found, expected = cache.read(rows), family.encode([MANY[row] for row in rows])
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == torch.float32 and (found[key] - tensor).abs().max() < 2e-3 * tensor.abs().max()
    written = sum(file.stat().st_size for file in cache.folder.iterdir())
    assert 70 * cache.bytes_per_prompt <= written < 70 * cache.bytes_per_prompt + 3 * 1000
    assert cache.missing == 0


def test_a_cache_is_found_again_and_another_text_encoder_or_list_is_another(tmp_path, family):
    cache = make(tmp_path, family, MANY[:8])
    other = family_of(type(family.pipeline)(**{**family.pipeline.components}))
    assert make(tmp_path, other, list(MANY[:8])).folder == cache.folder
    assert make(tmp_path, other, MANY[1:9]).folder != cache.folder
    state = {key: value.clone() for key, value in family.text_encoders[-1].state_dict().items()}
    next(family.text_encoders[-1].parameters()).data += 1e-3
    assert make(tmp_path, family, MANY[:8]).folder != cache.folder
    family.text_encoders[-1].load_state_dict(state, strict=True)
    assert make(tmp_path, family, MANY[:8]).folder == cache.folder
    tokenizer = family.pipeline.tokenizer
    family.pipeline.tokenizer = copy.deepcopy(tokenizer)
    family.pipeline.tokenizer.add_tokens(["turquoise"])
    assert make(tmp_path, family, MANY[:8]).folder != cache.folder
    family.pipeline.tokenizer = tokenizer
    assert make(tmp_path, family, MANY[:8]).folder == cache.folder


def test_killed_at_ten_points_it_is_whole_in_the_end(tmp_path):
    """5,000 prompts: no row is lost or doubled, and shards that are there are not written again."""
    family = family_of(tiny.pipeline())
    cache = make(tmp_path, family, MANY, shard_size=100)
    generator, seen = random.Random(0), []
    while len(seen) < 10 or (
        len(seen) < 100 and not seen[-1]
    ):  # a busy machine may not come to the first shard in ten
        child = os.fork()
        if child == 0:
            cache.build(show_progress=False)
            os._exit(0)
        time.sleep(generator.uniform(0.02, 0.12))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        seen.append({file: file.stat().st_mtime_ns for file in cache.folder.glob("*.safetensors")})
    assert 0 < len(seen[-1]) < 50, "killed neither before nor after all"
    cache.build(show_progress=False)
    files = sorted(cache.folder.glob("*.safetensors"))
    assert len(files) == 50 and all(files[i].name == f"conditions-{i:06d}.safetensors" for i in range(50))
    assert all(file.stat().st_mtime_ns == written for moment in seen for file, written in moment.items())
    rows = list(range(0, 5000, 7))
    expected = family.encode([MANY[row] for row in rows])["encoder_hidden_states"]
    assert (cache.read(rows)["encoder_hidden_states"] - expected).abs().max() < 2e-3 * expected.abs().max()


def test_a_whole_cache_that_cannot_be_written_to_is_read(tmp_path, family, monkeypatch):
    make(tmp_path, family, MANY[:8]).build(show_progress=False)

    def refuse(path, *_, **__):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    cache = make(tmp_path, family, MANY[:8])
    cache.build(show_progress=False)
    assert len(cache.read([0, 7])["encoder_hidden_states"]) == 2
    with pytest.raises(ValueError, match="cannot be written to .*Read-only file system.*--cache_dir"):
        make(tmp_path, family, MANY[:9]).build(show_progress=False)


def test_a_half_written_shard_is_no_shard(tmp_path, monkeypatch):
    cache = make(tmp_path, family_of(tiny.pipeline()), MANY[:8])

    def broken_off(tensors, file):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(condition_cache, "save_weights", broken_off)
    with pytest.raises(KeyboardInterrupt):
        cache.build(show_progress=False)
    monkeypatch.undo()
    assert cache.missing == 8 * cache.bytes_per_prompt
    cache.build(show_progress=False)
    assert len(cache.read(list(range(8)))["encoder_hidden_states"]) == 8


def test_a_damaged_shard_is_encoded_anew(tmp_path, caplog):
    family = family_of(tiny.pipeline())
    cache = make(tmp_path, family, MANY[:8], shard_size=4)
    cache.build(show_progress=False)
    file = cache.folder / "conditions-000001.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b""):
        file.write_bytes(damaged)
        assert cache.missing == 4 * cache.bytes_per_prompt
        make(tmp_path, family, MANY[:8], shard_size=4).build(show_progress=False)
        assert file.read_bytes() == whole and "is damaged; its conditions are encoded anew" in caplog.text
    file.write_bytes(whole[:-1])
    condition_cache._open.cache_clear()
    with pytest.raises(ValueError, match="conditions-000001.safetensors cannot be read"):
        cache.read([5])


def test_batches_are_the_same_with_and_without(tmp_path, family):
    prompts = MANY[:40]
    cache = make(tmp_path, family, prompts, shard_size=16)
    cache.build(show_progress=False)
    batches = Batches(len(prompts), (4, 8, 8), 0, 1, 8, proportion_empty=0.5)
    (draw,) = batches[3]
    assert set(draw.dropped) == {True, False}
    one = batch_of(draw, PromptConditions(prompts, family.encode, cache=cache), torch.device("cpu"))
    two = batch_of(draw, PromptConditions(prompts, family.encode), torch.device("cpu"))
    for key, tensor in two.condition.items():
        assert (one.condition[key] - tensor).abs().max() < 2e-3 * tensor.abs().max()
        assert torch.equal(one.negative[key], two.negative[key])
    empty = draw.dropped.index(True)
    assert all(torch.equal(one.condition[key][empty], one.negative[key][empty]) for key in one.condition)


def test_auto_says_the_size_and_takes_no_more_than_half_of_the_free_disk(tmp_path, monkeypatch):
    cache = make(tmp_path, family_of(tiny.pipeline()), MANY)
    kilobytes = cache.bytes_per_prompt / 1e3

    def free(number):
        monkeypatch.setattr(condition_cache.shutil, "disk_usage", lambda place: type("", (), {"free": number}))

    free(10**12)
    on_disk, why = choose_cache(cache, "auto", 5000)
    assert not on_disk and f"5,000 prompts x {kilobytes:.0f} kB in half precision) are kept in memory" in why
    assert choose_cache(cache, "off", 0) == (False, "conditions of 5,000 prompts are encoded on the fly")
    on_disk, why = choose_cache(cache, "auto", 100)
    assert on_disk and f"5,000 prompts x {kilobytes:.0f} kB" in why and str(cache.folder) in why
    size = 5000 * cache.bytes_per_prompt
    free(2 * size - 1)
    on_disk, why = choose_cache(cache, "auto", 100)
    assert not on_disk and "more than half of the free disk: they are encoded on the fly" in why
    assert choose_cache(cache, "disk", 100)[0]
    free(size - 1)
    with pytest.raises(ValueError, match="do not fit into the .* GB that are free"):
        choose_cache(cache, "disk", 100)


def test_the_size_of_a_row_at_full_size():
    sd = {"encoder_hidden_states": torch.zeros(1, 77, 768)}
    xl = {
        "encoder_hidden_states": torch.zeros(1, 77, 2048),
        "text_embeds": torch.zeros(1, 1280),
        "time_ids": torch.zeros(1, 6),
    }
    sizes = [ConditionCache("x", ["a"], lambda prompts, c=c: c, str).bytes_per_prompt for c in (sd, xl)]
    assert [round(size / 1e3) for size in sizes] == [118, 318]


def test_values_beyond_half_precision_are_told(tmp_path):
    cache = ConditionCache(tmp_path, ["a"], lambda prompts: {"x": torch.full((1, 100), 1e6)}, str)
    with pytest.raises(ValueError, match="x has values beyond half precision; pass --cache_conditions off"):
        cache.build(show_progress=False)
    assert not list(cache.folder.glob("*.safetensors"))


@pytest.mark.slow
def test_a_million_prompts_take_little_memory(tmp_path):
    """Encoded on the fly, 200 batches from all over the file."""
    import resource

    file = tmp_path / "prompts.txt"
    with open(file, "w") as stream:
        stream.writelines(
            f"a red circle number {number} on a navy background, seen from afar\n" for number in range(10**6)
        )
    family = family_of(tiny.pipeline())
    family.encode(["warm", "up"])
    child = os.fork()
    if child == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        prompts = PromptFile(file)
        data = PromptConditions(prompts, family.encode)
        batches = Batches(len(prompts), (4, 8, 8), 0, 1, 8)
        for number in range(200):
            for draw in batches[number]:
                batch_of(draw, data, torch.device("cpu"))
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        (tmp_path / "grown").write_text(f"{grown:.0f}")
        os._exit(0)
    os.waitpid(child, 0)
    print(f"{(tmp_path / 'grown').read_text()} MB")
    assert int((tmp_path / "grown").read_text()) <= 300
