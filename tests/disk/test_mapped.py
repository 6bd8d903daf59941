"""Files that are mapped: the same bytes, flat memory, and no bus error whatever becomes of the file."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapters import weights_of
from hangs import HANGS

import streamshard
from streamshard.disk import mapped as module
from streamshard.disk.files import ByteRange, Files, InputFile
from streamshard.disk.mapped import WINDOW_NBYTES, mapped
from streamshard.disk.reader import MOST_WINDOWS, Reader
from streamshard.disk.system import system
from streamshard.errors import ChangedError, ReadError, UsageError

if sys.platform != "linux" or module._mapping is None:
    pytest.skip("nothing is mapped on this system", allow_module_level=True)

PAGE = os.sysconf("SC_PAGE_SIZE")


def absent(path: Path) -> list[int]:
    """For each window, whether the page cache has nothing of it."""
    with path.open("rb") as opened:
        flags = module._mapping.Mapping(opened.fileno(), path.stat().st_size)
        return [*flags.absent(WINDOW_NBYTES, PAGE)]


def have_in_cache(path: Path) -> None:
    """A system that is short of memory may have dropped what was just written; that is not mapped."""
    for _ in range(1000):
        if not any(absent(path)):
            return
        path.read_bytes()
    pytest.skip("this system keeps nothing in its cache")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Of three windows and a half page."""
    data = np.random.default_rng(1).bytes(3 * WINDOW_NBYTES + PAGE // 2)
    (tmp_path / "file").write_bytes(data)
    have_in_cache(tmp_path / "file")
    return tmp_path / "file"


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMSHARD_READ", "mmap")


def no_room(_: int) -> memoryview:
    pytest.fail("it was read")


def span(file: Path, offset: int, nbytes: int) -> ByteRange:
    return ByteRange(str(file), offset, nbytes, file.stat().st_size)


def test_what_is_seen_is_what_is_there(file):
    data, files = file.read_bytes(), Files()
    reader = Reader(files)
    ends = [
        0,
        1,
        PAGE,
        WINDOW_NBYTES - 1,
        WINDOW_NBYTES,
        3 * WINDOW_NBYTES,
        len(data) - 1,
        len(data),
    ]
    for start in ends:
        for stop in ends:
            if start < stop:
                with reader.view(span(file, start, stop - start), no_room) as found:
                    assert found.readonly
                    assert found == data[start:stop]
    reader.leave()
    files.close()


def test_an_address_that_is_not_a_multiple_is_read(file):
    files, data = Files(), file.read_bytes()
    room = bytearray(8)
    with Reader(files).view(span(file, 4, 8), no_room, 4) as found:
        assert found == data[4:12]
    with Reader(files).view(span(file, 6, 8), lambda _: memoryview(room), 4) as found:
        assert found == data[6:14] == room
    files.close()


def resident(path: Path) -> int:
    """Bytes of a mapped file that this process has in memory; libraries come and go as they like."""
    text = Path("/proc/self/smaps").read_text()
    parts = re.findall(rf" {re.escape(str(path))}\n(?:\w+:.*\n)*?Rss: +(\d+) kB", text)
    assert parts
    return sum(map(int, parts)) * 1024


def test_memory_stays_flat(tmp_path):
    big, nbytes = tmp_path / "big", 32 * WINDOW_NBYTES
    big.write_bytes(bytes(nbytes))
    have_in_cache(big)
    files = Files()
    reader, most = Reader(files), 0
    for start in range(0, nbytes, PAGE * 16):
        with reader.view(span(big, start, PAGE * 16), no_room) as found:
            assert not any(found[:: PAGE * 4])
            if start % (WINDOW_NBYTES // 4) == 0:  # asking is slow
                most = max(most, resident(big))
    assert WINDOW_NBYTES <= most <= (MOST_WINDOWS + 1) * WINDOW_NBYTES
    reader.leave()
    assert resident(big) < WINDOW_NBYTES // 2
    files.close()


def addresses() -> str:
    return Path("/proc/self/maps").read_text()


def test_a_closed_file_is_unmapped_when_nobody_looks_at_it(file):
    opened = InputFile(file)
    found = opened.mapping()
    assert found is not None
    assert found is opened.mapping()
    part = found.bytes(5, 10)
    opened.close()
    assert str(file) in addresses()
    assert part == file.read_bytes()[5:15]
    del part
    assert str(file) not in addresses()


def look(files: Files, part: ByteRange, *, then: Callable[[memoryview], object]) -> None:
    with Reader(files).view(part, lambda n: memoryview(bytearray(n))) as found:
        then(found)


@pytest.mark.parametrize("where", ["before", "after a view", "in a view"])
def test_a_file_that_is_cut_off(where, file):
    """In a view that is a bus error, which the handler turns into zeros and an error."""
    files, part = Files(), span(file, WINDOW_NBYTES, WINDOW_NBYTES)
    files.check(part)

    def cut(_: object = None) -> None:
        os.truncate(file, WINDOW_NBYTES + PAGE)

    def cut_and_look(found: memoryview) -> None:
        cut()
        assert not any(found[PAGE:])

    if where == "after a view":
        look(files, span(file, WINDOW_NBYTES, PAGE), then=len)
    if where != "in a view":
        cut()
    with pytest.raises(ChangedError, match=f"{file}: was written to"):
        look(files, part, then=cut_and_look if where == "in a view" else len)
    files.close()


def test_what_the_system_is_handed_then(file, tmp_path):
    """It refuses a buffer that is not there; that is an error of the input."""
    files = Files()
    out = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)

    def cut_and_write(found: memoryview) -> None:
        os.truncate(file, WINDOW_NBYTES)
        os.pwrite(out, found, 0)

    with pytest.raises(ChangedError, match="was written to"):
        look(files, span(file, WINDOW_NBYTES, WINDOW_NBYTES), then=cut_and_write)
    os.close(out)
    files.close()


def test_what_is_lost_of_an_unchanged_file(file, monkeypatch):
    """As of a disk that cannot be read: here it is cut off, but seems to be as it was."""
    files = Files()

    def cut_and_look(found: memoryview) -> None:
        os.truncate(file, WINDOW_NBYTES)
        assert found[-1] == 0
        monkeypatch.setattr(InputFile, "check", lambda _: None)

    with pytest.raises(
        ReadError, match=f"{file}: cannot be read: bytes 2,097,152 to 4,194,304 were"
    ):
        look(files, span(file, WINDOW_NBYTES, WINDOW_NBYTES), then=cut_and_look)
    files.close()


def test_threads_that_look_at_what_is_cut_off(file):
    """Whoever has seen zeros of the handler is told, also if another thread has called it."""
    data, part = file.read_bytes(), span(file, PAGE, 2 * WINDOW_NBYTES)
    wanted = data[PAGE : PAGE + part.nbytes]

    def look_again(found: list[bool], files: Files) -> None:
        while all(found):
            with Reader(files).view(part, lambda n: memoryview(bytearray(n))) as seen:
                same = seen == wanted
            found.append(same)

    for _ in range(5):
        file.write_bytes(data)
        files, found = Files(), []
        files.check(part)
        with ThreadPoolExecutor(4) as threads:
            ends = [threads.submit(look_again, found, files) for _ in range(4)]
            os.truncate(file, PAGE)
            assert all(isinstance(end.exception(), ChangedError) for end in ends)
        assert all(found)
        files.close()


def test_other_bus_errors_end_the_process_as_ever(file):
    code = f"""
import mmap, os, sys
from streamshard.disk.files import InputFile
ours = InputFile({str(file)!r})
ours.mapping()
descriptor = os.open({str(file)!r}, os.O_RDWR)
theirs = mmap.mmap(descriptor, 0)
os.truncate(descriptor, 0)
print(theirs[5])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -signal.SIGBUS
    signalled = code.partition("descriptor =")[0] + "os.kill(os.getpid(), 7)"
    done = subprocess.run([sys.executable, "-c", signalled], capture_output=True, check=False)
    assert done.returncode == -signal.SIGBUS


def test_a_handler_that_came_later_and_hands_the_signal_back(file):
    """As that of `faulthandler`: the process ends, and tells once where."""
    (file.parent / "other").write_bytes(b"x")
    code = f"""
import faulthandler, mmap, os
from streamshard.disk.files import InputFile
ours = InputFile({str(file)!r})
ours.mapping()
faulthandler.enable()
others = InputFile({str(file.parent / "other")!r})
others.mapping()
descriptor = os.open({str(file)!r}, os.O_RDWR)
theirs = mmap.mmap(descriptor, 0)
os.truncate(descriptor, 0)
print(theirs[5])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=False, timeout=HANGS
    )
    assert done.returncode == -signal.SIGBUS
    assert done.stderr.count(b"Bus error") == 1


def test_a_system_that_cannot_map_or_populate(file, monkeypatch):
    def fails(*_: object) -> None:
        raise OSError(5, "no")

    for name in ("map", "populate"):
        with monkeypatch.context() as patch:
            patch.setattr(system, name, fails)
            files = Files()
            with Reader(files).view(span(file, 7, 9), lambda n: memoryview(bytearray(n))) as found:
                assert found == file.read_bytes()[7:16]
            files.close()


def test_what_is_not_mapped_by_default(file, tmp_path, monkeypatch):
    monkeypatch.setenv("STREAMSHARD_READ", "auto")
    small = tmp_path / "small"
    small.write_bytes(bytes(100))
    with InputFile(small) as opened:
        assert opened.mapping() is None
    with InputFile(file) as opened:
        assert opened.mapping() is not None
    monkeypatch.setattr(module._mapping, "file_system", lambda _: 0x6969)  # NFS
    with InputFile(file) as opened:
        assert opened.mapping() is None
    monkeypatch.setenv("STREAMSHARD_READ", "pread")
    with InputFile(file) as opened:
        assert opened.mapping() is None


def test_small_pages_are_read_after_a_while(file, monkeypatch):
    opened = os.open(file, os.O_RDONLY)
    monkeypatch.setenv("STREAMSHARD_READ", "auto")
    monkeypatch.setattr(module, "_SLOW_NS", -1)
    found = mapped(opened, file.stat().st_size)
    assert found is not None
    assert [found.populate(1) for _ in range(module._PATIENCE + 2)] == [
        *[True] * module._PATIENCE,
        *[False] * 2,
    ]
    found.close()
    os.close(opened)


@pytest.mark.parametrize("choice", ["fast", "MMAP", " "])
def test_nonsense_is_an_error(choice, pair, cli, monkeypatch):
    monkeypatch.setenv("STREAMSHARD_READ", choice)
    outcome = cli(*pair.command)
    assert outcome.code == 2
    assert "STREAMSHARD_READ" in outcome.err
    assert "auto, mmap, pread" in outcome.err
    assert not pair.output.exists()


def test_what_this_installation_cannot(file, monkeypatch):
    monkeypatch.setattr(module, "_mapping", None)
    with pytest.raises(UsageError, match=r"Linux 5\.14"):
        InputFile(file)
    monkeypatch.setenv("STREAMSHARD_READ", "")
    with InputFile(file) as opened:
        assert opened.mapping() is None


def test_a_merge_reads_the_same_bytes_either_way(pair, monkeypatch):
    found = {}
    for choice in ("mmap", "pread", "auto"):
        monkeypatch.setenv("STREAMSHARD_READ", choice)
        output = pair.root / choice
        streamshard.merge_lora(base=pair.base, adapter=pair.adapter, output=output)
        assert streamshard.verify(output)["problems"] == []
        assert streamshard.diff(output, pair.base)["l2"]["sum"] > 0
        found[choice] = weights_of(output)
    assert found["mmap"] == found["pread"] == found["auto"]


@pytest.mark.parametrize("at", range(1, 4))
def test_a_base_that_is_cut_off_at_the_worst_moments(at, pair, cli, monkeypatch):
    """Directly after the n-th window is in memory: exit code 7, no output, and the next run is right."""
    merged = pair.root / "merged"
    streamshard.merge_lora(base=pair.base, adapter=pair.adapter, output=merged)
    calls, cut, one = [], [], threading.Lock()

    original = system.populate

    def populate(descriptor: int, *more: Any) -> None:
        original(descriptor, *more)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.parent == pair.base:
            with one:
                calls.append(path)
                if len(calls) == at:
                    cut.append((path, path.read_bytes()))
                    os.truncate(path, 0)

    monkeypatch.setattr(system, "populate", populate)
    outcome = cli(*pair.command)
    if not cut:
        assert outcome.code == 0
        pytest.skip("there are not so many windows")
    ((path, data),) = cut
    assert outcome.code == 7
    assert f"{path}: was written to" in outcome.err
    assert not pair.output.exists()
    path.write_bytes(data)
    assert cli(*pair.command).code == 0
    assert weights_of(pair.output) == weights_of(merged)


@pytest.mark.parametrize("choice", ["mmap", "auto"])
@pytest.mark.parametrize("spare", [True, False])
@pytest.mark.parametrize("how", ["seen", "read"])
def test_the_cache_is_left_as_it_was(choice, spare, how, tmp_path, monkeypatch):
    """Windows 2 and 3 were there, 0, 1, 4 and 5 were not; tensors begin and end anywhere."""
    monkeypatch.setenv("STREAMSHARD_READ", choice)
    path, untouched, nbytes = tmp_path / "file", tmp_path / "untouched", 6 * WINDOW_NBYTES
    for file in (path, untouched):
        file.write_bytes(np.random.default_rng(2).bytes(nbytes))
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        for window in (0, 1, 4, 5):
            at = window * WINDOW_NBYTES
            os.posix_fadvise(descriptor, at, WINDOW_NBYTES, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    before = absent(path)
    if before != [1, 1, 0, 0, 1, 1]:
        pytest.skip("this file system keeps its cache")
    files = Files(spare=spare)
    reader, step, data = Reader(files), WINDOW_NBYTES // 3, bytearray(nbytes)
    for start in range(0, nbytes, step):
        part = span(path, start, min(step, nbytes - start))
        room = memoryview(data)[start : start + part.nbytes]
        if how == "read":
            reader.read_into(part, room)
        else:
            with reader.view(part, lambda count: memoryview(bytearray(count))) as found:
                room[:] = found
    reader.leave()
    files.close()
    left = absent(path)
    assert data == path.read_bytes()
    if absent(untouched) != before:
        pytest.skip("the system needs memory, and drops what is in the cache")
    assert left == before if spare else not any(left[:2])
