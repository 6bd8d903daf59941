"""Ranges of a file of the hub, by the hub client's own session: its tokens, proxies and endpoint.

The hub answers where a file's content is, by a link to elsewhere that is good for some time. It is asked
once, and again when the link has expired. An answer counts only if it says that it is just the range
that was asked for: 206, `Content-Range`, the right length. Anything else is another try or a refusal.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Mapping
from typing import Any
from urllib.parse import urljoin, urlsplit

from streamshard.checkpoint.hub_errors import asked_to_wait, asking
from streamshard.checkpoint.hub_stream import Body
from streamshard.disk.remote import AgainError
from streamshard.errors import HubError, UsageError, printable

__all__ = ["HubFile", "check_parts"]

MOST_NBYTES = 50_000_000_000
"""Of larger files the hub gives no ranges."""
_AGAIN = {408, 425, 429}
_EXPIRED = {400, 401, 403, 404, 410}
_MOST_REDIRECTS = 5


class HubFile:
    """A file of a repository at one commit: what opens streams of it, in any thread.

    `where` is what people are told, `sha256` the digest that the hub lists, if it lists one. Tokens and
    endpoint are those of the client, unless others are given.
    """

    def __init__(
        self,
        repo: str,
        commit: str,
        name: str,
        nbytes: int,
        *,
        where: str,
        sha256: str | None = None,
        token: str | bool | None = None,
        endpoint: str | None = None,
    ) -> None:
        self._repo, self._commit, self._name, self._nbytes = repo, commit, name, nbytes
        self._where, self._sha256 = where, sha256
        self._token, self._endpoint = token, endpoint
        self._link: str | None = None
        self._lock = threading.Lock()
        self.requests = 0
        """How many were sent, to the hub and to where it sends us."""

    def open(self, start: int, stop: int) -> Body:
        """A stream of the bytes `[start, stop)`.

        Raises `AgainError` for what another try may mend, `HubError` for what it does not.
        """
        from huggingface_hub import errors

        if not hasattr(errors, "HTTPError"):
            raise UsageError(
                "--stream needs huggingface_hub 1.0 or later: pip install -U huggingface_hub"
            )
        with contextlib.ExitStack() as stack:
            try:
                return self._opened(start, stop, stack)
            except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled):
                with asking(self._repo, self._name):
                    raise
            except (errors.HTTPError, RuntimeError) as error:
                # That may be the end of a client that another thread has closed.
                raise AgainError(" ".join(str(error).split()) or type(error).__name__) from error

    def _opened(self, start: int, stop: int, stack: contextlib.ExitStack) -> Body:
        found = self._by_link(start, stop, stack)
        if found is not None:
            return found
        with self._lock:  # those who need the link at the same time ask for it once
            if self._link is None:
                return self._by_hub(start, stop, stack)
        found = self._by_link(start, stop, stack)
        if found is None:
            raise AgainError("the links that the hub gives to its content expire at once")
        return found

    def _by_link(self, start: int, stop: int, stack: contextlib.ExitStack) -> Body | None:
        """A stream from where the hub has sent us before; None if there is no such link any more."""
        link = self._link
        if link is None:
            return None
        response = self._ask(link, {}, start, stop, stack)
        if response.status_code not in _EXPIRED and not response.is_redirect:
            return self._body(response, start, stop, stack)
        response.close()
        with self._lock:
            if self._link == link:
                self._link = None
        return None

    def _by_hub(self, start: int, stop: int, stack: contextlib.ExitStack) -> Body:
        """A stream by way of the hub, which says where the content is."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        own = url = hf_hub_url(
            self._repo, self._name, revision=self._commit, endpoint=self._endpoint
        )
        token = build_hf_headers(token=self._token, library_name="streamshard")
        for _ in range(_MOST_REDIRECTS):
            at_hub = _origin(url) == _origin(own)
            response = self._ask(url, token if at_hub else {}, start, stop, stack)
            if at_hub:
                self._check_identity(response.headers)
            target = response.headers.get("Location") if response.is_redirect else None
            if target is None:
                body = self._body(response, start, stop, stack, by_hub=at_hub)
                if not at_hub:
                    self._link = url
                return body
            response.close()
            url = _sent_on(url, target)
        raise AgainError(f"it was sent on more than {_MOST_REDIRECTS} times")

    def _ask(
        self,
        url: str,
        headers: Mapping[str, str],
        start: int,
        stop: int,
        stack: contextlib.ExitStack,
    ) -> Any:
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session

        self.requests += 1
        ranged = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        answer = get_session().stream(
            "GET",
            url,
            headers={**headers, **ranged},
            follow_redirects=False,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        )
        return stack.enter_context(answer)

    def _check_identity(self, headers: Mapping[str, str]) -> None:
        """What the hub says of a file must be what it said when the plan was made."""
        size, etag = headers.get("X-Linked-Size"), headers.get("X-Linked-Etag", "").strip('W/"')
        commit = headers.get("X-Repo-Commit", self._commit)
        wrong = (
            commit != self._commit
            or (size is not None and size != str(self._nbytes))
            or (self._sha256 and re.fullmatch("[0-9a-f]{64}", etag) and etag != self._sha256)
        )
        if wrong:
            raise HubError(
                f"{printable(self._where)}: the hub gives another file than it lists for commit "
                f"{self._commit} (other bytes, size or commit). Run the same command again."
            )

    def _body(
        self,
        response: Any,
        start: int,
        stop: int,
        stack: contextlib.ExitStack,
        *,
        by_hub: bool = False,
    ) -> Body:
        """The stream of an answer, if that is the range that was asked for."""
        from huggingface_hub.utils import hf_raise_for_status

        status, headers = response.status_code, response.headers
        if status >= 500 or status in _AGAIN:
            raise AgainError(f"the server answered {status}", asked_to_wait(headers))
        if status == 416:
            raise AgainError(f"the server knows no bytes from {start:,} to {stop:,}")
        if status >= 400:
            if by_hub:
                response.read()
                hf_raise_for_status(response)
            raise AgainError(f"the server answered {status}")
        if status != 206:
            raise AgainError(f"the server sends no parts of files (it answered {status})")
        found = headers.get("Content-Range", "")
        if found.strip() != f"bytes {start}-{stop - 1}/{self._nbytes}":
            raise AgainError(f"the server sent another part ({found or 'not told which'})")
        length = headers.get("Content-Length")
        if length is not None and length != str(stop - start):
            raise AgainError(f"the server sends {length} bytes of {stop - start:,}")
        if headers.get("Content-Encoding", "identity") != "identity":
            raise AgainError("the server sent an encoded part")
        return Body(response, stop - start, stack.pop_all())


def check_parts(where: str, nbytes: int) -> None:
    """Raise `HubError` for a file of which the hub gives no parts."""
    if nbytes > MOST_NBYTES:
        raise HubError(
            f"{printable(where)}: has {nbytes:,} bytes, and of files of more than {MOST_NBYTES:,} the "
            "hub gives no parts. Run it without --stream: then it is downloaded."
        )


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc


def _sent_on(url: str, target: str) -> str:
    """Where an answer of `url` sends us."""
    try:
        found = urljoin(url, target)
        if urlsplit(found).scheme in ("http", "https") and target.isprintable():
            return found
    except ValueError:
        pass
    raise AgainError(f"it was sent on to '{target}', which is no address")
