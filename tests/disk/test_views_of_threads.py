"""Memory that several threads look at: each by a view of its own.

Python counts the views that were made of each other, so that memory is given back after the last one.
Without a GIL threads that make and drop such views at once make it miscount, and it is given back while
somebody still looks at it (Python 3.13 to 3.15). With a GIL that cannot be seen, so what is compared here
is what the counts belong to.
"""

from __future__ import annotations

import gc
import hashlib
import mmap
import os

import pytest

from streamshard.disk import held
from streamshard.disk.direct import CHUNK_NBYTES, DirectFile
from streamshard.disk.held import Held
from streamshard.disk.mapped import WINDOW_NBYTES, mapped
from streamshard.disk.remote import MOST_NBYTES, Remote
from streamshard.disk.remote_digest import _Hash
from streamshard.engine.workers import Senders, Stop


def counted_with(view: memoryview) -> object:
    """What counts this view and all that were made of the same one."""
    (found,) = gc.get_referents(view)
    assert type(found).__name__ == "managedbuffer"
    return found


def test_views_that_are_made_of_each_other_are_counted_together():
    whole = memoryview(bytes(10))
    assert counted_with(whole[2:]) is counted_with(whole)
    assert counted_with(memoryview(whole)) is counted_with(whole)
    assert counted_with(memoryview(bytes(10))) is not counted_with(whole)


def test_parts_of_a_mapped_file(tmp_path, monkeypatch):
    monkeypatch.setenv("STREAMSHARD_READ", "mmap")
    path = tmp_path / "file"
    path.write_bytes(bytes(WINDOW_NBYTES))
    descriptor = os.open(path, os.O_RDONLY)
    found = mapped(descriptor, WINDOW_NBYTES)
    if found is None:
        pytest.skip("it is not mapped")
    one, other = found.bytes(0, 10), found.bytes(0, 10)
    assert counted_with(one) is not counted_with(other)
    found.close()
    assert one == bytes(10)  # as long as somebody looks at it
    os.close(descriptor)


def test_rooms_of_a_chunk(tmp_path):
    senders = Senders(Stop())
    with DirectFile(tmp_path / "file", CHUNK_NBYTES, senders) as file:
        rooms = [file.room(at, CHUNK_NBYTES // 2) for at in (0, CHUNK_NBYTES // 2)]
        if None in rooms:
            pytest.skip("it refuses")
        one, other = rooms
        assert counted_with(one) is not counted_with(other)
        for at, room in enumerate(rooms):
            room[:] = bytes([at]) * len(room)
            file.filled(at * len(room), len(room))
        file.sync()
    senders.finish()
    half = CHUNK_NBYTES // 2
    assert (tmp_path / "file").read_bytes() == bytes(half) + b"\1" * half


class Opened:
    """A stream of zeros."""

    def read_into(self, out: memoryview) -> int:
        out[:] = bytes(len(out))
        return len(out)

    def close(self) -> None:
        pass


class Opener:
    """A store of zeros."""

    def open(self, start: int, stop: int) -> Opened:
        return Opened()


def test_what_a_digest_is_taken_of_elsewhere(monkeypatch):
    handed: list[memoryview] = []

    def add(self: _Hash, block: memoryview, done: object) -> None:
        handed.append(block)
        self._hash.update(block)

    monkeypatch.setattr(_Hash, "add", add)
    nbytes = 2 * MOST_NBYTES
    remote = Remote("file", nbytes, f"sha256:{hashlib.sha256(bytes(nbytes)).hexdigest()}", Opener())
    with remote.open("key") as file:
        assert file.read(0, nbytes) == bytes(nbytes)
        ((line,),) = file._lines.values()
        assert len(line._kept) > 0
        views = [line._kept, *handed]
        assert len(views) >= 3
        assert len({id(counted_with(view)) for view in views}) == len(views)
        assert all(isinstance(view.obj, mmap.mmap) for view in views)
    assert remote.frontier.outcome()[0]


def test_folders_held_are_replaced_and_not_changed(tmp_path):
    """Others may be going through them: what they go through stays as it is."""
    before = held._held
    one, again, inner = (Held(f"{tmp_path}{end}", (1, 2), 3) for end in ("", "", "/x"))
    for folder in (one, again, inner):
        held.register(folder)
    assert held._held == (*before, one, again, inner)
    assert held.holder(f"{tmp_path}/file") is again
    assert held.holder(f"{tmp_path}/x/file") is inner
    assert held.holder(f"{tmp_path}/x", itself=True) is inner
    seen = held._held
    held.let_go(again)
    assert held.holder(f"{tmp_path}/file") is one
    for folder in (one, inner):
        held.let_go(folder)
    assert held._held == before
    assert seen == (*before, one, again, inner)
