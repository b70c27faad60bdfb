"""The best student, an early end and alarms: what follows from a run's measures, whole, resumed or cut off."""

import json
import os
import shutil

import pytest
import tiny
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from script import student
from stages import equal, interrupted_at, trainer, training, weights
from write_faults import Fault, full, killed

from diffusers_disback import EVALUATORS, Evaluator, Metric
from diffusers_disback.families import family_of
from diffusers_disback.training.alarms import alarm_names, alarms
from diffusers_disback.training.config import TrainingConfig
from diffusers_disback.training.validation import STATUS, Validation


NAN = float("nan")
METRICS = {
    "charm": Metric("charm", "grace", "higher"),
    "dullness": Metric("dullness", "taste", "lower"),
    "drift": Metric("drift", "drift", "zero"),
    "diversity": Metric("diversity", "diversity", "higher"),
}
TEACHER = {"charm": 0.9, "dullness": 1.0, "drift": 0.0, "diversity": 0.4}


def rows(name, *values, nodes=None, initial=None):
    """A curve of one metric, validated at steps 1, 2, ..."""
    first = [] if initial is None else [{"step": 0, "node": 2, name: initial}]
    nodes = [0] * len(values) if nodes is None else nodes
    return first + [
        {"step": step, "node": node, name: value}
        for step, (node, value) in enumerate(zip(nodes, values, strict=True), 1)
    ]


def validation(folder, name="charm", **changes) -> Validation:
    config = training(folder, metric_for_best_model=name, **changes)
    return Validation(config, None, METRICS, TEACHER)


# What follows from a curve -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, values, best",
    [
        ("charm", (0.1, 0.3, 0.2), 2),
        ("dullness", (0.3, 0.1, 0.2), 2),
        ("drift", (-0.3, 0.2, -0.1, 0.1), 3),
        ("charm", (0.1, 0.1), 1),
        ("charm", (NAN, 0.1, float("inf")), 2),
        ("dullness", (float("-inf"), NAN), None),
        (None, (), None),
    ],
)
def test_the_best_is_by_the_metrics_direction(tmp_path, name, values, best):
    """The first of equal ones; nothing that is not finite, and not the student that was never trained."""
    curve = rows(name or "charm", *values, initial={"charm": 9.0, "dullness": -9.0}.get(name, 0.0))
    found = validation(tmp_path, name).best(curve)
    assert found == (None if best is None else {"step": best, "metric": name, "value": values[best - 1]})


@pytest.mark.parametrize(
    "values, changes, waited",
    [
        ((0.1, 0.2, 0.3), {}, 0),
        ((0.3, 0.2, 0.1), {}, 2),
        ((0.3, 0.3), {}, 1),
        ((0.3, NAN, 0.1), {}, 2),
        ((0.1, 0.2, 0.3), {"early_stopping_threshold": 0.15}, 2),
        ((0.1, 0.2, 0.4), {"early_stopping_threshold": 0.15}, 0),
        ((0.5, 0.4, 0.3), {"nodes": [2, 1, 0]}, 1),
        ((0.5, 0.4, 0.3), {"nodes": [2, 1, 1]}, 0),
        ((0.5, 0.6, 0.3, 0.2), {"nodes": [1, 1, 0, 0]}, 2),
    ],
)
def test_patience_counts_validations_at_the_teacher_that_do_not_improve_the_metric(tmp_path, values, changes, waited):
    curve = rows("charm", *values, nodes=changes.pop("nodes", None), initial=9.0)
    one = validation(tmp_path, early_stopping_patience=2, **changes)
    assert one.waited(curve) == waited
    assert one.stops(curve) == (waited >= 2) and one.stops(curve, more=1) == (waited >= 1)
    assert not validation(tmp_path).stops(curve, more=99)


@pytest.mark.parametrize(
    "curve, ring",
    [
        (rows("diversity", 0.2), []),
        (rows("diversity", 0.19), ["diversity"]),
        (rows("diversity", 0.1, 0.2), []),
        (rows("drift", 0.05), []),
        (rows("drift", -0.051), ["drift"]),
        (rows("drift", -0.3, initial=0.3), []),
        (rows("drift", -0.31, initial=0.3), ["drift"]),
        (rows("drift", 0.06, initial=NAN), ["drift"]),
        (rows("charm", 0.4, 0.3, 0.2), []),
        (rows("charm", 0.4, 0.3, 0.2, 0.1), ["worsening"]),
        (rows("charm", 0.4, 0.3, 0.2, 0.2), []),
        (rows("charm", 0.3, 0.2, 0.1, initial=0.4), []),
        (rows("charm", 0.4, 0.3, NAN, 0.1), []),
        (rows("dullness", NAN), ["not_finite"]),
        (rows("student_to_target", float("inf")), ["not_finite"]),
        (rows("diversity", NAN), ["not_finite"]),
        (rows("drift", 0.9)[:0], []),
    ],
)
def test_alarms_ring_and_stop(curve, ring):
    found = alarms(curve, METRICS, TEACHER, "charm")
    assert [*found] == ring and all("\n" not in line and line for line in found.values())


def test_alarms_are_named_by_what_is_measured():
    assert alarm_names(METRICS, "charm") == ["diversity", "drift", "worsening", "not_finite"]
    assert alarm_names({"charm": METRICS["charm"]}, None) == ["not_finite"]
    assert alarms(rows("diversity", 0.01), METRICS, {}) == {}, "a teacher whose diversity is not known"


# In stage 2 ----------------------------------------------------------------------------------------------------------

VALUES = [0.1, 0.2, 0.6, 0.3, 0.5, 0.4, 0.2, 0.1]


def stage(folder, values=VALUES, steps=6, config=None, **changes):
    """Stage 2 without a path, validated after every step; what it measures is what it is told to."""
    settings = {"metric_for_best_model": "charm", "validation_steps": 1, "checkpointing_steps": 2, **(config or {})}
    measured = []

    def evaluate(network):
        measured.append({key: value.clone() for key, value in network.state_dict().items()})
        if isinstance(value := values[len(made.curve)], BaseException):
            raise value
        return {"charm": value}

    made = trainer(training(folder, **settings), None, evaluate, max_train_steps=steps, **changes)
    made.validation = Validation(made.config, made.family, {"charm": METRICS["charm"]}, {"charm": 0.9})
    made.measured = measured
    made.mismatch = lambda node: {}  # it takes longer than all else, and tests/test_mismatch.py knows it
    return made


def resumed(folder, *arguments, **changes):
    config = {"resume_from_checkpoint": "latest", **changes.pop("config", {})}
    return stage(folder, *arguments, config=config, **changes)


def best_of(folder):
    """All files of the best student: name -> content."""
    files = [file for file in (folder / "best").rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def told(folder):
    return json.loads((folder / "best" / "best.json").read_text())


def timeless(curve):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in curve]


@pytest.mark.parametrize("use_ema", [False, True])
def test_the_best_student_is_kept_as_it_would_be_deployed(tmp_path, use_ema):
    one = stage(tmp_path, use_ema=use_ema, config={"load_best_model_at_end": True})
    network = one.train()
    assert told(tmp_path).items() >= {"step": 3, "metric": "charm", "value": 0.6}.items()
    kept = UNet2DConditionModel.from_pretrained(tmp_path / "best", subfolder="unet").state_dict()
    assert equal(kept, one.measured[2]) and equal(weights(network), kept)
    assert not equal(one.measured[5], one.measured[2])
    assert (tmp_path / "best" / "scheduler" / "scheduler_config.json").is_file()
    assert one.result().outcome == {"best_model": {"step": 3, "metric": "charm", "value": 0.6, "is_student": True}}
    if use_ema:
        return
    last = stage(tmp_path / "last")
    assert equal(weights(last.train()), one.measured[5]) and not last.result().outcome["best_model"]["is_student"]
    assert best_of(tmp_path / "last") == best_of(tmp_path)


@pytest.mark.parametrize("roles", [["generator", "fake_score"], pytest.param(["generator"], marks=pytest.mark.slow)])
def test_the_best_of_an_adapter_is_its_lora(tmp_path, roles):
    config = {"lora_rank": 2, "lora_roles": roles, "load_best_model_at_end": True}
    one = stage(tmp_path / "one", use_ema=True, config=config)
    network = one.train()
    assert {"best/best.json", "best/lora/pytorch_lora_weights.safetensors"} < best_of(tmp_path / "one").keys()
    shorter = stage(tmp_path / "shorter", steps=3, use_ema=True, config={**config, "lr_scheduler": "constant"})
    assert equal(weights(network), weights(shorter.train()))
    assert equal(one.student.lora[0], shorter.student.lora[0])
    pipe = tiny.pipeline()
    pipe.load_lora_weights(tmp_path / "one" / "best" / "lora")
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert all(torch.allclose(v, network.state_dict()[k], atol=1e-6) for k, v in pipe.unet.state_dict().items())


def test_training_ends_when_patience_is_over_and_is_resumed_to_the_same_end(tmp_path, capsys):
    config = {"early_stopping_patience": 2, "checkpointing_steps": 4}
    one = stage(tmp_path, config=config)
    expected = weights(one.train())
    assert one.steps == 5 == one.result().cost["steps"] and [row["step"] for row in one.curve] == [1, 2, 3, 4, 5]
    assert "backtracking: ends at step 5: charm has not improved" in capsys.readouterr().err
    stopped = {"step": 5, "max_steps": 6, "metric": "charm", "patience": 2}
    assert one.result().outcome["early_stopping"] == stopped
    checkpoints = {file.name for file in (tmp_path / "checkpoints" / "backtracking").iterdir()}
    assert checkpoints == {"checkpoint-000004", "checkpoint-000005"}
    before = best_of(tmp_path)
    for _ in range(2):
        again = resumed(tmp_path, config=config)
        assert equal(weights(again.train()), expected) and timeless(again.curve) == timeless(one.curve)
        assert again.steps == 5 and best_of(tmp_path) == before and again.result().outcome == one.result().outcome
        shutil.rmtree(tmp_path / "checkpoints" / "backtracking" / "checkpoint-000005", ignore_errors=True)


@pytest.mark.parametrize(
    "where, at", [("step", 0), ("step", 3), ("evaluation", 1), ("evaluation", 2), ("evaluation", 3), ("evaluation", 5)]
)
def test_a_run_that_is_cut_off_anywhere_ends_as_an_unbroken_one(tmp_path, at, where, unbroken):
    config = {"load_best_model_at_end": True}
    values = list(VALUES)
    if where == "evaluation":
        values[at] = KeyboardInterrupt()
    broken = stage(tmp_path / "broken", values, config=config)
    if where == "step":
        broken.train_step = interrupted_at(at, broken.train_step)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    again = resumed(tmp_path / "broken", config=config)
    network = again.train()
    one, expected, files = unbroken
    assert equal(weights(network), expected) and timeless(again.curve) == timeless(one.curve)
    assert best_of(tmp_path / "broken") == files and again.result().outcome == one.result().outcome
    assert not list((tmp_path / "broken").glob("*.draft"))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    one = stage(folder, config={"load_best_model_at_end": True})
    return one, weights(one.train()), best_of(folder)


def test_a_checkpoint_brings_its_own_best_student_back(tmp_path, unbroken):
    """Whatever has become of the folder since: that of a later step is written again when the run gets there."""
    one = stage(tmp_path, config={"load_best_model_at_end": True})
    one.train()
    checkpoints = tmp_path / "checkpoints" / "backtracking"
    assert not (checkpoints / "checkpoint-000000").exists()
    assert [
        json.loads((checkpoints / f"checkpoint-00000{n}" / "best" / "best.json").read_text())["step"] for n in (2, 4)
    ] == [1, 3]
    weights_file = tmp_path / "best" / "unet" / "diffusion_pytorch_model.safetensors"
    before = weights_file.read_bytes()
    for name, spoil in (
        ("checkpoint-000002", lambda: None),
        ("checkpoint-000004", lambda: shutil.rmtree(tmp_path / "best")),
        ("checkpoint-000006", lambda: (os.remove(weights_file), weights_file.write_bytes(before[:-1] + b"x"))),
    ):
        spoil()
        config = {"resume_from_checkpoint": str(checkpoints / name), "load_best_model_at_end": True}
        again = stage(tmp_path, config=config)
        assert equal(weights(again.train()), unbroken[1]) and best_of(tmp_path) == unbroken[2], name
    os.remove(weights_file)
    with pytest.raises(
        ValueError, match="best student in .* cannot be taken: unet/diffusion.* is missing. Pass --resume"
    ):
        one.validation.student.load_into(one.student)
    (tmp_path / "best" / "best.json").unlink()
    with pytest.raises(ValueError, match="has no best.json: this library did not write it, or it is damaged. Move"):
        stage(tmp_path)
    stage(tmp_path, config={"metric_for_best_model": None})


def test_what_an_earlier_attempt_left_is_not_the_new_runs_best(tmp_path):
    """Cut off before its first checkpoint, it begins again."""
    broken = stage(tmp_path, [0.1, 0.9, KeyboardInterrupt()], config={"checkpointing_steps": 99})
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    assert told(tmp_path)["step"] == 2
    again = resumed(tmp_path, [KeyboardInterrupt()])
    with pytest.raises(KeyboardInterrupt):
        again.train()
    assert not (tmp_path / "best").exists()


@pytest.mark.parametrize("how", ["full", "killed"])
def test_weights_and_best_json_are_of_one_student_whatever_happens(tmp_path, how):
    one = stage(tmp_path, steps=1)
    one.train()
    kept, before = one.validation.student, best_of(tmp_path)
    with torch.no_grad():
        for parameter in one.student.parameters():
            parameter.add_(1.0)
    row, after = {"step": 2, "metric": "charm", "value": 0.2}, None
    for at in range(99):
        if how == "killed":
            ended = not killed(lambda: kept.write(one.student, row), at)
        else:
            try:
                with Fault(at, full).injected():
                    kept.write(one.student, row)
                ended = True
            except OSError:
                ended = False
                assert not list(tmp_path.glob("best.draft"))
        now = best_of(tmp_path)
        after = now if ended else after
        if ended:
            break
        assert (
            now == before or (how == "killed" and not now) or (told(tmp_path)["step"] == 2 and kept._damage() is None)
        ), at
        kept.restore(tmp_path / "checkpoints" / "backtracking" / "checkpoint-000001")  # which has none: it was before
        assert not (tmp_path / "best").exists()
        shutil.rmtree(tmp_path / "best", ignore_errors=True)
        for name, content in before.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(content)
    assert at > 5 and after != before and told(tmp_path)["step"] == 2 and kept._damage() is None


def test_alarms_are_told_once_an_episode_and_tracked_at_each_validation(tmp_path, capsys):
    one = stage(tmp_path, [0.5, NAN, NAN, 0.4, NAN, 0.3])
    tracked, log = [], one.accelerator.log

    def spy(values, step):
        tracked.append((step, {k: v for k, v in values.items() if k.startswith("alarms/")}))
        log(values, step=step)

    one.accelerator.log = spy
    one.train()
    told = [line for line in capsys.readouterr().err.splitlines() if "alarm" in line]
    assert [line.split("alarm ")[1] for line in told] == [
        f"not_finite at step {step}: charm is not finite" for step in (2, 5)
    ]
    assert [values["alarms/not_finite"] for _, values in tracked if values] == [0, 1, 1, 0, 1, 0]
    assert {"alarms/worsening": 0}.items() <= tracked[-1][1].items() and tracked[-1][0] == 6


def test_the_status_is_of_the_last_validation(tmp_path):
    one = stage(tmp_path, [0.5, NAN, KeyboardInterrupt()], config={"early_stopping_patience": 3})
    with pytest.raises(KeyboardInterrupt):
        one.train()
    assert json.loads((tmp_path / STATUS).read_text()) == {
        "format_version": 1,
        "stage": "backtracking",
        "step": 2,
        "max_steps": 6,
        "node": 0,
        "measures": {"charm": None},
        "best": {"step": 1, "metric": "charm", "value": 0.5},
        "waited": 1,
        "stops": False,
        "alarms": {"not_finite": "charm is not finite"},
    }
    resumed(tmp_path, [0.5, 0.1, 0.1, 0.1, 0.1], config={"early_stopping_patience": 3}).train()
    status = json.loads((tmp_path / STATUS).read_text())
    assert status["step"] == 4 and status["stops"] and status["waited"] == 3


# The whole run -------------------------------------------------------------------------------------------------------


class Brightness(Evaluator):
    """A measure of images alone."""

    metrics = {"brightness": Metric("brightness", "brightness", "lower")}
    compares_distributions = True
    references: list[torch.Tensor] = []

    def prepare(self, teacher_images, prompts):
        Brightness.references.append(teacher_images)

    def __call__(self, images, prompts):
        return {"brightness": images.float().mean().item()}


@pytest.fixture
def bright(monkeypatch):
    monkeypatch.setattr(Brightness, "references", [])
    monkeypatch.setitem(EVALUATORS, "brightness", Brightness)
    return {"evaluators": ["drift", "brightness"], "metric_for_best_model": "brightness", "validation_steps": 1}


def test_a_run_saves_its_best_student_and_says_so(run, bright):
    folder = run(**bright, load_best_model_at_end=True, early_stopping_patience=4, early_stopping_threshold=0.5)
    report = json.loads((folder / "report.json").read_text())
    best = min(report["curve"][1:], key=lambda row: row["brightness"])
    assert report["best_model"] == {
        "step": best["step"],
        "metric": "brightness",
        "value": best["brightness"],
        "is_student": True,
    }
    assert report["student"]["brightness"] == best["brightness"] and "early_stopping" not in report
    kept = load_file(folder / "best" / "unet" / "diffusion_pytorch_model.safetensors")
    assert equal(student(folder), kept)
    assert (folder / "best/unet/config.json").read_bytes() == (folder / "unet/config.json").read_bytes()
    card = (folder / "README.md").read_text()
    assert f"\nThe student is not the last one but the best by `brightness` ({best['brightness']:.4g})" in card
    assert "Training ended" not in card and json.loads((folder / STATUS).read_text())["step"] == 4


def test_a_run_that_ended_early_is_finished(run, bright, capsys):
    from diffusers_disback.commands.cli import main as command

    flags = {**bright, "max_train_steps": 20, "early_stopping_patience": 1, "early_stopping_threshold": 999.0}
    folder = run(**flags)
    report = json.loads((folder / "report.json").read_text())
    assert report["early_stopping"] == {"step": 3, "max_steps": 20, "metric": "brightness", "patience": 1}
    assert [row["node"] for row in report["curve"]] == [1, 1, 1, 0], "not before the teacher is the target"
    assert report["stages"]["backtracking"]["steps"] == 3 and not report["best_model"]["is_student"]
    card = (folder / "README.md").read_text()
    assert "\nTraining ended at update 3 of 20: `brightness` had not improved at 1 validations in a row.\n" in card
    capsys.readouterr()
    run(**flags, resume_from_checkpoint="latest")
    assert "is finished" in capsys.readouterr().out
    assert command(["push", str(folder), "alice/x"]) == 2
    assert "holds no finished student" not in capsys.readouterr().err
    (folder / "report.json").unlink()
    before = student(folder)
    run(**flags, resume_from_checkpoint="latest")
    again = json.loads((folder / "report.json").read_text())
    assert equal(student(folder), before) and again["early_stopping"] == report["early_stopping"]
    with pytest.raises(ValueError, match="evaluators was .*, is "):
        (folder / "report.json").unlink()
        run(**{**flags, "evaluators": ["brightness"]}, resume_from_checkpoint="latest")


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"metric_for_best_model": "charm"},
            "--metric_for_best_model charm is not measured. .* are drift_mean, drift_std",
        ),
        ({"load_best_model_at_end": True}, "--load_best_model_at_end needs to know what is best"),
        ({"early_stopping_patience": 2}, "--early_stopping_patience needs to know what is best"),
        ({"early_stopping_patience": 0}, "--early_stopping_patience has to be at least 1"),
        (
            {"metric_for_best_model": "drift_mean", "early_stopping_threshold": 0.1},
            "--early_stopping_threshold is for --early_stopping_patience",
        ),
        ({"evaluation_prompts_file": "missing.txt"}, "missing.txt cannot be read"),
        ({"num_evaluation_prompts": 0}, "--num_evaluation_prompts has to be at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(run, changes, message):
    with pytest.raises(ValueError, match=message):
        run(**changes)
    assert not list((run.folder / "run").glob("*")) if (run.folder / "run").exists() else True


def test_an_evaluation_of_its_own_prompts_takes_no_others(tmp_path):
    from diffusers_disback import DisBackConfig, DisBackTrainer, Evaluation

    for changes in ({"num_evaluation_prompts": 3}, {"evaluation_prompts_file": "x.txt"}):
        config = DisBackConfig(output_dir=str(tmp_path), **changes)
        with pytest.raises(ValueError, match=f"--{next(iter(changes))} is of no use: this evaluation brings its own"):
            DisBackTrainer("x", config, ["a"], lambda: Evaluation(["a"]))


# The teacher's images ------------------------------------------------------------------------------------------------


@pytest.fixture
def sampled(monkeypatch):
    """How many images each sampling of the teacher made, and by which seed."""
    from diffusers_disback import Evaluation

    calls, sample = [], Evaluation.sample

    def spy(self, family, pipeline, state=None, seed=None, **arguments):
        if arguments:
            calls.append((len(self.prompts), seed))
        return sample(self, family, pipeline, state, seed=seed, **arguments)

    monkeypatch.setattr(Evaluation, "sample", spy)
    return calls


def test_what_evaluators_measure_is_asked_for_apart_from_what_is_shown(run, sampled, tmp_path):
    (tmp_path / "own.txt").write_text("a red circle\na blue square\na green cross\n")
    record = {"stage": "record", "validation_prompts": tiny.PROMPTS[:1]}
    for name, changes, number in (
        ("few", {"evaluation_prompts_file": tmp_path / "own.txt", "num_evaluation_prompts": 2}, 2),
        ("own", {"num_evaluation_prompts": 7}, 7),
    ):
        sampled.clear()
        report = json.loads((run(name, **record, **changes) / "report.json").read_text())
        assert report["evaluation"]["num_pictures"] == number and sampled[:2] == [(number, 0), (1, 0)]
    assert report["settings"]["num_evaluation_prompts"] == 7 and report["example_prompt"] == tiny.PROMPTS[0]


def test_prompts_are_evenly_spaced_and_repeated_where_they_are_few():
    from diffusers_disback.training.inputs import evaluation_prompts

    own, shown = list("abcdefghij"), ["a", "b"]
    asked = TrainingConfig(num_validation_images=2)
    assert evaluation_prompts(asked, own, shown) == ["a", "a", "b", "b"]
    assert evaluation_prompts(asked, own, shown, ["x", "y"]) == ["x", "y"]
    asked.num_evaluation_prompts = 4
    assert evaluation_prompts(asked, own, shown) == ["a", "c", "f", "h"]
    assert evaluation_prompts(asked, own, shown, ["x", "y"]) == ["x", "x", "y", "y"]


def test_the_teacher_is_sampled_once_a_run(run, sampled, bright, capsys):
    flags = {"evaluators": ["drift", "brightness"], "stage": "record", "num_validation_images": 2}
    folder = run(**flags)
    few = len(tiny.PROMPTS)
    assert sampled[:3] == [(2 * few, 0), (few, 0), (2 * few, 1)]
    (first,) = Brightness.references
    report = json.loads((folder / "report.json").read_text())
    assert report["teacher"]["drift_mean"] == 0, "drift is to the images that the teacher is measured by"
    files = sorted((folder / "evaluation").iterdir())
    images = [load_file(file)["images"].clone() for file in files]  # the files are spoilt below
    assert len(files) == 3 and sum(torch.equal(one, first) for one in images) == 1
    assert all(one.dtype == torch.uint8 for one in images)

    sampled.clear()
    (folder / "report.json").unlink()
    run(**flags, resume_from_checkpoint="latest")
    assert all(number == few for number, _ in sampled), "but for the images of nodes"
    assert torch.equal(Brightness.references[-1], first)
    again = json.loads((folder / "report.json").read_text())
    assert again["teacher"] == report["teacher"], "the time of one image, too"

    for damage in (lambda file: file.write_bytes(b"x"), lambda file: shutil.copyfile(files[0], file)):
        sampled.clear()
        (folder / "report.json").unlink()
        for file in files[1:]:
            damage(file)
        capsys.readouterr()
        run(**flags, resume_from_checkpoint="latest")
        assert capsys.readouterr().err.count("The teacher's images are sampled again.") == 2
        assert all(torch.equal(load_file(file)["images"], one) for file, one in zip(files, images, strict=True))


def test_the_teachers_images_depend_on_all_that_they_are_made_from(tmp_path):
    from diffusers_disback import Evaluation
    from diffusers_disback.evaluation.teacher_images import TeacherImages

    evaluation, sampler = Evaluation(["a", "b"]), {"seed": 0, "dtype": "torch.float32"}
    evaluation.size = 4
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    kept = TeacherImages(tmp_path / "x", {"teacher": "1"})
    kept.write(images, 0.5, evaluation, **sampler)
    read, seconds = kept.read(evaluation, **sampler)
    assert torch.equal(read, images) and seconds == 0.5
    assert kept.read(evaluation, **{**sampler, "seed": 1}) is None
    assert kept.read(evaluation, seed=0, dtype="torch.bfloat16") is None
    assert TeacherImages(tmp_path / "x", {"teacher": "2"}).read(evaluation, **sampler) is None
    for name, value in (("prompts", ["a", "c"]), ("size", 8), ("batch_size", 1)):
        other = Evaluation(["a", "b"])
        other.size = 4
        setattr(other, name, value)
        assert kept.read(other, **sampler) is None, name
    kept.write(images[:1], 0.5, evaluation, **sampler)
    assert kept.read(evaluation, **sampler) is None, "of another shape"


def test_progress_is_shown_where_it_is_asked_for(capsys, monkeypatch):
    import diffusers_disback.evaluation as module

    shown, bar = [], module.tqdm
    monkeypatch.setattr(module, "tqdm", lambda **given: shown.append(given) or bar(**given))
    family = family_of(tiny.pipeline())
    for asked in (False, True):
        evaluation = module.Evaluation(tiny.PROMPTS, batch_size=2)
        evaluation.show_progress = asked
        evaluation.add(["drift"])
        images, _ = evaluation.sample(family, family.sampler(), num_inference_steps=1)
        evaluation.prepare(images)
        evaluation.measure(images)
        assert [given["disable"] for given in shown] == [not asked] * 2
        assert [given["total"] for given in shown] == [3, 1]
        shown.clear()
