"""Imports go downwards only, heavy libraries enter by known doors, and importing the package is light."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import diffusers_disback


SOURCE = Path(diffusers_disback.__file__).parent
FLOORS = [
    {"hub", "pipelines", "training.signals", "training.settings"},
    {"models", "hub.published", "evaluation.base"},
    {"data", "objectives", "hub.cards"},
    {"families"},
    {"path"},
    {"training", "evaluation"},
    {"hub.publish", "degradation", "backtracking", "planning"},
    {"session", "commands"},
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
# Within a room, from the bottom up.
ORDER = {
    "hub": [{"files", "errors"}, {"markdown"}, {"repository"}],
    "models": [
        {"batch", "noise_schedule"},
        {"edm_schedule", "flow_schedule", "weights", "score_model", "timestep_sampling"},
        {"discriminator"},
        {"pipeline_folder", "generator", "card"},
        {"model_files", "components", "adm_layout"},
        {"original_layout"},
        {"single_file"},
        {"autoencoder", "flat_layout", "teacher_lora"},
        {"reference"},
        {"adapters"},
        {"casting", "lora_layouts"},
    ],
    "data": [{"truncation", "cache", "prompts"}, {"captions", "conditions"}, {"images"}],
    "path": [{"manifest", "node_spacing", "target_schedule"}, {"storage"}, {"sharing", "nodes"}, {"path"}],
    "families": [
        {"base", "latents", "other"},
        {"text", "checks", "transformer"},
        {"dit", "flow", "pixart", "pixels", "stable_diffusion"},
        {"edm", "sana", "stable_diffusion_3", "stable_diffusion_xl"},
        {"__init__"},
    ],
    "training": [
        {"lock", "checkpoint", "processes", "alarms"},
        {"config", "settings_file", "results", "sharding"},
        {"run_folder", "networks", "optim", "probe"},
        {"defaults"},
        {"learner", "checks", "open_path"},
        {"inputs", "discriminator", "best_student", "sharded_learner"},
        {"validation"},
        {"scores", "stage"},
    ],
    "training.settings": [{"fields"}, {"groups"}],
    "objectives": [{"base", "adversarial"}, {"score_identity", "variational"}, {"f_divergence"}, {"__init__"}],
    "evaluation": [
        {"report_format", "preprocessing", "feature_distance", "sampling"},
        {"networks", "bootstrap"},
        {"distance", "distributions", "drift", "plots", "scores"},
        {"__init__"},
        {"teacher_images"},
        {"report"},
        {"sweep", "entries", "named"},
        {"compare"},
    ],
    "hub.publish": [{"export", "space", "student"}, {"run"}, {"background", "results"}],
    "planning": [{"allocations"}, {"plan"}, {"verdict"}],
    "commands": [
        {"command_line"},
        {"options"},
        {"completion", "convert_edm", "demo", "evaluate", "exports", "hub", "info", "path", "plan", "sweep"},
        {"cli"},
    ],
}
DOORS = {
    "accelerate": {
        "training/learner.py",
        "training/networks.py",
        "training/processes.py",
        "training/sharding.py",
        "training/stage.py",
        "training/checks.py",
        "training/inputs.py",
        "training/open_path.py",
        "hub/publish/results.py",
        "evaluation/__init__.py",
        "evaluation/sampling.py",
        "evaluation/entries.py",
        "evaluation/report.py",
        "evaluation/compare.py",
        "session.py",
    },
    "torchmetrics": {"evaluation/distance.py"},
    "matplotlib": {"evaluation/plots.py"},
    "huggingface_hub": {
        *("hub/repository.py", "hub/errors.py", "hub/cards.py", "hub/publish/run.py", "hub/publish/space.py"),
        "path/storage.py",
        *("models/pipeline_folder.py", "models/single_file.py", "models/model_files.py"),
    },
    "datasets": {"data/captions.py", "session.py"},
    "transformers": {"pipelines/one_step.py", "models/components.py", "planning/plan.py", "evaluation/networks.py"},
    "peft": {"models/weights.py", "models/adapters.py"},
    "bitsandbytes": {"training/optim.py"},
    "gradio": {"commands/demo/app.py"},
}
FILES = sorted(SOURCE.rglob("*.py"))


def imports(file: Path) -> list[str]:
    """Absolute names of the modules that a file imports."""
    package = ["diffusers_disback", *file.relative_to(SOURCE).parent.parts]
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names += [module] if node.module else [f"{module}.{alias.name}" for alias in node.names]
    return names


def place(module: str) -> tuple[str, str] | None:
    """The room of a module and its name in that room; `None` for other libraries and the package itself."""
    package, *parts = module.split(".")
    if package != "diffusers_disback" or not parts:
        return None
    known = [n for n in range(1, len(parts) + 1) if ".".join(parts[:n]) in FLOOR]
    return (".".join(parts[: known[-1]]), (parts[known[-1] :] or ["__init__"])[0]) if known else None


def room(module: str) -> str | None:
    """The room of a module."""
    found = place(module)
    return found and found[0]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_go_downwards(file):
    relative = file.relative_to(SOURCE)
    own = place(".".join(["diffusers_disback", *relative.with_suffix("").parts]).removesuffix(".__init__"))
    if str(relative) == "__init__.py":
        return
    assert own is not None, f"{relative} has no floor"
    order = {name: level for level, names in enumerate(ORDER.get(own[0], [])) for name in names}
    assert own[1] in order or own[0] not in ORDER or not ast.parse(file.read_text()).body[1:], (
        f"{relative} has no order"
    )
    for module in imports(file):
        used = place(module)
        if used is None or used == own:
            continue
        if used[0] == own[0]:
            below = order.get(used[1], order.get("__init__"))  # a name that the room itself defines
            assert below < order[own[1]], f"{relative} imports {module}, which does not lie below it"
        else:
            assert FLOOR[used[0]] < FLOOR[own[0]], f"{relative} imports {module}, which does not lie below it"


def test_there_are_few_rooms_and_floors():
    entries = [entry for entry in SOURCE.iterdir() if entry.name != "__pycache__"]
    assert len(entries) <= 16
    assert len(FLOORS) <= 8


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_libraries_enter_by_their_doors(file):
    relative = str(file.relative_to(SOURCE))
    for module in imports(file):
        library = module.split(".")[0]
        assert relative in DOORS.get(library, {relative}), f"{library} has no business in {relative}"


@pytest.mark.parametrize("file", (SOURCE / "pipelines").glob("one_step*.py"), ids=lambda file: file.stem)
def test_a_travelling_file_stands_alone(file):
    allowed = {"torch", "diffusers", "transformers", *sys.stdlib_module_names}
    assert {module.split(".")[0] for module in imports(file)} <= allowed


def test_objectives_know_only_score_models():
    for file in (SOURCE / "objectives").glob("*.py"):
        own = [place(module) for module in imports(file) if place(module) is not None]
        models = {("models", name) for name in ("batch", "score_model", "timestep_sampling")}
        assert set(own) <= models | {p for p in own if p[0] == "objectives"}


def test_evaluation_and_hub_see_no_trainer():
    for folder in ("evaluation", "hub"):
        for file in (SOURCE / folder).rglob("*.py"):
            used = {place(module) for module in imports(file)} - {None}
            assert not {room for room, _ in used} & {"degradation", "backtracking", "objectives"}
            assert ("training", "stage") not in used


def test_nothing_is_loaded_leniently_or_unpickled():
    for file in FILES:
        for call in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            tensors_alone = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords)
            by_its_door = file == SOURCE / "models/adm_layout.py" and tensors_alone
            assert name not in ("torch.load", "pickle.load", "pickle.loads") or by_its_door, file
            lenient = any(k.arg == "strict" and ast.unparse(k.value) == "False" for k in call.keywords)
            assert not lenient or name == "zip", f"{file}: {ast.unparse(call)}"


# Components and classes of pipelines are named by families; elsewhere only for these reasons.
COMPONENT = re.compile(
    r"(unet|transformer|vae|(text_encoder|tokenizer)(_\d)?)(/.*|\..*)?|(UNet|Autoencoder|StableDiffusion)\w*"
)
NAMES_PARTS = {
    "models/pipeline_folder.py": "which classes of others' folders may be loaded in which place",
    "models/components.py": "which parts of others' folders have no weights, and how safety checkers are loaded",
    "models/adm_layout.py": "a checkpoint of ADM's layout is a UNet",
    "models/original_layout.py": "a checkpoint in one file is of Stable Diffusion's layout",
    "models/single_file.py": "a checkpoint in one file is of Stable Diffusion's layout",
    "models/flat_layout.py": "a layout without components' folders, which UNets alone were kept in",
    "models/autoencoder.py": "another autoencoder is read",
    "models/teacher_lora.py": "layouts of LoRAs for Stable Diffusion's UNets",
    "models/lora_layouts.py": "kohya's layout of a LoRA is of UNets",
    "models/reference.py": "another autoencoder takes the place of a model's own, and messages call a unet a UNet",
    "path/path.py": "another autoencoder, as path.json tells it",
    "path/sharing.py": "another autoencoder, which may be private",
    "path/manifest.py": "format 1, and another autoencoder",
    "hub/published.py": "reports and paths of before the component was told",
    "hub/cards.py": "the words on Stable Diffusion",
    "hub/publish/run.py": "another autoencoder, as settings tell it",
    "hub/publish/export.py": "a LoRA is of a UNet, if nothing else is said",
    "evaluation/entries.py": "another autoencoder takes the place of a model's own",
    "evaluation/networks.py": "a CLIP that scores images has a tokenizer",
    "commands/exports.py": "which denoiser a LoRA is extracted from",
    "training/settings/groups.py": "a setting is the autoencoder's",
}


def parts_named(file: Path) -> set[str]:
    """The components and classes of pipelines that a file names in code, docstrings apart."""
    tree = ast.parse(file.read_text())
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    words = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            words.add(node.attr)
        elif isinstance(node, ast.Name) and node.id[:1].isupper():
            words.add(node.id)
        elif isinstance(node, ast.alias):
            words.add(node.name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            words.add(node.value)
    return {word for word in words if COMPONENT.fullmatch(word)}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_families_alone_know_what_a_pipeline_is_made_of(file):
    relative = file.relative_to(SOURCE)
    if relative.parts[0] in ("families", "pipelines"):
        return
    named = parts_named(file)
    assert bool(named) == (str(relative) in NAMES_PARTS), f"{relative} names {sorted(named)}"
    calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
    asked = [ast.unparse(call) for call in calls if ast.unparse(call.func) == "isinstance"]
    assert not [call for call in asked if re.search(r"[Pp]ipeline", call)], asked


def modules_after(statement: str) -> set[str]:
    program = f"{statement}; import sys; print(*sys.modules)"
    return set(
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout.split()
    )


def test_importing_the_package_is_light():
    with_, without = modules_after("import diffusers_disback"), modules_after("import diffusers")
    assert not any(name.startswith("diffusers.pipelines.") for name in with_)
    extra = {name.split(".")[0] for name in with_ - without} - set(sys.stdlib_module_names)
    assert extra == {"diffusers_disback"}


def test_every_public_name_can_be_had():
    for name in diffusers_disback.__all__:
        assert getattr(diffusers_disback, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        diffusers_disback.nothing  # noqa: B018


def test_every_public_name_has_a_docstring():
    for name in diffusers_disback.__all__:
        thing = getattr(diffusers_disback, name)
        if callable(thing):
            assert thing.__doc__ and not thing.__doc__.startswith(f"{name}("), name
