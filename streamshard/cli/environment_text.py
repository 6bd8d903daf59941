"""What `env` prints: lines to be pasted into a bug report."""

from __future__ import annotations

from typing import Any

__all__ = ["environment_text"]


def environment_text(report: dict[str, Any]) -> str:
    """What `env` prints."""
    processor = report["processor"]
    python = f"Python {report['python']}{'' if report['gil'] else ' without a GIL'}"
    lines = [
        f"streamshard {report['version']}, {python}, {report['platform']}",
        f"  processors: {processor['count']}, {processor['name'] or 'of an unknown name'}",
        f"  features: {' '.join(processor['features']) or 'unknown'}",
        f"  kernel in use: {report['kernel']} (can run here: {', '.join(report['kernels'])})",
        f"  files are {'mapped' if report['maps_files'] else 'read, as nothing was compiled'}",
    ]
    lines += [f"  {name}={value}" for name, value in report["variables"].items()]
    for name, package in report["packages"].items():
        if package["version"] is not None:
            lines.append(f"  {name} {package['version']}")
            continue
        purpose = f"; {package['for']}" if package["for"] else ""
        lines.append(f"  {name}: missing{purpose}: {package['install']}")
    return "\n".join(lines)
