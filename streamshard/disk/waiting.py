"""How a thread waits for something that is not there yet: a run that ends does not wait for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar

__all__ = ["check_going", "wait", "wait_by"]


_way: ContextVar[Callable[[float], object] | None] = ContextVar("way to wait", default=None)


def wait(seconds: float) -> None:
    """Wait for so long; raises what the run of this thread raises when it has ended."""
    (_way.get() or time.sleep)(seconds)


def check_going() -> None:
    """Raise what the run of this thread raises when it has ended."""
    way = _way.get()
    if way is not None:
        way(0)


def wait_by(way: Callable[[float], object]) -> None:
    """Have `wait` call this in the present thread."""
    _way.set(way)
