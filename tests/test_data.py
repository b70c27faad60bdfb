import json
import pickle

import pytest
import torch

from diffusers_disback.config import TrainingConfig
from diffusers_disback.data import PromptBatches, PromptData, PromptFile
from diffusers_disback.run import load_prompts


PROMPTS = [f"prompt {i}" for i in range(50)]
SHAPE = (4, 2, 2)


def batches(**changes):
    return PromptBatches(
        **{"prompts": PROMPTS, "latent_shape": SHAPE, "seed": 0, "stage": 1, "batch_size": 4, **changes}
    )


def flat(slices):
    return [
        (prompt, noise, generator.get_state())
        for draw in slices
        for prompt, noise, generator in zip(draw.prompts, draw.noise, draw.generators, strict=True)
    ]


def same(one, two):
    return all(
        a[0] == b[0] and torch.equal(a[1], b[1]) and torch.equal(a[2], b[2]) for a, b in zip(one, two, strict=True)
    )


def test_a_sample_is_a_function_of_its_numbers():
    assert same(flat(batches()[7]), flat(batches()[7]))
    for changes in ({"seed": 1}, {"stage": 2}):
        assert not same(flat(batches()[7]), flat(batches(**changes)[7]))
    assert not same(flat(batches()[7]), flat(batches()[8]))
    noises = torch.cat([draw.noise for n in range(20) for draw in batches()[n]])
    assert len(noises.flatten(1).unique(dim=0)) == 80, "no two samples are alike"


@pytest.mark.parametrize(
    "shares",
    [
        [{"batch_size": 2, "slices": 2}],
        [{"batch_size": 2, "process_index": i, "num_processes": 2} for i in range(2)],
        [{"batch_size": 1, "slices": 2, "process_index": i, "num_processes": 2} for i in range(2)],
    ],
    ids=["accumulated", "two processes", "both"],
)
def test_slicing_changes_no_sample(shares):
    assert same(flat(batches()[3]), [sample for share in shares for sample in flat(batches(**share)[3])])


def test_dropped_prompts_change_nothing_else():
    kept = [sample for n in range(200) for sample in flat(batches()[n])]
    dropped = [sample for n in range(200) for sample in flat(batches(proportion_empty_prompts=0.1)[n])]
    assert all(torch.equal(a[1], b[1]) for a, b in zip(kept, dropped, strict=True))
    share = sum(prompt == "" for prompt, *_ in dropped) / len(dropped)
    assert 0.07 < share < 0.13
    assert all(a[0] == b[0] for a, b in zip(kept, dropped, strict=True) if b[0])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_gives_the_asked_batches_in_order(num_workers):
    data = batches()
    drawn = list(data.loader(range(5, 9), num_workers))
    assert len(drawn) == 4
    for n, slices in zip(range(5, 9), drawn, strict=True):
        assert same(flat(slices), flat(data[n]))


def encode(prompts):
    return {"encoder_hidden_states": torch.tensor([[float(len(p)), hash(p) % 97] for p in prompts])}


@pytest.mark.parametrize("capacity", [0, 4096], ids=["on the fly", "kept"])
def test_conditions_are_those_of_the_prompts(capacity):
    data = PromptData(PROMPTS, encode, capacity)
    wanted = [PROMPTS[3], "", PROMPTS[40]]
    assert torch.equal(data.conditions(wanted)["encoder_hidden_states"], encode(wanted)["encoder_hidden_states"])
    draw = batches(proportion_empty_prompts=0.5)[0][0]
    batch = data.batch(draw, torch.device("cpu"))
    assert torch.equal(batch.condition["encoder_hidden_states"], encode(draw.prompts)["encoder_hidden_states"])
    assert torch.equal(batch.negative["encoder_hidden_states"], encode([""] * 4)["encoder_hidden_states"])


def test_few_prompts_are_encoded_once():
    calls = []

    def counted(prompts):
        calls.append(len(prompts))
        return encode(prompts)

    data = PromptData(PROMPTS, counted)
    before = len(calls)
    data.conditions(PROMPTS[:4])
    assert len(calls) == before


def test_a_prompt_file_is_its_lines(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n  two  \nthrée – ünï\n\n", encoding="utf-8")
    prompts = PromptFile(file)
    assert list(prompts) == ["one", "two", "thrée – ünï"]
    assert list(PromptFile(file, max_samples=2)) == ["one", "two"]
    assert list(pickle.loads(pickle.dumps(prompts))) == list(prompts), "workers get it whole"


def test_prompt_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        PromptFile(tmp_path / "nothing.txt")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="is empty; it needs one prompt per line"):
        PromptFile(tmp_path / "empty.txt")
    (tmp_path / "bytes.txt").write_bytes(b"fine\n\xff\xfe\n")
    with pytest.raises(ValueError, match="line 2 is not UTF-8"):
        PromptFile(tmp_path / "bytes.txt")


def test_captions_of_an_image_folder_and_of_a_data_set(tmp_path):
    from shapes.world import write_image_folder

    write_image_folder(tmp_path / "images", 5)
    captions = [json.loads(line)["text"] for line in (tmp_path / "images" / "metadata.jsonl").read_text().splitlines()]
    cache = {"cache_dir": str(tmp_path / "cache")}
    for source in ({"train_data_dir": str(tmp_path / "images")}, {"dataset_name": str(tmp_path / "images")}):
        assert list(load_prompts(TrainingConfig(**source, **cache))) == captions
        assert list(load_prompts(TrainingConfig(**source, **cache, max_train_samples=2))) == captions[:2]
    with pytest.raises(ValueError, match="has no column 'caption'; it has"):
        load_prompts(TrainingConfig(train_data_dir=str(tmp_path / "images"), caption_column="caption", **cache))


def test_no_prompts_or_two_sources_are_refused():
    with pytest.raises(ValueError, match="There are no prompts: pass --prompts_file"):
        load_prompts(TrainingConfig())
    with pytest.raises(ValueError, match="--prompts_file and --dataset_name are given"):
        TrainingConfig(prompts_file="a", dataset_name="b")
