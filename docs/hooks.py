"""Hooks of mkdocs: links that lead out of docs/, mathematics without scripts, and the pages of the API.

Pages are written for a repository's view of Markdown. On the site, files outside of docs/ that they link to lie under `repository/`.
"""

import html
import os
import posixpath
import re
import sys
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.structure.files import File


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))
_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
_FENCE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
_ROW = re.compile(r"^\| `(\w+)` \| `([\w.]+)` \|", re.MULTILINE)
_TYPE = re.compile(r"<code>`[^<]*</code>")
_MATHS = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files, config):
    """Adds what pages link to outside of docs/, and a page of the API for each room of the package."""
    left = [Path(file.abs_src_path) for file in files.documentation_pages()]
    seen = set(left)
    while left:
        page = left.pop()
        for _, target, _ in _LINK.findall(_FENCE.sub("", _text_of(page))):
            place = (page if page.is_dir() else page.parent) / target
            place = Path(os.path.normpath(place))
            outside = "://" not in target and place.is_relative_to(ROOT) and not place.is_relative_to(ROOT / "docs")
            if not outside or place in seen or not place.exists():
                continue
            seen.add(place)
            uri = _uri(place)
            if place.is_dir():
                files.append(File.generated(config, uri, content=_text_of(place)))
                left.append(place)
            else:
                files.append(File.generated(config, uri, abs_src_path=str(place)))
                left += [place] if place.suffix == ".md" else []
    for room, names in _rooms().items():
        content = "\n\n".join([f"# {room}", *(f"::: diffusers_disback.{module}.{name}" for name, module in names)])
        files.append(File.generated(config, f"reference/{room}.md", content=content))
    return files


def on_config(config):
    """Lists the pages of the API in the navigation."""
    (reference,) = (section["Reference"] for section in config.nav if "Reference" in section)
    reference.append({"Reference of the API": [{room: f"reference/{room}.md"} for room in _rooms()]})
    return config


def on_page_markdown(markdown, page, config, files):
    """Points links to where on the site their files are."""
    uri = page.file.src_uri
    place = ROOT / uri.removeprefix("repository/") if uri.startswith("repository/") else ROOT / "docs" / uri
    if uri.startswith("reference/"):
        return markdown

    def moved(match):
        target = Path(os.path.normpath(place.parent / match[2]))
        if "://" in match[2] or not target.is_relative_to(ROOT):
            return match[0]
        return f"{match[1]}{posixpath.relpath(_uri(target), posixpath.dirname(uri) or '.')}{match[3]}"

    parts = _FENCE.split(markdown)
    markdown = "".join(part if index % 2 else _LINK.sub(moved, part) for index, part in enumerate(parts))
    if uri == "api.md":
        markdown = _ROW.sub(r"| [`\1`][diffusers_disback.\2.\1] | `\2` |", markdown)
    return markdown + _helps() if uri == "commands.md" else markdown


def on_page_content(content, page, config, files):
    """Writes mathematics as MathML, which browsers show without a script, and types of the API without backticks."""
    display = {"span": "inline", "div": "block"}
    content = _TYPE.sub(lambda match: re.sub(r"[`*]", "", match[0]), content)
    return _MATHS.sub(lambda match: convert(html.unescape(match[2]), display=display[match[1]]), content)


def _uri(place: Path) -> str:
    """Where a file of the repository is on the site; of a folder, its list of files."""
    if place.is_relative_to(ROOT / "docs"):
        return place.relative_to(ROOT / "docs").as_posix()
    inner = place.relative_to(ROOT).as_posix()
    return f"repository/{inner}/contents.md" if place.is_dir() else f"repository/{inner}"


def _text_of(place: Path) -> str:
    """A page's text; of a folder, links to the files in it."""
    if not place.is_dir():
        return place.read_text()
    names = sorted(entry.name for entry in place.iterdir() if entry.is_file())
    return "\n".join([f"# {place.relative_to(ROOT)}", "", *(f"* [{name}]({name})" for name in names)])


def _helps() -> str:
    """The help text of every command."""
    from diffusers_disback.commands.cli import parser
    from diffusers_disback.commands.completion import parsers

    texts = [(one.prog, one.format_help()) for one in parsers(parser())]
    return "".join(f"\n\n## {name}\n\n```text\n{text}```\n" for name, text in texts)


def _rooms() -> dict[str, list[tuple[str, str]]]:
    """The public names and their modules by room, as docs/api.md has them."""
    rooms: dict[str, list[tuple[str, str]]] = {}
    for name, module in _ROW.findall((ROOT / "docs" / "api.md").read_text()):
        rooms.setdefault(module.split(".")[0], []).append((name, module))
    return dict(sorted(rooms.items()))
