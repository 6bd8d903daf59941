"""What lies in a folder of ours: only what a list of ours names is taken for ours, and removed.

Lists are of files, by their names relative to the folder with "/" between; the folders that these
are in belong to it. Of an output the list is what its sealed `streamshard.json` records.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from os import stat_result as Entry  # noqa: N812 - what it is here
from pathlib import Path, PurePosixPath

from streamshard.checkpoint.file_names import REPORT_NAME
from streamshard.checkpoint.record import read_record
from streamshard.disk.folders import held, sync_folder
from streamshard.disk.held import Held, Inode
from streamshard.disk.system import reading, system, writing
from streamshard.engine.ours import Ours, kind_of
from streamshard.errors import InputError, OutputError, WriteError, listed, printable
from streamshard.values import frozen

__all__ = [
    "Replaceable",
    "check_replaceable",
    "folders_of",
    "recorded_names",
    "remove_listed",
    "replaceable",
    "strangers",
]


def folders_of(names: Collection[str]) -> set[str]:
    """The folders that files of these names are in, below the folder of all."""
    above = (parent for name in names for parent in PurePosixPath(name).parents)
    return {str(folder) for folder in above if folder.name}


def strangers(folder: Path, names: Collection[str], ours: Ours | None = None) -> list[str]:
    """What lies in a folder that is held and is no file of these names, nor a folder of such.

    With `ours`, what has such a name and is not ours is refused by an `OutputError`.
    """
    folders, found = folders_of(names), []
    for name, entry in _walk(folder, folders):
        inner = name in folders
        if not inner and name not in names:
            found.append(name)
        elif ours is not None:
            ours.check(entry, folder / name, folder=inner)
        elif not (stat.S_ISDIR if inner else stat.S_ISREG)(entry.st_mode):
            found.append(f"{name} ({kind_of(entry)})")
    return found


def _walk(folder: Path, folders: set[str], prefix: str = "") -> Iterator[tuple[str, Entry]]:
    for name in sorted(_listed(folder)):
        try:
            with writing(folder / name, 0):
                entry = system.lstat(folder / name)
        except WriteError as error:
            if isinstance(error.__cause__, FileNotFoundError):  # others may be at work here
                continue
            raise
        yield prefix + name, entry
        if stat.S_ISDIR(entry.st_mode) and prefix + name in folders:
            with held(folder / name):
                yield from _walk(folder / name, folders, f"{prefix}{name}/")


def _listed(folder: Path) -> list[str]:
    with writing(folder, 0):
        return system.listdir(folder)


def remove_listed(
    folder: Path, names: Collection[str], *, last: str = "", keep: Collection[str] = ()
) -> list[str]:
    """Remove the files of these names from a folder that is held, and their folders if empty then.

    `last`, which tells what is ours, goes when the disk has forgotten all others; `keep` stays.
    Returns what else is there.
    """
    going = set(names).difference(keep, {last})
    stays = _remove(folder, going, folders_of(names))
    if last in stays:
        sync_folder(folder)
        with writing(folder / last, 0):
            system.unlink(folder / last)
        stays.remove(last)
    return stays


def _remove(folder: Path, names: set[str], folders: set[str], prefix: str = "") -> list[str]:
    stays = []
    for name in sorted(_listed(folder)):
        path, whole = folder / name, prefix + name
        with writing(path, 0):
            mode = system.lstat(path).st_mode
            if stat.S_ISREG(mode) and whole in names:
                system.unlink(path)
            elif stat.S_ISDIR(mode) and whole in folders:
                with held(path):
                    inner = _remove(path, names, folders, f"{whole}/")
                if inner:
                    stays += inner
                else:
                    system.rmdir(path)
            else:
                stays.append(whole)
    return stays


def recorded_names(folder: Path) -> set[str]:
    """The files of an output that is held, as its record lists them, and the record.

    Raises `InputError` if there is none, or if it is not as we wrote it.
    """
    file = folder / REPORT_NAME
    with reading(file):
        found = system.lstat(file)
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{printable(str(file))}: is {kind_of(found)}.")
    digests = read_record(file).get("digests")
    files = digests.get("files") if isinstance(digests, dict) else None
    if not isinstance(files, dict):
        raise InputError(f"{printable(str(file))}: lists no files.")
    return {*files, REPORT_NAME}


@frozen
class Replaceable:
    """A folder that may be replaced, and its files; held, so that no other gets its inode number."""

    folder: Held
    names: set[str]

    @property
    def inode(self) -> Inode:
        """What identifies it, whatever it is called."""
        return self.folder.inode

    def check(self) -> None:
        """Raise `OutputError` if something has come into it since."""
        _refuse_more(Path(self.folder.path), self.names)


def check_replaceable(target: Path, *, overwrite: bool) -> None:
    """Raise `OutputError` unless a folder is empty, or holds an output of ours and nothing else.

    Such an output may be replaced only if that is wanted (`overwrite`).
    """
    with replaceable(target, overwrite=overwrite):
        pass


@contextmanager
def replaceable(target: Path, *, overwrite: bool) -> Iterator[Replaceable]:
    """The like, for as long as it takes to replace it."""
    where = printable(str(target))
    choose = "Choose another output, or remove it yourself."
    with writing(target, 0):
        found = system.lstat(target)
    if not stat.S_ISDIR(found.st_mode):
        raise OutputError(
            f"{where}: exists and is {kind_of(found)}, which --overwrite does not replace. {choose}"
        )
    with held(target) as folder:
        there = _listed(target)
        if there and REPORT_NAME not in there:
            raise OutputError(
                f"{where}: exists, was not written by streamshard (it has no {REPORT_NAME}), and "
                f"--overwrite replaces only what was: other files there would be lost. {choose}"
            )
        try:
            names = recorded_names(target) if there else set()
        except InputError as error:
            raise OutputError(
                f"{error} --overwrite replaces only what streamshard wrote and recorded. {choose}"
            ) from error
        _refuse_more(target, names)
        _check_removable(target, folders_of(names))
        if there and not overwrite:
            raise OutputError(f"{where}: exists. Choose another output, or pass --overwrite.")
        yield Replaceable(folder, names)


def _refuse_more(target: Path, names: Collection[str]) -> None:
    """Raise `OutputError` if an output that is held has files that are not recorded."""
    if more := strangers(target, names):
        raise OutputError(
            f"{printable(str(target))}: holds {listed(more)}, which {REPORT_NAME} there does not record "
            "and --overwrite would remove. Move that away, or choose another output."
        )


def _check_removable(target: Path, folders: set[str]) -> None:
    """Raise `OutputError` unless we may rename a folder that is held, and remove all that is in it."""
    with writing(target.parent, 0):
        if not system.may_change(target.parent):
            return  # so that nothing can be written there either, which is told when that is tried
    inside = [
        target / name for name, entry in _walk(target, folders) if stat.S_ISDIR(entry.st_mode)
    ]
    entries = {folder: [folder / name for name in _listed(folder)] for folder in (target, *inside)}
    for folder, paths in {target.parent: [target], **entries}.items():
        if paths and not _may_remove(folder, paths):
            raise OutputError(
                f"{printable(str(target))}: cannot be replaced: this user may not remove or rename what "
                f"is in {printable(str(folder))}. Nothing was touched: choose another output, or have "
                "its owner remove it."
            )


def _may_remove(folder: Path, paths: Collection[Path]) -> bool:
    """Whether we may remove these from a folder: a sticky one, or each of them, has to be ours."""
    with writing(folder, 0):
        found = system.lstat(folder)
        if not system.may_change(folder):
            return False
        if os.name == "nt" or not found.st_mode & stat.S_ISVTX:
            return True
        user = os.geteuid()
        return user in (0, found.st_uid) or all(system.lstat(path).st_uid == user for path in paths)
