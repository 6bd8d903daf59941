"""Commands in processes of their own that have a local hub, and what is compared of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pushes
from fake_hub import Hub
from hangs import HANGS
from pairs import Outcome

# What differs from run to run, or says where inputs are from.
OWN = {
    "fingerprint",
    "date",
    "seconds",
    "peak_rss_bytes",
    "output",
    "sources",
    "record_digest",
    "base",
    "source",
    "reference",
}


def streamshard(hub: Hub, home: Path, *arguments: str | Path, **env: str) -> Outcome:
    """A command with the hub's environment and a cache in `home`."""
    done = subprocess.run(
        [sys.executable, "-m", "streamshard", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | hub.env(home) | env,
        check=False,
        timeout=HANGS,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def report(outcome: Outcome) -> dict[str, Any]:
    """What `--json` printed of a command that went well."""
    assert outcome.code == 0, outcome.err or outcome.out
    assert "/streamshard-" not in outcome.out, "a path of the command's own"
    found = json.loads(outcome.out)
    assert isinstance(found, dict)
    return found


CARD = "README.md"


def contents(folder: Path) -> dict[str, bytes]:
    """As those of `pushes`; of the model card only that there is one: it says where the base is from."""
    found = pushes.contents(folder)
    return {name: b"" if Path(name).name == CARD else data for name, data in found.items()}


def same(one: Any, other: Any) -> bool:
    """Whether two reports say the same but for what is each one's own."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = (one.keys() | other.keys()) - OWN
        return all(key in one and key in other and same(one[key], other[key]) for key in keys)
    return bool(one == other)


def of_content(hub: Hub) -> Iterator[Any]:
    """The requests for contents of files, small ones too."""
    for request in hub.requests:
        if request.method == "GET" and (request.port == "content" or "/resolve/" in request.path):
            yield request


def forgotten(home: Path) -> list[Path]:
    """What commands have left among temporary files."""
    return sorted(home.glob("streamshard-*"))
