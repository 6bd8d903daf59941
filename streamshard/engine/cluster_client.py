"""The way to a Dask scheduler: what people give as one is tried first, and told if it is something else.

A client of Dask by itself waits without end for the answer of something that is no scheduler, and takes
half a minute to end where nothing answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from streamshard.errors import ClusterError, UsageError, printable
from streamshard.extras import needed_for

__all__ = ["connected"]


CONNECT_SECONDS = 12
ANSWER_SECONDS = 30


@contextlib.contextmanager
def connected(scheduler: str) -> Iterator[Any]:
    """A client of the scheduler at an address, or in the file that it has written.

    Raises `UsageError` if that file is none, and `ClusterError` if no scheduler answers.
    """
    with needed_for("--scheduler"):
        from distributed import Client
    for name in ["distributed", "distributed.client"]:  # each has a level of its own
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what counts is told here
    file = Path(scheduler)
    address = _address_in(file) if file.suffix == ".json" else scheduler
    where = printable(scheduler)
    if address != scheduler:
        where += f" ({printable(address)})"
    _try(address, where)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # versions are compared later
            client = Client(address, timeout=CONNECT_SECONDS, set_as_default=False)
    except Exception as error:
        raise _nobody(where, str(error) or type(error).__name__) from error
    try:
        yield client
    finally:
        with contextlib.suppress(Exception):
            client.close(timeout=2)


def _try(address: str, where: str) -> None:
    """Raise `ClusterError` unless a scheduler answers at an address."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(asyncio.run(_kind(address)))
        except Exception as error:  # noqa: BLE001 - whatever is there may answer anything
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)  # who calls may have a loop, as notebooks do
    thread.start()
    thread.join(CONNECT_SECONDS + 2 * ANSWER_SECONDS)
    answer = found[0] if found else TimeoutError()
    if type(answer) is OSError or isinstance(
        answer, ValueError | KeyError
    ):  # no connection was made
        raise _nobody(where, _first_cause(answer)) from answer
    if isinstance(answer, Exception):
        silent = isinstance(answer, TimeoutError)
        what = (
            "takes the connection, and says nothing" if silent else "answers, but not as Dask does"
        )
        raise ClusterError(
            f"{where}: what is there {what}: no scheduler, one that hangs, or one that wants tls://. "
            "dask scheduler says its address when it starts: most have port 8786, and a dashboard with "
            "port 8787, which is none."
        ) from answer
    if answer != "Scheduler":
        raise ClusterError(
            f"{where}: there is no scheduler, but a {printable(str(answer))} of Dask. Give the address "
            "that workers are given."
        )


async def _kind(address: str) -> object:
    """What is at an address, in its own words; `OSError` itself if no connection is made."""
    from distributed.comm import connect, resolve_address
    from distributed.security import Security

    async def asked() -> object:
        options = Security().get_connection_args("client")
        comm = await connect(resolve_address(address), timeout=CONNECT_SECONDS, **options)
        try:
            await comm.write({"op": "identity"})
            return (await comm.read())["type"]
        finally:
            comm.abort()

    return await asyncio.wait_for(asked(), CONNECT_SECONDS + ANSWER_SECONDS)


def _first_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__


def _nobody(where: str, why: str) -> ClusterError:
    return ClusterError(
        f"{where}: no scheduler answers there ({printable(why)}). Start one (dask scheduler), and give "
        "its address, like tcp://host:8786, or the file that it writes with --scheduler-file."
    )


def _address_in(file: Path) -> str:
    """The address in the file that a scheduler has written."""
    where = f"--scheduler: {printable(str(file))}"
    try:
        found = json.loads(file.read_bytes())
        if isinstance(found["address"], str):
            return str(found["address"])
    except FileNotFoundError as error:
        raise UsageError(
            f"{where}: no such file. Start dask scheduler with --scheduler-file, on a disk that this "
            "machine sees, too."
        ) from error
    except OSError as error:
        raise UsageError(f"{where}: cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UsageError(
        f"{where}: has no address of a scheduler. Give the file that dask scheduler wrote "
        "(--scheduler-file)."
    )
