"""What files there are in the folder that parts of an output share, and what each is called.

`.NAME.parts` has, beside the finished shards under their own names, a record of each, and the plan that
all of it belongs to; of an output that goes elsewhere a record of each shard that was sent, too, and of
what was there before. The plan stands in a folder of its own, since of two folders that are renamed to
one name the first wins, on every disk. Whoever writes has a token: what is not finished is called by it,
so that nobody ever writes to a file of somebody else's, and a lock of that name is held as long.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from streamshard.checkpoint.sent_files import SentFile
from streamshard.disk.files import read_bytes
from streamshard.disk.folders import exists
from streamshard.engine.fingerprint import Identity, identity_digest
from streamshard.engine.journal import MAX_NBYTES, Elsewhere, FinishedShard, from_line, line_of
from streamshard.engine.long_names import beside
from streamshard.engine.outlet import Outlet
from streamshard.errors import InputError, OutputError
from streamshard.values import frozen

__all__ = [
    "PLAN_FILE",
    "PLAN_FOLDER",
    "SEEN_FILE",
    "Shared",
    "final_names",
    "fresh_token",
    "lock_name",
    "names_of",
    "plan_line",
    "plan_temporary",
    "read_plan",
    "read_seen",
    "read_sent",
    "read_shard",
    "record_name",
    "seen_line",
    "sent_line",
    "sent_name",
    "shard_line",
    "shared_by",
    "temporary_name",
    "tokens_in",
]


PLAN_FOLDER = "plan"
PLAN_FILE = "identity.json"
SEEN_FILE = "seen.json"
_TOKEN = re.compile(r"(?:^|\.)([0-9a-f]{16})\.(?:part|lock)$")


@frozen
class Shared:
    """What all parts of an output are of: the identity of their plan, and its shards."""

    identity: Identity
    digest: str
    """That of the identity, by which records say to which plan they belong."""
    shards: tuple[str, ...]

    @property
    def sends(self) -> bool:
        """Whether shards are sent elsewhere."""
        return _TO in self.identity["options"]

    @property
    def goes(self) -> bool:
        """Whether a shard is removed here once it is sent."""
        return self.sends and not self.identity["options"].get(_STAYS)


_TO, _STAYS = "push_to", "output"


def shared_by(identity: Identity, shards: Iterable[str], outlet: Outlet | None = None) -> Shared:
    """What parts of an output of this identity share: where it goes counts, too."""
    if outlet is not None:
        where = {_TO: outlet.key, _STAYS: outlet.keeps}
        identity = {**identity, "options": {**identity["options"], **where}}
    plain = json.loads(json.dumps(identity))  # as it will be read
    return Shared(plain, identity_digest(plain), tuple(shards))


def fresh_token() -> str:
    """What nobody else has."""
    return os.urandom(8).hex()


def lock_name(token: str) -> str:
    """The lock of whoever has this token."""
    return f"{token}.lock"


def temporary_name(name: str, token: str) -> str:
    """What a file is called while it is being written."""
    return beside("", name, f".{token}.part")


def record_name(shard: str) -> str:
    """The record of a shard that is finished."""
    return beside("", shard, ".done")


def sent_name(shard: str) -> str:
    """The record of a shard that was sent."""
    return beside("", shard, ".sent")


def tokens_in(names: Iterable[str]) -> set[str]:
    """The tokens by which files are called."""
    return {found[1] for name in names if (found := _TOKEN.search(name)) is not None}


def final_names(shards: Iterable[str]) -> set[str]:
    """Every file that is what it is called, beside the plan."""
    each = ((shard, record_name(shard), sent_name(shard)) for shard in shards)
    return {SEEN_FILE, *(name for names in each for name in names)}


def names_of(shards: Iterable[str], tokens: Collection[str]) -> set[str]:
    """Every file that parts may make, by its name relative to their folder."""
    final = final_names(shards)
    temporary = {temporary_name(name, token) for name in final for token in tokens}
    plans = {f"{folder}/{PLAN_FILE}" for folder in [PLAN_FOLDER, *map(plan_temporary, tokens)]}
    return {*final, *temporary, *plans, *map(lock_name, tokens)}


def plan_temporary(token: str) -> str:
    """The folder in which a plan is written before it is that of all."""
    return temporary_name(PLAN_FOLDER, token)


def plan_line(shared: Shared) -> bytes:
    """The content of the file that says what the parts are of."""
    return line_of({"plan": shared.identity, "digest": shared.digest, "shards": shared.shards})


def read_plan(folder: Path) -> Shared | None:
    """What the parts in a folder are of; None if nobody has said it yet."""
    file = folder / PLAN_FOLDER / PLAN_FILE
    if not exists(file):
        return None
    try:
        record = from_line(read_bytes(file, MAX_NBYTES))
        identity, digest, shards = (record[key] for key in ("plan", "digest", "shards"))
        return Shared({**identity}, str(digest), tuple(str(name) for name in shards))
    except InputError:  # it is being removed
        return None
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise OutputError.at(
            file,
            "says what the parts here belong to, and is not as it was written. Remove the folder in "
            "which it is, and run all parts again.",
        ) from error


def shard_line(shard: FinishedShard, digest: str) -> bytes:
    """The record of a finished shard."""
    return line_of({"of": digest, **shard.record()})


def read_shard(folder: Path, shard: str, digest: str) -> FinishedShard | None:
    """The record of a shard; None if there is none of this plan that is whole."""
    record = _record_in(folder / record_name(shard), digest)
    try:
        found = None if record is None else FinishedShard.from_record(record)
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return found if found is not None and found.name == shard else None


def sent_line(shard: str, file: SentFile | None, digest: str) -> bytes:
    """The record of a shard that was sent, as this `file`; None if it is put there with all the rest."""
    return line_of({"of": digest, "shard": shard, "file": None if file is None else file.record()})


def read_sent(folder: Path, shard: str, digest: str) -> Elsewhere:
    """What is noted of the sending of a shard, if anything."""
    record = _record_in(folder / sent_name(shard), digest)
    try:
        if record is None or record["shard"] != shard:
            return Elsewhere()
        if record["file"] is None:
            return Elsewhere(stays={shard})
        return Elsewhere(sent={shard: SentFile.from_record(record["file"])})
    except (KeyError, TypeError, ValueError, OverflowError):
        return Elsewhere()


def seen_line(version: str, digest: str) -> bytes:
    """What says which version of what is there was built on."""
    return line_of({"of": digest, "seen": version})


def read_seen(folder: Path, digest: str) -> str | None:
    """That version; None if it is not noted."""
    record = _record_in(folder / SEEN_FILE, digest)
    found = None if record is None else record.get("seen")
    return found if isinstance(found, str) else None


def _record_in(file: Path, digest: str) -> dict[str, Any] | None:
    """The record in a file; None if there is none of this plan that is whole."""
    try:
        record: Any = from_line(read_bytes(file, MAX_NBYTES)) if exists(file) else None
    except (InputError, ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and record.get("of") == digest else None
