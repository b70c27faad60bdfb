import json
import shutil

import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file

from diffusers_disback.models.reference import ModelReference
from diffusers_disback.models.weights import fingerprint
from diffusers_disback.path.path import DegradationPath


def weights_equal(one, two):
    one, two = one.state_dict(), two.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.fixture
def path(tmp_path, teacher_folder):
    return tiny.path(tmp_path / "path", teacher_folder)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_after_loading_the_weights_are_the_nodes(path, index):
    network = tiny.unet(seed=9)
    path.load(index, into=network)
    assert weights_equal(network, tiny.unet(seed=index))


def test_a_path_is_what_is_in_its_folder(path):
    again = DegradationPath.from_pretrained(path.folder)
    assert len(again) == 2 and again.complete and again.manifest == path.manifest
    assert [node["step"] for node in again.nodes] == [100, 200]
    node = json.loads((path.node_folder(1) / "node.json").read_text())
    assert node == {**path.nodes[0], "path": path.manifest["id"]} and node["dtype"] == "float32"


def test_a_path_of_version_1_is_read_verified_and_pushed_as_it_is(path, repo, hub):
    """As it was written before paths told the component: a UNet's."""
    file = path.folder / "path.json"
    old = {key: value for key, value in path.manifest.items() if key != "component"} | {"format_version": 1}
    file.write_text(json.dumps(old))
    again = DegradationPath.from_pretrained(path.folder, teacher=path.teacher)
    assert again.denoiser == "unet" and len(again) == 2
    again.check(fingerprint(tiny.unet()), tiny.START, "unet")
    again.push_to_hub(repo)
    shared = DegradationPath.from_pretrained(repo, teacher=path.teacher)
    assert shared.manifest["format_version"] == 1 and "component" not in shared.manifest
    for read in (again, shared):
        read.verify(tiny.unet())
        for index in (0, 1, 2):
            network = tiny.unet(seed=9)
            read.load(index, into=network)
            assert weights_equal(network, tiny.unet(seed=index))
    again.begin(100)  # a recording that is resumed stays what it was
    again.append(tiny.unet(seed=3), step=200, loss=0.5)
    assert json.loads(file.read_text())["format_version"] == 1


def test_a_path_names_the_component_that_its_nodes_are_of(path):
    assert path.manifest["format_version"] == 2 and path.manifest["component"] == "unet"
    with pytest.raises(ValueError, match="is of a pipeline's unet, but this teacher's denoiser is its transformer"):
        path.check(fingerprint(tiny.unet()), tiny.START, "transformer")
    for version, component in [(2, None), (2, "../unet"), (2, "a/b"), (2, 3), (2, ""), (1, "transformer")]:
        changed = {**path.manifest, "format_version": version, "component": component}
        (path.folder / "path.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match="'component' cannot be"):
            DegradationPath.from_pretrained(path.folder)
    del changed["component"]
    (path.folder / "path.json").write_text(json.dumps({**changed, "format_version": 2}))
    with pytest.raises(ValueError, match="'component' is missing"):
        DegradationPath.from_pretrained(path.folder)


def test_a_node_loads_in_stock_diffusers(path):
    stock = UNet2DConditionModel.from_pretrained(path.folder / "degradation-000200", subfolder="unet")
    assert weights_equal(stock, tiny.unet(seed=2))


def test_nodes_that_are_not_there(path):
    for index in (-1, 3):
        with pytest.raises(IndexError, match=f"node {index} is not on this path: its recorded nodes are 1..2"):
            path.load(index, into=tiny.unet())


def test_steps_grow(path):
    with pytest.raises(ValueError, match="does not come after step 200"):
        path.append(tiny.unet(), step=200, loss=0.1)


def test_a_resumed_recording_forgets_what_came_after(path):
    path.begin(100)
    assert len(path) == 1 and not path.complete
    assert sorted(f.name for f in path.folder.iterdir()) == ["degradation-000100", "path.json"]
    path.append(tiny.unet(seed=5), step=200, loss=0.5)
    network = tiny.unet()
    DegradationPath.from_pretrained(path.folder).load(2, into=network)
    assert weights_equal(network, tiny.unet(seed=5))


def node_file(path):
    return path.node_folder(1) / "unet" / "diffusion_pytorch_model.safetensors"


def rewrite(path, change):
    """Changes node 1's tensors, with a hash to match: as if somebody else had written it."""
    weights = load_file(node_file(path))
    change(weights)
    save_file(weights, node_file(path))
    import hashlib

    path.nodes[0]["files"][node_file(path).name] = hashlib.sha256(node_file(path).read_bytes()).hexdigest()


FIRST = "conv_in.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop(FIRST), "1 tensors missing, 0 unexpected"),
        (lambda w: w.update(other=torch.zeros(1)), "0 tensors missing, 1 unexpected"),
        (lambda w: w.update({FIRST: torch.zeros(2, 2)}), "1 of another shape"),
        (lambda w: [w.update({f"fake_unet.{k}": w.pop(k)}) for k in list(w)], "does not fit"),
    ],
    ids=["missing", "foreign", "shape", "prefix"],
)
def test_a_node_that_does_not_fit_is_refused_and_changes_nothing(path, change, message):
    rewrite(path, change)
    network = tiny.unet(seed=9)
    with pytest.raises(ValueError, match=message):
        path.load(1, into=network)
    assert weights_equal(network, tiny.unet(seed=9))


def flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage, message",
    [
        (flip, "node 1 is damaged"),
        (lambda file: file.write_bytes(file.read_bytes()[:-100]), "node 1 is damaged"),
        (lambda file: file.unlink(), "node 1 is incomplete"),
        (lambda file: shutil.rmtree(file.parent), "node 1 is incomplete"),
    ],
    ids=["flipped", "truncated", "missing", "empty"],
)
def test_a_damaged_node_is_refused_and_changes_nothing(path, damage, message):
    damage(node_file(path))
    network = tiny.unet(seed=9)
    with pytest.raises(ValueError, match=message):
        path.load(1, into=network)
    assert weights_equal(network, tiny.unet(seed=9))


def test_a_teacher_of_another_architecture_is_refused(path, tmp_path):
    tiny.pipeline(block_out_channels=(8, 24)).save_pretrained(tmp_path / "other")
    path.teacher = ModelReference(str(tmp_path / "other"))
    with pytest.raises(ValueError, match="It belongs to another architecture"):
        path.load(0, into=tiny.unet())


def test_a_half_written_node_is_no_node(path):
    """What a recording leaves that is cut off while it writes: a draft, or a folder that path.json does not know."""
    (path.folder / "degradation-000300.draft").mkdir()
    (path.folder / "degradation-000300").mkdir()
    assert len(DegradationPath.from_pretrained(path.folder)) == 2
    path.append(tiny.unet(seed=3), step=300, loss=0.1)
    network = tiny.unet()
    path.load(3, into=network)
    assert weights_equal(network, tiny.unet(seed=3))


def test_verifying_reads_every_node(path):
    path.verify()
    flip(node_file(path))
    with pytest.raises(ValueError, match="node 1 is damaged"):
        path.verify()


def test_folders_that_hold_no_readable_path(path, tmp_path):
    with pytest.raises(ValueError, match="holds no degradation path: it has no path.json"):
        DegradationPath.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a degradation path already"):
        DegradationPath.create(path.folder, path.teacher, "", tiny.START, {})
    manifest = path.folder / "path.json"
    for change, message in [
        ({"format_version": 99}, "format version 99; this library reads 1 and 2"),
        ({"nodes": [{"name": "../../etc"}]}, "names node 1 '../../etc'"),
    ]:
        manifest.write_text(json.dumps({**path.manifest, **change}))
        with pytest.raises(ValueError, match=message):
            DegradationPath.from_pretrained(path.folder)
    manifest.write_text("{")
    with pytest.raises(ValueError, match="no valid JSON"):
        DegradationPath.from_pretrained(path.folder)


def test_another_teacher_or_start_is_named(path):
    own = fingerprint(tiny.unet())
    path.check(own, tiny.START, "unet")
    with pytest.raises(ValueError, match="was recorded from another teacher"):
        path.check(fingerprint(tiny.unet(seed=4)), tiny.START, "unet")
    with pytest.raises(ValueError, match="its conditioning_timestep is 399, this one's is 249"):
        path.check(own, {**tiny.START, "conditioning_timestep": 249}, "unet")
    with pytest.raises(ValueError, match="another initial generator: its sha256"):
        path.check(own, {**tiny.START, "sha256": "1" * 64}, "unet")


def test_fingerprints_are_of_content():
    assert fingerprint(tiny.unet()) == fingerprint(tiny.unet())
    other = tiny.unet()
    next(other.parameters()).data.view(-1)[0] += 1e-6
    assert fingerprint(other) != fingerprint(tiny.unet())
