"""`environment`: what runs here and with what, as a bug report needs it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import sys
import time

from streamshard.commands.public import public
from streamshard.disk.system import system
from streamshard.engine.report import Report, finished, new_report
from streamshard.extras import EXTRAS, NEEDED, install
from streamshard.tensors.kernel import VARIABLE, available, chosen
from streamshard.wording import spoken

__all__ = ["environment"]

_FEATURES = re.compile(r"avx\w*|amx\w*|fma|f16c|sse4_2|asimd\w*|sve\w*|bf16|neon")
_HEARD = (VARIABLE, "STREAMSHARD_READ", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET", "NO_COLOR")
"""Variables of the environment that decide how this runs, and hold nothing private."""


@public
def environment() -> Report:
    """Versions, the kernel in use and those that could be, the processor's features, and packages.

    `gil` says whether threads of Python take turns: not in free-threaded builds, as long as nothing that
    is imported turns it on. Of each package of `packages` there are its `version`, None if it is not
    installed, what it is `for` if it is optional, and the command that would `install` it. Nothing of
    them is imported.
    """
    started = time.perf_counter()
    packages = {
        name: {"version": _version(name), "for": None, "install": install(name)} for name in NEEDED
    }
    packages |= {
        name: {
            "version": _version(name),
            "for": spoken(purpose),
            "install": install(name),
        }
        for name, purpose in EXTRAS.items()
    }
    report = {
        **new_report("env", {}, None),
        "python": ".".join(map(str, sys.version_info[:3])),
        "gil": getattr(sys, "_is_gil_enabled", lambda: True)(),
        "platform": _platform(),
        "processor": _processor(),
        "kernel": chosen(),
        "kernels": list(available()),
        "maps_files": importlib.util.find_spec("streamshard.disk._mapping") is not None,
        "packages": packages,
        "variables": {name: os.environ[name] for name in _HEARD if name in os.environ},
    }
    return finished(report, started)


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _platform() -> str:
    if sys.platform == "win32":
        return sys.platform
    found = os.uname()
    return f"{found.sysname} {found.release} {found.machine}"


def _processor() -> dict[str, object]:
    """How many there are, what they are called, and which instructions they have, where that is told."""
    name, features = None, []
    with contextlib.suppress(OSError):
        text = system.read_text("/proc/cpuinfo")
        named = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
        name = named and named[1].strip()
        words = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
        features = [one for one in words[1].split() if _FEATURES.fullmatch(one)] if words else []
    return {"count": os.cpu_count(), "name": name, "features": sorted(features)}
