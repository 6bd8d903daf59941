"""What `diff` prints: whether they differ, how far, and where most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from streamshard.cli.amounts import l2_text, number_text
from streamshard.cli.terminal_text import cut

__all__ = ["diff_text"]

MOST_NAMES, MOST_ROWS = 10, 15
HALF = 2  # of the tensors with other values: fewer are what a fine-tune or an adapter changes


def diff_text(report: dict[str, Any], columns: int | None = None) -> str:
    """What `diff` prints; the names in its table are cut where a terminal has fewer `columns`."""
    l2 = report["l2"]
    lines = [_verdict(report), f"  A: {report['a']}", f"  B: {report['b']}"]
    if l2 is None:
        lines.append("  L2: not measured, only headers were read")
    elif not l2["compared"]:
        lines.append("  L2: none, since no tensor could be compared")
    else:
        lines.append(f"  L2 of A from B: {l2_text(l2)}")
    lines += _likeness(report)
    for title, key in (("only in B", "missing"), ("only in A", "unexpected")):
        lines += _listing(title, report[key])
    for title, key in (("shapes", "shapes"), ("dtypes", "dtypes")):
        pairs = report[key].items()
        lines += _listing(
            f"{title} differ", [f"{name}: {left} and {right}" for name, (left, right) in pairs]
        )
    if report["different"]:
        lines.append(f"  {'L2':>10} {'relative':>9}  largest differences")
    for row in report["different"][:MOST_ROWS]:
        relative = "" if row["relative"] is None else f"{row['relative']:.3g}"
        head = f"  {number_text(row['l2'], '.4g'):>10} {relative:>9}  "
        name = row["name"] if columns is None else cut(row["name"], columns - len(head))
        lines.append(head + name)
    return "\n".join(lines)


def _listing(title: str, found: Sequence[str]) -> list[str]:
    """What was found of one kind, under a title: names nearly fill a line of a terminal."""
    if len(found) <= 1:
        return [f"  {title}: {one}" for one in found]
    more = [f"    and {len(found) - MOST_NAMES:,} more"] if len(found) > MOST_NAMES else []
    return [f"  {title}:", *(f"    {one}" for one in found[:MOST_NAMES]), *more]


def _likeness(report: Mapping[str, Any]) -> list[str]:
    """That two are hardly one model, where most of their tensors have little to do with each other."""
    far = [row for row in report["different"] if (row["relative"] or 0) > 1]
    if len(far) * HALF <= len(report["different"]) + report["equal"]:
        return []
    return ["  most tensors differ by more than their own size: two unrelated models, it seems"]


def _verdict(report: dict[str, Any]) -> str:
    kinds = {
        "different": "other values",
        "shapes": "another shape",
        "dtypes": "another dtype",
    }
    found = [
        f"{len(report[key])} {'has' if len(report[key]) == 1 else 'have'} {what}"
        for key, what in kinds.items()
        if report[key]
    ]
    found += [
        f"{len(report[key])} {'is' if len(report[key]) == 1 else 'are'} only in {side}"
        for key, side in (("unexpected", "A"), ("missing", "B"))
        if report[key]
    ]
    if found:
        return f"They differ: of the tensors {', '.join(found)}; {report['equal']} are equal"
    if report["l2"] is None:
        return f"Names, shapes and dtypes do not differ: {report['equal']} tensors; values were not read"
    skipped = len(report["l2"]["skipped"])
    if skipped:
        return (
            f"No difference found: {report['equal']} tensors are equal, {skipped} could not be "
            "compared (their dtype is none that is understood)"
        )
    return f"They do not differ: all {report['equal']} tensors are equal"
