import hashlib
import json
import os
import pickle

import numpy as np
import pytest
import torch

from diffusers_disback.data.cache import digest
from diffusers_disback.data.conditions import Batches, ClassLabels, NoCondition, PromptConditions, batch_of
from diffusers_disback.data.prompts import PromptFile
from diffusers_disback.training.config import TrainingConfig
from diffusers_disback.training.inputs import load_prompts


PROMPTS = [f"prompt {i}" for i in range(50)]
SHAPE = (4, 2, 2)


def batches(**changes):
    return Batches(
        **{"num_conditions": len(PROMPTS), "latent_shape": SHAPE, "seed": 0, "stage": 1, "batch_size": 4, **changes}
    )


def flat(slices):
    return [
        ("" if dropped else PROMPTS[row], noise, generator.get_state())
        for draw in slices
        for row, dropped, noise, generator in zip(draw.rows, draw.dropped, draw.noise, draw.generators, strict=True)
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
    dropped = [sample for n in range(200) for sample in flat(batches(proportion_empty=0.1)[n])]
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
    data = PromptConditions(PROMPTS, encode, capacity)
    found, wanted = data.condition([3, 7, 40], [False, True, False]), encode([PROMPTS[3], "", PROMPTS[40]])
    assert torch.equal(found["encoder_hidden_states"], wanted["encoder_hidden_states"])
    draw = batches(proportion_empty=0.5)[0][0]
    prompts = ["" if dropped else PROMPTS[row] for row, dropped in zip(draw.rows, draw.dropped, strict=True)]
    batch = batch_of(draw, data, torch.device("cpu"))
    assert torch.equal(batch.condition["encoder_hidden_states"], encode(prompts)["encoder_hidden_states"])
    assert torch.equal(batch.negative["encoder_hidden_states"], encode([""] * 4)["encoder_hidden_states"])


def test_labels_and_nothing_are_conditions_too():
    labels, rows = ClassLabels(10, null_label=10), [3, 7, 3]
    assert len(labels) == 10 and labels.captions[7] == "7" and labels.is_encoded
    assert labels.condition(rows, [False, True, False])["class_labels"].tolist() == [3, 10, 3]
    assert labels.condition(rows, [False] * 3)["class_labels"].tolist() == rows
    draw = batches(num_conditions=10, proportion_empty=0.5)[0][0]
    batch = batch_of(draw, labels, torch.device("cpu"))
    assert batch.negative["class_labels"].tolist() == [10] * 4
    assert {10 if dropped else row for row, dropped in zip(draw.rows, draw.dropped, strict=True)} == set(
        batch.condition["class_labels"].tolist()
    )
    with pytest.raises(ValueError, match="Labels cannot be dropped: no label stands for no class"):
        ClassLabels(10).condition(rows, [False, True, False])
    none = NoCondition()
    draw = batches(num_conditions=len(none))[0][0]
    batch = batch_of(draw, none, torch.device("cpu"))
    assert len(none) == len(none.captions) == 1 and batch.condition == batch.negative == {}
    assert torch.equal(draw.noise, batches(num_conditions=1)[0][0].noise)


def test_few_prompts_are_encoded_once():
    calls = []

    def counted(prompts):
        calls.append(len(prompts))
        return encode(prompts)

    data = PromptConditions(PROMPTS, counted)
    before = len(calls)
    data.condition([0, 1, 2, 3], [False] * 4)
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


TEXT = "a cat\na dög 猫\n"


@pytest.mark.parametrize(
    "content",
    [
        TEXT.replace("\n", "\r\n").encode(),
        TEXT.replace("\n", "\r").encode(),
        TEXT.strip().encode(),
        TEXT.encode("utf-8-sig"),
        TEXT.encode("utf-16"),
        b"\xfe\xff" + TEXT.encode("utf-16-be"),
        TEXT.replace("\n", "\r\n").encode("utf-16"),
        TEXT.encode("utf-32"),
        ("\ufeff" + TEXT.replace("\n", "\n\ufeff")).encode(),
        b"\xef\xbb\xbf\n \n" + TEXT.replace("cat", "\t cat ").encode(),
    ],
    ids=["CRLF", "CR", "no end", "BOM", "UTF-16", "big-endian", "UTF-16 CRLF", "UTF-32", "BOM a line", "blanks"],
)
def test_prompt_files_of_other_programs(tmp_path, content):
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    prompts = PromptFile(file)
    assert list(prompts) == ["a cat", "a dög 猫"] and prompts[-1] == "a dög 猫"
    assert digest(prompts) == f"{hashlib.sha256(content).hexdigest()} 2"
    assert list(pickle.loads(pickle.dumps(prompts))) == list(prompts)


def test_prompt_files_across_the_reader_s_blocks(tmp_path):
    """Lines, line ends and characters of several bytes lie across the borders of what is read at once."""
    wanted = [f"{number} " + "ü猫" * (number % 50 + 1) for number in range(2000)]
    for encoding, end in (("utf-8", "\r\n"), ("utf-8", "\r"), ("utf-16", "\n")):
        (tmp_path / "prompts.txt").write_bytes((end.join(wanted)).encode(encoding))
        assert list(PromptFile(tmp_path / "prompts.txt")) == wanted


def test_prompt_files_that_are_no_prompts_are_told_with_what_to_do(tmp_path):
    import bz2
    import gzip
    import lzma
    import zipfile

    file = tmp_path / "prompts.txt"
    row = {"file_name": "1.png", "text": "a cat"}
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("prompts.txt", TEXT)
    contents = {
        "holds a NUL character.*UTF-16LE": [TEXT.encode("utf-16-le"), b"a cat\na \0dog\n", b"\0" * 100],
        "line 2 is not UTF-8.*WINDOWS-1252": ["a cat\na dög\n".encode("latin-1"), "a cat\ra dög".encode("latin-1")],
        "begins as UTF-16-LE, but is none": [b"\xff\xfea\0\0\xd8\n\0"],
        "gzip archive; unpack": [gzip.compress(TEXT.encode())],
        "zip archive": [(tmp_path / "zip").read_bytes()],
        "bzip2": [bz2.compress(TEXT.encode())],
        "xz archive": [lzma.compress(TEXT.encode())],
        "an image": [b"\x89PNG\r\n\x1a\n"],
        "is a table or JSON.*--train_data_dir.*--caption_column": [
            (json.dumps(row) + "\n").encode() * 2,
            ("\n" + json.dumps([row])).encode("utf-8-sig"),
            json.dumps([row], indent=2).encode(),
            b"file_name,text\n1.png,a cat\n",
            b'"id"\t"caption"\n1\ta cat\n',
        ],
        "is empty": [b"", b"\xef\xbb\xbf", b" \n\r\n\t\n"],
        "more than 1,000,000 characters": [b"a" * 1_000_001],
    }
    for message, bad in contents.items():
        for content in bad:
            file.write_bytes(content)
            with pytest.raises(ValueError, match=f"prompts.txt.*{message}"):
                PromptFile(file)
    (tmp_path / "captions.csv").write_text("text\na cat\n")
    with pytest.raises(ValueError, match="is a table or JSON"):
        PromptFile(tmp_path / "captions.csv")
    for prompt in ("text, logo, simple", "[a cat]", "{a cat|a dog}", "a,b", "BZh", "PKZIP"):  # these are prompts
        file.write_text(prompt)
        assert list(PromptFile(file)) == [prompt]


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        (tmp_path, "is a folder"),
        (tmp_path / "pipe", "is no regular file"),
        ("/dev/null", "regular"),
    ):
        with pytest.raises(ValueError, match=message):
            PromptFile(name)


def test_a_prompts_file_that_changes_while_it_is_used_is_told(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text(TEXT)
    prompts = PromptFile(file)
    os.utime(file, (1, 1))
    assert prompts[1] == "a dög 猫", "it was only touched"
    file.write_text(TEXT.replace("cat", "cow"))
    with pytest.raises(ValueError, match="prompts.txt has changed since it was read"):
        prompts[1]
    file.unlink()
    with pytest.raises(ValueError, match="cannot be read any more: No such file"):
        prompts[0]
    file.write_text(TEXT)
    assert prompts[0] == "a cat", "put back, as it was"


def of_rows(folder, rows, streaming, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    places = {"output_dir": f"{folder}-out", "cache_dir": f"{folder}-cache"}
    return load_prompts(TrainingConfig(dataset_name=str(folder), dataset_streaming=streaming, **places, **changes))


def test_captions_are_the_same_stored_or_streamed_and_few_numbers_are_held(tmp_path):
    values = ["a cat", None, " a\ndog \t ", "", "\ufeffa\u2028cow", " \n", "a cat", "猫"]
    wanted = ["a cat", "a dog", "a cow", "a cat", "猫"]
    stored, streamed = (of_rows(tmp_path / "a", [{"text": v} for v in values], how) for how in (False, True))
    assert list(stored) == list(streamed) == wanted and stored[-1] == "猫" and stored.kept.dtype == np.int64
    assert digest(stored) == digest(wanted)
    assert list(pickle.loads(pickle.dumps(stored))) == wanted
    for streaming in (False, True):
        few = of_rows(tmp_path / f"b{streaming}", [{"text": v} for v in values], streaming, max_train_samples=3)
        assert list(few) == wanted[:2], "three rows, of which one has no caption"


def test_values_that_are_no_captions_are_refused_with_row_and_column(tmp_path):
    told = "Row 1 of column 'text' is a {}, not a text. Name a column with one text a row by --caption_column"
    cases = {
        told.format("list"): [None, ["a", "b"]],
        told.format("dict"): [None, {"en": "a cat"}],
        told.format("int"): [None, 3],
        told.format("float"): [None, 0.5],
        told.format("bool"): [None, True],
        "Row 1 of column 'text' holds a NUL": ["a", "b\0"],
        "Column 'text' of the data set holds no captions: all of its 2 rows": [None, " "],
    }
    for number, (message, values) in enumerate(cases.items()):
        for streaming in (False, True):
            with pytest.raises(ValueError, match=message):
                of_rows(tmp_path / f"{number}", [{"text": value} for value in values], streaming)
        assert not list(tmp_path.rglob("captions*")), "nothing is left for the next run"


def test_data_sets_that_cannot_be_read_are_told(tmp_path):
    (tmp_path / "file.jsonl").write_text('{"text": "a"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "latin").mkdir()
    (tmp_path / "latin" / "train.csv").write_bytes("text\na dög\n".encode("latin-1"))
    for source, message in (
        (
            {"dataset_name": str(tmp_path / "file.jsonl")},
            "--dataset_name .*file.jsonl is a file, but a folder is needed",
        ),
        ({"train_data_dir": str(tmp_path / "file.jsonl")}, "--train_data_dir .*file.jsonl is a file"),
        (
            {"train_data_dir": str(tmp_path / "nowhere")},
            "--train_data_dir .*nowhere cannot be read: there is no such folder",
        ),
        ({"dataset_name": str(tmp_path / "broken")}, "broken' cannot be read"),
        ({"dataset_name": str(tmp_path / "latin")}, "latin' cannot be read"),
    ):
        for streaming in (False, True):
            places = {"output_dir": str(tmp_path / "out"), "cache_dir": str(tmp_path / "cache")}
            with pytest.raises(ValueError, match=message):
                load_prompts(TrainingConfig(**source, **places, dataset_streaming=streaming))


def test_captions_of_an_image_folder_and_of_a_data_set(tmp_path):
    from shapes.dataset import write_image_folder

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


def test_captions_of_another_data_set_are_not_taken_for_those_of_this_one(tmp_path):
    """As of a run that was broken off before it trained, and is begun again in the same folder with other flags."""
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text(json.dumps({"text": f"a cat {name}", "other": "a dog"}) + "\n")
    places = {"output_dir": str(tmp_path / "out"), "cache_dir": str(tmp_path / "cache"), "dataset_streaming": True}
    for changes, expected in (
        ({"dataset_name": str(tmp_path / "a")}, "a cat a"),
        ({"dataset_name": str(tmp_path / "b")}, "a cat b"),
        ({"dataset_name": str(tmp_path / "b"), "caption_column": "other"}, "a dog"),
        ({"dataset_name": str(tmp_path / "a")}, "a cat a"),
    ):
        assert list(load_prompts(TrainingConfig(**places, **changes))) == [expected]
    (tmp_path / "a" / "train.jsonl").write_text(json.dumps({"text": "changed meanwhile"}) + "\n")
    assert list(load_prompts(TrainingConfig(dataset_name=str(tmp_path / "a"), **places))) == ["a cat a"], "as it was"
