"""Ids of the hub, and what a hub can say of a repository: nothing of it leads out of the view."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import Hub
from hangs import HANGS
from hub_commands import streamshard
from hub_faults import Entry
from pairs import new_pair

from streamshard.checkpoint.hub_client import MAX_FILES
from streamshard.checkpoint.hub_ids import HubId, hub_id
from streamshard.errors import UsageError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", HubId("org/name")),
        ("OpenGVLab/InternVL3_5-241B-A28B-HF", HubId("OpenGVLab/InternVL3_5-241B-A28B-HF")),
        ("org/name@v1.0", HubId("org/name", "v1.0")),
        ("org/name@refs/pr/3", HubId("org/name", "refs/pr/3")),
        ("hf://org/name", HubId("org/name")),
        ("hf://org/name/", HubId("org/name")),
        ("hf://models/org/name", HubId("org/name")),
        (
            "hf://org/name@v1/sub/model.safetensors",
            HubId("org/name", "v1", "sub/model.safetensors"),
        ),
        ("hf://org/name@refs/pr/3/sub", HubId("org/name", "refs/pr/3", "sub")),
        ("hf://org/name@a%2Fb", HubId("org/name", "a/b")),
        ("org/name/", HubId("org/name")),
        ("org/name@v1/", HubId("org/name", "v1")),
        *(
            (text, HubId("org/name"))
            for text in (
                "https://huggingface.co/org/name",
                "https://huggingface.co/org/name/",
                "https://huggingface.co/org/name.git",
                "https://huggingface.co/org/name?library=transformers#usage",
                "http://www.huggingface.co/org/name",
                "huggingface.co/org/name",
                "https://hf.co/org/name",
                "https://hub.example:8080/mirror/org/name",
            )
        ),
        *(
            (f"https://hub.example:8080/mirror/org/name/{rest}", HubId("org/name", *found))
            for rest, found in {
                "tree/main": ("main",),
                "tree/v1/": ("v1",),
                "tree/refs%2Fpr%2F3": ("refs/pr/3",),
                "tree/refs/pr/3/sub": ("refs/pr/3", "sub"),
                "tree/main/sub/of%20it": ("main", "sub/of it"),
                "blob/main/model.safetensors": ("main", "model.safetensors"),
                "resolve/main/model.safetensors?download=true": ("main", "model.safetensors"),
            }.items()
        ),
        *(
            (text, None)
            for text in ("name", "a/b/c", "./a/b", "../b", "~/b", "/a/b", "a/", "/", "")
        ),
        *(
            (text, None)
            for text in ("a/b.safetensors", "a/b.bin", "a b/c", "a\\b/c", "-a/b", ".a/b")
        ),
        *(
            (text, None)
            for text in ("a/b\n", "a/b@", "a/b@x y", "a/\u00e9", "a/" + "b" * 97, "a/b\0")
        ),
        # The hub has nothing of these names, and its client does not ask for them.
        *((text, None) for text in ("a/b--c", "a..b/c", "a/b-", "a./b", "a/b.git", "a/b.git@v1")),
    ],
)
def test_what_an_argument_means(text, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example:8080/mirror/")
    assert hub_id(text) == expected


def test_what_begins_here_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for first in ("org", "file", "link"):
        assert hub_id(f"{first}/name") is None
        assert hub_id(f"{first}/name", only=True) == hub_id(f"hf://{first}/name")


@pytest.mark.parametrize(
    "text",
    [
        "hf://",
        "hf://org",
        "hf://org/n@",
        "hf://org/n/../x",
        "hf://org/n//x",
        "hf://o o/n",
        "hf://./n",
        "hf://org/n--m",
        "hf://org/n.git/folder",
        "https://huggingface.co/name",
        "https://huggingface.co/org/name/discussions/3",
        "https://huggingface.co/org/name/tree/main/../x",
        "https://huggingface.co/org/name/tree/main/%2e%2e/x",
        "https://huggingface.co/",
        "huggingface.co/",
    ],
)
def test_addresses_that_are_none(text):
    with pytest.raises(
        UsageError, match=r"no address of a model on the hub; they are like org/name"
    ):
        hub_id(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("https://huggingface.co/datasets/org/name", "is no model: that is among the datasets of"),
        ("https://huggingface.co/spaces/org/name", "is no model: that is among the spaces of"),
        ("hf://datasets/org/name@main", "is no model: that is among the datasets of the hub"),
        ("https://example.com/org/name", "something else than the hub"),
        ("org/name:v1", "is given as org/name@v1"),
        ("hf://org/name:v1", "no address"),
    ],
)
def test_what_is_meant_for_the_hub_and_is_no_model(text, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    with pytest.raises(UsageError, match=words) as refused:
        hub_id(text)
    assert "org/name" in str(refused.value)


def test_of_addresses_too_a_path_that_is_here_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "huggingface.co" / "org").mkdir(parents=True)
    (tmp_path / "org").mkdir()
    assert hub_id("huggingface.co/org/name") is None
    assert hub_id("org/name:v1") is None


@pytest.fixture
def hub(tmp_path):
    pair = new_pair(tmp_path)
    with Hub(tmp_path / "hub") as found:
        found.add_repo("org/base", pair.base)
        yield found


NAMES = {
    "parent": "../../../escaped",
    "inner parent": "sub/../../../../escaped",
    "absolute": "/tmp/streamshard-escaped",
    "empty part": "sub//escaped",
    "dot": "./config.json",
    "backslash": "..\\..\\escaped",
    "newline": "a\nb.json",
    "escape": "a\x1b[31mb.json",
    "zero": "a\0b.json",
    "long": "a" * 256,
    "deep": "/".join(["a" * 200] * 8),
    "file and folder": "config.json/inner",
    "twice": "model.safetensors.index.json",
    "surrogate": "a\ud800b",
    "nothing": "",
    "number": 7,
}


@pytest.mark.parametrize("kind", NAMES)
def test_names_that_lead_elsewhere(kind, hub, tmp_path):
    """Refused before a file is made, whatever the repository else has."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    hub.fail(Entry("tokenizer_config.json", {"path": NAMES[kind]}), path="*/tree/*", times=None)
    for line in (["inspect", "org/base"], ["verify", "org/base"]):
        got = streamshard(hub, tmp_path / "home", *line, TMPDIR=str(temporary))
        assert got.code == 3, (got.out, got.err)
        assert "org/base: has a file '" in got.err
        assert "\x1b[31m" not in got.err
        assert "/streamshard-" not in got.err.replace("/tmp/streamshard-escaped", "")
    assert [*temporary.iterdir()] == []
    assert not Path("/tmp/streamshard-escaped").exists()
    assert not [*tmp_path.rglob("escaped")]
    assert not [r for r in hub.requests if "/resolve/" in r.path]


@pytest.mark.parametrize(
    "changes",
    [
        {"size": -1},
        {"size": "9"},
        {"size": None},
        {"size": 2**63},
        {"oid": "../../../x"},
        {"oid": None},
        {"oid": "A" * 40},
        {"oid": "0" * 64},
    ],
    ids=str,
)
def test_files_without_size_and_digest(changes, hub, tmp_path):
    hub.fail(Entry("config.json", changes), path="*/tree/*", times=None)
    got = streamshard(hub, tmp_path / "home", "inspect", "org/base")
    assert got.code == 3, got.err
    assert "'config.json', which is listed without a size and a digest" in got.err


@pytest.mark.parametrize("oid", ["../../escaped", "0" * 40, "z" * 64])
def test_digests_of_large_files_that_are_none(oid, hub, tmp_path):
    name = "model-00001-of-00002.safetensors"
    hub.fail(Entry(name, {"lfs": {"oid": oid}}), path="*/tree/*", times=None)
    got = streamshard(hub, tmp_path / "home", "verify", "org/base")
    assert got.code == 3, got.err
    assert "without a size and a digest" in got.err


def test_a_digest_that_is_another_one(hub, tmp_path):
    """The hub contradicts itself: what was downloaded counts only if it is what was listed."""
    name = "model-00001-of-00002.safetensors"
    hub.fail(Entry(name, {"lfs": {"oid": "0" * 64}}), path="*/tree/*", times=None)
    got = streamshard(hub, tmp_path / "home", "verify", "org/base")
    assert got.code == 9, got.err
    assert name in got.err


@pytest.mark.parametrize("more", [{"size": 7}, {"lfs": {"size": 7}}], ids=str)
def test_a_size_that_is_another_one(more, hub, tmp_path):
    name = "config.json" if "size" in more else "model-00001-of-00002.safetensors"
    hub.fail(Entry(name, more), path="*/tree/*", times=None)
    got = streamshard(hub, tmp_path / "home", "verify", "org/base")
    assert got.code in (3, 9), (got.out, got.err)


def test_a_commit_that_is_none(hub, tmp_path):
    class Says:
        def act(self, state, request, answer):
            reply = answer()
            body = b"".join(map(bytes, reply.body))
            reply.body = [body.replace(hub.head("org/base").encode(), b"../../../../escaped")]
            return reply

    hub.fail(Says(), path="/api/models/org/base", times=None)
    got = streamshard(hub, tmp_path / "home", "inspect", "org/base")
    assert got.code == 3
    assert "'../../../../escaped', which is none" in got.err


def test_too_many_files(hub, tmp_path):
    """The list ends where the limit is passed, however long it is."""

    class Endless:
        def act(self, state, request, answer):
            reply = answer()
            number = int(request.query.get("cursor", "0"))
            entry = b'{"type":"file","path":"f%d-%d","size":1,"oid":"' + b"0" * 40 + b'"}'
            entries = [entry % (number, place) for place in range(1000)]
            reply.body = [b"[", b",".join(entries), b"]"]
            next_ = f"{hub.url}{request.raw_path}?recursive=True&cursor={number + 1}"
            reply.headers["Link"] = f'<{next_}>; rel="next"'
            return reply

    hub.fail(Endless(), path="*/tree/*", times=None)
    got = streamshard(hub, tmp_path / "home", "inspect", "org/base")
    assert got.code == 3, got.err
    assert f"more than {MAX_FILES:,} files" in got.err
    assert len([r for r in hub.requests if "/tree/" in r.path]) <= MAX_FILES // 1000 + 1


def test_a_link_in_a_repository_is_its_text(hub, tmp_path):
    """Git keeps where a link leads as the content of a file: so does the view, and leads nowhere."""
    secret = tmp_path / "secret"
    secret.write_text('{"secret": 1}')
    hub.advance("org/base", {"generation_config.json": str(secret)})
    got = streamshard(hub, tmp_path / "home", "verify", "org/base", "--json")
    assert "secret': 1" not in got.out
    assert '"secret": 1' not in got.out


@pytest.mark.parametrize("whole", [False, True], ids=["range", "download"])
def test_an_interrupted_command_leaves_nothing(whole, hub, tmp_path):
    """And ends, whatever the hub's client waits for: that does not give up."""
    import signal
    import threading

    from hub_faults import Stall

    stalled = threading.Event()

    class StallOne(Stall):
        def act(self, state, request, answer):
            if whole == ("range" in request.headers):
                return answer()
            stalled.set()
            return super().act(state, request, answer)

    temporary = tmp_path / "tmp"
    temporary.mkdir()
    waits = {"HF_HUB_DOWNLOAD_TIMEOUT": str(2 * HANGS)}
    hub.fail(StallOne(1000, 2 * HANGS), port="content", path="*-00001-of-*", times=None)
    command = ["inspect", "org/base"] if not whole else ["verify", "org/base"]
    begun = subprocess.Popen(
        [sys.executable, "-m", "streamshard", *command],
        env=os.environ | hub.env(tmp_path / "home") | {"TMPDIR": str(temporary), **waits},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert stalled.wait(HANGS)
        assert [*temporary.iterdir()]
        begun.send_signal(signal.SIGTERM)
        _, err = begun.communicate(timeout=HANGS)
    finally:
        begun.kill()
    assert begun.returncode == 143, err
    assert [*temporary.iterdir()] == []
