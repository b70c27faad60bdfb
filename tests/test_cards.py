"""Cards are pages whose structure is the template's: what others wrote stands in them as a value, whatever it holds."""

import ast
import json
import shlex
from collections import Counter
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from diffusers_disback.hub.cards import STABLE_DIFFUSION, path_card, student_card
from diffusers_disback.hub.files import printable
from diffusers_disback.hub.markdown import LONGEST, address, fenced, inline_code, link, python, shell, table, text
from diffusers_disback.hub.published import published


ROOT = Path(__file__).parents[1]
REPORT = json.loads((ROOT / "docs" / "quickstart_report.json").read_text())
HARMLESS = "harmless"
HOSTILE = [
    "a\n---\nlicense: mit\n---\nb",
    "...\n---\n",
    "```\n# Heading\n```",
    "~~~\ncode\n~~~",
    "`` ` ````",
    "`",
    " padded` ",
    "\"quoted\" and 'quoted' \\",
    '"""',
    "'''",
    "{{ 7*7 }} {% for x in range(3) %}{{ card_data }}{% endfor %} {# c #}",
    "{% endcall %}",
    "<script>alert(1)</script><img src=x onerror=y><!-- <details>",
    "</details></summary>",
    "![p](http://x/p.png) [l](javascript:alert(1)) <http://evil.example> <a@b.example>",
    "[r]: http://x.example\n\n[r]",
    "| a | b |\n| --- | --- |\n| c | d |",
    "\\| a \\\\| b",
    "# heading",
    "- item",
    "1. item",
    "> quote",
    "===",
    "---",
    "***",
    "    indented\n\n    code",
    "\tindented",
    "*em* _em_ **b** ~~s~~ __b__ &lt; &#60; &copy; &amp;",
    "line  \nbreak\\\nbreak\r\nbreak\rbreak",
    "\x1b[31mred\x1b[0m\x07\x00\x9b\x7f\x85",
    "\x1b]8;;http://evil.example\x07link\x1b]8;;\x07",
    "\u202egpj.exe\u2066\u200b\u2028\u2029\ufeff",
    "\ud800",
    "; rm -rf x; $(touch x) `id` && x > y | z & $HOME !!",
    "--flag",
    "!!python/object/apply:os.system ['x']",
    "*alias",
    "&anchor x",
    "%YAML 1.1",
    "key: value",
    "? x",
    "- a\n- b",
    "null",
    " ",
    "水彩 \U0001f600",
    "a" * 20_000,
    "<" * 3_000,
    "`" * 3_000,
]
# Whole cards take a while to make: they are given several at once, each of which begins a value and a line of it once.
SHORT = [value for value in HOSTILE if len(value) < 200]
AT_ONCE = ["\n".join(SHORT[place::6]) for place in range(6)] + [" ", "a" * 20_000]


def parse(page: str) -> list:
    """Its blocks and what is in them, by a parser of CommonMark with tables and strikethrough."""
    return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(page)


def skeleton(page: str) -> list[str]:
    """Everything of a page but for words."""
    kinds = []
    for token in parse(page):
        kinds.append(f"{token.type} {token.tag} {token.info}")
        kinds += [f"{c.type} {c.attrs}" for c in token.children or [] if c.type not in ("text", "text_special")]
    return kinds


def blocks(page: str, language: str) -> list[str]:
    return [token.content for token in parse(page) if token.type == "fence" and token.info == language]


def codes(page: str) -> list[str]:
    """All code within lines."""
    return [c.content for token in parse(page) for c in token.children or [] if c.type == "code_inline"]


def constants(snippets: list[str]) -> Counter:
    """The texts in programs."""
    nodes = [node for snippet in snippets for node in ast.walk(ast.parse(snippet))]
    return Counter(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


def front_matter(card: str) -> tuple[dict, str]:
    """A card's metadata, by any reader of YAML, and its page; the Hub's own reader has to agree."""
    head, _, page = card.removeprefix("---\n").partition("\n---\n")
    data = yaml.safe_load(head)
    assert list(yaml.safe_load_all(head)) == [data]
    own = ModelCard(card)
    assert own.text == page and own.data.to_dict().keys() >= data.keys() - {"model-index"}
    return data, page


# Each place by itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["{}", "words {} words", "# {}", "- {}", "| a |\n| --- |\n| {} |", "**b** ({}): {}"])
def test_words_and_code_are_nothing_else(form):
    for value in [*HOSTILE, "1)", "+ x", "~~~", "_a_ b_c __d", "a_b_c", "!", "![", "](x)", "$x$", "\\", "a\\"]:
        shown = " ".join(printable(value)[:LONGEST].split())
        page = form.replace("{}", text(value))
        assert skeleton(page) == skeleton(form.replace("{}", "x" if shown else "")), value
        page = form.replace("{}", text(value), 1).replace("{}", "x")
        if shown and form != "{}":
            words = "".join(
                c.content for token in parse(page) for c in token.children or [] if c.type.startswith("text")
            )
            assert shown in words, value
        if "|" in value and "|" in form:
            continue  # code with a bar in it is not put in cells
        page = form.replace("{}", inline_code(value))
        assert skeleton(page) == skeleton(form.replace("{}", "`x`")), value
        assert not printable(value).strip() or printable(value)[:LONGEST] in codes(page)[0], value


def test_a_fence_is_longer_than_what_it_holds():
    for value in HOSTILE:
        page = fenced("text", f"x {value}\n{value}")
        (token,) = parse(page.encode(errors="replace").decode())
        assert token.type == "fence" and token.info == "text"


def test_links_lead_to_the_web_or_nowhere():
    for target in [
        "javascript:alert(1)", "JAVASCRIPT:alert(1)", " javascript:alert(1)", "java\nscript:x", "data:text/html,x",
        "vbscript:x", "file:///etc/passwd", "//evil.example", "/etc/passwd", "../x", "ftp://x", "http:", "https://", "x y",
        "http://x\x1b", "http://\u202ex", "http://[", "mailto:x@y", "LICENSE](javascript:x)", "LICENSE/../x", "", None, 3,
        ["http://x"], "http://" + "x" * 2000,
    ]:  # fmt: skip
        assert address(target) is None, target
        assert "link_open" not in "".join(skeleton(link("text", target))), target
    for target, place in {
        "https://x.example/a?b=1&copy=2#c": "https://x.example/a?b=1&copy=2#c",
        "https://x.example/(a)": "https://x.example/%28a%29",
        'http://x/"><script>': "http://x/%22%3E%3Cscript%3E",
        "http://x/a|b`c\\*d": "http://x/a%7Cb%60c%5C%2Ad",
        "http://x/水": "http://x/%E6%B0%B4",
        "LICENSE.md": "LICENSE.md",
        "licence": "licence",
    }.items():
        (paragraph, inline, _) = parse(link("text", target))
        opened, words, closed = inline.children
        assert (opened.attrs["href"], words.content, closed.type) == (place, "text", "link_close"), target


def test_literals_and_arguments_are_what_they_were():
    for value in HOSTILE:
        assert ast.literal_eval(python(value)) == value and "\n" not in python(value)
        assert printable(python(value)) == python(value)
        assert shlex.split(shell(["a", value])) == ["a", printable(value)] and "\n" not in shell([value])
    assert python("it's") == '"it\'s"' and python("plain") == '"plain"' and python(None) == "None"


def test_a_table_keeps_its_columns():
    for value in HOSTILE:
        page = table({value: {value: 1.0, "b": value}, "c": {"b": 2}})
        assert skeleton(page) == skeleton(table({"x": {"y": 1.0, "b": "z"}, "c": {"b": 2}})), value


# Whole cards ---------------------------------------------------------------------------------------------------------


def student(value: str) -> str:
    """A student's card in which all that can be another's is one value."""
    flags = ["--pretrained_model_name_or_path", value, "--validation_prompts", value, f"--teacher_lora={value}"]
    metrics = {name: {"label": value, "panel": value, "direction": "lower"} for name in ("distance", f"x{value}")}
    report = {
        **REPORT,
        "example_prompt": value,
        "evaluation": {**REPORT["evaluation"], "name": value, "type": value, "metrics": metrics},
        "behind": {"teacher": ["distance"]},
        "teacher_card": {"license": value, "license_name": value, "license_link": "x:" + value, "base_model": value},
        "lora": {"rank": 4},
        "path": {**REPORT["path"], "repo_id": "alice/path", "commit": value},
        "versions": {**REPORT["versions"], value: value, "diffusers_disback": value},
        "machine": {"device": value, value: value},
        "command": shlex.join(["accelerate", *flags]),
        "settings": {
            **REPORT["settings"],
            "pretrained_model_name_or_path": value,
            "revision": value,
            "variant": value,
            "prompts_file": value,
            "validation_prompts": [value, value],
            f"x{value}": value,
        },
    }
    report["student"] = {**REPORT["student"], f"x{value}": 1.0}
    return student_card(report, value, value, True, STABLE_DIFFUSION)


def test_a_students_card_is_its_template_whatever_others_wrote():
    data, page = front_matter(student(HARMLESS))
    expected, snippets = skeleton(page), constants(blocks(page, "python"))
    assert snippets[HARMLESS] == 12 and HARMLESS in codes(page)
    for value in AT_ONCE:
        given, page = front_matter(student(value))
        assert given.keys() == data.keys(), value
        assert given["license"] == given["license_name"] == given["base_model"] == value
        assert "license_link" not in given, "it leads nowhere"
        (named,) = given["model-index"]
        dataset = named["results"][0]["dataset"]
        assert named["name"] == dataset["name"] == dataset["type"] == value
        assert printable(page.replace("\n", "")) == page.replace("\n", ""), value
        assert skeleton(page) == expected, value
        told = published(value)  # where it is a place
        found = constants(blocks(page, "python"))
        assert found[value] >= 9 and found[value] + (found[told] if told != value else 0) == 12, value
        (line,) = blocks(page, "bash")
        wanted = ["--pretrained_model_name_or_path", told, "--validation_prompts", value, f"--teacher_lora={told}"]
        assert shlex.split(line) == list(map(printable, ["accelerate", *wanted])), value


def test_a_paths_card_is_its_template_whatever_others_wrote():
    nodes = [{**node, "branch": node["name"], "commit": "0" * 40} for node in REPORT["path"]["nodes"]]

    def card(value: str, kind: str = "full") -> str:
        place = dict.fromkeys(("name_or_path", "variant", "vae", "lora", "single_file_config", "commit"), value)
        manifest = {
            "teacher": {**place, "revision": value, "sha256": value, "prediction_type": None},
            "generator": {"name_or_path": value, "sha256": "0", "conditioning_timestep": 399},
            "recording": {"seed": value, f"x{value}": [value]},
            "nodes": [{**node, "kind": kind, "loss": value} for node in nodes],
        }
        licence = {"license": value, "license_link": value, "base_model": [value, value]}
        return path_card(manifest, "alice/path", licence, True, STABLE_DIFFUSION)

    for kind in ("full", "adapter"):
        data, page = front_matter(card(HARMLESS, kind))
        expected = skeleton(page)
        for value in AT_ONCE:
            given, page = front_matter(card(value, kind))
            assert given.keys() == data.keys() and given["license"] == value, value
            assert given["base_model"] == [value, value]
            assert skeleton(page) == expected and printable(page.replace("\n", "")) == page.replace("\n", ""), value
            launch, others = blocks(page, "bash")
            told = printable(published(value))
            flags = ["--pretrained_model_name_or_path", told, "--variant", told]
            flags += [
                "--pretrained_vae_model_name_or_path",
                told,
                "--teacher_lora",
                told,
                "--single_file_config",
                told,
            ]
            assert shlex.split(launch.replace("\\\n", ""))[3:13] == flags, value
            assert shlex.split(others)[:4] == ["diffusers-disback", "path", "show", "alice/path"]
            found = constants(blocks(page, "python"))
            assert kind == "full" or found[published(value)] == 1, value


def test_a_card_links_to_licences_alone():
    report = {**REPORT, "teacher_card": {"license": ["mit", "openrail"], "license_link": "https://x.example/<l>"}}
    data, page = front_matter(student_card(report, "x", "alice/x", False, STABLE_DIFFUSION))
    assert data["license"] == ["mit", "openrail"] and data["license_link"] == "https://x.example/<l>"
    assert "the licence `mit` and `openrail` ([text](https://x.example/%3Cl%3E))" in page
    report["teacher_card"] = {"license": "other", "license_link": "javascript:alert(1)"}
    data, page = front_matter(student_card(report, "x", "alice/x", False, STABLE_DIFFUSION))
    assert "license_link" not in data and "`other` (text `javascript:alert(1)`)" in page


def test_a_report_that_is_none_makes_no_card():
    for change in ({"settings": None}, {"resolution": "64): pass\nimport os"}, {"student": [1]}, {"command": "a 'b"}):
        with pytest.raises(ValueError, match=r"report.json|has to be a whole number"):
            student_card({**REPORT, "command": "x", **change}, "x", "alice/x", False, STABLE_DIFFUSION)
    settings = {**REPORT["settings"], "conditioning_timestep": "1\nimport os"}
    with pytest.raises(ValueError, match="conditioning_timestep has to be a whole number, but is '1"):
        student_card({**REPORT, "settings": settings}, "x", "alice/x", False, STABLE_DIFFUSION)


def test_a_template_without_a_value_is_no_card():
    for name in ("example_prompt", "resolution", "machine", "stages"):
        report = {key: value for key, value in {**REPORT, "command": "x"}.items() if key != name}
        with pytest.raises(ValueError, match=rf"No card can be made of this report.json: .*{name}|{name} has to be"):
            student_card(report, "x", "alice/x", False, STABLE_DIFFUSION)


def test_the_wheel_holds_the_templates():
    package, tree = ROOT / "src" / "diffusers_disback", ast.parse((ROOT / "setup.py").read_text())
    (globs,) = (node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "package_data")
    packed = {file for glob in ast.literal_eval(globs)[""] for file in package.glob(f"**/{glob}")}
    assert packed == set(package.rglob("*.md")) and {"student.md", "path.md"} <= {file.name for file in packed}
