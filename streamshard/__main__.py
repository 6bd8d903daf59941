"""`python -m streamshard`, and the command of that name.

Light, so that what comes before the imports is over at once: an interrupt is no traceback then either.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from types import FrameType

__all__ = ["main"]


def main() -> None:
    """Import the command line and run it."""
    if threading.current_thread() is threading.main_thread():
        usual = {"SIGINT": signal.default_int_handler, "SIGTERM": signal.SIG_DFL}
        for name, handler in usual.items():
            if signal.getsignal(getattr(signal, name)) is handler:
                signal.signal(getattr(signal, name), _end)
    from streamshard.extras import explained

    try:
        from streamshard.cli import main as run
    except ImportError as error:
        missing = explained(error)
        if missing is None:
            raise
        if sys.stderr is not None:
            sys.stderr.write(f"error: {missing}\n")
        _put_document(type(missing).__name__, missing.exit_code, str(missing))
        sys.exit(missing.exit_code)
    try:
        run()
    except SystemExit as end:
        _leave(end.code)
        raise


def _leave(code: object) -> None:
    """End here if nothing is left to wait for.

    Taking an interpreter apart, object by object, would take as long as all else that follows the last
    byte, and the system takes everything back at once.
    """
    if isinstance(code, int) and threading.active_count() == 1 and not _is_within(sys._getframe(2)):  # noqa: SLF001
        atexit._run_exitfuncs()  # noqa: SLF001 - as multiprocessing does
        for stream in (sys.stdout, sys.stderr):  # what these have said, too
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)


def _is_within(frame: FrameType) -> bool:
    """Whether something else runs this, and has work left when this ends: a profiler, say."""
    around = frame.f_back
    while around is not None and around.f_globals.get("__name__") == "runpy":  # `python -m`
        around = around.f_back
    return around is not None


def _end(number: int, _frame: FrameType | None) -> None:
    """End by a signal that came before anything was begun."""
    kind, code = ("Interrupted", 130) if number == signal.SIGINT else ("Terminated", 143)
    _put_document(kind, code, f"{kind}. Nothing was written: run the same command again.")
    os._exit(code)


def _put_document(kind: str, code: int, message: str) -> None:
    """What `--json` prints of an error, where the command line is not imported yet."""
    arguments = sys.argv[1:]
    if "--json" in arguments[: arguments.index("--") if "--" in arguments else None]:
        import json

        document = {"error": {"type": kind, "exit_code": code, "message": message}}
        with contextlib.suppress(OSError):
            os.write(1, f"{json.dumps(document)}\n".encode())


if __name__ == "__main__":
    main()
