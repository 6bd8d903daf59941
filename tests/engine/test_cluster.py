"""A real Dask cluster writes an output: the bytes of one run, whatever happens to workers."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from interrupted_runs import alone, content, until
from marks import linux, slow
from pairs import heed_interrupts
from parts_runs import folder_of, process, written

import streamshard
from streamshard.engine.cluster_task import described, environment, task_bytes

pytestmark = [linux]

# A worker that is slow as soon as it has begun a shard.
SLOW = """
import time
from streamshard.disk import new_files
def slow(descriptor, nbytes, allocate=new_files._allocate, time=time):
    allocate(descriptor, nbytes)
    if nbytes:
        time.sleep(3)
new_files._allocate = slow
"""
# A worker of another version.
OTHER = """
from streamshard.engine import cluster_task
own = cluster_task.environment
cluster_task.environment = lambda own=own: {**own(), "streamshard": "0.0.9 (cafe)"}
"""


@pytest.fixture
def cluster(tmp_path):
    pytest.importorskip("distributed")
    from dask_cluster import dask_cluster

    settings = {
        "DISTRIBUTED__SCHEDULER__WORKER_TTL": "4s",
        "DISTRIBUTED__WORKER__HEARTBEAT_INTERVAL": "500ms",
    }
    folder = tmp_path / "cluster"
    folder.mkdir()
    with dask_cluster(folder, **settings) as found:
        yield found


def preload(cluster, code: str) -> list[str]:
    file = cluster.folder / f"preload{len(cluster.workers)}.py"
    file.write_text(code)
    return ["--preload", str(file)]


def begun(pair, cluster, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "streamshard", *pair.command, "--scheduler", cluster.address, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,  # noqa: PLW1509 - before any thread
    )


def is_writing(pair) -> bool:
    folder = folder_of(pair)
    return folder.exists() and any(
        name.endswith("safetensors") is False and ".part" in name
        for name in written(pair)
        if "safetensors" in name
    )


# --- without a cluster ----------------------------------------------------------------------------


def test_what_differs_is_told():
    own = environment()
    assert described(own, own) == ""
    assert "streamshard 1 and not" in described({**own, "streamshard": "1"}, own)
    assert "Python unknown and not" in described({}, own)


def test_a_task_is_small_and_has_whole_paths(pair, monkeypatch):
    plans = []
    monkeypatch.chdir(pair.root)
    streamshard.merge_lora(
        base="base", adapter="adapter", output="out/merged", dry_run=True, on_plan=plans.append
    )
    (plan,) = plans
    task = task_bytes(plan, plan.shards[0], "digest")
    assert len(task) < 20_000
    made, digest, far = pickle.loads(task)
    assert far == {}
    assert digest == "digest"
    assert made.output == pair.output
    assert [shard.name for shard in made.shards] == [plan.shards[0].name]
    paths = {one.tensor.path for t in made.shards[0].tensors.values() for one in t.inputs()}
    assert paths == {*made.inputs}
    assert all(Path(path).is_absolute() and Path(path).exists() for path in paths)


@pytest.mark.parametrize(
    ("scheduler", "code", "said"),
    [("none.json", 2, "no such file"), ("tcp://127.0.0.1:9", 9, "no scheduler answers there")],
)
def test_no_scheduler(scheduler, code, said, pair, cli, monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr("streamshard.engine.cluster.CONNECT_SECONDS", 1)
    outcome = cli(*pair.command, "--scheduler", scheduler)
    assert outcome.code == code, outcome.err
    assert said in outcome.err
    assert [*pair.output.parent.iterdir()] == []


@pytest.mark.parametrize("content", ["{}", '{"address": 5}', "[]", "none", ""])
def test_a_file_without_an_address(content, pair, cli):
    pytest.importorskip("distributed")
    file = pair.root / "scheduler.json"
    file.write_text(content)
    outcome = cli(*pair.command, "--scheduler", str(file))
    assert outcome.code == 2, outcome.err
    assert "has no address of a scheduler" in outcome.err
    assert [*pair.output.parent.iterdir()] == []


@pytest.mark.parametrize("scheduler", ["127.0.0.1", "foo://x:1", "127.0.0.1:abc"])
def test_no_address_of_a_scheduler(scheduler, pair):
    """No client is made that takes a minute to end and shows a traceback."""
    pytest.importorskip("distributed")
    found = process([*pair.command, "--scheduler", scheduler])
    said = found.communicate(timeout=50)[1]
    assert found.returncode == 9, said
    assert "no scheduler answers there" in said
    assert "Traceback" not in said


def test_a_part_too(refused):
    refused(2, "exclude each other", more=["--scheduler", "tcp://x:1", "--part", "1/2"])


# --- with one -------------------------------------------------------------------------------------


def test_two_workers_write_it(pair, clean, cluster, cli):
    cluster.worker()
    cluster.worker()
    outcome = cli(*pair.command, "--scheduler", cluster.address, "--json")
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert (report["part"], report["scheduler"]) == (None, cluster.address)
    assert content(pair.output) == clean
    assert alone(pair)


def test_no_worker(pair, cluster, cli, monkeypatch):
    monkeypatch.setattr("streamshard.engine.cluster.WORKERS_SECONDS", 1)
    outcome = cli(*pair.command, "--scheduler", cluster.address)
    assert outcome.code == 9, outcome.err
    assert f"dask worker {cluster.address}" in outcome.err
    assert [*pair.output.parent.iterdir()] == []


def test_the_resource_is_used_where_it_is_offered(pair, clean, cluster, cli):
    cluster.worker(*preload(cluster, OTHER))  # is not asked
    cluster.worker("--resources", "streamshard=1")
    outcome = cli(*pair.command, "--scheduler", cluster.address)
    assert outcome.code == 0, outcome.err
    assert content(pair.output) == clean


def test_a_worker_of_another_version(pair, cluster, cli):
    cluster.worker()
    cluster.worker(*preload(cluster, OTHER))
    outcome = cli(*pair.command, "--scheduler", cluster.address)
    assert outcome.code == 9, outcome.err
    assert "1 of 2 workers cannot do this" in outcome.err
    assert "streamshard 0.0.9 (cafe) and not" in outcome.err
    assert [*pair.output.parent.iterdir()] == []


@slow
def test_a_worker_is_killed(pair, clean, cluster):
    first = cluster.worker(*preload(cluster, SLOW))
    found = begun(pair, cluster)
    until(lambda: is_writing(pair))
    cluster.worker()
    first.send(signal.SIGKILL)
    said = found.communicate(timeout=90)[1]
    assert found.returncode == 0, said
    assert content(pair.output) == clean
    assert alone(pair)


@slow
def test_a_frozen_worker_wakes_when_all_is_done(pair, clean, cluster):
    first = cluster.worker(*preload(cluster, SLOW))
    found = begun(pair, cluster)
    until(lambda: is_writing(pair))
    first.send(signal.SIGSTOP)
    cluster.worker()
    said = found.communicate(timeout=90)[1]
    assert found.returncode == 0, said
    assert content(pair.output) == clean
    first.send(signal.SIGCONT)
    time.sleep(5)
    assert content(pair.output) == clean
    assert alone(pair)


@slow
def test_the_scheduler_is_killed(pair, clean, cluster, cli):
    cluster.worker(*preload(cluster, SLOW))
    found = begun(pair, cluster)
    until(lambda: is_writing(pair))
    cluster.scheduler.send(signal.SIGKILL)
    said = found.communicate(timeout=90)[1]
    assert found.returncode == 9, said
    assert "the scheduler is lost" in said
    assert "Traceback" not in said
    for worker in cluster.workers:
        worker.end()
    assert cli(*pair.command, "--part", "1/1").code == 0
    assert content(pair.output) == clean
    assert alone(pair)


@slow
def test_an_interrupt_cancels(pair, clean, cluster, cli):
    cluster.worker(*preload(cluster, SLOW))
    found = begun(pair, cluster)
    until(lambda: is_writing(pair))
    found.send_signal(signal.SIGINT)
    said = found.communicate(timeout=90)[1]
    assert found.returncode == 130, said
    for worker in cluster.workers:
        worker.end()
    assert cli(*pair.command, "--part", "1/1").code == 0
    assert content(pair.output) == clean
    assert alone(pair)
