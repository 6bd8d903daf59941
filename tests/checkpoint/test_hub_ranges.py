"""A file of the hub by ranges, with the installed client: right bytes or a refusal, whatever happens."""

from __future__ import annotations

import hashlib
import random

import pytest
from fake_hub import Hub
from hangs import HANGS
from hub_client import client
from hub_faults import (
    Drop,
    Expire,
    Flip,
    Headers,
    Long,
    LoseAnswer,
    NoAnswer,
    OtherBytes,
    Short,
    Slow,
    Stall,
    Status,
    Whole,
    WrongRange,
)

from streamshard.checkpoint import hub_stream
from streamshard.checkpoint.hub_ranges import HubFile, check_parts
from streamshard.disk import remote as remote_module
from streamshard.disk.remote import Remote
from streamshard.disk.remote_digest import WrongDigestError
from streamshard.errors import HubError

NAME = "model.safetensors"
DATA = random.Random(3).randbytes(700_000)
HEAD = 100_000
SHA256 = hashlib.sha256(DATA).hexdigest()
SMALL = b"a file that is none of LFS" * 100
PAUSE = 1
"""Seconds after which the client takes a body for stalled, where one is."""

RIGHT, REFUSED, WRONG = "right bytes", "refused", "wrong digest"
PASSING = (408, 425, 429, 500, 502, 503, 504)
OF_LINKS = (400, 401, 403, 404, 410)


def cases():
    """What goes wrong: name, faults with where and when they happen, and how it has to end.

    Requests of a run without faults: the hub, the content's head, the rest of the content.
    """
    for after in sorted({0, 1, 2, 4095, 4096, 65_535, 65_536, *range(3001, 600_000, 9001)}):
        for reset in (False, True):
            for nth in (1, 2):
                yield (
                    f"drop {after} {reset} {nth}",
                    [(Drop(after, reset), "content", nth, 1)],
                    RIGHT,
                )
    for after in (1, 7000, 65_536, 200_001):
        yield f"drop every {after}", [(Drop(after), "content", 1, None if after > 1 else 50)], RIGHT
    yield "drop all", [(Drop(0), "content", 2, None)], REFUSED
    for status in (*PASSING, *OF_LINKS, 416):
        for nth in (1, 2):
            yield f"{status} content {nth}", [(Status(status), "content", nth, 1)], RIGHT
            yield f"{status} content {nth} twice", [(Status(status), "content", nth, 2)], RIGHT
            yield (
                f"{status} content always {nth}",
                [(Status(status), "content", nth, None)],
                REFUSED,
            )
    for status in PASSING:
        yield f"{status} hub", [(Status(status), "hub", 1, 1)], RIGHT
        yield f"{status} hub four times", [(Status(status), "hub", 1, 4)], RIGHT
        yield f"{status} hub always", [(Status(status), "hub", 1, None)], REFUSED
        later = [(Expire(), "content", 2, 1), (Status(status), "hub", 2, 2)]
        yield f"{status} hub later", later, RIGHT
    for status in (401, 403, 404, 410, 451):
        yield f"{status} hub", [(Status(status), "hub", 1, 1)], REFUSED
        yield (
            f"{status} hub later",
            [(Expire(), "content", 2, 1), (Status(status), "hub", 2, 1)],
            REFUSED,
        )
    for code in ("GatedRepo", "RepoNotFound", "RevisionNotFound", "EntryNotFound"):
        yield code, [(Status(403, code=code), "hub", 1, 1)], REFUSED
    for fault in (
        Whole(),
        *(WrongRange(by) for by in (-1, 1, 2, 1000)),
        Headers({"Content-Range": None}),
        Headers({"Content-Range": f"bytes 0-1/{len(DATA)}"}),
        Headers({"Content-Range": "bytes 0-99999/*"}),
        Headers({"Content-Encoding": "gzip"}),
        *(Short(by) for by in (1, 2, 50_000, len(DATA))),
        *(Long(by) for by in (1, 2, 50_000)),
        NoAnswer(),
        LoseAnswer(),
        Stall(5000, HANGS),
    ):
        for nth in (1, 2):
            yield f"{fault} {nth}", [(fault, "content", nth, 1)], RIGHT
            yield f"{fault} {nth} thrice", [(fault, "content", nth, 3)], RIGHT
        if not isinstance(fault, (Stall, Short)):
            yield f"{fault} always", [(fault, "content", 1, None)], REFUSED
    yield "no hub", [(NoAnswer(), "hub", 1, None)], REFUSED
    yield "hub stalls", [(LoseAnswer(), "hub", 1, 2)], RIGHT
    yield "slow", [(Slow(3_000_000), "content", 1, None)], RIGHT
    yield "links expire", [(Expire(), "content", 2, 1)], RIGHT
    yield "links expire at once", [(Expire(), "content", 1, None)], REFUSED
    for at in (0, 8, 99_999, 100_000, 300_000):
        yield f"flip {at}", [(Flip(at), "content", 2, 1)], WRONG
    for by in (1, 2, 4096):
        yield f"other bytes {by}", [(OtherBytes(by), "content", 2, 1)], WRONG
    yield "flipped head", [(Flip(50), "content", 1, 1)], WRONG
    for headers in (
        {"X-Linked-Size": "12"},
        {"X-Linked-Etag": f'"{"0" * 64}"'},
        {"X-Repo-Commit": "0" * 40},
    ):
        yield f"{headers}", [(Headers(headers), "hub", 1, 1)], REFUSED
    yield "sent to a file that is not there", [(Headers({"Location": "x"}), "hub", 1, 1)], REFUSED
    for location in ("http://127.0.0.1:9/none", "http://[", "http://a\x7fb", "ftp://example/x"):
        yield location, [(Headers({"Location": location}), "hub", 1, None)], REFUSED
        yield f"{location} once", [(Headers({"Location": location}), "hub", 1, 1)], RIGHT
    for seed in range(60):
        chance = random.Random(seed)
        faults = [
            (chance.choice(MENDED), "content", chance.randrange(1, 6), 1)
            for _ in range(chance.randrange(1, 5))
        ]
        yield f"several {seed}", faults, RIGHT


MENDED = (
    *(Drop(after) for after in (0, 1, 5000, 150_000)),
    *(Status(status) for status in (403, 429, 500, 503)),
    *(Whole(), WrongRange(1), Short(1000), Expire(), NoAnswer(), LoseAnswer()),
)
CASES = [*cases()]


def test_the_faults_are_hundreds():
    assert len({name for name, *_ in CASES}) == len(CASES) >= 300


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with Hub(tmp_path_factory.mktemp("hub")) as hub:
        hub.add_repo("org/base", {NAME: DATA, "small.json": SMALL})
        yield hub


@pytest.fixture(scope="module")
def api(hub, tmp_path_factory):
    with client(hub, tmp_path_factory.mktemp("home")) as api:
        yield api


@pytest.fixture
def opened(hub, api):
    """A remote file and what opens its streams; the hub has no faults and an empty log."""
    commit = hub.head("org/base")
    hub.faults.rules.clear()
    hub.forget()
    opener = HubFile("org/base", commit, NAME, len(DATA), where=f"org/base/{NAME}", sha256=SHA256)
    yield Remote(f"org/base/{NAME}", len(DATA), f"sha256:{SHA256}", opener), opener
    hub.faults.rules.clear()
    hub.state.errors.clear()


@pytest.fixture
def slept(monkeypatch):
    seconds = []
    monkeypatch.setattr(remote_module, "wait", seconds.append)
    return seconds


def read(remote):
    """All of it as a merge reads it: its head, then the rest in blocks."""
    out = bytearray(len(DATA))
    with remote.open("key") as file:
        out[:HEAD] = file.read(0, HEAD)
        file.onward = True
        for at in range(HEAD, len(DATA), 262_144):
            part = memoryview(out)[at : at + 262_144]
            assert file.read_into(part, at) == len(part)
    return bytes(out)


@pytest.mark.parametrize(
    ("faults", "ending"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
def test_it_ends_in_right_bytes_or_is_refused(faults, ending, hub, opened, slept, monkeypatch):
    from huggingface_hub import constants

    for fault, port, nth, times in faults:
        if isinstance(fault, Stall):
            monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", PAUSE)
        hub.fail(fault, f"*{NAME}", port=port, nth=nth, times=times)
    if ending is RIGHT:
        assert read(opened[0]) == DATA
        assert opened[0].frontier.outcome()[0]
    else:
        with pytest.raises(HubError) as refused:
            read(opened[0])
        assert str(refused.value).startswith("org/base")
        assert isinstance(refused.value, WrongDigestError) is (ending is WRONG)
        assert not opened[0].frontier.outcome()[0]


def test_a_file_takes_three_requests(hub, opened):
    assert read(opened[0]) == DATA
    seen = [(request.port, request.status, request.bytes) for request in hub.requests]
    kept = remote_module.BLOCK_NBYTES
    assert [one[:2] for one in seen] == [("hub", 302), ("content", 206), ("content", 206)]
    assert [one[2] for one in seen[1:]] == [kept, len(DATA) - kept]
    assert opened[1].requests == 3


def test_a_break_takes_one_more(hub, opened, slept):
    for nth in (2, 3, 4):
        hub.fail(Drop(100_000), port="content", nth=nth)
    assert read(opened[0]) == DATA
    assert opened[1].requests == 3 + 3


def test_content_is_asked_for_without_a_token(hub, opened):
    read(opened[0])
    asked = {request.port: request.headers for request in hub.requests}
    assert asked["hub"]["Authorization"] == f"Bearer {hub.token}"
    assert "Authorization" not in asked["content"]
    assert {headers["Accept-Encoding"] for headers in asked.values()} == {"identity"}


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7.0),
        ({"Retry-After": "0"}, 0.5),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.5),
        ({"Retry-After": "soon"}, 0.5),
        ({"Retry-After": "-5"}, 0.5),
        ({"Retry-After": "\xb2"}, 0.5),  # a digit, but no number
        ({"Retry-After": "21 Oct 99999999999 1:1:1"}, 0.5),
        ({"Retry-After": "Wed, 21 Oct 2015 7:28:00 +9999959999699"}, 0.5),
        ({"RateLimit": '"api";r=0;t=55'}, 55.0),
        ({"RateLimit": '"api";r=3;t=55'}, 0.5),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
def test_the_server_says_how_long_to_wait(status, headers, seconds, hub, opened, slept):
    hub.fail(Status(status, headers), port="content")
    assert read(opened[0]) == DATA
    assert slept == [seconds]


def test_a_long_wait_is_left_to_the_user(hub, opened, slept):
    hub.fail(Status(429, {"Retry-After": "4000"}), port="content")
    with pytest.raises(HubError, match="asks to wait 4,000 seconds"):
        read(opened[0])


def test_a_head_that_moves_does_not_matter(hub, opened):
    hub.advance("org/base", {NAME: b"another one"})
    try:
        assert read(opened[0]) == DATA
    finally:
        hub.advance("org/base", {NAME: DATA})


def test_files_that_the_hub_itself_keeps_are_read_too(hub, api):
    blob = hub.files("org/base")["small.json"].oid
    opener = HubFile("org/base", hub.head("org/base"), "small.json", len(SMALL), where="x")
    remote = Remote("x", len(SMALL), f"git:{blob}", opener)
    with remote.open("key") as file:
        assert file.read(0, len(SMALL)) == SMALL
    assert remote.frontier.outcome()[0]


def test_the_rest_of_a_body_is_read_from_the_connection_itself(hub, opened, monkeypatch):
    found = []
    real = hub_stream.bare_socket
    monkeypatch.setattr(
        hub_stream, "bare_socket", lambda answer: found.append(real(answer)) or found[-1]
    )
    assert read(opened[0]) == DATA
    assert found
    assert None not in found  # the installed client lets us


@pytest.mark.parametrize("ending", [b"", b"held back"])
def test_where_the_client_holds_bytes_back_it_reads(ending, hub, opened, monkeypatch):
    """Whatever it is in, and where nothing of that can be seen."""
    if ending:
        import h11

        held = property(lambda _: (ending, False))
        monkeypatch.setattr(h11.Connection, "trailing_data", held)
    else:
        monkeypatch.setattr(hub_stream, "_TO_PROTOCOL", ("_other", "_names"))
    assert read(opened[0]) == DATA
    assert opened[0].frontier.outcome()[0]


def test_the_client_may_be_closed_by_others(hub, opened, slept):
    import huggingface_hub

    out = bytearray(len(DATA))
    with opened[0].open("key") as file:
        for at in range(0, len(DATA), 140_000):
            file.read_into(memoryview(out)[at : at + 140_000], at)
            huggingface_hub.close_session()
    assert out == DATA


def test_offline_is_told(hub, opened, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE"):
        read(opened[0])


def test_very_large_files_are_refused_before():
    check_parts("org/base/x.safetensors", 50_000_000_000)
    with pytest.raises(
        HubError, match=r"x\.safetensors: has 50,000,000,001 bytes.*without --stream"
    ):
        check_parts("org/base/x.safetensors", 50_000_000_001)
