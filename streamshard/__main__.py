"""`python -m streamshard`, and the command of that name.

Light, so that what comes before the imports is over at once: an interrupt is no traceback then either.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

__all__ = ["main"]


def main() -> None:
    """Import the command line and run it."""
    if (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from streamshard.extras import explained

    try:
        from streamshard.cli import main as run
    except ImportError as error:
        missing = explained(error)
        if missing is None:
            raise
        if sys.stderr is not None:
            sys.stderr.write(f"error: {missing}\n")
        sys.exit(missing.exit_code)
    run()


if __name__ == "__main__":
    main()
