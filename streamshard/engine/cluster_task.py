"""What a worker of a cluster is given, and does: one shard of an output, written into the shared folder.

A task is a plan with a single shard, sent as bytes: paths are absolute in it, since workers run in other
folders, and what files were like is told without the number of their disk, which every machine gives
anew. Files elsewhere are sent as what they are, and every worker reads, and sends, with its own token.
What comes back is what was noted of the shard, never data. The same task may be to read the shard again
that another worker has written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import pickle
import platform
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from streamshard.checkpoint.digests import new_digest
from streamshard.checkpoint.shards import Shard
from streamshard.disk.far import Far, far_at, forget, known_as, place
from streamshard.disk.files import read_bytes
from streamshard.disk.folders import exists, resolved
from streamshard.disk.inputs import Stamp, changed, named, watching
from streamshard.disk.system import system
from streamshard.engine.beside_output import places_beside
from streamshard.engine.fetching import read_by
from streamshard.engine.job import Plan
from streamshard.engine.parts_files import read_plan
from streamshard.engine.parts_folder import PartsFolder, shared_parts
from streamshard.engine.resume import check_of_others
from streamshard.engine.writer import write_shards
from streamshard.errors import (
    ClusterError,
    OutputError,
    ReadError,
    StreamshardError,
    WriteError,
    printable,
)
from streamshard.limits import processors
from streamshard.tensors.lazy import Stored
from streamshard.version import __version__

__all__ = [
    "Environment",
    "call_bytes",
    "check",
    "check_shard",
    "described",
    "environment",
    "inputs_bytes",
    "task_bytes",
    "write",
]


Environment = dict[str, str]
TOLD_EVERY_SECONDS = 1.0


def environment() -> Environment:
    """What the bytes that this process writes depend on, and what it needs to understand a task."""
    return {
        "streamshard": f"{__version__} ({_code()})",
        "Python": ".".join(platform.python_version_tuple()[:2]),
        "byte order": sys.byteorder,
    }


def _code() -> str:
    """A digest of all modules of this package."""
    digest, package = new_digest(), Path(__file__).resolve().parents[1]
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package).as_posix()}\n".encode())
        digest.update(read_bytes(file, 1 << 24))
    return digest.hexdigest()[:8]


def described(found: Environment, expected: Environment) -> str:
    """What is not the same, in words; empty if nothing is."""
    other = [
        f"{what} {found.get(what, 'unknown')} and not {value}"
        for what, value in expected.items()
        if found.get(what) != value
    ]
    return ", ".join(other)


def task_bytes(made: Plan, shard: Shard, digest: str) -> bytes:
    """The task to write one shard of a plan whose identity has this digest."""
    known = made.compared.reference
    compared = dataclasses.replace(
        made.compared,
        names=(),
        reference={name: known[name] for name in shard.tensors if name in known},
        skipped=(),
    )
    files, far = _read_by(made, [shard])
    own = dataclasses.replace(
        made,
        output=resolved(made.output),
        shards=(shard,),
        files={},
        compared=compared,
        facts={},
        inputs={_local(path): made.inputs[path] for path in files if path in made.inputs},
    )
    buffer, around = io.BytesIO(), f"{os.sep}streamshard-{uuid.uuid4().hex}"
    keys = {path: f"{around}{path}" for path in far}
    _Pickler(buffer, keys).dump((own, digest, {keys[path]: file for path, file in far.items()}))
    return buffer.getvalue()


def inputs_bytes(made: Plan, shards: Iterable[Shard], digest: str) -> bytes:
    """What `check` needs: where the output is built and goes, and what every input was like."""
    files, far = _read_by(made, shards)
    stamps = {_local(path): made.inputs[path] for path in files if path in made.inputs}
    outlet = made.outlet
    to = None if outlet is None else (outlet, outlet.key)
    return pickle.dumps((resolved(made.output), digest, stamps, [*far.values()], to))


def _read_by(made: Plan, shards: Iterable[Shard]) -> tuple[list[str], dict[str, Far]]:
    """The paths of the files that are read, and the files elsewhere that others stand for."""
    shards = list(shards)
    files = sorted({*read_by(shards, made.compared.references(shards), ())})
    far = {path: file for path in files if (file := far_at(path)) is not None}
    return [path for path in files if path not in far], far


def _local(path: str) -> str:
    """A path as every machine has it."""
    return str(Path(path).absolute())


class _Pickler(pickle.Pickler):
    """Has every path absolute, and each once; of files elsewhere those by which the task knows them."""

    def __init__(self, file: io.BytesIO, keys: Mapping[str, str]) -> None:
        super().__init__(file, protocol=5)
        self._paths = dict(keys)

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not Stored:
            return NotImplemented
        if value.path not in self._paths:
            self._paths[value.path] = _local(value.path)
        path = self._paths[value.path]
        return Stored, (path, value.offset, value.shape, value.dtype, value.file_nbytes)


def check(inputs: bytes, expected: Environment) -> str:
    """Why this process cannot do the tasks of an output, in words; empty if it can."""
    other = described(environment(), expected)
    if other:
        return f"it has {other}"
    target, digest, stamps, far, to = pickle.loads(inputs)  # noqa: S301 - from the scheduler, which runs code anyway
    folder = places_beside(target)["parts"]
    try:
        there = read_plan(folder) if exists(folder) else None
        if there is None or there.digest != digest:
            return (
                f"it does not see {printable(str(folder))}, which must be on a disk that all share"
            )
        if not system.may_change(folder):
            return f"it may not write to {printable(str(folder))}"
        _as_here(stamps)
    except StreamshardError as error:
        return str(error)
    found = (file.unreachable(ask=file is far[0]) for file in far)
    return next((text for text in found if text), "" if to is None else to[0].unreachable(to[1]))


def write(task: bytes, expected: Environment, topic: str) -> dict[str, Any]:
    """Do a task on a worker; returns the record of the shard, or the error that nobody else would avoid.

    What the system did not read or write is raised, so that it is tried again.
    """
    try:
        return _written(task, expected, topic)
    except (ReadError, WriteError):
        raise
    except StreamshardError as error:
        return {"error": error}


def check_shard(task: bytes, expected: Environment, topic: str) -> None:
    """Read the shard of a task again, which another worker has written, and note it if it is right."""
    with _joined(task, expected, topic) as (own, parts, teller):
        check_of_others(own.shards, parts, workers=own.workers, progress=teller)


class _Call:
    def __init__(self, what: Callable[..., object], *arguments: Any) -> None:
        self.what, self.arguments = what, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.what, self.arguments


def call_bytes(
    what: Callable[..., object], task: bytes, expected: Environment, topic: str
) -> bytes:
    """A call of `write` or `check_shard`: who loads this pickle does it.

    A scheduler reads what it is to have done, and need not have this package to read `pickle.loads`.
    """
    return pickle.dumps(_Call(what, task, expected, topic))


def _written(task: bytes, expected: Environment, topic: str) -> dict[str, Any]:
    with _joined(task, expected, topic) as (own, parts, teller):
        (shard,) = own.shards
        if shard.name not in parts.look():
            write_shards(own, parts, progress=teller)
        return {**parts.finished[shard.name].record(), "worker": teller.address}


@contextlib.contextmanager
def _joined(
    task: bytes, expected: Environment, topic: str
) -> Iterator[tuple[Plan, PartsFolder, _Teller]]:
    """What a task is of, as it is here; the folder that it is in; and who is told how far it is."""
    other = described(environment(), expected)
    if other:
        raise ClusterError(
            f"worker {_Teller(topic, '').address}: it has {other}. Start it in the same environment as "
            "the command."
        )
    made, digest, far = pickle.loads(task)  # noqa: S301 - as above
    (shard,), target = made.shards, made.output
    with _placed(far), watching() as inputs:
        inputs.leave_out(target, *places_beside(target).values())
        made = dataclasses.replace(made, inputs=_as_here(made.inputs))
        inputs.expect(made.inputs)
        folder = places_beside(target)["parts"]
        there = read_plan(folder) if exists(folder) else None
        if there is None or there.digest != digest:
            raise OutputError.at(
                folder, "is no longer there: the output was completed or discarded."
            )
        with shared_parts(target, there, overwrite=False, anew=False) as parts:
            teller = _Teller(topic, shard.name)
            threads = max(min(made.workers, processors() // teller.tasks), 1)
            yield dataclasses.replace(made, workers=threads), parts, teller


@contextlib.contextmanager
def _placed(far: Mapping[str, Far]) -> Iterator[None]:
    """Have the keys of files elsewhere stand for these."""
    files = {Path(key): file for key, file in far.items()}
    place(files, {path: file.name for path, file in files.items()})
    try:
        yield
    except StreamshardError as error:
        error.args = (known_as(str(error)), *error.args[1:])
        raise
    finally:
        forget(files, files)


def _as_here(stamps: Mapping[str, Stamp]) -> dict[str, Stamp]:
    """What files are like here; `ChangedError` if that is not as it was, but for the disk's number."""
    found = {}
    for path, expected in stamps.items():
        now = named(path)
        if now is None or dataclasses.replace(now, device=expected.device) != expected:
            raise changed(path, expected, now)
        found[path] = now
    return found


class _Teller:
    """Tells the coordinator how far a task is, and ends it when it was cancelled."""

    def __init__(self, topic: str, shard: str) -> None:
        from distributed.worker import get_worker, thread_state

        self._worker, self._key = get_worker(), getattr(thread_state, "key", None)
        self._topic, self._shard = topic, shard
        self._done, self._last = 0, 0.0
        self.address = str(self._worker.address)
        self.tasks = max(self._worker.state.nthreads, 1)

    def __call__(self, nbytes: int, name: str) -> None:
        self._done += nbytes
        now = time.monotonic()
        if now - self._last < TOLD_EVERY_SECONDS:
            return
        self._last = now
        task = self._worker.state.tasks.get(self._key)
        if task is None or task.state not in _GOING:
            raise ClusterError(f"{printable(self._shard)}: was cancelled.")
        self._worker.log_event(
            self._topic, {"shard": self._shard, "done": self._done, "tensor": printable(name)}
        )


_GOING = ("executing", "long-running")
