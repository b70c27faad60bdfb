"""Families, predictions, objectives and modes of training: each pair of them distils, or is refused by the name of a flag."""

import itertools
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import DiffusionPipeline
from script import TINY
from stages import equal, weights
from test_flow_families import call_of, noise_of

from diffusers_disback import BacktrackingTrainer, DegradationPath, DisBackConfig, DisBackTrainer, OneStepGenerator
from diffusers_disback.families import FAMILIES, family_of
from diffusers_disback.models.noise_schedule import EDM, FLOW, PREDICTION_TYPES, RESCALED_EDM
from diffusers_disback.objectives import OBJECTIVES
from shapes.dataset import write_image_folder


LORA, NO_PATH, DISCRIMINATOR = {"lora_rank": 2}, {"num_path_nodes": 0}, {"adversarial_weight": 0.1}
MODES = {
    "full": {},
    "full, offloaded": {"offload_idle_role": True},
    "full without a path": NO_PATH,
    "full with a discriminator": DISCRIMINATOR,
    "adapters": LORA,
    "adapters without a path": {**LORA, **NO_PATH},
    "adapters with a discriminator": {**LORA, **DISCRIMINATOR},
    "an adapter and a full fake score": {**LORA, "lora_roles": ["generator"]},
    "a full student and an adapter": {**LORA, "lora_roles": ["fake_score"]},
}
FACTORS = {
    "family": list(FAMILIES),
    "prediction": [*PREDICTION_TYPES, FLOW, EDM, RESCALED_EDM],
    "objective": list(OBJECTIVES),
    "mode": list(MODES),
}
OWN = {"stable_diffusion_3": FLOW, "sana": FLOW, "edm": EDM, "rescaled_edm": RESCALED_EDM}  # the others have betas
LABELS = ("dit",)


def has_discriminator(objective, mode):
    return OBJECTIVES[objective]().needs_discriminator or "adversarial_weight" in MODES[mode]


def refused_flag(family, prediction, objective, mode):
    """The flag by which a combination is refused, if it is."""
    if prediction not in ([OWN[family]] if family in OWN else PREDICTION_TYPES):
        return "prediction_type"
    if family in LABELS and has_discriminator(objective, mode):
        return "adversarial_weight" if "adversarial_weight" in MODES[mode] else "objective"
    return None


def pairs(row):
    return set(itertools.combinations(enumerate(row), 2))


def pairwise(rows, missing):
    """Some of the rows, in which all of the pairs are: always the one that adds most."""
    missing, chosen = set(missing), []
    while missing:
        chosen.append(max(rows, key=lambda row: len(pairs(row) & missing)))
        missing -= pairs(chosen[-1])
    return chosen


def one_of_each_family(rows):
    """Of the rows, with most of the other values; above all of the modes."""
    seen, chosen = set(), []
    for family in FAMILIES:
        own = [row for row in rows if row[0] == family]
        chosen.append(max(own, key=lambda row: (row[3] not in seen, len(set(row) - seen))))
        seen |= set(chosen[-1])
    return chosen


PRODUCT = list(itertools.product(*FACTORS.values()))
ALLOWED = [row for row in PRODUCT if refused_flag(*row) is None]
PAIRS = set().union(*map(pairs, ALLOWED))
ROWS = pairwise(ALLOWED, PAIRS)
QUICK = one_of_each_family(ROWS)
CELLS = [row if row in QUICK else pytest.param(*row, marks=pytest.mark.slow) for row in ROWS]
# Of which no row is allowed, each by itself.
REFUSED = [row for row in PRODUCT if len(pairs(row) - PAIRS) == 1]
REFUSED = pairwise(REFUSED, set().union(*(pairs(row) - PAIRS for row in REFUSED)))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """An image folder, whose captions are prompts."""
    folder = tmp_path_factory.mktemp("data") / "images"
    write_image_folder(folder, len(tiny.PROMPTS))
    return folder


def teacher_of(family, prediction):
    return tiny.PIPELINES[family]() if family in OWN else tiny.PIPELINES[family](prediction)


def config_of(folder, images, prompts_file, family, objective, mode, **changes) -> DisBackConfig:
    if has_discriminator(objective, mode):
        data = {"train_data_dir": str(images), "cache_dir": str(folder / "cache")}
    else:
        data = {"prompts_file": str(prompts_file)} if FAMILIES[family].takes_prompts else {}
    return DisBackConfig(
        **{
            "pretrained_model_name_or_path": str(folder / "teacher"),
            "output_dir": str(folder / "run"),
            "objective": objective,
            **TINY,
            "degradation_steps": 2,
            "max_train_steps": 2,
            "steps_per_target": 1,
            "validation_prompts": [],
            **data,
            **MODES[mode],
            **changes,
        }
    )


def drawn(student, family, noise, condition):
    """What a stock pipeline draws: latents of one that takes prompts, images of another, of the noise of seed 3."""
    call = {"num_inference_steps": 1, "generator": torch.Generator().manual_seed(3)}
    if family.takes_prompts:
        call |= {"guidance_scale": 0, "latents": noise, "output_type": "latent", **call_of(family)}
        return student(tiny.PROMPTS[:2], **call).images
    if "class_labels" in condition:
        call |= {"class_labels": condition["class_labels"].tolist(), "guidance_scale": 1}
        return student(output_type="pt", **call).images
    return student(batch_size=2, output_type="pt", **call).images


@pytest.mark.parametrize(tuple(FACTORS), CELLS)
def test_every_pair_is_distilled(
    family, prediction, objective, mode, tmp_path, images, prompts_file, small_pictures, monkeypatch
):
    """Both stages, and the student loaded by its stock class: it draws what the generator that was trained draws, bit for bit."""
    teacher, trained, train = teacher_of(family, prediction), [], BacktrackingTrainer.train
    teacher.save_pretrained(tmp_path / "teacher")

    def watched(stage):
        trained.append(train(stage))
        return trained[0]

    monkeypatch.setattr(BacktrackingTrainer, "train", watched)
    config = config_of(tmp_path, images, prompts_file, family, objective, mode)
    trainer = DisBackTrainer(args=config)
    trainer.train()
    trainer.save_model()
    network, own = trained[0].requires_grad_(False), family_of(teacher)
    assert own.schedule.prediction_type == prediction
    assert not equal(weights(network), weights(own.network))
    if "num_path_nodes" in MODES[mode]:
        assert trainer.path is None
    else:
        path = DegradationPath.from_pretrained(tmp_path / "run" / "path")
        assert len(path) == 2 and path.kind == ("adapter" if config.is_adapter("fake_score") else "full")
    student = DiffusionPipeline.from_pretrained(tmp_path / "run")
    student.set_progress_bar_config(disable=True)
    assert type(student).__name__ in FAMILIES[family].pipeline_classes
    noise = noise_of(own)
    source = own.conditions(tiny.PROMPTS[:2])
    condition = source.condition([0, 1 % len(source)], [False, False])
    with torch.no_grad():
        x0 = OneStepGenerator(own.score_model(network), trainer.args.conditioning_timestep)(noise, condition)
        expected = x0 if own.takes_prompts else own.decode(x0)
    assert torch.equal(drawn(student, own, noise, condition), expected)
    assert expected.isfinite().all()


def test_each_pair_of_values_is_in_a_row_or_refused():
    for one, two in itertools.combinations(range(len(FACTORS)), 2):
        values = list(FACTORS.values())
        for pair in itertools.product(values[one], values[two]):
            with_it = [[row for row in rows if (row[one], row[two]) == pair] for rows in (PRODUCT, ROWS, REFUSED)]
            is_allowed = any(refused_flag(*row) is None for row in with_it[0])
            assert with_it[1] if is_allowed else with_it[2], f"{pair}"
    assert all(refused_flag(*row) is None for row in ROWS) and all(refused_flag(*row) for row in REFUSED)
    assert list(FAMILIES) == list(tiny.PIPELINES) == [row[0] for row in QUICK]
    for place, name in enumerate(FACTORS):
        assert {row[place] for row in QUICK} == set(FACTORS[name]), f"one of each {name} by default"


@pytest.mark.parametrize(tuple(FACTORS), REFUSED)
def test_what_does_not_go_together_is_refused_by_the_name_of_a_flag(
    family, prediction, objective, mode, tmp_path, images, prompts_file
):
    teacher_of(family, "epsilon").save_pretrained(tmp_path / "teacher")
    flag = refused_flag(family, prediction, objective, mode)
    changes = {"prediction_type": prediction} if flag == "prediction_type" else {}
    with pytest.raises(ValueError, match=f"--{flag}"):
        config = config_of(tmp_path, images, prompts_file, family, objective, mode, **changes)
        DisBackTrainer(args=config).train()
    assert not Path(tmp_path, "run", "path").exists()
