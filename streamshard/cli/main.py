"""From the command line to an exit code: signals, errors, and how they are said."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from types import FrameType

import click

import streamshard.cli.reading_commands  # noqa: F401 - adds its commands
from streamshard.cli.app import cli
from streamshard.cli.console import end, open_streams, say, unprinted
from streamshard.errors import StreamshardError, escaped
from streamshard.extras import explained
from streamshard.limits import told

__all__ = ["main"]


_signalled: list[int] = []
"""The signal that ends this process, once there is one."""


_COMPLETION = "_STREAMSHARD_COMPLETE"  # set where a shell asks click to complete a line


_UNPRINTED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE, errno.EBADF)


class _Terminated(BaseException):
    """SIGTERM arrived."""


def _handle_signals() -> None:
    _signalled.clear()
    handlers = {"SIGINT": _on_interrupt, "SIGTERM": _on_terminate, "SIGHUP": _on_terminate}
    for signal_name, handler in handlers.items():
        number = getattr(signal, signal_name, None)  # Windows has no SIGHUP
        # Under nohup a hang-up is ignored, and stays so.
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _on_interrupt(number: int, _frame: FrameType | None) -> None:
    _ignore_signals()
    _signalled.append(number)
    raise KeyboardInterrupt


def _on_terminate(number: int, _frame: FrameType | None) -> None:
    _ignore_signals()
    _signalled.append(number)
    raise _Terminated


def _ignore_signals() -> None:
    # A second Ctrl-C must not interrupt the removal of what is half written.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def main(command: click.Command = cli) -> None:
    """Run the command line and exit with the code of what happened."""
    open_streams()
    if threading.current_thread() is threading.main_thread():
        _handle_signals()
    end(_run(command))


def _run(command: click.Command) -> int:
    """Run a command; the exit code of what happened, which is told."""
    verbose = bool({"-v", "--verbose"} & set(sys.argv))
    try:
        told(_invoke)(command)
    except click.exceptions.Exit as error:  # --help, --version
        return error.exit_code
    except BaseException as error:  # noqa: BLE001 - each has its code
        return _end_of(error, verbose=verbose)
    return 0


def _invoke(command: click.Command) -> None:
    name = "streamshard" if command is cli else Path(sys.argv[0]).name
    if command is cli and _COMPLETION in os.environ:
        command.main(prog_name=name)
    # Not by `main`, which has ends of its own for errors of streams and for interrupts.
    with command.make_context(name, sys.argv[1:]) as context:
        command.invoke(context)


def _end_of(error: BaseException, *, verbose: bool) -> int:
    """Tell why a command ended; returns the exit code."""
    # Code of others that was interrupted, like an import, may make any error of it.
    signal_raised = _signalled and not isinstance(error, StreamshardError)
    if isinstance(error, _Terminated) or (signal_raised and _signalled[0] != signal.SIGINT):
        return _say_ended("Terminated", error, 143)
    if isinstance(error, KeyboardInterrupt) or signal_raised:
        return _say_ended("Interrupted", error, 130)
    if isinstance(error, click.ClickException):
        with contextlib.suppress(OSError, ValueError):
            error.show()
        return error.exit_code
    if isinstance(error, ImportError):
        error = explained(error) or error
    if isinstance(error, StreamshardError):
        return _say_error(error, verbose=verbose)
    if isinstance(error, OSError) and error.filename is None and error.errno in _UNPRINTED:
        return _say_error(unprinted(error), verbose=verbose)  # --help, --version
    if verbose:
        say("".join(traceback.format_exception(error)).rstrip())
    say(
        f"error: unexpected {type(error).__name__}: {escaped(str(error))}\n"
        "This is a bug in streamshard: please report it with the output of the same command "
        "and --verbose."
    )
    return StreamshardError.exit_code


def _say_error(error: StreamshardError, *, verbose: bool) -> int:
    if verbose:
        say("".join(traceback.format_exception(error)).rstrip())
    say("error: " + "\n".join(map(escaped, str(error).split("\n"))))
    return error.exit_code


def _say_ended(how: str, error: BaseException, code: int) -> int:
    # Whoever was writing has added what is kept.
    left = escaped(str(error)) if isinstance(error, (KeyboardInterrupt, _Terminated)) else ""
    say(f"{how}. {left or 'Nothing was written: run the same command again.'}")
    return code
