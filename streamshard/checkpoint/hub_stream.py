"""The body of an answer, read from the client's own connection in large pieces.

The client reads 64 KB at a time and copies it three times, which is half of what reading costs. Once it
has handed over what it has received, the rest of the body is what comes next on its connection, and is
read from there, where the client lets us see that nothing is left in it. Else it reads.
"""

from __future__ import annotations

import contextlib
from typing import Any

from streamshard.disk.remote import AgainError

__all__ = ["Body"]

_TO_PROTOCOL = ("_stream", "_httpcore_stream", "_stream", "_connection", "_h11_state")


class Body:
    """The `nbytes` bytes of an answer; `stack` is what is left when it is closed."""

    def __init__(self, response: Any, nbytes: int, stack: contextlib.ExitStack) -> None:
        self._response, self._stack, self._left = response, stack, nbytes
        self._pieces = response.iter_raw()
        self._kept = b""
        self._socket: Any = None

    def read_into(self, out: memoryview) -> int:
        """Put the next bytes at the beginning of `out`; returns how many. Raises `AgainError`."""
        try:
            if self._socket is not None:
                count = int(self._socket.recv_into(out))
            else:
                count = self._client_reads(out)
        except Exception as error:  # the connection has its own kinds, and none is a fault of ours
            reason = " ".join(str(error).split()) or type(error).__name__
            raise AgainError(f"the connection broke: {reason}") from error
        self._left -= count
        return count

    def close(self) -> None:
        """Give the connection back, or close it if not everything was read."""
        with contextlib.suppress(Exception):
            if not self._left and self._socket is None:
                next(self._pieces, b"")  # the end, which leaves the connection for the next one
        with contextlib.suppress(Exception):
            self._stack.close()

    def _client_reads(self, out: memoryview) -> int:
        piece = self._kept or bytes(next(self._pieces, b""))
        count = min(len(piece), len(out))
        out[:count] = piece[:count]
        self._kept = piece[count:]
        if not self._kept:
            self._socket = bare_socket(self._response)
        return count


def bare_socket(response: Any) -> Any:
    """The socket of an answer whose other bytes come there as they are; None if that is not sure.

    What the protocol's implementation has received and not handed over would be missed: it is looked
    at. Private names are on the way there; where they are others, the client reads on.
    """
    from huggingface_hub import constants

    headers = response.headers
    if response.http_version != "HTTP/1.1" or "Transfer-Encoding" in headers:
        return None
    protocol = response.stream
    for name in _TO_PROTOCOL:
        protocol = getattr(protocol, name, None)
    if getattr(protocol, "trailing_data", None) != (b"", False):
        return None
    connection = response.extensions.get("network_stream")
    if connection is None:
        return None
    found, inner = (connection.get_extra_info(name) for name in ("socket", "ssl_object"))
    # Through a proxy with TLS there may be two layers of it, of which a socket knows one.
    if inner is not None and getattr(found, "_sslobj", None) is not inner:
        return None
    if not hasattr(found, "recv_into"):
        return None
    found.settimeout(constants.HF_HUB_DOWNLOAD_TIMEOUT)
    return found
