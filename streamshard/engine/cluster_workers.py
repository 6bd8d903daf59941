"""Asking the workers of a cluster something, all at once; one that is frozen is not waited for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from threading import Thread
from typing import Any

from streamshard.disk.threads import new_thread, starts_another
from streamshard.errors import ClusterError, listed

__all__ = ["ANSWER_SECONDS", "asked", "nobody_answers", "silence"]

ANSWER_SECONDS = 15
"""How long a worker may take to look at the files of an output."""
AT_ONCE = 64


def asked(
    client: Any, workers: Iterable[str], what: Callable[..., object], *given: Any
) -> dict[str, Any]:
    """What each of some workers answers, or the error that came instead; those that are silent lack."""
    found: dict[str, Any] = {}
    left = sorted(workers, reverse=True)

    def ask() -> None:
        while left:
            try:
                worker = left.pop()
            except IndexError:  # another thread took the last one
                return
            try:
                found[worker] = client.run(what, *given, workers=[worker])[worker]
            except Exception as error:  # noqa: BLE001 - what it is is for the caller to say
                found[worker] = error

    count = min(len(left), AT_ONCE)
    end = time.monotonic() + ANSWER_SECONDS * -(-len(left) // AT_ONCE)
    threads: list[Thread] = []
    while len(threads) < count and starts_another(thread := new_thread(ask), len(threads)):
        threads.append(thread)
    for thread in threads:
        thread.join(max(end - time.monotonic(), 0))
    return dict(found)


def silence(where: str, silent: Iterable[str]) -> str:
    """What is to be said of workers that do not answer."""
    names = listed(sorted(silent))
    return f"{where}: no answer in {ANSWER_SECONDS} s of {names}: frozen, or without network"


def nobody_answers(where: str, silent: Iterable[str]) -> ClusterError:
    """The error if no worker answers."""
    return ClusterError(
        f"{silence(where, silent)}. No other worker is there: start one, and end those, then run the "
        "same command again."
    )
