"""A small merge that is pushed to the local hub, in this process or others, and what is to come of it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fake_hub import Hub
from folders import make
from hangs import until
from hub_client import client
from hub_messages import Cut
from make_checkpoint import write_adapter

import streamshard
from streamshard.checkpoint import hub_sending

REPO = "org/new"
RECORD = "streamshard.json"
# What the hub itself puts into a repository, if the output does not.
OF_HUB = ".gitattributes"


@dataclass
class Shop:
    """A base in several files, an adapter, and what is right: the output of a merge on this machine."""

    root: Path
    right: dict[str, bytes] = field(default_factory=dict)

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def adapter(self) -> Path:
        return self.root / "lora"


def new_shop(root: Path, size: str = "90KB") -> Shop:
    shop = Shop(root)
    make(shop.base, "tiny", "custom", max_shard_size=size)
    write_adapter(shop.adapter, "tiny", layout="custom")
    streamshard.merge_lora(base=shop.base, adapter=shop.adapter, output=root / "local")
    shop.right = contents(root / "local")
    return shop


def contents(folder: Path) -> dict[str, bytes]:
    """All files of an output but its record, which has times in it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (RECORD, OF_HUB)
    }


def pushed(hub: Hub, repo: str = REPO) -> dict[str, bytes]:
    """What the hub has of an output, but for the record."""
    files = hub.files(repo)
    return {n: blob.read_bytes() for n, blob in files.items() if n not in (RECORD, OF_HUB)}


def sent_twice(hub: Hub) -> list[str]:
    """Contents of which all bytes went to the hub more than once, and arrived."""
    done = [r.path.split("/")[2] for r in hub.requests if r.method == "PUT" and r.status == 200]
    return sorted({oid for oid in done if done.count(oid) > 1})


def commits_of(hub: Hub, message: str) -> int:
    commits = hub.commits(REPO) if hub.exists(REPO) else []
    return sum(commit.message == message for commit in commits)


@contextlib.contextmanager
def pushing(
    shop: Shop, hub: Hub, place: Path, monkeypatch: pytest.MonkeyPatch, *, xet: bool = False
) -> Iterator[Callable[..., Any]]:
    """`merge_lora` in this process, in a folder of its own, that pushes to the hub without waiting."""
    place.mkdir(exist_ok=True)
    monkeypatch.chdir(place)
    with client(hub, place.parent / "home", xet=xet) as api:
        monkeypatch.setattr(hub_sending, "pause", lambda seconds, going=bool: _noted(api, seconds))

        def push(**options: Any) -> Any:
            asked = {"base": shop.base, "push_to": REPO, "commit_message": "the output", **options}
            return streamshard.merge_lora(adapter=shop.adapter, **asked)

        push.slept = api.slept  # type: ignore[attr-defined]
        yield push


def _noted(api: Any, seconds: float) -> bool:
    api.slept.append(seconds)
    return True


@dataclass
class Ended:
    """The process that asks is ended; what it asked for is done, or not."""

    process: list[subprocess.Popen[str]]
    done: bool
    by: signal.Signals = signal.SIGKILL

    def act(self, state: Any, request: Any, answer: Callable[[], Any]) -> Any:
        until(lambda: self.process)  # who asks may be faster than who has begun it
        reply = answer() if self.done else None
        self.process[-1].send_signal(self.by)
        if self.by == signal.SIGKILL:
            self.process[-1].wait()
            raise Cut
        return reply or answer()


def command(shop: Shop, *more: str | Path) -> list[str]:
    """The command line that pushes."""
    paths = ["--adapter", shop.adapter, "--base", shop.base, "--push-to", REPO]
    message = ["--commit-message", "the output", "--workers", "2"]
    return [*map(str, [sys.executable, "-m", "streamshard", "merge-lora", *paths, *message, *more])]


def begin(
    shop: Shop, hub: Hub, place: Path, *more: str | Path, xet: bool = False
) -> subprocess.Popen[str]:
    """A process that pushes, in the folder `place`."""
    place.mkdir(exist_ok=True)
    return subprocess.Popen(
        command(shop, *more),
        cwd=place,
        env=os.environ | hub.env(place.parent / "home", xet=xet),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # SIGINT counts, also if these tests run in the background of a shell.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )


def weights_here(place: Path) -> int:
    """How many files of weights are on disk in a folder, finished or not.

    One that gets its name meanwhile is one.
    """
    names = (path.name.partition(".safetensors") for path in place.rglob("*.safetensors*"))
    return len({stem for stem, _, end in names if not end.startswith(".index.")})
