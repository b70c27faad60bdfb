"""That the real client finds in `HubServer` the Hub that it expects."""

from pathlib import Path

import pytest
from hub_server import Fault
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


WEIGHTS = "unet/w.safetensors"
FILES = {WEIGHTS: b"weights", "a.txt": b"a", "unet/config.json": b"{}"}
KINDS = ("create", "branch", "preupload", "batch", "upload", "verify", "commit", "revision", "tree", "resolve", "cdn")
LARGE_FILE = ["POST preupload", "POST batch", "PUT upload", "POST verify", "POST commit"]


@pytest.fixture
def api(alice):
    """Alice's client."""
    return HfApi()


def commit(api, repo, files=FILES, **arguments):
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    return api.create_commit(repo, operations, commit_message="A message", **arguments)


def asked(hub, start=0):
    """The requests as `POST commit`, without the repository's name."""
    parts = [(request.method, request.path.split("/")) for request in hub.requests[start:]]
    return [f"{method} {next(p for p in reversed(path) if p in KINDS)}" for method, path in parts]


# What is written --------------------------------------------------------------------------------------------------


def test_a_folder_is_uploaded_to_a_branch_with_a_slash(api, hub, repo, tmp_path):
    for path, content in FILES.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(content)
    assert api.create_repo(repo.split("/")[1]).repo_id == repo
    api.create_branch(repo, branch="a/b")
    info = api.upload_folder(repo_id=repo, folder_path=tmp_path, revision="a/b")
    assert asked(hub) == ["POST create", "POST branch", *LARGE_FILE]
    attributes = hub.files(repo)
    assert list(attributes) == [".gitattributes"]
    assert hub.files(repo, "a/b") == {**attributes, **FILES} == hub.files(repo, info.oid)
    refs = {branch.name: branch.target_commit for branch in api.list_repo_refs(repo).branches}
    assert refs == hub.repos[repo].branches and refs["a/b"] == info.oid
    assert hub.snapshot(repo)["a/b"].keys() == {".gitattributes", *FILES}


def test_a_repository_and_a_branch_are_made_once(api, hub, repo):
    api.create_repo(repo, private=True)
    for make in (lambda **k: api.create_repo(repo, **k), lambda **k: api.create_branch(repo, branch="b", **k)):
        make(exist_ok=True)
        with pytest.raises(HfHubHTTPError) as error:
            make()
        assert error.value.response.status_code == 409
    assert hub.repos[repo].private
    api.delete_branch(repo, branch="b")
    assert list(hub.repos[repo].branches) == ["main"]


def test_the_same_content_again_makes_no_commit(api, hub, repo):
    api.create_repo(repo)
    first, start = commit(api, repo), len(hub.requests)
    assert commit(api, repo).oid == first.oid
    assert asked(hub, start) == ["POST preupload", "POST batch", "GET revision"]
    assert len(hub.repos[repo].commits) == 2


def test_a_large_file_that_is_there_is_not_sent_again(api, hub, repo):
    api.create_repo(repo)
    commit(api, repo)
    start = len(hub.requests)
    commit(api, repo, {"other.safetensors": FILES[WEIGHTS], "big.txt": b"0" * (10 * 2**20 + 1)})
    assert asked(hub, start) == LARGE_FILE
    large = {entry.path for entry in api.list_repo_tree(repo, recursive=True) if getattr(entry, "lfs", None)}
    assert large == {WEIGHTS, "other.safetensors", "big.txt"}


def test_files_are_deleted(api, hub, repo):
    api.create_repo(repo)
    commit(api, repo)
    api.create_commit(repo, [CommitOperationDelete("a.txt")], commit_message="Away")
    assert hub.files(repo).keys() == {".gitattributes", *FILES} - {"a.txt"}
    with pytest.raises(EntryNotFoundError):
        api.delete_file("a.txt", repo)
    titles = [commit.title for commit in api.list_repo_commits(repo)]
    assert titles == ["Away", "A message", "initial commit"]


def test_a_commit_on_another_parent_is_refused(api, hub, repo):
    api.create_repo(repo)
    head = hub.repos[repo].branches["main"]
    commit(api, repo, parent_commit=head)
    before = hub.snapshot(repo)
    with pytest.raises(HfHubHTTPError) as error:
        commit(api, repo, {"a.txt": b"b"}, parent_commit=head)
    assert error.value.response.status_code == 412 and hub.snapshot(repo) == before


def test_a_pull_request_leaves_main_alone(api, hub, repo):
    api.create_repo(repo)
    other = HfApi(token=hub.add_user("bob"))
    assert commit(other, repo, create_pr=True).pr_revision == "refs/pr/1"
    assert list(hub.files(repo)) == [".gitattributes"]
    second = commit(api, repo, {"a.txt": b"b"}, revision="refs/pr/1")
    assert hub.repos[repo].pull_requests == {"refs/pr/1": second.oid}
    assert hub.files(repo, "refs/pr/1")["a.txt"] == b"b"
    with pytest.raises(HfHubHTTPError):
        commit(HfApi(token=False), repo, create_pr=True)


# What is read -----------------------------------------------------------------------------------------------------


def test_a_snapshot_of_a_revision(api, hub, repo):
    api.create_repo(repo)
    head = commit(api, repo).oid
    api.create_branch(repo, branch="v1")
    commit(api, repo, {"a.txt": b"later"})
    folder = snapshot_download(repo, revision="v1")
    assert folder.endswith(head)
    assert {path: Path(folder, path).read_bytes() for path in FILES} == FILES
    with pytest.raises(RevisionNotFoundError):
        snapshot_download(repo, revision="v2")


def test_what_is_told_of_a_repository(api, hub, repo):
    api.create_repo(repo)
    commit(api, repo, {**FILES, "README.md": b"---\nlicense: mit\ntags: [x]\n---\n# Hi\n"})
    info = api.model_info(repo)
    assert info.card_data.license == "mit" and info.tags == ["x"]
    entries = {entry.path: entry for entry in api.list_repo_tree(repo, recursive=True)}
    assert entries.keys() == {".gitattributes", "README.md", "unet", *FILES} and entries[WEIGHTS].size == 7
    assert entries[WEIGHTS].lfs.sha256 == hub.snapshot(repo)["main"][WEIGHTS]


# Who may ----------------------------------------------------------------------------------------------------------


def test_what_is_missing_private_or_gated_is_told_by_the_clients_own_errors(api, hub, repo):
    other = HfApi(token=hub.add_user("bob"))
    with pytest.raises(RepositoryNotFoundError):
        api.model_info(repo)
    api.create_repo(repo)
    commit(api, repo)
    with pytest.raises(RevisionNotFoundError):
        api.model_info(repo, revision="nope")
    with pytest.raises(RevisionNotFoundError):
        commit(api, repo, {"b.txt": b"b"}, revision="nope")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(repo, "nope")
    hub.repos[repo].gated = True
    assert other.model_info(repo).gated == "auto"
    with pytest.raises(GatedRepoError):
        other.hf_hub_download(repo, "a.txt")
    hub.repos[repo].private = True
    for stranger in (other, HfApi(token=False)):
        with pytest.raises(RepositoryNotFoundError):
            stranger.model_info(repo)
    assert Path(hf_hub_download(repo, "a.txt")).read_bytes() == b"a"


@pytest.mark.parametrize("who, status", [("bob", 403), (None, 401), ("expired", 401)])
def test_only_the_owner_writes(api, hub, repo, who, status):
    api.create_repo(repo)
    tokens = {"bob": hub.add_user("bob"), None: False, "expired": "hf_expired"}
    before, stranger = hub.snapshot(repo), HfApi(token=tokens[who])
    for change in (
        lambda: stranger.create_repo("alice/theirs"),
        lambda: stranger.create_branch(repo, branch="b"),
        lambda: commit(stranger, repo),
    ):
        with pytest.raises(HfHubHTTPError) as error:
            change()
        assert error.value.response.status_code == status
    assert hub.snapshot(repo) == before and list(hub.repos) == [repo]


# What goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [False, True], ids=["request", "answer"])
def test_a_lost_request_changes_nothing_and_a_lost_answer_does(api, hub, repo, after):
    api.create_repo(repo)
    hub.fault = lambda request: Fault.drop(after) if "/commit/" in request.path and request.changes else None
    with pytest.raises(HTTPError):
        commit(api, repo, {"a.txt": b"a"})
    assert ("a.txt" in hub.files(repo)) == after and hub.requests[-1].status == (200 if after else None)
    hub.fault = None
    commit(api, repo, {"a.txt": b"a"})
    assert len(hub.repos[repo].commits) == 2


@pytest.mark.parametrize("status", [401, 413, 429, 503])
def test_another_answer(api, hub, repo, status):
    api.create_repo(repo)
    headers = {"X-Error-Message": "Not today", "Retry-After": "7"}
    hub.fault = lambda request: Fault(status=status, headers=headers, body={"error": "Come back"})
    with pytest.raises(HfHubHTTPError) as error:
        api.create_branch(repo, branch="b")
    response = error.value.response
    assert (response.status_code, response.json(), response.headers["Retry-After"]) == (
        status,
        {"error": "Come back"},
        "7",
    )
    assert hub.requests[-1].status == status and "b" not in hub.repos[repo].branches


def test_the_client_tries_a_read_again(api, hub, repo, impatient):
    api.create_repo(repo)
    commit(api, repo)
    start, faults = len(hub.requests), iter([Fault(status=503), Fault(status=429, headers={"Retry-After": "1"})])
    hub.fault = lambda request: next(faults, None)
    assert Path(hf_hub_download(repo, "a.txt")).read_bytes() == b"a"
    assert [request.status for request in hub.requests[start:]] == [503, 429, 200, 200]


# Cards ------------------------------------------------------------------------------------------------------------

GOOD_CARD = """---
license: other
license_name: mine
base_model: alice/teacher
base_model_relation: finetune
pipeline_tag: text-to-image
tags:
- diffusers
model-index:
- name: m
  results:
  - task:
      type: text-to-image
    dataset:
      type: d
      name: D
    metrics:
    - type: fid
      value: 1.5
---
# Title
"""


def test_a_good_card_is_accepted(hub):
    ModelCard(GOOD_CARD).validate()
    ModelCard("# Without metadata\n").validate()
    assert [request.path for request in hub.requests] == ["/api/validate-yaml"] * 2


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("license: other", "license: [", "Invalid YAML"),
        ("license: other", "license: my-own", '"license" must be'),
        ("alice/teacher", "/home/alice/teacher", "base_model"),
        ("finetune", "distillation", "base_model_relation"),
        ("pipeline_tag: text-to-image", "pipeline_tag: distillation", "pipeline_tag"),
        ("- diffusers", "- 1", "tags"),
        ("      type: text-to-image", "      name: text-to-image", "task.type"),
        ("    - type: fid", "    - name: fid", "metrics[0].type"),
        ("value: 1.5", "value: [1.5]", "metrics[0].value"),
    ],
)
def test_a_bad_card_is_refused(api, hub, repo, old, new, message):
    assert old in GOOD_CARD
    api.create_repo(repo)
    card = GOOD_CARD.replace(old, new, 1)
    with pytest.raises(ValueError, match="Invalid metadata in README.md") as error:  # ModelCard would leave some out
        commit(api, repo, {"README.md": card.encode(), "a.txt": b"a"})
    assert message in str(error.value)
    assert [request.path for request in hub.requests if request.changes][1:] == ["/api/validate-yaml"]
