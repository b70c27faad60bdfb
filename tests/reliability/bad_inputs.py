"""Bad inputs of the training script and of the commands: each has to end within ten seconds in one clear error that names the
flag or the file, with exit status 2, and with no file changed.

    python tests/reliability/bad_inputs.py [--only WORD]

The ten seconds are without the import of the libraries, which is the same for every start: attempts are forked from a process
that has imported them.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forks import ForkServer
from hub_server import HubServer, Repo
from runs import Notebook, Runs, errors, is_clear, scratch, snapshot


LIMIT = 10.0  # seconds


@dataclass
class BadInput:
    """One of them.

    Args:
        name (`str`): What is wrong.
        flags (`dict`): Of the training script, on top of those of a tiny run; `None` leaves one out.
        named (`list[str]`): What the error has to name.
        command (`list[str]`): Of `diffusers-disback`, in place of the script.
        prepare (`Callable`): Makes its files; may return more flags.
    """

    name: str
    flags: dict[str, Any] = field(default_factory=dict)
    named: list[str] = field(default_factory=list)
    command: list[str] | None = None
    prepare: Callable[[Path], dict[str, Any] | None] | None = None


def of_flag(flag: str, value: Any, **others: Any) -> BadInput:
    """A flag with a value that cannot be."""
    return BadInput(f"--{flag} {value!r}", {flag: value, **others}, [flag])


FLAGS = [
    of_flag("max_grad_norm", -1),
    of_flag("max_grad_norm", 0),
    of_flag("adam_epsilon", "inf"),
    of_flag("adam_beta1", 1.5),
    of_flag("generator_learning_rate", "nan"),
    of_flag("fake_score_learning_rate", -1),
    of_flag("resolution", 0),
    of_flag("resolution", 17),
    of_flag("lr_warmup_steps", -1),
    of_flag("output_dir", ""),
    of_flag("target_schedule", "geometric"),
    of_flag("train_batch_size", 0),
    of_flag("dataloader_num_workers", 100_000),
    of_flag("ema_decay", 1.5, use_ema=True),
    of_flag("guidance_scale", 0.5),
    of_flag("num_path_nodes", 9),
    of_flag("steps_per_target", 100),
    of_flag("conditioning_timestep", 1000),
    of_flag("mixed_precision", "fp16"),
    of_flag("report_to", "wandb"),
    of_flag("objective", "nothing"),
    of_flag("max_train_steps", "many"),
    of_flag("no_such_flag", 1),
    of_flag("lora_roles", ["generator"]),
    of_flag("hub_model_id", "alice/student"),
]


# Files; each function makes them in a folder ------------------------------------------------------------------------


def text(name: str, content: bytes) -> Callable[[Path], dict[str, Any]]:
    def prepare(folder: Path) -> dict[str, Any]:
        (folder / name).write_bytes(content)
        return {"prompts_file": folder / name}

    return prepare


def fifo(folder: Path) -> dict[str, Any]:
    os.mkfifo(folder / "pipe.txt")
    return {"prompts_file": folder / "pipe.txt"}


def teacher(change: Callable[[Path], None]) -> Callable[[Path], dict[str, Any]]:
    """A copy of the teacher in which something was changed."""

    def prepare(folder: Path) -> dict[str, Any]:
        shutil.copytree(folder.parent / "teacher", folder / "bad-teacher")
        change(folder / "bad-teacher")
        return {"pretrained_model_name_or_path": folder / "bad-teacher"}

    return prepare


def cut_in_half(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def as_pointer(file: Path) -> None:
    file.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 492265168\n")


def with_nan(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(file)
    weights[min(weights)].fill_(float("nan"))
    save_file(weights, file, {"format": "pt"})


def pickled(file: Path) -> None:
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()


def edited(name: str, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **changes}))

    return change


def other_unet(flag: str, **config: Any) -> Callable[[Path], dict[str, Any]]:
    def prepare(folder: Path) -> dict[str, Any]:
        import tiny

        tiny.unet(**config).save_pretrained(folder / "other" / "unet")
        return {flag: folder / "other"}

    return prepare


def lora(content: Callable[[], dict[str, Any]]) -> Callable[[Path], dict[str, Any]]:
    def prepare(folder: Path) -> dict[str, Any]:
        from safetensors.torch import save_file

        save_file(content(), folder / "bad.safetensors")
        return {"teacher_lora": folder / "bad.safetensors"}

    return prepare


def of_another_model() -> dict[str, Any]:
    import torch

    layer = "unet.down_blocks.7.attentions.0.transformer_blocks.0.attn1.to_q"
    return {f"{layer}.lora_A.weight": torch.ones(2, 999), f"{layer}.lora_B.weight": torch.ones(999, 2)}


def with_magnitudes() -> dict[str, Any]:
    import torch

    layer = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    pair = {f"{layer}.lora_A.weight": torch.ones(2, 16), f"{layer}.lora_B.weight": torch.ones(16, 2)}
    return {**pair, f"{layer}.lora_magnitude_vector": torch.ones(16)}


def a_file_in_the_way(folder: Path) -> dict[str, Any]:
    (folder / "file").write_text("mine")
    return {"output_dir": folder / "file"}


def a_file_above(folder: Path) -> dict[str, Any]:
    (folder / "file").write_text("mine")
    return {"output_dir": folder / "file" / "run"}


def anothers_results(folder: Path) -> dict[str, Any]:
    (folder / "run").mkdir()
    (folder / "run" / "README.md").write_text("mine")
    return {"output_dir": folder / "run"}


def a_path(change: Callable[[Path], None]) -> Callable[[Path], dict[str, Any]]:
    """A copy of a run's path in which something was changed."""

    def prepare(folder: Path) -> dict[str, Any]:
        shutil.copytree(folder.parent / "recorded" / "path", folder / "bad-path")
        change(folder / "bad-path")
        return {"degradation_path": folder / "bad-path", "stage": "backtrack"}

    return prepare


def flipped(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = max(folder.rglob(name))
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)

    return change


def recorded(**flags: Any) -> Callable[[Path], dict[str, Any]]:
    """A copy of a run that was recorded, to resume with."""

    def prepare(folder: Path) -> dict[str, Any]:
        shutil.copytree(folder.parent / "recorded", folder / "run")
        return {"output_dir": folder / "run", "stage": "record", **flags}

    return prepare


UNET = "unet/diffusion_pytorch_model.safetensors"
FILES = [
    BadInput("no prompts", {"prompts_file": None}, ["prompts"]),
    BadInput("a prompts file that is missing", {"prompts_file": "nowhere.txt"}, ["nowhere.txt"]),
    BadInput("an empty prompts file", {}, ["empty.txt"], prepare=text("empty.txt", b"\n \n")),
    BadInput("prompts in UTF-16", {}, ["wide.txt"], prepare=text("wide.txt", "a cat\n".encode("utf-16-le"))),
    BadInput("prompts with NUL bytes", {}, ["nul.txt"], prepare=text("nul.txt", b"a cat\0\na dog\n")),
    BadInput("a folder as prompts file", {"prompts_file": "."}, ["."]),
    BadInput("a FIFO as prompts file", {}, ["pipe.txt"], prepare=fifo),
    BadInput("prompts of two places", {"train_data_dir": "."}, ["prompts_file", "train_data_dir"]),
    BadInput("a teacher that is missing", {"pretrained_model_name_or_path": "./nowhere"}, ["nowhere"]),
    BadInput("a folder that is no teacher", {"pretrained_model_name_or_path": "."}, ["model_index.json"]),
    BadInput(
        "a teacher that is not on the Hub", {"pretrained_model_name_or_path": "alice/nowhere"}, ["alice/nowhere"]
    ),
    BadInput(
        "a teacher of another family",
        {},
        ["StableDiffusion3Pipeline"],
        prepare=teacher(edited("model_index.json", _class_name="StableDiffusion3Pipeline")),
    ),
    BadInput(
        "an index that leads out", {}, ["../x"], prepare=teacher(edited("model_index.json", **{"../x": ["a", "B"]}))
    ),
    BadInput(
        "an index that is no JSON",
        {},
        ["model_index.json"],
        prepare=teacher(lambda f: cut_in_half(f / "model_index.json")),
    ),
    BadInput("a teacher's UNet cut off", {}, [UNET], prepare=teacher(lambda f: cut_in_half(f / UNET))),
    BadInput("a pointer of Git LFS", {}, ["git lfs"], prepare=teacher(lambda f: as_pointer(f / UNET))),
    BadInput("a teacher's UNet of NaN", {}, ["NaN"], prepare=teacher(lambda f: with_nan(f / UNET))),
    BadInput("a pickled teacher", {}, ["safetensors"], prepare=teacher(lambda f: pickled(f / UNET))),
    BadInput(
        "a teacher without a text encoder",
        {},
        ["text_encoder"],
        prepare=teacher(lambda f: shutil.rmtree(f / "text_encoder")),
    ),
    BadInput(
        "a scheduler that is none",
        {},
        ["scheduler"],
        prepare=teacher(lambda f: (f / "scheduler" / "scheduler_config.json").write_text("[]")),
    ),
    BadInput(
        "a start of other conditions",
        {},
        ["other"],
        prepare=other_unet("generator_model_name_or_path", cross_attention_dim=16),
    ),
    BadInput("an autoencoder that is a UNet", {}, ["other"], prepare=other_unet("pretrained_vae_model_name_or_path")),
    BadInput("a LoRA of another model", {}, ["bad.safetensors"], prepare=lora(of_another_model)),
    BadInput("a DoRA", {}, ["bad.safetensors"], prepare=lora(with_magnitudes)),
    BadInput("a LoRA that is missing", {"teacher_lora": "./nowhere.safetensors"}, ["nowhere.safetensors"]),
    BadInput("a file as output folder", {}, ["file"], prepare=a_file_in_the_way),
    BadInput("a file above the output folder", {}, ["file"], prepare=a_file_above),
    BadInput("somebody else's results", {}, ["README.md"], prepare=anothers_results),
    BadInput("a run's results, without resuming", {}, ["resume_from_checkpoint"], prepare=recorded()),
    BadInput(
        "resuming with other settings",
        {},
        ["seed"],
        prepare=recorded(seed=5, resume_from_checkpoint="latest", degradation_steps=8),
    ),
    BadInput("resuming from no checkpoint", {"resume_from_checkpoint": "./nowhere"}, ["nowhere"]),
    BadInput("a path that is missing", {"stage": "backtrack", "degradation_path": "./nowhere"}, ["nowhere"]),
    BadInput(
        "a path of another teacher", {}, ["another teacher"], prepare=a_path(lambda f: other_teacher(f / "path.json"))
    ),
    BadInput("a path of a newer format", {}, ["format"], prepare=a_path(edited("path.json", format_version=9))),
    BadInput("a path with a damaged node", {}, ["damaged"], prepare=a_path(flipped("*.safetensors"))),
    BadInput("a path that is no JSON", {}, ["path.json"], prepare=a_path(lambda f: cut_in_half(f / "path.json"))),
    BadInput("a path that is not on the Hub", {"degradation_path": "alice/nowhere"}, ["alice/nowhere"]),
    BadInput("a broken path on the Hub", {"degradation_path": "alice/broken"}, ["alice/broken"]),
]
COMMANDS = [
    BadInput("show: no path", command=["path", "show", "."], named=["path.json"]),
    BadInput(
        "show: a path that leads out",
        command=["path", "show", "bad-path", "--table"],
        named=["../x"],
        prepare=a_path(lambda f: leads_out(f)),
    ),
    BadInput("push: nothing to push", command=["push", ".", "alice/new"], named=["."]),
    BadInput("half: no student", command=["half", "."], named=["model_index.json"]),
    BadInput("sweep: no timestep", command=["timestep-sweep", "../teacher", "--timesteps", "5000"], named=["5000"]),
    BadInput("extract: no student", command=["extract-lora", "nowhere", "../teacher", "out"], named=["nowhere"]),
    BadInput("pull: not on the Hub", command=["pull", "alice/nowhere", "copy"], named=["alice/nowhere"]),
    BadInput("plan: no teacher", command=["plan"], named=["pretrained_model_name_or_path"]),
]
ALL = FLAGS + FILES + COMMANDS


def other_teacher(manifest: Path) -> None:
    content = json.loads(manifest.read_text())
    content["teacher"]["sha256"] = "0" * 64
    manifest.write_text(json.dumps(content))


def leads_out(path: Path) -> None:
    content = json.loads((path / "path.json").read_text())
    content["nodes"][0]["name"] = "../x"
    (path / "path.json").write_text(json.dumps(content))


# Trying them -------------------------------------------------------------------------------------------------------


def attempt(runs: Runs, server: ForkServer, case: BadInput) -> tuple[list[str], float, str]:
    """Tries a bad input in a folder of its own. What is not as it has to be, seconds, and what was told."""
    folder = runs.folder / "here"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    flags = case.prepare(folder) if case.prepare else None
    before = snapshot(runs.folder)
    if case.command is not None:
        ended = server.run(case.command, seconds=LIMIT, program="cli", cwd=str(folder))
    else:
        output = folder / "bad-run"
        arguments = runs.arguments(output, **{**case.flags, **(flags or {})})
        ended = server.run(arguments, seconds=LIMIT, cwd=str(folder))
    problems = ["not within ten seconds"] if ended.killed else is_clear(ended, *case.named)
    after = {name: seen for name, seen in snapshot(runs.folder).items() if not name.endswith(".log")}
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    changed = [name for name in changed if not name.startswith("server")]
    problems += [f"{', '.join(changed[:3])} changed"] if changed else []
    return problems, ended.seconds, " ".join(errors(ended) or ended.told[-2:])


def inputs(folder: Path, hub: HubServer) -> tuple[Runs, ForkServer]:
    """What the bad inputs are made of: a teacher, prompts, a recorded path, and a Hub with a broken one."""
    runs = Runs(folder)
    server = runs.server(HF_ENDPOINT=hub.url, HF_TOKEN=hub.add_user("alice"), HF_HUB_OFFLINE="0")
    runs.undisturbed(server, folder / "recorded", stage="record")
    return runs, server


def break_path(hub: HubServer) -> None:
    """Makes `alice/broken` on the Hub, whose `path.json` is no path's."""
    repo = hub.repos["alice/broken"] = Repo("alice")
    repo.branches["main"] = repo.add({"path.json": hub.keep(b'{"nodes": 1}')}, "Add a path", None).oid


def measure(only: str | None = None) -> dict[str, Any]:
    """Tries all of them, or those with a word in their names."""
    notes, hub, started = Notebook("bad-inputs"), HubServer(), time.monotonic()
    with scratch("bad-inputs") as folder:
        runs, server = inputs(folder / "inputs", hub)
        break_path(hub)
        with server:
            for case in ALL:
                if case.name in notes or (only is not None and only not in case.name):
                    continue
                problems, seconds, told = attempt(runs, server, case)
                notes.add(case.name, problems=problems, seconds=round(seconds, 2), told=told[:400])
                print(f"{case.name}: {'; '.join(problems) or 'clear'} | {told[:300]}", file=sys.stderr, flush=True)
    rows = notes.rows
    return notes.publish(
        inputs=len(rows),
        clear=sum(not row["problems"] for row in rows),
        slowest_seconds=max(row["seconds"] for row in rows),
        seconds=round(time.monotonic() - started),
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="a word in the names of those to try")
    result = measure(parser.parse_args(arguments).only)
    print(json.dumps({name: value for name, value in result.items() if name != "wrong"}, indent=2))
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
