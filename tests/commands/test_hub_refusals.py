"""What a hub does not give, and what is no model on one: what it is, what to do, nothing written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import reference
from fake_hub import Hub
from hub_commands import of_content, report, streamshard
from hub_faults import Drop, Entry, Flip, Status
from pairs import new_pair

from streamshard.checkpoint.hub_errors import refusal
from streamshard.errors import WriteError, bytes_text


@pytest.fixture
def pair(tmp_path):
    return new_pair(tmp_path)


@pytest.fixture
def hub(pair, tmp_path):
    with Hub(tmp_path / "hub") as found:
        found.add_repo("org/base", pair.base)
        found.add_repo("org/lora", pair.adapter)
        found.forget()
        yield found


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


def merge(hub, home, output: Path, *more: str, base: str = "org/base", **env: str):
    line = ["merge-lora", "--adapter", "org/lora", "--base", base, "--output", output, "--json"]
    return streamshard(hub, home, *line, *more, **env)


def refused(outcome, code: int, *words: str) -> str:
    """The message of a refusal, which says these."""
    assert outcome.code == code, (outcome.out, outcome.err)
    error = json.loads(outcome.out)["error"]
    assert error["exit_code"] == code
    assert error["type"] == {2: "UsageError", 3: "InputError", 6: "WriteError", 9: "HubError"}[code]
    for word in words:
        assert word in error["message"], error["message"]
    assert "/streamshard-" not in error["message"]
    return str(error["message"])


CASES = {
    "gated": (
        {"gated": True},
        "org/it",
        ("is gated", "Ask for access", "/org/it", "hf auth login"),
    ),
    "private": ({"private": True}, "org/it", ("no such model", "private", "hf auth login")),
    "missing": (None, "org/it", ("no such path here", "no such model", "Check the name")),
    "revision": ({}, "org/it@v9", ("org/it@v9", "no such revision")),
    "commit": ({}, f"org/it@{'0' * 40}", ("no such revision",)),
    "short commit": ({}, "org/it@0123abc", ("no such revision", "in full, by 40 letters")),
}


@pytest.mark.parametrize("case", CASES)
def test_what_the_hub_does_not_give(case, pair, hub, home, tmp_path):
    how, base, words = CASES[case]
    if how is not None:
        hub.add_repo("org/it", pair.base, **how)
    token = {"HF_TOKEN": "", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"} if case == "private" else {}
    got = merge(hub, home, tmp_path / "out" / "o", base=base, **token)
    message = refused(got, 9, *words)
    assert hub.url in message
    assert [*(tmp_path / "out").iterdir()] == []


@pytest.mark.parametrize(
    ("status", "headers", "words"),
    [
        (429, {"Retry-After": "77"}, ("too many requests", "in 77 seconds")),
        (429, {}, ("too many requests", "later")),
        (503, {}, ("a problem of its own (503)", "again later", "--offline")),
        (500, {}, ("a problem of its own (500)",)),
        (401, {}, ("401", "hf auth login")),
        (403, {}, ("403", "Your token")),
        (418, {}, ("answered 418", "HF_ENDPOINT")),
    ],
)
def test_what_the_hub_answers(status, headers, words, hub, home, tmp_path):
    hub.fail(Status(status, headers), path="/api/models/org/base", times=None)
    refused(merge(hub, home, tmp_path / "o"), 9, "org/base", *words)
    assert not (tmp_path / "o").exists()


def test_no_answer(hub, home, tmp_path):
    got = merge(hub, home, tmp_path / "o", HF_ENDPOINT="http://127.0.0.1:9")
    refused(got, 9, "org/lora", "http://127.0.0.1:9", "Check the network", "--offline")


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"HF_HUB_DOWNLOAD_TIMEOUT": "ten"}, ("Correct or unset HF_HUB_DOWNLOAD_TIMEOUT=ten",)),
        ({"HF_ENDPOINT": "hub.example"}, ("HF_ENDPOINT is 'hub.example'", "https://")),
        ({"HF_ENDPOINT": ""}, ("HF_ENDPOINT is ''", "unset it")),
    ],
)
def test_an_environment_that_the_client_cannot_use(env, words, pair, hub, home, tmp_path):
    refused(merge(hub, home, tmp_path / "o", **env), 2, *words)
    push = [*pair.command, "--json", "--push-to", "org/o"]
    refused(streamshard(hub, home, *push, **env), 2, *words)


def test_an_error_of_the_client_that_names_a_package():
    """It is not there for what the environment asks, such as a proxy of SOCKS."""
    told = str(refusal("org/base", "its commit", ImportError("No 'socksio': pip install socksio.")))
    assert "pip install socksio. Install that, and run the same command again." in told


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_cache_without_room_is_told_as_that(number):
    """Another output would not help."""
    told = refusal("org/base", "a file", OSError(number, "no room"))
    assert (type(told), told.exit_code) == (WriteError, 6)
    for word in ("hub's cache", "no space left", "--cache-dir", "HF_HOME"):
        assert word in str(told)
    assert "output" not in str(told)


def test_a_size_that_no_file_can_have(hub, home, tmp_path):
    name, size = "model-00001-of-00002.safetensors", 2**62 - 1
    lie = Entry(name, {"size": size, "lfs": {"size": size}})
    hub.fail(lie, path="/api/models/org/base/tree/*", times=None)
    refused(
        merge(hub, home, tmp_path / "o"), 3, f"org/base: has a file '{name}'", f"{size:,} bytes"
    )


def test_a_cached_branch_is_no_answer(hub, home, tmp_path):
    """The client itself would take what the branch was when the cache last saw it, and say nothing."""
    report(merge(hub, home, tmp_path / "1"))
    got = merge(hub, home, tmp_path / "2", HF_ENDPOINT="http://127.0.0.1:9")
    refused(got, 9, "Check the network", "--offline")
    assert report(merge(hub, home, tmp_path / "3", "--offline"))["merged"] == 2


@pytest.mark.parametrize("how", ["--offline", "HF_HUB_OFFLINE"])
@pytest.mark.parametrize("cached", ["nothing", "without weights"])
def test_offline_without_what_is_needed(cached, how, hub, home, tmp_path):
    if cached != "nothing":
        assert streamshard(hub, home, "inspect", "org/base").code == 0
        report(streamshard(hub, home, "verify", "org/lora", "--json"))
    hub.forget()
    more, env = (["--offline"], {}) if how == "--offline" else ([], {"HF_HUB_OFFLINE": "1"})
    got = merge(hub, home, tmp_path / "o", *more, **env)
    what = "revision 'main'" if cached == "nothing" else "model-00001-of-00002.safetensors"
    refused(got, 9, what, "not in the cache", "HF_HUB_OFFLINE", "with a network")
    assert not hub.requests


@pytest.mark.parametrize(
    "path",
    [
        *(
            "models/InternVL3-8B",
            "./org/base",
            "../org/base",
            "~/org/base",
            "org/base/sub",
            "base-x",
        ),
        *("/org/base", "org/model.safetensors", "org/b ase", "-org/base", "org/", "/", "org\\base"),
    ],
)
def test_what_can_only_be_a_path(path, hub, home, pair, tmp_path, monkeypatch):
    """No request is made for it, and the message is of paths."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "InternVL3-8B-hf").mkdir(parents=True)
    for line in (["inspect", "--json", "--", path], ["diff", "--json", "--", str(pair.base), path]):
        got = streamshard(hub, home, *line, HOME=str(tmp_path))
        if path == "/":
            assert got.code == 3
            continue
        message = refused(got, 3)
        if path.startswith("models"):
            assert "'InternVL3-8B-hf'" in message
    assert not hub.requests


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--base", "org/base@main", "--revision", "v1"], ("--revision", "names another")),
        (["--base", "BASE", "--revision", "main"], ("--revision", "BASE")),
        (["--base", "hf://org", "--dry-run"], ("hf://org", "no address")),
        (["--base", "hf://org/base@main/../x"], ("no address",)),
        (["--base", "org/base", "--revision", "a b"], ("--revision",)),
    ],
)
def test_usage(more, words, hub, home, pair, tmp_path):
    line = [str(pair.base) if part == "BASE" else part for part in more]
    words = tuple(str(pair.base) if word == "BASE" else word for word in words)
    out = ["--output", str(tmp_path / "o"), "--json"]
    got = streamshard(hub, home, "merge-lora", "--adapter", pair.adapter, *line, *out)
    refused(got, 2, *words)


# --- before anything large is downloaded ------------------------------------------------------------


@pytest.fixture
def large(hub, tmp_path):
    """A base of two megabytes, and an adapter that does not fit it."""
    layer = "language_model.model.layers.0.self_attn.q_proj"
    base = reference.save_checkpoint(
        tmp_path / "large", {f"{layer}.weight": reference.normal((1024, 1024), 0.02, seed=1)}
    )
    factors = {
        f"base_model.model.{layer}.lora_A.weight": reference.normal((4, 100), 0.02, seed=2),
        f"base_model.model.{layer}.lora_B.weight": reference.normal((1024, 4), 0.02, seed=3),
    }
    adapter = reference.save_adapter(tmp_path / "misfit", factors, r=4, lora_alpha=8)
    hub.add_repo("org/large", base)
    hub.add_repo("org/misfit", adapter)
    hub.forget()
    return base


def most(hub) -> int:
    """The most bytes that came of one file of the large base."""
    return max((r.bytes for r in of_content(hub) if "org/large" in r.path), default=0)


def test_an_adapter_that_does_not_fit(large, hub, home, tmp_path):
    line = ["--adapter", "org/misfit", "--base", "org/large", "--output", tmp_path / "o"]
    got = streamshard(hub, home, "merge-lora", *line)
    assert got.code == 4, got.err
    assert "org/misfit" in got.err
    assert "/streamshard-" not in got.err
    assert 0 < most(hub) <= 128 * 1024


def test_an_output_that_exists(large, hub, home, pair, tmp_path):
    got = merge(hub, home, pair.base, base="org/large")
    assert got.code == 5, got.err
    assert most(hub) <= 128 * 1024


def test_a_disk_without_room(large, hub, home, tmp_path):
    """For what is downloaded; with `--stream` nothing is."""
    code = """
import sys
from streamshard.disk.system import System
free = System.disk_free
home = sys.argv.pop(1)
System.disk_free = lambda self, path: 100_000 if str(path).startswith(home) else free(self, path)
from streamshard.cli import main
main()
"""
    home.mkdir()
    line = ["diff", "org/large", str(large), "--json"]
    call = [sys.executable, "-c", code, str(home)]
    done = subprocess.run(
        [*call, *line], capture_output=True, text=True, env=os.environ | hub.env(home), check=False
    )
    assert done.returncode == 6, done.stderr
    message = json.loads(done.stdout)["error"]["message"]
    needed = (large / "model.safetensors").stat().st_size
    for word in (bytes_text(needed), "100.00 KB are free", "--cache-dir", str(home)):
        assert word in message
    assert most(hub) <= 128 * 1024
    assert not [*home.rglob("*.safetensors")]


# --- what comes is not what it should be -------------------------------------------------------------


def test_a_download_that_breaks_off_goes_on(hub, home, tmp_path):
    hub.fail(Drop(after=1000), path="*-00001-of-*", port="content", nth=2)
    assert report(merge(hub, home, tmp_path / "o"))["merged"] == 2
    assert hub.unused == []


def test_a_download_of_other_bytes(hub, home, tmp_path):
    """It is refused, and does not stay in the cache, where every tool would take it."""
    hub.fail(Flip(5000), path="*-00001-of-*", port="content", nth=2)
    message = refused(merge(hub, home, tmp_path / "o"), 9, "org/base", "-00001-of-", "is not what")
    assert "sha256:" in message
    assert not (tmp_path / "o").exists()
    assert not [path for path in home.rglob("*-00001-of-*") if path.suffix == ".safetensors"]
    assert report(merge(hub, home, tmp_path / "o"))["merged"] == 2


def test_a_header_of_other_bytes(hub, home, tmp_path):
    """Read by a range, with a letter of a name changed: the whole file tells it."""
    names = [f"language_model.{name}.weight" for name in ("norm", "head")]
    weights = {name: reference.normal((4096, 64), 1, seed=1) for name in names}
    hub.add_repo("org/one", reference.save_checkpoint(tmp_path / "one", weights))
    place = (tmp_path / "one" / "model.safetensors").read_bytes().index(b"norm")
    hub.fail(Flip(place), port="content", nth=1)
    got = streamshard(hub, home, "diff", "org/one", tmp_path / "one", "--json")
    refused(got, 9, "org/one", "its header", "same command again")


def in_cache(hub, home, name: str) -> Path:
    """The file of the cache that has the content of one of the base."""
    (path,) = home.rglob(f"blobs/{hub.files('org/base')[name].sha256}")
    return path


def test_a_cache_that_is_damaged(hub, home, tmp_path):
    report(merge(hub, home, tmp_path / "1"))
    blob = in_cache(hub, home, "model-00001-of-00002.safetensors")
    size = f"{blob.stat().st_size:,}"
    blob.write_bytes(b"x")
    told = f"Remove {blob.relative_to(home / 'hub')} in the cache ({home / 'hub'})"
    got = merge(hub, home, tmp_path / "2")
    refused(got, 9, "org/base/model-00001-of", "has 1 bytes", size, "cache is damaged", told)


def test_a_damaged_file_of_the_right_size_is_found_by_who_asks(hub, home, tmp_path):
    """The cache is believed, as every tool does; `verify` and `--sha256` compare it with the hub."""
    name = "model-00001-of-00002.safetensors"
    done = report(merge(hub, home, tmp_path / "1"))
    assert all(file["checked"] for file in done["sources"]["base"]["files"].values())
    sound = merge(hub, home, tmp_path / "2", "--sha256")
    files = report(sound)["sources"]["base"]["files"].values()
    assert {(file["checked"], file["how"]) for file in files} == {
        (True, "it was in the cache before, and is equal to the digest of the hub")
    }
    assert report(streamshard(hub, home, "verify", "org/base", "--json"))["problems"] == []
    blob = in_cache(hub, home, name)
    data = bytearray(blob.read_bytes())
    data[-7] ^= 1
    blob.write_bytes(data)
    told = f"Remove {blob.relative_to(home / 'hub')} in the cache ({home / 'hub'})"
    words = (f"org/base/{name}: its copy in the cache is not what the hub says", told)
    refused(merge(hub, home, tmp_path / "3", "--sha256"), 9, *words)
    assert not (tmp_path / "3").exists()
    for more in ((), ("--offline",)):
        found = streamshard(hub, home, "verify", "org/base", "--json", *more)
        assert found.code == 8
        (problem,) = json.loads(found.out)["problems"]
        assert all(word in problem for word in words)
    report(merge(hub, home, tmp_path / "4"))  # nobody asked
    blob.unlink()
    report(merge(hub, home, tmp_path / "5", "--sha256"))


def test_offline_is_refused_where_the_cache_lacks_what_loaders_read(pair, hub, home, tmp_path):
    """Weights and config are there after `diff`; without its tokenizer the output would be no model."""
    names = ["tokenizer.json", "tokenization_own.py", "notes.txt"]
    hub.advance("org/base", dict.fromkeys(names, "{}"))
    report(merge(hub, home, tmp_path / "0", base=str(pair.base)))  # the adapter
    report(streamshard(hub, home, "diff", "org/base", pair.base, "--json"))
    hub.forget()
    got = merge(hub, home, tmp_path / "1", "--offline")
    refused(got, 9, "org/base", "token", "is not in the cache")
    report(streamshard(hub, home, "inspect", "org/base", "--offline", "--json"))
    assert not hub.requests
    assert not (tmp_path / "1").exists()
    report(merge(hub, home, tmp_path / "2"))
    hub.forget()
    report(merge(hub, home, tmp_path / "3", "--offline"))
    assert not hub.requests
    both = [{path.name for path in (tmp_path / name).iterdir()} for name in "23"]
    assert both[0] == both[1] >= {*names}


def test_the_list_is_the_one_that_the_client_keeps(hub, home, pair, tmp_path):
    """Each reads what the other has written; one that is damaged is as none."""
    from huggingface_hub._tree_cache import read_tree_cache

    report(merge(hub, home, tmp_path / "1"))
    (kept,) = home.rglob(f"*--base/trees/{hub.head('org/base')}.json")
    read = read_tree_cache(str(kept.parent.parent), kept.stem)
    assert read is not None
    sizes = {name: entry.lfs_size or entry.size for name, entry in read.items()}
    assert sizes == {name: blob.size for name, blob in hub.files("org/base").items()}
    for text in ("", "[]", '{"format_version": 1, "files": {"a": {}}}', '{"format_version": 2}'):
        kept.write_text(text)
        report(merge(hub, home, tmp_path / "2", "--offline", "--overwrite"))


@pytest.mark.parametrize("below", ["", "/deeper"])
def test_a_cache_that_cannot_be_there(below, hub, home, tmp_path):
    """It is the disk of this machine that is told, not the hub."""
    (tmp_path / "file").write_text("")
    cache = f"{tmp_path}/file{below}"
    refused(merge(hub, home, tmp_path / "1", "--cache-dir", cache), 6, cache, "cannot be written")
