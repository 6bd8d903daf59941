"""What reports look like on a terminal: one function a command, from a report to its text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from streamshard.cli.amounts import files_text, l2_text, number_text, shortened
from streamshard.cli.push_text import place_text, pushed_text
from streamshard.errors import argument, bytes_text, escaped

__all__ = [
    "conversion_text",
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
            facts += [_rank_text(adapter), f"scale {scales}"]
        facts += [f"weight {adapter['weight']:g}"] if adapter["weight"] != 1 else []
        lines.append(f"  {adapter['file']}: {'; '.join(facts)}")
    if update is not None:
        lines.append(
            f"  update: norm {number_text(update['intended'])}, after rounding "
            f"{number_text(update['effected'])}; {update['unchanged']:.1%} of elements did not change"
        )
    # Of a training checkpoint what else was trained is in there already.
    inside = any(adapter["file"] == report["base"] for adapter in report["adapters"])
    base = "base weights inside the checkpoint" if inside else "base"
    lines.append(f"  L2 from the {base}: {l2_text(l2)}")
    return "\n".join([*lines, *_exactness_text(report.get("exactness"))])


def _rank_text(adapter: Mapping[str, Any]) -> str:
    """Rank and alpha of an adapter; all ranks where they differ, and alpha with them."""
    ranks = adapter["ranks"]
    if len(ranks) < 2:
        return f"r {adapter['r']}, alpha {adapter['lora_alpha']:g}"
    return "r " + ", ".join(f"{rank} ({count} modules)" for rank, count in ranks.items())


def _exactness_text(exact: Mapping[str, Any] | None) -> list[str]:
    """That all elements are right, and how many of them a second look was needed for."""
    if exact is None:
        return []
    again = f"{exact['rechecked']:,} computed twice to be sure"
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
        lines.append(f"  L2 from {l2['reference']}: {l2_text(l2)}")
        if l2["global"] != 0:
            lines.append(
                "    So far are the source's weights from the reference's: that is no error."
            )
    return "\n".join(lines)


def wrap_text(report: dict[str, Any]) -> str:
    """What `wrap-lora` prints."""
    lines = [f"Put {report['pairs']} LoRA pairs into {place_text(report)}", _effort_text(report)]
    for part, count in report["trainable"].items():
        lines.append(f"  {part}: {_trainable_text(count)}")
    if report["format"] == "peft":
        lines.append(f"  An adapter: load or merge it together with {report['base']}")
    elif not any("wrap_llm_lora does not know" in warning for warning in report["warnings"]):
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
    done = report.get("resumed") or 0
    speed = (
        f"{done} of these before"  # so that what this run did in its time is not known
        if done
        else f"{bytes_text(report['bytes'] / report['seconds'])}/s"
    )
    return (
        f"  {bytes_text(report['bytes'])} in {files_text(report['shards'])}, {report['seconds']:.1f} s, "
        f"{speed}, peak memory {bytes_text(report['peak_rss_bytes'])}"
        + "".join(f"\n{line}" for line in pushed_text(report))
    )


def inspect_text(report: dict[str, Any]) -> str:
    """What `inspect` prints."""
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in report["dtypes"].items())
    size = (
        f"{report['tensors']} tensors ({dtypes}), {report['parameters']:,} parameters, "
        f"{bytes_text(report['bytes'])} in {files_text(report['shards'])}"
    )
    if "adapter" in report:
        known = {k: v for k, v in report["adapter"].items() if v not in (None, False, [], {})}
        targets = known.pop("target_modules", None)
        facts = [k if v is True else f"{k} {_value_text(v)}" for k, v in known.items()]
        lines = [f"PEFT adapter {report['path']}", f"  {', '.join(facts)}"]
        lines += [f"  target_modules {_value_text(targets)}"] if targets else []
        return "\n".join([*lines, f"  {size}"])
    lora = report["lora"]
    lines = [
        f"{report['path']}",
        f"  layout {report['layout']}, "
        + (f"spelling {report['spelling']}, " if report.get("spelling") else "")
        + f"language model {report.get('family') or 'unknown'}",
        f"  {size}",
    ]
    if report["dimensions"]:
        known = {k: v for k, v in report["dimensions"].items() if v is not None}
        lines.append("  " + ", ".join(f"{k} {v}" for k, v in known.items()))
    pairs = f"  LoRA: {lora['pairs']} pairs inside, ranks {_value_text(lora['ranks'])}"
    if not lora["wrapped"]:
        lines.append("  LoRA: none inside")
    elif 2 * lora["pairs"] >= report["tensors"]:
        lines.append(f"{pairs}, and nothing else: only what was trained")
    else:
        command = f"streamshard merge-lora {argument(report['path'])}"
        lines.append(f"{pairs}: fold them in by `{command}`")
    return "\n".join(lines)


def _value_text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


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
        again = ", or write all again with --overwrite" if known else ""
        return f" is {what}; {count} found. Fetch or copy anew what is named{again}."
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
