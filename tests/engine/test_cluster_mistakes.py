"""What is given as a scheduler, and workers that are missing, late or other ones: each is told."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import threading
from collections.abc import Iterator

import pytest
from dask_cluster import OTHER, SLOW, WITHOUT, begun, dask_cluster, is_writing, preload
from interrupted_runs import alone, content, until
from marks import linux, slow
from parts_runs import folder_of, process

from streamshard.engine import cluster_client

pytestmark = [linux]


@pytest.fixture
def impatient(monkeypatch) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr(cluster_client, "CONNECT_SECONDS", 1)
    monkeypatch.setattr(cluster_client, "ANSWER_SECONDS", 1)


# --- no scheduler ---------------------------------------------------------------------------------


@contextlib.contextmanager
def listening(answer: bytes, *, closes: bool = False) -> Iterator[str]:
    """The address of something that takes connections, and says this to each."""
    with socket.create_server(("127.0.0.1", 0)) as server, contextlib.ExitStack() as stack:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    taken = stack.enter_context(server.accept()[0])
                    taken.sendall(answer)
                    if closes:
                        taken.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"tcp://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_a_file_that_is_not_there(pair, cli):
    pytest.importorskip("distributed")
    outcome = cli(*pair.command, "--scheduler", "none.json")
    assert outcome.code == 2, outcome.err
    assert "no such file" in outcome.err
    assert "--scheduler-file" in outcome.err
    assert [*pair.output.parent.iterdir()] == []


def test_a_port_where_nothing_is(pair, cli, impatient):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    outcome = cli(*pair.command, "--scheduler", f"tcp://127.0.0.1:{port}")
    assert outcome.code == 9, outcome.err
    assert "no scheduler answers there ([Errno" in outcome.err
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
def test_a_port_of_something_else(answer, closes, said, pair, cli, impatient):
    with listening(answer, closes=closes) as address:
        outcome = cli(*pair.command, "--scheduler", address)
    assert outcome.code == 9, outcome.err
    assert said in outcome.err
    assert "most have port 8786" in outcome.err
    assert [*pair.output.parent.iterdir()] == []


def test_the_file_of_a_scheduler_that_has_ended(pair, cli, impatient):
    file = pair.root / "scheduler.json"
    file.write_text('{"address": "tcp://127.0.0.1:9"}')
    outcome = cli(*pair.command, "--scheduler", str(file))
    assert outcome.code == 9, outcome.err
    assert f"{file} (tcp://127.0.0.1:9): no scheduler answers" in outcome.err


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
    """No client is made that takes a minute to end and shows a traceback."""
    pytest.importorskip("distributed")
    found = process([*pair.command, "--scheduler", scheduler])
    said = found.communicate(timeout=50)[1]
    assert found.returncode == 9, said
    assert "no scheduler answers there" in said
    assert "Traceback" not in said


# --- other workers --------------------------------------------------------------------------------


def test_a_worker_that_comes_while_it_is_waited_for(pair, clean, cluster):
    found = begun(pair, cluster)
    line = found.stderr.readline()
    while line and "has no worker yet" not in line:
        line = found.stderr.readline()
    assert f"{cluster.address} has no worker yet: waiting 60 s for one" in line
    cluster.worker()
    said = found.communicate(timeout=90)[1]
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


def test_a_scheduler_without_the_package(pair, clean, tmp_path, cli):
    """It has only to say who does what."""
    pytest.importorskip("distributed")
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
    first = cluster.worker(*preload(cluster, SLOW))
    found = begun(pair, cluster)
    until(lambda: is_writing(pair))
    cluster.worker(*preload(cluster, code))
    first.send(signal.SIGKILL)
    told = found.communicate(timeout=90)[1]
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
