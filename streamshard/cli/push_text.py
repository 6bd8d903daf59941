"""What is said of an output that goes to the hub, or went there."""

from __future__ import annotations

from typing import Any

from streamshard.cli.amounts import files_text, shortened
from streamshard.errors import bytes_text

__all__ = ["place_text", "pushed_text"]


def place_text(report: dict[str, Any]) -> str:
    """Where an output is: a folder, or where it can be seen on the hub."""
    return str(report["output"] or report["pushed"]["repository"])


def pushed_text(report: dict[str, Any]) -> list[str]:
    """What goes to the hub, or went there."""
    pushed, plan = report.get("pushed"), report.get("plan")
    if pushed is None:
        return []
    files = files_text(len(pushed["files"]))
    if plan is None:
        return [f"  pushed: {files} in one commit, {pushed['url']}"]
    if plan["committed"] is not None:
        return [
            f"  Pushed to {pushed['repository']} already, by the run that was interrupted: "
            f"{pushed['url']}. The same command ends that run, and sends nothing."
        ]
    new = (
        "a new repository" if pushed["commit"] is None else f"on its commit {pushed['commit'][:12]}"
    )
    new += ", private" if pushed["private"] else ""
    lines = [f"  Pushed to {pushed['repository']} ({new}): {files} in one commit."]
    if plan["on_disk"] is not None:
        each = ", of each part" if report["part"] else ""
        lines.append(
            f"  At most {files_text(plan['on_disk'])} of weights on disk at a time{each}, "
            f"{bytes_text(min(plan['disk_bytes'], report['bytes']))}; nothing stays here."
        )
    lines += [
        f"  There {_are(pushed[what])} {what}: {shortened(pushed[what])}."
        for what in ("replaced", "deleted")
        if pushed[what]
    ]
    return lines


def _are(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"
