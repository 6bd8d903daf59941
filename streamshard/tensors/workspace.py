"""What a worker has at hand while it fills windows of tensors: open files, buffers, sums."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import Any, Protocol

import numpy as np

from streamshard.disk.files import ByteRange, Files
from streamshard.disk.reader import Reader
from streamshard.tensors.arrays import Bytes, Float32
from streamshard.tensors.rounding import Changes

__all__ = ["Held", "Workspace"]


class Whole(Protocol):
    """What can be asked for all of its bytes; tensors are."""

    @property
    def nbytes(self) -> int:
        """How many these are."""

    @property
    def rows(self) -> int:
        """Into how many rows they fall."""

    def fill(self, start: int, stop: int, out: Bytes, work: Workspace) -> None:
        """Put the bytes of rows `[start, stop)` into `out`."""


class Held:
    """All bytes of the last few tensors that were asked for, shared by the workers of a run.

    For the factors of fused experts: each expert needs some of all of their rows.
    """

    def __init__(self, workers: int = 1) -> None:
        self._count = self.count_for(workers)
        self._lock = threading.Lock()
        self._kept: dict[int, tuple[Whole, Bytes]] = {}

    @staticmethod
    def count_for(workers: int) -> int:
        """How many tensors are held: one a worker, and two if experts of two kinds take turns."""
        return max(workers, 2)

    def all(self, tensor: Whole, work: Workspace) -> Bytes:
        """The bytes of a tensor."""
        key = id(tensor)  # it is kept with the tensor, so that no other one can have it
        with self._lock:
            found = self._kept.pop(key, None)
            if found is None:
                if len(self._kept) >= self._count:
                    self._kept.pop(next(iter(self._kept)))
                data = np.empty(tensor.nbytes, np.uint8)
                tensor.fill(0, tensor.rows, data, work)
                found = (tensor, data)
            self._kept[key] = found
            return found[1]


class Workspace:
    """What one worker needs to fill windows: open inputs, reused buffers, and sums.

    `changes` are what updates did to computed elements since they were last set.
    """

    def __init__(self, files: Files, held: Held | None = None) -> None:
        self.files = files
        self.reader = Reader(files)
        self.held = held or Held()
        self.changes = Changes()
        self._buffers: dict[str, Bytes] = {}
        self._kept: dict[tuple[Hashable, int], tuple[object, Hashable, Any]] = {}
        self._spent: dict[Hashable, Any] = {}

    def bytes(self, name: str, nbytes: int) -> Bytes:
        """A buffer that is used again under the same name; its content is left over."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.nbytes < nbytes:
            self._buffers.pop(name, None)
            buffer = np.empty(nbytes, np.uint8)
            self._buffers[name] = buffer
        return buffer[:nbytes]

    @contextlib.contextmanager
    def view(self, span: ByteRange, name: str, align: int = 1) -> Iterator[Bytes]:
        """Bytes of a file, to be looked at until the block ends: where they are mapped, or read.

        They are read into the buffer of this `name` if they are not mapped, or do not begin there at a
        multiple of `align`. Raises `ReadError`, also when the block ends: what was made of them by
        then must not be used.
        """

        def room(nbytes: int) -> memoryview:
            return self.bytes(name, nbytes).data

        with self.reader.view(span, room, align) as found:
            yield np.frombuffer(found, np.uint8)

    def float32(self, name: str, rows: int, columns: int) -> Float32:
        """The like as an fp32 matrix."""
        return self.bytes(name, rows * columns * 4).view(np.float32).reshape(rows, columns)

    def kept(self, node: object, what: Hashable, part: Hashable, make: Callable[[Any], Any]) -> Any:
        """What `make` gave for a part of a node, kept until another part or tensor is begun.

        It is given one of the same kind (`what`) that nobody needs any more, whose memory it may take,
        or None: fresh memory costs more than what is put there.
        """
        key = (what, id(node))  # it is kept with the node, so that no other one can have it
        found = self._kept.get(key)
        if found is None or found[1] != part:
            self._kept.pop(key, None)
            spent = self._spent.pop(what, None) if found is None else found[2]
            self._kept[key] = found = (node, part, make(spent))
        return found[2]

    def forget(self) -> None:
        """Drop what was kept, but not what is held; called when another tensor begins."""
        self._spent |= {what: found for (what, _), (_, _, found) in self._kept.items()}
        self._kept.clear()
