"""Imports go downwards only, heavy libraries enter by known doors, and importing the package is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import diffusers_disback


SOURCE = Path(diffusers_disback.__file__).parent
LAYERS = [
    {
        *("files", "ranges", "signals", "truncation", "denoiser", "noise_schedule", "pipeline", "batch"),
        *("target_schedule", "node_spacing"),
    },
    {"weights", "published", "markdown", "lock", "command"},
    {"repository", "manifest"},
    {"pipeline_folder", "checkpoint"},
    {"single_file", "components"},
    {"autoencoder", "teacher_lora"},
    {"score_model", "model_reference", "cards", "condition_cache", "allocations"},
    {"adapters"},
    {"branches"},
    {"sharing"},
    {"generator", "path", "data"},
    {"families", "objectives"},
    {"config"},
    {"run_folder", "learner", "mismatch"},
    {"trainer"},
    {"degradation", "backtracking", "evaluation", "export"},
    {"hub", "plan"},
    {"upload"},
    {"run"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
DOORS = {
    "accelerate": {"learner.py", "trainer.py", "run.py", "evaluation/report.py"},
    "torchmetrics": {"evaluation/distance.py"},
    "matplotlib": {"evaluation/pictures.py"},
    "huggingface_hub": {
        *("repository.py", "branches.py", "pipeline_folder.py", "single_file.py", "autoencoder.py"),
        *("model_reference.py", "cards.py", "hub.py"),
    },
    "datasets": {"data.py"},
    "transformers": {"pipeline.py", "components.py", "evaluation/report.py", "plan.py", "cli.py"},
    "peft": {"model_reference.py", "adapters.py"},
    "bitsandbytes": {"learner.py"},
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


def unit(module: str) -> str | None:
    """The file or folder of the package that a module belongs to; `None` for other libraries and the package itself."""
    parts = module.split(".")
    return parts[1] if parts[0] == "diffusers_disback" and len(parts) > 1 and parts[1] in LEVEL else None


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_go_downwards(file):
    relative = file.relative_to(SOURCE)
    own = relative.parts[0].removesuffix(".py")
    if own == "__init__":
        return
    for module in imports(file):
        used = unit(module)
        if used is not None and used != own:
            assert LEVEL[used] < LEVEL[own], f"{relative} imports {module}, which does not lie below it"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_libraries_enter_by_their_doors(file):
    relative = str(file.relative_to(SOURCE))
    for module in imports(file):
        library = module.split(".")[0]
        assert relative in DOORS.get(library, {relative}), f"{library} has no business in {relative}"


def test_the_travelling_file_stands_alone():
    allowed = {"torch", "diffusers", "transformers", *sys.stdlib_module_names}
    assert {module.split(".")[0] for module in imports(SOURCE / "pipeline.py")} <= allowed


def test_objectives_know_only_score_models():
    for file in (SOURCE / "objectives").glob("*.py"):
        own = {unit(module) for module in imports(file)} - {None, "objectives"}
        assert own <= {"batch", "score_model"}


def test_evaluation_and_hub_see_no_trainer():
    for file in [SOURCE / "hub.py", *(SOURCE / "evaluation").glob("*.py")]:
        assert not {unit(module) for module in imports(file)} & {
            "trainer",
            "degradation",
            "backtracking",
            "objectives",
        }


def test_nothing_is_loaded_leniently_or_unpickled():
    for file in FILES:
        for call in (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            assert name not in ("torch.load", "pickle.load", "pickle.loads"), file
            lenient = any(k.arg == "strict" and ast.unparse(k.value) == "False" for k in call.keywords)
            assert not lenient or name == "zip", f"{file}: {ast.unparse(call)}"


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
