"""The standard streams of the command line, and how it ends: nothing here is ever a traceback."""

from __future__ import annotations

import contextlib
import io
import json
import os
import stat
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from streamshard.cli.terminal_text import columns_of, fitted
from streamshard.errors import WriteError

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "end",
    "error_document",
    "forget_document",
    "open_streams",
    "say",
    "show",
    "show_json",
    "unprinted",
]


def open_streams() -> None:
    """Have standard input, output and error open, before anything else is opened.

    A file that is opened while one of them is closed gets its number, and what a library prints then
    lands in it. Whoever closes one does not ask for what would be written there: it goes nowhere, and
    what `head` has not read neither. How a command ends does not depend on that.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            with contextlib.suppress(OSError):  # not even that can be opened: reading will tell
                os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(  # noqa: SIM115 - as long as the process
                number, "w", encoding="utf-8", errors="backslashreplace", closefd=False
            )
            setattr(sys, name, stream)
        elif isinstance(stream, io.TextIOWrapper):
            # Names have letters that not every terminal knows.
            stream.reconfigure(errors="backslashreplace")
            if _is_pipe(stream, number):
                setattr(sys, name, _as_pipe(stream, number))


class _Pipe(io.FileIO):
    """One end of a pipe, whose reader may have read enough, or be slow where nobody waits for it.

    Whoever shares a pipe can have made it one that does not block.
    """

    def write(self, data: Buffer, /) -> int:
        try:
            while (written := super().write(data)) is None:
                import select  # few runs need it

                select.select([], [self.fileno()], [])
        except BrokenPipeError:
            _discard(self.fileno())
            written = memoryview(data).nbytes
        return written


def _is_pipe(stream: io.TextIOWrapper, number: int) -> bool:
    try:
        mode = os.fstat(number).st_mode
        return stream.fileno() == number and (stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode))
    except (OSError, ValueError):  # it is something else, in a test
        return False


def _as_pipe(stream: io.TextIOWrapper, number: int) -> io.TextIOWrapper:
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Pipe(number, "w", closefd=False)),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def say(text: str, *, fits: bool = True) -> None:
    """Print a message to standard error, if that can be written to; `fits` breaks long lines."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"{fitted(text, columns_of(sys.stderr)) if fits else text}\n")
        sys.stderr.flush()


def show(text: str, done: str = "", more: str = "") -> None:
    """Print the result to standard output, broken between words, and what follows it as it is.

    Raises `WriteError`, which ends with `done`, if it cannot be written to.
    """
    _print([fitted(text, columns_of(sys.stdout)), *(["\n\n", more] if more else [])], done)


def show_json(document: Mapping[str, Any], done: str = "") -> None:
    """The like for a JSON document, the only one of this process: a second one is not printed."""
    if not _documents:
        _documents.append(None)
        # In pieces: a report on all tensors of a large model has megabytes.
        _print(json.JSONEncoder().iterencode(document), done)


_documents: list[None] = []
"""Has an item once a document was begun."""


def forget_document() -> None:
    """Have another document allowed, of another command in this process."""
    _documents.clear()


def error_document(kind: str, code: int, message: str) -> dict[str, Any]:
    """What `--json` prints of an error."""
    return {"error": {"type": kind, "exit_code": code, "message": message}}


def _print(pieces: Iterable[str], done: str) -> None:
    try:
        sys.stdout.writelines(pieces)
        sys.stdout.write("\n")
        sys.stdout.flush()
    except OSError as error:
        raise unprinted(error, done) from error


def unprinted(error: OSError, done: str = "") -> WriteError:
    """The error of a result that cannot be printed."""
    _discard(1)  # what is still in the buffer would be tried again, and fail again, at the end
    return WriteError(f"the report cannot be printed: {error.strerror}{done}.")


def end(code: int, *, at_once: bool = False) -> NoReturn:
    """End with an exit code, once everything is printed; `at_once` waits for no thread of a library."""
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):
            _discard(number)
            if number == 1:
                code = code or WriteError.exit_code
    if at_once:
        os._exit(code)
    sys.exit(code)


def _discard(number: int) -> None:
    with contextlib.suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, number)
        os.close(null)
