"""A Dask cluster between hub and hub: its workers read from there and send there, each by itself."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys

import hub_commands
import pytest
from dask_cluster import PATIENT, dask_cluster
from hangs import HANGS, ended, until
from interrupted_runs import MAIN
from marks import linux, slow
from pairs import heed_interrupts
from pushes import REPO, Ended, command, commits_of, contents, pushed, sent_twice

pytestmark = [linux]
BASE = "org/base"


@pytest.fixture
def hub(hub, shop):
    hub.add_repo(BASE, shop.base)
    return hub


@pytest.fixture
def place(tmp_path):
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


@pytest.fixture
def start(tmp_path, hub):
    """Start a cluster of workers, each with what is changed of the environment."""
    pytest.importorskip("distributed")
    folder = tmp_path / "cluster"
    folder.mkdir()
    with contextlib.ExitStack() as stack:

        def started(*workers: dict[str, str]):
            cluster = stack.enter_context(dask_cluster(folder))
            for number, changed in enumerate(workers):
                home = tmp_path / f"home of worker {number}"
                cluster.worker(env={**hub.env(home), **changed})
            return cluster

        yield started


def begun(shop, hub, place, cluster, *more: str, base: str | None = None):
    """A merge by a cluster, that begins on a machine with a cache of its own."""
    asked = command(shop, "--scheduler", cluster.address, "--json", *more)
    if base is not None:
        asked[asked.index(str(shop.base))] = base
    asked = asked[asked.index("merge-lora") :]
    return started(asked, hub, place)


def started(asked, hub, place):
    return subprocess.Popen(
        [sys.executable, "-c", f"import sys\n{PATIENT}{MAIN}", *asked],
        cwd=place,
        env={**os.environ, **hub.env(place.parent / "home")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,  # noqa: PLW1509 - before any thread
    )


def right_in_the_end(shop, hub, place, base=None):
    got, right = pushed(hub), dict(shop.right)
    if base is not None:  # which the card names
        got.pop(hub_commands.CARD), right.pop(hub_commands.CARD)
    assert got == right
    assert commits_of(hub, "the output") == 1
    assert sent_twice(hub) == []
    assert [*place.iterdir()] == []


def test_workers_read_and_send(shop, hub, place, start):
    """What is begun here stores nothing, and its process reads headers only; workers cache nothing."""
    cluster = start({}, {})
    found = begun(shop, hub, place, cluster, "--stream", base=BASE)
    out, said = found.communicate(timeout=HANGS)
    assert found.returncode == 0, said
    report = json.loads(out)
    assert (report["part"], report["scheduler"]) == (None, cluster.address)
    assert report["pushed"]["commit"] == hub.head(REPO)
    right_in_the_end(shop, hub, place, BASE)
    assert [*place.parent.rglob("home*/**/*.safetensors")] == []
    agents = {r.headers.get("User-Agent") for r in hub.requests if r.method == "PUT"}
    assert len([r for r in hub.requests if r.method == "PUT"]) == report["shards"], agents


def test_a_cache_that_all_share(shop, hub, place, start, tmp_path):
    """The base is downloaded once, by who begins."""
    cluster = start({}, {})
    cache = str(tmp_path / "cache")
    found = begun(shop, hub, place, cluster, "--cache-dir", cache, base=BASE)
    said = ended(found)
    assert found.returncode == 0, said
    right_in_the_end(shop, hub, place, BASE)
    weights = [r for r in hub.requests if r.port == "content" and r.method == "GET"]
    whole = [r.path for r in weights if r.path.endswith(".safetensors") and r.range is None]
    assert len(whole) == len({*whole}) <= 5


def test_a_cache_that_only_one_has(shop, hub, place, start):
    cluster = start({}, {})
    found = begun(shop, hub, place, cluster, base=BASE)
    out, said = found.communicate(timeout=HANGS)
    assert found.returncode == 9, said
    message = json.loads(out)["error"]["message"]
    assert "2 of 2 workers cannot do this" in message
    assert "does not see org/base@" in message
    assert (
        "home of worker 0/hub: give a cache on a disk that all machines share (--cache-dir)"
        in message
    )
    assert "have every worker read from the hub (--stream)" in message
    assert not [r for r in hub.requests if r.method == "PUT"]


CANNOT = {
    "no token": (
        {"HF_TOKEN": ""},
        f"no token to push to {REPO} with: set HF_TOKEN where it is started",
    ),
    "another hub": ({"HF_ENDPOINT": "http://127.0.0.1:9"}, f"not to HUB/{REPO} (HF_ENDPOINT)"),
    "a wrong token": (
        {"HF_TOKEN": "hf_wrong"},
        "it cannot push: org/new: looking at it was refused (401)",
    ),
}


@pytest.mark.parametrize("what", [*CANNOT])
def test_a_worker_that_cannot_send(what, shop, hub, place, start):
    changed, fragment = CANNOT[what]
    cluster = start({}, changed)
    found = begun(shop, hub, place, cluster, "--private")
    out, said = found.communicate(timeout=HANGS)
    assert found.returncode == 9, said
    message = json.loads(out)["error"]["message"]
    assert "1 of 2 workers cannot do this" in message
    assert fragment.replace("HUB", hub.url) in message
    assert not [r for r in hub.requests if r.method == "PUT"]
    assert [*place.iterdir()] == []


def test_a_worker_that_cannot_read(shop, hub, place, start, tmp_path):
    """A base that it may not see; the folder is local."""
    hub.add_repo("org/hidden", shop.base, private=True)
    cluster = start({"HF_TOKEN": ""})
    asked = begun(
        shop, hub, place, cluster, "--stream", "--output", str(tmp_path / "out"), base="org/hidden"
    )
    out, said = asked.communicate(timeout=HANGS)
    assert asked.returncode == 9, said
    message = json.loads(out)["error"]["message"]
    assert "1 of 1 workers cannot do this" in message
    assert "it cannot read org/hidden@" in message
    assert "set HF_TOKEN), where it is started" in message


def test_an_upload_that_is_refused(shop, hub, place, start):
    """The worker's words; run again, what has arrived is not sent again."""
    from hub_faults import First, Status

    def noted():
        return len([*place.glob(".*.parts/*.sent")]) == 2

    hub.fail(Status(403), "/upload/*", method="PUT", nth=3, times=None)
    hub.fail(First(lambda: until(noted)), "/upload/*", method="PUT", nth=3)
    cluster = start({}, {})
    found = begun(shop, hub, place, cluster, "--stream", base=BASE)
    out, said = found.communicate(timeout=HANGS)
    assert found.returncode == 9, said
    assert "403" in json.loads(out)["error"]["message"]
    assert commits_of(hub, "the output") == 0
    for worker in [*cluster.workers]:  # the other one may be at something still
        cluster.worker(env=hub.env(place.parent / f"home of another {worker.process.pid}"))
        worker.end()
    hub.settle()
    hub.faults.rules.clear()
    found = begun(shop, hub, place, cluster, "--stream", base=BASE)
    said = found.communicate(timeout=HANGS)[1]
    assert found.returncode == 0, said
    right_in_the_end(shop, hub, place, BASE)


def test_a_worker_is_killed(shop, hub, place, start):
    """While it sends; another one, which has come, does what it was at."""
    from hub_faults import First

    cluster = start({})
    hub.fail(Ended([cluster.workers[0].process], done=True), "/upload/*", method="PUT", nth=2)
    another = {"env": hub.env(place.parent / "home of another")}
    hub.fail(First(lambda: cluster.worker(**another)), "/upload/*", method="PUT", nth=2)
    found = begun(shop, hub, place, cluster, "--stream", base=BASE)
    said = found.communicate(timeout=HANGS)[1]
    assert found.returncode == 0, said
    right_in_the_end(shop, hub, place, BASE)


@slow
def test_kept_here_too(shop, hub, place, start, tmp_path):
    cluster = start({}, {})
    found = begun(shop, hub, place, cluster, "--output", "kept")
    said = found.communicate(timeout=HANGS)[1]
    assert found.returncode == 0, said
    assert pushed(hub) == shop.right == contents(place / "kept")
    assert commits_of(hub, "the output") == 1


def test_without_a_push(shop, hub, place, start):
    """A base of the hub alone; the output is here."""
    cluster = start({}, {})
    asked = ["merge-lora", "--adapter", str(shop.adapter), "--base", BASE, "--stream"]
    asked += ["--scheduler", cluster.address, "--output", "out"]
    found = started(asked, hub, place)
    said = ended(found)
    assert found.returncode == 0, said
    got, right = contents(place / "out"), dict(shop.right)
    got.pop(hub_commands.CARD), right.pop(hub_commands.CARD)
    assert got == right
    assert [one.name for one in place.iterdir()] == ["out"]
