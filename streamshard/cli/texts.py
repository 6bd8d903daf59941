"""What reports look like on a terminal: one function a command, from a report to its text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamshard.cli.amounts import files_text, number_text, shortened
from streamshard.cli.push_text import place_text, pushed_text
from streamshard.errors import bytes_text, escaped

__all__ = [
    "conversion_text",
    "diff_text",
    "extract_text",
    "inspect_text",
    "merge_text",
    "printable_report",
    "upstream_text",
    "verify_text",
    "wrap_text",
]


def printable_report(value: Any) -> Any:
    """A report in which no name and no path can move the cursor or begin a line of its own."""
    if isinstance(value, str):
        return escaped(value)
    if isinstance(value, dict):
        return {printable_report(key): printable_report(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [printable_report(inner) for inner in value]
    return value


def merge_text(report: dict[str, Any]) -> str:
    """What `merge-lora` prints."""
    l2, update = report["l2"], report["update"]
    lines = [
        f"Merged into {report['merged']} tensors of {place_text(report)}",
        _effort_text(report),
    ]
    for adapter in report["adapters"]:
        scales = ", ".join(
            f"{scale} ({count} modules)" for scale, count in adapter["scalings"].items()
        )
        facts = [", ".join(adapter["kinds"])]
        if scales:
            facts += [f"r {adapter['r']}, alpha {adapter['lora_alpha']:g}", f"scale {scales}"]
        facts += [f"weight {adapter['weight']:g}"] if adapter["weight"] != 1 else []
        lines.append(f"  {adapter['file']}: {'; '.join(facts)}")
    if update is not None:
        lines.append(
            f"  update: norm {number_text(update['intended'])}, {number_text(update['effected'])} after "
            f"rounding; {update['unchanged']:.1%} of its elements change nothing"
        )
    lines.append(
        f"  L2 from the base: {number_text(l2['global'])} (sum over tensors {number_text(l2['sum'])}, "
        f"per parameter {number_text(l2['per_parameter'])})"
    )
    return "\n".join([*lines, *_exactness_text(report.get("exactness"))])


def _exactness_text(exact: Mapping[str, Any] | None) -> list[str]:
    """That all elements are right, and how many of them a second look was needed for."""
    if exact is None:
        return []
    again = f"{exact['rechecked']:,} of them computed again near a rounding boundary"
    return [f"  exact: {exact['elements']:,} elements rounded once, {again} ({exact['kernel']})"]


def conversion_text(report: dict[str, Any]) -> str:
    """What `hf2custom` and `custom2hf` print."""
    l2 = report["l2"]
    lines = [
        f"Converted {report['tensors']} tensors into {place_text(report)}",
        _effort_text(report),
        f"  missing: {', '.join(report['missing']) or 'none'}",
        f"  unexpected: {', '.join(report['unexpected']) or 'none'}",
    ]
    if l2 is None:
        lines.append("  L2: not computed, the reference has no weights")
    else:
        lines.append(
            f"  L2 from {l2['reference']}: total {number_text(l2['sum'])}, "
            f"average {number_text(l2['per_parameter'])} (global {number_text(l2['global'])}; "
            f"{l2['compared']} tensors compared)"
        )
    return "\n".join(lines)


def wrap_text(report: dict[str, Any]) -> str:
    """What `wrap-lora` prints."""
    lines = [f"Put {report['pairs']} LoRA pairs into {place_text(report)}", _effort_text(report)]
    for part, count in report["trainable"].items():
        lines.append(f"  {part}: {_trainable_text(count)}")
    if report["format"] == "peft":
        lines.append(f"  An adapter: load or merge it together with {report['base']}")
    else:
        lines.append(
            "  InternVL's trainer wraps by the ranks in this config: start it without --use_llm_lora and "
            "--use_backbone_lora, which would wrap once more and begin anew, and with --freeze_llm "
            "False and --freeze_backbone False: else the pairs are frozen too."
        )
    return "\n".join(lines)


def _trainable_text(count: dict[str, Any]) -> str:
    """The line that PEFT's `print_trainable_parameters` prints."""
    return (
        f"trainable params: {count['trainable']:,d} || all params: {count['all']:,d} || "
        f"trainable%: {count['percent']:.4f}"
    )


def extract_text(report: dict[str, Any]) -> str:
    """What `extract-lora` prints."""
    saved = report["modules_to_save"]
    return "\n".join(
        [
            f"Wrote {report['pairs']} LoRA pairs to {place_text(report)}",
            _effort_text(report),
            f"  r {report['r']}, lora_alpha {report['lora_alpha']:g}",
            f"  fully trained modules (modules_to_save): {', '.join(saved) or 'none'}",
        ]
    )


def _effort_text(report: dict[str, Any]) -> str:
    return (
        f"  {bytes_text(report['bytes'])} in {files_text(report['shards'])}, {report['seconds']:.1f} s, "
        f"{bytes_text(report['bytes'] / report['seconds'])}/s, peak memory "
        f"{bytes_text(report['peak_rss_bytes'])}"
        + "".join(f"\n{line}" for line in pushed_text(report))
    )


def diff_text(report: dict[str, Any]) -> str:
    """What `diff` prints; its first line says whether they differ."""
    l2 = report["l2"]
    lines = [_verdict(report), f"  A: {report['a']}", f"  B: {report['b']}"]
    if l2 is None:
        lines.append("  L2: not measured, only headers were read")
    elif not l2["compared"]:
        lines.append("  L2: none, since no tensor could be compared")
    else:
        lines.append(
            f"  L2: total {number_text(l2['sum'])}, average {number_text(l2['per_parameter'])}, "
            f"global {number_text(l2['global'])} ({l2['compared']} tensors compared)"
        )
    for title, key in (("only in B", "missing"), ("only in A", "unexpected")):
        lines += [f"  {title}: {name}" for name in report[key][:10]]
    for title, key in (("shapes", "shapes"), ("dtypes", "dtypes")):
        lines += [
            f"  {title} differ: {name}: {left} and {right}"
            for name, (left, right) in list(report[key].items())[:10]
        ]
    if report["different"]:
        lines.append(f"  {'L2':>12} {'relative':>12}  largest differences")
    for row in report["different"][:15]:
        relative = "" if row["relative"] is None else f"{row['relative']:.4g}"
        lines.append(f"  {number_text(row['l2']):>12} {relative:>12}  {row['name']}")
    return "\n".join(lines)


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


def inspect_text(report: dict[str, Any]) -> str:
    """What `inspect` prints."""
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in report["dtypes"].items())
    size = (
        f"{report['tensors']} tensors ({dtypes}), {report['parameters']:,} parameters, "
        f"{bytes_text(report['bytes'])} in {files_text(report['shards'])}"
    )
    if "adapter" in report:
        facts = ", ".join(f"{k} {v}" for k, v in report["adapter"].items() if v is not None)
        return f"PEFT adapter {report['path']}\n  {facts}\n  {size}"
    lora = report["lora"]
    lines = [
        f"{report['path']}",
        f"  layout {report['layout']}, spelling {report.get('spelling') or '-'}, "
        f"language model {report.get('family') or 'unknown'}",
        f"  {size}",
    ]
    if report["dimensions"]:
        known = {k: v for k, v in report["dimensions"].items() if v is not None}
        lines.append("  " + ", ".join(f"{k} {v}" for k, v in known.items()))
    lines.append(
        f"  LoRA: {lora['pairs']} pairs inside, ranks {lora['ranks']}"
        if lora["wrapped"]
        else "  LoRA: none inside"
    )
    return "\n".join(lines)


def verify_text(report: dict[str, Any]) -> str:
    """What `verify` prints: what was checked, what was not, what is extra, and what follows."""
    checked = report["checked"]
    against = "with their digests" if report["recorded"] else "(no digests are recorded)"
    lines = [
        f"{report['path']}",
        f"  read: {checked['tensors']} of {report['tensors']} tensors {against}, "
        f"{bytes_text(checked['bytes'])} in {report['seconds']:.1f} s",
        f"  files compared with their digests: {shortened(report['checked_files'])}",
    ]
    done = [one["what"] for one in report["checks"] if one["why_not"] is None]
    lines.append(f"  checked: {', '.join(done)}")
    lines += [
        f"  not checked: {one['what']}: {one['why_not']}"
        for one in report["checks"]
        if one["why_not"] is not None
    ]
    why: dict[str, list[str]] = {}
    for one in report["not_checked"]:
        why.setdefault(one["why"], []).append(one["name"])
    lines += [f"  not compared: {shortened(names)}: {reason}" for reason, names in why.items()]
    against = report["against"]
    if against is not None:
        lines.append(
            f"  compared with {against['repository']} at commit {against['commit'][:12]}: "
            f"{len(against['equal'])} files are equal, {len(against['different'])} differ, "
            f"{len(against['missing'])} only there, {len(against['extra'])} only here"
        )
    if report["extra"]:
        lines.append(f"  extra, not in the record: {shortened(report['extra'])}")
    problems = report["problems"]
    lines += [f"  problem: {problem}" for problem in problems[:50]]
    lines += [f"  and {len(problems) - 50} more problems"] if len(problems) > 50 else []
    return "\n".join([*lines, f"{report['path']}{_conclusion(report)}"])


def _conclusion(report: dict[str, Any]) -> str:
    count, extra = len(report["problems"]), len(report["extra"])
    if count and count == len(report["unreadable"]):
        return f" could not be read as a whole; no other problem in what was read; {count} found"
    if count:
        known = report["recorded"] or report["record"] == "changed"
        what = "damaged or not what was written" if known else "damaged, or cannot be confirmed"
        if report["against"] is not None:
            what = "damaged, or another model than the one on the hub"
        return f" is {what}; {count} found"
    if not report["recorded"]:
        return ": no problem found; no digests to compare"
    if report["not_checked"]:
        return ": no problem found in what was compared; the rest was not"
    beside = f"; {extra} extra {'file is' if extra == 1 else 'files are'} no part of it"
    return f" is right: every file and tensor is as it was written{beside if extra else ''}"


def upstream_text(report: dict[str, Any]) -> str:
    """What InternVL's own conversion scripts print."""
    l2 = report["l2"]
    lines = [f"Missing keys: {report['missing']}", f"Unexpected keys: {report['unexpected']}"]
    if l2 is not None:
        lines.append(f"Total L2 distance: {number_text(l2['sum'], '.6f')}")
        lines.append(f"Average per-parameter L2: {number_text(l2['per_parameter'], '.8f')}")
    return "\n".join([*lines, f"Saved to {place_text(report)}"])
