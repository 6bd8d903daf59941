"""Something done with many things at once, by threads that nobody waits for when it has failed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

from streamshard.disk.threads import new_thread, starts_another
from streamshard.disk.waiting import wait_by

__all__ = ["together"]

T = TypeVar("T")


class _Ended(Exception):  # noqa: N818 - no error: nobody wants it any more
    pass


def together(items: Iterable[T], do: Callable[[T], object], most: int) -> None:
    """Do something with each, `most` of them at once; the first error is raised.

    After an error or an interrupt nobody is waited for: a thread that waits for a server may hear of
    nothing for a minute, and ends by itself then.
    """
    left, lock, end = iter(items), threading.Lock(), threading.Event()
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def pause(seconds: float) -> None:
        if end.wait(seconds):
            raise _Ended

    def loop() -> None:
        wait_by(pause)
        try:
            while not end.is_set():
                with lock:
                    item = next(left, _NONE)
                if item is _NONE:
                    break
                do(item)  # type: ignore[arg-type]
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
            ended.put(error)
        else:
            ended.put(None)

    started = 0
    try:
        for _ in range(most):
            if not starts_another(new_thread(loop), started):
                break
            started += 1
        for _ in range(started):
            if (error := ended.get()) is not None:
                raise error
    finally:
        end.set()


_NONE = object()
