"""Files that are read and written: input files and a pool of them, output files, files that grow.

Reads are positioned (`pread`), not mapped: a file that shrinks is then an error and not a bus
error, and what was read never counts as the resident memory of this process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import os
import stat
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from streamshard.disk.far import far_at
from streamshard.disk.inputs import Inputs, Stamp, active, changed, named
from streamshard.disk.mapped import Mapped, check_choice, mapped
from streamshard.disk.sources import Abilities, Source
from streamshard.disk.system import AnyPath, reading, system
from streamshard.errors import InputError, ReadError
from streamshard.values import frozen

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "BLOCK_NBYTES",
    "ByteRange",
    "Files",
    "InputFile",
    "as_stream",
    "file_nbytes",
    "open_source",
    "read_bytes",
]

BLOCK_NBYTES = 256 * 1024
"""What is read, compared and written at a time: on ext4, writes of 2 MB took three times as long."""
_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)  # a pipe with a weight's name must not hang us


@frozen
class ByteRange:
    """Bytes `[offset, offset + nbytes)` of the file at `path`, which is `file_nbytes` long."""

    path: str
    offset: int
    nbytes: int
    file_nbytes: int


class InputFile:
    """A regular file to read from, at any place, by several threads: a `Source`.

    It is noted in `inputs`, by default those that are active where it is opened: a `ChangedError`
    says that it is not what had this name before. With `spare` the page cache is left as it was.
    """

    def __init__(self, path: AnyPath, inputs: Inputs | None = None, *, spare: bool = False) -> None:
        check_choice()
        self.path, self.spare, self.onward = path, spare, False
        self._inputs = active() if inputs is None else inputs
        self._lock = threading.Lock()
        with reading(path):
            self._descriptor = self._open()
            try:
                found = system.fstat(self._descriptor)
                self.stamp = Stamp.of(found)
                _check_regular(path, found.st_mode)
                if self._inputs is not None and not self._inputs.note(self):
                    self._inputs = None
            except BaseException:
                self.release()
                raise
        self.nbytes = self.stamp.nbytes
        self._mapped: Mapped | None = None
        self._unmapped = True

    def _open(self) -> int:
        try:
            return system.open(self.path, _READ)
        except OSError as error:
            full = error.errno in (errno.EMFILE, errno.ENFILE)
            if not full or self._inputs is None or not self._inputs.let_go():
                raise
            return system.open(self.path, _READ)

    @property
    def abilities(self) -> Abilities:
        """What it can do."""
        return Abilities(ranges=True, local=self.path)

    def __enter__(self) -> InputFile:  # noqa: PYI034 - Self needs Python 3.11
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            # What is wrong with its content may be that it was half written.
            if self._inputs is not None and (kind is None or issubclass(kind, InputError)):
                self.check()
        finally:
            self.close()

    def close(self) -> None:
        """Close the file; harmless if it is closed already."""
        with self._lock:
            found, self._mapped, self._unmapped = self._mapped, None, False
        if found is not None:
            found.close()
        if self._descriptor < 0 or self._inputs is None or not self._inputs.hold(self):
            self.release()

    def release(self) -> None:
        """Give the descriptor back, which those who note inputs may have kept."""
        with self._lock:  # once: its number may be that of another file by then
            descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):  # nothing was written
                system.close(descriptor)

    def _now(self) -> Stamp:
        with reading(self.path):
            return Stamp.of(system.fstat(self._descriptor))

    def stamp_again(self) -> None:
        """Take the stamp that the file has by now."""
        self.stamp = self._now()

    def named(self) -> Stamp | None:
        """The stamp of what has the file's name by now, also through a link; None if nothing has."""
        return named(self.path)

    def check(self) -> None:
        """Raise `ChangedError` if the file is no longer as it was when it was opened."""
        if (now := self._now()) != self.stamp:
            raise changed(self.path, self.stamp, now)

    def read_into(self, out: memoryview, offset: int) -> int:
        """Fill `out` from `offset` on; fewer bytes than asked for only at the end of the file.

        Raises `ReadError` if that comes earlier than when the file was opened.
        """
        done = 0
        while done < len(out):
            with reading(self.path):
                count = system.pread(self._descriptor, out[done:], offset + done)
            if not count:
                break
            done += count
        if done < len(out) and offset + done < self.nbytes:
            self.check()
            raise ReadError.at(
                self.path,
                f"the file ended at byte {offset + done:,}, "
                f"{self.nbytes - offset - done:,} bytes too early. It is truncated or being changed.",
            )
        return done

    def prove(self) -> None:
        """The like: what a file of this machine holds is what somebody has put there."""
        self.check()

    def mapping(self) -> Mapped | None:
        """The file in memory, mapped when it is first asked for; None if it is to be read."""
        if self._unmapped:
            with self._lock:
                if self._unmapped:
                    self._mapped = mapped(self._descriptor, self.nbytes, spare=self.spare)
                    self._unmapped = False
        return self._mapped

    def stream(self) -> io.BufferedReader:
        """The file as Python has files, for those who read no others; closing it closes nothing."""
        return as_stream(self)

    def read(self, offset: int, nbytes: int) -> bytes:
        """Up to `nbytes` bytes from `offset` on."""
        # Of all ways to fill bytes this one copies nothing: headers may have 100 MB.
        out = io.BytesIO(bytes(nbytes))
        with out.getbuffer() as buffer:
            count = self.read_into(buffer, offset)
        out.truncate(count)
        return out.getvalue()


def _check_regular(path: AnyPath, mode: int) -> None:
    if not stat.S_ISREG(mode):
        what = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise InputError.at(path, f"is {what}, a file was expected.")


class _Raw(io.RawIOBase):
    """A source that is read from one place after the other."""

    def __init__(self, file: Source) -> None:
        super().__init__()
        self._file = file
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.nbytes}[whence]
        self._at = max(start + offset, 0)
        return self._at

    def readinto(self, buffer: Buffer) -> int:
        count = self._file.read_into(memoryview(buffer).cast("B"), self._at)
        self._at += count
        return count


def as_stream(file: Source) -> io.BufferedReader:
    """A source as Python has files, for those who read no others; closing it closes nothing."""
    return io.BufferedReader(_Raw(file))


def open_source(key: AnyPath, inputs: Inputs | None = None, *, spare: bool = False) -> Source:
    """What has this key, opened. Whoever reads anything of others comes by here."""
    elsewhere = far_at(key)
    if elsewhere is not None:
        return elsewhere.open(inputs, spare=spare)
    return InputFile(key, inputs, spare=spare)


class Files:
    """Sources, opened once each on first use; safe to share between threads.

    A file that is not what the plan saw raises `ChangedError`: by the inputs that were active where this
    was made, by its size, and by `stamps`, for those who have no more of a plan than these. With `spare`
    the page cache is left as it was, as far as that is easily done; with `onward` files are read on to
    their ends, as by those who write all of them.
    """

    def __init__(
        self,
        stamps: Mapping[str, Stamp] | None = None,
        *,
        spare: bool = False,
        onward: bool = False,
    ) -> None:
        self._spare, self._onward = spare, onward
        self._stamps = stamps or {}
        self._inputs = active()
        self._files: dict[str, Source] = {}
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close every file."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def source(self, path: str, file_nbytes: int) -> Source:
        """The open source with this key, which has so many bytes."""
        file = self._files.get(path)
        if file is not None:
            return file
        with self._lock:
            if path not in self._files:
                file = open_source(path, self._inputs, spare=self._spare)
                try:
                    self._check_planned(file, file_nbytes)
                except BaseException:
                    file.close()
                    raise
                file.onward = self._onward
                self._files[path] = file
            return self._files[path]

    def _check_planned(self, file: Source, file_nbytes: int) -> None:
        expected = self._stamps.get(str(file.path), file.stamp)
        if expected == file.stamp:
            expected = dataclasses.replace(expected, nbytes=file_nbytes)
        if expected != file.stamp:
            raise changed(file.path, expected, file.stamp)

    def check(self, source: ByteRange) -> None:
        """Raise `ChangedError` if the file of `source` has changed since it was planned."""
        self.source(source.path, source.file_nbytes).check()

    def prove(self, path: str, file_nbytes: int) -> None:
        """Raise if a file does not hold what it should, as far as that can be known."""
        self.source(path, file_nbytes).prove()

    def read_into(self, source: ByteRange, out: memoryview) -> None:
        """Fill `out` (`source.nbytes` long) with the bytes of `source`."""
        file = self.source(source.path, source.file_nbytes)
        file.read_into(out[: source.nbytes], source.offset)


def read_bytes(path: Path, limit: int) -> bytes:
    """The whole of a small file; `InputError` if it has more than `limit` bytes."""
    with open_source(path) as file:
        data = file.read(0, file.nbytes + 1) if file.nbytes <= limit else b""
        if max(file.nbytes, len(data)) > limit:
            raise InputError.at(path, f"larger than {limit:,} bytes; not read.")
    return data


def file_nbytes(path: Path) -> int:
    """Size of an input file."""
    with open_source(path) as file:
        return file.nbytes
