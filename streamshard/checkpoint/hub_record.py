"""What is on the hub already where an output goes: the head of the repository, and the record in it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from streamshard.checkpoint.hub_client import Listed
from streamshard.checkpoint.hub_operations import quiet
from streamshard.checkpoint.hub_sending import again, sending
from streamshard.checkpoint.record import read_record
from streamshard.checkpoint.sent_files import Placed
from streamshard.disk.inputs import watching
from streamshard.disk.temporary import temporary_folder
from streamshard.errors import InputError

__all__ = ["head_of", "record_at"]


def record_at(repo: str, commit: str, name: str, tree: Mapping[str, Listed]) -> Placed | None:
    """A commit with these files, and its record of that name; None if there is no whole one."""
    if name not in tree:
        return None
    from huggingface_hub import hf_hub_download

    with temporary_folder() as folder:  # no model is to be cached
        with sending(repo, f"reading its {name}"), quiet():
            get = partial(hf_hub_download, repo, name, revision=commit, cache_dir=folder)
            path = Path(again(get))
        try:
            with watching():  # of its own: it is no input of the run, and goes
                record = read_record(path)
        except InputError:
            return None
    return Placed(commit, record, {file.name: file.nbytes for file in tree.values()})


def head_of(repo: str) -> tuple[str, bool] | None:
    """The commit of the main branch, and whether the repository is private; None if there is none."""
    from huggingface_hub import HfApi

    def ask() -> Any:
        try:
            return HfApi().repo_info(repo)
        except Exception as error:
            kinds = {kind.__name__ for kind in type(error).__mro__}
            if "RepositoryNotFoundError" in kinds and "GatedRepoError" not in kinds:
                return None
            raise

    with sending(repo, "looking at it"):
        found = again(ask)
    return None if found is None else (str(found.sha), bool(found.private))
