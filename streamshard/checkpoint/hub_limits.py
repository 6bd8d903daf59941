"""How long the hub's client waits for the next bytes: by itself, mostly for ever."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

__all__ = ["in_time"]

LONG = 600.0
"""Seconds for the answer to what was sent: a commit of many files takes minutes."""
_waiting: list[object] = []
"""One for each call of ours that is on its way, in any thread: the client has threads of its own."""


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    """Have requests of the hub's client that nobody has given a limit end by a timeout meanwhile.

    That of an answer to a question is `HF_HUB_DOWNLOAD_TIMEOUT`, as for content.
    """
    from huggingface_hub.utils import get_session

    session = get_session()
    hooks = getattr(session, "event_hooks", None)  # before 1.0 it was another library
    if hooks is not None and _limit not in hooks["request"]:
        session.event_hooks = {**hooks, "request": [*hooks["request"], _limit]}
    one = object()
    _waiting.append(one)
    try:
        yield
    finally:
        _waiting.remove(one)


def _limit(request: Any) -> None:
    """Give a request the limits that it lacks."""
    if not _waiting:
        return
    from huggingface_hub import constants

    short = float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
    read = short if request.method in ("GET", "HEAD") else max(short, LONG)
    limits = {"connect": short, "read": read, "write": max(short, LONG)}
    given = request.extensions.get("timeout") or {}
    request.extensions["timeout"] = limits | {k: v for k, v in given.items() if v is not None}
