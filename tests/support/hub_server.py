"""HTTP/1.1 for the local hub: two ports, bodies streamed from and to disk, faults where they are due."""

from __future__ import annotations

import os
import re
import select
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

from hangs import HANGS
from hub_faults import Faults
from hub_messages import PIECE, Cut, Refusal, Reply, Request, Slice, refused
from hub_state import State

Endpoint = Callable[..., Reply]
Routes = list[tuple[str, str, re.Pattern[str], Endpoint]]


def route(routes: Routes, state: State, request: Request) -> Reply:
    """The answer of the first endpoint that fits, or a refusal as an answer."""
    method = "GET" if request.method == "HEAD" else request.method
    try:
        for port, wanted, pattern, endpoint in routes:
            found = pattern.fullmatch(request.raw_path)
            if found and (port, wanted) == (request.port, method):
                parts = [part and unquote(part) for part in found.groups()]
                return endpoint(state, request, *parts)
    except Refusal as refusal:
        return refused(refusal)
    unknown = f"the local hub does not know {request.method} {request.path}"
    return refused(Refusal(404, unknown))


class Server(ThreadingHTTPServer):
    """One port. Connections still open when it closes are ended."""

    request_queue_size = 128

    def __init__(self, name: str, port: int, state: State, faults: Faults, routes: Routes) -> None:
        self.name, self.state, self.faults, self.routes = name, state, faults, routes
        self.connections: set[socket.socket] = set()
        self.threads: set[threading.Thread] = set()
        super().__init__(("127.0.0.1", port), Handler)
        self.loop = threading.Thread(target=partial(self.serve_forever, 0.02), daemon=True)
        self.loop.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        self.threads.add(threading.current_thread())
        try:
            if self.state.stop.is_set():  # it came when the others were ended
                request.shutdown(socket.SHUT_RDWR)
            super().process_request_thread(request, client_address)
        finally:
            self.connections.discard(request)
            self.threads.discard(threading.current_thread())

    def handle_error(self, request: Any, client_address: Any) -> None:
        if isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):  # the client went away
            return
        # Who has read enough of a body goes away.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            self.state.errors.append(traceback.format_exc())

    def close(self) -> None:
        self.shutdown()
        for connection in list(self.connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue
        for thread in [self.loop, *self.threads]:
            thread.join(HANGS)
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def do_GET(self) -> None:
        state = self.server.state
        request = Request(
            self.command, self.server.name, self.path, self.headers, self.headers.get("Range")
        )
        request.stream = self._body
        state.requests.append(request)
        try:
            answer: Callable[[], Reply] = partial(route, self.server.routes, state, request)
            for fault in self.server.faults.due(request):
                answer = partial(fault.act, state, request, answer)
            reply = answer()
            for _ in request.pieces():  # what was not read would be taken for the next request
                pass
            self._send(request, reply)
        except Cut:
            self.close_connection = True
        except (ConnectionError, TimeoutError):  # the client went away
            self.close_connection = True
        except Exception:  # noqa: BLE001
            state.errors.append(f"{request.method} {request.target}\n{traceback.format_exc()}")
            self.close_connection = True
        finally:
            request.done.set()

    do_HEAD = do_GET  # noqa: N815
    do_POST = do_GET  # noqa: N815
    do_PUT = do_GET  # noqa: N815
    do_DELETE = do_GET  # noqa: N815

    def log_message(self, *args: Any) -> None:
        pass

    def _body(self) -> Iterator[memoryview]:
        buffer = memoryview(bytearray(PIECE))

        def block(size: int) -> Iterator[memoryview]:
            while size:
                count = self.rfile.readinto1(buffer[: min(size, PIECE)])  # type: ignore[attr-defined]
                if not count:
                    raise ConnectionError("the body ends too early")
                size -= count
                yield buffer[:count]

        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().partition(b";")[0], 16):
                yield from block(size)
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
        else:
            yield from block(int(self.headers.get("Content-Length", "0")))

    def _send(self, request: Request, reply: Reply) -> None:
        if reply.cut_after == -1:
            self._cut(reply)
        request.status = reply.status
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if reply.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif "Content-Length" not in reply.headers:
            self.send_header("Content-Length", str(len(reply)))
        self._headers_buffer.append(b"\r\n")
        head = b"".join(self._headers_buffer)
        self._headers_buffer = []
        if request.method == "HEAD":
            self.connection.sendall(head)
            return
        parts: list[Slice | bytes] = list(reply.body)
        if reply.chunked:
            whole = b"".join(map(bytes, parts))
            size = b"%x\r\n" % len(whole)
            parts = [size + whole + b"\r\n" if whole else b"", b"0\r\n\r\n"]
        if parts and isinstance(parts[0], bytes) and _plain(reply):  # one packet
            self.connection.sendall(head + parts[0])
            request.bytes += len(parts.pop(0))
        else:
            self.connection.sendall(head)
        for part in parts:
            self._send_part(request, reply, part)
        if reply.cut_after is not None:
            self._cut(reply)

    def _send_part(self, request: Request, reply: Reply, part: Slice | bytes) -> None:
        at, stop = 0, len(part)
        file = os.open(part.path, os.O_RDONLY) if isinstance(part, Slice) else -1
        try:
            while at < stop:
                count = min(stop - at, PIECE if _plain(reply) else 1 << 16)
                if reply.cut_after is not None:
                    if request.bytes >= reply.cut_after:
                        self._cut(reply)
                    count = min(count, reply.cut_after - request.bytes)
                if reply.stall and request.bytes == reply.stall[0]:
                    self._stall(reply.stall[1])
                elif reply.stall and request.bytes < reply.stall[0]:
                    count = min(count, reply.stall[0] - request.bytes)
                if isinstance(part, Slice):
                    count = os.sendfile(self.connection.fileno(), file, part.start + at, count)
                    if not count:
                        raise RuntimeError(f"{part.path} is shorter than it was")
                else:
                    self.connection.sendall(part[at : at + count])
                at += count
                request.bytes += count
                if reply.rate:
                    self.server.state.stop.wait(count / reply.rate)
        finally:
            if file >= 0:
                os.close(file)

    def _stall(self, seconds: float) -> None:
        """Say nothing for so long, or until the hub closes or the client goes away."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if self.server.state.stop.wait(min(left, 0.05)):
                return
            if select.select([self.connection], [], [], 0)[0]:  # it has nothing to say but that
                raise ConnectionError("the client does not wait")

    def _cut(self, reply: Reply) -> None:
        if reply.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        raise Cut


def _plain(reply: Reply) -> bool:
    return reply.cut_after is None and reply.rate is None and reply.stall is None
