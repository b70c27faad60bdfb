"""The code blocks of the docs. A mark above each says how it is run, or why it is not:

<!-- run -->                                as it stands
<!-- run with: --max_train_steps 2 -->      with these flags at the end of its commands, so that it takes less time
<!-- run by: tests/test_after.py -->        by another test, which reads it from the page
<!-- not run: takes hours -->               and the test that does the same at small size, if there is one
"""

import re
from pathlib import Path
from typing import NamedTuple

import pytest
from test_docs import PAGES, ROOT


FENCE = re.compile(r"((?:^<!-- [^\n]* -->\n)*)^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- (run|run with|run by|not run)(?:: (.+))? -->\n")
OUTPUT = ("text", "json")  # which nobody runs
LANGUAGES = ("bash", "python", "yaml")
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


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
