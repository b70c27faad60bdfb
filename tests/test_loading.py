"""What is loaded: in memory of its own, and finite."""

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from stages import equal, weights

from diffusers_disback import ModelReference, load_family
from diffusers_disback.families import network_name_of
from diffusers_disback.models.weights import check_finite, owned


PARTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def file_of(folder, part):
    return folder / part / f"{PARTS.get(part, 'diffusion_pytorch_model')}.safetensors"


def overwrite(file):
    """In place, as `cp` does: what is mapped to the file sees it."""
    size = file.stat().st_size
    with open(file, "r+b") as stream:
        stream.seek(size // 2)
        stream.write(b"\x3f" * (size - size // 2))


def test_nothing_that_is_loaded_changes_with_its_file(tmp_path):
    tiny.save_teacher(tmp_path / "teacher", seed=1)
    tiny.pipeline(seed=2).vae.save_pretrained(tmp_path / "vae")
    start, reference = ModelReference(str(tmp_path / "teacher")), ModelReference(str(tmp_path / "teacher"))
    other = ModelReference(str(tmp_path / "teacher"), vae=str(tmp_path / "vae"))
    families = [load_family(reference), load_family(other)]
    network = start.resolve_denoiser("unet").load_network(type(families[0].network))
    held = [
        part for family in families for part in (family.network, family.pipeline.vae, family.pipeline.text_encoder)
    ]
    held.append(network)
    before = [weights(part) for part in held]
    for file in [*tmp_path.rglob("*.safetensors")]:
        overwrite(file)
    assert all(equal(weights(part), was) for part, was in zip(held, before, strict=True))
    assert torch.equal(
        families[0].encode(["a"])["encoder_hidden_states"], families[1].encode(["a"])["encoder_hidden_states"]
    )
    changed = load_file(file_of(tmp_path / "teacher", "unet"))
    assert not equal(changed, dict(before[0])), "the file is another one now"


def test_what_is_resolved_asks_the_hub_nothing(hub, repo, alice, teacher_folder, tmp_path):
    """A teacher is asked for once: its weights, its files for a student and its card are then of this machine. By its name
    alone it is loaded, too, and from the cache if the Hub is down."""
    from hub_server import Fault
    from huggingface_hub import HfApi

    HfApi().create_repo(repo)
    HfApi().upload_folder(repo_id=repo, folder_path=teacher_folder)
    local = ModelReference(repo).resolve(network_name_of, str(tmp_path / "cache"))
    assert local.commit == HfApi().model_info(repo).sha
    requests = len(hub.requests)
    family = load_family(local)
    assert equal(weights(family.network), weights(tiny.unet())) and family.model is local
    local.component_files("float16"), local.card(), local.load_network(type(family.network))
    assert len(hub.requests) == requests
    hub.fault = lambda request: Fault(status=503)
    again = load_family(repo, str(tmp_path / "cache"))
    assert again.model == local and equal(weights(again.network), weights(family.network))


def test_a_node_is_in_memory_once_and_its_own(teacher_folder, tmp_path, monkeypatch):
    """It goes from its file into the network without a copy in between, and stays as it was when the file is overwritten."""
    path = tiny.path(tmp_path / "path", teacher_folder)
    copies = []
    clone = torch.Tensor.clone
    with monkeypatch.context() as context:
        context.setattr(torch.Tensor, "clone", lambda tensor, **_: copies.append(tensor) or clone(tensor))
        network = tiny.unet(seed=7)
        copies.clear()
        path.load(1, network)
        path.verify_node(2, network)
        assert not copies
        read = path.read(1)
        assert len(copies) == len(read)
    overwrite(next((path.node_folder(1) / "unet").glob("*.safetensors")))
    assert equal(weights(network), weights(tiny.unet(seed=1))) and equal(read, dict(weights(tiny.unet(seed=1))))


def test_tensors_that_are_shared_stay_shared():
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    network[1].weight = network[0].weight
    pointer = network[0].weight.data_ptr()
    owned(network, "it")
    assert network[1].weight is network[0].weight and network[0].weight.data_ptr() != pointer


def poison(file, value=float("nan")):
    tensors = load_file(file)
    name = sorted(key for key, tensor in tensors.items() if tensor.is_floating_point() and tensor.ndim > 1)[-1]
    tensors[name].view(-1)[3] = value
    save_file(tensors, file, {"format": "pt"})
    return name


def test_a_teacher_start_autoencoder_or_node_with_nan_is_told_with_the_tensor(tmp_path):
    for part, value in (("unet", float("nan")), ("vae", float("inf")), ("text_encoder", float("-inf"))):
        folder = tiny.save_teacher(tmp_path / part)
        name = poison(file_of(folder, part), value)
        with pytest.raises(
            ValueError, match=f"the {part} of .*{part}' cannot be used: 1 of .* its weight {name} are NaN"
        ):
            load_family(ModelReference(str(folder)))
    with pytest.raises(ValueError, match="the UNet of .* are NaN or infinite"):
        ModelReference(str(tmp_path / "unet")).resolve_denoiser("unet").load_network(type(tiny.unet()))
    with pytest.raises(ValueError, match="the autoencoder .*vae.* are NaN or infinite"):
        load_family(ModelReference(str(tmp_path / "text_encoder"), vae=str(tmp_path / "vae")))
    teacher = tiny.save_teacher(tmp_path / "teacher")
    path = tiny.path(tmp_path / "path", teacher)
    path.append(_with_nan(tiny.unet(seed=3)), step=900, loss=0.5)
    with pytest.raises(ValueError, match="node 3 of .* its weight conv_in.weight are NaN or infinite"):
        path.load(3, tiny.unet())


def _with_nan(network):
    network.conv_in.weight.data[0, 0, 0, 0] = float("nan")
    return network


def test_large_finite_weights_are_fine():
    check_finite(
        {"a": torch.full((100,), 3e38), "b": torch.full((99,), 6e4).half(), "c": torch.arange(3)}.items(), "it"
    )


@pytest.mark.parametrize(
    "named, said",
    [
        ({}, ""),
        ({"revision": "v1"}, " (revision v1)"),
        ({"revision": "a", "variant": "b"}, " (revision a, variant b)"),
    ],
)
def test_a_message_names_no_revision_that_was_not_asked_for(named, said):
    assert ModelReference("nowhere", **named).said == said
