"""What a run has to say besides its result: warnings, which nobody passes on and nobody can lose.

Whoever finds something notes it here at once, and the report of the command that is running lists it. No
value carries warnings that someone must remember to join.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

__all__ = ["note", "noted", "noting"]

P = ParamSpec("P")
T = TypeVar("T")

_notes: ContextVar[list[str] | None] = ContextVar("notes", default=None)


def note(*warnings: str) -> None:
    """Have warnings listed in the report of the running command, each once, in this order.

    Raises `RuntimeError` where none runs, so that nothing is noted in vain.
    """
    notes = _notes.get()
    if notes is None:
        if warnings:
            raise RuntimeError(f"noted outside of a command: {warnings[0]}")
        return
    notes += [warning for warning in dict.fromkeys(warnings) if warning not in notes]


def noted() -> list[str]:
    """The warnings of the running command: the list itself, which has also those that come later."""
    notes = _notes.get()
    return [] if notes is None else notes


def noting(command: Callable[P, T]) -> Callable[P, T]:
    """A command whose warnings are noted, from none."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        token = _notes.set([])
        try:
            return command(*args, **kwargs)
        finally:
            _notes.reset(token)

    return run
