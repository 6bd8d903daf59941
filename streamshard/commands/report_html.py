"""How a notebook shows a report: a table of what it says, its warnings, and the picture of a change.

Nothing in it is read as HTML that is not of this module: names of files and tensors are escaped.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from streamshard.errors import UsageError, bytes_text, escaped
from streamshard.extras import install

__all__ = ["report_html"]

_ELSEWHERE = {"command", "version", "warnings", "problems", "heat_map", "sources"}
_BYTES = ("bytes", "nbytes")
MAX_ROWS, MAX_ITEMS, MAX_TEXT = 40, 8, 300


def report_html(report: Mapping[str, Any]) -> str:
    """A report as HTML. The picture needs a `heat_map` in it, and matplotlib."""
    rows = [
        f"<tr><th style='text-align:left'>{_text(key)}</th>"
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
    """What a report has to say; what does not apply is null or empty."""
    for key, value in report.items():
        if key in _ELSEWHERE or value is None or value is False or value in ([], {}, ""):
            continue
        yield key, value


def _value(value: Any, key: str = "") -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return bytes_text(value) if key.rpartition("_")[2] in _BYTES else f"{value:,}"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return _joined([f"{k} {_value(v, str(k))}" for k, v in value.items() if v is not None])
    if isinstance(value, Sequence) and not isinstance(value, str):
        return _joined([_value(one) for one in value])
    return str(value)


def _joined(parts: list[str]) -> str:
    more = [f"and {len(parts) - MAX_ITEMS:,} more"] if len(parts) > MAX_ITEMS else []
    return ", ".join(parts[:MAX_ITEMS] + more)


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
