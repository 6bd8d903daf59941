"""How a notebook shows a report: a table of what it says, its warnings, and the picture of a change.

Nothing in it is read as HTML that is not of this module: names of files and tensors are escaped.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from streamshard.commands.report_line import result_of
from streamshard.errors import UsageError, bytes_text, escaped
from streamshard.extras import install

__all__ = ["report_html"]

_ELSEWHERE = {"command", "version", "warnings", "problems", "heat_map", "sources", "fingerprint"}
_BYTES = ("bytes", "nbytes")
_LABELS = {
    "bytes": "size",
    "shards": "weight files",
    "peak_rss_bytes": "peak memory",
    "merged": "merged tensors",
    "l2": "L2 distance",
    "sum": "sum over tensors",
    "a": "first",
    "b": "second",
    "missing": "only in the second",
    "unexpected": "only in the first",
    "recorded": "digests are recorded",
    "maps_files": "files are mapped",
    "why_not": "",
}
"""What keys are called here; others are words already."""
MAX_ROWS, MAX_ITEMS, MAX_TEXT = 40, 8, 300


def report_html(report: Mapping[str, Any]) -> str:
    """A report as HTML. The picture needs a `heat_map` in it, and matplotlib."""
    rows = [
        f"<tr><th style='text-align:left'>{_text(_label(key, report.get('command')))}</th>"
        f"<td style='text-align:left'>{_text(_value(value, key))}</td></tr>"
        for key, value in list(_told(report))[:MAX_ROWS]
    ]
    title = f"{report.get('command')} (streamshard {report.get('version')})"
    return "".join(
        [
            f"<table><caption>{_text(title)}</caption>{''.join(rows)}</table>",
            *_lines("problem", report.get("problems") or ()),
            *_lines("warning", report.get("warnings") or ()),
            _picture(report.get("heat_map")),
        ]
    )


def _told(report: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What a report has to say, the result first; what does not apply is null or empty."""
    result = result_of(report)
    if report.get("problems"):
        count = len(report["problems"])
        result.append(f"{count:,} problem{'s' if count > 1 else ''}")
    if result:
        yield "result", ", ".join(result)
    for key, value in report.items():
        if key in _ELSEWHERE or value is None or value is False or value in ([], {}, ""):
            continue
        if value == 0 and report.get("command") == "env":  # which is of no tensors
            continue
        yield key, value


def _label(key: str, command: object = None) -> str:
    if key in ("missing", "unexpected") and command != "diff":
        return key
    return _LABELS.get(key, key.replace("_", " "))


def _value(value: Any, key: str = "") -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return bytes_text(value) if key.rpartition("_")[2] in _BYTES else f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        told = {k: v for k, v in value.items() if v is not None and v not in ([], {}, "")}
        if key == "packages":
            return _joined([_package(str(k), v) for k, v in told.items()], len(told))
        if key == "files":
            return _joined([f"{k} ({bytes_text(v)})" for k, v in told.items()])
        return _joined([f"{_label(str(k))}: {_value(v, str(k))}" for k, v in told.items()])
    if isinstance(value, Sequence) and not isinstance(value, str):
        return _joined([_entry(one) for one in value])
    return str(value)


def _entry(value: Any) -> str:
    """One of several: what has a name begins with it."""
    if not isinstance(value, Mapping):
        return _value(value)
    first = next((key for key in ("name", "what", "file") if key in value), None)
    if first is None:
        return _value(value)
    rest = _value({key: one for key, one in value.items() if key != first})
    return f"{value[first]} ({rest.removeprefix(': ')})" if rest else str(value[first])


def _package(name: str, found: Mapping[str, Any]) -> str:
    version = found.get("version")
    return f"{name} {version}" if version is not None else f"{name} is missing ({found['install']})"


def _joined(parts: list[str], most: int = MAX_ITEMS) -> str:
    more = [f"and {len(parts) - most:,} more"] if len(parts) > most else []
    return ", ".join(parts[:most] + more)


def _text(text: str) -> str:
    shown = escaped(str(text))
    return html.escape(shown if len(shown) <= MAX_TEXT else f"{shown[:MAX_TEXT]}…")


def _lines(what: str, texts: Sequence[str]) -> Iterator[str]:
    for text in texts[:MAX_ITEMS]:
        yield f"<p><b>{what}:</b> {html.escape(escaped(text))}</p>"
    if len(texts) > MAX_ITEMS:
        yield f"<p>and {len(texts) - MAX_ITEMS:,} more</p>"


def _picture(heat: Mapping[str, Any] | None) -> str:
    """The heat map as an image within the page; nothing without matplotlib."""
    if heat is None:
        return ""
    from streamshard.commands.picture import drawn, rendered

    try:
        image = base64.b64encode(rendered(drawn(heat), "png")).decode()
    except UsageError:
        return f"<p>(with matplotlib there is a picture here: {install('matplotlib')})</p>"
    source = f"data:image/png;base64,{image}"
    return f"<img style='max-width:100%' alt='relative change by layers' src='{source}'>"
