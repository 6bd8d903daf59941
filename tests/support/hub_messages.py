"""What a client asks of the local hub and what it is answered, before either is bytes on a socket."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

PIECE = 1 << 20


class Cut(Exception):  # noqa: N818
    """The connection ends here, on purpose."""


class Refusal(Exception):  # noqa: N818
    """An answer that says no: status, and what the hub's clients tell errors apart by."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.headers: dict[str, str] = {}


@dataclass
class Request:
    """One request. It is also the line of the hub's log: `status` and `bytes` fill as it is answered."""

    method: str
    port: str  # "hub" or "content"
    target: str
    headers: Any
    range: str | None = None
    status: int | None = None
    bytes: int = 0  # of the body, sent
    received: int = 0  # of the body, read
    faults: list[str] = field(default_factory=list)
    stream: Callable[[], Iterator[memoryview]] = field(default=lambda: iter(()), repr=False)
    read_limit: int | None = field(default=None, repr=False)
    done: threading.Event = field(default_factory=threading.Event, repr=False)
    _pieces: Iterator[memoryview] | None = field(default=None, repr=False)

    @property
    def raw_path(self) -> str:
        """Quoted, so that a slash inside a revision is no slash."""
        return urlsplit(self.target).path

    @property
    def path(self) -> str:
        return unquote(self.raw_path)

    @property
    def query(self) -> dict[str, str]:
        found = parse_qs(urlsplit(self.target).query, keep_blank_values=True)
        return {key: values[-1] for key, values in found.items()}

    def pieces(self) -> Iterator[memoryview]:
        """The body as it comes, at most 1 MB at a time; a piece is valid until the next one."""
        if self._pieces is None:
            self._pieces = self.stream()
        for piece in self._pieces:
            if self.read_limit is not None and self.received + len(piece) >= self.read_limit:
                self.received = self.read_limit
                raise Cut
            self.received += len(piece)
            yield piece

    def body(self) -> bytes:
        return b"".join(bytes(piece) for piece in self.pieces())

    def json(self) -> Any:
        try:
            return json.loads(self.body())
        except ValueError:
            raise Refusal(400, "the body is not JSON") from None


@dataclass(frozen=True)
class Slice:
    """Bytes of a file on disk, sent without being read into memory."""

    path: Path
    start: int
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> Slice:
        start, stop, _ = part.indices(self.size)
        return Slice(self.path, self.start + start, max(0, stop - start))

    def __bytes__(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read(self.size)


@dataclass
class Reply:
    """An answer; the fields at the end are for faults."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: list[Slice | bytes] = field(default_factory=list)
    chunked: bool = False
    cut_after: int | None = None  # bytes of body; -1: nothing at all is answered
    reset: bool = False  # the connection is not closed but reset
    rate: float | None = None  # bytes a second
    stall: tuple[int, float] | None = None  # after so many bytes, for so many seconds

    def __len__(self) -> int:
        return sum(map(len, self.body))


def as_json(content: Any, status: int = 200, **headers: str) -> Reply:
    body = json.dumps(content).encode()
    return Reply(status, {"Content-Type": "application/json; charset=utf-8"} | headers, [body])


def refused(refusal: Refusal) -> Reply:
    reply = as_json({"error": refusal.message}, refusal.status)
    reply.headers |= {"X-Error-Message": refusal.message} | refusal.headers
    if refusal.code:
        reply.headers["X-Error-Code"] = refusal.code
    return reply


def part_of(parts: list[Slice | bytes], start: int, stop: int) -> list[Slice | bytes]:
    """Bytes `start` to `stop` of a body."""
    out, at = [], 0
    for part in parts:
        piece = part[max(0, start - at) : max(0, stop - at)]
        if len(piece):
            out.append(piece)
        at += len(part)
    return out


def ranged(request: Request, whole: Slice, headers: dict[str, str]) -> Reply:
    """A file, or the one range of it that was asked for."""
    headers = {"Accept-Ranges": "bytes"} | headers
    unit, _, text = (request.range or "").partition("=")
    first, dash, last = text.strip().partition("-")
    if unit != "bytes" or not dash or "," in text or not (first + last).isdigit():
        return Reply(200, headers, [whole])
    size = len(whole)
    if first:
        start, stop = int(first), min(int(last) + 1 if last else size, size)
    else:
        start, stop = max(0, size - int(last)), size
    if start >= stop:
        return Reply(416, headers | {"Content-Range": f"bytes */{size}"})
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    return Reply(206, headers, [whole[start:stop]])
