"""The record of an output that is on the hub, read from there."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from streamshard.checkpoint.hub_client import Listed
from streamshard.checkpoint.hub_sending import again, sending
from streamshard.checkpoint.record import read_record
from streamshard.checkpoint.sent_files import Placed
from streamshard.disk.inputs import watching
from streamshard.errors import InputError

__all__ = ["record_at"]


def record_at(repo: str, commit: str, name: str, tree: Mapping[str, Listed]) -> Placed | None:
    """A commit with these files, and its record of that name; None if there is no whole one."""
    if name not in tree:
        return None
    from huggingface_hub import hf_hub_download

    with tempfile.TemporaryDirectory(prefix="streamshard-") as folder:  # no model is to be cached
        with sending(repo, f"reading its {name}"):
            get = partial(hf_hub_download, repo, name, revision=commit, cache_dir=folder)
            path = Path(again(get))
        try:
            with watching():  # of its own: it is no input of the run, and goes
                record = read_record(path)
        except InputError:
            return None
    return Placed(commit, record, {file.name: file.nbytes for file in tree.values()})
