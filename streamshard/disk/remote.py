"""A file that is read over a network, by ranges, and never stored: a `Source`, whatever it lies on.

Who keeps it is behind an `Opener`, which opens streams of bytes from some place on; that is all that
another kind of store has to do. Here is what they all need: a thread has a few open streams and
reads each of them forwards, a stream that breaks is opened again at the byte that it has reached, and
the digest of all bytes is taken along if they come in their order.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import queue
import threading
from functools import partial
from typing import Protocol

from streamshard.disk.files import as_stream
from streamshard.disk.inputs import Stamp
from streamshard.disk.mapped import Mapped
from streamshard.disk.remote_digest import Frontier, WrongDigestError
from streamshard.disk.sources import Abilities
from streamshard.disk.system import AnyPath
from streamshard.disk.waiting import check_going, wait
from streamshard.errors import HubError, printable

__all__ = ["AgainError", "Opener", "Remote", "RemoteFile", "Stream"]

MOST_STREAMS = 4
"""That a thread has open: a fused weight is made of three that lie apart.

The client has a hundred connections, and a large model as many files.
"""
GAP_NBYTES = 1 << 20
"""What lies between two places is read and dropped up to that size: a new stream takes longer."""
BLOCK_NBYTES = 128 * 1024
"""Less than that is not asked for; the last bytes are kept."""
LOOK_NBYTES = 1 << 20
"""What is asked for where somebody looks at some place of a file, and then at another."""
MOST_NBYTES = 1 << 20
"""Nor more than that at a time: what is a few times a processor's own cache is slower again."""
BUFFERS = 4
"""Of so many bytes, that a stream has while a digest is taken of what came before."""
WAITS = (0.5, 2.0, 8.0, 20.0)
"""Seconds after the first, second … failure in a row; one more is the end."""
LONGEST_WAIT = 330.0
"""Seconds that a server may ask for: those of the hub count requests by five minutes."""
_NOTHING = memoryview(b"")


class AgainError(Exception):
    """A stream could not be opened or has broken, and another try may do: whose reason is no matter.

    `seconds` is how long the server asks to wait.
    """

    def __init__(self, reason: str, seconds: float | None = None) -> None:
        super().__init__(reason, seconds)
        self.reason, self.seconds = reason, seconds


class Stream(Protocol):
    """Bytes of a file, one after the other."""

    def read_into(self, out: memoryview) -> int:
        """Put the next bytes at the beginning of `out`, at least one; returns how many, 0 at the end.

        Raises `AgainError`.
        """

    def close(self) -> None:
        """Close it, wherever it is; raises nothing."""


class Opener(Protocol):
    """Who keeps a file."""

    def open(self, start: int, stop: int) -> Stream:
        """A stream of the bytes `[start, stop)`.

        Raises `AgainError`, or what is the end of the run.
        """


class Remote:
    """A file elsewhere: what is known of it, and what of it has come.

    It has `nbytes` bytes, and `head` are the first of these. `digest` is that of its content, as
    `sha256:…` or `git:…`, or anything else that nobody can compute. `name` is what people are told.
    One is there for all who open it, so that the digest is taken of what any of them reads.
    """

    def __init__(
        self, name: str, nbytes: int, digest: str, opener: Opener, *, head: bytes = b""
    ) -> None:
        self.name, self.nbytes, self.digest = name, nbytes, digest
        self.head, self._opener = head, opener
        self.stamp = _stamp(digest, nbytes)
        self.frontier = Frontier(name, nbytes, digest)
        self.opened = 0
        """How often a stream was asked for."""
        self._lock = threading.Lock()
        self.frontier.note(0, head, len(head))

    def open(self, key: AnyPath) -> RemoteFile:
        """It, as a source with this key."""
        return RemoteFile(key, self)

    def open_stream(self, start: int, stop: int) -> Stream:
        """A stream of some of its bytes."""
        with self._lock:
            self.opened += 1
        return self._opener.open(start, stop)


class RemoteFile:
    """A `Remote` that is open to be read, at any place, by several threads."""

    spare = False

    def __init__(self, key: AnyPath, remote: Remote) -> None:
        self.path, self.nbytes, self.stamp = key, remote.nbytes, remote.stamp
        self.onward = False
        self._remote = remote
        self._lines: dict[int, list[_Line]] = {}
        """The streams of each thread; the last one was used last."""

    @property
    def abilities(self) -> Abilities:
        """What it can do."""
        return Abilities(ranges=True, local=None, in_order=True)

    def __enter__(self) -> RemoteFile:  # noqa: PYI034 - Self needs Python 3.11
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all streams."""
        for lines in [*self._lines.values()]:
            for line in lines:
                line.close()
        self._lines.clear()
        self._remote.frontier.rest()

    def check(self) -> None:
        """It does not change: its content has this digest, or it is another one."""

    def prove(self) -> None:
        """Read what is missing for its digest; `WrongDigestError` if that is another one."""
        frontier, onward = self._remote.frontier, self.onward
        buffer = memoryview(bytearray(MOST_NBYTES))
        self.onward = True
        try:
            while (at := frontier.missing) is not None:
                self.read_into(buffer, at)
        except WrongDigestError:
            raise
        except HubError:  # what was found is told then
            return
        finally:
            self.onward = onward

    def mapping(self) -> Mapped | None:
        """None: it must be read."""
        return None

    def stream(self) -> io.BufferedReader:
        """It as Python has files."""
        return as_stream(self)

    def read(self, offset: int, nbytes: int) -> bytes:
        """Up to `nbytes` bytes from `offset` on; of the file hardly more is asked for."""
        out = io.BytesIO(bytes(max(min(nbytes, self.nbytes - offset), 0)))
        with out.getbuffer() as buffer:
            self._fill(buffer, offset, offset + max(len(buffer), BLOCK_NBYTES))
        return out.getvalue()

    def read_into(self, out: memoryview, offset: int) -> int:
        """Fill `out` from `offset` on; fewer bytes than asked for only at the end.

        With `onward` a stream that is opened for it goes to the end of the file. Raises `HubError` if no
        more bytes come, however often they are asked for.
        """
        wanted = out[: max(min(len(out), self.nbytes - offset), 0)]
        most = self.nbytes if self.onward else offset + max(len(wanted), LOOK_NBYTES)
        self._fill(wanted, offset, most)
        return len(wanted)

    def _fill(self, out: memoryview, offset: int, stop: int) -> None:
        known = self._remote.head[offset : offset + len(out)]
        out[: len(known)] = known
        if len(known) < len(out):
            offset += len(known)
            self._line(offset).fill(out[len(known) :], offset, min(stop, self.nbytes))

    def _line(self, offset: int) -> _Line:
        """The stream of this thread that is best to read from there."""
        lines = self._lines.setdefault(threading.get_ident(), [])
        near = [line for line in lines if line.kept_from <= offset <= line.at + GAP_NBYTES]
        if near:
            line = min(near, key=lambda one: abs(offset - one.at))
            lines.remove(line)
        else:
            if len(lines) >= MOST_STREAMS:
                lines.pop(0).close()
            line = _Line(self._remote, offset)
        lines.append(line)
        return line


class _Line:
    """A place in a file that moves forwards, and the stream of what comes next."""

    def __init__(self, remote: Remote, at: int) -> None:
        self.at = at
        """Where the next byte that comes is."""
        self._remote = remote
        self._stream: Stream | None = None
        self._end = at
        self._failures = 0
        self._kept = _NOTHING
        self._free = queue.SimpleQueue[mmap.mmap]()
        self._buffers = 0

    @property
    def kept_from(self) -> int:
        """The bytes from there to `at` are kept."""
        return self.at - len(self._kept)

    def close(self) -> None:
        """Close the stream; another one is opened when it is needed."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()
            with contextlib.suppress(ValueError):  # it may be of another thread
                _mine.lines.remove(self)

    def fill(self, out: memoryview, offset: int, stop: int) -> None:
        """Fill `out` from `offset` on, which is not far; a stream that is opened goes to `stop`."""
        while len(out):
            if not self.kept_from <= offset < self.at:
                self._more(len(out) + offset - self.at, stop)
                continue
            first = offset - self.kept_from
            count = min(len(self._kept) - first, len(out))
            out[:count] = self._kept[first : first + count]
            out, offset = out[count:], offset + count

    def _more(self, wanted: int, stop: int) -> None:
        """Have the next bytes, however often the stream breaks: those wanted, and what is there."""
        whole = stop == self._remote.nbytes
        most = MOST_NBYTES if whole else min(max(wanted, BLOCK_NBYTES), MOST_NBYTES)
        wanted = min(wanted, most)
        self._kept = _NOTHING
        memory, start = self._memory(), self.at
        buffer = memoryview(memory)
        try:
            while (came := self.at - start) < wanted:
                count = self._next(buffer[came:most], stop)
                self.at += count
                self._kept = buffer[: came + count]
        except BaseException:
            self._free.put(memory)
            raise
        done = partial(self._free.put, memory)
        self._remote.frontier.note(start, memory, len(self._kept), done)

    def _memory(self) -> mmap.mmap:
        """Where nothing is that is kept, or that a digest is still to be taken of."""
        if self._free.empty() and self._buffers < BUFFERS:
            self._buffers += 1
            return mmap.mmap(-1, MOST_NBYTES)
        return self._free.get()

    def _next(self, out: memoryview, stop: int) -> int:
        """Put the next bytes into `out`, at least one; returns how many these are."""
        while True:
            try:
                count = self._read(out, stop)
            except AgainError as error:
                self.close()
                self._failed(error)
            except BaseException:
                self.close()
                raise
            else:
                self._failures = 0
                return count

    def _read(self, out: memoryview, stop: int) -> int:
        if self._stream is None or self.at == self._end:
            self.close()
            check_going()  # a run that has ended opens nothing
            lines = _mine.lines
            while len(lines) >= MOST_STREAMS:
                lines.pop(0).close()
            self._end = stop
            self._stream = self._remote.open_stream(self.at, stop)
            lines.append(self)
        count = self._stream.read_into(out[: self._end - self.at])
        if not count:
            raise AgainError("the connection ended too early")
        return count

    def _failed(self, error: AgainError) -> None:
        """Wait for the next try, if there is one."""
        self._failures += 1
        name, reason = printable(self._remote.name), printable(error.reason)
        if self._failures > len(WAITS):
            raise HubError(
                f"{name}: nothing comes from byte {self.at:,} on, in {self._failures} tries: {reason}. "
                "Run the same command again: it continues. Without --stream it downloads files first."
            )
        asked = error.seconds or 0
        if asked > LONGEST_WAIT:
            raise HubError(
                f"{name}: {reason}, and asks to wait {asked:,.0f} seconds. Run the same command again "
                "then: it continues."
            )
        wait(max(WAITS[self._failures - 1], asked))


class _Mine(threading.local):
    """What each thread has of its own: its lines that have a stream, whatever they are of."""

    def __init__(self) -> None:
        self.lines: list[_Line] = []


_mine = _Mine()


def _stamp(digest: str, nbytes: int) -> Stamp:
    """The identity of content: that of its digest, for ever."""
    number = 0
    with contextlib.suppress(ValueError):
        number = int(digest.rpartition(":")[2][:15], 16)
    return Stamp(-1, number, nbytes, 0, 0)
