"""Faults that the local hub is told to have: which request, which time, what happens.

Each fault is a small value with `act(state, request, answer)`, where `answer()` is what would be said
without it; they can be stacked.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Protocol

from hub_messages import Cut, Refusal, Reply, Request, part_of, refused
from hub_state import State

Answer = Callable[[], Reply]


class Fault(Protocol):
    def act(self, state: State, request: Request, answer: Answer) -> Reply: ...


@dataclass(frozen=True)
class Drop:
    """The connection ends after so many bytes of the body, though more were promised."""

    after: int = 0
    reset: bool = False

    def act(self, state: State, request: Request, answer: Answer) -> Reply:
        reply = answer()
        reply.cut_after, reply.reset = self.after, self.reset
        return reply


@dataclass(frozen=True)
class NoAnswer:
    """The connection ends without an answer; what was asked for is not done."""

    def act(self, state: State, request: Request, answer: Answer) -> Reply:
        raise Cut


@dataclass(frozen=True)
class LoseAnswer:
    """What was asked for is done, and the answer is lost."""

    def act(self, state: State, request: Request, answer: Answer) -> Reply:
        reply = answer()
        reply.cut_after = -1
        return reply


@dataclass(frozen=True)
class Status:
    """An answer of this status, with these headers, instead of the one asked for."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    code: str | None = None
    message: str = "injected"

    def act(self, state: State, request: Request, answer: Answer) -> Reply:
        reply = refused(Refusal(self.status, self.message, self.code))
        reply.headers |= self.headers
        return reply


@dataclass(frozen=True)
class Whole:
    """200 and all of the file, though a range was asked for."""

    def act(self, state: State, request: Request, answer: Answer) -> Reply:
        asked, request.range = request.range, None
        try:
            return answer()
        finally:
            request.range = asked


@dataclass(frozen=True)
class Headers:
    """Other headers than the right ones; None leaves one out."""

    headers: Mapping[str, str | None]

    def act(self, state: State, request: Request, answer: Answer) -> Reply:
        reply = answer()
        changed = reply.headers | dict(self.headers)
        reply.headers = {name: value for name, value in changed.items() if value is not None}
        return reply


@dataclass(frozen=True)
class WrongRange:
    """A `Content-Range` that is off by so many bytes (the bytes are those asked for)."""

    by: int = 1

    def act(self, state: State, request: Request, answer: Answer) -> Reply:
        reply = answer()
        if said := reply.headers.get("Content-Range"):
            span, _, size = said.removeprefix("bytes ").partition("/")
            first, last = (int(number) + self.by for number in span.split("-"))
            reply.headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        return reply


@dataclass(frozen=True)
class OtherBytes:
    """The bytes of a place further on, under the `Content-Range` that was asked for."""

    by: int = 1

    def act(self, state: State, request: Request, answer: Answer) -> Reply:
        whole, reply = Whole().act(state, request, answer), answer()
        if said := reply.headers.get("Content-Range"):
            start = int(said.removeprefix("bytes ").partition("-")[0])
            body = part_of(whole.body, start + self.by, start + self.by + len(reply))
            reply.body = [*body, bytes(len(reply) - sum(map(len, body)))]
        return reply


@dataclass(frozen=True)
class Short:
    """So many bytes fewer than asked for, in an answer that is whole for HTTP."""

    by: int = 1

    def act(self, state: State, request: Request, answer: Answer) -> Reply:
        reply = answer()
        reply.body = part_of(reply.body, 0, max(0, len(reply) - self.by))
        return reply


@dataclass(frozen=True)
class Long:
    """So many bytes more than asked for."""

    by: int = 1

    def act(self, state: State, request: Request, answer: Answer) -> Reply:
        reply = answer()
        reply.body = [*reply.body, b"\xff" * self.by]
        return reply


@dataclass(frozen=True)
class Flip:
    """One wrong byte in the body, at this place of it."""

    at: int = 0
    mask: int = 1

    def act(self, state: State, request: Request, answer: Answer) -> Reply:
        reply = answer()
        wrong = [
            bytes([bytes(part)[0] ^ self.mask])
            for part in part_of(reply.body, self.at, self.at + 1)
        ]
        rest = part_of(reply.body, self.at + 1, len(reply))
        reply.body = [*part_of(reply.body, 0, self.at), *wrong, *rest]
        return reply


@dataclass(frozen=True)
class Entry:
    """Something wrong about a file in a tree or paths-info: `Entry(name, {"lfs": {"oid": ...}})`."""

    name: str
    changes: dict[str, Any]

    def act(self, state: State, request: Request, answer: Answer) -> Reply:
        reply = answer()
        listed = json.loads(b"".join(map(bytes, reply.body)))
        for entry in listed:
            if entry["path"] == self.name:
                entry |= {k: entry[k] | v if k == "lfs" else v for k, v in self.changes.items()}
        reply.body = [json.dumps(listed).encode()]
        return reply


@dataclass(frozen=True)
class Expire:
    """All links to content given so far have expired."""

    def act(self, state: State, request: Request, answer: Answer) -> Reply:
        state.links.expire()
        return answer()


@dataclass(frozen=True)
class Slow:
    """The body comes at so many bytes a second."""

    rate: float

    def act(self, state: State, request: Request, answer: Answer) -> Reply:
        reply = answer()
        reply.rate = self.rate
        return reply


@dataclass(frozen=True)
class Stall:
    """After so many bytes of the body nothing comes for so long."""

    after: int
    seconds: float

    def act(self, state: State, request: Request, answer: Answer) -> Reply:
        reply = answer()
        reply.stall = self.after, self.seconds
        return reply


@dataclass(frozen=True)
class CutUpload:
    """The connection ends when so many bytes of an upload's body have arrived."""

    after: int = 0

    def act(self, state: State, request: Request, answer: Answer) -> Reply:
        request.read_limit = self.after
        return answer()


@dataclass(frozen=True)
class First:
    """Something else happens first: another commit, a file that changes."""

    does: Callable[[], Any]

    def act(self, state: State, request: Request, answer: Answer) -> Reply:
        self.does()
        return answer()


@dataclass
class Rule:
    fault: Fault
    method: str
    path: str
    port: str | None
    nth: int
    times: int | None
    when: Callable[[Request], bool]
    seen: int = 0

    def fits(self, request: Request) -> bool:
        return (
            self.method in {"*", request.method}
            and self.port in {None, request.port}
            and fnmatchcase(request.path, self.path)
            and self.when(request)
        )

    @property
    def used_up(self) -> bool:
        return self.times is not None and self.seen >= self.nth + self.times - 1


class Faults:
    """The rules that are left, oldest first."""

    def __init__(self) -> None:
        self.rules: list[Rule] = []
        self._lock = threading.Lock()

    def due(self, request: Request) -> list[Fault]:
        """What this request meets; it counts for every rule that it fits."""
        with self._lock:
            found = []
            for rule in [rule for rule in self.rules if rule.fits(request)]:
                rule.seen += 1
                if rule.seen >= rule.nth:
                    found.append(rule.fault)
                    request.faults.append(type(rule.fault).__name__)
            self.rules = [rule for rule in self.rules if not rule.used_up]
            return found
