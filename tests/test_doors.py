"""Every door at which a name that somebody else wrote becomes a path, on this machine or in a repository.

Somebody else's folders hold names and links that lead to a secret beside them. At each door that is an error that names the
name, and nothing of the secret is in the folder that is written to or on the Hub, and nothing is written beside it.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from hub_server import Fault
from safetensors.torch import load_file, save_file

from diffusers_disback.families import load_family, network_name_of, to_pipeline
from diffusers_disback.hub.publish import run as pushing
from diffusers_disback.hub.publish.export import add_half_variant
from diffusers_disback.hub.publish.run import pull, push_run
from diffusers_disback.hub.publish.student import save_student
from diffusers_disback.hub.repository import Repository
from diffusers_disback.models.reference import ModelReference
from diffusers_disback.models.single_file import _config_folder
from diffusers_disback.models.teacher_lora import fuse_lora, lora_file
from diffusers_disback.path.path import DegradationPath
from diffusers_disback.planning.plan import meta_networks_beside


SECRET = b"a token that is nobody's business"
UNET = "diffusion_pytorch_model.safetensors"
REPORT = {
    **{name: {"drift_psnr": 1.0} for name in ("teacher", "initial", "student")},
    "evaluation": {"name": "drift", "type": "drift", "num_pictures": 1, "seed": 0},
    **{"example_prompt": "a cat", "teacher_card": {}, "stages": {}, "path": None, "resolution": 16, "seed": 0},
    **{"pipeline_class": "StableDiffusionPipeline", "command": "train", "machine": {}, "lora": None},
    "versions": {"diffusers_disback": "0"},
    "settings": {
        **{"output_dir": "run", "conditioning_timestep": 399, "pretrained_model_name_or_path": "user/teacher"},
        **dict.fromkeys(("revision", "variant", "generator_model_name_or_path", "teacher_lora"), None),
        **dict.fromkeys(("pretrained_vae_model_name_or_path", "single_file_config", "degradation_path"), None),
    },
}


class House:
    """A folder with a secret, somebody else's teacher, path and student beside it, and a place to write to."""

    def __init__(self, root: Path, teacher_folder: Path, repo: str):
        self.root, self.repo, self.lora = root, repo, root / "lora"
        self.home, self.out = root / "home", root / "out"
        self.teacher, self.path, self.student = root / "teacher", root / "path", root / "student"
        root.mkdir()
        self.home.mkdir()
        for name in ("token", "LICENSE", "token.txt"):
            (self.home / name).write_bytes(SECRET)
        (self.home / "README.md").write_bytes(b"---\nlicense: mit\nlicense_name: " + SECRET + b"\n---\n")
        (self.home / "config.json").write_text(json.dumps({"said": SECRET.decode()}))
        (self.home / "unet").mkdir()
        shutil.copytree(teacher_folder, self.teacher)
        save_file(load_file(self.teacher / "unet" / UNET), self.home / "w.safetensors", {"said": SECRET.decode()})
        shutil.copy(self.home / "w.safetensors", self.home / "unet" / UNET)

    def with_path(self) -> DegradationPath:
        return tiny.path(self.path, self.teacher, nodes=1)

    def opened(self) -> DegradationPath:
        """The path as another process opens it: what was resolved before is resolved anew."""
        return DegradationPath.from_pretrained(self.path, teacher=self.reference())

    def with_student(self, **report) -> None:
        shutil.copytree(self.teacher, self.student)
        (self.student / "report.json").write_text(json.dumps({**REPORT, **report}))
        (self.student / "README.md").write_text("# By hand\n")

    def names_component(self, folder: Path, name: str) -> None:
        """`model_index.json` names one more component."""
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, name: ["transformers", "CLIPTokenizer"]}))

    def names_shard(self, folder: Path, name: str, variant: str = "") -> None:
        """A component's weights become shards, of which one has another name."""
        (file,) = (file for file in folder.glob("*.safetensors") if not file.is_symlink())
        weights = load_file(file)
        stem = file.name.removesuffix(".safetensors")
        save_file(weights, file.with_name(f"{stem}{variant}-00001-of-00002.safetensors"))
        file.unlink()
        names = dict.fromkeys(weights, f"{stem}{variant}-00001-of-00002.safetensors")
        names[min(names)] = name
        content = {"metadata": {"total_size": 1}, "weight_map": names}
        (folder / f"{stem}.safetensors.index{variant}.json").write_text(json.dumps(content))

    def reference(self, **changes) -> ModelReference:
        return ModelReference(str(self.teacher), **changes)

    def save(self, **changes) -> None:
        save_student(
            to_pipeline(tiny.unet(seed=1), 399, tiny.pipeline()),
            self.reference(**changes).resolve(network_name_of),
            self.out,
        )

    def files(self) -> dict[str, bytes]:
        """All that lies beside the place that is written to."""
        return {
            str(file): file.read_bytes()
            for file in self.root.rglob("*")
            if file.is_file() and not file.is_symlink() and not file.is_relative_to(self.out)
        }


def link(place: Path, target: Path) -> str:
    """Puts a link in place of what is there."""
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target)
    return place.name


def hostile(kind: str, folder: Path, target: Path) -> str:
    """A name that leads from a folder to a file or folder elsewhere; those by links need one in the folder."""
    up = os.path.relpath(target, folder)
    if kind == "a link in the folder, and up":
        link(folder / "inner", folder / "below")
        (folder / "below").mkdir(exist_ok=True)
    if kind == "a link out":
        link(folder / f"out{target.suffix}", target)
    return {
        "up": up,
        "absolute": str(target),
        "drive": f"C:{target.name}",
        "NUL": f"x\0{target.name}",
        "backslash": up.replace("/", "\\"),
        "a link in the folder, and up": f"inner/../{up}",
        "a link out": f"out{target.suffix}",
    }[kind]


KINDS = ["up", "absolute", "drive", "NUL", "backslash", "a link in the folder, and up", "a link out"]


# Each door is given the house and a kind of name, and returns the name and what goes through the door. ----------------------


def component_read(house, kind):
    name = hostile(kind, house.teacher, house.home)
    house.names_component(house.teacher, name)
    return name, lambda: load_family(house.reference())


def component_copied(house, kind):
    name, _ = component_read(house, kind)
    return name, house.save


def component_pushed_with_a_path(house, kind):
    house.with_path()
    name, _ = component_read(house, kind)
    return name, lambda: house.opened().push_to_hub(house.repo)


def component_pushed_with_a_student(house, kind):
    house.with_student()
    name = hostile(kind, house.student, house.home)
    house.names_component(house.student, name)
    return name, lambda: push_run(house.student, house.repo)


def component_of_a_single_files_config(house, kind):
    name, _ = component_read(house, kind)
    return name, lambda: _config_folder(str(house.teacher), {}, None)


def shard_of(component, variant=None):
    def door(house, kind):
        folder = house.teacher / component
        name = hostile(kind, folder, house.home / "w.safetensors")
        house.names_shard(folder, name, f".{variant}" if variant else "")
        return name, lambda: load_family(house.reference(variant=variant))

    return door


def shard_of_a_start(house, kind):
    name, _ = shard_of("unet")(house, kind)
    return name, lambda: house.reference().resolve_denoiser("unet").load_network(type(tiny.unet()))


def shard_copied(house, kind):
    name, _ = shard_of("vae", "fp16")(house, kind)
    return name, lambda: house.save(variant="fp16")


def shard_of_another_autoencoder(house, kind):
    shutil.copytree(house.teacher / "vae", house.root / "vae")
    name = hostile(kind, house.root / "vae", house.home / "w.safetensors")
    house.names_shard(house.root / "vae", name)
    return name, lambda: house.save(vae=str(house.root / "vae"))


def shard_pushed_with_a_path(house, kind):
    house.with_path()
    name, _ = shard_of("text_encoder")(house, kind)
    return name, lambda: house.opened().push_to_hub(house.repo)


def shard_of_a_node_pushed(house, kind):
    path = house.with_path()
    folder = path.node_folder(1) / "unet"
    name = hostile(kind, folder, house.home / "w.safetensors")
    content = {"metadata": {}, "weight_map": {"conv_in.weight": name}}
    (folder / f"{UNET}.index.json").write_text(json.dumps(content))
    return name, lambda: path.push_to_hub(house.repo)


def shard_of_a_student_pushed(house, kind):
    house.with_student()
    name = hostile(kind, house.student / "unet", house.home / "w.safetensors")
    house.names_shard(house.student / "unet", name)
    return name, lambda: push_run(house.student, house.repo)


def shard_halved(house, kind):
    house.with_student()
    name = hostile(kind, house.student / "unet", house.home / "w.safetensors")
    house.names_shard(house.student / "unet", name)
    return name, lambda: add_half_variant(house.student)


def node_named_by_a_manifest(house, kind):
    path = house.with_path()
    name = hostile(kind, house.path, house.home)
    manifest = {**path.manifest, "nodes": [{**path.nodes[0], "name": name}]}
    (house.path / "path.json").write_text(json.dumps(manifest))
    return name, lambda: DegradationPath.from_pretrained(house.path).save_pretrained(house.out)


def file_named_by_a_manifest(house, kind):
    path = house.with_path()
    name = hostile(kind, path.node_folder(1) / "unet", house.home / "w.safetensors")
    import hashlib

    hashes = {name: hashlib.sha256((house.home / "w.safetensors").read_bytes()).hexdigest()}
    manifest = {**path.manifest, "nodes": [{**path.nodes[0], "files": hashes}]}
    (house.path / "path.json").write_text(json.dumps(manifest))
    return name, lambda: DegradationPath.from_pretrained(house.path).read(1)


def file_of_a_repository_pulled(house, kind):
    (house.out / "run.draft").mkdir(parents=True)
    name = hostile(kind, house.out / "run.draft", house.root / "beside")
    house.with_student()
    files = {f.relative_to(house.student).as_posix(): f for f in house.student.rglob("*") if f.is_file()}
    target = Repository(house.repo)
    target.create()
    target.commit(files, "A student")
    repo = house.hub.repos[house.repo]
    parent = repo.commits[repo.branches["main"]]
    repo.branches["main"] = repo.add({**parent.tree, name: house.hub.keep(b"hostile")}, "More", parent).oid
    return name, lambda: pull(house.repo, house.out / "run")


BY_NAME = [
    component_read,
    component_copied,
    component_pushed_with_a_path,
    component_pushed_with_a_student,
    component_of_a_single_files_config,
    *(pytest.param(shard_of(part), id=f"shard_of_{part}") for part in ("unet", "text_encoder", "vae")),
    pytest.param(shard_of("unet", "fp16"), id="shard_of_a_variant"),
    shard_of_a_start,
    shard_copied,
    shard_of_another_autoencoder,
    shard_pushed_with_a_path,
    shard_of_a_node_pushed,
    shard_of_a_student_pushed,
    shard_halved,
    node_named_by_a_manifest,
    file_named_by_a_manifest,
    file_of_a_repository_pulled,
]


def walk(house, hub, name, go):
    """Goes through a door, which has to refuse."""
    before = house.files()
    with pytest.raises(ValueError) as error:
        go()
    assert name in str(error.value) or repr(name) in str(error.value), f"{name!r} is not in: {error.value}"
    assert house.files() == before, "something was written beside the output folder"
    assert not any(SECRET in blob for blob in hub.blobs.values()), "the secret is on the Hub"
    written = (file for file in house.out.rglob("*") if file.is_file() and not file.is_symlink())
    assert not any(SECRET in file.read_bytes() for file in written), "the secret was copied"


@pytest.mark.parametrize("door", BY_NAME, ids=lambda door: door.__name__)
def test_a_name_that_leads_out_is_refused_at(door, tmp_path, teacher_folder, repo, alice, impatient):
    problems = []
    for number, kind in enumerate(KINDS):
        house = House(tmp_path / str(number), teacher_folder, f"{repo}-{number}")
        house.hub = alice
        name, go = door(house, kind)
        try:
            walk(house, alice, name, go)
        except (AssertionError, pytest.fail.Exception) as problem:
            problems.append(f"{kind}: {problem}")
        except Exception as problem:  # of another kind than ours
            problems.append(f"{kind}: {type(problem).__name__}: {problem}")
    assert not problems, "\n".join(problems)


# What is a link out of somebody else's folder, where to (`None`: what was there, moved away), and what goes through the door.
LINKS = {
    "a teacher's component, read": ("teacher", "unet", None, lambda h: load_family(h.reference())),
    "a teacher's weights, read": ("teacher", f"unet/{UNET}", "w.safetensors", lambda h: load_family(h.reference())),
    "a teacher's index, read": ("teacher", "model_index.json", "config.json", lambda h: load_family(h.reference())),
    "a start's config, read": (
        *("teacher", "unet/config.json", "config.json"),
        lambda h: h.reference().resolve_denoiser("unet").load_network(type(tiny.unet())),
    ),
    "a teacher's card, read": (
        "teacher",
        "README.md",
        "README.md",
        lambda h: h.reference().resolve(network_name_of).card(),
    ),
    "a teacher's component, copied": ("teacher", "tokenizer", "", House.save),
    "a teacher's file, copied": ("teacher", "tokenizer/more.txt", "token.txt", House.save),
    "a teacher's licence, copied": ("teacher", "LICENSE", "LICENSE", House.save),
    "an autoencoder's config, copied": (
        *("teacher", "vae/more.json", "config.json"),
        lambda h: h.save(vae=str(h.teacher / "vae")),
    ),
    "a config's file, of a single file": (
        *("teacher", "tokenizer/vocab.json", "config.json"),
        lambda h: _config_folder(str(h.teacher), {}, None),
    ),
    "a teacher's file, pushed": (
        "teacher",
        "tokenizer/more.txt",
        "token.txt",
        lambda h: h.opened().push_to_hub(h.repo),
    ),
    "a LoRA in a folder, fused": (
        *("lora", "pytorch_lora_weights.safetensors", "w.safetensors"),
        lambda h: fuse_lora(tiny.unet(), lora_file(str(h.lora))),
    ),
    "a config of the UNet, planned": (
        "teacher",
        "unet/config.json",
        "config.json",
        lambda h: h.reference().resolve_configs(network_name_of).meta_network(),
    ),
    "a UNet's folder, planned": (
        "teacher",
        "unet",
        None,
        lambda h: h.reference().resolve_configs(network_name_of).meta_network(),
    ),
    "a config of an autoencoder, planned": (
        *("teacher", "vae/config.json", "config.json"),
        lambda h: meta_networks_beside(h.reference().resolve_configs(network_name_of)),
    ),
    "a config of a text encoder, planned": (
        *("teacher", "text_encoder/config.json", "config.json"),
        lambda h: meta_networks_beside(h.reference().resolve_configs(network_name_of)),
    ),
    "a path's node, copied": ("path", "degradation-000100", "", lambda h: h.read().save_pretrained(h.out)),
    "a path's node, read": ("path", "degradation-000100", None, lambda h: h.read().read(1)),
    "a path's manifest, read": ("path", "path.json", None, lambda h: h.read()),
    "a node's weights, read": ("path", f"degradation-000100/unet/{UNET}", None, lambda h: h.read().read(1)),
    "a node's file, copied": (
        *("path", "degradation-000100/unet/more.txt", "token"),
        lambda h: h.read().save_pretrained(h.out),
    ),
    "a node's file, pushed": (
        "path",
        "degradation-000100/unet/more.txt",
        "token",
        lambda h: h.own.push_to_hub(h.repo),
    ),
    "a node's node.json, pushed": (
        "path",
        "degradation-000100/node.json",
        "token",
        lambda h: h.own.push_to_hub(h.repo),
    ),
    "a path's image, pushed": ("path", "path.png", "token", lambda h: h.own.push_to_hub(h.repo)),
    "a student's component, pushed": ("student", "tokenizer", "", lambda h: push_run(h.student, h.repo)),
    "a student's file, pushed": ("student", "vae/more.txt", "token", lambda h: push_run(h.student, h.repo)),
    "a student's licence, pushed": ("student", "LICENSE", "LICENSE", lambda h: push_run(h.student, h.repo)),
    "a student's image, pushed": ("student", "samples.png", "token", lambda h: push_run(h.student, h.repo)),
    "a student's code, pushed": ("student", "pipeline.py", "token", lambda h: push_run(h.student, h.repo)),
    "a student's card, pushed": ("student", "README.md", "token", lambda h: push_run(h.student, h.repo)),
    "a student's LoRA, pushed": ("student", "lora/x.safetensors", "token", lambda h: push_run(h.student, h.repo)),
    "a student's report, read": ("student", "report.json", "config.json", lambda h: push_run(h.student, h.repo)),
    "a student's path, pushed": ("student", "path", "../path", lambda h: push_run(h.student, h.repo)),
    "a student's weights, halved": ("student", f"unet/{UNET}", "w.safetensors", lambda h: add_half_variant(h.student)),
    "a student's component, halved": ("student", "unet", "", lambda h: add_half_variant(h.student)),
}


@pytest.mark.parametrize("door", LINKS)
def test_a_link_that_leads_out_is_refused_at(door, tmp_path, teacher_folder, repo, alice, impatient):
    owner, place, target, go = LINKS[door]
    house = House(tmp_path / "house", teacher_folder, repo)
    house.own = house.with_path()
    house.read = lambda: DegradationPath.from_pretrained(house.path)
    house.with_student()
    folder = getattr(house, owner)
    if target is None:
        target = "moved"
        shutil.move(folder / place, house.home / target)
    link(folder / place, house.home / target)
    walk(house, alice, Path(place).name, lambda: go(house))


def test_links_within_a_folder_are_followed(tmp_path, teacher_folder, repo, alice):
    house = House(tmp_path / "house", teacher_folder, repo)
    path = house.with_path()
    shutil.move(house.teacher / "tokenizer", house.teacher / "words")
    link(house.teacher / "tokenizer", Path("words"))
    shutil.move(house.teacher / "vae" / UNET, house.teacher / "vae" / "weights")
    link(house.teacher / "vae" / UNET, Path("weights"))
    load_family(house.reference())
    house.save()
    path.push_to_hub(repo)
    for name in (f"vae/{UNET}", "tokenizer/tokenizer_config.json"):
        theirs = (teacher_folder / name).read_bytes()
        assert (house.out / name).read_bytes() == theirs == alice.files(repo, "degradation-000100")[name]


# Places that a run noted -------------------------------------------------------------------------------------------------


def test_a_report_of_others_names_no_place_to_push_from(tmp_path, teacher_folder, repo, alice):
    """A path that lies elsewhere is pushed if the run's own settings say so, and not because its report does."""
    house = House(tmp_path / "house", teacher_folder, repo)
    path = house.with_path()
    elsewhere = {**REPORT["settings"], "degradation_path": str(house.path)}
    for report in (
        {**REPORT, "settings": elsewhere, "path": {"id": path.manifest["id"], "num_nodes": 1}},
        {"settings": elsewhere},
    ):
        house.student.mkdir()
        (house.student / "report.json").write_text(json.dumps(report))
        with pytest.raises(ValueError, match="is not at|nothing can be pushed|is not whole"):
            push_run(house.student, repo)
        assert not alice.repos
        shutil.rmtree(house.student)


def test_settings_of_others_name_no_path_that_they_did_not_record(tmp_path, teacher_folder, repo, alice):
    house = House(tmp_path / "house", teacher_folder, repo)
    path = tiny.path(house.path, house.teacher, nodes=1, seed=7, prompts_file="cats.txt")
    file = house.student / "settings" / "degradation.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"degradation_path": str(house.path), "seed": 8, "prompts_file": "cats.txt"}))
    assert pushing.path_of_run(house.student) is None
    file.write_text(json.dumps({"degradation_path": str(house.path), "seed": 7, "prompts_file": "cats.txt"}))
    assert pushing.path_of_run(house.student).manifest["id"] == path.manifest["id"]


def test_what_a_run_keeps_to_itself_is_not_pulled(tmp_path, teacher_folder, repo, alice):
    """A repository that holds settings would else say what a run on this machine did."""
    house = House(tmp_path / "house", teacher_folder, repo)
    house.with_student()
    own = ("settings/degradation.json", "path/path.json", "checkpoints/x.json", "degradation-000100/node.json")
    files = {f.relative_to(house.student).as_posix(): f for f in house.student.rglob("*") if f.is_file()}
    target = Repository(repo)
    target.create()
    target.commit({**files, **dict.fromkeys(own, b"{}"), "notes.txt": b"theirs", "a[b].txt": b"theirs"}, "A student")
    pull(repo, house.out)
    assert not [name for name in own if (house.out / name).exists()]
    assert (house.out / "notes.txt").exists() and (house.out / "a[b].txt").exists()
    assert (house.out / "unet" / UNET).exists()


# Code of others ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, files, words",
    [
        ({"_class_name": ["evil", "Pipeline"]}, {"evil.py": ""}, "evil"),
        ({"unet": ["os", "system"]}, {}, "os.system"),
        ({"unet": ["evil", "Model"]}, {"unet/evil.py": ""}, "evil.Model"),
        ({"unet": ["diffusers", "DiffusionPipeline"]}, {}, "diffusers.DiffusionPipeline"),
        ({"vae": ["diffusers", "OnnxRuntimeModel"]}, {}, "diffusers.OnnxRuntimeModel"),
        ({"tokenizer": ["transformers", "AutoTokenizer"]}, {}, "transformers.AutoTokenizer"),
        ({"text_encoder": ["pipeline_utils", "os"]}, {}, "pipeline_utils.os"),
        ({"scheduler": "DDIMScheduler"}, {}, "'DDIMScheduler' of the component scheduler"),
        ({"more": ["subprocess", "Popen"]}, {}, "subprocess.Popen"),
        ({}, {"unet/diffusers.py": ""}, "unet/diffusers.py"),
        ({}, {"None.py": ""}, "None.py"),
    ],
)
def test_code_of_others_is_not_run(tmp_path, teacher_folder, change, files, words):
    folder, ran = tmp_path / "teacher", tmp_path / "ran"
    shutil.copytree(teacher_folder, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, **change}))
    for name in files:
        (folder / name).write_text(f"open({str(ran)!r}, 'w')\nclass Pipeline: pass\nclass Model: pass\n")
    with pytest.raises(ValueError, match=words):
        load_family(ModelReference(str(folder)))
    assert not ran.exists()


def test_no_other_weights_are_put_upon_a_component(tmp_path, teacher_folder):
    """An adapter in its folder, which transformers loads unasked, or follows to the model that its config names."""
    for place in ("text_encoder", "vae", "unet", "tokenizer"):
        for name in ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"):
            folder = shutil.copytree(teacher_folder, tmp_path / place / name)
            (folder / place / name).write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "secret")}))
            reference = ModelReference(str(folder))
            doors = [
                lambda r=reference: load_family(r),
                lambda r=reference: r.resolve(network_name_of).component_files("float32"),
            ]
            for go in doors[: 1 if place == "unet" else 2]:
                with pytest.raises(ValueError, match=f"holds {place}/{name}, an adapter"):
                    go()


PARTS = {
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
}


@pytest.mark.parametrize("part", PARTS)
def test_what_is_no_part_is_not_left_out_but_refused(tmp_path, teacher_folder, alice, repo, part):
    """Code of its own, an adapter, or a name that leads out, in a part that a broken file would leave out; on the Hub, too."""
    from huggingface_hub import HfApi

    folder = shutil.copytree(teacher_folder, tmp_path / "teacher")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, part: PARTS[part]}))
    (folder / part).mkdir()
    said = {"text_config": {"transformers_weights": "../../secret.safetensors"}}
    for name, content in {
        "adapter_config.json": "{}",
        f"{PARTS[part][0]}.py": "",
        "config.json": json.dumps(said),
    }.items():
        (folder / part / name).write_text(content)
        with pytest.raises(ValueError, match=rf"{part}/{name}"):
            ModelReference(str(folder)).resolve(network_name_of)
        if name == "adapter_config.json":
            HfApi().create_repo(repo)
            HfApi().upload_folder(repo_id=repo, folder_path=folder)
            with pytest.raises(ValueError, match=rf"{part}/{name}"):
                load_family(ModelReference(repo))
        (folder / part / name).unlink()


def test_a_config_names_no_file_elsewhere(tmp_path, teacher_folder):
    """Versions of transformers take these names for paths."""
    folder = shutil.copytree(teacher_folder, tmp_path / "teacher")
    outside = (str(tmp_path / "secret"), "../secret", "a\\b", "C:secret", "x\0y")
    cases = [
        *(
            ("tokenizer/tokenizer_config.json", f"{key}_file", outside)
            for key in ("merges", "vocab", "tokenizer", "any")
        ),
        ("text_encoder/config.json", "transformers_weights", outside),
        ("text_encoder/config.json", "text_config", tuple({"transformers_weights": name} for name in outside)),
        ("text_encoder/config.json", "more", tuple([{"x_file": name}] for name in outside)),
        ("unet/config.json", "weights_file", outside[:1]),
    ]
    for name, key, values in cases:
        own = (folder / name).read_text()
        for value in values:
            (folder / name).write_text(json.dumps({**json.loads(own), key: value}))
            with pytest.raises(ValueError, match=f"{name} of the model .* no place inside"):
                load_family(ModelReference(str(folder)))
        (folder / name).write_text(own)
    file = folder / "tokenizer" / "tokenizer_config.json"
    said = {"merges_file": None, "vocab_file": None, "special_tokens_map_file": "/home/them/.cache/map.json"}
    file.write_text(json.dumps({**json.loads(file.read_text()), **said, "name_or_path": "/home/them/model"}))
    load_family(ModelReference(str(folder)))


def test_a_lora_of_the_cache_does_not_lead_out_of_it(tmp_path, alice, repo, impatient):
    """Where the Hub cannot be asked, what lies in the cache is taken, links to its own blobs included."""
    from huggingface_hub import HfApi

    name = "pytorch_lora_weights.safetensors"
    HfApi().create_repo(repo)
    save_file({"x": torch.ones(1)}, tmp_path / name)
    HfApi().upload_file(repo_id=repo, path_in_repo=name, path_or_fileobj=tmp_path / name)
    cache = tmp_path / "cache"
    cached = lora_file(repo, str(cache))
    alice.fault = lambda request: Fault(status=503)
    assert lora_file(repo, str(cache)) == cached
    cached.unlink()
    cached.symlink_to(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}.* leads out"):
        lora_file(repo, str(cache))


def test_a_shard_that_is_pickled_is_not_read(tmp_path, teacher_folder):
    """diffusers tells the format of a shard by its name, whatever the name of the index says."""
    folder = tmp_path / "teacher"
    shutil.copytree(teacher_folder, folder)
    unet = folder / "unet"
    torch.save(load_file(unet / UNET), unet / "x.bin")
    content = {"metadata": {}, "weight_map": dict.fromkeys(load_file(unet / UNET), "x.bin")}
    (unet / UNET).unlink()
    (unet / f"{UNET}.index.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"names 'x\.bin', which is no safetensors file beside it"):
        load_family(ModelReference(str(folder)))
