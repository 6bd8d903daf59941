"""What goes wrong between here and the hub, as errors that say what it is and what to do."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from streamshard.checkpoint.hub_limits import EndlessError, in_time
from streamshard.disk.system import writing
from streamshard.errors import (
    HubError,
    InputError,
    StreamshardError,
    UsageError,
    WriteError,
    printable,
)

__all__ = [
    "LOG_IN",
    "asked_to_wait",
    "asking",
    "causes",
    "constants",
    "endpoint",
    "not_cached",
    "refusal",
    "translated",
]

LOG_IN = "log in (hf auth login, or set HF_TOKEN)"
_SHORT = re.compile(r"@[0-9a-f]{6,39}$")
_OF_FOLDERS = (PermissionError, FileNotFoundError, NotADirectoryError, FileExistsError)


@contextlib.contextmanager
def translated(told: Callable[[Exception], StreamshardError]) -> Iterator[None]:
    """Have what the hub's client raises be one of our errors, as `told` makes it of that."""
    try:
        yield
    except (StreamshardError, MemoryError):
        raise
    except Exception as error:
        raise told(error) from error


@contextlib.contextmanager
def asking(where: str, what: str, *, most: int | None = None) -> Iterator[None]:
    """Have what the hub's client raises be a `HubError`: it was asked for `what` of `where`.

    Kinds are told by the names of their classes, so that nothing need be imported, and all versions
    of the client are understood. With `most` it must not need more requests of this thread.
    """
    with translated(partial(refusal, where, what)), in_time(most):
        yield


def endpoint() -> str:
    """Where the hub is."""
    return str(constants().ENDPOINT)


def constants() -> Any:
    """What the client has made of its environment; a variable that it cannot use is told by name."""
    try:
        from huggingface_hub import constants as found
    except ValueError as error:  # of a number that is none
        values = sorted(item for item in os.environ.items() if item[0].startswith("HF_"))
        named = [f"{name}={value}" for name, value in values if repr(value) in str(error)]
        raise UsageError(
            f"the hub's client cannot use its environment: {printable(str(error), 200)}. Correct "
            f"or unset {printable(', '.join(named)) or 'its variables (HF_…)'}."
        ) from error
    if not str(found.ENDPOINT).startswith(("http://", "https://")):
        raise UsageError(
            f"HF_ENDPOINT is '{printable(str(found.ENDPOINT))}'; the address of a hub is meant, like "
            "https://huggingface.co. Correct or unset it."
        )
    return found


def not_cached(where: str, what: str, cache: Path) -> HubError:
    """The error of something that is not here, where the hub must not be asked."""
    return HubError(
        f"{where}: is a model on the hub, if no path here is meant; {what} is not in the cache "
        f"({printable(str(cache))}), and the hub is not asked (--offline, or HF_HUB_OFFLINE). Leave that "
        "out once, with a network, or give a folder."
    )


def asked_to_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that an answer asks to wait; None if it does not, or says what is no time."""
    said = headers.get("Retry-After", "").strip()
    if said.isdecimal():
        return float(said)
    import email.utils  # loads sockets, which folders need not

    with contextlib.suppress(ValueError, TypeError, OverflowError):
        return max(email.utils.parsedate_to_datetime(said).timestamp() - time.time(), 0.0)
    left = re.search(r"\br=0\s*;\s*t=(\d+)", headers.get("RateLimit", ""))
    return float(left[1]) if left else None


def refusal(where: str, what: str, error: Exception) -> StreamshardError:
    """The error that an error of the client is, which was asked for `what` of `where`."""
    for one in causes(error):
        if isinstance(one, EndlessError):
            return InputError(f"{where}: {what} does not end, in {one} answers of {endpoint()}.")
        found = _known(where, what, one)
        if found is not None:
            return found
    text = printable(" ".join(str(error).split()), 300).rstrip(".")
    first = "Install that, and run" if isinstance(error, ImportError) else "Run"
    return HubError(
        f"{where}: {what} could not be got from {endpoint()}: {type(error).__name__}: {text}. {first} "
        "the same command again."
    )


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it: some say only that nothing is in the cache."""
    for _ in range(8):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__


def _known(where: str, what: str, error: BaseException) -> StreamshardError | None:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    page = "/".join([endpoint(), *where.partition("@")[0].split("/")[:2]])
    status = getattr(getattr(error, "response", None), "status_code", None)
    if "GatedRepoError" in kinds:
        return HubError(
            f"{where}: is gated: its files are only for those whom its owner has let in. Ask for access "
            f"on {page}, {LOG_IN} as who has it, and run the same command again."
        )
    if "DisabledRepoError" in kinds:
        return HubError(f"{where}: was disabled on the hub ({page}), and cannot be read.")
    if "RevisionNotFoundError" in kinds:
        whole = (
            " A commit is named in full, by 40 letters and digits." if _SHORT.search(where) else ""
        )
        return HubError(
            f"{where}: there is no such revision (branch, tag or commit). {page} shows which there are."
            f"{whole}"
        )
    if "RepositoryNotFoundError" in kinds:
        return HubError(
            f"{where}: there is no such path here, and no such model on {endpoint()}, or it is private "
            f"and you are not let in. Check the name; for a private one {LOG_IN}."
        )
    if "RemoteEntryNotFoundError" in kinds:
        return HubError(f"{where}: {what} is listed there but cannot be had. Look at {page}.")
    if status is not None:
        return _by_status(where, what, int(status), error)
    if "OfflineModeIsEnabled" in kinds:
        return HubError(f"{where}: the hub is not to be asked (HF_HUB_OFFLINE). Unset that.")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return _of_disk(error)
    if isinstance(error, _OF_FOLDERS) and error.filename is not None:
        return _of_disk(error)
    if kinds & {"TransportError", "ConnectionError", "Timeout", "RequestException"}:
        text = printable(" ".join(str(error).split()), 200).rstrip(".") or type(error).__name__
        return HubError(
            f"{where}: is no path here, and {what} could not be got from {endpoint()}: {text}. Check the "
            "network, the proxy and HF_ENDPOINT, and run the same command again; with "
            "--offline it uses what is in the cache."
        )
    return None


def _by_status(where: str, what: str, status: int, error: BaseException) -> HubError:
    headers = getattr(getattr(error, "response", None), "headers", {})
    wait = asked_to_wait(headers)
    if status in (401, 403):
        return HubError(
            f"{where}: {what} was refused by {endpoint()} ({status}). Your token does not allow it, or "
            f"is not valid any more: {LOG_IN}, and run the same command again."
        )
    if status == 429:
        after = " later" if wait is None else f" in {wait:,.0f} seconds"
        return HubError(
            f"{where}: {endpoint()} has had too many requests from here (429). Run the same command again"
            f"{after}; who is logged in (hf auth login) may ask more."
        )
    if status >= 500 or status == 408:
        return HubError(
            f"{where}: {what} could not be got: {endpoint()} has a problem of its own ({status}). Run "
            "the same command again later: it continues. With --offline it uses what is in the cache."
        )
    return HubError(
        f"{where}: {what} could not be got: {endpoint()} answered {status}. Check the name and "
        "HF_ENDPOINT, and run the same command again."
    )


def _of_disk(error: OSError) -> StreamshardError:
    """What is wrong is the disk of the cache."""
    path = error.filename or "the hub's cache"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return WriteError(
            f"{printable(str(path))}: no space left. Free some space, or have the hub's cache on another "
            "disk (--cache-dir, or HF_HOME), and run the same command again."
        )
    try:
        with writing(path, 0):
            raise error
    except StreamshardError as told:
        return told
    return InputError(str(error))
