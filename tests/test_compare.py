import json
import subprocess
import sys

import pytest
import tiny
import torch
from diffusers import LatentConsistencyModelPipeline, LCMScheduler
from PIL import Image

from diffusers_disback.commands.cli import main as command
from diffusers_disback.evaluation import Evaluation, Evaluator, Metric, make_evaluators
from diffusers_disback.evaluation.base import FeatureEvaluator
from diffusers_disback.evaluation.compare import Comparison, Row
from diffusers_disback.evaluation.entries import Entry, HowSampled
from diffusers_disback.evaluation.named import known_evaluators
from diffusers_disback.evaluation.report import Report
from diffusers_disback.families import family_of, load_family
from diffusers_disback.models.reference import ModelReference


class Brightness(FeatureEvaluator):
    """Each image's mean, of 0..scale."""

    metrics = {"brightness": Metric("brightness | mean", "brightness", "higher")}

    def __init__(self, scale=1.0):
        self.scale = scale

    def features(self, images, prompts):
        return self.scale * images.flatten(1).double().mean(1) / 255

    def measure(self, features, groups):
        return {"brightness": features.mean().item()}


# Entries -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, steps, guidance, scheduler, reference",
    [
        ("user/repo", None, None, None, ModelReference("user/repo")),
        ("user/repo@25", 25, None, None, ModelReference("user/repo")),
        ("user/repo@25,guidance=4", 25, 4.0, None, ModelReference("user/repo")),
        ("a folder@1,scheduler=own", 1, None, "own", ModelReference("a folder")),
        ("m,revision=v1.0,variant=fp16", None, None, None, ModelReference("m", "v1.0", "fp16")),
        ("a@b@4,lora=x/y,scheduler=lcm", 4, None, "lcm", ModelReference("a@b", lora="x/y")),
        (".", None, None, None, ModelReference(".")),
    ],
)
def test_entries(text, steps, guidance, scheduler, reference):
    assert Entry.parse(text) == Entry(text, reference, steps, guidance, scheduler)


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "names no model"),
        ("m@", "'' is no number of steps"),
        ("m@x", "'x' is no number of steps"),
        ("m@0", "'0' is no number of steps"),
        ("m@1001", "'1001' is no number of steps"),
        ("m@4,guidance", "'guidance' is no setting"),
        ("m@4,steps=4", "'steps=4' is no setting"),
        ("m@4,guidance=1,guidance=2", "given twice"),
        ("m@4,guidance=nan", "guidance=nan is no guidance scale"),
        ("m@4,guidance=-1", "guidance=-1 is no guidance scale"),
        ("m@4,scheduler=euler", "scheduler=euler is none of own, ddim, lcm"),
    ],
)
def test_what_is_no_entry_is_told(text, said):
    with pytest.raises(ValueError, match=said):
        Entry.parse(text)


# Models of every kind ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory, teacher_folder):
    """A student, a consistency model, a teacher with its scheduler, and a folder of images."""
    folder = tmp_path_factory.mktemp("models")
    family = family_of(tiny.pipeline())
    family.one_step(tiny.unet(seed=1), 399).save_pretrained(folder / "student")
    parts = tiny.pipeline(time_cond_proj_dim=8).components
    parts |= {"scheduler": LCMScheduler.from_config(tiny.scheduler().config)}
    LatentConsistencyModelPipeline(**parts, requires_safety_checker=False).save_pretrained(folder / "consistent")
    distilled = tiny.pipeline()
    distilled.scheduler = parts["scheduler"]
    distilled.save_pretrained(folder / "distilled")
    (folder / "images").mkdir()
    for number, _ in enumerate(tiny.PROMPTS * 2):
        Image.new("RGB", (16, 16), (40 * number, 9, 200)).save(folder / "images" / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def compared(models, teacher_folder, prompts_file):
    """The content of `evaluation.json`, and what was printed."""
    line = ["evaluate", *(str(models / name) for name in ("student", "consistent", "distilled", "images"))]
    line += ["--reference", f"{teacher_folder}@2,guidance=2", "--prompts_file", str(prompts_file), "--batch_size", "3"]
    line += ["--num_images_per_prompt", "2", "--resamples", "20", "--output", str(models / "out")]
    line += ["--evaluators", "drift", "test_compare:Brightness", "--evaluator_args", "scale=2"]
    assert command(line) == 0
    return json.loads((models / "out" / "evaluation.json").read_text())


def test_models_of_every_kind_are_compared(compared, models, teacher_folder):
    teacher = f"{teacher_folder}@2,guidance=2"
    names = [teacher, *(str(models / name) for name in ("student", "consistent", "distilled", "images"))]
    assert list(compared["models"]) == names and compared["reference"] == teacher
    settings = [compared["models"][name]["settings"] for name in names]
    assert [one.get("num_inference_steps") for one in settings] == [2, 1, None, 4, None]
    assert [one.get("guidance_scale") for one in settings] == [2.0, 1.0, None, 1.0, None]
    assert [one.get("scheduler") for one in settings] == ["DDIMScheduler"] * 2 + ["LCMScheduler"] * 2 + [None]
    assert all(len(one["sha256"]) == 64 for one in settings[:4]) and settings[4] == {}
    metrics = {"drift_mean", "drift_std", "drift_saturation", "brightness"}
    assert compared["metrics"].keys() == metrics and compared["metrics"]["brightness"]["direction"] == "higher"
    for name in names:
        found = compared["models"][name]
        assert found["measures"].keys() == metrics
        low, high = found["intervals"]["brightness"]
        assert found["intervals"].keys() == (metrics if name != teacher else {"brightness"})
        assert low < found["measures"]["brightness"] < high
        assert (found["seconds_per_image"] is None) == (name == names[-1])
    assert compared["models"][teacher]["measures"]["drift_mean"] == 0
    drawn = [(40 * number + 9 + 200) / 3 / 255 for number in range(6)]
    of_images = compared["models"][names[-1]]["measures"]["brightness"]
    assert of_images == pytest.approx(2 * sum(drawn) / 6), "an argument of the command line, and images as they are"
    assert compared["num_images"] == 6 and compared["num_prompts"] == 3 and compared["size"] == [16, 16]
    assert compared["versions"]["diffusers_disback"] and compared["dtype"] == "float32"
    assert compared["command"].startswith("diffusers-disback evaluate ")


def test_the_comparison_is_written_down(compared, models):
    page = (models / "out" / "evaluation.md").read_text()
    header, _, *rows = [line for line in page.splitlines() if line.startswith("|")]
    assert "brightness \\| mean ↑" in header and "drift mean → 0" in header and len(rows) == 5
    assert "(teacher)" in rows[0] and [row.count("±") for row in rows] == [1, 4, 4, 4, 4]
    assert compared["command"] in page and "95% interval, over 20 resamples" in page
    with Image.open(models / "out" / "evaluation.png") as image:
        assert image.width > image.height > 300, "five columns, three rows"


def test_measures_are_those_of_training(compared, models, teacher_folder):
    """The report of a run with these prompts, this seed and this batch size."""
    repeated = [prompt for prompt in tiny.PROMPTS for _ in range(2)]
    evaluation = Evaluation(repeated, batch_size=3)
    evaluation.add(["drift"])
    teacher = load_family(str(teacher_folder))
    report = Report(evaluation, tiny.PROMPTS[:1], teacher, 2.0, teacher_steps=2)
    report.add_teacher()
    report.add_student("student", teacher.one_step(tiny.unet(seed=1), 399))
    found = compared["models"][str(models / "student")]["measures"]
    wanted = {name: value for name, value in report.measures["student"].items() if name in found}
    assert len(wanted) == 3 and {name: found[name] for name in wanted} == pytest.approx(wanted, abs=1e-6)
    assert wanted["drift_mean"] > 0.001


def test_folders_of_images_can_bring_the_prompts(models, tmp_path, capsys):
    """In the order of metadata.jsonl, which goes before that of the names."""
    (tmp_path / "images").mkdir()
    for name, level, width in (("a", 0, 16), ("b", 255, 24), ("c", 51, 16)):
        Image.new("RGB", (width, 16), (level,) * 3).save(tmp_path / "images" / f"{name}.png")
    texts = dict(zip("cab", tiny.PROMPTS, strict=True))
    metadata = "".join(json.dumps({"file_name": f"{n}.png", "text": t}) + "\n" for n, t in texts.items())
    (tmp_path / "images" / "metadata.jsonl").write_text(metadata)
    line = ["evaluate", str(tmp_path / "images"), "--evaluators", "test_compare:Brightness", "--resamples", "0"]
    line += ["--output", str(tmp_path / "out")]
    assert command(line) == 2
    assert "are of several sizes, 16 x 16 and 24 x 16 pixels: pass --resolution" in capsys.readouterr().err
    assert command([*line, "--resolution", "16"]) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    (model,) = found["models"].values()
    assert model["measures"]["brightness"] == pytest.approx(0.4) and model["intervals"] == {}
    assert "**" not in capsys.readouterr().out, "of one model none is the best"
    (tmp_path / "prompts.txt").write_text("\n".join([*tiny.PROMPTS[:2], "another"]))
    assert command([*line, "--resolution", "16", "--prompts_file", str(tmp_path / "prompts.txt")]) == 2
    assert "line 3 has the text 'an orange square', but the prompt there is 'another'" in capsys.readouterr().err
    for wrong, said in (
        ({"file_name": "../a.png", "text": "a"}, "names '../a.png', which is no place inside of its folder"),
        ({"file_name": "z.png", "text": "a"}, "names z.png, which is not there"),
        ({"text": "a"}, "names None, which is no file's name"),
        ({"file_name": "a.png", "text": 3}, "line 1 is a int, not a text"),
    ):
        (tmp_path / "images" / "metadata.jsonl").write_text(json.dumps(wrong) + "\n")
        assert command(line) == 2
        assert said in capsys.readouterr().err


# What is refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["{models}/nowhere@2"], "The model '{models}/nowhere' cannot be loaded: it is neither a folder with"),
        (["{models}/student"], "--evaluators drift compare with a teacher: name it, as --reference TEACHER@25"),
        (
            ["{models}/student", "--output", "{models}/student/model_index.json"],
            "student/model_index.json is no folder and cannot be made: {models}/student/model_index.json is a file.",
        ),
        (
            ["{models}/student@4"],
            "is a one-step student, which has its steps, its guidance and its scheduler built in",
        ),
        (["{models}/student", "{models}/student"], "A model is given twice"),
        (["{models}/consistent@1,scheduler=ddim"], "a LatentConsistencyModelPipeline keeps its own scheduler"),
        (["{models}/images@4"], "is a folder of images, which takes no steps and no settings"),
        (["{models}/images"], "has 6 images, but there are 3 prompts of 1 images each"),
        (["{models}/student", "--prompts_file", "{models}/none.txt"], "none.txt cannot be read"),
        (["{models}/student", "--mixed_precision", "fp16"], "fp16 needs a GPU"),
        (["{models}/student", "--evaluators", "taste"], "known evaluators are"),
        (["{models}/student", "--evaluators", "nowhere.at.all:Taste"], "there is no module nowhere to import"),
        (["{models}/student", "--evaluators", "test_compare:Taste"], "test_compare has no Evaluator 'Taste'"),
        (
            ["{models}/student", "--evaluator_args", "salt=1"],
            "--evaluator_args salt: no evaluator that was chosen takes it",
        ),
        (["{models}/student", "--resolution", "17"], "resolution=17 is not divisible by 2"),
    ],
)
def test_what_cannot_be_compared_is_told_in_a_line(arguments, said, models, prompts_file, tmp_path, capsys):
    line = [argument.format(models=models) for argument in arguments]
    line += [] if "--prompts_file" in line else ["--prompts_file", str(prompts_file)]
    line += [] if "--evaluators" in line or "compare with" in said else ["--evaluators", "test_compare:Brightness"]
    line += [] if "--output" in line else ["--output", str(tmp_path / "out")]
    assert command(["evaluate", *line]) == 2
    lines = capsys.readouterr().err.splitlines()
    told = [one for one in lines if one.startswith("diffusers-disback: ")]
    assert "built in" not in said or not any("images (1 of" in one for one in lines), "nothing is sampled before"
    assert len(told) == 1 and said.format(models=models) in told[0]
    assert not (tmp_path / "out").exists()


def test_there_have_to_be_prompts(models, capsys):
    assert command(["evaluate", str(models / "student"), "--evaluators", "test_compare:Brightness"]) == 2
    assert "There are no prompts: name a file with one a line by --prompts_file" in capsys.readouterr().err


def test_pipelines_with_code_of_their_own_are_refused(models, prompts_file, tmp_path, capsys):
    tiny.pipeline().save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / "model_index.json"
    index = json.loads(file.read_text())
    line = ["evaluate", str(tmp_path / "theirs"), "--prompts_file", str(prompts_file)]
    line += ["--evaluators", "test_compare:Brightness"]
    for wanted, said in (
        (["pipeline", "Theirs"], "is no pipeline that diffusers samples from prompts alone"),
        ("StableDiffusionUpscalePipeline", "is no pipeline that diffusers samples from prompts alone"),
        ("os.system", "is no pipeline that diffusers samples from prompts alone"),
    ):
        file.write_text(json.dumps({**index, "_class_name": wanted}))
        assert command(line) == 2
        assert said in capsys.readouterr().err


# Who is best -------------------------------------------------------------------------------------------------------------


class Judged(Evaluator):
    metrics = {
        "high": Metric("high", "p", "higher"),
        "low": Metric("low", "p", "lower"),
        "near": Metric("near", "p", "zero"),
    }
    compares_with_teacher = True


def comparison(rows, half=None):
    evaluation = Evaluation(["a", "b"])
    evaluation.evaluators.append(Judged())
    made = Comparison(evaluation, HowSampled(torch.device("cpu")))
    for name, values in rows.items():
        measures = dict(zip(Judged.metrics, values, strict=True))
        intervals = {} if half is None else {key: (value - half, value + half) for key, value in measures.items()}
        made.rows[name] = Row(measures, intervals, None, {}, [])
    return made


def test_the_best_is_in_bold_where_that_is_certain():
    rows = {"teacher": (9.0, 0.0, 0.0), "one": (3.0, 1.0, -0.5), "two": (2.0, 2.0, 0.6), "three": (1.0, 3.0, 2.0)}
    made = comparison(rows)
    assert [made.best(name) for name in Judged.metrics] == ["teacher"] * 3
    made.reference = "teacher"
    assert [made.best(name) for name in Judged.metrics] == ["one"] * 3
    assert "| one | **3** | **1** | **-0.5** |" in made.table()
    made = comparison(rows, half=0.2)
    made.reference = "teacher"
    assert [made.best(name) for name in Judged.metrics] == ["one", "one", None], "0.5 and 0.6 cannot be told apart"
    assert "| one | **3** ± 0.2 | **1** ± 0.2 | -0.5 ± 0.2 |" in made.table()
    assert [comparison(rows, half=4.0).best(name) for name in Judged.metrics] == [None] * 3
    tie = comparison({"one": (1.0, 1.0, 1.0), "two": (1.0, 1.0, -1.0)})
    assert [tie.best(name) for name in Judged.metrics] == [None] * 3


def test_images_of_another_size_are_told(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    (tmp_path / "small").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "small" / "a.png")
    evaluation = Evaluation(["a"])
    evaluation.evaluators.append(Brightness())
    made = Comparison(evaluation, HowSampled(torch.device("cpu")))
    made.add(Entry.parse(str(tmp_path)).find())
    with pytest.raises(ValueError, match="are of 16 x 16 pixels, those before of 32 x 32: pass --resolution"):
        made.add(Entry.parse(str(tmp_path / "small")).find())
    assert made.rows[str(tmp_path)].intervals == {}, "there is one prompt"


def test_evaluators_of_a_users_own_are_known_by_their_place():
    names = ["drift", "test_compare:Brightness"]
    drift, brightness = make_evaluators(names, {"scale": 3.0}, known=known_evaluators(names))
    assert brightness.scale == 3.0 and type(drift).__name__ == "DriftEvaluator"
    assert all(
        kind.compares_with_teacher == name.endswith("_to_teacher") or name == "drift"
        for name, kind in known_evaluators([]).items()
    )


@pytest.mark.slow
def test_two_processes_find_what_one_does(models, teacher_folder, prompts_file, tmp_path):
    line = ["-m", "diffusers_disback.commands.cli", "evaluate", str(models / "student"), str(models / "distilled")]
    line += ["--reference", f"{teacher_folder}@2", "--prompts_file", str(prompts_file), "--batch_size", "2"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    found = []
    for launcher in ([sys.executable], torchrun):
        done = subprocess.run([*launcher, *line, "--output", str(tmp_path / "out")], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("| model |") == 1
        found.append(json.loads((tmp_path / "out" / "evaluation.json").read_text()))
    assert [one["num_processes"] for one in found] == [1, 2]
    one, two = ({name: row["measures"] for name, row in content["models"].items()} for content in found)
    assert one == two


class Apart(Brightness):
    """How far the mean brightness is from the teacher's."""

    metrics = {"apart": Metric("apart", "apart", "lower")}
    compares_with_teacher = compares_distributions = True

    def compare_with(self, features):
        self.reference = features.mean()

    def measure(self, features, groups):
        return {"apart": (features.mean() - self.reference).abs().item()}


def test_distributions_are_compared_with_other_images_of_a_teacher_that_is_loaded_once(
    teacher_folder, models, monkeypatch
):
    loaded = []
    monkeypatch.setattr(
        "diffusers_disback.evaluation.entries.load_family", lambda model: loaded.append(model) or load_family(model)
    )
    evaluation = Evaluation(["a", "b"], batch_size=2)
    evaluation.evaluators.append(Apart())
    made = Comparison(evaluation, HowSampled(torch.device("cpu")), resamples=20)
    made.add(Entry.parse(f"{teacher_folder}@2").find(), is_reference=True)
    (row,) = made.rows.values()
    assert row.measures["apart"] > 0 and "apart" in row.intervals and len(loaded) == 1
    with_folder = Evaluation(["a", "b", "c", "a", "b", "c"])
    with_folder.evaluators.append(Apart())
    made = Comparison(with_folder, HowSampled(torch.device("cpu")), resamples=20)
    made.add(Entry.parse(str(models / "images")).find(), is_reference=True)
    (row,) = made.rows.values()
    assert row.measures["apart"] == 0 and row.intervals == {} and made.best("apart") is None, "it has no other images"
