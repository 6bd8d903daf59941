"""`verify`: reads a checkpoint again and compares it with its index and with what was recorded."""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from streamshard.arithmetic import count_not_finite
from streamshard.checkpoint import open_checkpoint, read_json_object
from streamshard.digests import (
    ALGORITHM,
    DIGEST_NBYTES,
    blocks_of,
    hash_file,
    new_digest,
    new_sha256,
    shard_digest,
)
from streamshard.errors import (
    InputError,
    ReadError,
    UsageError,
    VerificationError,
    listed,
    printable,
)
from streamshard.files import InputFile, reading
from streamshard.format import read_header
from streamshard.inputs import watched
from streamshard.limits import told
from streamshard.paths import PathLike, input_path
from streamshard.report import REPORT_NAME, Report, finished, new_report
from streamshard.resources import workers_or_default
from streamshard.tensors import Stored, Workspace
from streamshard.threads import Stop, share

__all__ = ["verify"]


@told
@watched
def verify(
    path: PathLike,
    *,
    sample: str | int | None = None,
    workers: int | None = None,
    progress: Callable[[int, str], None] | None = None,
    on_total: Callable[[int], None] | None = None,
) -> Report:
    """Read a checkpoint or adapter again, and say whether it is what was written.

    Checks headers, the index against the files both ways, and that no value is infinite or NaN; where
    `streamshard.json` has digests also every file and tensor against these. `sample` reads
    only so many tensors ("10%" or a number), chosen at random, and no SHA-256.

    Raises `VerificationError`, whose `report` lists what differs under `problems`, `missing`,
    `unexpected`, `different` and `nonfinite`; `InputError` if there is no checkpoint at all.
    """
    started = time.perf_counter()
    given = input_path(path, "what to verify")
    with reading(given):
        found = _open(given)
    names = _sampled(list(found.tensors), sample)
    if on_total is not None:
        on_total(sum(found.tensors[name].nbytes for name in names))
    check = _Check(found, progress)
    check.names()
    tasks = check.tasks(names, whole=sample is None)
    share(tasks, lambda task, work: task(work), workers_or_default(workers), check.stop)
    if sample is None:
        check.shards()
    report = {
        **new_report("verify", found.tensors),
        "path": str(path),
        "shards": len(found.headers),
        "recorded": found.algorithm is not None,
        "checked": {
            "tensors": len(names),
            "bytes": sum(found.tensors[name].nbytes for name in names),
            "files": check.files,
        },
        "missing": check.missing,
        "unexpected": check.unexpected,
        "different": sorted(check.different),
        "nonfinite": dict(sorted(check.nonfinite.items())),
        "problems": [*found.problems, *sorted(check.problems)],
        "warnings": found.warnings,
    }
    report = finished(report, started)
    if report["problems"]:
        count = len(report["problems"])
        raise VerificationError(
            f"{printable(str(path))}: {count} {'problem' if count == 1 else 'problems'} found: "
            f"{report['problems'][0]}" + (" (and more)" if count > 1 else ""),
            report,
        )
    return report


@dataclass
class _Found:
    """A checkpoint as far as it can be opened, and what is recorded of it.

    `headers` maps the name of each weight file to its tensors, in the order of their bytes.
    """

    folder: Path
    headers: dict[str, dict[str, Stored]] = field(default_factory=dict)
    tensors: dict[str, Stored] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    algorithm: str | None = None
    files: Mapping[str, Any] = field(default_factory=dict)
    digests: Mapping[str, Any] = field(default_factory=dict)


def _open(path: Path) -> _Found:
    found = _Found(path if path.is_dir() else path.parent)
    adapter = path / "adapter_model.safetensors"
    if adapter.is_file() and not (path / "config.json").is_file():
        names = [adapter.name]
    else:
        try:
            names = sorted(open_checkpoint(path).metadata)
        except InputError as error:
            weights = [path] if path.is_file() else path.iterdir()
            names = sorted(file.name for file in weights if file.suffix == ".safetensors")
            if not names:
                raise
            found.problems.append(str(error))
    for name in names:
        try:
            tensors = read_header(found.folder / name).tensors
        except (InputError, ReadError) as error:
            if str(error) not in found.problems:
                found.problems.append(str(error))
        else:
            found.headers[name] = tensors
            found.tensors |= tensors
    if path.is_dir():
        _read_records(found)
    else:
        found.warnings.append("no digests are recorded for a bare file")
    return found


def _read_records(found: _Found) -> None:
    file = found.folder / REPORT_NAME
    if not file.is_file():
        found.warnings.append(f"no digests are recorded: there is no {REPORT_NAME}")
        return
    try:
        records = read_json_object(file).get("digests")
    except (InputError, ReadError) as error:
        found.problems.append(str(error))
        return
    if records is None:
        found.warnings.append(f"no digests are recorded: {REPORT_NAME} has none")
        return
    tables = [
        records.get(key) if isinstance(records, dict) else None for key in ("files", "tensors")
    ]
    if (
        not all(isinstance(table, dict) for table in tables)
        or records.get("algorithm") != ALGORITHM
    ):
        found.problems.append(
            f"{printable(str(file))}: has digests that are not of {ALGORITHM}; they cannot be compared"
        )
        return
    found.algorithm = ALGORITHM
    found.files, found.digests = records["files"], records["tensors"]


class _Check:
    """The comparison of a checkpoint with its records, by several threads."""

    def __init__(self, found: _Found, progress: Callable[[int, str], None] | None) -> None:
        self.found = found
        self.progress = progress
        self.stop = Stop()
        self.lock = threading.Lock()
        self.files = 0
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self.different: list[str] = []
        self.unread: set[str] = set()
        self.nonfinite: dict[str, int] = {}
        self.problems: list[str] = []
        self.seen = {
            name: bytearray(DIGEST_NBYTES * len(tensors)) for name, tensors in found.headers.items()
        }

    def add(self, where: str, problem: str) -> None:
        """Take note of a problem."""
        with self.lock:
            self.problems.append(f"{printable(where)}: {problem}")

    def names(self) -> None:
        """Compare the names of tensors and files with the records, without reading them."""
        if self.found.algorithm is None:
            return
        there, recorded = set(self.found.tensors), set(self.found.digests)
        self.missing, self.unexpected = sorted(recorded - there), sorted(there - recorded)
        if self.missing:
            self.add(REPORT_NAME, f"records {listed(self.missing)}, which no file holds")
        if self.unexpected:
            self.add(REPORT_NAME, f"does not record {listed(self.unexpected)}")
        weights = {name for name in self.found.files if name.endswith(".safetensors")}
        strange = sorted(set(self.found.headers) - weights)
        if strange:
            self.add(REPORT_NAME, f"does not record the files {listed(strange)}")

    def tasks(self, names: list[str], *, whole: bool) -> Iterator[Callable[[Workspace], None]]:
        """All that is to be read: tensors, then the files beside them, and files for SHA-256."""
        wanted = set(names)
        for file, tensors in self.found.headers.items():
            for place, (name, tensor) in enumerate(tensors.items()):
                if name in wanted:
                    yield partial(self.tensor, file, place, name, tensor)
        for name, record in self.found.files.items():
            yield partial(self.file, name, record, whole=whole)

    def tensor(self, file: str, place: int, name: str, tensor: Stored, work: Workspace) -> None:
        """Compare a tensor with its digest, and count what is not finite."""
        digest, count = new_digest(), 0
        try:
            for block in blocks_of(tensor, work):
                self.stop.check()
                digest.update(block.data)
                count += count_not_finite(block, tensor.dtype)
        except ReadError as error:
            self.add(name, str(error))
            with self.lock:
                self.unread.add(name)
            return
        expected = self.found.digests.get(name)
        differs = expected is not None and expected != digest.hexdigest()
        with self.lock:
            first = DIGEST_NBYTES * place
            self.seen[file][first : first + DIGEST_NBYTES] = digest.digest()
            if differs:
                self.different.append(name)
                self.problems.append(
                    f"tensor '{printable(name)}': its bytes in {printable(file)} have changed"
                )
            if count:
                self.nonfinite[name] = count
                self.problems.append(
                    f"tensor '{printable(name)}': {count:,} values are infinite or NaN"
                )
            if self.progress is not None:
                self.progress(tensor.nbytes, name)

    def file(self, name: str, record: object, work: Workspace, *, whole: bool) -> None:
        """Compare a file with its record; of a weight file size and SHA-256 only."""
        if not isinstance(record, dict) or not _is_inside(name):
            self.add(REPORT_NAME, f"has a broken record of the file '{printable(name)}'")
            return
        path = self.found.folder / name
        digest = None if name in self.seen else new_digest()
        sha256 = new_sha256() if whole and record.get("sha256") else None
        hashes = [one for one in (digest, sha256) if one is not None]
        try:
            with InputFile(path) as file:
                nbytes = file.nbytes
            if nbytes != record.get("bytes"):
                self.add(
                    name, f"has {nbytes:,} bytes, not the {record.get('bytes')} that are recorded"
                )
                return
            if hashes:
                hash_file(path, *hashes, going=self.stop.going)
        except (InputError, ReadError) as error:
            self.add(name, str(error))
            return
        if digest is not None and digest.hexdigest() != record.get("digest"):
            self.add(name, "its content has changed")
        elif sha256 is not None and sha256.hexdigest() != record["sha256"]:
            self.add(name, "its SHA-256 is another one")
        with self.lock:
            self.files += 1

    def shards(self) -> None:
        """Compare what was read of whole weight files with their digests: headers count there too."""
        for name, digests in self.seen.items():
            record = self.found.files.get(name)
            if not isinstance(record, dict):
                continue
            with InputFile(self.found.folder / name) as file:
                header = file.read(0, 8 + int.from_bytes(file.read(0, 8), "little"))
            tensors = set(self.found.headers[name])
            changed = bool(tensors & {*self.different, *self.unexpected, *self.unread})
            if not changed and shard_digest(header, bytes(digests)) != record.get("digest"):
                self.add(name, "its header has changed")


def _is_inside(name: str) -> bool:
    """Whether a recorded name is one of the folder; records may come from anywhere."""
    path = PurePosixPath(name)
    return (
        bool(name)
        and not path.is_absolute()
        and ".." not in path.parts
        and not re.search(r"[\\:\x00]", name)
    )


def _sampled(names: list[str], sample: str | int | None) -> list[str]:
    """So many of the names, at least one; raises `UsageError` for what is no such number."""
    if sample is None:
        return names
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", str(sample).strip())
    count = 0.0
    if match is not None:
        count = float(match[1]) * (len(names) / 100 if match[2] else 1)
    if match is None or not count or (match[2] and float(match[1]) > 100):
        raise UsageError(f"--sample is {sample!r}; write it like 10% or 200 (tensors).")
    # Another one each time: what was not read today may be tomorrow.
    return random.sample(names, min(max(round(count), 1), len(names)))
