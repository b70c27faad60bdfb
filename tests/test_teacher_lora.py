"""LoRAs in every layout, against `W + alpha / rank * up @ down`, and files of which a tensor would be left over."""

import json

import original_layout
import pytest
import tiny
import torch
from safetensors.torch import save_file
from stages import equal, weights

from diffusers_disback.models.adapters import lora_config, write_adapter
from diffusers_disback.models.teacher_lora import fuse_lora, lora_file, original_names, spellings


RANK = 3


def layers(network):
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d))
    }


@pytest.fixture(scope="module")
def networks():
    return {"v1": tiny.unet(), "xl": tiny.pipeline_xl().unet}


def factors(network, seed=0):
    """Random factors of every layer, convolutions included."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, module in layers(network).items():
        shape = module.weight.shape
        down = torch.randn(RANK, *shape[1:], generator=generator)
        up = torch.randn(shape[0], RANK, *[1] * (len(shape) - 2), generator=generator)
        found[name] = down, up
    return found


def fused(network, pairs, scale):
    """By the arithmetic: each output channel's filter gains the sum of the filters of `down`, weighted by `up`."""
    expected = weights(network)
    for name, (down, up) in pairs.items():
        expected[f"{name}.weight"] += scale * torch.einsum("or,r...->o...", up.flatten(1), down)
    return expected


def processors(name):
    """As diffusers' older layout called the layers of attention."""
    for layer in ("to_q", "to_k", "to_v"):
        name = name.replace(f".{layer}", f".processor.{layer}_lora")
    name = name.replace(".to_out.0", ".processor.to_out_lora")
    return name if name.endswith("_lora") else f"{name}.lora"


def stored(layout, network, pairs):
    """A file's tensors and header, and the scale that it says: alpha is not the rank wherever a layout knows it."""
    original, header, scale, found = original_names(network), None, 1.0, {}
    for name, (down, up) in pairs.items():
        if layout.startswith("kohya"):
            spelled = original[name] if layout == "kohya-original" else name
            prefix = f"lora_unet_{spelled.replace('.', '_')}"
            found |= {f"{prefix}.lora_down.weight": down, f"{prefix}.lora_up.weight": up}
            found[f"{prefix}.alpha"], scale = torch.tensor(7.0), 7.0 / RANK
        elif layout == "comfyui":
            prefix = f"diffusion_model.{original[name]}"
            found |= {f"{prefix}.lora_down.weight": down, f"{prefix}.lora_up.weight": up}
        elif layout.startswith("older"):
            prefix = ("unet." if layout == "older" else "") + processors(name)
            found |= {f"{prefix}.down.weight": down, f"{prefix}.up.weight": up}
        else:
            prefix = ("unet." if layout != "bare" else "") + name
            found |= {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}
    if layout in ("metadata", "bare"):
        said = {"r": RANK, "lora_alpha": 7, "target_modules": ["x"], "bias": "none"}
        said = said if layout == "bare" else {f"unet.{key}": value for key, value in said.items()}
        header, scale = {"lora_adapter_metadata": json.dumps(said)}, 7.0 / RANK
    return {key: tensor.contiguous() for key, tensor in found.items()}, header, scale


LAYOUTS = ["kohya", "kohya-original", "comfyui", "older", "older-bare", "peft", "metadata", "bare"]


def test_every_layout_is_fused_by_its_arithmetic(networks, tmp_path):
    for kind, layout in [(kind, layout) for kind in networks for layout in LAYOUTS]:
        network = tiny.unet() if kind == "v1" else tiny.pipeline_xl().unet
        pairs = factors(network)
        assert len(pairs) > 80
        tensors, header, scale = stored(layout, network, pairs)
        save_file(tensors, tmp_path / "lora.safetensors", header)
        fuse_lora(network, tmp_path / "lora.safetensors")
        expected = fused(networks[kind], pairs, scale)
        for key, value in network.state_dict().items():
            assert torch.allclose(value, expected[key], atol=1e-5), (kind, layout, key)


def test_ranks_and_alphas_of_single_layers(networks, tmp_path):
    """A pattern for one layer in the header, half precision, a layer without alpha in kohya's layout."""
    own, name = networks["v1"], "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    pairs = {key: value for key, value in factors(own).items() if key in (name, "conv_in")}
    pairs[name] = torch.randn(2, 16), torch.randn(16, 2)
    tensors, _, _ = stored("peft", own, pairs)
    said = {
        "unet.r": RANK,
        "unet.lora_alpha": 6,
        "unet.rank_pattern": {"attn1.to_q": 2},
        "unet.alpha_pattern": {f"^{name}": 1},  # as diffusers marks a whole name
    }
    for rslora, scales in ((False, (6 / RANK, 1 / 2)), (True, (6 / RANK**0.5, 1 / 2**0.5))):
        header = {"lora_adapter_metadata": json.dumps({**said, "unet.use_rslora": rslora})}
        save_file({key: tensor.half() for key, tensor in tensors.items()}, tmp_path / "a.safetensors", header)
        network = tiny.unet()
        fuse_lora(network, tmp_path / "a.safetensors")
        halves = {key: tuple(tensor.half().float() for tensor in pair) for key, pair in pairs.items()}
        for key, scale in zip(("conv_in", name), scales, strict=True):
            expected = fused(own, {key: halves[key]}, scale)[f"{key}.weight"]
            assert torch.allclose(network.get_submodule(key).weight, expected, atol=1e-5), key
    tensors, _, _ = stored("kohya", own, factors(own))
    del tensors["lora_unet_conv_in.alpha"]
    save_file(tensors, tmp_path / "b.safetensors")
    network = tiny.unet()
    fuse_lora(network, tmp_path / "b.safetensors")
    expected = fused(own, factors(own), 1.0)["conv_in.weight"]
    assert torch.allclose(network.conv_in.weight, expected, atol=1e-5)


def test_an_adapter_that_training_wrote_is_fused(tmp_path):
    network, plain = tiny.unet(), tiny.unet()
    network.add_adapter(lora_config(2, 5.0), adapter_name="one")
    for key, parameter in network.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(len(key)))
    write_adapter(network, "one", tmp_path)
    fuse_lora(plain, lora_file(str(tmp_path)))
    network.fuse_lora()
    network.unload_lora()
    assert equal(weights(plain), weights(network)), "bit for bit as diffusers fuses it"
    assert not equal(weights(plain), weights(tiny.unet()))


def test_original_names_are_those_of_the_original_layout():
    for make, kind in ((tiny.pipeline, "v1"), (tiny.pipeline_xl, "xl_base")):
        pipe = make(layers_per_block=2)
        found = original_layout.original_unet(pipe.unet)
        expected = {value.data_ptr(): key for key, value in found.items()}
        names = original_names(pipe.unet)
        for name, module in layers(pipe.unet).items():
            assert expected[module.weight.data_ptr()] == f"model.diffusion_model.{names[name]}.weight", (kind, name)
        assert set(spellings(pipe.unet).values()) == layers(pipe.unet).keys()


def test_every_tensor_is_used_or_named(networks, tmp_path):
    """One tensor more, or one less, than a plain LoRA; the network stays as it was."""
    tensors, _, _ = stored("kohya", networks["v1"], factors(networks["v1"]))
    peft, _, _ = stored("peft", networks["v1"], factors(networks["v1"]))
    first, one, file = "lora_unet_conv_in", torch.ones(8), tmp_path / "lora.safetensors"

    def header(**said):
        return {"lora_adapter_metadata": json.dumps({"unet.r": RANK, "unet.lora_alpha": 4, **said})}

    def without(tensors, *keys):
        return {key: tensor for key, tensor in tensors.items() if key not in keys}

    def renamed(tensors, old, new):
        return {key.replace(old, new): tensor for key, tensor in tensors.items()}

    cases = [
        ({**tensors, f"{first}.dora_scale": one}, None, "is a DoRA .*conv_in.dora_scale"),
        ({**peft, "unet.conv_in.lora_magnitude_vector": one}, None, "is a DoRA"),
        ({**peft, "unet.conv_in.lora_magnitude_vector.weight": one}, None, "is a DoRA"),
        ({f"{first}.hada_w1_a": one}, None, "is a LoHa"),
        ({f"{first}.lokr_w1": one}, None, "is a LoKr"),
        ({f"{first}.oft_blocks": one}, None, "is an OFT"),
        ({f"{first}.a1.weight": one}, None, "is a GLoRA"),
        ({**tensors, f"{first}.lora_mid.weight": one}, None, "third factor"),
        ({**tensors, "lora_unet_conv_norm_out.w_norm": one}, None, "normalisations"),
        ({**tensors, f"{first}.diff": one}, None, "difference of whole weights"),
        ({**tensors, f"{first}.diff_b": one}, None, "difference of whole weights"),
        ({**peft, "unet.conv_in.lora_B.bias": one}, None, "with biases"),
        (renamed(peft, "unet.", "base_model.model."), None, "as peft saves it"),
        ({**tensors, "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": one}, None, "more than the UNet"),
        ({**tensors, "lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha": one}, None, "more than the UNet .lora_te2"),
        ({**peft, "text_encoder_2.text_model.x.lora_A.weight": one}, None, "more than the UNet .text_encoder_2"),
        ({**peft, "text_encoder.x.lora_linear_layer.up.weight": one}, None, "more than the UNet"),
        ({**tensors, "lora_unet_nothing.lora_down.weight": one}, None, "lora_unet_nothing.lora_down.weight fits nothing"),
        ({**tensors, "lora_unet_mid_block.alpha": one}, None, "lora_unet_mid_block.alpha fits nothing"),
        ({**tensors, "x": one}, None, "x fits nothing"),
        ({}, None, "it is empty"),
        (without(tensors, f"{first}.lora_up.weight"), None, "not whole: beside lora_unet_conv_in"),
        (without(tensors, f"{first}.lora_up.weight", f"{first}.lora_down.weight"), None, "conv_in.alpha is not both"),
        ({**tensors, "unet.conv_in.lora_A.weight": tensors[f"{first}.lora_down.weight"].clone()}, None, "adapts one layer twice"),
        ({**tensors, f"{first}.alpha": torch.tensor(0.0)}, None, "alpha 0, which programs read differently"),
        ({**tensors, f"{first}.alpha": torch.tensor(float("nan"))}, None, "alpha nan"),
        ({**tensors, f"{first}.alpha": one}, None, "alpha nan"),
        ({**tensors, f"{first}.lora_up.weight": torch.ones(9, RANK, 1, 1)}, None, "belongs to another model: lora_unet_conv_in"),
        ({**tensors, f"{first}.lora_down.weight": torch.ones(RANK, 4, 1, 1)}, None, "belongs to another model"),
        ({**tensors, f"{first}.lora_down.weight": torch.tensor(1.0)}, None, "belongs to another model"),
        (peft, header(**{"unet.r": 9}), "says rank 9 of .*, but its tensors have 3"),
        (peft, header(**{"unet.use_dora": True}), "more than a LoRA .use_dora"),
        (peft, header(**{"unet.alpha_pattern": {"(": 1}}), r"has the alpha_pattern '\(', which is no layer's name"),
        (peft, header(**{"unet.rank_pattern": {r"([\w.]*)*!": 1}}), "has the rank_pattern .* which is no layer's name"),
        (peft, header(**{"unet.lora_alpha": "4"}), "says lora_alpha='4', which cannot be"),
        (peft, {"lora_adapter_metadata": "{"}, "is no valid JSON"),
    ]  # fmt: skip
    network = tiny.unet()
    for changed, said, message in cases:
        save_file(changed, file, said)
        with pytest.raises(ValueError, match=message):
            fuse_lora(network, file)
    assert equal(weights(network), weights(tiny.unet()))


def test_a_folder_or_repository_of_several_says_so(alice, repo, tmp_path):
    from huggingface_hub import HfApi

    def put(*names):
        for name in names:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            save_file({"x": torch.ones(1) * len(name)}, tmp_path / name)

    api = HfApi()
    api.create_repo(repo)

    def both(message):
        api.upload_folder(repo_id=repo, folder_path=tmp_path, delete_patterns="*")
        for where in (str(tmp_path), repo):
            with pytest.raises(ValueError, match=message) as caught:
                lora_file(where)
            assert where in str(caught.value)

    torch.save({}, tmp_path / "lora.bin")
    both("is no .safetensors file. Pickles can run code")
    put("sub/a.safetensors")
    both("none at its root, but: sub/a.safetensors. Say which one is meant, for example .*/sub/a.safetensors")
    put("b 1step.safetensors", "a 8steps.safetensors")
    both("holds several files: a 8steps.safetensors, b 1step.safetensors. Say which")
    for name in ("sub/a.safetensors", "b 1step.safetensors"):
        for where in (
            f"{repo}/{name}",
            f"https://huggingface.co/{repo}/blob/main/{name.replace(' ', '%20')}",
            str(tmp_path / name),
        ):
            assert lora_file(where).read_bytes() == (tmp_path / name).read_bytes()
    put("pytorch_lora_weights.safetensors")
    api.upload_folder(repo_id=repo, folder_path=tmp_path)
    for where in (str(tmp_path), repo):  # the name by which diffusers saves one
        assert lora_file(where).name == "pytorch_lora_weights.safetensors"
    for where, message in {
        "./nowhere/at/all": "it is no file, no folder, and no name of a repository",
        f"{repo}/lora.bin": "is no .safetensors file",
        f"{repo}/none.safetensors": "has no file none.safetensors",
        str(tmp_path / "none.safetensors"): "cannot be read. There is no file",
        f"{repo}-none": "is no model on the Hub|knows no",
    }.items():
        with pytest.raises(ValueError, match=message):
            lora_file(where)


def test_a_resolved_model_asks_the_hub_nothing(hub, repo, teacher_folder, tmp_path):
    """A LoRA, by its repository or its file, and a denoiser: the same for the whole run, though the Hub has others."""
    from hub_server import Fault
    from huggingface_hub import HfApi

    from diffusers_disback.models.reference import ModelReference

    api, network, models = HfApi(), tiny.unet(), []
    api.create_repo(repo)
    (tmp_path / "files").mkdir()
    pair = {"unet.conv_in.lora_A.weight": torch.ones(1, 4, 3, 3), "unet.conv_in.lora_B.weight": torch.ones(8, 1, 1, 1)}
    for value in (1.0, 2.0):
        tiny.unet().save_pretrained(tmp_path / "files" / "unet")
        save_file({key: tensor * value for key, tensor in pair.items()}, tmp_path / "files" / "a.safetensors")
        api.upload_folder(repo_id=repo, folder_path=tmp_path / "files")
        if not models:
            references = [ModelReference(repo, lora=lora) for lora in (repo, f"{repo}/a.safetensors")]
            models = [reference.resolve_denoiser("unet", str(tmp_path / "cache")) for reference in references]
    hub.fault = lambda request: Fault(status=503)
    requests = len(hub.requests)
    for model in models:
        change = model.load_network(type(network)).conv_in.weight - network.conv_in.weight
        assert torch.allclose(change, torch.ones_like(change))
    assert len(hub.requests) == requests
