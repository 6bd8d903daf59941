"""An output on its way to the hub: weights are uploaded one by one, and one commit puts all in place.

Until that commit the repository is as it was. Whether a commit whose answer was lost has happened is
told by the files that are there then, by their digests; and so is whether all went well.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from streamshard.checkpoint.file_names import CARD_NAME
from streamshard.checkpoint.hub_client import Client, Listed, Repository
from streamshard.checkpoint.hub_errors import LOG_IN, endpoint
from streamshard.checkpoint.hub_ids import HubId
from streamshard.checkpoint.hub_operations import (
    addition,
    deletion,
    is_left_out,
    is_uploaded,
    quiet,
    uploaded,
)
from streamshard.checkpoint.hub_record import head_of, record_at
from streamshard.checkpoint.hub_sending import HubStatusError, again, pause, sending
from streamshard.checkpoint.loaded_names import is_model, is_read
from streamshard.checkpoint.sent_files import MovedError, Placed, SentFile
from streamshard.errors import HubError, InputError, OutputError, listed, printable
from streamshard.values import frozen

__all__ = ["HubPush", "HubTarget"]

MAX_COMMITS = 100
"""Commits among which one of ours is looked for."""
SETTLES = 5
"""Times that the hub is asked for what it has just been given."""


@frozen
class HubTarget:
    """A repository before anything is sent: its head, and what a commit changes of it."""

    version: str | None
    replaced: Sequence[str] = ()
    deleted: Sequence[str] = ()
    warnings: Sequence[str] = ()


@frozen
class HubPush:
    """A repository that an output goes to; `keeps` says that it stays on this machine, too."""

    repo: str
    private: bool
    message: str | None
    keeps: bool

    @property
    def where(self) -> str:
        """What people are told."""
        return self.repo

    @property
    def key(self) -> str:
        """Hub and repository."""
        return f"{endpoint()}/{self.repo}"

    def unreachable(self, key: str) -> str:
        """Why this process cannot send to the repository with this key, in words; empty if it can."""
        from huggingface_hub import get_token

        if self.key != key:
            return f"it would push to {self.key}, and not to {key} (HF_ENDPOINT)"
        where = "set HF_TOKEN where it is started, or log in there (hf auth login)"
        if get_token() is None:
            return f"it has no token to push to {self.repo} with: {where}"
        try:
            there = self._head() is not None
        except HubError as error:
            return f"it cannot push: {str(error).rstrip('.')}"
        return "" if there else f"its token does not show it {self.repo}: {where}"

    def record(self, name: str) -> Placed | None:
        """The head, with the record of this name in it; None if there is no whole one."""
        head = self._head()
        return None if head is None else record_at(self.repo, head[0], name, self._tree(head[0]))

    def look(self, names: Collection[str], *, overwrite: bool) -> HubTarget:
        """What is there. Raises `OutputError` for a model that is to stay, `HubError` without access."""
        _check_names(names)
        self._check_token()
        return self._judged(self._head(), names, overwrite=overwrite)

    def begin(self, names: Collection[str], *, overwrite: bool, seen: str | None) -> HubTarget:
        """The like; the repository is made if there is none.

        If the head is no longer the one `seen` before, and what was changed since is of the output, that
        is told first, by a `MovedError`.
        """
        target = self.look(names, overwrite=overwrite)
        if target.version is None:
            from huggingface_hub import HfApi

            private = True if self.private else None  # else as the owner's settings have it
            with sending(self.repo, "making the repository"):
                again(lambda: HfApi().create_repo(self.repo, private=private, exist_ok=True))
            target = self._judged(self._head(), names, overwrite=overwrite)
        if target.version is None:
            raise HubError(f"{self.repo}: was made, but is not there. Run the same command again.")
        if seen is None or seen == target.version:
            return target
        changed = self._changed(seen, target.version)
        if any(name in names or is_read(name) for name in changed):
            raise self._moved(seen, target.version, changed)
        return replace(
            target,
            warnings=[
                *target.warnings,
                f"{self.repo}: has other commits since the interrupted run ({listed(changed)} changed); "
                "the output is committed on top of these",
            ],
        )

    def send(self, path: Path, file: SentFile, going: Callable[[], bool]) -> bool:
        """Upload a file; False if the hub wants it in the commit itself."""
        from huggingface_hub import HfApi

        def upload() -> None:
            HfApi().preupload_lfs_files(self.repo, [operation], free_memory=False)

        with sending(self.repo, f"uploading {printable(file.name)}"), quiet():
            operation = addition(file, path)
            again(upload, going=going, tries=3)  # the client tries every request several times
        self._check_taken(operation)
        return is_uploaded(operation)

    def find(self, files: Sequence[SentFile], since: str | None) -> str | None:
        """The first commit after `since` that has these files as they are; None if there is none."""
        from huggingface_hub import HfApi

        head = self._head()
        if head is None or head[0] == since:
            return None
        with sending(self.repo, "reading its commits"):
            commits = again(lambda: list(HfApi().list_repo_commits(self.repo)))
        newer = itertools.takewhile(lambda commit: commit != since, (c.commit_id for c in commits))
        for commit in [*itertools.islice(newer, MAX_COMMITS)][::-1]:
            if not differing(files, self._tree(commit)):
                return str(commit)
        return None

    def commit(
        self,
        folder: Path,
        files: Sequence[SentFile],
        target: HubTarget,
        sent: Collection[str],
    ) -> str:
        """One commit of everything, on the head that was seen; returns it once it is as it should be.

        Raises `HubError` if the head has moved, or if the hub has not taken what it was given.
        """
        from huggingface_hub import HfApi

        doubtful = False  # whether a commit may have happened that was not told

        def once() -> str:
            nonlocal doubtful
            if doubtful and (found := self.find(files, target.version)) is not None:
                return found
            doubtful = True
            operations = [
                uploaded(one) if one.name in sent else addition(one, folder / one.name)
                for one in files
            ]
            operations += [deletion(name) for name in target.deleted]
            made = HfApi().create_commit(
                self.repo,
                operations,
                commit_message=self.message or "Upload with streamshard",
                parent_commit=target.version,
            )
            return str(made.oid)

        try:
            with sending(self.repo, "the commit"), quiet():
                made = again(once)
        except HubStatusError as error:
            found = self._after(error, files, target)
            if found is None:
                raise
            made = found
        except HubError:
            with contextlib.suppress(HubError):
                if (found := self.find(files, target.version)) is not None:
                    return found
            raise
        self._check(made, files, target)
        return made

    def described(
        self, version: str | None, files: Sequence[str], target: HubTarget | None
    ) -> dict[str, Any]:
        """Repository, commit, where it can be seen, what it has of ours, and what else it changed."""
        url = self.key if version is None else f"{self.key}/tree/{version}"
        return {
            "repository": self.repo,
            "commit": version,
            "url": url,
            "private": self.private,
            "files": sorted(files),
            "replaced": [] if target is None else list(target.replaced),
            "deleted": [] if target is None else list(target.deleted),
        }

    def _after(
        self, error: HubStatusError, files: Sequence[SentFile], target: HubTarget
    ) -> str | None:
        """The commit in spite of what the hub answered; raises what is to be done if the head moved."""
        with contextlib.suppress(HubError):
            if (found := self.find(files, target.version)) is not None:
                return found
        if error.status != 412:
            return None
        head = self._head()
        if head is None:
            raise HubError(f"{self.repo}: is gone: somebody has removed it meanwhile.") from error
        changed = self._changed(target.version, head[0])
        raise self._moved(str(target.version), head[0], changed) from error

    def _moved(self, old: str, new: str, changed: Sequence[str]) -> MovedError:
        what = f" ({listed(changed)} changed)" if changed else ""
        error = MovedError(
            f"{self.repo}: somebody else has committed to it: its head was {old[:12]} when this began, "
            f"and is {new[:12]} now{what}. Nothing was committed, and what was uploaded is kept there. "
            f"Look at {self.key}/commits/main, and run the same command again: it commits on top of that."
        )
        error.version = new
        return error

    def _changed(self, old: str | None, new: str) -> list[str]:
        """Names of files that differ between two commits."""
        with contextlib.suppress(HubError):
            before = {} if old is None else self._tree(old)
            after = self._tree(new)
            return sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
        return []

    def _check(self, made: str, files: Sequence[SentFile], target: HubTarget) -> None:
        """Compare what the hub has with what it should have."""
        wrong: list[str] = []
        for tried in range(SETTLES):
            tree = self._tree(made)
            wrong = [*differing(files, tree), *(name for name in target.deleted if name in tree)]
            if not wrong or not pause(2.0**tried):
                break
        if wrong:
            error = MovedError(
                f"{self.repo}: the commit {made[:12]} was made, but of what the hub lists there "
                f"{listed(wrong)} is not as it was given. Look at {self.key}/tree/{made}: a .gitignore "
                "may leave files out. Then run the same command again, with --overwrite."
            )
            error.version = made
            raise error

    def _check_taken(self, operation: Any) -> None:
        if is_left_out(operation):
            raise HubError(
                f"{self.repo}: its .gitignore leaves out '{printable(operation.path_in_repo)}', so that "
                "the model there would not be whole. Remove that line from the .gitignore, or push to "
                "another repository."
            )

    def _check_token(self) -> None:
        endpoint()  # raises if the environment has no hub
        from huggingface_hub import get_token

        if get_token() is None:
            raise HubError(
                f"{self.repo}: pushing needs a token that may write there, and there is none: "
                f"{LOG_IN}, and run the same command again."
            )

    def _head(self) -> tuple[str, bool] | None:
        """The commit of the main branch, and whether the repository is private; None if there is none."""
        return head_of(self.repo)

    def _tree(self, commit: str) -> dict[str, Listed]:
        """The files of a commit, by name."""
        asked = HubId(self.repo, commit)
        client = Client.of(None, offline=False)
        repository = Repository(client, asked, client.cache, commit)
        with sending(self.repo, "the list of its files"):
            try:
                return {file.name: file for file in again(repository.files)}
            except HubError as error:  # in the words of who reads a model
                raise error.__cause__ or error from None

    def _judged(
        self, head: tuple[str, bool] | None, names: Collection[str], *, overwrite: bool
    ) -> HubTarget:
        """What a commit changes; `OutputError` if that must not be."""
        if head is None:
            return HubTarget(None)
        version, private = head
        if self.private and not private:
            raise OutputError(
                f"{self.repo}: exists and is public, so that --private cannot hold. Make it private "
                f"({self.key}/settings), leave --private out, or choose another name."
            )
        there = self._tree(version)
        others = sorted(name for name in there if is_read(name) and name not in names)
        ours = sorted(name for name in there if name in names)
        model = [*others, *filter(is_model, ours)]
        if model and not overwrite:
            raise OutputError(
                f"{self.repo}: holds a model already ({listed(model, 3)}). Choose another "
                "name, or pass --overwrite: then one commit replaces those files, and removes what else "
                "loaders would read there; the old ones stay in its history."
            )
        told = ""
        if others:
            told = f"{listed(others)} there is removed: loaders would read it with this output"
        elif CARD_NAME in ours and not model:  # maybe somebody's own words
            told = f"its {CARD_NAME} is replaced (the old one stays in its history; --card none keeps it)"
        return HubTarget(version, ours, others, [f"{self.repo}: {told}"] if told else [])


def differing(files: Sequence[SentFile], tree: Mapping[str, Listed]) -> list[str]:
    """The names of those files that a tree does not have as they are."""
    return [
        file.name
        for file in files
        if (there := tree.get(file.name)) is None
        or there.nbytes != file.nbytes
        or there.digest not in file.digests
    ]


def _check_names(names: Collection[str]) -> None:
    """Refuse names that the hub takes no files of."""
    wrong = [name for name in names if {".git", ".cache"} & set(name.split("/")[:-1])]
    if wrong:
        raise InputError(
            f"{listed(wrong)}: the hub takes no files in folders of this name. Move them away."
        )
