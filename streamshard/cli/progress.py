"""Progress on standard error: a line that is drawn again in a terminal, a line now and then in a log."""

from __future__ import annotations

import dataclasses
import sys
import threading
import time

from streamshard.cli.bar import State
from streamshard.cli.console import say
from streamshard.cli.terminal_text import columns_of, width
from streamshard.errors import escaped

__all__ = ["Progress"]


DRAWN_EVERY = 0.15
LOGGED_EVERY = 10.0


class Progress:
    """Says what is being done, and how far that is; steps without bytes only in a terminal.

    `words` are what steps are called here. Whatever happens to the stream, the work goes on.
    """

    def __init__(self, words: dict[str, str], *, quiet: bool = False) -> None:
        self._words = words
        self._stream = sys.stderr
        self._shown = not quiet
        self._terminal = columns_of(self._stream) is not None
        self._every = DRAWN_EVERY if self._terminal else LOGGED_EVERY
        self._lock = threading.RLock()
        self._state: State | None = None
        self._began = self._last = 0.0
        self._drawn = ""
        """What stands in the line of the cursor."""

    def step(self, what: str, nbytes: int = 0, done: int = 0) -> None:
        """Begin with something else; or go on, if it is the same with as many bytes."""
        with self._lock:
            state = self._state
            if state is not None and nbytes and (state.what, state.total) == (what, nbytes):
                self.piece(done - state.done, "")
                return
            self._finish()
            self._state = State(self._words.get(what, what), nbytes, done, done, 0)
            self._began = time.monotonic()
            if self._terminal or nbytes:
                self._show()

    def piece(self, nbytes: int, name: str) -> None:
        """Note finished bytes of a tensor or file."""
        with self._lock:
            state, now = self._state, time.monotonic()
            if state is None:
                return
            seconds, done = now - self._began, state.done + nbytes
            self._state = dataclasses.replace(state, done=done, seconds=seconds, name=name)
            if now - self._last >= self._every:
                self._show()

    def message(self, text: str) -> None:
        """Say something; the progress goes on below."""
        with self._lock:
            drawn = self._drawn
            self._erase()
            say(text)
            if drawn:
                self._show()

    def close(self) -> None:
        """End the line of progress."""
        with self._lock:
            self._finish()
            self._state = None

    def _finish(self) -> None:
        """Leave the last line of a step with bytes, and none of another one."""
        if self._state is not None and self._terminal:
            if self._state.total and self._drawn:
                self._show()
                self._write("\n")
                self._drawn = ""
            self._erase()

    def _show(self) -> None:
        state = self._state
        if state is None or not self._shown:
            return
        self._last = time.monotonic()
        if not self._terminal:
            say(state.log_line())
            return
        columns = columns_of(self._stream) or 80
        if state.total:
            state = dataclasses.replace(state, name=escaped(state.name))
            text = state.line(columns, plain=not self._knows("█░…"))
        else:
            text = f"{state.what} ..."[: columns - 1]
        more = min(width(self._drawn), columns - 1) - width(text)
        self._write(f"\r{text}{' ' * more}")
        self._drawn = text

    def _erase(self) -> None:
        if self._drawn:
            self._write(f"\r{' ' * width(self._drawn)}\r")
            self._drawn = ""

    def _knows(self, letters: str) -> bool:
        try:
            letters.encode(self._stream.encoding or "ascii")
        except (UnicodeEncodeError, LookupError):
            return False
        return True

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # the terminal is gone; the work is not
            self._shown = False
            self._drawn = ""
