"""Names of others stay inside their folder; JSON is read with its shape checked; files are written whole or not at all."""

import os

import pytest

from diffusers_disback.hub.files import (
    inside,
    parse_json,
    printable,
    read_json,
    read_text,
    write_json,
    writing,
    written_whole,
)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "weights.safetensors").write_bytes(b"own")
    (folder / "own").symlink_to(folder / "unet")
    (tmp_path / "secret").write_text("secret")
    (folder / "out").symlink_to(tmp_path / "secret")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "unet" / "up").symlink_to("../../")
    return folder


@pytest.mark.parametrize(
    "name", ["unet", "unet/weights.safetensors", "own/weights.safetensors", "absent", "./unet", "..a"]
)
def test_names_inside_are_taken(folder, name):
    assert inside(folder, name, "it") == folder / name


@pytest.mark.parametrize(
    "name",
    [
        *(
            "../secret",
            "unet/../../secret",
            "/etc/passwd",
            "C:secret",
            "C:\\secret",
            "\\\\host\\share",
            "..\\secret",
            "..",
            ".",
        ),
        *("a\0b", "a\nb", "a\x1b[31mb", "", "out", "unet/up", "unet/up/secret", "loop", "//host/share", "a" * 5000),
        *(None, 3, ["unet"], {"a": 1}, True),
    ],
)
def test_names_that_lead_out_are_refused(folder, name):
    with pytest.raises(ValueError, match="index.json of somebody") as error:
        inside(folder, name, "index.json of somebody")
    assert "\x1b" not in str(error.value)


def test_a_snapshot_may_link_to_its_own_blobs_alone(tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    (snapshot / "unet").mkdir(parents=True)
    for place in ("models--a--b/blobs", "models--c--d/blobs"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "1234").write_bytes(b"weights")
    (snapshot / "unet" / "own").symlink_to("../../../blobs/1234")
    (snapshot / "unet" / "other").symlink_to("../../../../models--c--d/blobs/1234")
    assert inside(snapshot, "unet/own", "it").read_bytes() == b"weights"
    assert inside(snapshot / "unet", "own", "it").read_bytes() == b"weights"
    with pytest.raises(ValueError, match="leads out"):
        inside(snapshot, "unet/other", "it")


def test_a_folder_that_is_a_link_is_no_way_out(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert inside(tmp_path / "link", "unet", "it") == tmp_path / "link" / "unet"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "no valid JSON"),
        (b"[]", "holds a list, where a dict"),
        (b"\xff{}", "not UTF-8"),
        (b"[" * 200_000, "nested too deeply"),
        (b"null", "NoneType"),
        (None, "cannot be read"),
    ],
)
def test_json_of_others_is_read_or_refused(tmp_path, content, words):
    file = tmp_path / "x.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_json(file)


def test_json_of_others_is_what_it_is(tmp_path):
    (tmp_path / "x.json").write_text('{"ä": 1}')
    assert read_json(tmp_path / "x.json") == {"ä": 1} and read_text(tmp_path / "x.json") == '{"ä": 1}'
    assert parse_json("[1]", "it", list) == [1]


def test_a_file_is_written_whole_or_stays_as_it_was(tmp_path):
    file = tmp_path / "x.json"
    write_json(file, {"a": 1})
    for problem in (OSError("full"), KeyboardInterrupt()):
        with pytest.raises(type(problem)), written_whole(file) as draft:
            draft.write_text("half")
            raise problem
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert read_json(file) == {"a": 1} and os.listdir(tmp_path) == ["x.json"]


def test_drafts_keep_their_suffix(tmp_path):
    with written_whole(tmp_path / "x.png") as draft:
        assert draft.suffix == ".png" and draft.parent == tmp_path
        draft.write_bytes(b"")


def test_control_characters_are_shown_as_escapes():
    assert printable("a\x1b[31m\n\u202eb ä 猫") == "a\\x1b[31m\\n\\u202eb ä 猫"
    assert printable("\ud800") == "\\ud800"


@pytest.mark.parametrize("said", ["basic_ios::clear: iostream error", "[enforce fail at inline_container.cc:858]"])
def test_what_torch_says_of_a_full_disk_is_an_error_of_the_disk(tmp_path, said):
    with pytest.raises(OSError) as error, writing(tmp_path / "new" / "optimizer.bin"):
        raise RuntimeError(said)
    assert error.value.filename == str(tmp_path / "new" / "optimizer.bin")
    with pytest.raises(RuntimeError, match="another"), writing(tmp_path):
        raise RuntimeError("another")
