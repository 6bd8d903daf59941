"""Threads that share work, stop at the first error, and do not outlive an interrupt for long."""

from __future__ import annotations

import contextlib
import mmap
import queue
import threading
from collections.abc import Callable, Iterable
from typing import TypeAlias, TypeVar

from streamshard.disk.files import Files
from streamshard.disk.threads import new_thread, start, starts_another
from streamshard.disk.waiting import wait_by
from streamshard.tensors.kernel import keep_subnormals
from streamshard.tensors.workspace import Held, Workspace

__all__ = ["SENDERS", "Background", "OnStep", "Progress", "Stop", "Stopped", "collect", "share"]
__all__ += ["started"]


Progress: TypeAlias = Callable[[int, str], None]
"""Is told the bytes and the tensor of each finished piece."""
OnStep: TypeAlias = Callable[[str, int, int], None]
"""Is told what is done from now on: a word, how many bytes that takes, and how many of them are done."""
SENDERS = 3
"""Threads that write around the page cache: disks are as fast as they can with some writes at a time."""
T = TypeVar("T")
R = TypeVar("R")


class Stopped(Exception):  # noqa: N818 - no error: another thread has one
    """The run has ended elsewhere."""


class Stop:
    """Tells the threads of a run to end, and keeps the first error of any of them."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.error: BaseException | None = None

    def fail(self, error: BaseException) -> None:
        """End the run because of an error."""
        if not isinstance(error, Stopped):
            self.error = self.error or error
        self._event.set()

    def going(self) -> bool:
        """Whether the run has not ended."""
        return not self._event.is_set()

    def check(self) -> None:
        """Raise `Stopped` if the run has ended."""
        if self._event.is_set():
            raise Stopped

    def wait(self, seconds: float) -> None:
        """Wait for so long; raise `Stopped` as soon as the run has ended."""
        if self._event.wait(seconds):
            raise Stopped


def share(
    items: Iterable[T],
    work: Callable[[T, Workspace], None],
    workers: int,
    stop: Stop,
    *,
    spare: bool = False,
) -> None:
    """Call `work` for each item, on `workers` threads with a workspace each, in no certain order.

    `work` should call `stop.check` now and then. The first error ends the run and is raised here.
    With `spare` files that are read leave the page cache as it was.
    """
    taken, lock = iter(items), threading.Lock()

    held = Held(workers)

    def loop() -> None:
        workspace = Workspace(files, held)
        try:
            keep_subnormals()
            wait_by(stop.wait)
            while stop.going():
                with lock:
                    item = next(taken, _END)
                if item is _END:
                    return
                work(item, workspace)  # type: ignore[arg-type]
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
            stop.fail(error)
        finally:
            workspace.reader.leave()

    with contextlib.closing(Files(spare=spare, onward=True)) as files:
        threads = [new_thread(loop) for _ in range(workers)]
        try:
            for place, thread in enumerate(threads):
                if not starts_another(thread, place):
                    break
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
        except BaseException as error:
            stop.fail(error)
            raise
        finally:
            # Files must not be closed under a thread that reads.
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
    if stop.error is not None:
        raise stop.error


def collect(items: Iterable[T], work: Callable[[T, Workspace], R], workers: int) -> list[R]:
    """What `work` gives for each item, in the order of the items; shared as by `share`."""
    found: dict[int, R] = {}

    def note(item: tuple[int, T], workspace: Workspace) -> None:
        place, value = item
        found[place] = work(value, workspace)

    share(enumerate(items), note, workers, Stop())
    return [found[place] for place in range(len(found))]


_END = object()


def started(work: Callable[[], None]) -> threading.Thread:
    """A thread that has begun with some work; what is active here is active there."""
    thread = new_thread(work)
    start(thread)
    return thread


class Background:
    """One thread that does tasks in order. An error of one of them stops the run."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # A daemon: waiting for the disk must not keep an interrupted process alive.
        self._thread = started(self._loop)

    def add(self, task: Callable[[], None]) -> None:
        """Have something done later."""
        self._tasks.put(task)

    def finish(self) -> None:
        """Wait until everything is done; raises the error that stopped the run, if there is one."""
        self._tasks.put(None)
        self._thread.join()
        if self._stop.error is not None:
            raise self._stop.error

    def abandon(self) -> None:
        """Have the thread end; what it is waiting for is not waited for here."""
        self._tasks.put(None)

    def _loop(self) -> None:
        while (task := self._tasks.get()) is not None and self._stop.going():
            try:
                task()
            except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
                self._stop.fail(error)


class Senders:
    """A few threads that wait for the disk while others compute. An error of one stops the run.

    What they are given is done in any case, also when the run has stopped: there is never much of it.
    """

    def __init__(self, stop: Stop) -> None:
        self.free: list[mmap.mmap] = []
        self._stop = stop
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._room = threading.Semaphore(SENDERS)
        self._threads = 0
        for _ in range(SENDERS):
            if not starts_another(new_thread(self._loop), self._threads):
                break
            self._threads += 1

    def add(self, task: Callable[[], None]) -> None:
        """Have something done; waits while every thread has something to do."""
        self._room.acquire()
        self._tasks.put(task)

    def finish(self) -> None:
        """Have the threads end when everything is done."""
        for _ in range(self._threads):
            self._tasks.put(None)

    def _loop(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                task()
            except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
                self._stop.fail(error)
            finally:
                self._room.release()
