"""What a command wants written, with which options, and what a run would do: values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import field, fields
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, TypedDict

from streamshard.checkpoint.file_names import INDEX_NAME, REPORT_NAME, SINGLE_NAME
from streamshard.checkpoint.header import total_nbytes
from streamshard.checkpoint.shards import Shard
from streamshard.disk.inputs import Stamp
from streamshard.disk.paths import PathLike
from streamshard.engine.fingerprint import Fingerprint
from streamshard.engine.option_values import (
    Part,
    check_memory,
    check_workers,
    dtype_option,
    part_option,
    size_option,
)
from streamshard.engine.outlet import Outlet
from streamshard.errors import UsageError, bytes_text, printable
from streamshard.tensors.lazy import Lazy, Stored
from streamshard.values import frozen

__all__ = ["BaseOptions", "Beside", "CacheOptions", "Compared", "Job", "Made", "Options"]
__all__ += ["OutputOptions", "Plan"]


class Made(Protocol):
    """A file beside the weights that is made at the end, when all that the report says is known.

    A frozen dataclass of texts and numbers: with a plan it is sent, and what is in it counts when a
    run is continued.
    """

    def content(self, report: Mapping[str, Any]) -> bytes:
        """The file of this report, which has neither times nor memory yet."""


Beside: TypeAlias = Path | bytes | Made
"""What lies beside the weights: a file to copy, content, or what makes it of the report."""


@frozen(kw_only=True)
class Compared:
    """What is measured: the L2 distance of every tensor of `names` from that of `reference`.

    Those that have no entry there are computed, and measured from what they are made of.
    `parameters` counts the elements of all of them; `skipped` are those that cannot be compared.
    """

    source: str | None
    """Where the report says that the distances are from."""
    names: tuple[str, ...]
    reference: Mapping[str, Stored]
    parameters: int
    skipped: tuple[str, ...]

    def references(self, shards: Iterable[Shard]) -> Iterator[Stored]:
        """What the tensors of these shards are compared with, as far as it is of other files."""
        if self.reference:
            for shard in shards:
                yield from (
                    self.reference[name] for name in shard.tensors if name in self.reference
                )


@frozen(kw_only=True)
class Plan:
    """All that a run will do, known before any weight is read; a value that can be kept and sent.

    It is carried out by `execute`, in this process or another one (paths are as they were given:
    relative ones are from the same folder), and shown by `--dry-run`.
    """

    command: str
    output: Path
    layout: str | None
    """What the report calls the layout of the tensors."""
    shards: tuple[Shard, ...]
    files: Mapping[str, Beside]
    """What lies beside the weights, by name in the output."""
    compared: Compared
    must_change: bool
    """Whether it is an error if everything written equals its source."""
    facts: Mapping[str, Any]
    """Further keys of the report."""
    fingerprint: Fingerprint
    """By which a run can tell whether it may continue another one."""
    inputs: Mapping[str, Stamp]
    """Every file that was opened so far, as it was then; it must be the same when it is read."""
    overwrite: bool
    sha256: bool
    outlet: Outlet | None
    """Where the output goes other than to its folder."""
    on_disk: int | None
    """How many weight files are on disk at most at a time; None if they stay."""
    disk_nbytes: int
    """What is needed of the disk at most."""
    short: str
    """What to say if that, or a download, finds no room; empty if it does. Only of parts, which may find
    an output that is complete."""
    direct: bool
    """Whether the weights are written around the page cache."""
    nbytes: int
    free_nbytes: int | None
    """None where the disk does not tell it."""
    download_nbytes: int
    """What is to be fetched before, of inputs that are not on this machine."""
    download_free_nbytes: int | None
    """What is free where that is kept; None without any."""
    workers: int
    memory_nbytes: int

    @property
    def tensor_nbytes(self) -> int:
        """Bytes of tensor data to write, headers not counted: what progress adds up to."""
        return sum(total_nbytes(shard.tensors) for shard in self.shards)

    def __repr__(self) -> str:
        """What would be written, in one line."""
        files = f"{len(self.shards):,} weight file{'s' if len(self.shards) > 1 else ''}"
        return (
            f"<Plan of {self.command}: {printable(str(self.output))}, {files}, "
            f"{bytes_text(self.nbytes)}, {self.workers} worker{'s' if self.workers > 1 else ''}>"
        )

    @property
    def names(self) -> set[str]:
        """Every file of the output."""
        index = {INDEX_NAME} if len(self.shards) > 1 else set()
        return {*(shard.name for shard in self.shards), *self.files, *index, REPORT_NAME}

    def as_dict(self) -> dict[str, Any]:
        """The plan as the report of `--dry-run` shows it."""
        return {
            "files": [{"name": shard.name, "bytes": shard.nbytes} for shard in self.shards],
            "free_bytes": self.free_nbytes,
            "disk_bytes": self.disk_nbytes,
            "on_disk": self.on_disk,
            "committed": None,
            "download_bytes": self.download_nbytes,
            "download_free_bytes": self.download_free_nbytes,
            "workers": self.workers,
            "memory_bytes": self.memory_nbytes,
        }


_IO = ("auto", "buffered", "direct")


class TorchDtype(Protocol):
    """What a dtype of torch is to a type checker that does not know torch."""

    @property
    def is_floating_point(self) -> bool:
        """Whether it is of floats."""


DtypeChoice: TypeAlias = (
    Literal["keep", "bf16", "fp16", "fp32", "bfloat16", "float16", "float32"] | TorchDtype
)
"""What a type checker takes for `dtype`; any case, and `torch.…` in text, are understood as well."""


class CacheOptions(TypedDict, total=False):
    """Keywords of every function that reads models: how those on the hub are got.

    - `cache_dir`: the hub's cache, as `HF_HUB_CACHE` is; by default what the environment says.
    - `offline`: ask the hub nothing, and use what is in the cache.
    """

    cache_dir: PathLike | None
    offline: bool


class BaseOptions(CacheOptions, total=False):
    """The like, of those that read one model above all.

    - `revision`: branch, tag or commit of the base, if that is on the hub.
    """

    revision: str | None


class OutputOptions(BaseOptions, total=False):
    """Keywords of every function that writes: how to write.

    - `max_shard_size`: like "5GB", or a number of bytes, to split the output anew; by default files are
      those of the source.
    - `dtype`: "keep" (default), "bf16", "fp16" or "fp32", or what torch calls these: round every float
      tensor, once.
    - `workers`: threads; by default one a processor, at most 8.
    - `max_memory`: like "512MB", or a number of bytes: fewer threads, to stay below.
    - `overwrite`: replace an output that exists once the new one is complete, and discard what an
      interrupted run with other inputs or options left.
    - `sha256`: keep the SHA-256 of all files in `streamshard.json`, too.
    - `io`: "buffered" writes through the page cache, "direct" around it where the file system can; by
      default ("auto") around it if the output is large against the memory that is free. The bytes are
      the same.
    - `part`: "I/N" (I from 1) writes the I-th of N parts of the output, in one of several processes on
      machines that share its disk (with `push_to` alone, the folder that they run in); the last one
      completes it, or "finish" does.
    - `scheduler`: address of a Dask scheduler, like "tcp://host:8786", or the file that it has written:
      its workers, on machines that share the disks, write the output.
    - `dry_run`: check everything and write nothing.
    - `push_to`: a repository on the hub, as "org/name": each finished weight file is uploaded while
      others are written, and one commit at the end puts all in place. Without an output folder nothing
      stays here.
    - `private`: have the repository be private, if it is made.
    - `commit_message`: of that commit.
    - `stream`: read models on the hub by ranges, as they are needed, and never store their weights.
    - `revision`: branch, tag or commit of the base, if that is on the hub.
    - `cache_dir`: the hub's cache, as `HF_HUB_CACHE` is; by default what the environment says.
    - `offline`: ask the hub nothing, and use what is in the cache.
    - `progress`: True shows a bar; a function is called with the bytes and the tensor of each finished
      piece.
    - `on_plan`: called with the plan, once, before anything is written.
    - `on_step`: called whenever something else is begun ("downloading", "checking" what an earlier run
      has finished, "comparing", "writing", "hashing", "syncing"), with its bytes and how many of these
      are done; while downloading also whenever more are.
    """

    stream: bool
    max_shard_size: int | str | None
    dtype: DtypeChoice
    workers: int | None
    max_memory: int | str | None
    overwrite: bool
    sha256: bool
    io: Literal["auto", "buffered", "direct"]
    part: str | None
    scheduler: str | None
    dry_run: bool
    push_to: str | None
    private: bool
    commit_message: str | None
    on_plan: Callable[[Plan], None] | None
    on_step: Callable[[str, int, int], None] | None
    progress: Callable[[int, str], None] | bool | None


@frozen(kw_only=True)
class Options:
    """How to write, as `OutputOptions` says it, with the defaults."""

    max_shard_size: int | str | None = None
    dtype: str = "keep"
    workers: int | None = None
    max_memory: int | str | None = None
    overwrite: bool = False
    sha256: bool = False
    io: str = "auto"
    part: str | None = None
    scheduler: str | None = None
    dry_run: bool = False
    outlet: Outlet | None = None
    """Of the keywords `push_to`, `private` and `commit_message`."""
    on_plan: Callable[[Plan], None] | None = None
    on_step: Callable[[str, int, int], None] | None = None
    progress: Callable[[int, str], None] | None = None
    on_distances: Callable[[Mapping[str, float]], None] | None = None
    """Called at the end with the squared L2 distance of each tensor that was compared."""

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """Those among the keywords of a command; what else it has is its own."""
        names = {one.name for one in fields(cls)}
        return cls(**{name: value for name, value in given.items() if name in names})

    def __post_init__(self) -> None:
        """Raise `UsageError` for what is none of its values; `dtype` is one of the four then."""
        if self.io not in _IO:
            raise UsageError(f"--io is {printable(repr(self.io))}; choose one of {', '.join(_IO)}.")
        object.__setattr__(self, "dtype", dtype_option(self.dtype))
        part_option(self.part)
        check_workers(self.workers)
        if self.scheduler is not None and self.part is not None:
            raise UsageError(
                "--part and --scheduler exclude each other: a scheduler gives every worker its own parts."
            )
        check_memory(self.max_memory_nbytes)
        size_option(self.max_shard_size, "--max-shard-size")

    @property
    def wanted(self) -> Part | None:
        """Which part is wanted; None for all of the output."""
        return part_option(self.part)

    @property
    def may_exist(self) -> bool:
        """Whether an output may be there: to be replaced, or as other parts have completed it."""
        return self.overwrite or self.part is not None or self.scheduler is not None

    @property
    def max_shard_nbytes(self) -> int | None:
        """`max_shard_size` in bytes."""
        return size_option(self.max_shard_size, "--max-shard-size")

    @property
    def max_memory_nbytes(self) -> int | None:
        """`max_memory` in bytes."""
        return size_option(self.max_memory, "--max-memory")


@frozen(kw_only=True)
class Job:
    """What to write: tensors, their files, and what lies beside them.

    `files` maps names in the output to what lies beside the weights. L2 is
    measured from the tensors of `reference`; if `compares_sources`, that of other tensors is from
    what they are made of. `facts` are further keys of the report.
    """

    command: str
    output: Path
    started: float
    tensors: Mapping[str, Lazy]
    layout: str | None
    """What the report calls the layout of these tensors."""
    shard_of: Mapping[str, str]
    metadata: Mapping[str, Mapping[str, str]]
    files: Mapping[str, Beside]
    weights_name: str = SINGLE_NAME
    """What the file of the weights is called if there is only one."""
    l2_from: str | None
    reference: Mapping[str, Stored] | None = None
    compares_sources: bool = False
    must_change: bool = False
    """Whether it is an error if everything written equals its source."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    choices: Mapping[str, Any] = field(default_factory=dict)
    """Options of the command that the output depends on, named to users if a run cannot be continued."""
