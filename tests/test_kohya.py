"""LoRAs in kohya's layout, read by a reader that was written from the layout's description alone."""

import original_layout
import pytest
import tiny
import torch
from kohya_reader import PREFIX, merge, named_layers
from safetensors.torch import load_file
from stages import close, weights
from test_export import changed

from diffusers_disback.hub.publish.export import extract_lora, save_lora
from diffusers_disback.models.lora_layouts import KOHYA


DIFFUSERS = "pytorch_lora_weights.safetensors"


def original(network):
    return {key: value.clone() for key, value in original_layout.original_unet(network).items()}


def merged_by_diffusers(pipe, folder):
    """A pipeline's UNet after diffusers' own loader has fused a LoRA."""
    pipe.load_lora_weights(folder, weight_name=DIFFUSERS)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    return pipe.unet


def check_round_trip(make, folder, seeds=(0, 3), **config):
    """The reader's merged weights are those of diffusers, on the teacher and on a second one, in both layouts."""
    lora = load_file(folder / KOHYA)
    for seed in seeds:
        teacher = make(seed=seed, **config)
        is_xl = teacher.unet.config.addition_embed_type is not None
        found = merge(original(teacher.unet), lora)
        plain = None if is_xl else merge(weights(teacher.unet), lora)
        before = original(teacher.unet)
        expected = merged_by_diffusers(teacher, folder)
        assert found.keys() == original(expected).keys()
        assert close(found, original(expected), atol=1e-5)
        assert plain is None or close(plain, weights(expected), atol=1e-5)
        assert not close(before, original(expected), atol=1e-3)


@pytest.mark.parametrize("name", tiny.TEXT)
def test_an_extracted_lora_is_read_from_its_layout_alone(name, tmp_path):
    """All linear layers and convolutions of both kernels, each with its alpha, and nothing of text encoders."""
    make, config = tiny.PIPELINES[name], {"layers_per_block": 2}
    teacher = make(**config)
    save_lora(extract_lora(changed(teacher.unet), teacher.unet, 4)[0], 4, tmp_path, teacher.unet)
    check_round_trip(make, tmp_path, **config)
    lora = load_file(tmp_path / KOHYA)
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    assert lora.keys() == {f"{layer}.{part}" for layer in named_layers(original(teacher.unet)) for part in parts}
    kernels = {tuple(tensor.shape[2:]) for key, tensor in lora.items() if key.endswith("lora_down.weight")}
    assert kernels == {(), (1, 1), (3, 3)}
    assert all(value.shape == () and value == 4 for key, value in lora.items() if key.endswith(".alpha"))
    is_xl, inside = name == "stable_diffusion_xl", "transformer_blocks_0_ff_net_0_proj.alpha"
    assert (f"lora_unet_input_blocks_4_1_{inside}" in lora) == is_xl
    assert (f"lora_unet_down_blocks_1_attentions_0_{inside}" in lora) != is_xl


@pytest.mark.slow
@pytest.mark.parametrize("name", tiny.TEXT)
def test_a_trained_lora_is_read_from_its_layout_alone(run, name, tmp_path, alpha=2.0):
    """With an alpha that is not the rank."""
    tiny.PIPELINES[name]().save_pretrained(tmp_path / "teacher")
    rates = {"generator_learning_rate": 1e-1, "fake_score_learning_rate": 1e-2}
    folder = run(
        pretrained_model_name_or_path=tmp_path / "teacher", lora_rank=4, lora_alpha=alpha, stage="all", **rates
    )
    lora = load_file(folder / "lora" / KOHYA)
    assert {value.item() for key, value in lora.items() if key.endswith(".alpha")} == {alpha}
    check_round_trip(tiny.PIPELINES[name], folder / "lora")
    teacher = original(tiny.PIPELINES[name]().unet)
    student = original(type(tiny.unet()).from_pretrained(folder, subfolder="unet"))
    assert close(merge(teacher, lora), student, atol=1e-5), "what was published is the same"


def test_the_reader_takes_nothing_that_does_not_fit():
    unet = weights(tiny.unet())
    down, up = torch.ones(2, 4, 3, 3), torch.ones(8, 2, 1, 1)
    whole = {"conv_in.lora_down.weight": down, "conv_in.lora_up.weight": up, "conv_in.alpha": torch.tensor(1.0)}
    whole = {f"lora_unet_{key}": value for key, value in whole.items()}
    moved = merge(unet, whole, strength=2.0)["conv_in.weight"] - unet["conv_in.weight"]
    assert torch.allclose(moved, torch.tensor(2.0), atol=1e-6), "2 * alpha / rank * (1 + 1)"
    text = "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha"
    for changes, message in (
        ({text: torch.tensor(1.0)}, "fits nothing"),
        ({"lora_unet_conv_in.dora_scale": torch.ones(8)}, "fits nothing"),
        ({"lora_unet_conv_in.lora_down.weight": torch.ones(2, 4)}, "times"),
        ({"lora_unet_conv_out.alpha": torch.tensor(1.0)}, "has only"),
    ):
        with pytest.raises(ValueError, match=message):
            merge(unet, {**whole, **changes})
    with pytest.raises(ValueError, match="original layout"):
        named_layers(weights(tiny.pipeline_xl().unet))
    assert set(named_layers(original(tiny.unet())).values()) == {
        key for key, value in original(tiny.unet()).items() if value.ndim in (2, 4) and key.startswith(PREFIX)
    }
