"""What is printed of an output that is not complete: of a dry run, and of one part of several."""

from __future__ import annotations

from typing import Any

from streamshard.cli.push_text import place_text, pushed_text
from streamshard.errors import bytes_text

__all__ = ["is_complete", "part_text", "plan_text"]


MOST_LINES = 20


def is_complete(report: dict[str, Any]) -> bool:
    """Whether the output that a report is about is there."""
    part = report.get("part")
    return not report.get("dry_run") and (part is None or bool(part["complete"]))


def plan_text(report: dict[str, Any]) -> str:
    """What `--dry-run` prints."""
    plan = report["plan"]
    files = [f"  {file['name']}  {bytes_text(file['bytes'])}" for file in plan["files"]]
    free = "free space unknown"
    if plan["free_bytes"] is not None:
        free = f"{bytes_text(plan['free_bytes'])} free on that disk"
    changed = (
        f"{report['pairs']} LoRA pairs are written"
        if "pairs" in report
        else f"{report['tensors']} tensors are converted"
        if report["merged"] is None
        else f"{report['merged']} tensors get an update"
    )
    return "\n".join(
        [
            f"Would write {place_text(report)} ({bytes_text(report['bytes'])}; {free}):",
            *_download(plan),
            *pushed_text(report),
            *files[:MOST_LINES],
            *([f"  and {len(files) - MOST_LINES} more files"] if len(files) > MOST_LINES else []),
            *_divided(report),
            f"{changed}; {plan['workers']} threads, about {bytes_text(plan['memory_bytes'])} of memory.",
            *_continued(report),
            "Nothing was written.",
        ]
    )


def _download(plan: dict[str, Any]) -> list[str]:
    if not plan["download_bytes"]:
        return []
    free = plan["download_free_bytes"]
    room = "" if free is None else f" ({bytes_text(free)} free on that disk)"
    return [
        f"  Before, {bytes_text(plan['download_bytes'])} are downloaded into the hub's cache{room}."
    ]


def _continued(report: dict[str, Any]) -> list[str]:
    if not report["resumed"]:
        return []
    done = f"{report['resumed']} of {report['shards']} files are done"
    return [f"Would continue an interrupted run: {done}."]


def _divided(report: dict[str, Any]) -> list[str]:
    """Which part does what."""
    part, parts = report["part"], report["plan"].get("parts")
    if not part:
        return []
    lines = [
        f"  {'->' if one['part'] == part['part'] else '  '} part {one['part']}: "
        f"{_files(one['files'])}, {bytes_text(one['bytes'])}"
        for one in parts
    ]
    own = next((at for at, one in enumerate(parts) if one["part"] == part["part"]), 0)
    first = max(min(own - MOST_LINES // 2, len(lines) - MOST_LINES), 0)
    shown = lines[first : first + MOST_LINES]
    more = [f"     and {len(lines) - len(shown)} more parts"] if len(lines) > len(shown) else []
    return [*shown, *more, f"  {_how_far(report)}"]


def _files(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} files" if names else "nothing"


def _how_far(report: dict[str, Any]) -> str:
    part = report["part"]
    return f"{part['finished']} of {report['shards']} files of the output are finished."


def part_text(report: dict[str, Any]) -> str:
    """What a part prints that was not the last one."""
    part, files = report["part"], len(report["part"]["files"])
    again = f", {part['resumed']} of these before" if part["resumed"] else ""
    done = "is written" if report["pushed"] is None else "is uploaded"
    end = (
        "It is being completed by another process, or by --part finish."
        if part["finished"] == report["shards"]
        else "The last part completes it; if that does not come about, --part finish does."
    )
    return "\n".join(
        [
            f"Part {part['part']} of {place_text(report)} {done}: {files} of {report['shards']} files "
            f"({bytes_text(part['bytes'])}){again}, in {report['seconds']:.1f} s",
            f"  {_how_far(report)} {end}",
        ]
    )
