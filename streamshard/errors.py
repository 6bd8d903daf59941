"""What can go wrong, one class a kind, each with the exit code of the command line.

Every message names the file and the tensor, what was expected and found, and what to do next.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, Self

__all__ = [
    "AdapterError",
    "BusyError",
    "ChangedError",
    "ClusterError",
    "HubError",
    "InputError",
    "NotFoundError",
    "OutOfMemoryError",
    "OutputError",
    "ReadError",
    "StreamshardError",
    "StreamshardWarning",
    "UnreadError",
    "UsageError",
    "VerificationError",
    "WriteError",
    "add_to",
    "argument",
    "both_bytes",
    "bytes_text",
    "escaped",
    "listed",
    "nearest",
    "printable",
]


class StreamshardError(Exception):
    """Base of all errors that streamshard raises on purpose."""

    exit_code = 1

    @classmethod
    def at(cls, path: object, problem: str) -> Self:
        r"""The error of what is wrong with a file or folder, whose path the message begins with.

        >>> print(InputError.at("a\nb", "is empty."))
        a\nb: is empty.
        """
        return cls(f"{printable(str(path))}: {problem}")


class StreamshardWarning(UserWarning):
    """What a report lists under `warnings`, for the filters of Python's `warnings`.

    `report` is that report, if a filter has made an error of the warning.
    """

    report: dict[str, Any] | None = None


class UsageError(StreamshardError, ValueError):
    """The options contradict each other or the arguments."""

    exit_code = 2


class InputError(StreamshardError):
    """A checkpoint, header, index or config is malformed or not supported."""

    exit_code = 3
    is_missing = False
    """Whether it is that nothing is at a path."""

    @classmethod
    def missing(cls, path: object, problem: str) -> Self:
        """The error of a path at which nothing is; to users of Python it is a `NotFoundError`."""
        made = cls.at(path, problem)
        made.is_missing = True
        return made


class NotFoundError(InputError, FileNotFoundError):
    """Nothing is at the path of an input.

    Raised to users of Python only: within the package an `OSError` is what the system said.
    """

    is_missing = True


class AdapterError(StreamshardError):
    """The adapter does not fit the base, or is of a kind that cannot be merged exactly."""

    exit_code = 4


class OutputError(StreamshardError):
    """The output exists, lies inside an input, or belongs to another run."""

    exit_code = 5


class BusyError(OutputError):
    """Another run is writing the output just now."""


class WriteError(StreamshardError):
    """There is no space, no permission, or the system refused a write."""

    exit_code = 6


class OutOfMemoryError(StreamshardError, MemoryError):
    """There is less memory than is needed, or a limit does not allow more."""

    exit_code = 6

    def __new__(cls, *arguments: object) -> Self:
        # Otherwise it is that of `MemoryError`, which those who unpickle errors (tblib, for Dask) call.
        return Exception.__new__(cls, *arguments)


class ReadError(StreamshardError):
    """A file could not be read, or changed while it was being read."""

    exit_code = 7


class ChangedError(ReadError):
    """An input changed during the run: what was made of it so far is of no use."""


class VerificationError(StreamshardError):
    """A checkpoint is not what its index and records say; `report` lists everything that differs."""

    exit_code = 8

    def __init__(self, message: str, report: dict[str, Any]) -> None:
        super().__init__(message)
        self.report = report

    def __reduce__(self) -> tuple[Any, ...]:
        # By default it would be made of the message alone, as an error that comes from another
        # process, or is copied, would be.
        return type(self), (*self.args, self.report), self.__dict__


class UnreadError(VerificationError, ReadError):
    """What could be read of a checkpoint is right, but not all of it could be; `report` lists what."""

    exit_code = 7


class ClusterError(StreamshardError):
    """The cluster's scheduler or its workers did not do what they were given."""

    exit_code = 9


class HubError(StreamshardError):
    """The hub or the network did not give what is needed."""

    exit_code = 9


def __dir__() -> list[str]:
    """The classes: all that is meant for users."""
    return [name for name in __all__ if name[0].isupper()]


def add_to(error: BaseException, text: str) -> None:
    """Add something to what an error says."""
    if text:
        error.args = (" ".join([*(str(part) for part in error.args[:1]), text]), *error.args[1:])


def printable(text: str, limit: int = 200) -> str:
    r"""`text` with control and other unprintable characters escaped; the middle of long text is left out.

    >>> print(printable("a\x1b[31mb"))
    a\x1b[31mb
    """
    safe = escaped(text)
    return safe if len(safe) <= limit else f"{safe[: limit // 2]}…{safe[-limit // 2 :]}"


def escaped(text: str) -> str:
    r"""`text` with control and other unprintable characters escaped, so that a terminal shows them.

    >>> print(escaped("a\nb"))
    a\nb
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def listed(names: Iterable[str], limit: int = 5) -> str:
    """The first `limit` names in quotes, and how many more there are.

    >>> listed(["a", "b", "c"], limit=2)
    "'a', 'b' and 1 more"
    """
    every = list(names)
    shown = ", ".join(f"'{printable(name)}'" for name in every[:limit])
    rest = len(every) - limit
    return f"{shown} and {rest:,} more" if rest > 0 else shown


def argument(path: object) -> str:
    """A path as it can be pasted into a command, for messages that show one in backquotes.

    >>> print(f"`verify {argument('my files')}`")
    `verify 'my files'`
    """
    import shlex

    return shlex.quote(printable(str(path), 4000))


def nearest(name: str, known: Collection[str], count: int = 3) -> list[str]:
    """Up to `count` names in `known` that look most like `name`, best first."""
    tail = name.rsplit(".", 2)[-2:]
    # Comparing with every name of a 40,000-tensor checkpoint takes seconds: prefer a shared tail.
    pool = [k for k in known if k.rsplit(".", 2)[-2:] == tail] or list(known)
    import difflib  # where names are alike is asked of few runs

    return difflib.get_close_matches(name, pool[:2000], n=count, cutoff=0.3)


def both_bytes(needed: float, there: float) -> tuple[str, str]:
    """Two sizes that are compared: in full where they would look the same.

    >>> both_bytes(1_880_000_000, 524_288_000), both_bytes(1_000_001, 1_000_000)
    (('1.88 GB', '524.29 MB'), ('1,000,001 bytes', '1,000,000 bytes'))
    """
    texts = bytes_text(needed), bytes_text(there)
    return texts if texts[0] != texts[1] else (f"{needed:,} bytes", f"{there:,} bytes")


def bytes_text(count: float) -> str:
    """A size in the unit that suits it."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
