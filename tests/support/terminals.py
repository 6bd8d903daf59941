"""The command line in a terminal of any width, and what is seen there."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from dataclasses import dataclass, field

from pairs import heed_interrupts


@dataclass
class Terminal:
    """What a program wrote: every state that a line had, and what is seen in the end."""

    columns: int
    code: int = 0
    text: str = ""
    drawn: list[str] = field(default_factory=list)

    @property
    def lines(self) -> list[str]:
        """The lines that are seen in the end; what is longer than the terminal takes several."""
        return [row.rstrip() for row in self._rows()]

    def _rows(self) -> list[str]:
        rows, row, at = [], [" "] * self.columns, 0
        for letter in self.text:
            if letter == "\n":
                rows.append("".join(row))
                row = [" "] * self.columns
            elif letter == "\r":
                at = 0
            else:
                if at == self.columns:
                    rows.append("".join(row))
                    row, at = [" "] * self.columns, 0
                row[at] = letter
                at += 1
        return [*rows, "".join(row)]


def in_terminal(
    columns: int,
    *arguments: object,
    code: str = "from streamshard.__main__ import main",
    on_text: Callable[[subprocess.Popen[bytes], str], None] = lambda *_: None,
) -> Terminal:
    """Run streamshard with all of its streams in a terminal; `code` is run before it and has `main`."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
    line = [sys.executable, "-c", f"{code}\nmain()", *map(str, arguments)]
    seen = Terminal(columns)
    data = b""
    with subprocess.Popen(
        line,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        preexec_fn=heed_interrupts,  # noqa: PLW1509 - before any thread
    ) as process:
        os.close(terminal)
        while True:
            try:
                chunk = os.read(controller, 65536)
            except OSError:  # the other end is closed
                break
            if not chunk:
                break
            data += chunk
            on_text(process, data.decode(errors="replace"))
        seen.code = process.wait()
    os.close(controller)
    seen.text = data.decode().replace("\r\n", "\n\r")
    states = seen.text.replace("\n", "\r").split("\r")
    seen.drawn = [state.rstrip() for state in states if state.strip()]
    return seen
