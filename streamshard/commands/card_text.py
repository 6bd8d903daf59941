"""What a model card says in words: what was done, from what, how exactly, and how to use the result.

All of it follows from the report, but for times and memory, so that a run gives the same card as often
as it is run. Names are from files of others: they are shown as code, which makes nothing of them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from streamshard.errors import printable
from streamshard.values import frozen
from streamshard.version import __version__

__all__ = ["Facts", "body"]


@frozen(kw_only=True)
class Facts:
    """What is known before the run, and no report says."""

    kind: str
    """"merge" of adapters, "checkpoint" with its pairs inside, or "conversion"."""
    source: str | None
    """The repository on the hub that the model is from."""
    source_by: str | None
    """What tells that: the "hub" itself, "adapter" (its config), "reference" or "card" (the base's)."""
    commit: str | None
    adapters: tuple[str, ...] = ()
    adapter_licences: tuple[str, ...] = ()
    licence: str | None
    layout: str | None
    was: str | None
    """The layout of the source."""
    loader: str | None
    is_relative: bool = False
    dtype: str


_LAYOUTS = {
    "custom": "custom (`InternVLChatModel`, with remote code)",
    "hf": "HF (`InternVLForConditionalGeneration`)",
}


def body(facts: Facts, report: Mapping[str, Any]) -> str:
    """The card below its front matter, in Markdown."""
    path = os.path.abspath(str(report.get("base") or report.get("source")))  # noqa: PTH100 - of any text
    name = _code(str(facts.source) if facts.source_by == "hub" else PurePath(path).name)
    parts = [_title(facts, name), _introduction(facts, name)]
    if report.get("adapters") and facts.kind == "merge":
        parts.append(_adapters(facts, report["adapters"]))
    parts += ["## What was done", "\n".join(f"- {one}" for one in _done(facts, report, name))]
    parts += _use(facts)
    return "\n" + "\n\n".join(parts) + "\n"


def _title(facts: Facts, name: str) -> str:
    if facts.kind == "conversion":
        return f"# {name} in the {_short(facts.layout)} layout"
    return f"# {name} with LoRA merged"


def _short(layout: str | None) -> str:
    return "HF" if layout == "hf" else str(layout)


def _introduction(facts: Facts, name: str) -> str:
    text = {
        "merge": f"The weights of {name} with {_count(len(facts.adapters), 'LoRA adapter')} merged into "
        "them",
        "checkpoint": f"The training checkpoint {name} with the LoRA pairs inside it merged into its "
        "weights",
        "conversion": f"The weights of {name}, converted from the {_short(facts.was)} to the "
        f"{_short(facts.layout)} layout",
    }[facts.kind]
    text += f", by streamshard {__version__}."
    text += " Nothing was trained." if facts.kind == "conversion" else ""
    at = "" if facts.commit is None else f" at commit `{facts.commit}`"
    link = f"[{facts.source}](https://huggingface.co/{facts.source})"
    text += {
        "hub": f" They are from {link}{at}.",
        "adapter": f" By the adapter's config, it was trained on {link}.",
        "reference": f" The original model, from which its code was taken, is {link}.",
        "card": f" By the card of {name}, that is from {link}.",
        None: "",
    }[facts.source_by]
    return text + " This card was generated, and says nothing of how well the model does."


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _adapters(facts: Facts, adapters: Sequence[Mapping[str, Any]]) -> str:
    rows = ["| adapter | kind | rank | alpha | scale | weight |", "|---|---|---|---|---|---|"]
    for name, adapter in zip(facts.adapters, adapters, strict=True):
        scales = ", ".join(adapter["scalings"])
        pairs = (str(adapter["r"]), f"{adapter['lora_alpha']:g}") if scales else ("", "")
        cells = [_code(name), ", ".join(adapter["kinds"]), *pairs, scales, f"{adapter['weight']:g}"]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _done(facts: Facts, report: Mapping[str, Any], name: str) -> list[str]:
    l2, update, exactness = report.get("l2"), report.get("update"), report.get("exactness")
    lines = []
    layout = _LAYOUTS.get(str(facts.layout)) if not facts.is_relative else None
    if layout is not None:
        before = (
            "" if facts.was == facts.layout else f", converted from the {_short(facts.was)} one"
        )
        lines.append(f"Layout: {layout}{before}.")
    if facts.kind != "conversion":
        rest = "; every other is as it was" if facts.dtype == "keep" else ""
        lines.append(f"{report['merged']:,} tensors of {name} were changed{rest}.")
    if facts.dtype != "keep":
        lines.append(f"All float tensors were rounded to {facts.dtype}, once.")
    if facts.kind == "conversion" and facts.dtype == "keep":
        lines.append(
            f"All {report['tensors']:,} tensors have the values of their source, bit for bit; some are "
            "joined or split."
        )
    if exactness is not None:
        lines.append(
            f"Each of {exactness['elements']:,} merged elements is the exact value that base and "
            "adapters define, rounded once to nearest even."
        )
    if update is not None:
        lines.append(
            f"Norm of the update: {_number(update['intended'])}; after rounding "
            f"{_number(update['effected'])}. {update['unchanged']:.1%} of its elements change nothing."
        )
    if l2 is not None and l2["compared"]:
        other = name if facts.kind != "conversion" else "the reference's weights"
        lines.append(
            f"L2 distance from {other}: {_number(l2['global'])} over all elements of "
            f"{_count(l2['compared'], 'tensor')}; sum of the tensors' {_number(l2['sum'])}, per "
            f"parameter {_number(l2['per_parameter'])}."
        )
    lines += [
        f"{key.capitalize()}, of {_count(len(report[key]), 'tensor')}: {_some(report[key])}."
        for key in ("missing", "unexpected")
        if report.get(key)
    ]
    pairs = zip(facts.adapters, facts.adapter_licences, strict=True) if facts.adapters else ()
    lines += [
        f"The licence that the adapter {_code(adapter)} states is {_code(licence)}."
        for adapter, licence in pairs
        if licence and licence != facts.licence
    ]
    if facts.licence is None:
        lines.append(f"No licence is known: see that of {name}.")
    lines.append(
        "`streamshard.json` has all of this, and the digest of every tensor and file; `streamshard "
        "verify` compares them."
    )
    return lines


def _some(names: Sequence[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(map(_code, names[:limit])) + more


def _use(facts: Facts) -> list[str]:
    """How to load and to serve it."""
    if facts.loader is None:
        return []
    if facts.loader == "code":
        return [
            "## Use",
            "The folder lacks the remote code (`*.py`) that this layout is loaded with: copy it from the "
            "original model.",
        ]
    remote = facts.layout == "custom" or facts.loader != "AutoModelForImageTextToText"
    trust = ", trust_remote_code=True" if remote else ""
    other = "AutoTokenizer" if facts.layout == "custom" else "AutoProcessor"
    vision = "" if facts.layout == "custom" else ", and torchvision for images"
    variable = "tokenizer" if facts.layout == "custom" else "processor"
    code = [
        "## Use",
        f"With transformers (4.56 or later{vision}; `path` is this folder, or the id of this "
        "repository):",
        "```python\n"
        f"from transformers import {', '.join(sorted((facts.loader, other)))}\n\n"
        'path = "."\n'
        f'model = {facts.loader}.from_pretrained(path, dtype="auto"{trust}).eval()\n'
        f"{variable} = {other}.from_pretrained(path{trust})\n"
        "```",
    ]
    if facts.is_relative:
        return code
    flag = " --trust-remote-code" if remote else ""
    return [*code, "With vLLM:", f"```sh\nvllm serve .{flag}\n```"]


def _number(value: float) -> str:
    return format(value, ".4g")


def _code(text: str) -> str:
    """Text of others as code in Markdown, also within a table."""
    text = printable(text, 200).replace("|", "\\|") or " "
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text}{space}{fence}"
