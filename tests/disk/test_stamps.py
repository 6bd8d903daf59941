"""Which file an input is, its size and its times: what is noted of it, and by whom."""

from __future__ import annotations

import contextlib
import errno
import pickle
import threading
import time

import pytest
import reference
import torch
from changing_files import (
    set_back,
)

from streamshard.checkpoint import pickled
from streamshard.disk import files, inputs
from streamshard.disk.files import ByteRange, Files
from streamshard.disk.system import system
from streamshard.errors import ChangedError, ReadError


def test_a_change_within_one_tick(tmp_path):
    """Just after the file was made: the times alone would be those of the first content."""
    file = tmp_path / "file"
    for _ in range(20):
        with inputs.watching() as noted:
            file.write_bytes(b"one")
            assert files.read_bytes(file, 3) == b"one"
            with file.open("r+b") as opened:
                opened.write(b"two")
            with pytest.raises(ChangedError, match="was written to"):
                noted.check()
            noted.close()
        file.unlink()


def test_an_old_file_is_not_waited_for(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"x")
    time.sleep(1)  # ticks are shorter, also where the clock that stamps files is some behind
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("waits"))
    with inputs.watching():
        assert files.read_bytes(tmp_path / "file", 9) == b"x"


def test_the_number_of_a_held_file_is_not_used_again(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    with contextlib.suppress(ChangedError), inputs.watching() as noted:
        files.file_nbytes(tmp_path / "file")
        inode = (tmp_path / "file").stat().st_ino
        (tmp_path / "file").unlink()
        made = [tmp_path / str(number) for number in range(50)]
        for path in made:
            path.write_bytes(b"y")
        assert inode not in {path.stat().st_ino for path in made}
        assert [*noted.stamps] == [str(tmp_path / "file")]


def test_files_have_the_stamps_that_they_must_have(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"one")
    with inputs.watching() as noted:
        files.file_nbytes(file)
        stamps = pickle.loads(pickle.dumps(noted.stamps))
    source = ByteRange(str(file), 0, 3, 3)
    out = bytearray(3)
    with contextlib.closing(Files(stamps)) as opened:
        opened.read_into(source, memoryview(out))
    assert out == b"one"
    file.unlink()
    file.write_bytes(b"two")
    with (
        contextlib.closing(Files(stamps)) as opened,
        pytest.raises(ChangedError, match="file: was"),
    ):
        opened.read_into(source, memoryview(out))
    with contextlib.closing(Files()) as opened:
        opened.read_into(source, memoryview(out))
        opened.check(source)
        set_back(file)
        with pytest.raises(ChangedError, match="its content, or"):
            opened.check(source)


def test_threads_that_share_files_note_them(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"one")
    source = ByteRange(str(file), 0, 3, 3)
    with inputs.watching() as noted:
        with contextlib.closing(Files()) as opened:
            read = threading.Thread(
                target=lambda: opened.read_into(source, memoryview(bytearray(3)))
            )
            read.start()
            read.join()
        assert [*noted.stamps] == [str(file)]


def test_each_run_has_its_own(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    with inputs.watching() as outer:
        with inputs.watching() as inner:
            files.file_nbytes(tmp_path / "file")
        assert [*inner.stamps] == [str(tmp_path / "file")]
        assert outer.stamps == {}
        assert inputs.active() is outer
    assert inputs.active() is None


def test_a_pickle_is_read_through_the_door(tmp_path, monkeypatch):
    """Not by its name, which may lead elsewhere by then; and an error of the disk stays one."""
    folder = reference.save_adapter(tmp_path / "adapter", {"a": torch.ones(1000)}, pickled=True)
    file = folder / "adapter_model.bin"
    inode = file.stat().st_ino
    with inputs.watching() as noted:
        assert pickled.read_pickled(file)["a"].nbytes == 4000
        assert noted.stamps[str(file)].inode == inode
    monkeypatch.setattr(
        system, "pread", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "bad"))
    )
    with pytest.raises(ReadError, match=r"adapter_model\.bin: cannot be read: bad"):
        pickled.read_pickled(file)


def test_what_is_noted_is_cheap(tmp_path, monkeypatch):
    """A hundred shards and what lies beside them are compared by one question each."""
    for number in range(130):
        (tmp_path / str(number)).write_bytes(b"x")
    asked, names = [], [name for name in vars(type(system)) if not name.startswith("_")]

    def noted(name, call):
        def noting(first, *rest):
            asked.append((name, str(first)))
            return call(first, *rest)

        return noting

    with inputs.watching() as watched:
        for number in range(130):
            files.file_nbytes(tmp_path / str(number))
        with monkeypatch.context() as patch:
            patch.setattr(time, "sleep", lambda _: pytest.fail("waits"))
            for name in names:
                patch.setattr(system, name, noted(name, getattr(system, name)))
            watched.check()
    assert sorted(asked) == sorted(("stat", str(tmp_path / str(number))) for number in range(130))
