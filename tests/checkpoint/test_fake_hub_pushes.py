"""The installed huggingface_hub pushes to the local hub by both transports; nothing unchecked gets in."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from fake_hub import Hub
from hub_client import asked, client
from hub_faults import CutUpload, First, LoseAnswer, NoAnswer, Status
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, errors

PART = 1_000_000
SHARDS = {
    "model-1.safetensors": bytes(range(253)) * 10_000,  # three parts
    "model-2.safetensors": b"\7" * PART,  # one body
    "sub/model-3.safetensors": b"short",
}


@pytest.fixture
def hub(tmp_path):
    with Hub(tmp_path / "hub", part_size=PART) as hub:
        yield hub
        assert hub.unused == []


@pytest.fixture(params=[False, True], ids=["lfs", "xet"])
def xet(request):
    return request.param


@pytest.fixture
def api(hub, xet, tmp_path):
    with client(hub, tmp_path / "home", xet=xet) as api:
        api.create_repo("org/new", private=True)
        yield api


@pytest.fixture
def lfs(hub, tmp_path):
    with client(hub, tmp_path / "home") as api:
        api.create_repo("org/new", private=True)
        yield api


def push(api, hub, tmp_path, **how):
    """Shard by shard, each deleted once it is uploaded; one commit at the end."""
    head, operations = hub.head("org/new"), []
    for name, content in SHARDS.items():
        path = tmp_path / "shard"
        path.write_bytes(content)
        operation = CommitOperationAdd(name, str(path))
        api.preupload_lfs_files("org/new", [operation])
        path.unlink()
        operations.append(operation)
        assert hub.head("org/new") == head
    operations.append(CommitOperationAdd("README.md", b"---\nlicense: mit\n---\n# Card"))
    return api.create_commit("org/new", operations, commit_message="all", parent_commit=head, **how)


def contents(hub, revision="main"):
    return {name: blob.read_bytes() for name, blob in hub.files("org/new", revision).items()}


def test_shards_one_by_one_then_one_commit(hub, api, xet, tmp_path):
    first = hub.head("org/new")
    made = push(api, hub, tmp_path)
    assert made.oid == hub.head("org/new")
    assert [commit.message for commit in hub.commits("org/new")] == ["all", "initial commit"]
    assert [c.commit_id for c in api.list_repo_commits("org/new")] == [made.oid, first]
    found = contents(hub)
    assert {*found} == {*SHARDS, "README.md", ".gitattributes"}
    assert {name: found[name] for name in SHARDS} == SHARDS
    assert {*contents(hub, first)} == {".gitattributes"}
    sent = {r.path.split("/")[1] for r in hub.requests if r.method == "PUT"}
    assert sent == (set() if xet else {"upload", "part"})
    tree = api.list_repo_tree("org/new", recursive=True, revision=made.oid)
    digests = {f.path: f.lfs.sha256 for f in tree if getattr(f, "lfs", None)}
    assert digests == {name: hashlib.sha256(c).hexdigest() for name, c in SHARDS.items()}


def test_what_was_pushed_can_be_read(hub, api, xet, tmp_path):
    push(api, hub, tmp_path)
    folder = Path(api.snapshot_download("org/new"))
    assert {name: (folder / name).read_bytes() for name in SHARDS} == SHARDS
    read = [r for r in hub.requests if r.port == "content" and r.method == "GET"]
    assert bool(read) != xet


def test_a_base_offered_by_xet_is_read_by_xet_and_by_http(hub, api, xet):
    hub.add_repo("org/base", SHARDS, xet=True)
    folder = Path(api.snapshot_download("org/base"))
    assert {name: (folder / name).read_bytes() for name in SHARDS} == SHARDS
    assert any(r.port == "content" for r in hub.requests) != xet
    entries = api.get_paths_info("org/base", list(SHARDS))
    assert all(len(entry.xet_hash) == 64 for entry in entries)


def test_nothing_is_sent_twice(hub, lfs, tmp_path):
    push(lfs, hub, tmp_path)
    hub.forget()
    push(lfs, hub, tmp_path)
    assert not [r for r in hub.requests if r.method == "PUT"]


def test_a_head_that_moved(hub, api, tmp_path):
    moved = First(lambda: hub.advance("org/new", {"other.txt": b"of somebody"}))
    hub.fail(moved, "*/commit/main")
    with pytest.raises(errors.HfHubHTTPError) as caught:
        push(api, hub, tmp_path)
    assert caught.value.response.status_code == 412
    assert {*contents(hub)} == {".gitattributes", "other.txt"}


@pytest.mark.parametrize(("fault", "done"), [(LoseAnswer(), True), (NoAnswer(), False)])
def test_a_commit_whose_answer_is_lost(hub, api, tmp_path, fault, done):
    hub.fail(fault, "*/commit/main")
    with pytest.raises(errors.HTTPError):
        push(api, hub, tmp_path)
    assert (contents(hub).keys() >= SHARDS.keys()) == done


def test_uploads_that_fail_midway(hub, lfs, tmp_path):
    """The client tries once more after a 500 and after a connection that broke."""
    hub.fail(CutUpload(1000), "/part/*/2/*", method="PUT")
    hub.fail(Status(500), "/part/*/3/*", method="PUT")
    hub.fail(CutUpload(500_000), "/upload/*", method="PUT")
    push(lfs, hub, tmp_path)
    assert {name: contents(hub)[name] for name in SHARDS} == SHARDS
    cut = [r for r in hub.requests if "CutUpload" in r.faults]
    assert [(r.status, r.received) for r in cut] == [(None, 1000), (None, 500_000)]


def test_an_upload_that_always_fails(hub, lfs, tmp_path):
    hub.fail(Status(403), "/upload/*", method="PUT", times=1)
    with pytest.raises(RuntimeError, match=r"model-2\.safetensors"):
        push(lfs, hub, tmp_path)
    assert {*contents(hub)} == {".gitattributes"}


@pytest.mark.parametrize("body", [b"four", b"wrong", b"longer than that"])
def test_a_body_that_is_not_the_object_is_refused(hub, lfs, body):
    """Nor is its place taken."""
    oid = hashlib.sha256(b"right").hexdigest()
    asks = {"operation": "upload", "objects": [{"oid": oid, "size": 5}], "hash_algo": "sha256"}
    token = {"Authorization": f"Bearer {hub.token}"}
    url = f"{hub.url}/org/new.git/info/lfs/objects/batch"

    def wanted():
        (answer,) = json.loads(asked(url, "POST", json.dumps(asks), **token)[1])["objects"]
        return answer.get("actions", {}).get("upload", {}).get("href")

    assert asked(wanted(), "PUT", body)[0].status == 400
    assert asked(wanted(), "PUT", iter([b"ri", b"ght"]))[0].status == 200  # chunked
    assert wanted() is None


def test_no_commit_of_what_was_not_uploaded(hub, api):
    line = {"path": "m.safetensors", "algo": "sha256", "oid": "0" * 64, "size": 5}
    body = "\n".join(
        json.dumps(line)
        for line in (
            {"key": "header", "value": {"summary": "x", "description": ""}},
            {"key": "lfsFile", "value": line},
        )
    )
    url = f"{hub.url}/api/models/org/new/commit/main"
    answer, said = asked(url, "POST", body, Authorization=f"Bearer {hub.token}")
    assert (answer.status, b"does not exist" in said) == (400, True)
    assert {*contents(hub)} == {".gitattributes"}


def test_files_the_hub_ignores_are_missing_without_a_word(hub, lfs, tmp_path):
    hub.state.ignore = lambda name: name == "model-2.safetensors"
    push(lfs, hub, tmp_path)
    assert SHARDS.keys() - contents(hub).keys() == {"model-2.safetensors"}


def test_deletions_and_pull_requests(hub, lfs, tmp_path):
    push(lfs, hub, tmp_path)
    head = hub.head("org/new")
    operations = [CommitOperationDelete("sub/"), CommitOperationDelete("README.md")]
    made = lfs.create_commit("org/new", operations, commit_message="fewer", create_pr=True)
    assert made.pr_revision == "refs/pr/1"
    assert hub.head("org/new") == head
    refs = lfs.list_repo_refs("org/new", include_pull_requests=True)
    assert [(ref.name, ref.target_commit) for ref in refs.branches] == [("main", head)]
    assert [(r.name, r.target_commit) for r in refs.pull_requests] == [("refs/pr/1", made.oid)]
    names = {*contents(hub, "refs/pr/1")}
    assert names == {".gitattributes", "model-1.safetensors", "model-2.safetensors"}
    assert lfs.resolve_revision("org/new", revision="refs/pr/1").resolved == made.oid


def test_repositories_are_made_once_and_by_their_owners(hub, lfs, tmp_path):
    assert lfs.create_repo("org/new", exist_ok=True).repo_id == "org/new"
    for name, status in (("org/new", 409), ("strangers/new", 403)):
        with pytest.raises(errors.HfHubHTTPError) as caught:
            lfs.create_repo(name)
        assert caught.value.response.status_code == status
    with client(hub, tmp_path / "other", token=False) as nobody:
        with pytest.raises(errors.RepositoryNotFoundError):  # it is private
            nobody.model_info("org/new")
        hub.add_repo("org/open", {"config.json": b"{}"})
        with pytest.raises(errors.HfHubHTTPError) as caught:
            nobody.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="org/open")
        assert caught.value.response.status_code == 401
