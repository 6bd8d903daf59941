"""Faults of the local hub are those asked for, of the request asked for, and no more."""

from __future__ import annotations

import http.client
import time
from pathlib import Path

import pytest
from fake_hub import Hub
from hangs import HANGS
from hub_client import BIG, FILES, asked, client, link
from hub_faults import (
    Drop,
    Entry,
    Expire,
    First,
    Flip,
    Headers,
    Long,
    NoAnswer,
    OtherBytes,
    Short,
    Slow,
    Stall,
    Status,
    Whole,
    WrongRange,
)
from huggingface_hub import constants, errors

START, STOP = 1_000_000, 2_000_000
PART = BIG[START:STOP]
SPAN = f"bytes {START}-{STOP - 1}/{len(BIG)}"


@pytest.fixture
def hub(tmp_path):
    with Hub(tmp_path / "hub") as hub:
        hub.add_repo("org/base", FILES)
        yield hub
        assert hub.unused == []


@pytest.fixture
def api(hub, tmp_path):
    with client(hub, tmp_path / "home") as api:
        yield api


def flipped(content, at, mask=1):
    return content[:at] + bytes([content[at] ^ mask]) + content[at + 1 :]


@pytest.mark.parametrize(
    ("fault", "status", "span", "length", "body"),
    [
        (Drop(0), 206, SPAN, len(PART), b""),
        (Drop(1), 206, SPAN, len(PART), PART[:1]),
        (Drop(777_777), 206, SPAN, len(PART), PART[:777_777]),
        (Whole(), 200, None, len(BIG), BIG),
        (WrongRange(), 206, f"bytes {START + 1}-{STOP}/{len(BIG)}", len(PART), PART),
        (Headers({"Content-Range": None}), 206, None, len(PART), PART),
        (OtherBytes(3), 206, SPAN, len(PART), BIG[START + 3 : STOP + 3]),
        (Short(10), 206, SPAN, len(PART) - 10, PART[:-10]),
        (Long(10), 206, SPAN, len(PART) + 10, PART + b"\xff" * 10),
        (Flip(0), 206, SPAN, len(PART), flipped(PART, 0)),
        (Flip(999_999, 128), 206, SPAN, len(PART), flipped(PART, 999_999, 128)),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else str(value),
)
def test_a_body_that_is_wrong(hub, fault, status, span, length, body):
    url = link(hub)
    hub.fail(fault, "*/model.safetensors", port="content", nth=2)
    found = [asked(url, Range=f"bytes={START}-{STOP - 1}") for _ in range(3)]
    for answer, content in (found[0], found[2]):
        assert (answer.status, answer.headers["Content-Range"], content) == (206, SPAN, PART)
    answer, content = found[1]
    assert (answer.status, answer.headers["Content-Range"]) == (status, span)
    assert int(answer.headers["Content-Length"]) == length
    assert content == body
    logged = hub.requests[-3:]
    assert [request.faults for request in logged] == [[], [type(fault).__name__], []]
    assert [request.bytes for request in logged] == [len(PART), len(body), len(PART)]


@pytest.mark.parametrize("status", [401, 403, 404, 408, 429, 500, 503])
def test_a_status(hub, status):
    url = link(hub)
    hub.fail(Status(status, {"Retry-After": "3"}), port="content", times=2)
    answers = [asked(url)[0] for _ in range(3)]
    assert [answer.status for answer in answers] == [status, status, 200]
    assert answers[0].headers["Retry-After"] == "3"


def test_no_answer_and_a_reset(hub):
    url = link(hub)
    hub.fail(NoAnswer(), port="content")
    with pytest.raises(http.client.RemoteDisconnected):
        asked(url)
    hub.fail(Drop(100, reset=True), port="content")
    with pytest.raises(ConnectionResetError):
        asked(url)
    assert asked(url)[1] == BIG


def test_links_that_expire_in_the_middle(hub):
    url = link(hub)
    hub.fail(Expire(), port="content", nth=2)
    assert [asked(url)[0].status for _ in range(3)] == [200, 403, 403]
    assert asked(link(hub))[0].status == 200


def test_slow_and_stalled_bodies(hub):
    url = link(hub)
    hub.fail(Slow(len(BIG) * 5), port="content")
    hub.fail(Stall(1000, 0.3), port="content", nth=2)
    for expected in (0.19, 0.3):
        began = time.monotonic()
        assert asked(url)[1] == BIG
        assert time.monotonic() - began >= expected


def test_a_hub_that_closes_waits_for_no_stalled_body(tmp_path):
    with Hub(tmp_path / "other") as hub:
        hub.add_repo("org/base", FILES)
        hub.fail(Stall(1000, 2 * HANGS), port="content")
        parts = link(hub).removeprefix("http://").partition("/")
        connection = http.client.HTTPConnection(parts[0], timeout=HANGS)
        connection.request("GET", "/" + parts[2])
        answer = connection.getresponse()
        assert answer.read(1000) == BIG[:1000]
    connection.close()
    answer.close()
    assert not hub.answering


def test_something_happens_first(hub, api):
    before = hub.head("org/base")
    hub.fail(First(lambda: hub.advance("org/base", {"config.json": b"{}"})), "*/tree/*")
    names = api.list_repo_tree("org/base", recursive=True, revision="main")
    sizes = {entry.path: entry.size for entry in names if hasattr(entry, "size")}
    assert sizes["config.json"] == 2
    assert hub.head("org/base") != before


def test_a_wrong_digest_in_a_tree(hub, api):
    wrong = {"lfs": {"oid": "0" * 64}, "size": 5}
    hub.fail(Entry("model.safetensors", wrong), "*/tree/*")
    for sha256, size in (
        ("0" * 64, 5),
        (hub.files("org/base")["model.safetensors"].sha256, len(BIG)),
    ):
        found = {f.path: f for f in api.list_repo_tree("org/base", revision=hub.head("org/base"))}
        entry = found["model.safetensors"]
        assert (entry.lfs.sha256, entry.size, entry.lfs.size) == (sha256, size, len(BIG))


def test_a_rule_looks_at_method_port_path_and_more(hub):
    url = link(hub)
    rule = hub.fail(
        Status(500), "*.safetensors", method="GET", port="content", when=lambda r: r.range is None
    )
    asked(url, "HEAD")
    asked(url, Range="bytes=0-1")
    asked(f"{hub.url}/org/base/resolve/main/model.safetensors")
    asked(link(hub, "more/second.safetensors").replace("second", "other"), Range="bytes=0-1")
    assert (rule.seen, hub.unused) == (0, [rule])
    assert asked(url)[0].status == 500
    assert (rule.seen, hub.unused) == (1, [])


def test_faults_add_up(hub):
    url = link(hub)
    hub.fail(Flip(0), port="content")
    hub.fail(Drop(10), port="content")
    assert asked(url)[1] == flipped(BIG, 0)[:10]


def test_the_client_goes_on_where_it_broke(hub, api, monkeypatch):
    """At the last whole piece that it had (pieces of 10 MB usually)."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
    hub.fail(Drop(1_000_000), port="content", times=2)
    hub.fail(Status(429, {"Retry-After": "7"}), port="content", nth=3)
    path = api.hf_hub_download("org/base", "model.safetensors")
    assert Path(path).read_bytes() == BIG
    content = [r for r in hub.requests if r.port == "content"]
    assert [r.range for r in content] == [None, *(f"bytes={n}000000-" for n in (1, 2, 2))]
    assert [r.status for r in content] == [200, 206, 429, 206]
    assert 7 <= max(api.slept) < 9


def test_the_client_finds_a_short_body(hub, api):
    hub.fail(Short(1), port="content", times=None)
    with pytest.raises(OSError, match="Consistency check failed"):
        api.hf_hub_download("org/base", "model.safetensors")


def test_a_rate_limit_is_no_missing_repository(hub, api):
    hub.fail(Status(429, {"Retry-After": "1"}), "/api/models/org/base*", times=None)
    with pytest.raises(errors.HfHubHTTPError) as caught:
        api.model_info("org/base")
    assert caught.value.response.status_code == 429


def test_a_fault_of_the_hub_itself_is_no_silent_one(tmp_path):
    """A served file that shrinks is a mistake of the test."""
    (tmp_path / "folder").mkdir()
    file = tmp_path / "folder" / "model.safetensors"
    file.write_bytes(BIG)
    hub = Hub(tmp_path / "hub")
    hub.add_repo("org/base", tmp_path / "folder")
    url = link(hub)
    file.write_bytes(b"")
    assert asked(url)[1] == b""
    with pytest.raises(AssertionError, match="is shorter than it was"):
        hub.__exit__(None, None, None)
