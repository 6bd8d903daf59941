"""What requests of the hub's client may take, where by itself it sets no limit.

It waits for ever, follows a list as long as there is a next page, gives its token to whatever address
the hub says that comes next, and writes what it gets to where an answer's ETag says, be that anywhere.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any
from urllib.parse import urlsplit

from streamshard.errors import HubError, printable

__all__ = ["EndlessError", "in_time"]

LONG = 600.0
"""Seconds for the answer to what was sent: a commit of many files takes minutes."""
_BLOB = re.compile(r"(?:W/)?\"?(?!\.)[\w.+=-]{1,200}\"?", re.ASCII)
_waiting: list[object] = []
"""One for each call of ours that is on its way, in any thread: the client has threads of its own."""
_left: ContextVar[list[int] | None] = ContextVar("requests that are left", default=None)


class EndlessError(Exception):
    """A call has needed more requests than it may; its text is how many."""


@contextlib.contextmanager
def in_time(most: int | None = None) -> Iterator[None]:
    """Have requests of the hub's client that nobody has given a limit end by a timeout meanwhile.

    That of an answer to a question is `HF_HUB_DOWNLOAD_TIMEOUT`, as for content. More than `most`
    requests of this thread raise `EndlessError`. What does this stays in the client's session, and does
    nothing while no call of ours is on its way.
    """
    from huggingface_hub.utils import get_session

    session = get_session()
    hooks = getattr(session, "event_hooks", None)  # before 1.0 it was another library
    if hooks is not None and _limit not in hooks["request"]:
        session.event_hooks = {
            **hooks,
            "request": [*hooks["request"], _limit],
            "response": [*hooks["response"], _check],
        }
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


def _check(response: Any) -> None:
    """Refuse an answer of which the client would make a path that is none in its cache."""
    if not _waiting or response.request.method != "HEAD":
        return
    for name in ("ETag", "X-Linked-Etag"):
        said = response.headers.get(name)
        if said and not _BLOB.fullmatch(said):
            raise HubError(
                f"{response.request.url.host}: calls the content of a file '{printable(said, 80)}', of "
                "which no name in the cache can be made. It is damaged or hostile; nothing was written."
            )
