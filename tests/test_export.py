import copy
import json

import pytest
import tiny
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from stages import close, equal, weights

from diffusers_disback.commands.cli import main as command
from diffusers_disback.families import to_pipeline
from diffusers_disback.hub.publish.export import add_half_variant, extract_lora, save_lora


def changed(network, scale=0.1, rank=None, seed=5):
    """A network whose layers' weights differ, by matrices of a rank if one is given."""
    other = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(seed)
    for module in other.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            matrix = module.weight.data.flatten(1)
            if rank is None:
                step = torch.randn(matrix.shape, generator=generator)
            else:
                step = torch.randn(len(matrix), rank, generator=generator) @ torch.randn(
                    rank, matrix.shape[1], generator=generator
                )
            module.weight.data += scale * step.view_as(module.weight)
    return other


def difference(one, two):
    return sum((one[key].float() - two[key].float()).square().sum() for key in one).sqrt().item()


@pytest.mark.parametrize("name", tiny.TEXT)
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_a_lora_leaves_what_it_says(name, rank, tmp_path):
    """Loaded into the teacher's stock pipeline from either layout and fused, it is the student up to the residual."""
    teacher = tiny.PIPELINES[name]()
    student = changed(teacher.unet)
    layers, residual = extract_lora(student, teacher.unet, rank)
    save_lora(layers, rank, tmp_path, student)
    whole = difference(weights(student), weights(teacher.unet))
    for file in ("pytorch_lora_weights.safetensors", "kohya.safetensors"):
        stock = tiny.PIPELINES[name]()
        stock.load_lora_weights(tmp_path, weight_name=file)
        stock.fuse_lora()
        stock.unload_lora_weights()
        left = difference(weights(stock.unet), weights(student)) / whole
        assert left == pytest.approx(residual, abs=1e-4), file
    assert 0 < residual < 1 and (rank < 16 or residual < 0.5)


def test_more_rank_leaves_less_and_enough_leaves_nothing():
    teacher = tiny.unet()
    student = changed(teacher, rank=2)
    residuals = [extract_lora(student, teacher, rank)[1] for rank in (1, 2, 4)]
    assert residuals[0] > 0.1 and max(residuals[1:]) < 1e-3


def test_a_fast_decomposition_leaves_hardly_more_and_says_what_it_leaves():
    """On layers whose singular values fall off, and with noise on them; it is seeded, and leaves global randomness alone."""
    teacher = tiny.unet(block_out_channels=(16, 64))
    student = changed(changed(teacher, rank=4), scale=0.01)
    state = torch.random.get_rng_state()
    layers, residual = extract_lora(student, teacher, 4, "fast")
    assert torch.equal(torch.random.get_rng_state(), state)
    exact = extract_lora(student, teacher, 4)[1]
    assert exact <= residual * 1.0001 and residual < 1.001 * exact
    assert equal(layers, extract_lora(student, teacher, 4, "fast")[0])
    own, other = weights(student), weights(teacher)
    left = {key: own[key] - other[key] for key in own}
    for key in list(layers):
        if ".lora_A" in key:
            down, up = layers[key], layers[key.replace("lora_A", "lora_B")]
            left[key.replace("lora_A.", "")] -= torch.einsum("or,r...->o...", up.flatten(1), down)
    assert difference(left, {key: 0 * value for key, value in left.items()}) / difference(own, other) == pytest.approx(
        residual, rel=1e-3
    )


def test_networks_that_no_lora_leads_between():
    with pytest.raises(ValueError, match="of another architecture"):
        extract_lora(tiny.unet(), tiny.unet(layers_per_block=2), 4)
    with pytest.raises(ValueError, match="equals the teacher"):
        extract_lora(tiny.unet(), tiny.unet(), 4)


def test_the_command_extracts(tmp_path, capsys):
    teacher = tiny.pipeline()
    teacher.save_pretrained(tmp_path / "teacher")
    to_pipeline(changed(teacher.unet), 399, teacher).save_pretrained(tmp_path / "student")
    line = ["extract-lora", *(str(tmp_path / name) for name in ("student", "teacher", "lora")), "--rank", "3"]
    assert command([*line, "--svd", "fast"]) == 0
    assert "rank 3: leaves" in (fast := capsys.readouterr().out)
    assert command(line) == 0
    assert capsys.readouterr().out == fast, "of so small layers both are exact"
    stored = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert all(tensor.dtype == torch.float16 for tensor in stored.values())
    # Against the teacher with that LoRA fused, what it left is all that there is: no more than half of it at this rank.
    line[3] = str(tmp_path / "rest")
    assert command([*line, "--teacher_lora", str(tmp_path / "lora" / "pytorch_lora_weights.safetensors")]) == 0
    rest = load_file(tmp_path / "rest" / "pytorch_lora_weights.safetensors")
    key = "unet.mid_block.resnets.0.conv1.lora_B.weight"
    assert rest[key].float().norm() < stored[key].float().norm()


@pytest.mark.parametrize("shard_size", ["10GB", "50KB"], ids=["whole", "sharded"])
@pytest.mark.parametrize("name", tiny.TEXT)
def test_a_half_variant_is_the_student_in_half_precision(name, shard_size, tmp_path, capsys):
    teacher = tiny.PIPELINES[name]()
    to_pipeline(teacher.unet, 399, teacher).save_pretrained(tmp_path, max_shard_size=shard_size)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.safetensors")}
    assert command(["half", str(tmp_path)]) == 0
    assert "unet" in capsys.readouterr().out
    half = DiffusionPipeline.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16)
    whole = DiffusionPipeline.from_pretrained(tmp_path)
    for part in ("unet", "vae", "text_encoder"):
        one, two = weights(half.components[part]), weights(whole.components[part])
        assert all(tensor.dtype == torch.float16 for tensor in one.values() if tensor.is_floating_point())
        assert close({k: v.float() for k, v in one.items()}, two, atol=1e-3)
        assert equal(two, weights(teacher.components[part]))
    assert all(file.read_bytes() == content for file, content in before.items())


def test_a_half_variant_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="has no model_index.json"):
        add_half_variant(tmp_path)
    teacher = tiny.pipeline()
    next(teacher.unet.parameters()).data[0] = 1e6
    to_pipeline(teacher.unet, 399, teacher).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="conv_in.weight of .* has values beyond float16"):
        add_half_variant(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    assert not list(tmp_path.glob("unet/*fp16*"))
