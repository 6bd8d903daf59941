"""Inputs that are ids of models on the hub, as folders of this machine, for as long as a command runs.

What names an input of a command is looked at here, before the command sees it: what is a path stays as
it is, and of an id a folder is made that stands for it (`checkpoint/hub.py`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamshard.checkpoint.hub_ids import HubId, hub_id
from streamshard.disk.existence import has_name
from streamshard.disk.far import Origin, known_as, sources_of
from streamshard.disk.paths import input_path
from streamshard.errors import StreamshardError, UsageError, printable

if TYPE_CHECKING:
    from streamshard.checkpoint.hub_client import Client

__all__ = ["hub_inputs"]

_INPUTS = {
    "merge_lora": ("adapter", "base", "checkpoint", "reference"),
    "hf_to_custom": ("hf_path", "custom_path"),
    "custom_to_hf": ("custom_path", "hf_path"),
    "wrap_lora": ("base",),
    "extract_lora": ("checkpoint", "base"),
    "diff": ("a", "b"),
    "verify": ("path",),
    "inspect": ("path",),
    "environment": (),
}
"""What names an input, of each command; in the order in which they are opened."""
_REVISION_OF = {
    "merge_lora": ("base", "checkpoint"),
    "hf_to_custom": ("hf_path",),
    "custom_to_hf": ("custom_path",),
    "wrap_lora": ("base",),
    "extract_lora": ("base", "checkpoint"),
    "verify": ("path",),
    "inspect": ("path",),
}
"""Whose revision `revision` is: of the first one that is given."""
_OPTIONS = ("revision", "cache_dir", "offline", "stream")


@contextlib.contextmanager
def hub_inputs(command: str, given: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The arguments of a command, with paths in place of ids on the hub, and without the hub's options.

    Raises `HubError` for what the hub does not give.
    """
    plain = {name: value for name, value in given.items() if name not in _OPTIONS}
    asked = {name: _ids(plain[name]) for name in _INPUTS[command] if plain.get(name) is not None}
    _add_revision(command, asked, plain, given.get("revision"))
    against = plain.get("against")
    if against is None and not any(one is not None for ids in asked.values() for one in ids):
        yield plain
        return
    with _Views(command, given) as views:
        if against is not None:
            plain["against"] = views.client.published(_published(against))
        _open_all(views, asked, plain)
        token = sources_of.set(views.origins)
        try:
            yield plain
        except StreamshardError as error:
            error.args = (known_as(str(error)), *error.args[1:])
            raise
        finally:
            sources_of.reset(token)


def _open_all(
    views: _Views, asked: Mapping[str, list[HubId | None]], plain: dict[str, Any]
) -> None:
    """Put paths in place of the ids."""
    for name, ids in asked.items():
        values = _values(plain[name])
        roles = (
            [name] if len(ids) == 1 else [f"{name}_{number}" for number in range(1, len(ids) + 1)]
        )
        found = [
            value if one is None else views.open(role, one)
            for role, value, one in zip(roles, values, ids, strict=True)
        ]
        plain[name] = found if _is_several(plain[name]) else found[0]


class _Views:
    """The folders that stand for models on the hub; they go when the block ends."""

    def __init__(self, command: str, given: Mapping[str, Any]) -> None:
        self.origins: dict[str, Origin] = {}
        self._command, self._given = command, given
        self._stack = contextlib.ExitStack()
        self._around: Path | None = None
        self._client: Client | None = None

    def __enter__(self) -> _Views:  # noqa: PYI034 - Self needs Python 3.11
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def client(self) -> Client:
        """What asks the hub."""
        from streamshard.checkpoint.hub_client import Client

        if self._client is None:
            cache = self._given.get("cache_dir")
            cache = None if cache is None else input_path(cache, "the cache")
            self._client = Client.of(cache, offline=bool(self._given.get("offline")))
        return self._client

    def open(self, role: str, asked: HubId) -> Path:
        """The path that stands for a model."""
        from streamshard.checkpoint.hub import View

        if self._around is None:
            from streamshard.disk.temporary import temporary_folder

            self._around = self._stack.enter_context(temporary_folder())
        view = View(
            asked,
            self.client,
            self._around / str(len(self.origins)),
            stream=bool(self._given.get("stream")),
            heads_only=self._command in ("inspect", "diff"),
        )
        self._stack.callback(view.close)
        self.origins[role] = view
        return view.path


def _is_several(value: object) -> bool:
    return not isinstance(value, (str, bytes, os.PathLike)) and isinstance(value, Iterable)


def _values(value: Any) -> list[Any]:
    return list(value) if _is_several(value) else [value]


def _ids(value: Any) -> list[HubId | None]:
    """What of one argument, or of several, is an id on the hub."""
    return [_id(one) for one in _values(value)]


def _id(value: object) -> HubId | None:
    if not isinstance(value, str):
        return None
    return None if has_name(value) else hub_id(value)


def _published(text: object) -> HubId:
    """The model that an output is compared with."""
    found = hub_id(text, only=True) if isinstance(text, str) else None
    if found is None or found.inside:
        raise UsageError(
            f"--against is {printable(repr(text))}; a model on the hub it is: ORG/NAME@REVISION."
        )
    return found


def _add_revision(
    command: str, asked: dict[str, list[HubId | None]], plain: Mapping[str, Any], revision: object
) -> None:
    """Have the option `revision` be that of the base; `UsageError` if that has none, or its own."""
    if revision is None:
        return
    name = next((one for one in _REVISION_OF.get(command, ()) if one in asked), None)
    found = None if name is None else asked[name][0]
    if not isinstance(revision, str) or not revision or revision.split() != [revision]:
        raise UsageError(
            f"--revision is {printable(repr(revision))}; a branch, tag or commit it is."
        )
    if name is None or found is None:
        what = "" if name is None else f": {printable(str(plain[name]))} is none"
        raise UsageError(f"--revision is for a model on the hub (org/name){what}. Leave it out.")
    if found.revision not in (None, revision):
        raise UsageError(
            f"--revision is {printable(revision)}, but {printable(str(found))} names another one. Give "
            "one of the two."
        )
    asked[name] = [HubId(found.repo, revision, found.inside)]
