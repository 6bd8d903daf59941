"""Threads as all of ours are: daemons with a small stack, in which is active what is where they begin."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable

from streamshard.limits import STACK_NBYTES

__all__ = ["new_thread", "start", "starts_another"]

_starting = threading.Lock()


def new_thread(work: Callable[[], None]) -> threading.Thread:
    """A thread that is still to be started, as the inputs that note what is opened are active in it."""
    return threading.Thread(target=contextvars.copy_context().run, args=(work,), daemon=True)


def start(thread: threading.Thread) -> None:
    """Start a thread; raises `RuntimeError` if the system allows no more of them."""
    with _starting:  # the size is one for the whole process
        before = threading.stack_size(STACK_NBYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(before)


def starts_another(thread: threading.Thread, already: int) -> bool:
    """Start one of several threads that do the same, of which so many run `already`.

    False if the system allows no more of them: fewer do the same. Of none it is a `RuntimeError`.
    """
    try:
        start(thread)
    except RuntimeError:
        if not already:
            raise
        return False
    return True
