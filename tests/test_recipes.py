"""The recipes: what they set, whether they fit the card that they are named by, and that they run."""

import json
import math
import re
from pathlib import Path

import pytest
import tiny
import torch
import train_disback
from diffusers import AutoencoderDC, AutoencoderKL, UNet2DConditionModel
from test_families import SIZES
from test_flow_families import SIZES as FLOW_SIZES
from transformers import CLIPTextConfig, Gemma2Config, T5Config

from diffusers_disback.commands.cli import main
from diffusers_disback.commands.command_line import read_flags
from diffusers_disback.training.config import DisBackConfig
from diffusers_disback.training.settings_file import read_settings


ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
CARDS = {"24gb": (1, 24), "80gb": (1, 80), "8gpu": (8, 80)}  # how many, and of how many GB
SAMPLES = {"sd15": 512, "sd21": 512, "sd15_dmd2": 2048, "sdxl": 128, "sdxl_vpred_zsnr": 128}  # of an update
SAMPLES |= {"sd35m": 128, "sana06b": 128}
NAMES = {"sd15": "SD 1.5", "sd21": "SD 2.1", "sdxl": "SDXL", "sd35m": "SD 3.5 Medium", "sana06b": "SANA 0.6B"}
FLOW = {"SD 3.5 Medium": "Stable Diffusion 3.5 Medium", "SANA 0.6B": "SANA 0.6B"}  # as its sizes are called
SOURCES = r"SiD-LSG|DMD2|DisBack|diffusers|the plan|ours|untested|quickstart|embedded|an example|its name|as it is sampled|SDXL's own"


def recipes(*quick: str, but: tuple[str, ...] = ()) -> list:
    """Every recipe, of which those that are not quick are slow."""
    return [
        pytest.param(file, id=file.stem, marks=[] if file.stem in quick else pytest.mark.slow)
        for file in RECIPES
        if not file.stem.endswith(but)
    ]


def settings_of(file: Path) -> DisBackConfig:
    return DisBackConfig(**read_settings(file, DisBackConfig))


def cards_of(file: Path) -> tuple[str, int, int]:
    """What a recipe is of, how many cards it is for, and their GB."""
    what, card = file.stem.rsplit("_", 1)
    return what, *CARDS[card]


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_value_of_a_recipe_says_where_it_is_from(file):
    values = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    assert len(values) == len(read_settings(file, DisBackConfig))
    for line in values:
        assert re.search(rf"  # .*({SOURCES})", line), line


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_recipe_is_what_its_name_says(file):
    config = settings_of(file)
    assert f"--config recipes/{file.name} " in file.read_text(), "its own command"
    if file.stem == "shapes":
        return
    what, number, _ = cards_of(file)
    samples = config.train_batch_size * config.gradient_accumulation_steps * number
    assert samples == SAMPLES[what]
    assert "Not run by us" in file.read_text()
    assert config.prediction_type == ("v_prediction" if "vpred" in what else None)
    assert config.rescale_betas_zero_snr == ("vpred" in what)
    assert config.objective == ("sid" if what in ("sd15", "sd21") else "dmd")


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_the_table_says_what_a_recipe_sets(file):
    page, config = (ROOT / "docs" / "recipes.md").read_text(), settings_of(file)
    (row,) = (line for line in page.splitlines() if line.startswith(f"| [`{file.stem}`](../recipes/{file.name}) |"))
    cells = [cell.strip() for cell in row.split("|")[4:-1]]
    number = 1 if file.stem == "shapes" else cards_of(file)[1]
    parts = [part for part in (config.train_batch_size, config.gradient_accumulation_steps, number) if part > 1]
    batch = f"{math.prod(parts):,}" + (f" = {' x '.join(map(str, parts))}" if len(parts) > 1 else "")
    rates = [
        f"{rate:.0e}".replace("e-0", "e-")
        for rate in (config.generator_learning_rate, config.fake_score_learning_rate)
    ]
    assert cells == [
        f"`{config.objective}`" + (f", alpha {config.objective_args['alpha']:g}" if config.objective_args else ""),
        "all" if config.lora_rank is None else f"rank {config.lora_rank}",
        " / ".join(rates),
        f"{config.adam_beta1:g}, {config.adam_beta2:g}; {config.adam_weight_decay:g}",
        batch,
        f"{config.max_train_steps:,}",
        str(config.fake_score_updates),
        f"{config.guidance_scale:g} / {config.fake_score_guidance_scale:g}",
        str(config.conditioning_timestep),
    ]


def test_the_quickstart_is_a_recipe():
    arguments = (ROOT / "examples" / "text_to_image" / "shapes" / "quickstart.args").read_text().split()
    recipe = read_settings(ROOT / "recipes" / "shapes.yaml", DisBackConfig)
    embedded = {name: recipe.pop(name) for name in ("pretrained_model_name_or_path", "prompts_file")}
    assert recipe == read_flags(DisBackConfig, arguments)
    assert all((ROOT / place).exists() for place in embedded.values())


# Whether they fit -----------------------------------------------------------------------------------------------------


def flow_configs(name: str, folder: Path) -> Path:
    """A pipeline's folder without weights: transformer, autoencoder and text encoders have the originals' configs."""
    flow, sizes = name == "SD 3.5 Medium", FLOW_SIZES[FLOW[name]]
    (tiny.pipeline_3() if flow else tiny.sana()).save_pretrained(folder)
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    large = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
    t5 = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}
    encoders = (
        {
            "text_encoder": CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12),
            "text_encoder_2": CLIPTextConfig(**large, projection_dim=1280),
            "text_encoder_3": T5Config(vocab_size=32128, **t5),
        }
        if flow
        else {"text_encoder": Gemma2Config()}
    )
    for part, config in encoders.items():
        architectures = json.loads((folder / part / "config.json").read_text())["architectures"]
        config.update({"architectures": architectures})
        config.save_pretrained(folder / part)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("meta"):
        sizes[0](**sizes[1]).save_config(folder / "transformer")
        if flow:
            size = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16}
            AutoencoderKL(**blocks, **size).save_config(folder / "vae")
        else:
            AutoencoderDC().save_config(folder / "vae")
    return folder


def full_size_configs(name: str, folder: Path) -> Path:
    """A pipeline's folder without weights: UNet and autoencoder have the originals' configs."""
    if name in FLOW:
        return flow_configs(name, folder)
    (tiny.pipeline_xl() if name == "SDXL" else tiny.pipeline()).save_pretrained(folder)
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    with torch.device("meta"):
        UNet2DConditionModel(**SIZES[name][0]).save_config(folder / "unet")
        AutoencoderKL(**blocks, block_out_channels=(128, 256, 512, 512), layers_per_block=2).save_config(
            folder / "vae"
        )
    return folder


@pytest.mark.parametrize("file", recipes(but=("shapes", "8gpu")))
def test_the_plan_of_a_recipe_for_one_card_says_that_it_fits(file, tmp_path, capsys):
    what, _, gb = cards_of(file)
    name = NAMES[what.split("_")[0]]
    folder = full_size_configs(name, tmp_path / "teacher")
    line = ["plan", "--config", str(file), "--pretrained_model_name_or_path", str(folder)]
    assert main([*line, "--device_memory_gb", str(gb)]) == 0
    out = capsys.readouterr().out
    side = 512 if name in ("SD 1.5", "SD 2.1") else 1024
    assert f"{side} x {side} pixels" in out and f"of {gb} GB on the device: fits" in out
    if name in FLOW:  # before training they are there, and of what is trained nothing but the teacher in bf16
        encoders = float(re.search(r"text encoders: ([\d.]+) GB", out)[1])
        assert encoders + 2 * FLOW_SIZES[FLOW[name]][2] / 1e9 < 0.9 * gb
    page, peak = (ROOT / "docs" / "recipes.md").read_text(), re.search(r"peak ([\d.]+) GB", out)[1]
    assert re.search(rf"\[`{file.stem}`\].*\| {peak} \|", page), peak


@pytest.mark.slow
def test_data_parallelism_fits_too():
    """Its buckets are as large as the gradients of both networks, which the plan does not count."""
    from test_plan import Planner, planner

    for file in RECIPES:
        if file.stem.endswith("8gpu"):
            what, _, gb = cards_of(file)
            name = NAMES[what.split("_")[0]]
            made, config = planner({**SIZES[name][0]}), settings_of(file)
            planned = Planner(made.skeleton, made.family, config, config)
            buckets = planned.own("fake_score") + planned.own("generator")
            assert max(planned.total(1), planned.total(2)) + buckets <= 0.9 * gb * 1e9, file.stem


def test_the_plan_of_the_shapes_recipe_says_that_it_fits(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main(["plan", "--config", "recipes/shapes.yaml", "--device_memory_gb", "24"]) == 0
    assert "64 x 64 pixels" in capsys.readouterr().out


# Whether they run -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Tiny teachers, by what a recipe is of."""
    folder = tmp_path_factory.mktemp("teachers")
    tiny.save_teacher(folder / "sd")
    for name, make in (("sdxl", tiny.pipeline_xl), ("sd35m", tiny.pipeline_3), ("sana06b", tiny.sana)):
        make().save_pretrained(folder / name)
    return lambda file: (
        folder / next((name for name in ("sdxl", "sd35m", "sana06b") if file.stem.startswith(name)), "sd")
    )


@pytest.mark.parametrize("file", recipes("sd21_24gb"))
def test_a_recipe_runs_at_tiny_size(file, teachers, tmp_path, prompts_file, small_pictures):
    """Both stages, with its objective, optimisers, guidance, adapters and offloading. What is of size alone is smaller; 8-bit
    optimisers need a GPU."""
    smaller = {
        "pretrained_model_name_or_path": teachers(file),
        "prompts_file": prompts_file,
        "resolution": 32 if file.stem.startswith("sana") else 16,
        "train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "degradation_steps": 2,
        "num_path_nodes": 2,
        "steps_per_target": 1,
        "max_train_steps": 2,
        "fake_score_updates": 1,
        "lr_warmup_steps": 0,
        "use_8bit_adam": "false",
        "num_validation_images": 1,
        "report_to": "none",
        "output_dir": tmp_path / "run",
    }
    flags = [part for name, value in smaller.items() for part in (f"--{name}", str(value))]
    train_disback.main(["--config", str(file), *flags])
    kept = read_settings(tmp_path / "run" / "settings.yaml", DisBackConfig)
    recipe = read_settings(file, DisBackConfig)
    assert {name: kept[name] for name in recipe if name not in smaller} == {
        name: value for name, value in recipe.items() if name not in smaller
    }
    assert (tmp_path / "run" / "model_index.json").exists()
