"""Nothing of the hub's client waits for ever, though by itself it does."""

from __future__ import annotations

import json

import huggingface_hub
import pushes
import pytest
from fake_hub import Hub
from hub_client import FILES, client
from hub_commands import streamshard
from hub_faults import Stall

from streamshard.checkpoint import hub_client
from streamshard.checkpoint.hub_client import Client
from streamshard.checkpoint.hub_ids import HubId
from streamshard.checkpoint.hub_limits import in_time
from streamshard.errors import InputError


@pytest.fixture
def hub(tmp_path):
    with Hub(tmp_path / "hub") as found:
        found.add_repo("org/base", FILES)
        yield found


@pytest.fixture
def seen():
    """The requests that are sent, each with its limits, of the session that is there then."""
    requests = []

    def watch():
        session = huggingface_hub.get_session()
        hooks = session.event_hooks
        hooks["request"].append(
            lambda r: requests.append((r.method, r.url.path, dict(r.extensions["timeout"])))
        )
        session.event_hooks = hooks
        return requests

    return watch


def test_what_is_asked_has_an_end(hub, tmp_path, monkeypatch, seen):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 7)
    with client(hub, tmp_path / "home"):
        asked = Client(tmp_path / "cache", offline=False)
        asked.repository(HubId("org/base"))  # from here on our own limits come first
        requests = seen()
        repository = asked.repository(HubId("org/base"))
        [file] = [one for one in repository.files() if one.name == "config.json"]
        repository.download(file, lambda _: None)
        assert len(requests) >= 3
        assert all(limits["connect"] and limits["write"] for *_, limits in requests)
        assert {limits["read"] for _, path, limits in requests if "/api/models" in path} == {7.0}

        of_others = len(requests)
        huggingface_hub.HfApi().repo_info("org/base")  # who asks for themselves are left alone
        assert requests[of_others][2]["read"] is None


def test_what_is_sent_has_an_end(tmp_path, monkeypatch, seen):
    """A long one: commits take their time."""
    shop = pushes.new_shop(tmp_path)
    with (
        Hub(tmp_path / "hub") as hub,
        pushes.pushing(shop, hub, tmp_path / "out", monkeypatch) as push,
    ):
        push(push_to="org/first", dtype="fp32")  # other bytes
        requests = seen()
        push()
        assert {method for method, *_ in requests} >= {"GET", "POST", "PUT"}
        assert all(limits["read"] for *_, limits in requests)
        assert {
            limits["read"] for _, path, limits in requests if path.endswith("/commit/main")
        } == {600.0}


def test_a_hub_that_says_nothing(hub, tmp_path):
    hub.fail(Stall(0, 120), path="/api/models/org/base", times=None)
    home = tmp_path / "home"
    got = streamshard(hub, home, "inspect", "org/base", HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert got.code == 9
    assert "its commit could not be got" in got.err
    hub.faults.rules.clear()


class Endless:
    """A list with always one more page."""

    def __init__(self, page: list[dict[str, str]]) -> None:
        self.page = page

    def act(self, state, request, answer):
        reply = answer()
        reply.body = [json.dumps(self.page).encode()]
        reply.headers["Link"] = f'<{state.hub_url}{request.path}?cursor=1>; rel="next"'
        return reply


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ([], "the list of its files does not end, in 50 answers of http"),
        (
            [{"type": "directory", "path": f"f{n}", "oid": "0" * 40} for n in range(9)],
            "more than 40",
        ),
    ],
    ids=["empty", "folders"],
)
def test_a_list_that_does_not_end(page, words, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_client, "MAX_PAGES", 50)
    monkeypatch.setattr(hub_client, "MAX_FILES", 40)
    hub.fail(Endless(page), path="/api/models/org/base/tree/*", times=None)
    with client(hub, tmp_path / "home"):
        repository = Client(tmp_path / "cache", offline=False).repository(HubId("org/base"))
        with pytest.raises(InputError, match=words):
            repository.files()
    hub.faults.rules.clear()


@pytest.mark.parametrize("scheme", ["https", "http"])
def test_a_token_does_not_leave_what_is_encrypted(scheme, hub, tmp_path, monkeypatch):
    """Where a hub of https sends the client on to http."""
    from huggingface_hub import constants

    with client(hub, tmp_path / "home"):
        monkeypatch.setattr(constants, "ENDPOINT", f"{scheme}://hub.example")
        with in_time():
            headers = {"Authorization": f"Bearer {hub.token}"}
            huggingface_hub.get_session().get(f"{hub.url}/api/whoami-v2", headers=headers)
    assert ("Authorization" in hub.requests[-1].headers) == (scheme == "http")
