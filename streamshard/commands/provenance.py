"""Whether adapters and base belong together, as far as their records and names tell."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from streamshard.checkpoint.file_names import REPORT_NAME
from streamshard.checkpoint.json_files import read_json_object
from streamshard.checkpoint.record import MAX_RECORD_BYTES
from streamshard.commands.identify import Model
from streamshard.disk.existence import is_file
from streamshard.disk.system import reading
from streamshard.errors import AdapterError, InputError, listed, printable

__all__ = ["check_record", "other_base"]


def other_base(stated: object, base: Model) -> list[str]:
    """A warning if adapter and base are of InternVL models of different names.

    Fine-tunes have any name, and shapes of several models are the same: nothing is certain here.
    """
    mine, theirs = (
        re.sub(r"[-_](?:hf|merged|custom)$|[^a-z0-9]", "", Path(str(name)).name.lower())
        for name in (base.path.absolute(), stated)
    )
    if mine == theirs or not all(name.startswith("internvl") for name in (mine, theirs)):
        return []
    return [
        f"the adapter was trained on {printable(str(stated))}, by its config, and this base is "
        f"{base.where}: the shapes fit, but make sure that it is the right base"
    ]


def check_record(base: Model, facts: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a base which streamshard itself has merged one of these adapters into."""
    record = base.path / REPORT_NAME
    with reading(record):
        if not is_file(record):
            return
    try:
        earlier = read_json_object(record, MAX_RECORD_BYTES).get("adapters")
    except InputError:  # somebody else's file
        return
    known = (
        {str(e.get("digest")) for e in earlier if isinstance(e, dict)}
        if isinstance(earlier, list)
        else ()
    )
    twice = [f["file"] for f in facts if f.get("digest") is not None and f["digest"] in known]
    if twice:
        raise AdapterError(
            f"{base.where}: {listed(twice)} is in this base already, by its "
            f"{REPORT_NAME}: merging would add it once more. Give the base that the adapter was trained "
            "on; if this is meant, pass --allow-merged-base."
        )
