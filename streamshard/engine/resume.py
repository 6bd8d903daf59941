"""Continuing an interrupted run: what it has finished is read again before it is believed.

Parts of an output read again what others have written, so that who completes it need not read all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from streamshard.checkpoint.digests import (
    DIGEST_NBYTES,
    hash_file,
    new_sha256,
    shard_digest,
    tensor_digest,
)
from streamshard.checkpoint.header import total_nbytes
from streamshard.checkpoint.shards import Shard
from streamshard.disk.files import open_source
from streamshard.engine.journal import FinishedShard
from streamshard.engine.marks import mark_of
from streamshard.engine.parts_folder import PartsFolder
from streamshard.engine.staging import Staging
from streamshard.engine.workers import OnStep, Progress, Stop, share
from streamshard.errors import InputError, OutputError, ReadError, WriteError, listed
from streamshard.tensors.lazy import Stored
from streamshard.tensors.workspace import Workspace

__all__ = ["check_finished", "check_of_others", "has_header"]

_log = logging.getLogger(__name__)


def check_finished(
    shards: Sequence[Shard],
    staging: Staging,
    *,
    workers: int,
    progress: Progress | None = None,
    on_step: OnStep | None = None,
    sha256: bool = False,
) -> int:
    """Compare the finished shards with the journal, and have those that differ written anew.

    Those that others have read again are not compared, as long as their files are what they were then.
    With `sha256` those that have none get it. Returns how many are right.
    """
    planned = {shard.name: shard for shard in shards}
    noted = [
        (planned[name], staging.finished[name]) for name in planned if name in staging.finished
    ]
    if not noted:
        return 0
    _log.info("continuing: %d of %d files are done", len(noted), len(planned))
    unread = [
        (shard, finished)
        for shard, finished in noted
        if (mark := staging.checked.get(shard.name)) is None
        or mark != mark_of(staging.folder / shard.name)
    ]
    _begin((shard for shard, _ in unread), on_step)
    wrong = _unlike(unread, staging.folder, workers, progress)
    for name in wrong:
        staging.forget(name)
    if sha256:
        right = [finished for shard, finished in noted if shard.name not in wrong]
        _hash(
            [finished for finished in right if finished.sha256 is None], staging, progress, on_step
        )
    if wrong:
        _log.warning("not as written, and therefore written anew: %s", listed(sorted(wrong)))
    return len(noted) - len(wrong)


def check_of_others(
    shards: Iterable[Shard],
    parts: PartsFolder,
    *,
    workers: int,
    progress: Progress | None = None,
    on_step: OnStep | None = None,
) -> None:
    """Read shards that other parts have finished, and note which are right, unless that is noted.

    Whoever completes the output reads the others, and finds what is wrong with them.
    """
    unread = [
        (shard, finished, mark)
        for shard in shards
        if (finished := parts.finished.get(shard.name)) is not None
        and (mark := mark_of(parts.folder / shard.name)) is not None
        and mark != parts.checked(finished)
    ]
    _begin((shard for shard, *_ in unread), on_step)
    for shard, finished, mark in unread:
        right = not _unlike([(shard, finished)], parts.folder, workers, progress)
        if right and mark == mark_of(parts.folder / shard.name):
            with contextlib.suppress(OutputError, WriteError):  # it may be completed by now
                parts.add_checked(finished, mark)


def _begin(unread: Iterable[Shard], on_step: OnStep | None) -> None:
    """Say how much is to be read again, if anything is."""
    nbytes = [total_nbytes(shard.tensors) for shard in unread]
    if on_step is not None and nbytes:
        on_step("checking", sum(nbytes), 0)


def _unlike(
    noted: Sequence[tuple[Shard, FinishedShard]],
    folder: Path,
    workers: int,
    progress: Progress | None,
) -> set[str]:
    """Which shards in a folder are not as they were planned and noted."""
    stop, lock = Stop(), threading.Lock()
    wrong = {shard.name for shard, finished in noted if not has_header(shard, finished, folder)}

    def tensors() -> Iterator[tuple[str, bytes, str, Stored]]:
        for shard, finished in noted:
            for place, (name, tensor) in enumerate(shard.stored(folder / shard.name)):
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
    return wrong


def _hash(
    shards: Sequence[FinishedShard],
    staging: Staging,
    progress: Progress | None,
    on_step: OnStep | None,
) -> None:
    """Note the SHA-256 of finished shards that have none."""
    if shards and on_step is not None:
        on_step("hashing", sum(shard.nbytes for shard in shards), 0)
    for shard in shards:

        def told(nbytes: int, name: str = shard.name) -> None:
            if progress is not None and on_step is not None:
                progress(nbytes, name)

        digest = new_sha256()
        hash_file(staging.folder / shard.name, digest, told=told)
        staging.add(dataclasses.replace(shard, sha256=digest.hexdigest()))


def has_header(shard: Shard, finished: FinishedShard, folder: Path) -> bool:
    """Whether a shard in a folder begins, and is as long, as it is planned and was noted."""
    header, _ = shard.header()
    if finished.digest != shard_digest(header, finished.digests):
        return False
    if (finished.nbytes, len(finished.squared)) != (shard.nbytes, len(shard.tensors)):
        return False
    try:
        with open_source(folder / shard.name) as file:
            return file.nbytes == shard.nbytes and file.read(0, len(header)) == header
    except (InputError, ReadError):
        return False
