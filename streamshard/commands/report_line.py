"""What a report comes to, in a line: what was done with what, and how that ended."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from streamshard.errors import printable

__all__ = ["report_line", "result_of"]


def report_line(report: Mapping[str, Any]) -> str:
    """The place, the result, and how many problems and warnings there are."""
    return ", ".join([*_places(report), *result_of(report), *_counts(report)])


def _places(report: Mapping[str, Any]) -> list[str]:
    if "a" in report and "b" in report:
        return [f"{_path(report['a'])} against {_path(report['b'])}"]
    pushed = report.get("pushed") or {}
    place = report.get("output") or report.get("path") or pushed.get("url")
    return [] if place is None else [_path(place)]


def _path(path: object) -> str:
    return printable(str(path))


def result_of(report: Mapping[str, Any]) -> list[str]:
    """What came out, as short facts; nothing of a command that is not known."""
    if report.get("command") == "env":
        return [*_environment(report)]
    if report.get("command") == "diff" and "differ" in report:
        return [*_difference(report)]
    facts = []
    checked = report.get("checked") or {}
    if checked.get("tensors", 0) < report.get("tensors", 0) and "recorded" in report:
        facts.append(f"{checked['tensors']:,} of {report['tensors']:,} tensors read")
    elif "tensors" in report:
        facts.append(f"{report['tensors']:,} tensors")
    if report.get("merged"):
        facts.append(f"{report['merged']:,} of them merged")
    l2 = report.get("l2")
    if isinstance(l2, Mapping) and l2.get("global") is not None:
        facts.append(f"L2 {l2['global']:.4g} from {_path(l2.get('reference'))}")
    if "recorded" in report and not report.get("problems"):
        unknown = "no fault found, nothing recorded to compare with"
        facts.append("as it was written" if report["recorded"] else unknown)
    lora = report.get("lora") or {}
    if lora.get("wrapped"):
        facts.append(f"a training checkpoint with {lora['pairs']:,} LoRA pairs")
    adapter = report.get("adapter") or {}
    if "peft_type" in adapter:
        facts.append(f"an adapter ({adapter['peft_type']}, r {adapter.get('r')})")
    return facts + (["dry run"] if report.get("dry_run") else [])


def _environment(report: Mapping[str, Any]) -> Iterator[str]:
    yield f"streamshard {report.get('version')}"
    yield f"Python {report.get('python')}"
    yield f"kernel {report.get('kernel')}"
    missing = [
        name for name, one in (report.get("packages") or {}).items() if one["version"] is None
    ]
    if missing:
        yield f"without {', '.join(missing)}"


def _difference(report: Mapping[str, Any]) -> Iterator[str]:
    l2 = report.get("l2")
    if not report["differ"]:
        what = "names, shapes and dtypes" if l2 is None else "all"
        yield f"equal in {what} of {report['tensors']:,} tensors"
        return
    if isinstance(l2, Mapping):
        size = "not finite" if l2.get("global") is None else f"{l2['global']:.4g}"
        yield f"{len(report['different']):,} of {l2['compared']:,} tensors differ, L2 {size}"
    only = len(report["missing"]), len(report["unexpected"])
    if any(only):
        yield f"{only[1]:,} names only in the first, {only[0]:,} only in the second"
    for what in ("shapes", "dtypes"):
        if report.get(what):
            yield f"{len(report[what]):,} other {what}"


def _counts(report: Mapping[str, Any]) -> Iterator[str]:
    for key in ("problem", "warning"):
        count = len(report.get(f"{key}s") or ())
        if count:
            yield f"{count:,} {key}{'s' if count > 1 else ''}"
