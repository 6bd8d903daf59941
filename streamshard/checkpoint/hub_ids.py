"""Ids of models on the hub, as people write them where a path is expected."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote

from streamshard.disk.existence import has_name
from streamshard.errors import UsageError, printable

__all__ = ["HubId", "hub_id"]

SCHEME = "hf://"
_PART = r"[A-Za-z0-9][\w.-]{0,95}"
_ID = re.compile(rf"(?P<repo>{_PART}/{_PART})(?:@(?P<revision>\S+))?", re.ASCII)
# A revision with slashes is told from the path of a file by its beginning.
_URL = re.compile(
    rf"{SCHEME}(?:models/)?(?P<repo>{_PART}/{_PART})"
    r"(?:@(?P<revision>refs/[^/\s]+/[^/\s]+|[^/\s]+))?(?:/(?P<inside>.*))?",
    re.ASCII,
)
# What nobody calls a model.
_FILE = re.compile(r".*\.(?:safetensors|bin|pt|pth|ckpt|json|index)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class HubId:
    """A model on the hub: its repository, the revision that was asked for, and a path in it, if any."""

    repo: str
    revision: str | None = None
    inside: str = ""

    def __str__(self) -> str:
        """As it is told to people."""
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def hub_id(text: str, *, only: bool = False) -> HubId | None:
    """What an argument means at which no path of this machine is; None if it is no id of the hub.

    `org/name`, `org/name@revision` and `hf://org/name@revision/file` are. Not what can only be a path:
    one that begins with a dot or with a name that is here, or that has more parts or a file's ending.
    With `only` no path can be meant.
    """
    if text.startswith(SCHEME):
        found = _URL.fullmatch(text)
        inside = "" if found is None else (found["inside"] or "").rstrip("/")
        if found is None or any(part in ("", ".", "..") for part in inside.split("/") if inside):
            raise UsageError(
                f"{printable(text)}: is no address of a model on the hub; they are like "
                f"{SCHEME}org/name@revision."
            )
        revision = found["revision"]
        return HubId(found["repo"], None if revision is None else unquote(revision), inside)
    found = _ID.fullmatch(text)
    if found is None or (found["revision"] is None and _FILE.fullmatch(text)):
        return None
    if only:
        return HubId(found["repo"], found["revision"])
    first = text.partition("/")[0]
    return None if has_name(first) else HubId(found["repo"], found["revision"])
