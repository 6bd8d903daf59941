"""What is given as a scheduler, and workers that are missing, late or other ones: each is told."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import socket
import threading
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace

import pytest
from dask_cluster import (
    OTHER,
    WITHOUT,
    begun,
    dask_cluster,
    is_writing,
    preload,
    stopped,
)
from hangs import HANGS, ended, until
from interrupted_runs import alone, content
from marks import linux, slow
from parts_runs import folder_of, process

from streamshard.engine import cluster_client

pytestmark = [linux]


@pytest.fixture
def nobody(patient, monkeypatch) -> Iterator[str]:
    """The address of a port where nothing listens, nor will; what is asked there gives up soon."""
    monkeypatch.setattr(cluster_client, "CONNECT_SECONDS", 1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"tcp://127.0.0.1:{taken.getsockname()[1]}"


# --- no scheduler ---------------------------------------------------------------------------------


@contextlib.contextmanager
def listening(answer: bytes, *, closes: bool = False) -> Iterator[tuple[str, threading.Event]]:
    """The address of something that takes connections, and says this to each; whether it has."""
    heard = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server, contextlib.ExitStack() as stack:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    taken = stack.enter_context(server.accept()[0])
                    taken.sendall(answer)
                    heard.set()
                    if closes:
                        taken.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}", heard
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_a_file_that_is_not_there(pair, cli):
    pytest.importorskip("distributed")
    outcome = cli(*pair.command, "--scheduler", "none.json")
    assert outcome.code == 2, outcome.err
    assert "no such file" in outcome.err
    assert "--scheduler-file" in outcome.err
    assert [*pair.output.parent.iterdir()] == []


def test_a_port_where_nothing_is(pair, cli, nobody):
    outcome = cli(*pair.command, "--scheduler", nobody)
    assert outcome.code == 9, outcome.err
    assert "no scheduler answers there (" in outcome.err
    assert "Start one (dask scheduler)" in outcome.err
    assert [*pair.output.parent.iterdir()] == []


@pytest.mark.parametrize(
    ("answer", "closes", "said"),
    [
        (b"", False, "says nothing"),
        (b"", True, "not as Dask does"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", False, "not as Dask does"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", True, "not as Dask does"),
        (b"\x01" + bytes(7), False, "says nothing"),
        (b"\x08" + bytes(15), False, "not as Dask does"),
    ],
)
def test_a_port_of_something_else(answer, closes, said, pair, cli, patient, monkeypatch):
    with listening(answer, closes=closes) as (address, heard):
        if said == "says nothing":
            waiting = SimpleNamespace(run=asyncio.run, wait_for=partial(_soon, heard))
            monkeypatch.setattr(cluster_client, "asyncio", waiting)
        outcome = cli(*pair.command, "--scheduler", address)
    assert outcome.code == 9, outcome.err
    assert said in outcome.err
    assert "most have port 8786" in outcome.err
    assert [*pair.output.parent.iterdir()] == []


async def _soon(heard, asked, _seconds):
    """Give up what is asked a second after it is heard: nothing more will come."""
    task = asyncio.ensure_future(asked)
    await asyncio.to_thread(heard.wait)
    return await asyncio.wait_for(task, 1)


def test_the_file_of_a_scheduler_that_has_ended(pair, cli, nobody):
    file = pair.root / "scheduler.json"
    file.write_text(f'{{"address": "{nobody}"}}')
    outcome = cli(*pair.command, "--scheduler", str(file))
    assert outcome.code == 9, outcome.err
    assert f"{file} ({nobody}): no scheduler answers" in outcome.err


def test_the_address_of_a_worker(pair, cluster, cli):
    worker = cluster.worker()
    address = re.search(r"Start worker at:\s+(tcp://\S+)", worker.log)[1]
    outcome = cli(*pair.command, "--scheduler", address)
    assert outcome.code == 9, outcome.err
    assert "there is no scheduler, but a Worker of Dask" in outcome.err


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
    """No client is made, which would show a traceback."""
    pytest.importorskip("distributed")
    found = process([*pair.command, "--scheduler", scheduler])
    said = ended(found)
    assert found.returncode == 9, said
    assert "no scheduler answers there" in said
    assert "Traceback" not in said


# --- other workers --------------------------------------------------------------------------------


def test_a_worker_that_comes_while_it_is_waited_for(pair, clean, cluster):
    found = begun(pair, cluster)
    line = found.stderr.readline()
    while line and "has no worker yet" not in line:
        line = found.stderr.readline()
    assert f"{cluster.address} has no worker yet: waiting {HANGS} s for one" in line
    cluster.worker()
    said = ended(found)
    assert found.returncode == 0, said
    assert content(pair.output) == clean


def test_a_worker_without_the_package(pair, cluster, cli):
    cluster.worker()
    cluster.worker(*preload(cluster, WITHOUT))
    outcome = cli(*pair.command, "--scheduler", cluster.address)
    assert outcome.code == 9, outcome.err
    assert "1 of 2 workers cannot do this" in outcome.err
    assert "it has no streamshard" in outcome.err
    assert "Start all in the same environment" in outcome.err
    assert [*pair.output.parent.iterdir()] == []


def test_a_scheduler_without_the_package(pair, clean, tmp_path, cli, patient):
    """It has only to say who does what."""
    (tmp_path / "other").mkdir()
    with dask_cluster(tmp_path / "other", WITHOUT) as cluster:
        cluster.worker()
        outcome = cli(*pair.command, "--scheduler", cluster.address)
    assert outcome.code == 0, outcome.err
    assert content(pair.output) == clean


@slow
@pytest.mark.parametrize(
    ("code", "said"),
    [(OTHER, "streamshard 0.0.9 (cafe) and not"), (WITHOUT, "it has no streamshard")],
)
def test_another_worker_that_comes_late(code, said, pair, clean, cluster, cli):
    first = stopped(cluster)
    found = begun(pair, cluster)
    until(lambda: is_writing(pair), found)
    cluster.worker(*preload(cluster, code))
    first.send(signal.SIGKILL)
    told = ended(found)
    assert found.returncode == 9, told
    assert said in told
    assert "in the same environment as" in told
    assert "run the same command again" in told or not folder_of(pair).exists()
    assert "Traceback" not in told
    cluster.workers[-1].end()
    cluster.worker()
    assert cli(*pair.command, "--scheduler", cluster.address).code == 0
    assert content(pair.output) == clean
    assert alone(pair)
