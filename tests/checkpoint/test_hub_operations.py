"""The installed client takes what `hub_operations` makes: its private fields mean what we think."""

from __future__ import annotations

import hashlib

import pytest
from hub_client import client

from streamshard.checkpoint.hub_operations import (
    addition,
    deletion,
    is_left_out,
    is_uploaded,
    uploaded,
)
from streamshard.checkpoint.sent_files import SentFile, described

CONTENT = bytes(range(249)) * 4000


@pytest.fixture(params=[False, True], ids=["lfs", "xet"])
def xet(request):
    return request.param


@pytest.fixture
def api(hub, xet, tmp_path):
    with client(hub, tmp_path / "home", xet=xet) as api:
        api.create_repo("org/new")
        yield api


def file_at(path, name="model.safetensors", content=CONTENT):
    path.write_bytes(content)
    sha256 = hashlib.sha256(content).hexdigest()
    file = described(path, name, sha256)
    assert file == SentFile(name, len(content), sha256, content[:512])
    assert SentFile.from_record(file.record()) == file
    return file


def test_a_file_that_is_gone_is_committed(hub, api, xet, tmp_path):
    """By an operation that an earlier process might have made: nothing is sent again."""
    path = tmp_path / "shard"
    file = file_at(path)
    operation = addition(file, path)
    assert operation.upload_info.is_hashed
    api.preupload_lfs_files("org/new", [operation], free_memory=False)
    assert is_uploaded(operation)
    assert not is_left_out(operation)
    path.unlink()
    hub.forget()
    api.create_commit("org/new", [uploaded(file)], commit_message="all")
    assert hub.files("org/new")["model.safetensors"].read_bytes() == CONTENT
    asked = {(r.method, r.path.rpartition("/")[2]) for r in hub.requests}
    assert ("PUT", str(len(CONTENT))) not in asked
    assert ("POST", "batch") not in asked


def test_a_small_file_goes_with_the_commit(hub, api, tmp_path):
    path = tmp_path / "config.json"
    operation = addition(file_at(path, "config.json", b"{}"), path)
    api.preupload_lfs_files("org/new", [operation], free_memory=False)
    assert not is_uploaded(operation)
    api.create_commit("org/new", [operation], commit_message="all")
    assert hub.files("org/new")["config.json"].read_bytes() == b"{}"


def test_what_the_hub_leaves_out_is_known(hub, api, tmp_path):
    hub.state.ignore = lambda name: name == "model.safetensors"
    path = tmp_path / "shard"
    operation = addition(file_at(path), path)
    api.preupload_lfs_files("org/new", [operation], free_memory=False)
    assert is_left_out(operation)
    assert not is_uploaded(operation)


def test_a_file_is_removed(hub, api):
    hub.advance("org/new", {"old.safetensors": b"x"})
    api.create_commit("org/new", [deletion("old.safetensors")], commit_message="fewer")
    assert "old.safetensors" not in hub.files("org/new")


def test_git_and_lfs_digests_are_those_of_the_hub(hub, tmp_path):
    for name in ("config.json", "model.safetensors"):
        path = tmp_path / name
        path.write_bytes(b"some content")
        file = described(path, name)
        hub.add_repo(f"org/{name}", {name: path})
        blob = hub.files(f"org/{name}")[name]
        expected = f"sha256:{blob.sha256}" if blob.lfs else f"git:{blob.oid}"
        assert expected in file.digests
