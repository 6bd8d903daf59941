"""`python -m streamshard`, and the command of that name.

Light, so that what comes before the imports is over at once: an interrupt is no traceback then either.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from types import FrameType

__all__ = ["main"]


_DOCUMENT = (
    '{"error": {"type": "%s", "exit_code": %d, "message": "%s. Nothing was written: run the same '
    'command again."}}\n'
)


def main() -> None:
    """Import the command line and run it."""
    if threading.current_thread() is threading.main_thread():
        usual = {"SIGINT": signal.default_int_handler, "SIGTERM": signal.SIG_DFL}
        for name, handler in usual.items():
            if signal.getsignal(getattr(signal, name)) is handler:
                signal.signal(getattr(signal, name), _end)
    from streamshard.cli import main as run

    run()


def _end(number: int, _frame: FrameType | None) -> None:
    """End by a signal that came before anything was begun."""
    how, code = ("Interrupted", 130) if number == signal.SIGINT else ("Terminated", 143)
    arguments = sys.argv[1:]
    if "--json" in arguments[: arguments.index("--") if "--" in arguments else None]:
        with contextlib.suppress(OSError):
            os.write(1, (_DOCUMENT % (how, code, how)).encode())
    os._exit(code)


if __name__ == "__main__":
    main()
