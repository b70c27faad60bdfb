"""Files of others, mutated in bytes and in structure, before the public functions that read them.

    python tests/reliability/fuzz.py --cases 10000 --seed 0

Whatever stands in a file, a reader returns, or raises a `ValueError`. A network that was to be filled is then as it was; no file
outside of the folder is opened or made (a planted secret is watched by the kernel, so that native code is seen, too); nothing
takes longer than ten seconds; and what a command prints holds no control characters.
"""

import argparse
import contextlib
import ctypes
import hashlib
import io
import json
import os
import re
import shutil
import struct
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import forks  # noqa: F401, which makes the tests' helpers importable


if __name__ == "__main__":  # before the Hub's client is imported
    from hub_server import HubServer

    HUB = HubServer()
    os.environ.update(HF_ENDPOINT=HUB.url, HF_TOKEN=HUB.add_user("alice"), HF_HUB_DISABLE_XET="1")
    os.environ.update(HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HUB_DISABLE_TELEMETRY="1", OMP_NUM_THREADS="1")

import tiny
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from runs import Notebook, scratch
from safetensors.torch import save_file

from diffusers_disback.commands.cli import parser
from diffusers_disback.data.prompts import PromptFile
from diffusers_disback.families import load_family, network_name_of
from diffusers_disback.models.adapters import config_of, lora_config
from diffusers_disback.models.reference import ModelReference
from diffusers_disback.models.weights import fingerprint, metadata_of, read_weights
from diffusers_disback.path.path import DegradationPath


LIMIT = 10.0  # seconds for one case
SECRET = "secret"
SMALL = {"block_out_channels": (4, 8), "norm_num_groups": 2, "attention_head_dim": 1}


# Mutations ---------------------------------------------------------------------------------------------------------


def nasty() -> st.SearchStrategy[Any]:
    """Values that do not belong where they are put: of each JSON type, and names that lead out of a folder."""
    names = [
        "../x",
        f"../{SECRET}/secret.safetensors",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a/../../x",
        "C:\\x",
        "\\\\host\\x",
    ]
    names += [
        "x\u0000y",
        "\u001b[31mred",
        "a\nb",
        "x" * 300,
        "unet/link",
        "link/secret.safetensors",
        "\ud800",
        "é",
        "None",
    ]
    numbers = [0, -1, 1, 2**31, 2**63, 10**30, -(10**30), 0.5, 1e308, float("nan"), float("inf"), True, False]
    leaves = st.one_of(
        st.none(), st.sampled_from(numbers), st.sampled_from(names), st.text(max_size=8), st.integers(), st.floats()
    )
    deep = st.sampled_from([f"<deep {depth}>" for depth in (300, 3000, 100_000)])
    return st.one_of(
        leaves, st.lists(leaves, max_size=3), st.dictionaries(st.text(max_size=6), leaves, max_size=3), deep
    )


def dumped(content: Any) -> bytes:
    """JSON, in which `"<deep 3000>"` stands for lists in lists, which are too many to be made."""
    text = re.sub(r'"<deep (\d+)>"', lambda match: "[" * int(match[1]) + "]" * int(match[1]), json.dumps(content))
    return text.encode("utf-8", "surrogatepass")


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value in a JSON value."""
    found = [at]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*at, key))
    return found


@st.composite
def structures(draw: Any, content: Any) -> bytes:
    """A JSON text of a value in which some places were replaced, removed, renamed or doubled."""
    content = json.loads(json.dumps(content))
    for _ in range(draw(st.integers(1, 3))):
        found = places(content)
        at = found[draw(st.integers(0, len(found) - 1))]
        if not at:
            if draw(st.integers(0, 19)) == 0:
                content = draw(nasty())
            continue
        parent = content
        for key in at[:-1]:
            parent = parent[key]
        how = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename", "double", "retype"]))
        if how == "remove":
            del parent[at[-1]]
        elif how == "rename" and isinstance(parent, dict):
            parent[draw(st.text(max_size=6)) if draw(st.booleans()) else str(draw(nasty()))[:400]] = parent.pop(at[-1])
        elif how == "double" and isinstance(parent, list):
            parent.append(parent[at[-1]])
        elif how == "retype":
            value = parent[at[-1]]
            parent[at[-1]] = draw(st.sampled_from([str(value), [value], {"value": value}, None]))
        else:
            parent[at[-1]] = draw(nasty())
    return dumped(content)


@st.composite
def flips(draw: Any, content: bytes) -> bytes:
    """Bytes of which some were changed, cut out, put in or put elsewhere."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(changed) - 1, 0)))
        how = draw(st.sampled_from(["flip", "set", "insert", "cut", "truncate", "repeat"]))
        if how == "flip" and changed:
            changed[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "set" and changed:
            changed[at] = draw(st.sampled_from([0, 10, 13, 0x22, 0x2E, 0x2F, 0x5B, 0x7B, 0x80, 0xC3, 0xFF]))
        elif how == "insert":
            pieces = [b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"NaN", b"1e999", b'"', b"{" * 50, b"[" * 5000, b"\\ud800"]
            changed[at:at] = draw(st.sampled_from(pieces))
        elif how == "cut":
            del changed[at : at + draw(st.integers(1, 40))]
        elif how == "truncate":
            del changed[at:]
        else:
            changed[at:at] = changed[at : at + draw(st.integers(1, 40))]
    return bytes(changed)


def json_mutations(content: Any) -> st.SearchStrategy[bytes]:
    text = (json.dumps(content, indent=2) + "\n").encode()
    return st.one_of(structures(content), structures(content), flips(text))


def header_mutations(file: bytes) -> st.SearchStrategy[bytes]:
    """Safetensors files whose header, the length of it, or whose data was mutated."""
    length = struct.unpack("<Q", file[:8])[0]
    header, data = file[8 : 8 + length], file[8 + length :]
    lengths = st.sampled_from([0, 1, length - 1, length + 1, length + 8, 2**31, 2**63, 2**64 - 1])

    def whole(text: bytes) -> bytes:
        return struct.pack("<Q", len(text)) + text + data

    return st.one_of(
        structures(json.loads(header)).map(whole),
        structures(json.loads(header)).map(whole),
        flips(header).map(whole),
        flips(file),
        lengths.map(lambda said: struct.pack("<Q", said) + header + data),
        st.integers(0, len(data)).map(lambda cut: file[: len(file) - cut]),
    )


def metadata_mutations(file: bytes, key: str) -> st.SearchStrategy[bytes]:
    """Safetensors files with a mutated JSON text in their metadata."""
    length = struct.unpack("<Q", file[:8])[0]
    header, data = json.loads(file[8 : 8 + length]), file[8 + length :]

    def whole(text: Any) -> bytes:
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        changed = dumped({**header, "__metadata__": {**header["__metadata__"], key: text}})
        return struct.pack("<Q", len(changed)) + changed + data

    return st.one_of(json_mutations(json.loads(header["__metadata__"][key])), nasty()).map(whole)


# What is watched ---------------------------------------------------------------------------------------------------


class Watch:
    """Sees whether any program opens, makes or changes a file in some folders: the kernel tells (inotify)."""

    _EVENTS = 0x20 | 0x2 | 0x100 | 0x200 | 0xC0  # opened, modified, made, deleted, moved

    def __init__(self, *folders: Path):
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.handle = self.libc.inotify_init1(os.O_NONBLOCK)
        for folder in folders:
            if self.libc.inotify_add_watch(self.handle, os.fsencode(folder), self._EVENTS) < 0:
                raise OSError(ctypes.get_errno(), f"{folder} cannot be watched")

    def seen(self) -> list[str]:
        """The names of files since the last time."""
        try:
            told = os.read(self.handle, 1 << 16)
        except BlockingIOError:
            return []
        names, at = [], 0
        while at < len(told):
            _, mask, _, length = struct.unpack_from("iIII", told, at)
            name = told[at + 16 : at + 16 + length].rstrip(b"\0").decode(errors="replace")
            names += [] if mask & 0x40000000 and not name else [name or "the folder"]
            at += 16 + length
        return names


@dataclass
class Found:
    """What the cases came to.

    Args:
        cases, refused (`Counter`): Of each target: all, and those that ended in a `ValueError`.
        wrong (`dict`): What went wrong -> how often, and the file that did it, first.
        slowest (`float`): Seconds.
    """

    cases: Counter = field(default_factory=Counter)
    refused: Counter = field(default_factory=Counter)
    wrong: dict[str, dict[str, Any]] = field(default_factory=dict)
    slowest: float = 0.0

    def note(self, target: str, what: str, content: bytes) -> None:
        told = self.wrong.setdefault(
            f"{target}: {what}", {"times": 0, "sha256": hashlib.sha256(content).hexdigest()[:12]}
        )
        told["times"] += 1
        told.setdefault("content", content)


# Targets -----------------------------------------------------------------------------------------------------------


class Targets:
    """Sound files, and the functions that read them. Each target is a method that takes the content of one file.

    Args:
        folder (`Path`): For everything; a secret is planted beside the folder that is read.
    """

    def __init__(self, folder: Path):
        self.root = folder
        self.place = folder / "place"
        self.place.mkdir()
        (folder / SECRET).mkdir()
        save_file({"weight": torch.ones(2)}, folder / SECRET / "secret.safetensors")
        (folder / SECRET / "config.json").write_text("{}")
        self.network = tiny.unet(seed=9, **SMALL)
        self.state = {key: value.clone() for key, value in self.network.state_dict().items()}
        self._make_teacher()
        self._make_paths()
        self._make_others()
        (self.place / "link").symlink_to(folder / SECRET)
        self.watch = Watch(folder / SECRET, folder)

    def _make_teacher(self) -> None:
        self.teacher = self.place / "teacher"
        tiny.pipeline(**SMALL).save_pretrained(self.teacher)
        (self.teacher / "link").symlink_to(self.root / SECRET)
        self.sharded = self.place / "sharded"
        shutil.copytree(self.teacher, self.sharded, symlinks=True)
        shutil.rmtree(self.sharded / "unet")
        tiny.unet(**SMALL).save_pretrained(self.sharded / "unet", max_shard_size="40KB")
        self.index = self.sharded / "unet" / "diffusion_pytorch_model.safetensors.index.json"

    def _make_paths(self) -> None:
        """A path of whole networks, and one of an adapter."""
        reference = ModelReference(str(self.teacher)).resolve(network_name_of)
        self.sha256 = fingerprint(tiny.unet(**SMALL))
        self.full = DegradationPath.create(self.place / "full", reference, self.sha256, tiny.START, {"seed": 0})
        for node in (1, 2):
            network = tiny.unet(seed=node, **SMALL)
            self.full.append(network, 10 * node, 0.5, mismatch={"denoising_loss": [0.1, 0.2, 0.3, 0.4]})
        self.full.finish({"steps": 20, "seconds": 1.0, "peak_memory_mb": 1.0})
        self.adapted = tiny.unet(**SMALL)
        self.adapted.add_adapter(lora_config(2, None, ["to_q", "to_v"]), adapter_name="fake_score")
        self.adapter = DegradationPath.create(self.place / "adapter", reference, self.sha256, tiny.START, {"seed": 0})
        self.adapter.append(self.adapted, 10, 0.5, "fake_score")
        self.adapter.finish({"steps": 10, "seconds": 1.0, "peak_memory_mb": 1.0})
        for path in (self.full, self.adapter):
            (path.folder / "link").symlink_to(self.root / SECRET)

    def _make_others(self) -> None:
        self.prompts = self.place / "prompts.txt"
        self.prompts.write_text("a red circle\n\na blue star\r\nein grüner Kreis\n")

    def strategies(self) -> dict[str, tuple[st.SearchStrategy[bytes], Callable[[bytes], None], int]]:
        """Name -> mutated files, the function that reads one, and its share of all cases, in percent."""
        from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

        def manifest(path: DegradationPath) -> Any:
            return json.loads((path.folder / "path.json").read_text())

        weights = self.weights_of(self.full).read_bytes()
        adapter = self.weights_of(self.adapter).read_bytes()
        model_index = json.loads((self.teacher / "model_index.json").read_text())
        node = json.loads((self.full.folder / self.full.nodes[0]["name"] / "node.json").read_text())
        return {
            "path.json": (json_mutations(manifest(self.full)), self.path_json, 26),
            "path.json of an adapter": (json_mutations(manifest(self.adapter)), self.path_json_of_an_adapter, 8),
            "adapter metadata": (metadata_mutations(adapter, LORA_ADAPTER_METADATA_KEY), self.adapter_file, 14),
            "adapter header": (header_mutations(adapter), self.adapter_file, 8),
            "safetensors header": (header_mutations(weights), self.weights_file, 14),
            "prompts": (flips(self.prompts.read_bytes()), self.prompts_file, 18),
            "model_index.json": (json_mutations(model_index), self.model_index, 5),
            "weights index": (json_mutations(json.loads(self.index.read_text())), self.weights_index, 6),
            "node.json": (json_mutations(node), self.node_json, 1),
        }

    def weights_of(self, path: DegradationPath) -> Path:
        (name,) = path.nodes[0]["files"]
        return path.folder / path.nodes[0]["name"] / "unet" / name

    # Readers; each may raise a ValueError at any step.

    def path_json(self, content: bytes) -> None:
        with replaced(self.full.folder / "path.json", content):
            self._path(self.full.folder, None)

    def path_json_of_an_adapter(self, content: bytes) -> None:
        with replaced(self.adapter.folder / "path.json", content):
            self._path(self.adapter.folder, "fake_score")

    def _path(self, folder: Path, adapter: str | None) -> None:
        problems: list[ValueError] = []
        steps: list[Callable[[], Any]] = [
            lambda: command("path", "show", str(folder), "--table"),
            lambda: command("path", "verify", str(folder), "--pretrained_model_name_or_path", str(self.teacher)),
            lambda: DegradationPath.from_pretrained(folder).check(self.sha256, tiny.START, "unet"),
            lambda: self._load(folder, adapter),
        ]
        for step in steps:
            try:
                step()
            except ValueError as error:
                problems.append(error)
        if problems:
            raise problems[0]

    def _load(self, folder: Path, adapter: str | None) -> None:
        path = DegradationPath.from_pretrained(folder)
        if len(path) == 0:
            return
        into = self.network if adapter is None else self.adapted
        before = fingerprint(into)
        try:
            if adapter is not None:
                path.adapter_config(1)
            path.load(1, into, adapter)
        except ValueError:
            if fingerprint(into) != before:
                raise PartialLoad("the network was changed by a load that failed") from None
            raise

    def adapter_file(self, content: bytes) -> None:
        self._weights(self.adapter, content, "fake_score", config_of)

    def weights_file(self, content: bytes) -> None:
        self._weights(self.full, content, None, lambda file: (metadata_of(file), read_weights(file)))

    def _weights(
        self, path: DegradationPath, content: bytes, adapter: str | None, read: Callable[[Path], Any]
    ) -> None:
        """Reads a node's file alone, and as part of a path whose hashes are right: its author wrote them."""
        manifest, file = path.folder / "path.json", self.weights_of(path)
        said = json.loads(manifest.read_text())
        said["nodes"][0]["files"] = {file.name: hashlib.sha256(content).hexdigest()}
        problems: list[ValueError] = []
        with replaced(file, content), replaced(manifest, json.dumps(said).encode()):
            for step in (
                lambda: read(file),
                lambda: self._load(path.folder, adapter),
                lambda: self._verify(path.folder),
            ):
                try:
                    step()
                except ValueError as error:
                    problems.append(error)
        if problems:
            raise problems[0]

    def _verify(self, folder: Path) -> None:
        command("path", "verify", str(folder), "--pretrained_model_name_or_path", str(self.teacher))

    def prompts_file(self, content: bytes) -> None:
        with replaced(self.prompts, content):
            prompts = PromptFile(self.prompts)
            texts = list(prompts)
            prompts.digest()
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise AssertionError(f"prompts are {texts[:3]!r}")

    def model_index(self, content: bytes) -> None:
        with replaced(self.teacher / "model_index.json", content):
            ModelReference(str(self.teacher)).resolve(network_name_of).component_files("float32")
            load_family(ModelReference(str(self.teacher)))

    def weights_index(self, content: bytes) -> None:
        problems: list[ValueError] = []
        reference = ModelReference(str(self.sharded))
        with replaced(self.index, content):
            for step in (
                lambda: reference.resolve(network_name_of).component_files("float32"),
                lambda: reference.resolve_denoiser("unet").load_into(self.network),
            ):
                before = fingerprint(self.network)
                try:
                    step()
                except ValueError as error:
                    problems.append(error)
                    if fingerprint(self.network) != before:
                        raise PartialLoad("the network was changed by a load that failed") from None
            self.network.load_state_dict(self.state)
        if problems:
            raise problems[0]

    def node_json(self, content: bytes) -> None:
        """A node's description on the Hub, beside weights that are not this path's, which is pushed there again."""
        from huggingface_hub import CommitOperationAdd, HfApi

        repo_id, node = "alice/fuzzed", self.full.nodes[0]
        if not hasattr(self, "pushed"):
            self.full.push_to_hub(repo_id)
            self.pushed = True
        (weights,) = node["files"]
        files = {"node.json": content, f"unet/{weights}": b"other weights"}
        operations = [CommitOperationAdd(path, others) for path, others in files.items()]
        HfApi().create_commit(repo_id, operations, commit_message="Change it", revision=node["name"])
        self.full.push_to_hub(repo_id)


class PartialLoad(AssertionError):
    """A network that is neither as it was nor as the file says."""


@contextlib.contextmanager
def replaced(file: Path, content: bytes) -> Any:
    """A file with another content for as long as it is read."""
    kept = file.read_bytes()
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(kept)


def command(*arguments: str) -> None:
    """A command of `diffusers-disback`, without the catching of its errors.

    Raises:
        AssertionError: If it prints control characters.
    """
    parsed = _PARSER.parse_args(list(arguments))
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        parsed.function(parsed)
    wrong = [character for character in out.getvalue() if not character.isprintable() and character != "\n"]
    if wrong:
        raise AssertionError(f"control characters are printed: {wrong[0]!r}")


_PARSER = parser()


# Running -----------------------------------------------------------------------------------------------------------


def run_case(found: Found, targets: Targets, name: str, read: Callable[[bytes], None], content: bytes) -> None:
    """Reads one mutated file, and notes what went wrong."""
    targets.watch.seen()
    started = time.monotonic()
    found.cases[name] += 1
    try:
        read(content)
    except ValueError as error:
        found.refused[name] += 1
        if not str(error).strip():
            found.note(name, "a ValueError without a word", content)
    except Exception as error:  # whatever it is is what is looked for
        last = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in last if "diffusers_disback" in frame.filename]
        frame = (own or last)[-1]
        where = f"{Path(frame.filename).name}, {frame.name}"
        told = str(error) if isinstance(error, AssertionError) else ""
        found.note(name, f"{type(error).__module__}.{type(error).__name__} from {where} {told}".strip(), content)
    seconds = time.monotonic() - started
    found.slowest = max(found.slowest, seconds)
    if seconds > LIMIT:
        found.note(name, f"took more than {LIMIT:.0f} s", content)
    outside = targets.watch.seen()
    if outside:
        found.note(name, f"a file outside was opened or changed: {sorted(set(outside))}", content)


def fuzz(cases: int, number: int, folder: Path, only: list[str] | None = None) -> Found:
    """Reads so many mutated files.

    Args:
        cases (`int`): Of all targets together.
        number (`int`): The seed.
        folder (`Path`): Empty.
        only (`list[str]`, *optional*): Names of targets.
    """
    found, targets = Found(), Targets(folder)
    for name, (contents, read, share) in targets.strategies().items():
        if only and name not in only:
            continue
        wanted, round_ = max(1, cases * share // 100), 0
        while found.cases[name] < wanted:
            draw = draws(contents, wanted - found.cases[name], number * 1000 + round_)
            draw(lambda content, name=name, read=read: run_case(found, targets, name, read, content))
            round_ += 1
    return found


def draws(contents: st.SearchStrategy[bytes], count: int, number: int) -> Callable[[Callable[[bytes], None]], None]:
    """A function that calls another with so many drawn values, or fewer if they repeat."""

    def call(act: Callable[[bytes], None]) -> None:
        @seed(number)
        @settings(
            max_examples=count,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(contents)
        def one(content: bytes) -> None:
            act(content)

        one()

    return call


def measure(cases: int, number: int, only: list[str] | None = None) -> dict[str, Any]:
    """Fuzzes, writes the result, and keeps the first file of each kind of wrong in `outputs/reliability/fuzz`."""
    quiet()
    torch.set_num_threads(1)
    started = time.monotonic()
    with scratch("fuzzing") as folder:
        found = fuzz(cases, number, folder, only)
    kept = folder.parent / "fuzz"
    kept.mkdir(exist_ok=True)
    notes = Notebook("fuzz")
    notes.rows = []
    for what, told in found.wrong.items():
        (kept / told["sha256"]).write_bytes(told.pop("content"))
        notes.rows.append({"key": what, "problems": [what], **told})
    return notes.publish(
        seed=number,
        cases=sum(found.cases.values()),
        refused=sum(found.refused.values()),
        targets={name: {"cases": count, "refused": found.refused[name]} for name, count in found.cases.items()},
        kinds_of_wrong=len(found.wrong),
        slowest_seconds=round(found.slowest, 2),
        seconds=round(time.monotonic() - started),
    )


def quiet() -> None:
    """No progress, and no warnings: ten thousand files are told of."""
    import logging

    import diffusers
    import transformers

    logging.disable(logging.WARNING)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def main(arguments: list[str]) -> int:
    described = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    described.add_argument("--cases", type=int, default=10_000)
    described.add_argument("--seed", type=int, default=0)
    described.add_argument("--only", nargs="+", help="names of targets")
    parsed = described.parse_args(arguments)
    result = measure(parsed.cases, parsed.seed, parsed.only)
    print(json.dumps({name: value for name, value in result.items() if name != "wrong"}, indent=2))
    for row in result["wrong"]:
        print(row["times"], row["key"], row["sha256"])
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
