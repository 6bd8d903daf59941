"""Writing around the page cache: the same bytes, whoever puts them there in which order."""

from __future__ import annotations

import errno
import logging
import mmap
import os
import subprocess
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import weights_of
from hangs import HANGS
from interrupted_runs import open_below

import streamshard
from streamshard.disk import direct as module
from streamshard.disk.direct import CHUNK_NBYTES, DirectFile
from streamshard.disk.new_files import OutputFile
from streamshard.disk.system import system
from streamshard.engine import budget
from streamshard.engine.workers import Senders, Stop
from streamshard.errors import WriteError

DIRECT = getattr(os, "O_DIRECT", 0)


@pytest.fixture
def senders() -> Iterator[Senders]:
    found = Senders(Stop())
    yield found
    found.finish()


def takes_direct(folder: Path) -> bool:
    try:
        os.close(os.open(folder / "probe", os.O_WRONLY | os.O_CREAT | DIRECT))
    except OSError:
        return False
    return bool(DIRECT)


def chunks_in_cache(mapping: Any, path: Path) -> list[int]:
    """For each chunk of a file, whether the page cache has some of it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        seen = mapping.Mapping(descriptor, path.stat().st_size)
        return [not absent for absent in seen.absent(CHUNK_NBYTES, mmap.PAGESIZE)]
    finally:
        os.close(descriptor)


def goes_around(mapping: Any, path: Path) -> bool:
    """Whether the system itself does so where it takes such writes: some only seem to, as tmpfs does."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | DIRECT)
    try:
        os.pwrite(descriptor, mmap.mmap(-1, CHUNK_NBYTES), 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return chunks_in_cache(mapping, path) == [False]


def wait_for_threads(others: set[threading.Thread]) -> None:
    """For all that were not there before: senders end when everything is done."""
    for thread in threading.enumerate():
        if thread not in others:
            thread.join(HANGS)


def data_of(nbytes: int) -> bytes:
    return np.random.default_rng(nbytes).bytes(nbytes)


SIZES = [
    1,
    4095,
    4096,
    4097,
    CHUNK_NBYTES - 1,
    CHUNK_NBYTES,
    CHUNK_NBYTES + 1,
    3 * CHUNK_NBYTES + 777,
]


@pytest.mark.parametrize("nbytes", SIZES)
def test_pieces_in_any_order(nbytes, senders, tmp_path):
    data, random = data_of(nbytes), np.random.default_rng(1)
    cuts = sorted({0, nbytes, *map(int, random.integers(0, nbytes + 1, 40))})
    pieces = list(pairwise(cuts))
    random.shuffle(pieces)
    with DirectFile(tmp_path / "file", nbytes, senders) as file:
        for begin, end in pieces:
            file.write(memoryview(data)[begin:end], begin)
        file.sync()
    assert (tmp_path / "file").read_bytes() == data
    assert senders.free or not takes_direct(tmp_path)


def test_several_threads_and_what_was_written_so_far(senders, tmp_path):
    """Each reads its own again, which may be on disk, on the way there, or not yet sent."""
    nbytes, threads = 6 * CHUNK_NBYTES + 99, 5
    data, wrong = data_of(nbytes), []

    def write(first: int) -> None:
        step = nbytes // 50 + 1
        for begin in range(first * step, nbytes, threads * step):
            own = memoryview(data)[begin : begin + step]
            file.write(own, begin)
            seen = bytearray(len(own))
            file.read_into(memoryview(seen), begin)
            if seen != own:
                wrong.append(begin)

    with DirectFile(tmp_path / "file", nbytes, senders) as file:
        workers = [threading.Thread(target=write, args=(n,)) for n in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        file.sync()
    assert wrong == []
    assert (tmp_path / "file").read_bytes() == data


def test_rooms_end_with_their_chunk(senders, tmp_path):
    if not takes_direct(tmp_path):
        pytest.skip("it refuses")
    nbytes = CHUNK_NBYTES + 10
    data = data_of(nbytes)
    with DirectFile(tmp_path / "file", nbytes, senders) as file:
        at = 0
        for wanted in (CHUNK_NBYTES - 5, 100, 10):
            room = file.room(at, wanted)
            assert room is not None
            room[:] = data[at : at + len(room)]
            file.filled(at, len(room))
            at += len(room)
        assert at == nbytes
        file.sync()
    assert (tmp_path / "file").read_bytes() == data


def test_memory_that_another_file_takes_meanwhile(senders, tmp_path):
    """Files have locks of their own, and share what is free."""

    class Free(list):
        def __len__(self) -> int:  # as it was a moment ago
            return 1

    senders.free = Free()
    with DirectFile(tmp_path / "file", 3, senders) as file:
        file.write(memoryview(b"abc"), 0)
        file.sync()
    assert (tmp_path / "file").read_bytes() == b"abc"


def test_data_in_no_order_takes_no_memory(senders, tmp_path):
    """Columns of a matrix, row by row: chunks that only they fill are written at once."""
    begin, rows, width = 100, 3000, 1000
    end = begin + rows * width
    data = data_of(end + 50)
    with DirectFile(tmp_path / "file", len(data), senders) as file:
        file.write(memoryview(data)[:begin], 0)
        for part in (0, 600):
            for row in range(rows):
                place = begin + row * width + part
                stop = begin + row * width + (600 if not part else width)
                file.write_among(memoryview(data)[place:stop], place, begin, end)
            assert len(file._chunks) <= 2
        file.write(memoryview(data)[end:], end)
        file.sync()
    assert (tmp_path / "file").read_bytes() == data


def test_it_is_not_in_the_cache(senders, tmp_path):
    if not takes_direct(tmp_path) or module.ALIGNED_NBYTES % mmap.PAGESIZE:
        pytest.skip("it refuses")
    mapping = pytest.importorskip("streamshard.disk._mapping")
    if not goes_around(mapping, tmp_path / "by the system"):
        pytest.skip("the system has it in the cache all the same")
    path, nbytes = tmp_path / "file", 4 * CHUNK_NBYTES
    with DirectFile(path, nbytes, senders) as file:
        file.write(memoryview(bytes(nbytes)), 0)
        file.sync()
    assert not any(chunks_in_cache(mapping, path))


@pytest.mark.parametrize("refusal", ["open", "pwrite"])
def test_a_file_system_that_refuses(refusal, senders, tmp_path, monkeypatch, caplog):
    real, data = getattr(system, refusal), data_of(2 * CHUNK_NBYTES + 5)

    def refuse(first: object, second: object, *rest: object) -> object:
        is_direct = second & DIRECT if refusal == "open" else first == file_direct()
        if is_direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(first, second, *rest)

    def file_direct() -> int:
        return file._direct

    monkeypatch.setattr(system, refusal, refuse)
    caplog.set_level(logging.INFO)
    with DirectFile(tmp_path / "file", len(data), senders) as file:
        file.write(memoryview(data), 0)
        file.sync()
    assert (tmp_path / "file").read_bytes() == data
    assert f"{tmp_path / 'file'} is written through the page cache: Invalid argument" in caplog.text


def test_short_writes(senders, tmp_path, monkeypatch):
    real, data = system.pwrite, data_of(2 * CHUNK_NBYTES + 5)
    monkeypatch.setattr(system, "pwrite", lambda d, b, at: real(d, b[: max(len(b) // 3, 1)], at))
    with DirectFile(tmp_path / "file", len(data), senders) as file:
        file.write(memoryview(data), 0)
        file.sync()
    assert (tmp_path / "file").read_bytes() == data


def test_an_error_of_the_disk_is_told_by_sync(tmp_path, monkeypatch):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    stop, others = Stop(), {*threading.enumerate()}
    senders = Senders(stop)
    file = DirectFile(tmp_path / "file", 3 * CHUNK_NBYTES, senders)
    monkeypatch.setattr(system, "pwrite", full)
    if takes_direct(tmp_path):
        file.write(memoryview(bytes(3 * CHUNK_NBYTES)), 0)
        with pytest.raises(WriteError, match="no space left"):
            file.sync()
        assert isinstance(stop.error, WriteError)
    file.abandon()
    senders.finish()
    wait_for_threads(others)
    assert file._direct == file._descriptor == -1
    assert open_below(tmp_path) == []


def test_an_abandoned_file_is_closed_by_the_last_write(tmp_path, monkeypatch):
    """Until then its number must not become that of another file."""
    if not takes_direct(tmp_path):
        pytest.skip("it refuses")
    real, begun, go_on = system.pwrite, threading.Event(), threading.Event()

    def slow(*arguments: object) -> int:
        begun.set()
        go_on.wait(HANGS)
        return real(*arguments)

    monkeypatch.setattr(system, "pwrite", slow)
    others = {*threading.enumerate()}
    senders = Senders(Stop())
    file = DirectFile(tmp_path / "file", CHUNK_NBYTES, senders)
    file.write(memoryview(bytes(CHUNK_NBYTES)), 0)
    assert begun.wait(HANGS)
    file.abandon()
    os.fstat(file._direct)
    go_on.set()
    senders.finish()
    wait_for_threads(others)
    assert file._direct == file._descriptor == -1


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("read", ["mmap", "pread"])
def test_a_merge_writes_the_same_bytes(workers, read, pair, cli, monkeypatch):
    monkeypatch.setenv("STREAMSHARD_READ", read)
    found = {}
    for io in ("direct", "buffered"):
        output = pair.root / io
        command = [str(output) if part == str(pair.output) else part for part in pair.command]
        outcome = cli(*command, "--io", io, "--workers", str(workers))
        assert outcome.code == 0, outcome.err
        found[io] = weights_of(output)
        assert streamshard.verify(output)["problems"] == []
    assert found["direct"] == found["buffered"]


def test_when_it_is_chosen(pair, monkeypatch):
    chosen = []
    how = {"base": pair.base, "adapter": pair.adapter, "output": pair.output, "dry_run": True}

    def direct(**more: object) -> bool:
        streamshard.merge_lora(**how, **more, on_plan=lambda plan: chosen.append(plan.direct))
        return chosen[-1]

    assert direct(io="direct")
    assert not direct()
    monkeypatch.setattr(budget, "_SMALL_NBYTES", 0)
    monkeypatch.setattr(budget, "group_room", lambda: 100)
    assert direct()
    assert not direct(io="buffered")
    assert not direct(max_memory=budget.PROCESS_NBYTES + 10_000_000)
    monkeypatch.setattr(budget, "group_room", lambda: None)
    assert not direct()
    with pytest.raises(streamshard.errors.UsageError, match="`io` is 'fast'; choose one of auto"):
        direct(io="fast")


def mounted(tmp_path: Path, kind: str) -> Path:
    """A small file system of a kind, where this machine lets one mount it."""
    place, image = tmp_path / "mounted", tmp_path / "image"
    place.mkdir()
    if kind == "tmpfs":
        commands = [["mount", "-t", "tmpfs", "tmpfs", str(place)]]
    elif kind == "overlay":
        for name in ("low", "up", "work"):
            (tmp_path / name).mkdir()
        where = f"lowerdir={tmp_path}/low,upperdir={tmp_path}/up,workdir={tmp_path}/work"
        commands = [["mount", "-t", "overlay", "overlay", "-o", where, str(place)]]
    else:
        image.touch()
        os.truncate(image, 400_000_000)
        commands = [[f"mkfs.{kind}", str(image)], ["mount", "-o", "loop", str(image), str(place)]]
    for command in commands:
        try:
            done = subprocess.run(command, capture_output=True, check=False, text=True)
        except OSError as error:
            pytest.skip(str(error))
        if done.returncode:
            pytest.skip(f"{command}: {done.stderr}")
    return place


@pytest.mark.parametrize("kind", ["tmpfs", "overlay", "vfat", "ext4", "xfs", "btrfs"])
def test_other_file_systems(kind, pair, cli, tmp_path):
    place = mounted(tmp_path, kind)
    try:
        found = []
        for io in ("direct", "buffered"):
            output = place / io
            command = [str(output) if part == str(pair.output) else part for part in pair.command]
            outcome = cli(*command, "--io", io, "--verbose")
            assert outcome.code == 0, outcome.err
            found.append(weights_of(output))
        assert found[0] == found[1]
        large = data_of(5 * CHUNK_NBYTES + 77)
        senders = Senders(Stop())
        with DirectFile(place / "large", len(large), senders) as file:
            file.write(memoryview(large), 0)
            file.sync()
        senders.finish()
        assert (place / "large").read_bytes() == large
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_the_class_that_it_is_beside(tmp_path):
    with OutputFile(tmp_path / "file", 5) as file:
        assert file.room(0, 5) is None
        file.write_among(memoryview(b"abcde"), 0, 0, 5)
    assert (tmp_path / "file").read_bytes() == b"abcde"
