"""Continuing an interrupted run: what it has finished is read again before it is believed."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Sequence

from streamshard.checkpoint.digests import (
    DIGEST_NBYTES,
    hash_file,
    new_sha256,
    shard_digest,
    tensor_digest,
)
from streamshard.checkpoint.shards import Shard
from streamshard.disk.files import open_source
from streamshard.engine.journal import FinishedShard
from streamshard.engine.staging import Staging
from streamshard.engine.workers import Progress, Stop, share
from streamshard.errors import InputError, ReadError
from streamshard.tensors.lazy import Stored
from streamshard.tensors.workspace import Workspace

__all__ = ["check_finished"]


def check_finished(
    shards: Sequence[Shard],
    staging: Staging,
    *,
    workers: int,
    progress: Progress | None = None,
    sha256: bool = False,
) -> int:
    """Compare the finished shards with the journal, and have those that differ written anew.

    With `sha256` those that have none get it. Returns how many are right.
    """
    planned = {shard.name: shard for shard in shards}
    noted = [
        (planned[name], staging.finished[name]) for name in planned if name in staging.finished
    ]
    stop, lock = Stop(), threading.Lock()
    wrong = {shard.name for shard, finished in noted if not _has_header(shard, finished, staging)}

    def tensors() -> Iterator[tuple[str, bytes, str, Stored]]:
        for shard, finished in noted:
            for place, (name, tensor) in enumerate(shard.stored(staging.folder / shard.name)):
                if shard.name in wrong:
                    break
                first = DIGEST_NBYTES * place
                yield shard.name, finished.digests[first : first + DIGEST_NBYTES], name, tensor

    def compare(item: tuple[str, bytes, str, Stored], work: Workspace) -> None:
        shard, expected, name, written = item
        stop.check()
        try:
            right = tensor_digest(written, work, check=stop.check) == expected
        except (InputError, ReadError):
            right = False
        with lock:
            if not right:
                wrong.add(shard)
            elif progress is not None:
                progress(written.nbytes, name)

    share(tensors(), compare, workers, stop)
    for shard, finished in noted:
        if shard.name in wrong:
            staging.forget(shard.name)
        elif sha256 and finished.sha256 is None:
            digest = new_sha256()
            hash_file(staging.folder / shard.name, digest)
            staging.add(dataclasses.replace(finished, sha256=digest.hexdigest()))
    return len(noted) - len(wrong)


def _has_header(shard: Shard, finished: FinishedShard, staging: Staging) -> bool:
    header, _ = shard.header()
    if finished.digest != shard_digest(header, finished.digests):
        return False
    if (finished.nbytes, len(finished.squared)) != (shard.nbytes, len(shard.tensors)):
        return False
    try:
        with open_source(staging.folder / shard.name) as file:
            return file.nbytes == shard.nbytes and file.read(0, len(header)) == header
    except (InputError, ReadError):
        return False
