"""What an exception means for who started the command: kind, exit code and text."""

from __future__ import annotations

import errno
import signal

import click

from streamshard.cli.console import unprinted
from streamshard.cli.misuse import explained_misuse
from streamshard.errors import StreamshardError, UsageError, escaped
from streamshard.extras import explained
from streamshard.values import frozen

__all__ = ["Ending", "Terminated", "ending"]


_UNPRINTED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE, errno.EBADF)


class Terminated(BaseException):
    """SIGTERM arrived."""


@frozen
class Ending:
    """How a command ends: what `--json` says, and the text for people."""

    kind: str
    code: int
    message: str
    text: str
    is_error: bool = True
    """Whether there is more to see in the exception itself."""


def ending(error: BaseException, signalled: int | None) -> Ending:
    """How a command ends that raised `error`, after a signal if there was one."""
    # Code of others that was interrupted, like an import, may make any error of it.
    by_signal = signalled is not None and not isinstance(error, StreamshardError)
    if isinstance(error, Terminated) or (by_signal and signalled != signal.SIGINT):
        return _ended("Terminated", error, 143)
    if isinstance(error, KeyboardInterrupt) or by_signal:
        return _ended("Interrupted", error, 130)
    if isinstance(error, click.ClickException):
        return _misused(error)
    if isinstance(error, ImportError):
        error = explained(error) or error
    if isinstance(error, OSError) and error.filename is None and error.errno in _UNPRINTED:
        error = unprinted(error)  # --help, --version
    message = str(error)
    if isinstance(error, StreamshardError):
        text = f"error: {_escaped_lines(message)}"
        return Ending(type(error).__name__, error.exit_code, message, text)
    kind = type(error).__name__
    text = (
        f"error: unexpected {kind}: {escaped(message)}\n"
        "This is a bug in streamshard: please report it with the output of the same command "
        "and --verbose."
    )
    return Ending(kind, StreamshardError.exit_code, message, text)


def _escaped_lines(text: str) -> str:
    """Text whose lines stay lines, with nothing else that moves the cursor."""
    return "\n".join(map(escaped, text.split("\n")))


def _ended(how: str, error: BaseException, code: int) -> Ending:
    # Whoever was writing has added what is kept.
    kept = str(error) if isinstance(error, (KeyboardInterrupt, Terminated)) else ""
    message = f"{how}. {kept or 'Nothing was written: run the same command again.'}"
    return Ending(how, code, message, escaped(message), is_error=False)


def _misused(error: click.ClickException) -> Ending:
    kind = UsageError.__name__ if isinstance(error, click.UsageError) else type(error).__name__
    message, text = explained_misuse(error)
    return Ending(kind, error.exit_code, message, _escaped_lines(text), is_error=False)
