"""Ids of models on the hub, as people write them where a path is expected."""

from __future__ import annotations

import os
import re
from urllib.parse import unquote

from streamshard.disk.existence import has_name
from streamshard.errors import UsageError, printable
from streamshard.values import frozen

__all__ = ["HubId", "hub_id"]

SCHEME = "hf://"
# As the hub lets people call things: no doubled dash or dot, a letter or digit at the end.
_PART = r"[A-Za-z0-9](?:(?:(?!--|\.\.)[\w.-]){0,94}\w)?"
_REPO = rf"(?P<repo>{_PART}/{_PART})(?<!\.git)"
_ID = re.compile(rf"{_REPO}(?:@(?P<revision>\S*[^\s/]))?/?", re.ASCII)
_WITH_COLON = re.compile(rf"(?:{SCHEME})?{_REPO}:(?P<revision>[^\s/]+)", re.ASCII)
# A revision with slashes is told from the path of a file by its beginning.
_URL = re.compile(
    rf"{SCHEME}(?:models/)?{_REPO}"
    r"(?:@(?P<revision>refs/[^/\s]+/[^/\s]+|[^/\s]+))?(?:/(?P<inside>.*))?",
    re.ASCII,
)
# As a browser shows it, after the hub's own address.
_PAGE = re.compile(
    rf"{_REPO}"
    r"(?:/(?:tree|blob|resolve)/(?P<revision>refs/[^/\s]+/[^/\s]+|[^/\s]+)(?:/(?P<inside>.*))?)?/?",
    re.ASCII,
)
_WEB = re.compile(r"https?://|(?=(?:www\.)?(?:huggingface|hf)\.co/)", re.IGNORECASE)
_PUBLIC = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface|hf)\.co/", re.IGNORECASE)
_OTHERS = re.compile(r"(?:models/)?(datasets|spaces|kernels|buckets|collections|papers)/.*")
# What nobody calls a model.
_FILE = re.compile(r".*\.(?:safetensors|bin|pt|pth|ckpt|json|index)", re.IGNORECASE)


@frozen
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

    `org/name`, `org/name@revision` and `hf://org/name@revision/file` are, and the addresses that a
    browser shows of a model, its folders and files. Not what can only be a path:
    one that begins with a dot or with a name that is here, or that has more parts or a file's ending.
    With `only` no path can be meant. Raises `UsageError` for what is meant for the hub, and no model.
    """
    if text.startswith(SCHEME):
        _refuse_others(text, text.removeprefix(SCHEME))
        return _address(text, _URL.fullmatch(text))
    first = text.partition("/")[0]
    if _WEB.match(text) and (only or not has_name(first)):
        return _page(text)
    found = _ID.fullmatch(text)
    if found is None or (found["revision"] is None and _FILE.fullmatch(text)):
        colon = _WITH_COLON.fullmatch(text)
        if colon is not None and (only or not has_name(first)):
            raise UsageError(
                f"{printable(text)}: is no path here; a revision of a model on the hub is given as "
                f"{colon['repo']}@{printable(colon['revision'])}."
            )
        return None
    if not only and has_name(first):
        return None
    return HubId(found["repo"], found["revision"])


def _page(text: str) -> HubId:
    """What an address of a browser is of."""
    own = f"{(os.environ.get('HF_ENDPOINT') or 'https://huggingface.co').rstrip('/')}/"
    plain = re.split(r"[?#]", text, maxsplit=1)[0]
    public = _PUBLIC.match(plain)
    if plain.startswith(own):
        rest = plain.removeprefix(own)
    elif public is not None:  # of a model that a mirror has too
        rest = plain[public.end() :]
    else:
        raise UsageError(
            f"{printable(text)}: is an address of something else than the hub ({own.rstrip('/')}); a "
            "model on the hub is given as org/name. Other files must be downloaded first."
        )
    _refuse_others(text, rest)
    return _address(text, _PAGE.fullmatch(rest.removesuffix(".git")))


def _refuse_others(text: str, rest: str) -> None:
    other = _OTHERS.fullmatch(rest)
    if other is not None:
        raise UsageError(
            f"{printable(text)}: is no model: that is among the {other[1]} of the hub. Give a model, as "
            "org/name."
        )


def _address(text: str, found: re.Match[str] | None) -> HubId:
    inside = "" if found is None else (found["inside"] or "").rstrip("/")
    if not text.startswith(SCHEME):
        inside = unquote(inside)
    if found is None or any(part in ("", ".", "..") for part in inside.split("/") if inside):
        raise UsageError(
            f"{printable(text)}: is no address of a model on the hub; they are like "
            f"org/name, org/name@revision or {SCHEME}org/name@revision/folder."
        )
    revision = found["revision"]
    return HubId(found["repo"], None if revision is None else unquote(revision), inside)
