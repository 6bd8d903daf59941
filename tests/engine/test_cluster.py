"""A real Dask cluster writes an output: the bytes of one run, whatever happens to workers."""

from __future__ import annotations

import json
import pickle
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from dask_cluster import ENDING, OTHER, begun, go_on, is_writing, preload, stopped
from hangs import HANGS, ended, until
from interrupted_runs import alone, content
from marks import linux, slow

import streamshard
from streamshard.engine import cluster as engine_cluster
from streamshard.engine.cluster_task import described, environment, task_bytes

pytestmark = [linux]

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


def test_a_worker_is_lost_when_it_is_asked(pair, clean, cluster, cli):
    """It is none of those that cannot do it: the others are enough."""
    dies = "import os\nfrom streamshard.engine import cluster_task\n"
    dies += "cluster_task.check = lambda *_, os=os: os._exit(1)\n"
    cluster.worker(*preload(cluster, dies))
    outcome = cli(*pair.command, "--scheduler", cluster.address)
    assert outcome.code == 9
    assert "has no worker" in outcome.err
    cluster.worker(*preload(cluster, dies))
    cluster.worker()
    outcome = cli(*pair.command, "--scheduler", cluster.address)
    assert outcome.code == 0, outcome.err
    assert content(pair.output) == clean
    assert alone(pair)


@pytest.mark.parametrize("when", ["check_workers", "write", "_find"])
def test_another_one_completes_it(when, pair, clean, cluster, monkeypatch):
    """As when the same command runs twice: what is no longer there is not waited for."""
    cluster.worker()
    original, done = getattr(engine_cluster._Run, when), []

    def late(self, *given):
        if not done:
            done.append(begun(pair, cluster))
            said = ended(done[0])
            assert done[0].returncode == 0, said
        return original(self, *given)

    monkeypatch.setattr(engine_cluster._Run, when, late)
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: pytest.fail("waits"))
    monkeypatch.setattr(engine_cluster, "time", clock)
    streamshard.merge_lora(
        base=pair.base, adapter=pair.adapter, output=pair.output, scheduler=cluster.address
    )
    assert content(pair.output) == clean
    assert alone(pair)


@slow
def test_a_worker_is_killed(pair, clean, cluster):
    first = stopped(cluster)
    found = begun(pair, cluster)
    until(lambda: is_writing(pair), found)
    cluster.worker()
    first.send(signal.SIGKILL)
    said = ended(found)
    assert found.returncode == 0, said
    assert content(pair.output) == clean
    assert alone(pair)


@slow
def test_a_frozen_worker_wakes_when_all_is_done(pair, clean, cluster):
    from distributed import Client

    ending = cluster.folder / "ended"
    first = stopped(cluster, code=ENDING.format(file=str(ending)))
    (frozen,) = re.findall(r"Start worker at:\s+(tcp://\S+)", first.log)
    found = begun(pair, cluster)
    until(lambda: is_writing(pair), found)
    first.send(signal.SIGSTOP)
    cluster.worker()
    with Client(cluster.address, timeout=HANGS, set_as_default=False) as client:
        # As the scheduler does by itself, in minutes.
        client.sync(client.scheduler.unregister, address=frozen, stimulus_id="a test")
    said = ended(found)
    assert found.returncode == 0, said
    assert content(pair.output) == clean
    go_on(cluster)
    first.send(signal.SIGCONT)
    until(lambda: ending.exists() or first.process.poll() is not None)
    assert content(pair.output) == clean
    assert alone(pair)


@slow
def test_the_scheduler_is_killed(pair, clean, cluster, cli):
    stopped(cluster)
    found = begun(pair, cluster)
    until(lambda: is_writing(pair), found)
    cluster.scheduler.send(signal.SIGKILL)
    said = ended(found)
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
    stopped(cluster)
    found = begun(pair, cluster)
    until(lambda: is_writing(pair), found)
    found.send_signal(signal.SIGINT)
    said = ended(found)
    assert found.returncode == 130, said
    for worker in cluster.workers:
        worker.end()
    assert cli(*pair.command, "--part", "1/1").code == 0
    assert content(pair.output) == clean
    assert alone(pair)
