"""Settings in a file: a YAML mapping of the command line's flags to values. Its scalars are those of YAML 1.2, where `no`
and `off` are texts and 1e-6 is a number."""

import re
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import yaml

from ..hub.files import read_text, write_text
from .settings.fields import Settings, check, groups, kind_of, title, values


SETTINGS = "settings.yaml"
_SCALARS = {
    "null": (r"~|null|Null|NULL|", "~nN", None),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF", lambda text: text.lower() == "true"),
    "int": (r"[-+]?[0-9]+", "-+0123456789", int),
    "float": (r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789", float),
}
_CONVERSIONS = {f"tag:yaml.org,2002:{name}": convert for name, (_, _, convert) in _SCALARS.items() if convert}
_CONVERSIONS["tag:yaml.org,2002:str"] = str


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would take for something else than a text."""


for _name, (_pattern, _first, _) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"(?:{_pattern})$"), list(_first) + [""])


def read_settings(file: str | Path, config: type[Settings]) -> dict[str, Any]:
    """The settings that a file gives.

    Args:
        file (`str` or `Path`): A YAML mapping, UTF-8.
        config (`type[Settings]`): The dataclass that they are of.

    Raises:
        ValueError: If it is none, or names what is no setting, or gives one twice or a value that it does not take.
    """
    try:
        root = yaml.compose(read_text(Path(file)), Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{file} is no valid YAML ({' '.join(str(error).split())}).") from error
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"{file} has to give values to settings, as in `seed: 0`, but it is no mapping.")
    known, given = {one.name: one for one in fields(config)}, {}
    for key, node in _items(root, str(file)):
        what = f"{key} in {file}, line {node.start_mark.line + 1},"
        if key not in known:
            raise ValueError(f"{what} is no setting. --help tells all of them.")
        if key in given:
            raise ValueError(f"{what} is given twice.")
        given[key] = _value(node, known[key], what)
    return given


def _items(node: yaml.MappingNode, what: str) -> list[tuple[str, yaml.Node]]:
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"{what} has a key in line {key.start_mark.line + 1} that is no name.")
    return [(key.value, value) for key, value in node.value]


def _value(node: yaml.Node, one: Field, what: str) -> Any:
    if isinstance(node, yaml.SequenceNode):
        value: Any = [_scalar(item, what) for item in node.value]
    elif isinstance(node, yaml.MappingNode):
        items = _items(node, what)
        value = {key: _scalar(item, f"{key} of {what}") for key, item in items}
        if len(value) < len(items):
            raise ValueError(f"{what} gives a name twice.")
    else:
        value = _scalar(node, what)
    if value is None:
        raise ValueError(f"{what} has no value. Leave it out for its default.")
    check(one, value, what)
    return float(value) if kind_of(one) is float else value


def _scalar(node: yaml.Node, what: str) -> Any:
    """A scalar's value; what is none stands for itself, and no setting takes it."""
    if not isinstance(node, yaml.ScalarNode):
        return node
    if node.tag == "tag:yaml.org,2002:null":
        return None
    if node.tag not in _CONVERSIONS:
        raise ValueError(f"{what} has the tag {node.tag}, which no setting has.")
    try:
        return _CONVERSIONS[node.tag](node.value)
    except ValueError as error:
        raise ValueError(f"{what} cannot be read ({error}).") from error


def write_settings(file: Path, settings: Settings) -> None:
    """Writes down settings as `read_settings` reads them: without secrets, and without where a run was resumed from."""
    current, parts = values(settings), []
    for group, own in groups(type(settings)).items():
        given = {one.name: current[one.name] for one in own if current.get(one.name) is not None}
        given.pop("resume_from_checkpoint", None)
        if given:
            text = yaml.dump(given, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
            parts.append(f"# {title(group)}\n{text}")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, "\n".join(parts))
