"""The code blocks of the docs, and the notebook. A mark above each says how it is run, or why it is not:

<!-- run -->                                as it stands
<!-- run with: --max_train_steps 2 -->      with these flags at the end of its commands, so that it takes less time
<!-- run by: tests/test_after.py -->        by another test, which reads it from the page
<!-- not run: takes hours -->               and the test that does the same at small size, if there is one
"""

import ast
import json
import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import docs_place
import pytest
from docs_commands import Commands
from test_docs import PAGES, ROOT

from diffusers_disback.commands.command_line import read_flags
from diffusers_disback.training.config import DisBackConfig


FENCE = re.compile(r"((?:^<!-- [^\n]* -->\n)*)^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- (run|run with|run by|not run)(?:: (.+))? -->\n")
OUTPUT = ("text", "json")  # which nobody runs
LANGUAGES = ("bash", "python", "yaml")
FLAGS_GO_TO = (("accelerate",), ("diffusers-disback", "python"))  # the first of these that a snippet has
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
SCRIPT = "examples/text_to_image/train_disback.py"


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


class Snippet(NamedTuple):
    """A block of code: its language, its text, and the mark above it, `how` with `what` behind the colon."""

    language: str
    text: str
    how: str
    what: str


def snippets(page: Path) -> list[Snippet]:
    """Those of a page that are code.

    Raises:
        ValueError: If one has no mark, or none of those that there are.
    """
    found = []
    for marks, language, text in FENCE.findall(page.read_text()):
        mark = MARK.fullmatch(marks)
        if language in OUTPUT and not marks:
            continue
        if mark is None or (mark[2] is None) != (mark[1] == "run") or language not in LANGUAGES:
            raise ValueError(f"{page}: nothing says how this is run, or why it is not:\n{marks}```{language}\n{text}")
        found.append(Snippet(language, text, mark[1], mark[2] or ""))
    return found


RUN = [page for page in PAGES if re.search(r"^<!-- run(?: with: .+)? -->$", page.read_text(), re.MULTILINE)]


@every_page
def test_every_block_of_code_is_run_or_says_why_not(page):
    text = page.read_text()
    lines = re.findall(r"^\s*(?:```|~~~)", text, re.MULTILINE)
    assert len(lines) == 2 * len(FENCE.findall(text)), "a block is not read"
    for snippet in snippets(page):
        named = re.findall(r"tests/[\w/]+\.py", snippet.what)
        assert all((ROOT / name).is_file() for name in named), named
        if snippet.how == "run by":
            assert named == [snippet.what]


@pytest.mark.parametrize(
    "text",
    [
        "```bash\nls\n```\n",
        "<!-- run -->\n\n```bash\nls\n```\n",
        "<!-- not run -->\n```bash\nls\n```\n",
        "<!-- run: ls -->\n```bash\nls\n```\n",
        "<!-- run -->\n```\nls\n```\n",
        "<!-- runs -->\n```bash\nls\n```\n",
        "```text\nls\n```\n\n```python\nls\n```\n",
    ],
)
def test_a_block_without_a_mark_is_found(text, tmp_path):
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(ValueError, match="nothing says how"):
        snippets(tmp_path / "page.md")


def run(number: int, snippet: Snippet) -> None:
    """Runs a snippet in the current folder. What one exports, the next ones have."""
    suffix = {"bash": "sh", "python": "py", "yaml": "yaml"}[snippet.language]
    file, exported = Path(f"snippet-{number}.{suffix}").absolute(), Path("exported.sh").absolute()
    file.write_text(snippet.text)
    script = [f"[ ! -e {exported} ] || source {exported}", f"cd {Path.cwd()}"]
    if snippet.language == "bash":
        for tools in FLAGS_GO_TO:
            if re.search(rf"^\s*({'|'.join(tools)}) ", snippet.text, re.MULTILINE):
                script += [f'{tool}() {{ command {tool} "$@" {snippet.what}; }}' for tool in tools]
                break
        script += [f"source {file}", f"export -p > {exported}"]
    elif snippet.language == "python":
        script.append(f"python {Path(__file__).with_name('docs_python.py')} {file} {snippet.what}")
    else:
        script.append(f"accelerate launch {SCRIPT} --config {file} {snippet.what}")
    with open("output.txt", "w+") as output:
        command = ["bash", "-euo", "pipefail", "-c", "\n".join(script)]
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, timeout=600)
        output.seek(0)
        assert done.returncode == 0, f"{snippet.text}\n{output.read()[-5000:]}"


@pytest.fixture
def run_all(tmp_path, hub, monkeypatch):
    """Runs the snippets of a page in order, in a folder with what they name, as a user of the Hub who is logged in."""

    def run_all(page: Path, shown: list[Snippet]) -> None:
        (tmp_path / "place").mkdir()
        monkeypatch.chdir(tmp_path / "place")
        docs_place.lay_out(name_of(page), "".join(snippet.text for snippet in shown), hub)
        own = {
            "HF_HOME": str(tmp_path / "cache"),
            "HF_TOKEN": hub.add_user("user"),
            "HOME": str(tmp_path / "home"),
            "PATH": os.pathsep.join([str(tmp_path / "commands"), os.environ["PATH"]]),
            "PYTHONPATH": str(ROOT / "src"),
        }
        for name, value in own.items():
            monkeypatch.setenv(name, value)
        with Commands(tmp_path / "commands"):
            for number, snippet in enumerate(shown):
                run(number, snippet)

    return run_all


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=name_of)
def test_what_a_page_shows_runs(page, run_all):
    run_all(page, [snippet for snippet in snippets(page) if snippet.how in ("run", "run with")])


@pytest.mark.slow
@pytest.mark.parametrize(
    "snippet, told",
    [
        (Snippet("bash", "diffusers-disback info nowhere\necho $?\n", "run", ""), "nowhere"),
        (Snippet("bash", "cat nowhere | wc\n", "run", ""), "No such file"),
        (Snippet("python", "raise ValueError('said')\n", "run", ""), "ValueError: said"),
        (Snippet("yaml", "seeds: 1\n", "run", ""), "seeds"),
    ],
)
def test_a_snippet_that_fails_is_told(snippet, told, run_all):
    with pytest.raises(AssertionError, match=told):
        run_all(ROOT / "README.md", [snippet])


# The notebook ------------------------------------------------------------------------------------------------------------


def cells() -> list[tuple[str, list[str]]]:
    """Code and tags of the notebook's cells of code, none of which has an output."""
    found = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in found), "outputs are of one's own run"
    return [("".join(cell["source"]), cell["metadata"].get("tags", [])) for cell in found]


def test_the_notebook_has_the_settings_of_the_quickstart():
    (code,) = (code for code, _ in cells() if "quickstart = {" in code)
    wanted = read_flags(DisBackConfig, (NOTEBOOK.parent / "text_to_image/shapes/quickstart.args").read_text().split())
    assert ast.literal_eval(re.search(r"quickstart = (\{.*?^\})", code, re.MULTILINE | re.DOTALL)[1]) == wanted


@pytest.mark.slow
def test_the_notebook_runs(run_all):
    """With other parameters, in one process."""
    settings = {"max_train_steps": 4, "degradation_steps": 3, "steps_per_target": 1, "train_batch_size": 2}
    others = f"\nsettings, num_images = {settings | {'validation_steps': 4}}, 70"
    code = "\n\n".join(code + others * ("parameters" in tags) for code, tags in cells())
    assert code.count(others) == 1
    run_all(NOTEBOOK, [Snippet("python", code, "run", "")])
    assert Path("outputs", "notebook", "model_index.json").is_file()
