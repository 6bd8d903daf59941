"""Where an output may go: never into an input, through a link, or over somebody's files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from streamshard.disk.existence import found, is_folder, is_link, is_mount, is_there, same, walked
from streamshard.disk.held import Inode, inode
from streamshard.disk.inputs import active
from streamshard.disk.paths import PathLike, output_path
from streamshard.disk.system import reading, system, writing
from streamshard.engine.beside_output import places_beside, tidy
from streamshard.engine.claims import check_replaceable
from streamshard.errors import OutputError, UsageError, printable

__all__ = ["check_inputs", "check_places"]


def check_places(output: PathLike | None, inputs: Iterable[Path], *, overwrite: bool) -> Path:
    """Refuse an output that exists, is an input, or lies inside one (also through links).

    An empty folder is as good as none. `--overwrite` is advised only where it would do.
    """
    if output is None:
        raise UsageError("an output is missing: a folder to write.")
    target = output_path(output, "the output")
    if not target.name and target != Path():
        raise OutputError(f"{printable(str(target))}: is no folder that can be written.")
    with writing(target, 0):
        _check_places(target, inputs, overwrite=overwrite)
    return target


def _check_places(target: Path, inputs: Iterable[Path], *, overwrite: bool) -> None:
    if is_link(target):
        raise OutputError(
            f"{printable(str(target))}: is a symbolic link, and links are never written through. "
            "Give the folder itself."
        )
    place = system.resolve(target)
    for path in inputs:
        with reading(path):
            _check_apart(target, place, path)
    if is_there(target):
        if not overwrite:
            tidy(target)
        if place in _working_folders():
            raise OutputError(
                f"{printable(str(target))}: is the folder in which this command runs, or around it, and "
                "cannot be replaced. Choose another output, or change to another folder."
            )
        if is_mount(target):
            raise OutputError(
                f"{printable(str(target))}: is where a disk is mounted, which cannot be replaced. "
                f"Write to a folder inside it: {printable(str(target / 'merged'))}."
            )
        check_replaceable(place, overwrite=overwrite)


def _check_apart(target: Path, place: Path, path: Path) -> None:
    given, inner = system.resolve(path), is_folder(path)
    folder = given if inner else given.parent
    # By identity and not only by name: bind mounts and case-insensitive disks have two names.
    if _is_within(place, folder) and (inner or place == folder):
        raise OutputError(
            f"{printable(str(target))}: is, or lies inside, the input '{printable(str(path))}' "
            f"({printable(str(given))}). Inputs are never changed: choose an output outside of it."
        )
    if any(_is_within(folder, taken) for taken in (place, *places_beside(place).values())):
        raise OutputError(
            f"{printable(str(target))}: contains the input '{printable(str(path))}', which "
            "writing it would delete. Choose another output."
        )


def check_inputs(output: Path) -> None:
    """Refuse an output if a file that this run reads is in truth in it, or where it is built or replaced.

    By links, that is, or by mounts: what the paths of inputs say is looked at before. To be called when
    all inputs have been opened, from when on the output is no longer taken for one of them.
    """
    inputs = active()
    if inputs is None:
        return
    with writing(output, 0):
        target = system.resolve(output)
        places = [target, *places_beside(target).values()]
        inputs.leave_out(*places)
        taken = {one for place in places for one in _identities(place)}
        for path, stamp in inputs.stamps.items():
            with reading(path):
                real = Path(system.realpath(path))
                around = {inode(there) for there in map(found, real.parents) if there is not None}
            known = taken & {(stamp.device, stamp.inode), *around}
            if known or any(real.is_relative_to(place) for place in places):
                raise OutputError(
                    f"{printable(str(output))}: {printable(path)}, which this run reads, is in truth "
                    f"{printable(str(real))}, and writing the output would remove or replace that. "
                    "Choose another output, or put a copy of the file in the place of the link (cp -L)."
                )


def _identities(place: Path) -> Iterator[Inode]:
    """The identity of every folder at a place and in it, and of the files of finished outputs.

    Of the other files one with two names is refused as none of ours.
    """
    if is_link(place):  # which is refused as none of ours, too
        return
    for folder, _, names in walked(place, strict=False):
        finished = [] if place.name.endswith((".partial", ".parts")) else names
        for path in (folder, *(folder / name for name in finished)):
            with contextlib.suppress(FileNotFoundError):  # a run may be at it just now
                yield inode(system.lstat(path))


def _working_folders() -> list[Path]:
    """The current folder and those around it; none if it is gone."""
    try:
        here = Path.cwd()
    except FileNotFoundError:
        return []
    return [here, *here.parents]


def _is_within(path: Path, folder: Path) -> bool:
    there = found(folder)
    return any(candidate == folder or same(candidate, there) for candidate in (path, *path.parents))
