"""What `streamshard.json` has beyond the report: when, with what and of which inputs an output was made.

The schema of it all is `record.schema.json` beside this file; every record names it.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from streamshard.checkpoint.hub_names import origin_of
from streamshard.engine.fingerprint import Identity
from streamshard.errors import StreamshardError
from streamshard.tensors.kernel import chosen
from streamshard.version import __version__

__all__ = ["SCHEMA", "as_kept", "as_reported"]

SCHEMA = "urn:streamshard:record:1"
"""What the schema is called, in itself and in every record. It grows; a key that is there stays."""

_OF_A_RUN = ("dry_run", "part", "plan", "pushed", "scheduler")
_FAR = re.compile(r"([\w.-]+/[\w.-]+)@([0-9a-f]{40})/(.+)", re.ASCII)


def as_kept(report: Mapping[str, Any], identity: Identity) -> dict[str, Any]:
    """The report as it is kept, without what only tells of the run, and with where all is from."""
    return {
        "$schema": SCHEMA,
        **{key: value for key, value in report.items() if key not in _OF_A_RUN},
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {
            "streamshard": __version__,
            "python": ".".join(map(str, sys.version_info[:3])),
            "numpy": np.__version__,
        },
        "kernel": _kernel(),
        "inputs": [*_inputs(identity)],
    }


def as_reported(record: Mapping[str, Any]) -> dict[str, Any]:
    """The report of which a record was made; what told of that run is as of one that is done."""
    only = {"$schema", "date", "versions", "kernel", "inputs"}
    only |= {"l2_per_tensor", "digests", "record_digest"}
    report = {key: value for key, value in record.items() if key not in only}
    return {**report, **dict.fromkeys(_OF_A_RUN), "dry_run": False}


def _kernel() -> str | None:
    try:
        return chosen()
    except StreamshardError:  # one is asked for that is not here, and none was needed
        return None


def _inputs(identity: Identity) -> Iterator[dict[str, Any]]:
    """The files that tensors were read from, each with the digest by which another run would know it."""
    for path, digest, changed in identity["inputs"]:
        far, kind = _FAR.fullmatch(path), "samples" if changed else "content"
        if far is not None:
            repository, commit, name = far.groups()
        else:
            origin, name = origin_of(Path(path)), path
            repository, commit = (None, None) if origin is None else origin
        yield {
            "path": name,
            "repository": repository,
            "commit": commit,
            "digest": digest if ":" in digest else f"xxh3-128:{digest}",
            "digest_of": kind,
        }
