"""What requests of the hub's client may take, where by itself it sets no limit.

It waits for ever, follows a list as long as there is a next page, and gives its token to whatever
address the hub says that comes next.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any
from urllib.parse import urlsplit

__all__ = ["EndlessError", "in_time"]

LONG = 600.0
"""Seconds for the answer to what was sent: a commit of many files takes minutes."""
_waiting: list[object] = []
"""One for each call of ours that is on its way, in any thread: the client has threads of its own."""
_left: ContextVar[list[int] | None] = ContextVar("requests that are left", default=None)


class EndlessError(Exception):
    """A call has needed more requests than it may; its text is how many."""


@contextlib.contextmanager
def in_time(most: int | None = None) -> Iterator[None]:
    """Have requests of the hub's client that nobody has given a limit end by a timeout meanwhile.

    That of an answer to a question is `HF_HUB_DOWNLOAD_TIMEOUT`, as for content. More than `most`
    requests of this thread raise `EndlessError`.
    """
    from huggingface_hub.utils import get_session

    session = get_session()
    hooks = getattr(session, "event_hooks", None)  # before 1.0 it was another library
    if hooks is not None and _limit not in hooks["request"]:
        session.event_hooks = {**hooks, "request": [*hooks["request"], _limit]}
    one = object()
    _waiting.append(one)
    token = None if most is None else _left.set([most, most])
    try:
        yield
    finally:
        _waiting.remove(one)
        if token is not None:
            _left.reset(token)


def _limit(request: Any) -> None:
    """Give a request the limits that it lacks."""
    if not _waiting:
        return
    from huggingface_hub import constants

    left = _left.get()
    if left is not None:
        left[0] -= 1
        if left[0] < 0:
            raise EndlessError(f"{left[1]:,}")
    if urlsplit(constants.ENDPOINT).scheme == "https" and request.url.scheme == "http":
        request.headers.pop("Authorization", None)  # everybody on the way would read it
    short = float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
    read = short if request.method in ("GET", "HEAD") else max(short, LONG)
    limits = {"connect": short, "read": read, "write": max(short, LONG)}
    given = request.extensions.get("timeout") or {}
    request.extensions["timeout"] = limits | {k: v for k, v in given.items() if v is not None}
