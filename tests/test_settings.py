"""What is said once of a setting, and what reads it: the command line, files of settings, resumed runs, the objective."""

import dataclasses
import json

import pytest
import train_disback
from stages import recorder, trainer, training

from diffusers_disback import OBJECTIVES, DisBackConfig, ModelReference, Objective
from diffusers_disback.commands.command_line import read_flags
from diffusers_disback.models.timestep_sampling import TimestepSampling
from diffusers_disback.objectives import make_objective
from diffusers_disback.training.config import (
    BacktrackingConfig,
    DegradationConfig,
    TrainingConfig,
    changed,
    that_count,
    without_rates,
)
from diffusers_disback.training.run_folder import RunFolder
from diffusers_disback.training.settings.fields import groups, named, setting, title, values
from diffusers_disback.training.settings.groups import TEACHER_FLAGS
from diffusers_disback.training.settings_file import read_settings, write_settings


# What is true of a setting -------------------------------------------------------------------------------------------


def test_what_a_resumed_run_may_change_is_listed_here():
    """A new setting changes the result unless it says otherwise, and then it stands here, too."""
    assert setting(0, "").metadata["changes_result"] and not setting(0, "").metadata["is_rate"]
    assert named(DisBackConfig, changes_result=False) == {
        *("output_dir", "resume_from_checkpoint", "stage", "degradation_path", "cache_dir", "max_train_steps"),
        *("checkpointing_steps", "checkpoints_total_limit", "mixed_precision", "allow_tf32", "gradient_checkpointing"),
        *(
            "offload_idle_role",
            "offload_ema",
            "enable_xformers_memory_efficient_attention",
            "attention_backend",
            "channels_last",
            "compile",
        ),
        *("dataloader_num_workers", "report_to", "logging_dir", "logging_steps", "tracker_project_name"),
        *("validation_prompts", "num_validation_images", "validation_steps", "evaluators", "evaluator_args"),
        *("evaluation_prompts_file", "num_evaluation_prompts"),
        *("push_to_hub", "hub_model_id", "hub_private_repo", "hub_token"),
        *("degradation_path_revision", "path_disk_budget_gb"),
    }
    rates = {"generator_learning_rate", "fake_score_learning_rate", "degradation_lr_multiplier"}
    rates |= {"discriminator_learning_rate"}
    assert named(DisBackConfig, is_rate=True) == rates


def test_what_else_is_said_of_settings_is_listed_here():
    assert named(DisBackConfig, is_free_text=True) == {"validation_prompts"}
    assert named(DisBackConfig, is_secret=True) == {"hub_token"}
    assert "secret" not in repr(DisBackConfig(hub_token="secret")) + str(values(DisBackConfig(hub_token="secret")))
    assert named(DisBackConfig, by_content=True) == {
        *("pretrained_model_name_or_path", "generator_model_name_or_path", "single_file_config", "prompts_file"),
    }
    parts = {field.name for field in dataclasses.fields(ModelReference)}
    assert TEACHER_FLAGS.keys() == parts - {"name_or_path", "revision"}
    flags = {flag: f"a {part}" for part, flag in TEACHER_FLAGS.items()}
    flags |= {"prediction_type": "sample", "rescale_betas_zero_snr": True, "null_class_label": 0}
    teacher = TrainingConfig(pretrained_model_name_or_path="x", revision="r", **flags).teacher
    assert teacher == ModelReference("x", "r", **{part: flags[flag] for part, flag in TEACHER_FLAGS.items()})


def test_all_settings_of_a_run_are_one_object_that_is_each_of_the_three():
    kinds = (TrainingConfig, DegradationConfig, BacktrackingConfig)
    config = DisBackConfig(output_dir="out", lora_rank=64, num_path_nodes=3, max_train_steps=7)
    assert all(isinstance(config, kind) for kind in kinds) and config.all_adapters
    assert [*values(config)] == [name for kind in kinds for name in values(kind())], "in the same order"
    assert {name for kind in kinds for name in named(kind)} == named(DisBackConfig)
    for changes in ({"num_path_nodes": 9, "degradation_steps": 8}, {"lora_alpha": 2.0}, {"ema_decay": 2.0}):
        with pytest.raises(ValueError, match=f"--{next(iter(changes))}"):
            DisBackConfig(**changes)
    assert "lora_roles" not in vars(TrainingConfig), "a list is nobody else's"
    DisBackConfig().validation_prompts.append("a cat")
    assert DisBackConfig().validation_prompts == []


def test_a_stage_writes_down_its_own_settings_of_all(tmp_path, teacher_folder):
    config = training(tmp_path)
    whole = DisBackConfig(**values(config), degradation_steps=4, num_path_nodes=2)
    one, both = recorder(config, teacher_folder), recorder(whole, teacher_folder)
    assert one.settings.keys() == both.settings.keys() and "max_train_steps" not in both.settings
    assert trainer(whole, None).settings.keys() == values(config).keys() | values(BacktrackingConfig()).keys()


# Runs that were begun before -----------------------------------------------------------------------------------------


def test_a_run_of_an_older_version_is_gone_on_with(tmp_path):
    """Its settings lack what is new, which is as it was then by default."""
    config = DisBackConfig(output_dir=str(tmp_path))
    now = values(config, TrainingConfig) | values(config, BacktrackingConfig)
    new = ("objective_args", "generator_adam_beta1", "generator_adam_beta2", "fake_score_adam_beta1")
    before = {name: value for name, value in now.items() if name not in new}
    folder = RunFolder(tmp_path)
    folder.claim("backtracking", before)
    folder.check("backtracking", now, "latest")
    folder.check("backtracking", {**now, "max_train_steps": 1, "generator_learning_rate": 1.0}, "latest")
    for name, value in (("objective_args", {"alpha": 1.2}), ("generator_adam_beta1", 0.0), ("min_noise", 0.1)):
        with pytest.raises(ValueError, match=f"other settings: {name} was .*, is "):
            folder.check("backtracking", {**now, name: value}, "latest")


def test_which_settings_are_others():
    assert changed({"seed": 0, "report_to": "none"}, {"seed": 0, "report_to": "all", "adam_beta1": 0.9}) == {}
    assert changed({"seed": 0}, {"seed": 1, "path": "x"}) == {"seed": (0, 1), "path": (None, "x")}
    assert changed({"fake_score_learning_rate": 1.0}, {"fake_score_learning_rate": 2.0}), "a rate counts"
    assert without_rates({"fake_score_learning_rate": 2.0, "seed": 1}) == {"seed": 1}
    assert that_count({"stage": "all", "seed": 1}) == {"seed": 1}


# The command line ----------------------------------------------------------------------------------------------------


def test_flags_stand_in_groups_with_their_defaults(capsys):
    with pytest.raises(SystemExit) as ended:
        train_disback.parse(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    titles = [title(group) for group in groups(DisBackConfig)]
    assert len(titles) == 9 and [said.index(f"{title}: --") for title in titles] == sorted(
        said.index(f"{title}: --") for title in titles
    )
    assert not ended.value.code and "(default: 5e-07)" in said and "(default: 0)" in said and "None" not in said


def test_only_what_is_given_is_read_and_dashes_are_taken():
    line = ["--seed", "3", "--push-to-hub", "--use_ema", "no", "--lora-roles", "generator", "--adam_epsilon=1e-9"]
    assert read_flags(DisBackConfig, line) == {
        "seed": 3,
        "push_to_hub": True,
        "use_ema": False,
        "lora_roles": ["generator"],
        "adam_epsilon": 1e-9,
    }
    for wrong, message in (
        (["--use_ema", "maybe"], "--use_ema/--use-ema: 'maybe' is none of true"),
        (["--seed", "1.5"], "--seed: invalid int value"),
        (["--see", "1"], "unrecognized arguments: --see"),
        (["--objective_args", "min_noise"], "'min_noise' is no name=value"),
        (["--objective_args", "a=1", "a=2"], "a is given twice"),
    ):
        with pytest.raises(ValueError, match=message):
            read_flags(DisBackConfig, wrong)


# A file of settings --------------------------------------------------------------------------------------------------


def read(tmp_path, text):
    file = tmp_path / "run.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_settings(file, DisBackConfig)


def test_a_file_gives_values_as_the_command_line_does(tmp_path):
    text = """# a comment
    mixed_precision: no
    cache_conditions: off
    generator_learning_rate: 1e-6
    fake_score_learning_rate: 1
    use_ema: true
    seed: 010
    revision: '1e5'
    hub_model_id: 2024-01-01
    validation_prompts: [a cat, "", no]
    objective_args: {min_noise: 0.1, flag: true, name: off}
    """
    given = read(tmp_path, text)
    assert given == {
        "mixed_precision": "no",
        "cache_conditions": "off",
        "generator_learning_rate": 1e-6,
        "fake_score_learning_rate": 1.0,
        "use_ema": True,
        "seed": 10,
        "revision": "1e5",
        "hub_model_id": "2024-01-01",
        "validation_prompts": ["a cat", "", "no"],
        "objective_args": {"min_noise": 0.1, "flag": True, "name": "off"},
    }
    assert type(given["fake_score_learning_rate"]) is float


def test_what_is_wrong_in_a_file_is_told_in_a_line(tmp_path):
    merges = "a0: &a0 {x: y}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 40))
    for text, message in (
        ("seeds: 1", "seeds in .*run.yaml, line 1, is no setting"),
        ("\nseed: x", "seed in .*run.yaml, line 2, has to be a whole number, but is 'x'"),
        ("seed: '1'", "has to be a whole number, but is '1'"),
        ("seed: 1.5", "has to be a whole number, but is 1.5"),
        ("seed: -1", r"has to be in \[0, 4294967295\], but is -1"),
        ("seed: [1]", "has to be a whole number, but is a list"),
        ("seed: {a: 1}", "has to be a whole number, but is a dict"),
        ("seed:", "seed in .* has no value"),
        ("seed: null", "has no value"),
        ("seed: true", "has to be a whole number, but is True"),
        ("use_ema: yes", "has to be True or False, but is 'yes'"),
        ("stage: everything", "'everything' is none of all, record, backtrack"),
        ("adam_epsilon: .nan", "has to be a number, but is '.nan'"),
        ("adam_epsilon: 1e999", "has to be in"),
        (f"seed: {'9' * 5000}", "cannot be read"),
        (f"adam_epsilon: {'9' * 4000}", "has to be in"),
        ("revision: 5", "has to be a text, but is a int"),
        ("revision: ''", "is empty"),
        ("validation_prompts: a cat", "has to be a list of texts, but is 'a cat'"),
        ("validation_prompts: [1]", "has to be a text, but is a int"),
        ("validation_prompts: [[a]]", "has to be a text"),
        ("validation_prompts: &a [*a]", "has to be a text"),
        ("lora_roles: [teacher]", "'teacher' is none of generator, fake_score"),
        ("objective_args: {a: 1, a: 2}", "gives a name twice"),
        ("objective_args: {[a]: 1}", "has a key in line 1 that is no name"),
        ("objective_args: {a: null}", "has to be a number"),
        ("objective_args: [a]", "has to give values to names"),
        ("seed: 1\nseed: 1", "seed in .*, line 2, is given twice"),
        ("? [a]\n: 1", "that is no name"),
        ("- seed: 1", "it is no mapping"),
        ("seed 1", "it is no mapping"),
        ("", "it is no mapping"),
        ("seed: 1\n---\nseed: 2", "is no valid YAML"),
        ("seed: [1", "is no valid YAML"),
        ("seed: " + "[" * 20_000, "is no valid YAML"),
        ("seed: *a", "is no valid YAML"),
        ("seed: !!python/object/apply:os.system [ls]", "has to be a whole number"),
        ("seed: !!python/name:os.system x", "has the tag"),
        ("seed: !!int x", "cannot be read"),
        ("revision: !!binary aGk=", "has the tag"),
        ("<<: {seed: 1}", "<< in .* is no setting"),
        (merges, "a0 in .* is no setting"),
        (b"seed: \xff", "is not UTF-8"),
        ("revision: \x1b[31m", "is no valid YAML"),
    ):
        with pytest.raises(ValueError, match=message) as told:
            read(tmp_path, text)
        assert "\n" not in str(told.value) and "run.yaml" in str(told.value), text
    with pytest.raises(ValueError, match="nowhere.yaml cannot be read"):
        read_settings(tmp_path / "nowhere.yaml", DisBackConfig)


def test_what_is_written_is_read_back(tmp_path):
    texts = [
        "1e5",
        "no",
        "off",
        "null",
        "~",
        "010",
        "1_000",
        "1:30",
        "2024-01-01",
        "<<",
        "=",
        "- a: b #c",
        "é 猫",
        "a\nb\n",
    ]
    texts += [
        "\x85 \u2028 \ufeff \x7f \x1b",
        " a ",
        "'",
        '"',
        "\\n",
        "\t",
        "&a",
        "*a",
        "!a",
        "%a",
        "@",
        "`",
        "x" * 3000,
        "🐈",
    ]
    file, left_out = tmp_path / "settings.yaml", {"hub_token": None, "resume_from_checkpoint": None}
    for text, rate in zip(
        texts, 3 * [5e-7, 1e-12, 1.0, 1 / 3, 1e12, 0.1, 1e22, 1e16, 123456789.0, 3e-4], strict=False
    ):
        config = DisBackConfig(
            revision=text if text.strip() else None,
            validation_prompts=["", *texts],
            generator_learning_rate=rate,
            hub_token="hf_secret",
            resume_from_checkpoint="latest",
            report_to="none",
        )
        write_settings(file, config)
        assert "hf_secret" not in file.read_text()
        assert DisBackConfig(**read_settings(file, DisBackConfig)) == dataclasses.replace(config, **left_out)
    arguments = {"alpha": 1}
    write_settings(file, DisBackConfig(objective="sid", objective_args=arguments))
    assert read_settings(file, DisBackConfig)["objective_args"] == arguments


def test_the_command_line_overrides_a_file_and_that_the_embedded_default(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("train_batch_size: 3\nseed: 5\nobjective: sid\nobjective_args: {alpha: 1.2}\n")
    config = train_disback.parse(["--config", str(file), "--seed", "6", "--output_dir", str(tmp_path)])
    assert (config.train_batch_size, config.seed, config.objective_args) == (3, 6, {"alpha": 1.2})
    assert config.max_train_steps == 1200 and config.prompts_file.endswith("prompts.txt"), "of the quickstart"
    file.write_text("pretrained_model_name_or_path: mine\n")
    assert train_disback.parse([f"--config={file}"]).max_train_steps == 20000
    file.write_text("dataset_name: captions\n")
    assert train_disback.parse(["--config", str(file)]).prompts_file is None


def test_the_settings_of_a_run_make_it_again(run, tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text(
        "num_path_nodes: 0\nmax_train_steps: 1\nobjective: sid\nobjective_args: {alpha: 1.2}\nproportion_empty_prompts: 0.5\n"
    )
    folder = run(config=file, num_path_nodes=None, max_train_steps=None, generator_adam_beta1=0.0)
    written = folder / "settings.yaml"
    first = train_disback.parse(["--config", str(written)])
    assert first.objective_args == {"alpha": 1.2} and first.proportion_empty_prompts == 0.0
    settings = json.loads((folder / "report.json").read_text())["settings"]
    assert values(first) == {
        **settings,
        **{name: values(first)[name] for name in ("pretrained_model_name_or_path", "prompts_file", "output_dir")},
    }
    assert "`{'alpha': 1.2}`" in (folder / "README.md").read_text()
    with pytest.raises(ValueError, match="other settings: objective_args was {'alpha': 1.2}, is {'alpha': 1.1}"):
        (folder / "report.json").unlink()
        train_disback.main(
            ["--config", str(written), "--objective_args", "alpha=1.1", "--resume_from_checkpoint", "latest"]
        )
    train_disback.main(["--config", str(written), "--resume_from_checkpoint", "latest"])


# The objective's own settings ----------------------------------------------------------------------------------------


class Scaled(Objective):
    def __init__(self, alpha: float, kind: str = "a", twice: bool = False, number: int | None = None):
        if alpha < 0:
            raise ValueError("alpha has to be at least 0.")
        self.alpha = alpha

    def generator_loss(self, x0, batch, target, fake_score): ...


def test_an_objective_says_what_it_takes(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "scaled", Scaled)
    taken = "--objective_args: scaled takes .alpha: float, kind: str = 'a', twice: bool = False, number: int . None = None."
    for arguments, message in (
        ({}, "; missing a required argument: 'alpha'"),
        ({"alpha": 1, "beta": 2}, "; got an unexpected keyword argument 'beta'"),
        ({"alpha": "1"}, "; alpha cannot be '1'"),
        ({"alpha": True}, "; alpha cannot be True"),
        ({"alpha": 1, "kind": 2}, "; kind cannot be 2"),
        ({"alpha": 1, "twice": 1}, "; twice cannot be 1"),
        ({"alpha": 1, "number": 1.5}, "; number cannot be 1.5"),
        ({"alpha": -1}, ". alpha has to be at least 0"),
    ):
        with pytest.raises(ValueError, match=taken + message):
            DisBackConfig(objective="scaled", objective_args=arguments)
    assert make_objective("scaled", {"alpha": 1, "number": 3}).alpha == 1
    for arguments in ({"alpha": float("nan")}, {"alpha": [1]}, ["alpha"], {1: 2}):
        with pytest.raises(ValueError, match="--objective_args"):
            DisBackConfig(objective="scaled", objective_args=arguments)
    line = ["--objective_args", "alpha=1.2", "kind=x=y", "twice=True", "number=3"]
    assert read_flags(DisBackConfig, line) == {
        "objective_args": {"alpha": 1.2, "kind": "x=y", "twice": True, "number": 3}
    }


def test_an_objectives_arguments_and_timesteps(tmp_path):
    for arguments, message in (
        ({"divergence": "js"}, "divergence='js' is none of jensen_shannon, forward_kl, reverse_kl"),
        ({"max_ratio": 0.5}, "max_ratio=0.5 has to be at least 1"),
    ):
        with pytest.raises(ValueError, match=f"--objective_args: f_distill takes .* {message}"):
            TrainingConfig(objective="f_distill", objective_args=arguments)
    with pytest.raises(ValueError, match="--min_noise 0.5 is above --max_noise 0.4"):
        TrainingConfig(min_noise=0.5, max_noise=0.4)
    own = {"objective": "sid", "objective_args": {"alpha": 1.2}, "min_noise": 0.4, "timestep_sampling": "logit_normal"}
    objective = trainer(training(tmp_path, **own), None).objective
    assert objective.alpha == 1.2 and objective.timesteps == TimestepSampling("logit_normal", min_noise=0.4)
    for name in OBJECTIVES:
        assert name in TrainingConfig.__dataclass_fields__["objective"].metadata["help"]


# AdamW's betas -------------------------------------------------------------------------------------------------------


def test_each_network_has_its_own_betas(tmp_path, teacher_folder):
    def betas(stage):
        return {learner.name: learner.optimizer.param_groups[0]["betas"] for learner in stage.learners}

    common = {"adam_beta1": 0.8, "adam_beta2": 0.99}
    plain = trainer(training(tmp_path, **common), None)
    assert betas(plain) == {"generator": (0.8, 0.99), "fake_score": (0.8, 0.99)}
    for adapters in ({}, {"lora_rank": 2}):
        own = training(tmp_path, **common, **adapters, generator_adam_beta1=0.0, fake_score_adam_beta2=0.9)
        assert betas(trainer(own, None)) == {"generator": (0.0, 0.99), "fake_score": (0.8, 0.9)}
        assert betas(recorder(own, teacher_folder)) == {"fake_score": (0.8, 0.9)}


def test_the_optimisers_have_the_other_settings_of_adamw(tmp_path):
    stage = trainer(training(tmp_path, adam_weight_decay=0.5, adam_epsilon=1e-2, lr_warmup_steps=4), None)
    for learner in stage.learners:
        (group,) = learner.optimizer.param_groups
        assert (group["weight_decay"], group["eps"]) == (0.5, 1e-2)
        assert group["lr"] == 0 < group["initial_lr"], "the rate is warmed up"
