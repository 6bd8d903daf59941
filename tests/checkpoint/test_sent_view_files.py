"""Files of the hub that are sent to another process: the same there, in its cache or by ranges."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from fake_hub import Hub
from hub_client import BIG, FILES, client

from streamshard.checkpoint.hub import View
from streamshard.checkpoint.hub_client import Client
from streamshard.checkpoint.hub_ids import HubId

NAME = "model.safetensors"


@pytest.fixture
def hub(tmp_path):
    with Hub(tmp_path / "hub") as hub:
        hub.add_repo("org/base", FILES)
        with client(hub, tmp_path / "home"):
            yield hub


def sent(tmp_path: Path, *, cache: Path | None = None, stream: bool = False):
    view = View(
        HubId("org/base"), Client.of(cache, offline=False), tmp_path / "view", stream=stream
    )
    file = view.files[NAME]
    again = pickle.loads(pickle.dumps(file))
    view.close()
    assert (again.name, again.digest, again.nbytes) == (file.name, file.digest, file.nbytes)
    return file, again


def content(file) -> bytes:
    with file.open(None, spare=False) as opened:
        return opened.read(0, opened.nbytes)


def test_it_is_read_by_ranges_and_nothing_is_put_here(hub, tmp_path):
    file, again = sent(tmp_path, stream=True)
    file.path.unlink()
    assert again.unreachable(ask=True) == ""
    assert content(again) == BIG
    assert not file.path.exists()
    assert again.described()["checked"]


def test_it_must_be_in_the_cache_unless_it_is_streamed(hub, tmp_path):
    file, again = sent(tmp_path, cache=tmp_path / "cache")
    said = again.unreachable(ask=False)
    assert f"does not see org/base@{hub.head('org/base')}/{NAME}" in said
    assert f"cache {tmp_path / 'cache'}: give a cache on a disk that all machines share" in said
    file.fetch(lambda _: None)
    hub.forget()
    again = pickle.loads(pickle.dumps(file))
    assert again.unreachable(ask=True) == ""
    assert content(again) == BIG
    assert not hub.requests


def test_without_access_it_says_so(hub, tmp_path):
    from hub_faults import Status

    _, again = sent(tmp_path, stream=True)
    hub.fail(Status(403, code="GatedRepo"), path="*/resolve/*", times=None)
    assert again.unreachable(ask=False) == ""
    said = again.unreachable(ask=True)
    assert said.startswith("it cannot read org/base@")
    assert "is gated" in said
    assert said.endswith(", where it is started")
