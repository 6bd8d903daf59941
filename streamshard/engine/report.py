"""Reports: what every command returns, prints with `--json`, and keeps as `streamshard.json`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from streamshard.checkpoint.header import total_nbytes, total_parameters
from streamshard.checkpoint.shards import Shard
from streamshard.disk.far import known_as, origins
from streamshard.engine.budget import peak_rss_bytes
from streamshard.engine.journal import FinishedShard
from streamshard.errors import listed
from streamshard.notes import noted
from streamshard.tensors.kernel import chosen
from streamshard.tensors.lazy import Lazy
from streamshard.tensors.rounding import Change
from streamshard.version import __version__

__all__ = ["Report", "Streamed", "exactness", "finished", "new_report", "odd_values"]
__all__ += ["show_reports_by", "update"]


class Report(dict[str, Any]):
    """What a command returns: a mapping, and the document that `--json` prints."""

    def __repr__(self) -> str:
        """What was done, in one line; all of it is in the items."""
        line = _shown_by["line"](self) if _shown_by else ""
        said = ": ".join(filter(None, (str(self.get("command")), line)))
        return f"<Report of {said}; {len(self)} keys>"

    def _repr_html_(self) -> str | None:
        """What notebooks show: a table, and the picture of a change where there is one."""
        return _shown_by["html"](self) if _shown_by else None

    def copy(self) -> Report:
        """A report of its own with the same items."""
        return Report(self)


_shown_by: dict[str, Callable[[Mapping[str, Any]], str]] = {}


def show_reports_by(
    line: Callable[[Mapping[str, Any]], str], html: Callable[[Mapping[str, Any]], str]
) -> None:
    """Say how reports are shown: the commands do, which know what is in them, and pictures."""
    _shown_by.update(line=line, html=html)


def new_report(command: str, tensors: Mapping[str, Lazy], layout: str | None) -> dict[str, Any]:
    """Every key that a report has at least; what does not apply to a command is None."""
    return {
        "command": command,
        "version": __version__,
        "output": None,
        "layout": layout,
        "tensors": len(tensors),
        "parameters": total_parameters(tensors),
        "bytes": total_nbytes(tensors),
        "shards": None,
        "seconds": None,
        "peak_rss_bytes": None,
        "merged": None,
        "l2": None,
        "missing": [],
        "unexpected": [],
        "sources": None,
        "warnings": noted(),
    }


class Streamed(dict[str, Any]):
    """A JSON object that is written without ever being in memory: `pairs` gives its entries anew.

    For what has an entry a tensor; only `json_pieces` and iteration over `items` understand it.
    """

    def __init__(self, pairs: Callable[[], Iterator[tuple[str, Any]]]) -> None:
        super().__init__()
        self._pairs = pairs

    def items(self) -> Any:
        return self._pairs()

    def __bool__(self) -> bool:
        return next(self._pairs(), None) is not None


def finished(report: Mapping[str, Any], started: float) -> Report:
    """The report with the time since `started` (`time.perf_counter`) and the peak memory."""
    seconds = round(time.perf_counter() - started, 3)
    done = {**report, "sources": origins(), "seconds": seconds, "peak_rss_bytes": peak_rss_bytes()}
    return Report((key, _plain(value)) for key, value in done.items())


def _plain(value: Any) -> Any:
    r"""`value` as JSON can have it: None for NaN and infinities, and `\udcff` spelled out.

    The latter is how Python has a byte of a path that is not UTF-8. Containers are changed. What is not
    of this machine has its own name.
    """
    if isinstance(value, str):
        value = known_as(value)
        return value if value.isascii() else value.encode(errors="backslashreplace").decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict) and not isinstance(value, Streamed):
        if all(_plain(key) == key for key in value):
            value.update((key, _plain(inner)) for key, inner in value.items())
        else:
            return {_plain(key): _plain(inner) for key, inner in value.items()}
    elif isinstance(value, list):
        value[:] = map(_plain, value)
    return value


def update(finished: Sequence[FinishedShard]) -> dict[str, float] | None:
    """Norms of the updates as they should be and as they are after rounding; None without any.

    `unchanged` is the share of elements that an update was added to and that are as before.
    """
    change = _change(finished)
    if not change.updated:
        return None
    return {
        "intended": math.sqrt(change.intended),
        "effected": math.sqrt(change.effected),
        "unchanged": change.unchanged / change.updated,
    }


def exactness(finished: Sequence[FinishedShard]) -> dict[str, Any] | None:
    """How many elements were computed, how many of them again as they were near a boundary, by what."""
    change = _change(finished)
    if not change.updated:
        return None
    return {"elements": change.updated, "rechecked": change.rechecked, "kernel": chosen()}


def odd_values(shards: Sequence[Shard], finished: Sequence[FinishedShard]) -> Iterator[str]:
    """Warnings of values that no trained model has: what goes in damaged comes out damaged."""
    not_finite: list[str] = []
    zero: list[str] = []
    for shard, found in zip(shards, finished, strict=True):
        if found.not_finite or found.zero:
            names = list(shard.tensors)
            not_finite += (names[place] for place in found.not_finite)
            # Zeros that are made here are meant, and what is no matrix or norm may begin with some.
            copied = (n for n in map(names.__getitem__, found.zero) if shard.tensors[n].ranges())
            zero += (name for name in copied if name.endswith(".weight"))
    if not_finite:
        yield (
            f"{listed(not_finite)}: there are NaN or infinite values, as in the input: the training "
            "diverged, or a file is damaged. Take an earlier checkpoint, or fetch it again"
        )
    if zero:
        yield (
            f"{listed(zero)}: all values are zero, as where a file was saved or fetched in part. If that "
            "is not meant, take an earlier checkpoint, or fetch it again"
        )


def _change(finished: Sequence[FinishedShard]) -> Change:
    change = Change()
    for shard in finished:
        change = change.plus(shard.change)
    return change
