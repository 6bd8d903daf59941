"""Runs that were killed, and what an uninterrupted run writes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from hangs import HANGS
from interrupted_runs import AFTER_A_SHARD, FIRST, SECOND, content, killed, partial
from pairs import Pair, new_pair

import streamshard


@pytest.fixture
def clean(pair: Pair) -> dict[str, Any]:
    """What an uninterrupted run writes."""
    output = pair.root / "clean"
    streamshard.merge_lora(base=pair.base, adapter=pair.adapter, output=output)
    return content(output)


@pytest.fixture(scope="module")
def killed_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a killed run has left, of a base and an adapter in a place of their own."""
    pair = new_pair(tmp_path_factory.mktemp("killed"))
    killed(AFTER_A_SHARD, [*pair.command, "--workers", "1"])
    assert pair.output.with_name(".merged.lock").exists()
    assert not pair.output.exists()
    return partial(pair)


@pytest.fixture
def interrupted(pair: Pair, clean: dict[str, Any], killed_once: Path) -> Pair:
    """A run that was killed when one of two shards was finished."""
    # Inputs are told by content, so that it serves for a base elsewhere.
    shutil.copytree(killed_once, partial(pair))
    assert (partial(pair) / FIRST).read_bytes() == clean[FIRST]
    assert not (partial(pair) / SECOND).exists()
    return pair


@pytest.fixture
def patient(monkeypatch) -> None:
    """Scheduler, workers and what they write are waited for as long as it takes."""
    pytest.importorskip("distributed")
    import dask

    from streamshard.engine import cluster, cluster_client

    for name in ("connect", "tcp"):
        monkeypatch.setitem(dask.config.get("distributed.comm.timeouts"), name, f"{HANGS}s")
    monkeypatch.setattr(cluster, "WORKERS_SECONDS", HANGS)
    monkeypatch.setattr(cluster_client, "CONNECT_SECONDS", HANGS)
    monkeypatch.setattr(cluster_client, "ANSWER_SECONDS", HANGS)


@pytest.fixture
def cluster(tmp_path, patient):
    """A Dask cluster without workers."""
    from dask_cluster import dask_cluster

    folder = tmp_path / "cluster"
    folder.mkdir()
    with dask_cluster(folder) as found:
        yield found
