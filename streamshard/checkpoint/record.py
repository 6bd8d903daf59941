"""The record in an output folder, `streamshard.json`: the report with digests, the last of itself.

Its last entry is the digest of every byte that stands before that digest's value, and what
follows the value is fixed: a record in which any byte was changed says so itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from streamshard.checkpoint.digests import DIGEST_NBYTES, new_digest
from streamshard.checkpoint.json_files import json_object
from streamshard.disk.files import read_bytes
from streamshard.errors import InputError

__all__ = ["MAX_RECORD_BYTES", "read_record", "sealed"]


MAX_RECORD_BYTES = 50_000_000  # a few lines for each of 40,000 tensors

_END = b"\n}\n"
_KEY = b',\n  "record_digest": "'
_TAIL = b'"' + _END
_DIGEST_CHARACTERS = 2 * DIGEST_NBYTES


def sealed(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """The pieces of a JSON object as `json_pieces` writes it, with the digest of itself at its end."""
    digest, held = new_digest(), b""
    for piece in pieces:
        held += piece
        ready, held = held[: -len(_END)], held[-len(_END) :]
        digest.update(ready)
        yield ready
    if held != _END:
        raise ValueError("no JSON object with entries, or not as json_pieces writes it")
    digest.update(_KEY)
    yield _KEY + digest.hexdigest().encode() + _TAIL


def read_record(file: Path) -> dict[str, Any]:
    """The record in a file; raises `InputError` if it is not as it was written, byte for byte."""
    content = read_bytes(file, MAX_RECORD_BYTES)
    start = len(content) - len(_TAIL) - _DIGEST_CHARACTERS
    digest = new_digest()
    digest.update(memoryview(content)[: max(start, 0)])
    whole = content[max(start - len(_KEY), 0) :]
    if whole != _KEY + digest.hexdigest().encode() + _TAIL:
        raise InputError.at(
            file,
            "is not as streamshard wrote it: it was changed, cut off, or "
            "comes from something else.",
        )
    return json_object(content, file, MAX_RECORD_BYTES)
