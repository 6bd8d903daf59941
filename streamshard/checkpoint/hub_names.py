"""Names of repositories on the hub: whether a text is one, and which one a folder of its cache is of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from streamshard.disk.far import known_as, origins

__all__ = ["Origin", "is_repository", "origin_of"]


class Origin(NamedTuple):
    """A repository on the hub and the commit that files are of."""

    repository: str
    commit: str


# What is more likely a folder than an organization.
_FOLDERS = {
    *("adapters", "base", "base_models", "checkpoint", "checkpoints", "ckpt", "ckpts", "content"),
    *(
        "data",
        "demo",
        "downloads",
        "exp",
        "experiments",
        "export",
        "exports",
        "home",
        "llm",
        "lora",
    ),
    *("merged", "mnt", "model", "models", "out", "output", "outputs", "pretrained", "results"),
    *("pretrained_models", "root", "runs", "saves", "temp", "tmp", "user", "weights", "work"),
    *("work_dir", "work_dirs", "workspace"),
}
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
_ID = re.compile(rf"({_PART})/{_PART}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_repository(text: object) -> bool:
    """Whether a text is like `org/name`, and not rather a path of two folders.

    >>> [is_repository(one) for one in ("OpenGVLab/InternVL3-8B", "work_dirs/run-1", "/data/x", 7)]
    [True, False, False, False]
    """
    if not isinstance(text, str) or ".." in text or "--" in text:
        return False
    found = _ID.fullmatch(text)
    return found is not None and found[1].lower() not in _FOLDERS


def origin_of(path: Path) -> Origin | None:
    """Of which repository and commit a folder, or a file in it, of the hub's cache is.

    The cache has `models--ORG--NAME/snapshots/COMMIT/` for each. The like of a path that stands for
    files of the hub. None if it is elsewhere.
    """
    known = known_as(str(path.absolute()))
    for origin in (origins() or {}).values():
        name = "@".join(part for part in (origin["repository"], origin["revision"]) if part)
        if known == name or known.startswith(f"{name}/"):
            return Origin(origin["repository"], origin["commit"])
    parts = path.absolute().parts
    for place in range(len(parts) - 2):
        kind, *names = parts[place].split("--")
        if (
            (kind, len(names), parts[place + 1]) == ("models", 2, "snapshots")
            and _COMMIT.fullmatch(parts[place + 2])
            and _ID.fullmatch("/".join(names))
        ):
            return Origin("/".join(names), parts[place + 2])
    return None
