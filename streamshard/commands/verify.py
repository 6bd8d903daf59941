"""`verify`: reads a checkpoint again and compares it with its index and with what was recorded."""

from __future__ import annotations

import math
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from streamshard.checkpoint.file_names import REPORT_NAME
from streamshard.checkpoint.hub_client import Published
from streamshard.checkpoint.open_anything import Opened, open_anything
from streamshard.checkpoint.unlisted_files import Entry, contents, harm
from streamshard.checkpoint.weight_files import is_weight_file
from streamshard.commands.public import public
from streamshard.commands.verify_content import Comparison
from streamshard.commands.verify_model import AsModel, as_model
from streamshard.commands.verify_zeros import zero_warnings
from streamshard.disk.paths import PathLike, input_path
from streamshard.disk.system import reading
from streamshard.engine.budget import workers_or_default
from streamshard.engine.fetching import far_among, fetch, stored, wrong
from streamshard.engine.job import BaseOptions
from streamshard.engine.report import Report, finished, new_report
from streamshard.engine.workers import OnStep, Progress, share
from streamshard.errors import UnreadError, UsageError, VerificationError, printable
from streamshard.internvl.detection import layout_of
from streamshard.notes import note

if TYPE_CHECKING:
    from streamshard.commands.verify_against import AgainstHub

__all__ = ["verify"]


@public
def verify(
    path: PathLike,
    *,
    sample: str | int | None = None,
    strict: bool = False,
    against: str | Published | None = None,
    workers: int | None = None,
    progress: Callable[[int, str], None] | bool | None = None,
    on_total: Callable[[int], None] | None = None,
    on_step: OnStep | None = None,
    **_cache: Unpack[BaseOptions],
) -> Report:
    """Read a checkpoint or adapter again, and say whether it is what was written.

    Checks headers, the index against the files both ways, that no value is infinite or NaN, and, of
    InternVL checkpoints, that all tensors that `config.json` describes are there, in their shapes; where
    there is a `streamshard.json`, also that record itself, every file and tensor against its digests,
    and that nothing was added which could be run or loaded. `sample` reads only so many tensors
    ("10%" or a number), chosen at random, and no SHA-256. With `strict` it is a problem if there is
    nothing to compare with. `against` is a model on the hub (`org/name@revision`), with which every
    file is compared by the hub's own digests; nothing is downloaded for it.

    Every file of a folder is in one of three lists of the report: `checked_files`, `not_checked` (each
    with the reason) and `extra` (what the record does not list). Raises `VerificationError`, whose
    `report` lists what is wrong under `problems`, `missing`, `unexpected`, `different` and
    `nonfinite`; the like is `UnreadError` if all that is wrong is that the system did not read
    files, as `unreadable` lists; `InputError` if there is no checkpoint at all.
    """
    started = time.perf_counter()
    given = input_path(path, "what to verify")
    with reading(given):
        found = open_anything(given)
    tensors = found.tensors
    names = _sampled(list(tensors), sample)
    if sample is None:
        fetch({t.path for name in names for t in stored(tensors[name])}, on_step)
    damaged = [] if sample is not None else wrong(far_among(_paths(found)), on_step)
    watching = progress if callable(progress) else None
    check = Comparison(found, watching)
    hub = _against(found, against, watching)
    if on_total is not None:
        hashed = check.hashed_nbytes(whole=sample is None) + (0 if hub is None else hub.nbytes)
        on_total(sum(tensors[name].nbytes for name in names) + hashed)
    check.names()
    tasks = check.tasks(names, whole=sample is None)
    share(tasks, lambda task, work: task(work), workers_or_default(workers), check.stop)
    check.shards(names)
    if hub is not None:
        hub.run(workers_or_default(workers))
    coverage = _coverage(found, check)
    model = as_model(found)
    note(*zero_warnings(found.headers, check.zeros))
    if not found.listing.usable and found.listing.record == "missing":
        reason = _why_uncomparable(found)
        note(f"no digests are recorded: {reason}")
        if strict and hub is None:
            coverage["problems"].append(
                f"{printable(str(given))}: nothing could be compared: {reason} (--strict)."
            )
    report = {
        **new_report("verify", tensors, layout_of(tensors)),
        "path": str(given),
        "shards": len(found.headers),
        "recorded": found.listing.usable,
        "record": found.listing.record,
        "strict": strict,
        "checked": {
            "tensors": len(names),
            "bytes": sum(tensors[name].nbytes for name in names),
            "files": len(check.compared),
        },
        **coverage,
        "checks": _checks(found, model),
        "missing": sorted({*check.missing, *model.missing}),
        "unexpected": check.unexpected,
        "different": sorted(check.different),
        "nonfinite": dict(sorted(check.nonfinite.items())),
        "against": None if hub is None else hub.described(),
        "unreadable": sorted(found.unreadable | check.unreadable),
        "problems": [
            *found.problems,
            *damaged,
            *sorted(check.problems),
            *model.problems,
            *coverage["problems"],
            *([] if hub is None else hub.told()),
        ],
    }
    report = finished(report, started)
    if report["problems"] and set(report["problems"]) <= set(report["unreadable"]):
        raise UnreadError(
            f"{printable(str(given))}: could not be read as a whole: {report['problems'][0]}",
            report,
        )
    if report["problems"]:
        count = len(report["problems"])
        raise VerificationError(
            f"{printable(str(given))}: {count} {'problem' if count == 1 else 'problems'} found: "
            f"{report['problems'][0]}" + (" (and more)" if count > 1 else ""),
            report,
        )
    return report


def _against(
    found: Opened, against: str | Published | None, progress: Progress | None
) -> AgainstHub | None:
    """The comparison with a model on the hub, if it was asked for."""
    if not isinstance(against, Published):
        return None
    from streamshard.commands.verify_against import AgainstHub

    return AgainstHub(found, against, progress)


def _checks(found: Opened, model: AsModel) -> list[dict[str, str | None]]:
    """What was checked, and what could not be, with the reason."""
    done = ["headers", *([] if found.bare else ["index against files"]), "infinite and NaN values"]
    why_not = dict(model.unchecked)
    if found.listing.usable:
        done.append("digests")
    elif found.listing.record == "missing":
        why_not["digests"] = _why_uncomparable(found)
    else:
        why_not["digests"] = f"the {REPORT_NAME} cannot be used"
    all_of_it = {**dict.fromkeys([*done, *model.checked]), **why_not}
    return [{"what": what, "why_not": why} for what, why in all_of_it.items()]


def _coverage(found: Opened, check: Comparison) -> dict[str, Any]:
    """The three lists that every file is in one of, and what is wrong with files that nobody listed."""
    if found.bare:
        there = [Entry(name, "file") for name in (*found.headers, *found.unread)]
    else:
        there = sorted(contents(found.folder), key=lambda entry: entry.name)
    listing = found.listing
    whole = {REPORT_NAME} if listing.record == "whole" else set()
    checked = check.compared | whole
    listed = {*listing.files, REPORT_NAME}
    extra, not_checked, problems = [], [], []
    for entry in there:
        name = entry.name
        if listing.usable and name not in listed:
            extra.append(name)
            problem = harm(entry)
            if problem is not None:
                problems.append(f"{printable(name)}: {problem}.")
        elif name not in checked:
            not_checked.append({"name": name, "why": _why_not(found, check, name)})
    return {
        "checked_files": sorted(checked),
        "not_checked": not_checked,
        "extra": extra,
        "problems": problems,
    }


def _why_not(found: Opened, check: Comparison, name: str) -> str:
    """Why a file was not compared with a digest."""
    if name in check.uncompared:
        return check.uncompared[name]
    if name == REPORT_NAME:
        unread = found.listing.record == "unread"
        return "it cannot be read" if unread else "it is not as it was written"
    if name in found.headers:
        return "its values were read, but no digest of it is recorded"
    if is_weight_file(name):
        return "it is no part of this checkpoint, and no digest of it is recorded"
    return "no digest of it is recorded"


def _why_uncomparable(found: Opened) -> str:
    if found.bare:
        return (
            f"this is a bare file, and a {REPORT_NAME} is about a folder: give the folder to "
            "compare with it"
        )
    return f"there is no {REPORT_NAME}"


def _paths(found: Opened) -> Iterator[str | Path]:
    """Every file that is there, and those of tensors, which may lie elsewhere."""
    yield from (found.folder / entry.name for entry in contents(found.folder))
    yield from (tensor.path for each in found.tensors.values() for tensor in stored(each))


def _sampled(names: list[str], sample: str | int | None) -> list[str]:
    """So many of the names, at least one; raises `UsageError` for what is no such number."""
    if sample is None:
        return names
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", str(sample).strip())
    count = 0.0
    if match is not None:
        count = float(match[1]) * (len(names) / 100 if match[2] else 1)
        if not match[2] and not float(match[1]).is_integer():
            count = 0  # a tenth, or a part of a tensor?
    if match is None or not count or math.isinf(count) or (match[2] and float(match[1]) > 100):
        raise UsageError(
            f"--sample is {printable(repr(sample))}; write it like 10% or 200 (tensors)."
        )
    # Another one each time: what was not read today may be tomorrow.
    return random.sample(names, min(max(round(count), 1), len(names)))
