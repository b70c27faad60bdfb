"""The adversarial term: closed forms, where gradients go, real images, exact resumption, and what is refused."""

import json
import math
from pathlib import Path

import pytest
import tiny
import torch
import train_disback
from gaussian import batch, best_discriminator, gaussian
from PIL import Image
from script import arguments, student
from stages import equal, interrupted_at, real_images, trainer, training, weights
from test_gradients import batches_of, gradients

from diffusers_disback import OBJECTIVES, DisBackConfig
from diffusers_disback.data.captions import dataset_prompts, image_files
from diffusers_disback.data.conditions import Batches
from diffusers_disback.data.images import RealImages, read_image
from diffusers_disback.families import family_of
from diffusers_disback.models.discriminator import DiscriminatorHead, bottleneck_features
from diffusers_disback.models.noise_schedule import NoiseSchedule
from diffusers_disback.models.timestep_sampling import TimestepSampling
from diffusers_disback.objectives import adversarial
from diffusers_disback.planning.allocations import Allocations, size
from diffusers_disback.planning.plan import Planner, table
from diffusers_disback.training.config import BacktrackingConfig, TrainingConfig
from diffusers_disback.training.networks import accelerator_of
from shapes.dataset import write_image_folder


MODES = {"full": {}, "adapters": {"lora_rank": 4}}
COSTLY = ["full", pytest.param("adapters", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """An image folder with as many rows as there are prompts, its captions their own."""
    folder = tmp_path_factory.mktemp("data") / "images"
    write_image_folder(folder, len(tiny.PROMPTS))
    return folder


def with_discriminator(folder, images, **changes) -> TrainingConfig:
    return training(folder, **{"adversarial_weight": 0.1, "train_data_dir": str(images), **changes})


# Closed forms --------------------------------------------------------------------------------------------------------


def gaussian_with_discriminator(real_mean, fake_mean, std=0.5, scale=1.0):
    """A fake score whose discriminator's logit is `scale` times the best one."""
    schedule = NoiseSchedule.from_scheduler(tiny.scheduler())
    model, best = gaussian(schedule, fake_mean, std), best_discriminator(gaussian(schedule, real_mean, std))
    model.discriminator = lambda *arguments: scale * best(*arguments)
    return model


@pytest.mark.parametrize("scale, sign", [(0.5, -1), (1.0, 0), (2.0, 1)])
def test_the_best_logit_is_that_of_the_density_ratio(scale, sign):
    """The loss's slope in the logit's scale is zero at log p_real / p_fake, and of both signs around it."""
    factor, data = torch.tensor(scale, requires_grad=True), batch(4096, seed=1, shape=(2, 1, 1))
    data.real = 0.4 + 0.5 * batch(4096, seed=2, shape=(2, 1, 1)).noise
    model = gaussian_with_discriminator(0.4, -0.4, scale=factor)
    loss = adversarial.discriminator_loss(-0.4 + 0.5 * data.noise, data, model, TimestepSampling())
    (slope,) = torch.autograd.grad(loss, factor)
    assert abs(slope) < 0.02 if sign == 0 else slope.sign() == sign and abs(slope) > 0.05


@pytest.mark.parametrize("own_mean", [-1.0, 1.0])
def test_the_generator_is_pulled_to_where_real_samples_lie(own_mean):
    mean, data = torch.full((2, 1, 1), own_mean, requires_grad=True), batch(64, seed=3)
    model = gaussian_with_discriminator(0.0, own_mean)
    loss = adversarial.generator_loss(mean + 0.5 * data.noise, data, model, TimestepSampling())
    (gradient,) = torch.autograd.grad(loss, mean)
    assert (gradient.sign() == torch.tensor(own_mean).sign()).all()


def test_no_gradient_where_real_and_generated_samples_are_alike():
    mean, data = torch.full((2, 1, 1), 0.3, requires_grad=True), batch(8, seed=3)
    data.real = 0.3 + 0.5 * batch(8, seed=4).noise
    model = gaussian_with_discriminator(0.3, 0.3)
    loss = adversarial.generator_loss(mean + 0.5 * data.noise, data, model, TimestepSampling())
    assert torch.autograd.grad(loss, mean)[0].abs().max() == 0
    loss = adversarial.discriminator_loss(data.noise, data, model, TimestepSampling())
    assert loss.item() == pytest.approx(2 * math.log(2))
    with pytest.raises(ValueError, match="real samples, of which the batch has none"):
        adversarial.discriminator_loss(data.noise, batch(8, 3), model, TimestepSampling())


def test_a_head_starts_at_a_ratio_of_one_from_its_own_seed():
    state = torch.get_rng_state()
    head = DiscriminatorHead(12, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert equal(weights(head), weights(DiscriminatorHead(12, seed=1)))
    assert not equal(weights(head), weights(DiscriminatorHead(12, seed=2)))
    assert torch.equal(head(torch.randn(3, 5, 12)), torch.zeros(3))


def test_features_are_of_the_bottleneck_in_two_dimensions_or_as_tokens():
    family = family_of(tiny.pipeline())
    x_t, t, condition = torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), family.encode(tiny.PROMPTS[:2])
    model, unet = family.score_model(), family.network
    assert bottleneck_features(model, family.bottleneck(unet), x_t, t, condition).shape == (2, 16, 16)
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    assert bottleneck_features(model, block, x_t, t, condition).shape == (2, 16, 16)
    assert not block._forward_hooks and not unet.mid_block._forward_hooks
    with pytest.raises(ValueError, match="A Linear has no mid_block"):
        family.bottleneck(torch.nn.Linear(1, 1))


# Where gradients go --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_the_generators_gradient_passes_through_both_and_stays_in_neither(mode, tmp_path, teacher_folder, images):
    """With and without gradient checkpointing it is the same; and it is another one than without the term."""
    found = {}
    for name, changes in {
        "plain": {},
        "checkpointed": {"gradient_checkpointing": True},
        "no term": {"adversarial_weight": 0.0, "objective": "f_distill"},
    }.items():
        stage = trainer(with_discriminator(tmp_path / name, images, **MODES[mode], **changes), None)
        stage.config.discriminator_weight = 1.0
        stage.switch_target(0)
        stage.config.adversarial_weight = 0.1
        for step in range(2):  # after which neither a head nor an adapter is zero
            stage.train_step(step, batches_of(stage, range(2)))
        stage.config.adversarial_weight = 0.0 if name == "no term" else 0.1
        found[name] = gradients(stage, OBJECTIVES["dmd"]())
        assert found[name]["others"] == 0
    norm = torch.stack([gradient.norm() for gradient in found["plain"]["own"]]).norm()
    apart = {
        name: torch.stack(
            [(a - b).norm() for a, b in zip(found["plain"]["own"], found[name]["own"], strict=True)]
        ).norm()
        for name in ("checkpointed", "no term")
    }
    assert apart["checkpointed"] <= 1e-5 * norm and apart["no term"] > 1e-4 * norm


@pytest.mark.parametrize("mode", MODES)
def test_an_update_moves_the_head_and_changes_the_fake_score_and_nothing_else(mode, tmp_path, teacher_folder, images):
    """Its gradient comes to the fake score, with accumulated gradients as without."""
    ends = {}
    for name, weight, slices in (("off", 1e-30, 1), ("on", 1.0, 1), ("accumulated", 1.0, 2)):
        accumulation = {"train_batch_size": 2 // slices, "gradient_accumulation_steps": slices}
        config = with_discriminator(
            tmp_path / name, images, discriminator_weight=weight, **accumulation, **MODES[mode]
        )
        stage = trainer(config, None)
        before = weights(stage.discriminator.unwrapped())
        (slices,) = batches_of(stage, [5])
        for _ in range(3):
            stage.update_fake_score(slices, [torch.ones_like(batch.noise) for batch in slices])
        after = weights(stage.discriminator.unwrapped())
        ends[name] = [parameter.detach().clone() for parameter in stage.fake_score.parameters()]
        assert all(not torch.equal(after[key], before[key]) for key in before) or weight < 1
        assert stage.discriminator.take_losses().keys() == {"discriminator_loss"}
        assert all(p.grad is None for learner in stage.learners for p in learner.parameters())

    def apart(one, two):
        return max((a - b).abs().max() for a, b in zip(ends[one], ends[two], strict=True))

    assert apart("on", "off") > 1e-4


def test_stage_2_trains_head_and_student_and_logs_what_it_does(tmp_path, teacher_folder, images):
    stage = trainer(with_discriminator(tmp_path, images), None, max_train_steps=3)
    before, logged = weights(stage.discriminator.unwrapped()), []
    log = stage.accelerator.log
    stage.accelerator.log = lambda values, step: (logged.append(values), log(values, step=step))
    stage.train()
    after = weights(stage.discriminator.unwrapped())
    assert all(not torch.equal(after[key], before[key]) for key in before)
    named = {name.removeprefix("backtracking/") for values in logged for name in values}
    assert named >= {"adversarial_loss", "discriminator_loss", "discriminator_gradient_norm", "discriminator_lr"}
    rows = [batch.real for batch in batches_of(stage, [3])[0]]
    draw = stage.batches[3][0]
    assert torch.equal(rows[0], stage.images.table[draw.rows]), "an image has the condition of its row"


@pytest.mark.parametrize("mode", COSTLY)
def test_resumed_equals_unbroken(mode, tmp_path, teacher_folder, images):
    """Weights of all three and their optimisers' states, bit for bit."""
    config = {"discriminator_learning_rate": 3e-3, "checkpointing_steps": 3, **MODES[mode]}

    def all_of(stage):
        return {
            f"{one.name}.{k}": v for one in stage.learners for k, v in enumerate(map(torch.clone, one.parameters()))
        }

    unbroken = trainer(with_discriminator(tmp_path / "unbroken", images, **config), None, max_train_steps=5)
    unbroken.run()
    broken = trainer(with_discriminator(tmp_path / "broken", images, **config), None, max_train_steps=5)
    broken.train_step = interrupted_at(4, broken.train_step)
    with pytest.raises(KeyboardInterrupt):
        broken.run()
    again = with_discriminator(tmp_path / "broken", images, **config, resume_from_checkpoint="latest")
    resumed = trainer(again, None, max_train_steps=5)
    resumed.run()
    assert equal(all_of(resumed), all_of(unbroken)) and len(unbroken.learners) == 3
    checkpoint = tmp_path / "unbroken" / "checkpoints" / "backtracking" / "checkpoint-000003" / "discriminator"
    assert {"model.safetensors", "optimizer.bin"} <= {file.name for file in checkpoint.iterdir()}


# Real images ---------------------------------------------------------------------------------------------------------


def test_images_are_the_right_way_up_cropped_and_in_range(tmp_path):
    image = Image.new("RGB", (40, 20), "black")
    image.paste("white", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    pixels = read_image(tmp_path / "turned.png", 16)
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.float32
    assert (pixels[:, :6] == 1).all() and (pixels[:, 10:] == -1).all()
    image.convert("L").save(tmp_path / "gray.jpg")
    assert read_image(tmp_path / "gray.jpg", 8).shape == (3, 8, 8)


def test_a_damaged_image_is_named(tmp_path, images):
    whole = (images / "000000.png").read_bytes()
    for name, content in {"cut.png": whole[: len(whole) // 2], "none.png": b"no image", "empty.png": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"The image .*{name} cannot be read"):
            read_image(tmp_path / name, 16)


def test_latents_are_what_the_pipeline_decodes():
    """Of the autoencoder's mode, scaled, shifted and normalised as each config says."""
    family = family_of(tiny.pipeline())
    vae, shown = family.pipeline.vae, torch.rand(2, 3, 16, 16) * 2 - 1
    mode = vae.encode(shown).latent_dist.mode()
    latents = family.encode_images(shown)
    assert latents.shape == (2, *family.latent_shape()) and torch.allclose(latents, mode * vae.config.scaling_factor)
    vae.register_to_config(shift_factor=0.25)
    assert torch.allclose(family.encode_images(shown), (mode - 0.25) * vae.config.scaling_factor)
    vae.register_to_config(shift_factor=None, latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[2.0] * 4)
    mean = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1)
    assert torch.allclose(family.encode_images(shown) * 2 / vae.config.scaling_factor + mean, mode, atol=1e-6)
    assert torch.equal(family_of(tiny.pixels()).encode_images(shown), shown)


def test_samples_are_the_same_kept_or_encoded_each_time(tmp_path, images):
    family, config = family_of(tiny.pipeline()), with_discriminator(tmp_path, images)
    kept, each = (real_images(config, family, capacity=capacity) for capacity in (4096, 0))
    draw = Batches(3, family.latent_shape(), 0, 2, 4)[0][0]
    assert each.table is None and torch.equal(kept.samples(draw), each.samples(draw))
    assert not torch.equal(kept.table[0], kept.table[1])
    with pytest.raises(ValueError, match="3 images, but conditions of 2 rows"):
        RealImages(kept.files, family.encode_images, 16, 2, torch.device("cpu"))


def test_without_conditions_images_are_drawn_by_each_samples_own_generator(images):
    family = family_of(tiny.pixels())
    files = sorted(images.glob("*.png"))
    real = RealImages(files, family.encode_images, 16, 1, torch.device("cpu"))
    whole, halves = Batches(1, (3, 16, 16), 0, 2, 8), Batches(1, (3, 16, 16), 0, 2, 4, 2)
    drawn = real.samples(whole[7][0])
    assert torch.equal(drawn, torch.cat([real.samples(draw) for draw in halves[7]]))
    assert len({sample.sum().item() for sample in drawn}) > 1


def test_files_belong_to_the_rows_of_captions(tmp_path):
    """Rows without a caption are left out of both, and what is not there or elsewhere is refused."""
    folder, cache = tmp_path / "images", str(tmp_path / "cache")
    write_image_folder(folder, 4)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]

    def files(*rows, **changes):
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        captions = dataset_prompts("text", train_data_dir=str(folder), cache_dir=cache, **changes)
        found = image_files(str(folder), captions, cache, **changes)
        assert len(found) == len(captions)
        return [file.name for file in found]

    assert files(*rows) == [f"{n:06d}.png" for n in range(4)]
    assert files(rows[0], {**rows[1], "text": " "}, rows[2]) == ["000000.png", "000002.png"]
    assert files(*rows[1:], max_samples=2) == ["000001.png", "000002.png"]
    (folder / "000003.png").unlink()
    with pytest.raises(ValueError, match="000003.png"):
        files(*rows)
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    (folder / "link.png").symlink_to(secret)
    for name in ("../secret.png", str(secret), "link.png"):
        with pytest.raises(ValueError, match="secret.png|link.png"):
            files({"file_name": name, "text": "a"}, rows[0])
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "metadata.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="words"):
        image_files(str(tmp_path / "words"), [], cache)


# Runs ----------------------------------------------------------------------------------------------------------------


def lines(folder, teacher, images, **changes):
    given = {"train_data_dir": images, "prompts_file": None, "cache_dir": images.parent / "cache", **changes}
    return arguments(folder, teacher, Path("none"), **given)


TERM = {"adversarial_weight": 0.05, "discriminator_weight": 0.5, "discriminator_learning_rate": 1e-3}
F_DISTILL = {"objective": "f_distill", "objective_args": "divergence=jensen_shannon", "min_noise": 0.1}


@pytest.mark.parametrize("changes", [TERM, pytest.param(F_DISTILL, marks=pytest.mark.slow)], ids=["dmd", "f_distill"])
def test_the_script_trains_with_a_discriminator(changes, tmp_path, teacher_folder, images, small_pictures):
    """And changed images are seen when a run is resumed."""
    train_disback.main(lines(tmp_path / "run", teacher_folder, images, **changes))
    made = student(tmp_path / "run")
    assert (tmp_path / "run" / "report.json").exists() and all(torch.isfinite(value).all() for value in made.values())
    if changes is TERM:
        train_disback.main(lines(tmp_path / "plain", teacher_folder, images))
        assert not equal(made, student(tmp_path / "plain"))
        assert (
            "images" not in json.loads((tmp_path / "plain" / "settings" / "backtracking.json").read_text())["inputs"]
        )
        assert "images" in json.loads((tmp_path / "run" / "settings" / "backtracking.json").read_text())["inputs"]


def test_a_teacher_without_prompts_takes_images_without_captions(tmp_path, images, small_pictures):
    tiny.pixels().save_pretrained(tmp_path / "teacher")
    (tmp_path / "images").mkdir()
    for file in images.glob("*.png"):
        (tmp_path / "images" / file.name).write_bytes(file.read_bytes())
    line = lines(tmp_path / "run", tmp_path / "teacher", tmp_path / "images", **TERM, num_path_nodes=0)
    train_disback.main([*line, "--guidance_scale", "1"])
    assert (tmp_path / "run" / "report.json").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"adversarial_weight": 0.1}, "--adversarial_weight needs a discriminator.*pass --train_data_dir"),
        ({"objective": "f_distill"}, "--objective f_distill needs a discriminator.*pass --train_data_dir"),
        ({"adversarial_weight": 0.1, "prompts_file": "x"}, "pass --train_data_dir"),
        ({"adversarial_weight": 0.1, "train_data_dir": "x", "dataset_streaming": True}, "--dataset_streaming"),
        ({"adversarial_weight": -1.0}, "--adversarial_weight"),
        ({"discriminator_weight": 0.0}, "--discriminator_weight"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(changes, message):
    with pytest.raises(ValueError, match=message):
        DisBackConfig(**changes)


def test_without_a_discriminator_no_image_is_read(tmp_path, teacher_folder, images):
    for changes in ({}, {"objective": "f_distill", "objective_args": {"divergence": "reverse_kl"}}):
        assert not TrainingConfig(train_data_dir=str(images), **changes).has_discriminator
    config = with_discriminator(tmp_path, images, adversarial_weight=0.0)
    stage = trainer(config, None)
    assert stage.discriminator is None and batches_of(stage, [0])[0][0].real is None
    with pytest.raises(ValueError, match="There is no discriminator"):
        stage.fake_score.score_model(stage.family).logits(None, None, {})


def test_one_loss_of_two_networks_is_not_scaled_twice(tmp_path, images, monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.mixed_precision", "fp16")
    monkeypatch.setattr("accelerate.Accelerator.device", torch.device("cuda"))
    with pytest.raises(ValueError, match="--mixed_precision fp16.*Pass --mixed_precision bf16"):
        accelerator_of(with_discriminator(tmp_path, images))


# The planner ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", COSTLY)
def test_what_is_planned_is_what_a_run_allocates(mode, tmp_path, teacher_folder, images):
    place = {"pretrained_model_name_or_path": str(teacher_folder), "resolution": 64}
    config = with_discriminator(tmp_path, images, **place, **MODES[mode], discriminator_weight=1.0)
    stage, planned = trainer(config, None), Planner.of(config, BacktrackingConfig())
    stage.switch_target(0)
    ((one,),) = batches_of(stage, [5])
    known = [one.noise, one.real, *one.condition.values(), *one.negative.values()]
    for network in (*(learner.unwrapped() for learner in stage.learners), stage.target.network):
        known += network.parameters()
    peaks = {}
    for name, update in {
        "generator": lambda: stage.update_generator([one]),
        "fake_score": lambda: stage.update_fake_score([one], [one.noise]),
    }.items():
        update()  # optimisers' states are there then
        states = [
            value
            for learner in stage.learners
            for state in learner.optimizer.state.values()
            for value in state.values()
        ]
        with Allocations([*known, *states]) as allocations:
            update()
        peaks[name] = allocations.peak
    for name, peak in peaks.items():
        assert planned.updates[name].peak == pytest.approx(peak, rel=0.1), name
    rows = {row.name: row for row in planned.rows(2)}
    head = stage.discriminator
    states = [v for state in head.optimizer.state.values() for v in state.values()]
    assert rows["discriminator's head"].bytes == size(*head.parameters())
    assert rows["optimiser state, discriminator's head"].bytes == size(*states)
    assert rows["autoencoder, for real images"].bytes == size(*stage.family.pipeline.vae.parameters())
    plain = Planner.of(
        with_discriminator(tmp_path, images, **place, **MODES[mode], adversarial_weight=0.0), BacktrackingConfig()
    )
    assert planned.total(2) > plain.total(2) and planned.total(1) == plain.total(1)
    assert planned.checkpoint(2) - plain.checkpoint(2) == size(*head.parameters(), *states)
    assert "discriminator's head" in table(planned) and "discriminator's head" not in table(plain)
