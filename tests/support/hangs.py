"""When something hangs: machines may be slow or busy, so that no limit of a test is shorter than this."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Any

HANGS = 600
"""Seconds."""


def until(condition: Callable[[], Any], process: subprocess.Popen[str] | None = None) -> None:
    """Wait for something; if a process is to do it, no longer than that lives."""
    deadline = time.monotonic() + HANGS
    while not condition():
        if process is not None and process.poll() is not None:
            assert condition(), process.communicate()[1]
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.002)


def ended(process: subprocess.Popen[str]) -> str:
    """What a command that ends by itself has said to people."""
    try:
        return process.communicate(timeout=HANGS)[1]
    finally:
        process.kill()
