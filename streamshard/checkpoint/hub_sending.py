"""What the hub's client raises while something is sent: tried again where that helps, told where not."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

from streamshard.checkpoint.hub_errors import LOG_IN, asked_to_wait, causes, endpoint, translated
from streamshard.checkpoint.hub_limits import in_time
from streamshard.errors import HubError, printable

__all__ = ["HubStatusError", "again", "sending", "status_of"]

TRIES = 6
LONGEST = 600.0
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_NETWORK = {"TransportError", "ConnectionError", "Timeout", "RequestException", "TimeoutError"}
_log = logging.getLogger(__name__)
T = TypeVar("T")


class HubStatusError(HubError):
    """An answer of the hub that is no answer to what was asked, with its number."""

    status = 0


def again(
    do: Callable[[], T], *, going: Callable[[], bool] = lambda: True, tries: int = TRIES
) -> T:
    """What `do` returns, done again if what it raises may pass, after as long as the hub says.

    Ends early if `going` says no.
    """
    for tried in range(1, tries + 1):
        try:
            return do()
        except Exception as error:
            wait = _wait(error, tried)
            if wait is None or tried == tries or wait > LONGEST:
                raise
            text = " ".join(str(error).split())
            _log.info("again in %.0f seconds: %s", wait, printable(text, 160))
            if not pause(wait, going):
                raise
    raise AssertionError


def pause(seconds: float, going: Callable[[], bool] = lambda: True) -> bool:
    """Wait; returns whether whoever waits is still to go on."""
    until = time.monotonic() + seconds
    while going() and (left := until - time.monotonic()) > 0:
        time.sleep(min(left, 0.2))
    return going()


def _wait(error: BaseException, tried: int) -> float | None:
    """How long to wait before the next try; None if another one would not help."""
    usual = float(min(2 ** (tried - 1), 30))
    for one in causes(error):
        status = status_of(one)
        if status is not None:
            if status not in _PASSING:
                return None
            asked = asked_to_wait(one.response.headers)  # type: ignore[attr-defined]
            return max(asked or 0.0, usual)
        if _NETWORK & {kind.__name__ for kind in type(one).__mro__}:
            return usual
    return None


def status_of(error: BaseException | None) -> int | None:
    """The status of the answer that an error of the client is about."""
    found = getattr(getattr(error, "response", None), "status_code", None)
    return None if found is None else int(found)


@contextlib.contextmanager
def sending(where: str, what: str) -> Iterator[None]:
    """Have what the client raises be a `HubError`: `what` could not be done at `where`."""
    with translated(partial(_told, where, what)), in_time():
        yield


def _told(where: str, what: str, error: Exception) -> HubError:
    for one in causes(error):
        kinds = {kind.__name__ for kind in type(one).__mro__}
        status = status_of(one)
        if status is not None:
            found = HubStatusError(_by_status(where, what, status, one))
            found.status = status
            return found
        if "OfflineModeIsEnabled" in kinds:
            return HubError(
                f"{where}: {what} needs the hub, which is not to be asked (HF_HUB_OFFLINE). Unset that."
            )
        if _NETWORK & kinds:
            return HubError(
                f"{where}: {what} failed: {_text(one)}. Check the network, the proxy and HF_ENDPOINT, "
                "and run the same command again: it continues."
            )
    return HubError(
        f"{where}: {what} failed: {type(error).__name__}: {_text(error)}. Run the same command again: it "
        "continues."
    )


def _by_status(where: str, what: str, status: int, error: BaseException) -> str:
    hub, said = endpoint(), _text(error)
    if status == 401:
        return (
            f"{where}: {what} was refused (401): {hub} does not know you; {LOG_IN} "
            "with a token that may write, and run the same command again."
        )
    if status == 403:
        return (
            f"{where}: {what} was refused (403): your token may not write there: {said}. Use "
            "another name, or a token that may (hf auth login, or HF_TOKEN), and run the same command "
            "again."
        )
    if status == 404:
        return (
            f"{where}: {what} failed: there is no such repository on {hub}, or you may not see it. Check "
            "the name, and that you are logged in (hf auth login, or HF_TOKEN)."
        )
    if status == 429:
        return (
            f"{where}: {what} was put off: {hub} has had too many requests from here (429). Run the same "
            "command again later: it continues."
        )
    if status in _PASSING or status >= 500:
        return (
            f"{where}: {what} failed: {hub} has a problem of its own ({status}). Run the same command "
            "again later: it continues."
        )
    return f"{where}: {what} was refused by {hub} ({status}): {said}."


def _text(error: BaseException) -> str:
    return printable(" ".join(str(error).split()), 300).rstrip(".") or type(error).__name__
