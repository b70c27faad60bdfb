"""The path on the Hub: pushed, read, and never lost or overwritten, by the real client over loopback."""

import itertools
import json
import shutil
import threading
import time

import huggingface_hub
import pytest
import stages
import tiny
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from hub_server import Fault
from peft import LoraConfig
from test_path import weights_equal

from diffusers_disback.families import network_name_of
from diffusers_disback.hub import repository
from diffusers_disback.hub.errors import explain
from diffusers_disback.hub.publish.run import push_run
from diffusers_disback.hub.repository import HubError, Repository
from diffusers_disback.models.reference import ModelReference
from diffusers_disback.models.weights import fingerprint
from diffusers_disback.path.path import DegradationPath


@pytest.fixture
def path(tmp_path, teacher_folder):
    return tiny.path(tmp_path / "path", teacher_folder)


# What is on the Hub -------------------------------------------------------------------------------------------------


def test_a_pushed_path_is_read_as_it_was(path, repo, hub):
    assert path.push_to_hub(repo) == repo
    shared = DegradationPath.from_pretrained(repo, teacher=path.teacher)  # only its folder's name is published
    assert [{**node, "branch": None, "commit": None} for node in shared.nodes] == [
        {**node, "branch": None, "commit": None} for node in path.nodes
    ]
    assert [node["branch"] for node in shared.nodes] == ["degradation-000100", "degradation-000200"]
    assert {node["branch"]: node["commit"] for node in shared.nodes}.items() <= Repository(repo).branches().items()
    assert shared.complete and len(shared) == 2
    assert shared.manifest["teacher"] == {**path.manifest["teacher"], "name_or_path": "teacher"}
    for index in (0, 1, 2):
        network = tiny.unet(seed=9)
        shared.load(index, into=network)
        assert weights_equal(network, tiny.unet(seed=index))


def test_a_branch_is_the_degraded_teacher(path, repo, hub, teacher_folder):
    path.push_to_hub(repo)
    branch = "degradation-000200"
    unet = UNet2DConditionModel.from_pretrained(repo, subfolder="unet", revision=branch)
    assert weights_equal(unet, tiny.unet(seed=2))
    pipe = DiffusionPipeline.from_pretrained(repo, revision=branch)
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    expected = tiny.pipeline()
    expected.unet = unet
    images = [
        p("a red circle", num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt").images
        for p in (pipe, expected)
    ]
    assert torch.equal(*images)
    files = hub.files(repo, branch)
    for name in ("model_index.json", "scheduler/scheduler_config.json", "vae/diffusion_pytorch_model.safetensors"):
        assert files[name] == (teacher_folder / name).read_bytes()
    assert json.loads(files["node.json"]) == {**path.nodes[1], "path": path.manifest["id"]}


def test_pushing_again_changes_nothing(path, repo, hub):
    path.push_to_hub(repo)
    before, commits = hub.snapshot(repo), len(hub.repos[repo].commits)
    path.push_to_hub(repo)
    assert hub.snapshot(repo) == before and len(hub.repos[repo].commits) == commits


def test_a_path_that_grows_is_pushed_bit_by_bit(tmp_path, teacher_folder, repo, hub):
    whole = tiny.path(tmp_path / "whole", teacher_folder)
    whole.push_to_hub("alice/in-one-go")
    growing = DegradationPath.create(
        tmp_path / "growing", whole.local_teacher(), fingerprint(tiny.unet()), tiny.START, {}
    )
    growing.manifest["id"] = whole.manifest["id"]
    growing.append(tiny.unet(seed=1), step=100, loss=0.5)
    target = Repository(repo)
    target.create()
    growing.push_nodes(target)
    assert json.loads(hub.files(repo)["path.json"])["nodes"] == [], "main does not list nodes before the path is whole"
    growing.append(tiny.unet(seed=2), step=200, loss=0.5)
    growing.finish(whole.manifest["cost"])
    growing.push_to_hub(repo)
    one, two = hub.snapshot(repo), hub.snapshot("alice/in-one-go")
    assert one.keys() == two.keys()
    assert all(one[branch] == two[branch] for branch in one if branch != "main"), "commits differ on main"


def test_a_private_repository_and_a_pull_request(path, repo, hub):
    path.push_to_hub(repo, private=True, create_pr=True, commit_message="My path")
    assert hub.repos[repo].private
    assert sorted(hub.files(repo)) == [".gitattributes"]
    assert len(json.loads(hub.files(repo, "refs/pr/1")["path.json"])["nodes"]) == 2
    assert hub.repos[repo].commits[Repository(repo).head("refs/pr/1")].message == "My path"
    assert len(DegradationPath.from_pretrained(repo, revision="refs/pr/1")) == 2
    with pytest.raises(HubError, match="is there and is public, but a private one was asked for"):
        Repository("alice/public").create()
        path.push_to_hub("alice/public", private=True)


def test_a_copy_of_a_shared_path_is_the_path(path, repo, tmp_path):
    path.push_to_hub(repo)
    shared = DegradationPath.from_pretrained(repo)
    shared.save_pretrained(tmp_path / "copy")
    copy = DegradationPath.from_pretrained(tmp_path / "copy", teacher=path.teacher)
    copy.verify(tiny.unet())
    for index in (1, 2):
        one, two = (
            {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
            for folder in (path.node_folder(index), copy.node_folder(index))
        )
        assert one == two
    with pytest.raises(ValueError, match="holds a degradation path already"):
        shared.save_pretrained(tmp_path / "copy")
    file = tmp_path / "copy" / "path.json"
    whole = file.read_text()
    content = json.loads(whole)
    content["teacher"]["name_or_path"] = path.teacher.name_or_path  # as somebody else may have written it
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="names .* on this machine as its teacher's"):
        DegradationPath.from_pretrained(tmp_path / "copy").push_to_hub("alice/second-home")
    file.write_text(whole)
    told = DegradationPath.from_pretrained(tmp_path / "copy", teacher=path.teacher)
    told.push_to_hub("alice/second-home")  # and from there on
    assert len(DegradationPath.from_pretrained("alice/second-home")) == 2


def test_a_path_of_others_publishes_no_files_of_this_machine(tmp_path, teacher_folder, hub, alice):
    """A folder that came as an archive names whatever it likes: the user, or the settings of the run that recorded it, have
    to say that it is the teacher."""
    run, name = tmp_path / "run", str(teacher_folder)
    said = {"pretrained_model_name_or_path": name, "seed": 7, "fake_score_learning_rate": 1e-4}
    path = tiny.path(run / "path", teacher_folder, **said)

    def refused(folder):
        with pytest.raises(
            ValueError, match=f"names {name!r} on this machine .* --pretrained_model_name_or_path {name}"
        ):
            push_run(folder, "alice/refused")
        assert "alice/refused" not in hub.repos

    with pytest.raises(ValueError, match=f"names {name!r} on this machine"):
        DegradationPath.from_pretrained(run / "path").push_to_hub("alice/refused")
    assert "alice/refused" not in hub.repos
    settings = run / "settings" / "degradation.json"
    settings.parent.mkdir()
    for content in (
        None,
        {},
        {**said, "seed": 8},
        {**said, "pretrained_model_name_or_path": f"{name}-2"},
        {**said, "pretrained_vae_model_name_or_path": name},
    ):
        settings.unlink(missing_ok=True)
        if content is not None:
            settings.write_text(json.dumps(content))
        refused(run / "path")
        refused(run)
    settings.write_text(json.dumps({**said, "fake_score_learning_rate": 2e-4}))  # a run may be resumed at another rate
    manifest = json.loads((run / "path" / "path.json").read_text())
    other = {**manifest, "teacher": {**manifest["teacher"], "vae": name}}
    (run / "path" / "path.json").write_text(json.dumps(other))
    refused(run / "path")
    (run / "path" / "path.json").write_text(json.dumps(manifest))
    for number, folder in enumerate((run, run / "path")):
        push_run(folder, f"alice/told-{number}")
    shutil.copytree(run / "path", tmp_path / "theirs")
    refused(tmp_path / "theirs")
    push_run(tmp_path / "theirs", "alice/told-3", teacher=path.teacher)
    for number in (0, 1, 3):
        assert "text_encoder/model.safetensors" in hub.files(f"alice/told-{number}", "degradation-000200")


def test_an_adapter_node(tmp_path, teacher_folder, repo):
    def adapted(seed):
        network = tiny.unet()
        torch.manual_seed(seed)
        network.add_adapter(
            LoraConfig(
                r=2, lora_alpha=4, target_modules=["to_q", "to_k", "conv1", "proj_in"], init_lora_weights=False
            ),
            adapter_name="fake_score",
        )
        return network

    path = DegradationPath.create(
        tmp_path / "path", ModelReference(str(teacher_folder)).resolve(network_name_of), "0" * 64, tiny.START, {}
    )
    path.append(adapted(1), step=100, loss=0.5, adapter="fake_score")
    path.finish({"steps": 100, "seconds": 1.0, "peak_memory_mb": 1.0})
    path.push_to_hub(repo)
    shared = DegradationPath.from_pretrained(repo)
    assert shared.nodes[0]["kind"] == "adapter" and shared.nodes[0]["bytes"] < 100_000
    shared.verify(path.teacher.resolve_configs(network_name_of).meta_network())
    network = adapted(2)
    shared.load(1, into=network, adapter="fake_score")
    assert weights_equal(network, adapted(1))
    stock = tiny.unet()
    stock.load_lora_adapter(repo, revision="degradation-000100", subfolder="unet", prefix=None, use_safetensors=True)
    x, t, c = torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 3, tiny.WIDTH)
    assert torch.equal(stock(x, t, c).sample, adapted(1)(x, t, c).sample)
    assert not torch.equal(stock(x, t, c).sample, tiny.unet()(x, t, c).sample)
    with pytest.raises(ValueError, match="is of kind 'adapter', but adapter=None is to be filled"):
        shared.load(1, into=tiny.unet())
    wider = tiny.unet(block_out_channels=(8, 24))
    with pytest.raises(ValueError, match="does not fit: it adapts .* It belongs to another architecture"):
        shared.verify(wider)
    foreign = tiny.unet(layers_per_block=2)
    foreign.add_adapter(LoraConfig(r=3, target_modules=["to_q"]), adapter_name="fake_score")
    with pytest.raises(ValueError, match="does not fit"):
        shared.load(1, into=foreign, adapter="fake_score")


# Nothing is overwritten ---------------------------------------------------------------------------------------------


def test_a_repository_of_something_else_is_left_alone(path, repo, hub, tmp_path, teacher_folder):
    path.push_to_hub(repo)
    other = tiny.path(tmp_path / "other", teacher_folder, seed=1)
    for name, files in [
        ("alice/model", {"model_index.json": b"{}"}),
        ("alice/page", {"README.md": b"---\nlicense: mit\n---\n# My page"}),
        ("alice/json", {"path.json": b"[1]"}),
    ]:
        Repository(name).create()
        Repository(name).commit(files, "Mine")
    for target, message in [
        (repo, "holds another degradation path: .*its seed is None, this one's is 1"),
        ("alice/model", "holds model_index.json, which this run did not put there"),
        ("alice/page", "holds README.md, which this run did not put there"),
        ("alice/json", "has format version None; this library reads 1 and 2. Nothing was overwritten"),
    ]:
        before = hub.snapshot(target)
        with pytest.raises(HubError, match=message):
            other.push_to_hub(target)
        assert hub.snapshot(target) == before
    Repository("alice/fresh").create()
    Repository("alice/fresh").commit(
        {"README.md": b"---\nlicense: mit\n---\n", "LICENSE": b"MIT"}, "As the website does"
    )
    other.push_to_hub("alice/fresh")


def test_a_branch_of_something_else_is_left_alone(path, repo, hub):
    target = Repository(repo)
    target.create()
    target.create_branch("degradation-000200")
    target.commit({"mine.txt": b"mine"}, "Mine", branch="degradation-000200")
    with pytest.raises(
        HubError, match="The branch degradation-000200 .* holds something else .*hf repos branch delete"
    ):
        path.push_to_hub(repo)
    assert "mine.txt" in hub.files(repo, "degradation-000200")
    assert json.loads(hub.files(repo)["path.json"])["nodes"] == []


def test_a_node_that_somebody_changed_is_not_overwritten(path, repo, hub):
    path.push_to_hub(repo)
    weights = "unet/diffusion_pytorch_model.safetensors"
    Repository(repo).commit({weights: b"changed"}, "Change", branch="degradation-000100")
    with pytest.raises(HubError, match="The branch degradation-000100 .* holds something else"):
        path.push_to_hub(repo)
    assert hub.files(repo, "degradation-000100")[weights] == b"changed"


def test_what_others_add_to_a_branch_stays(path, repo, hub):
    path.push_to_hub(repo)
    Repository(repo).commit({"README.md": b"A note."}, "Note", branch="degradation-000100")
    path.push_to_hub(repo)
    assert hub.files(repo, "degradation-000100")["README.md"] == b"A note."


def test_a_recording_that_was_resumed_replaces_its_own_node(path, repo, hub):
    """A run that goes on from a checkpoint before a node records it anew; on a GPU with other bytes."""
    path.manifest["complete"] = False
    target = Repository(repo)
    target.create()
    path.push_nodes(target)
    path.begin(100)
    path.append(tiny.unet(seed=7), step=200, loss=0.5)
    path.finish({"steps": 200, "seconds": 1.0, "peak_memory_mb": 1.0})
    path.push_to_hub(repo)
    network = tiny.unet()
    DegradationPath.from_pretrained(repo).load(2, into=network)
    assert weights_equal(network, tiny.unet(seed=7))
    path.begin(100)
    path.append(tiny.unet(seed=8), step=200, loss=0.5)
    with pytest.raises(HubError, match="holds something else"):  # it is published
        path.push_to_hub(repo)


def test_a_node_that_appears_between_look_and_commit_is_not_overwritten(
    repo, hub, tmp_path, teacher_folder, impatient
):
    """Two recordings with equal settings and other bytes, neither of which has claimed `main`."""
    one = tiny.path(tmp_path / "one", teacher_folder)
    two = DegradationPath.create(tmp_path / "two", one.local_teacher(), fingerprint(tiny.unet()), tiny.START, {})
    two.append(tiny.unet(seed=9), step=100, loss=0.5)

    def other_first(request):
        if "/preupload/degradation-000100" in request.path:
            hub.fault = None
            two.push_to_hub(repo, create_pr=True)

    hub.fault = other_first
    with pytest.raises(HubError, match="The branch degradation-000100 .* holds something else"):
        one.push_to_hub(repo, create_pr=True)
    assert json.loads(hub.files(repo, "degradation-000100")["node.json"])["path"] == two.manifest["id"]


def test_a_private_teacher_does_not_become_public(repo, hub, tmp_path, teacher_folder):
    target = Repository("alice/private-teacher")
    target.create(private=True)
    files = {f.relative_to(teacher_folder).as_posix(): f for f in teacher_folder.rglob("*") if f.is_file()}
    target.commit(files, "A teacher")
    path = tiny.path(tmp_path / "path", teacher_folder)
    path.teacher = ModelReference("alice/private-teacher")
    with pytest.raises(HubError, match="alice/private-teacher is private, but .* is public"):
        path.push_to_hub(repo)
    assert sorted(hub.snapshot(repo)) == ["main"]
    path.push_to_hub(f"{repo}-too", private=True)
    path.teacher = ModelReference(str(teacher_folder), vae="alice/private-teacher")
    with pytest.raises(HubError, match="alice/private-teacher is private, but .* is public"):
        path.push_to_hub(f"{repo}-autoencoder")


def test_two_runs_at_once_do_not_mix(repo, hub, tmp_path, teacher_folder):
    paths = [tiny.path(tmp_path / str(seed), teacher_folder, seed=seed) for seed in (1, 2)]
    problems, start = [], threading.Barrier(2)

    def push(path):
        start.wait()
        try:
            path.push_to_hub(repo)
        except HubError as error:
            problems.append(str(error))

    threads = [threading.Thread(target=push, args=(path,)) for path in paths]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(problems) == 1 and "holds another degradation path: its seed is" in problems[0]
    DegradationPath.from_pretrained(repo).verify(tiny.unet())


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format_version": 3}, "has format version 3; this library reads 1 and 2. Update"),
        ({"format_version": "new"}, "has format version 'new'; this library reads 1 and 2"),
        ({"nodes": [{}]}, "names node 1 as {}, which is none"),
        ({"teacher": None}, "is not as its format says"),
        ({"nodes/files": ["a"]}, "without files"),
        ({"cost": {}}, "is not as its format says: 'steps' is missing"),
        (
            {"nodes/step": 300, "nodes/name": "degradation-000300", "nodes/branch": "degradation-000300"},
            "after step 300",
        ),
        ({"nodes/step": 150}, "names are like degradation-000200, where 200 is the step"),
        ({"nodes/name": "../../etc"}, "names node 1 '../../etc'"),
        ({"nodes/files": {"../../x.safetensors": "0" * 64}}, "with the file '../../x.safetensors'"),
        ({"nodes/files": {"x.bin": "0" * 64}}, "with the file 'x.bin'"),
        ({"nodes/files": {}}, "without files"),
        ({"nodes/kind": "pickle"}, "of kind 'pickle'"),
        ({"nodes/branch": "main"}, "at branch 'main'"),
        ({"nodes/commit": "main"}, "commit 'main'"),
        ({"nodes/dtype": "float16"}, "is torch.float32, not float16"),
        ({"nodes/files": {"diffusion_pytorch_model.safetensors": "0" * 64}}, "node 1 is damaged"),
        ({"nodes/files": {"other.safetensors": "0" * 64}}, "node 1 is incomplete"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_a_manifest_that_cannot_be(path, repo, hub, change, message):
    path.push_to_hub(repo)
    manifest = json.loads(hub.files(repo)["path.json"])
    for key, value in change.items():
        place = manifest["nodes"][0] if "/" in key else manifest
        place[key.split("/")[-1]] = value
    Repository(repo).commit({"path.json": json.dumps(manifest).encode()}, "Change")
    network = tiny.unet(seed=9)
    with pytest.raises(ValueError, match=message):
        DegradationPath.from_pretrained(repo).load(1, into=network)
    assert weights_equal(network, tiny.unet(seed=9)), "nothing is half loaded"


def test_repositories_that_give_no_path(path, repo, hub, monkeypatch):
    Repository(repo).create()
    with pytest.raises(ValueError, match="holds no degradation path: it has no path.json at main"):
        DegradationPath.from_pretrained(repo)
    with pytest.raises(HubError, match="has no such branch, tag or commit"):
        DegradationPath.from_pretrained(repo, revision="nothing")
    with pytest.raises(HubError, match="alice/nowhere"):
        DegradationPath.from_pretrained("alice/nowhere")
    path.push_to_hub("alice/gated")
    hub.repos["alice/gated"].gated = True
    path.push_to_hub("alice/private", private=True)
    monkeypatch.setenv("HF_TOKEN", hub.add_user("bob"))
    with pytest.raises(HubError, match="alice/gated is gated: accept its conditions at"):
        DegradationPath.from_pretrained("alice/gated")
    with pytest.raises(HubError, match="alice/private"):
        DegradationPath.from_pretrained("alice/private")
    with pytest.raises(HubError, match="is no name of a repository"):
        path.push_to_hub("alice/a/b")


def test_a_folder_does_not_ignore_a_revision(path):
    with pytest.raises(ValueError, match="is a folder, which has no revisions, but revision 'main' is asked for"):
        DegradationPath.from_pretrained(path.folder, revision="main")
    with pytest.raises(ValueError, match=f"Did you mean {path.folder}"):
        DegradationPath.from_pretrained(path.folder.parent)


def test_branches_that_moved_or_are_gone(path, repo, hub, caplog):
    path.push_to_hub(repo)
    weights = "unet/diffusion_pytorch_model.safetensors"
    Repository(repo).commit({weights: b"changed"}, "Move", branch="degradation-000100")
    network = tiny.unet(seed=9)
    DegradationPath.from_pretrained(repo).load(1, into=network)
    assert "The branch degradation-000100" in caplog.text and "has moved" in caplog.text
    assert weights_equal(network, tiny.unet(seed=1)), "the published commit is used"
    repository.Repository(repo).api.delete_branch(repo, branch="degradation-000200")
    with pytest.raises(HubError, match="lists the node degradation-000200, but the branch is gone"):
        DegradationPath.from_pretrained(repo)


def test_a_node_that_was_damaged_on_the_way(path, repo):
    path.push_to_hub(repo)
    shared = DegradationPath.from_pretrained(repo)
    file = shared.node_folder(1) / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.resolve().write_bytes(content)
    network = tiny.unet(seed=9)
    with pytest.raises(ValueError, match="node 1 is damaged"):
        shared.load(1, into=network)
    assert weights_equal(network, tiny.unet(seed=9))


def test_a_shared_path_cannot_be_recorded_on(path, repo):
    path.push_to_hub(repo)
    with pytest.raises(ValueError, match="lies on the Hub and cannot be recorded on"):
        DegradationPath.from_pretrained(repo).append(tiny.unet(), step=300, loss=0.5)


# Uploading that never loses -----------------------------------------------------------------------------------------


def main_and_nodes(hub, repo_id):
    """All of a repository, but for the commits' names in `path.json`."""
    snapshot = hub.snapshot(repo_id)
    manifest = json.loads(hub.files(repo_id)["path.json"])
    for node in manifest["nodes"]:
        assert hub.repos[repo_id].branches[node["branch"]] == node.pop("commit")
    return snapshot | {"main": {**snapshot["main"], "path.json": json.dumps(manifest)}}


@pytest.mark.parametrize(
    "lost", [pytest.param("before", marks=pytest.mark.slow), "after"], ids=["no-request", "no-answer"]
)
def test_an_outage_at_any_request_loses_and_doubles_nothing(path, repo, hub, impatient, lost):
    """The Hub goes down at request k, which it may still have served, and stays down until the push has failed."""
    path.push_to_hub(repo)
    whole, number = main_and_nodes(hub, repo), len(hub.requests)
    kinds = {request.path.split("/")[-2] for request in hub.requests if request.changes}
    assert {"commit", "branch", "preupload", "objects"} <= kinds and number > 20
    for k in itertools.count():
        hub.repos.clear()
        hub.blobs.clear()
        hub.requests.clear()
        hub.fault = lambda request, k=k: (
            None if request.number < k else Fault(lost=lost if request.number == k else "before")
        )
        try:
            path.push_to_hub(repo)
        except HubError as error:
            assert "The Hub cannot be reached for" in str(error)
        else:
            break  # request k was not needed: what is in the client's cache is not asked for
        hub.fault = None
        path.push_to_hub(repo)
        assert main_and_nodes(hub, repo) == whole, f"request {k}: {hub.requests[k]}"
        commits = len(hub.repos[repo].commits)
        path.push_to_hub(repo)
        assert len(hub.repos[repo].commits) == commits
    assert number - 3 <= k <= number


@pytest.mark.parametrize(
    "fault, retried, message",
    [
        (Fault(status=503), True, "cannot serve .* now .status 503."),
        (Fault(status=429, headers={"Retry-After": "7"}), True, "cannot serve .* now .status 429."),
        (Fault(lost="before"), True, "cannot be reached"),
        (Fault(status=401), False, "the token has expired or is missing. Log in with `hf auth login`"),
        (Fault(status=403), False, "This token has no right to do this with"),
        (Fault(status=403, headers={"X-Error-Message": "You exceeded your storage quota"}), False, "a quota or limit"),
        (Fault(status=412), False, "was changed by somebody else at the same time"),
        (Fault(status=413), False, "a quota or limit"),
        (Fault(status=418), False, "The Hub refused .* .status 418."),
    ],
    ids=["503", "429", "dropped", "401", "403", "quota", "412", "413", "418"],
)
def test_what_may_pass_is_tried_again_and_what_does_not_is_told(path, repo, hub, impatient, fault, retried, message):
    broken = [10**6]

    def commits_fail(request):
        if "/commit/degradation-000200" in request.path and broken[0] > 0:
            broken[0] -= 1
            return fault

    hub.fault = commits_fail
    with pytest.raises(HubError, match=message):
        path.push_to_hub(repo)
    broken[0] = 2
    if retried:
        path.push_to_hub(repo)
        DegradationPath.from_pretrained(repo).verify(tiny.unet())


def test_a_namespace_of_somebody_else(path, hub, monkeypatch, repo, impatient):
    Repository("alice/owned").create()
    monkeypatch.setenv("HF_TOKEN", hub.add_user("bob"))
    for target in ("alice/owned", "alice/new"):
        with pytest.raises(
            HubError, match=f"This token has no right to do this with {target}: it belongs to somebody else"
        ):
            path.push_to_hub(target)
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    with pytest.raises(HubError, match="the token has expired or is missing"):
        path.push_to_hub("alice/owned")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="Log in with `hf auth login`"):
        path.push_to_hub("alice/owned")


def test_a_branch_holds_the_teacher_even_if_main_holds_the_student(path, repo, hub, teacher_folder):
    path.push_to_hub(repo)
    before = hub.files(repo, "degradation-000200")
    target = Repository(repo)
    target.commit(
        {"scheduler/scheduler_config.json": b"{}", "unet/config.json": b"{}", "pipeline.py": b"1"}, "Student"
    )
    target.api.delete_branch(repo, branch="degradation-000200")
    path.push_to_hub(repo)
    assert hub.files(repo, "degradation-000200") == before
    assert hub.files(repo)["pipeline.py"] == b"1"


# Nodes come when they are needed ------------------------------------------------------------------------------------


class Slow:
    """A Hub that takes its time over the weights of nodes."""

    def __init__(self, hub, seconds):
        hub.fault = lambda request: (
            Fault(seconds=seconds) if request.method == "GET" and request.path.endswith(".safetensors") else None
        )


def replay_with_sleeps(shared, hub, tmp_path, seconds_per_node, steps, seconds_per_step, after_switch=lambda: None):
    """The waits of stage 2's own switches, with a sleep in a step's place."""
    Slow(hub, seconds_per_node)
    trainer = stages.trainer(
        stages.training(tmp_path / "run"), shared, max_train_steps=steps * len(shared), steps_per_target=steps
    )
    logged = []
    trainer.accelerator.log = lambda values, step: logged.append(values["backtracking/seconds_waited_for_node"])
    for step in range(trainer.steps):
        trainer.switch_target(step)
        if step % steps == 0:
            node = trainer.schedule.node(step)
            assert weights_equal(trainer.target.network, tiny.unet(seed=node))
            after_switch()
        time.sleep(seconds_per_step)
    assert [wait["node"] for wait in trainer.waits] == list(range(len(shared) - 1, -1, -1))
    assert logged == pytest.approx([wait["seconds"] for wait in trainer.waits], abs=1e-3)
    return [wait["seconds"] for wait in trainer.waits]


def test_the_next_node_is_fetched_while_training_goes_on(tmp_path, teacher_folder, repo, hub):
    tiny.path(tmp_path / "path", teacher_folder, nodes=4).push_to_hub(repo)
    waits = replay_with_sleeps(
        DegradationPath.from_pretrained(repo, None, ModelReference(str(teacher_folder))), hub, tmp_path, 1.0, 25, 0.06
    )
    assert waits[0] > 0.5, "nothing can be done before the first"
    assert max(waits[1:]) <= 0.2


@pytest.mark.slow
def test_a_hub_that_takes_five_seconds_over_a_node(tmp_path, teacher_folder, repo, hub):
    tiny.path(tmp_path / "path", teacher_folder, nodes=4).push_to_hub(repo)
    waits = replay_with_sleeps(
        DegradationPath.from_pretrained(repo, None, ModelReference(str(teacher_folder))), hub, tmp_path, 5.0, 50, 0.2
    )
    print(waits)
    assert max(waits[1:]) <= 0.2


def test_the_disk_budget_evicts_what_is_behind(tmp_path, teacher_folder, repo, hub):
    from huggingface_hub import scan_cache_dir

    tiny.path(tmp_path / "path", teacher_folder, nodes=5).push_to_hub(repo)
    cache = tmp_path / "cache"
    size = DegradationPath.from_pretrained(repo, cache_dir=cache).nodes[0]["bytes"] / 1e9
    with pytest.raises(ValueError, match="A disk budget of .* does not hold two nodes"):
        DegradationPath.from_pretrained(repo, cache_dir=cache, disk_budget_gb=1.5 * size)
    DegradationPath.from_pretrained(repo, cache_dir=cache).read(4)  # somebody else's: it stays
    teacher = ModelReference(str(teacher_folder))
    shared = DegradationPath.from_pretrained(repo, None, teacher, cache, disk_budget_gb=2.5 * size)

    def cached():
        (found,) = scan_cache_dir(cache).repos
        commits = {revision.commit_hash for revision in found.revisions}
        return [i for i, node in enumerate(shared.nodes, 1) if node["commit"] in commits]

    seen = []

    def settled():
        for coming in shared._coming.values():
            coming.result()
        seen.append(cached())

    replay_with_sleeps(shared, hub, tmp_path, 0.0, 1, 0.0, settled)
    assert seen == [[3, 4, 5], [2, 3, 4], [1, 2, 4], [1, 2, 4], [1, 2, 4]], "two besides the one that was there"


def test_a_resumed_run_downloads_only_what_it_needs_and_evicts_what_it_brought(tmp_path, teacher_folder, repo, hub):
    tiny.path(tmp_path / "path", teacher_folder, nodes=4).push_to_hub(repo)
    cache, settings = tmp_path / "cache", {"max_train_steps": 4, "steps_per_target": 1, "fake_score_updates": 1}

    def shared():
        return DegradationPath.from_pretrained(
            repo, None, ModelReference(str(teacher_folder)), cache, disk_budget_gb=1
        )

    broken = stages.trainer(stages.training(tmp_path / "run", checkpointing_steps=1), shared(), **settings)
    broken.train_step = stages.interrupted_at(2, broken.train_step)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    for folder in cache.rglob("snapshots"):
        shutil.rmtree(folder)
    before = len(hub.requests)
    config = stages.training(tmp_path / "run", checkpointing_steps=1, resume_from_checkpoint="latest")
    again = stages.trainer(config, shared(), **settings)
    again.train()
    weights = [request.path for request in hub.requests[before:] if request.path.endswith(".safetensors")]
    commits = {path.split("/")[-3] for path in weights}
    assert commits == {again.path.nodes[0]["commit"]}, "nodes 4, 3 and 2 are behind"
    assert {"degradation-000400", "degradation-000300"} <= set(again.path.folders.downloaded)


def test_a_node_that_could_not_be_fetched_ahead_is_fetched_then(path, repo, hub, impatient):
    path.push_to_hub(repo)
    shared = DegradationPath.from_pretrained(repo)
    hub.fault = lambda request: Fault(lost="before")
    shared.prefetch(1)
    with pytest.raises(HubError):
        shared._coming[1].result()
    hub.fault = None
    network = tiny.unet(seed=9)
    shared.load(1, into=network)
    assert weights_equal(network, tiny.unet(seed=1))


@pytest.mark.parametrize("how", ["offline", "unreachable"])
def test_a_path_that_is_in_the_cache_needs_no_hub(path, repo, hub, impatient, monkeypatch, how, caplog):
    path.push_to_hub(repo)
    shared = DegradationPath.from_pretrained(repo)
    for index in (1, 2):
        shared.read(index)
    if how == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.fault = lambda request: Fault(lost="before")
    for revision in (None, shared.folders.commit):
        again = DegradationPath.from_pretrained(repo, revision=revision)
        again.load(2, into=tiny.unet())
    assert "is not known" in caplog.text
    with pytest.raises(HubError, match="HF_HUB_OFFLINE forbids" if how == "offline" else "cannot be reached"):
        DegradationPath.from_pretrained("alice/not-in-the-cache")


@pytest.mark.parametrize(
    "error, kind, message",
    [
        (OSError(28, "No space left on device"), None, "no space left on this machine's disk"),
        (RuntimeError("Data processing error: No space left on device"), None, "no space left"),
        (OSError("Consistency check failed: file should be of size 1 but has size 0"), "unreachable", "be reached"),
        (PermissionError("Xet authentication failed"), "cache", "cannot be written to or read"),
        (RuntimeError("Data processing error at https://storage/x?signature=secret"), "unreachable", "error at ..."),
        (TimeoutError("timed out"), "unreachable", "cannot be reached"),
    ],
    ids=str,
)
def test_errors_of_this_machine_and_of_the_storage(error, kind, message):
    problem = explain(error, "alice/x")
    assert problem.kind == (kind or str(problem)) and message in str(problem) and "secret" not in str(problem)
