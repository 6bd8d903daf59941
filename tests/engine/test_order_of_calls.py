"""In which order the disk is asked: nothing has its name, and nothing is noted, before it is there."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from pairs import Pair

import streamshard
from streamshard.checkpoint.file_names import JOURNAL_NAME
from streamshard.disk.system import system
from streamshard.engine.beside_output import places_beside

SUFFIX = ".safetensors"


class Call(NamedTuple):
    """A call that has ended well: who made it, which one it was, and of which paths."""

    thread: int
    name: str
    path: Path
    other: Path | None = None


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """All calls that change the disk or wait for it, in their order, of all threads."""
    found: list[Call] = []
    opened: dict[int, Path] = {}
    lock = threading.RLock()

    def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def calling(first: Any, *rest: Any) -> Any:
            with lock:  # so that the order is that of the disk
                result = call(first, *rest)
                path = opened[first] if isinstance(first, int) else Path(first)
                if name == "open":
                    opened[result] = path
                other = Path(rest[0]) if name == "rename" else None
                made = name == "open" and rest[0] & os.O_CREAT
                found.append(Call(threading.get_ident(), "make" if made else name, path, other))
                return result

        return calling

    for name in ("open", "pwrite", "truncate", "fsync", "rename", "unlink", "mkdir"):
        monkeypatch.setattr(system, name, watched(name, getattr(system, name)))
    return found


def merge(pair: Pair, **options: Any) -> None:
    streamshard.merge_lora(
        base=pair.base, adapter=pair.adapter, output=pair.output, workers=2, **options
    )


def partial(pair: Pair) -> Path:
    return places_beside(pair.output)["partial"]


def renames(calls: list[Call], suffix: str = SUFFIX) -> list[int]:
    """Where files get names that end so."""
    return [
        place
        for place, call in enumerate(calls)
        if call.name == "rename" and str(call.other).endswith(suffix)
    ]


def last(calls: list[Call], name: str, path: Path) -> int:
    """Where a path has seen a call for the last time; -1 if it has not."""
    return max((n for n, c in enumerate(calls) if (c.name, c.path) == (name, path)), default=-1)


def waited_for(calls: list[Call], path: Path) -> bool:
    """Whether the disk has been waited for since a file was written."""
    written = max(last(calls, name, path) for name in ("make", "pwrite", "truncate"))
    return last(calls, "fsync", path) > written >= 0


def names_waited_for(calls: list[Call], folder: Path) -> bool:
    """Whether the disk has been waited for since anything in a folder got or lost its name."""
    changed = [
        number
        for number, call in enumerate(calls)
        if call.name in {"make", "mkdir", "rename", "unlink"} and call.path.parent == folder
    ]
    return last(calls, "fsync", folder) > max(changed)


@pytest.mark.parametrize("sha256", [False, True])
def test_a_shard_is_on_disk_before_it_has_its_name(sha256, pair, calls):
    merge(pair, sha256=sha256)
    assert len(renames(calls)) == 2
    for place in renames(calls):
        # Until it is complete nothing takes it for a weight file.
        assert calls[place].path.suffix != SUFFIX
        part = calls[place].path
        written = max(n for n, c in enumerate(calls) if (c.name, c.path) == ("pwrite", part))
        synced = [n for n, c in enumerate(calls) if (c.name, c.path) == ("fsync", part)]
        assert any(written < n < place for n in synced)


def test_a_name_is_on_disk_before_the_journal_notes_it(pair, calls):
    merge(pair)
    journal = partial(pair) / JOURNAL_NAME
    notes = [n for n, c in enumerate(calls) if (c.name, c.path) == ("pwrite", journal)]
    assert len(notes) == 3, "the plan and two shards"
    for note, place in zip(notes[1:], renames(calls), strict=True):
        folder = last(calls[:note], "fsync", partial(pair))
        assert place < folder < note


def test_the_journal_is_on_disk_before_anything_else_happens(pair, calls):
    """In the thread that notes a shard; the others may write what is not noted yet."""
    merge(pair)
    journal = partial(pair) / JOURNAL_NAME
    notes = [n for n, c in enumerate(calls) if (c.name, c.path) == ("pwrite", journal)]
    assert len(notes) == 3
    for note in notes:
        mine = [c for c in calls[note + 1 :] if c.thread == calls[note].thread]
        assert (mine[0].name, mine[0].path) == ("fsync", journal)


@pytest.mark.parametrize("place", ["", "examples", "examples/more"])
def test_every_file_and_folder_is_on_disk_before_the_output_has_its_name(place, pair, calls):
    (pair.base / place).mkdir(parents=True, exist_ok=True)
    (pair.base / place / "image.jpg").write_bytes(b"\xff\xd8")
    merge(pair, sha256=True)
    (end,) = renames(calls, "merged")
    before = calls[:end]
    assert names_waited_for(before, partial(pair))
    for path in pair.output.rglob("*"):
        built = partial(pair) / path.relative_to(pair.output)
        if path.is_dir():
            assert names_waited_for(before, built), path
        elif path.suffix != SUFFIX:
            assert waited_for(before, built), path


def test_the_output_has_its_name_on_disk_at_the_end(pair, calls):
    pair.output.parent.rmdir()
    merge(pair)
    (end,) = renames(calls, "merged")
    assert last(calls, "fsync", pair.output.parent) > end
    made = last(calls, "mkdir", pair.output.parent)
    around = [n for n, c in enumerate(calls) if (c.name, c.path) == ("fsync", pair.root)]
    assert made < around[0] < end, "the folder that was made for it has its name too"


def test_an_older_output_is_removed_after_the_new_one_has_its_name_on_disk(pair, calls):
    merge(pair, weight=[0.5])
    calls.clear()
    merge(pair, overwrite=True)
    away, end = renames(calls, ".merged.old") + renames(calls, "merged")
    assert away < end
    removed = next(n for n, c in enumerate(calls) if c.name == "unlink" and ".old" in str(c.path))
    assert end < last(calls[:removed], "fsync", pair.output.parent)


def test_what_is_moved_is_noted_on_disk_before(pair, calls):
    """In the lock: after a kill or a loss of power it tells whose the old output is."""
    merge(pair, weight=[0.5])
    calls.clear()
    merge(pair, overwrite=True)
    (away,) = renames(calls, ".merged.old")
    lock = places_beside(pair.output)["lock"]
    assert waited_for(calls[:away], lock)
    noted = last(calls[:away], "pwrite", lock)
    assert last(calls[:away], "make", lock) < noted
    assert last(calls[:away], "fsync", pair.output.parent) > noted


def interrupted(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have all files finished, but not in their place; returns the journal."""
    rename = system.rename

    def fail(path: Path, other: Path) -> None:
        if other == pair.output:
            raise OSError(errno.EIO, "broken")
        rename(path, other)

    with monkeypatch.context() as patch:
        patch.setattr(system, "rename", fail)
        with pytest.raises(streamshard.StreamshardError, match="is kept"):
            merge(pair)
    return partial(pair) / JOURNAL_NAME


def test_an_old_journal_goes_after_the_files_that_it_lists(pair, calls, monkeypatch):
    """It alone tells that they are ours; and what it says must not be believed with a new plan."""
    journal = interrupted(pair, monkeypatch)
    assert journal.exists()
    (partial(pair) / "tokenizer_config.json").write_text("half of it, as after a kill")
    calls.clear()
    merge(pair, weight=[0.5], overwrite=True)
    gone = next(n for n, c in enumerate(calls) if (c.name, c.path) == ("unlink", journal))
    begun = last(calls, "make", journal)
    old = [
        number
        for number, call in enumerate(calls[:begun])
        if call.name == "unlink" and call.path.parent == partial(pair)
    ]
    assert len(old) == 4, "two shards, half a file, and the journal"
    assert max(old) == gone


@pytest.mark.parametrize("before", ["nothing", "another plan"])
def test_a_new_journal_is_on_disk_before_the_first_shard_is_begun(before, pair, calls, monkeypatch):
    """It lists the files that a run may make: what it does not list, nobody removes."""
    journal = partial(pair) / JOURNAL_NAME
    if before == "another plan":
        assert interrupted(pair, monkeypatch) == journal
    calls.clear()
    merge(pair, weight=[0.5], overwrite=True)
    begun = next(n for n, c in enumerate(calls) if c.name == "make" and c.path.suffix == ".part")
    assert waited_for(calls[:begun], journal)
    assert names_waited_for(calls[:begun], partial(pair))
    assert last(calls[:begun], "fsync", pair.output.parent) > 0


def test_paths_of_calls_are_told_apart(tmp_path, calls):
    """The recorder itself: a descriptor that is used again belongs to another file."""
    for name in ("a", "b"):
        descriptor = system.open(tmp_path / name, os.O_RDWR | os.O_CREAT)
        system.pwrite(descriptor, memoryview(b"x"), 0)
        assert not waited_for(calls, tmp_path / name)
        system.fsync(descriptor)
        system.close(descriptor)
        assert waited_for(calls, tmp_path / name)
