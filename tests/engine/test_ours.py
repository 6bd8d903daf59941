"""Nothing of others is touched: links, owners, modes, and what lies where a run writes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from interrupted_runs import (
    AFTER_A_SHARD,
    BETWEEN_THE_RENAMES,
    FIRST,
    REMOVING_THE_OLD,
    alone,
    content,
    killed,
    partial,
)
from pairs import Pair, new_pair
from places import Cli, lock, make_output, old, state

import streamshard
from streamshard.disk import held
from streamshard.disk.system import system
from streamshard.engine import claims, long_names, ours
from streamshard.engine.beside_output import places_beside
from streamshard.engine.journal import Journal
from streamshard.engine.lock import Lock
from streamshard.errors import OutputError

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


def left_alone(pair: Pair, cli: Cli, where: Path, *more: str, what: str = "") -> None:
    """A run that is refused with exit code 5, names a path, and touches nothing at all."""
    before = state(pair.root)
    outcome = cli(*pair.command, *more)
    assert outcome.code == 5, outcome
    assert "Traceback" not in outcome.err
    assert str(where) in outcome.err
    assert what in outcome.err
    assert outcome.out == ""
    assert state(pair.root) == before


def interrupt(pair: Pair) -> None:
    """Leave what a run leaves that is killed at its first shard; its lock alone would go in any case."""
    killed(AFTER_A_SHARD, [*pair.command, "--workers", "1"])
    lock(pair).unlink()


def foreign(path: Path, how: str, pair: Pair) -> str:
    """Put something that is not ours at a path; returns what a message must say."""
    config = pair.base / FIRST
    if how == "link":
        path.symlink_to(config)
        return "symbolic link"
    if how == "dangling link":
        (pair.root / "writable").mkdir(exist_ok=True)
        path.symlink_to(pair.root / "writable" / "new")
        return "symbolic link"
    if how == "link to itself":
        path.symlink_to(path.name)
        return "symbolic link"
    if how == "hard link":
        os.link(config, path)
        return "2 names (hard links)"
    if how == "folder":
        path.mkdir()
        return "a folder where a file"
    if how == "pipe":
        os.mkfifo(path)
        return "a pipe"
    path.touch()
    if how == "owner":
        os.chown(path, 65533, -1)
        return "user 65533"
    assert how == "mode"
    path.chmod(0o666)
    return "mode is 0666"


FOREIGN = [
    "link",
    "dangling link",
    "link to itself",
    "hard link",
    "folder",
    "pipe",
    pytest.param("owner", marks=needs_root),
    "mode",
]
MORE = [[], ["--overwrite"]]


# --- the recipes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("more", MORE, ids=["plain", "overwrite"])
@pytest.mark.parametrize("how", FOREIGN)
def test_a_foreign_journal(how, more, pair, cli):
    partial(pair).mkdir()
    place = partial(pair) / "streamshard.journal"
    said = foreign(place, how, pair)
    left_alone(pair, cli, place, *more, what=said)


@pytest.mark.parametrize("more", MORE, ids=["plain", "overwrite"])
@pytest.mark.parametrize("how", FOREIGN)
def test_a_foreign_lock(how, more, pair, cli):
    left_alone(pair, cli, lock(pair), *more, what=foreign(lock(pair), how, pair))


@pytest.mark.parametrize("how", FOREIGN)
def test_a_foreign_lock_beside_an_output_that_exists(how, pair, cli):
    make_output(pair)
    foreign(lock(pair), how, pair)
    left_alone(pair, cli, pair.output)  # what would be tidied is not
    left_alone(pair, cli, lock(pair), "--overwrite")


@pytest.mark.parametrize(
    "text", [b"", b"mine\n", b'{"pid": 1}', b'{"pid": 1, "app": "x"', b"[]", b"\xff\0", bytes(9)]
)
def test_a_lock_of_another_program(text, pair, cli):
    lock(pair).write_bytes(text)
    left_alone(pair, cli, lock(pair))
    left_alone(pair, cli, lock(pair), "--dry-run")


@pytest.mark.parametrize("how", ["finished shard", "part", "side file", "record", "inner folder"])
@pytest.mark.parametrize("kind", ["link", "hard link", pytest.param("owner", marks=needs_root)])
def test_what_is_foreign_among_what_a_run_has_left(how, kind, pair, cli):
    (pair.base / "inner").mkdir()
    (pair.base / "inner" / "x.txt").write_text("x")
    interrupt(pair)
    names_ = {
        "finished shard": FIRST,
        "part": f"{FIRST}.part",
        "side file": "tokenizer_config.json",
        "record": "streamshard.json",
        "inner folder": "inner",
    }
    place = partial(pair) / names_[how]
    place.unlink(missing_ok=True)
    if how == "inner folder" and kind == "link":
        place.symlink_to(pair.base)
    else:
        foreign(place, kind, pair)
    left_alone(pair, cli, place)
    left_alone(pair, cli, place, "--overwrite", "--weight", "0.5")


@pytest.mark.parametrize("how", ["link", "dangling link", "hard link", "pipe", "mode"])
def test_a_foreign_thing_in_the_place_of_the_staging_folder(how, pair, cli):
    foreign(partial(pair), how, pair)
    left_alone(pair, cli, partial(pair))
    left_alone(pair, cli, partial(pair), "--overwrite")


@needs_root
@pytest.mark.parametrize("filled", [False, True])
def test_a_staging_folder_of_another_user(filled, pair, cli):
    if filled:
        interrupt(pair)
    else:
        partial(pair).mkdir()
    os.chown(partial(pair), 65533, 65533)
    left_alone(pair, cli, partial(pair), what="user 65533")
    left_alone(pair, cli, partial(pair), "--dry-run", what="user 65533")


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o1777])
def test_a_staging_folder_that_others_may_write_to(mode, pair, cli):
    interrupt(pair)
    partial(pair).chmod(mode)
    left_alone(pair, cli, partial(pair), what=f"{mode:04o}")


def test_a_folder_of_a_user_where_an_output_is_built(pair, cli):
    partial(pair).mkdir()
    for name in ("precious", FIRST, "config.json", "streamshard.json"):
        (partial(pair) / name).write_text("{}")
        for more in ([], ["--overwrite"], ["--dry-run"]):
            left_alone(pair, cli, partial(pair), *more, what=f"'{name}'")
        (partial(pair) / name).unlink()
    (partial(pair) / "inner").mkdir()
    left_alone(pair, cli, partial(pair), what="'inner'")


def test_a_copy_of_an_output_where_an_output_is_built(pair, cli):
    """Its record lists all there is, but no run was about to rename it."""
    make_output(pair)
    pair.output.rename(partial(pair))
    left_alone(pair, cli, partial(pair), what=f"'{FIRST}'")


@pytest.mark.parametrize("more", [["--weight", "0.5"], []], ids=["another plan", "the same"])
@pytest.mark.parametrize("how", ["file", "folder", "link", "inner"])
def test_a_file_among_what_a_run_has_left(how, more, pair, cli):
    (pair.base / "inner").mkdir()
    (pair.base / "inner" / "x.txt").write_text("x")
    interrupt(pair)
    mine = partial(pair) / "mine"
    if how == "file":
        mine.write_text("mine")
    elif how == "folder":
        mine.mkdir()
    elif how == "link":
        mine.symlink_to(pair.base)
    else:
        (partial(pair) / "inner").mkdir()
        mine = partial(pair) / "inner" / "mine"
        mine.write_text("mine")
    left_alone(pair, cli, partial(pair), "--overwrite", *more, what="mine'")
    shutil.rmtree(mine) if mine.is_dir() and not mine.is_symlink() else mine.unlink()
    assert cli(*pair.command, "--overwrite", *more).code == 0
    assert alone(pair)


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("how", ["folder", "empty folder", "file", "link"])
def test_something_of_a_user_where_the_old_output_is_kept(how, exists, pair, cli):
    if exists:
        make_output(pair)
    if how == "file":
        old(pair).write_text("mine")
    elif how == "link":
        old(pair).symlink_to(pair.root / "clean")
    else:
        old(pair).mkdir()
        if how == "folder":
            (old(pair) / "mine").write_text("mine")
    left_alone(pair, cli, old(pair), "--overwrite")
    left_alone(pair, cli, old(pair), "--overwrite", "--dry-run")
    left_alone(pair, cli, pair.output if exists else old(pair))


# --- replacing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry run"])
@pytest.mark.parametrize("how", ["file", "hidden", "folder", "in a folder", "link", "instead"])
def test_what_was_added_to_an_output_is_not_lost(how, dry, pair, cli):
    (pair.base / "inner").mkdir()
    (pair.base / "inner" / "x.txt").write_text("x")
    make_output(pair)
    name = "notes.txt"
    if how == "file":
        (pair.output / name).write_text("mine")
    elif how == "hidden":
        name = ".notes"
        (pair.output / name).write_text("mine")
    elif how == "folder":
        (pair.output / name).mkdir()
    elif how == "in a folder":
        name = "inner/notes.txt"
        (pair.output / name).write_text("mine")
    elif how == "link":
        (pair.output / name).symlink_to(pair.base)
    else:
        name = "config.json"
        (pair.output / name).unlink()
        (pair.output / name).symlink_to(pair.base / name)
    left_alone(pair, cli, pair.output, "--overwrite", *dry, what=f"'{name}")


@pytest.mark.parametrize(
    "record", [b"{}", b"", b"[]", b'{"digests": {"files": {"mine": {}}}}', None], ids=str
)
def test_a_folder_with_a_record_that_is_none_of_ours(record, pair, cli):
    pair.output.mkdir()
    (pair.output / "mine").write_text("mine")
    if record is not None:
        (pair.output / "streamshard.json").write_bytes(record)
    left_alone(pair, cli, pair.output, "--overwrite", what="streamshard.json")
    left_alone(pair, cli, pair.output, "--overwrite", "--dry-run")


def test_a_record_that_is_a_link(pair, cli):
    make_output(pair)
    pair.output.rename(pair.root / "elsewhere")
    pair.output.mkdir()
    (pair.output / "streamshard.json").symlink_to(pair.root / "elsewhere" / "streamshard.json")
    left_alone(pair, cli, pair.output, "--overwrite", what="a symbolic link")


def test_an_output_with_an_edited_record_or_file(pair, cli):
    """Its record lists the file whatever is in it now; an edited record lists nothing."""
    make_output(pair)
    (pair.output / "config.json").write_text("{}")
    assert cli(*pair.command, "--overwrite").code == 0
    record = pair.output / "streamshard.json"
    record.write_bytes(record.read_bytes().replace(b"xxh3", b"xxh4"))
    left_alone(pair, cli, pair.output, "--overwrite", what="streamshard.json")


@pytest.fixture
def shared():
    """A base and an adapter where every user can be, and not below what pytest keeps for one."""
    root = Path(tempfile.mkdtemp(prefix="streamshard-shared-"))
    root.chmod(0o755)
    pair = new_pair(root)
    for file in root.rglob("*.*"):
        file.chmod(0o644)
    yield pair
    shutil.rmtree(root)


@contextlib.contextmanager
def as_user(number: int):
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(number)
    os.seteuid(number)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


@needs_root
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry run"])
@pytest.mark.parametrize(
    "where", ["output", "inner folder", "sticky output", "sticky parent", "nowhere"]
)
def test_an_output_of_another_user_in_a_shared_folder(where, dry, shared, cli):
    """It could be moved away and then not be emptied, and no later run could do anything."""
    pair = shared
    (pair.base / "inner").mkdir()
    (pair.base / "inner" / "x.txt").write_text("x")
    make_output(pair)
    inner = pair.output / "inner"
    pair.output.parent.chmod(0o1777 if where == "sticky parent" else 0o777)
    for folder in (pair.output, inner):
        folder.chmod(0o777)
    if where in {"output", "inner folder"}:
        (pair.output if where == "output" else inner).chmod(0o755)
    elif where == "sticky output":
        pair.output.chmod(0o1777)
    with as_user(65533):
        if where == "nowhere":
            assert cli(*pair.command, "--overwrite", *dry).code == 0
            return
        refused_at = {"inner folder": inner, "sticky parent": pair.output.parent}
        said = f"is in {refused_at.get(where, pair.output)}. Nothing"
        left_alone(pair, cli, pair.output, "--overwrite", *dry, what=said)


def test_an_empty_folder_and_an_output_that_lost_a_file_are_replaced(pair, cli):
    pair.output.mkdir()
    assert cli(*pair.command, "--overwrite").code == 0
    (pair.output / FIRST).unlink()
    assert cli(*pair.command, "--overwrite").code == 0
    assert (pair.output / FIRST).exists()
    assert alone(pair)


# --- while a run is at it -------------------------------------------------------------------------


def at_the_first_shard(monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any]) -> None:
    add, done = Journal.add, []

    def acting(journal: Journal, shard: Any) -> None:
        add(journal, shard)
        if not done:
            done.append(True)
            act()

    monkeypatch.setattr(Journal, "add", acting)


@pytest.mark.parametrize("relative", [True, False], ids=["descriptors", "identities"])
@pytest.mark.parametrize("how", ["link to the base", "another folder", "gone"])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_staging_folder_is_swapped(how, relative, workers, pair, cli, monkeypatch):
    """As who may write to the folder around it could do at any time."""
    if not relative:
        monkeypatch.setattr("streamshard.disk.folders.RELATIVE", False)
    (pair.base / "inner").mkdir()
    (pair.base / "inner" / "x.txt").write_text("x")
    theirs = pair.root / "theirs"
    shutil.copytree(pair.base, theirs)

    def swap() -> None:
        partial(pair).rename(pair.root / "away")
        if how == "link to the base":
            partial(pair).symlink_to(pair.base)
        elif how == "another folder":
            theirs.rename(partial(pair))

    before = state(pair.base), state(theirs)
    at_the_first_shard(monkeypatch, swap)
    outcome = cli(*pair.command, "--workers", workers)
    assert outcome.code in ({5} if relative else {5, 6}), outcome.err
    assert str(partial(pair)) in outcome.err
    assert "Traceback" not in outcome.err
    assert state(pair.base) == before[0]
    assert state(partial(pair) if how == "another folder" else theirs) == before[1]
    assert not pair.output.exists()
    assert held._held == {}


def test_an_inner_folder_is_swapped(pair, cli, monkeypatch):
    (pair.base / "inner").mkdir()
    for name in ("x.txt", "y.txt"):
        (pair.base / "inner" / name).write_text(name)
    theirs = pair.root / "theirs"
    theirs.mkdir()
    opened = system.open

    def swapping(path: Any, flags: int) -> int:
        inner = partial(pair) / "inner"
        if Path(path) == inner / "x.txt" and not inner.is_symlink():
            inner.rename(partial(pair) / "moved")
            inner.symlink_to(theirs)
        return opened(path, flags)

    monkeypatch.setattr(system, "open", swapping)
    outcome = cli(*pair.command)
    assert outcome.code == 5
    assert "'moved'" in outcome.err
    assert list(theirs.iterdir()) == []
    assert not pair.output.exists()


def test_the_output_is_swapped_before_the_first_rename(pair, cli, monkeypatch):
    """What is moved away then is put back, and nothing of it is removed."""
    make_output(pair)
    rename = system.rename
    shutil.copytree(pair.base, pair.root / "theirs")
    before = state(pair.root / "theirs")

    def swapping(path: Any, other: Any) -> None:
        if Path(other) == old(pair):
            pair.output.rename(pair.root / "away")
            (pair.root / "theirs").rename(pair.output)
        rename(path, other)

    with monkeypatch.context() as patch:
        patch.setattr(system, "rename", swapping)
        outcome = cli(*pair.command, "--overwrite")
    assert outcome.code == 5
    assert state(pair.output) == before
    assert not old(pair).exists()


def test_the_output_is_held_until_it_is_moved(pair, cli, monkeypatch):
    """So that its inode number cannot become that of a folder that somebody else puts there."""
    make_output(pair)
    rename, seen = system.rename, []

    def looking(path: Any, other: Any) -> None:
        if Path(other) == old(pair):
            kept = held.holder(str(pair.output), itself=True)
            assert os.path.samestat(os.fstat(kept.descriptor), pair.output.stat())
            seen.append(kept)
        rename(path, other)

    monkeypatch.setattr(system, "rename", looking)
    assert cli(*pair.command, "--overwrite").code == 0
    assert len(seen) == 1
    assert held._held == {}


def test_what_comes_into_the_output_right_before_it_is_moved(pair, cli, monkeypatch):
    make_output(pair)
    mine = pair.output / "mine"
    note = Lock.note

    def late(*arguments: Any) -> None:
        note(*arguments)
        mine.write_text("mine")

    with monkeypatch.context() as patch:
        patch.setattr(Lock, "note", late)
        outcome = cli(*pair.command, "--overwrite")
    assert outcome.code == 5
    assert "'mine'" in outcome.err
    assert "is complete" not in outcome.err
    assert mine.read_text() == "mine"
    mine.unlink()
    assert cli(*pair.command, "--overwrite").code == 0
    assert alone(pair)


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("how", ["folder", "link"])
def test_the_staging_folder_is_swapped_before_the_last_rename(how, exists, pair, cli, monkeypatch):
    """What was renamed in its place gets its own name back, and so does the old output."""
    if exists:
        make_output(pair)
    rename = system.rename
    theirs = pair.root / "theirs"
    if how == "folder":
        shutil.copytree(pair.base, theirs)
    else:
        theirs.symlink_to(pair.base)
    before = state(theirs)
    there = state(pair.output) if exists else None

    def swapping(path: Any, other: Any) -> None:
        if Path(path) == partial(pair):
            rename(partial(pair), pair.root / "away")
            rename(theirs, partial(pair))
        rename(path, other)

    with monkeypatch.context() as patch:
        patch.setattr(system, "rename", swapping)
        outcome = cli(*pair.command, "--overwrite")
    assert outcome.code == 5
    assert "puts back" not in outcome.err
    assert state(partial(pair)) == before
    assert pair.output.exists() == exists
    assert there is None or state(pair.output) == there
    assert not old(pair).exists()


def test_nothing_is_said_of_an_old_output_that_is_not_what_was_moved(pair, cli, monkeypatch):
    make_output(pair)
    note = Lock.note

    def late(*arguments: Any) -> None:
        note(*arguments)
        old(pair).mkdir()

    with monkeypatch.context() as patch:
        patch.setattr(Lock, "note", late)
        outcome = cli(*pair.command, "--overwrite")
    assert outcome.code == 5
    assert str(old(pair)) in outcome.err
    assert "puts back" not in outcome.err
    assert pair.output.exists()


def test_what_comes_into_the_staging_folder_meanwhile(pair, cli, monkeypatch):
    at_the_first_shard(monkeypatch, lambda: (partial(pair) / "mine").write_text("mine"))
    outcome = cli(*pair.command, "--workers", "1")
    assert outcome.code == 5
    assert "'mine'" in outcome.err
    assert not pair.output.exists()
    assert (partial(pair) / "mine").read_text() == "mine"
    (partial(pair) / "mine").unlink()
    outcome = cli(*pair.command, "--json")
    assert json.loads(outcome.out)["resumed"] == 2
    assert alone(pair)


def test_what_comes_into_the_old_output_meanwhile(pair, cli, monkeypatch):
    make_output(pair)
    mine = pair.output / "mine"
    at_the_first_shard(monkeypatch, lambda: mine.write_text("mine"))
    outcome = cli(*pair.command, "--overwrite", "--workers", "1")
    assert outcome.code == 5
    assert "'mine'" in outcome.err
    assert mine.read_text() == "mine"
    mine.unlink()
    assert cli(*pair.command, "--overwrite").code == 0
    assert alone(pair)


def test_what_comes_into_the_old_output_after_it_was_moved(pair, cli, monkeypatch):
    make_output(pair)
    rename = system.rename

    def late(path: Any, other: Any) -> None:
        rename(path, other)
        if Path(other) == old(pair):
            (old(pair) / "mine").write_text("mine")

    with monkeypatch.context() as patch:
        patch.setattr(system, "rename", late)
        outcome = cli(*pair.command, "--overwrite")
    assert outcome.code == 5
    assert "is complete" in outcome.err
    assert [path.name for path in old(pair).iterdir()] == ["mine"]
    left_alone(pair, cli, old(pair), "--overwrite", what="'mine'")
    (old(pair) / "mine").unlink()
    assert cli(*pair.command).code == 5
    assert alone(pair)


def test_a_lock_that_is_swapped_is_not_removed(pair, cli, monkeypatch):
    def swap() -> None:
        lock(pair).rename(pair.root / "away")
        lock(pair).write_text("mine")

    at_the_first_shard(monkeypatch, swap)
    assert cli(*pair.command).code == 0
    assert lock(pair).read_text() == "mine"


def test_a_lock_that_never_stays_ends(pair, cli, monkeypatch):
    opened = system.open

    def fleeting(path: Any, flags: int) -> int:
        descriptor = opened(path, flags)
        if Path(path) == lock(pair):
            lock(pair).unlink()
        return descriptor

    monkeypatch.setattr(system, "open", fleeting)
    outcome = cli(*pair.command)
    assert outcome.code == 5
    assert str(lock(pair)) in outcome.err


# --- what is ours goes on -------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o002, 0o077, 0o022, 0o000])
def test_any_umask(umask, pair):
    """Killed and continued, with the same one; under 000 all may write everything, as was asked for."""
    line = ["sh", "-c", f'umask {umask:04o}; exec "$@"', "sh", sys.executable, "-m", "streamshard"]
    code = f"import os\nos.umask({umask})\n"
    killed(code + AFTER_A_SHARD, [*pair.command, "--workers", "1"])
    done = subprocess.run([*line, *pair.command, "--json"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["resumed"] == 1
    assert stat.S_IMODE(pair.output.stat().st_mode) == 0o777 & ~umask
    assert stat.S_IMODE((pair.output / FIRST).stat().st_mode) == 0o666 & ~umask
    assert alone(pair)


@pytest.mark.parametrize("umask", [0o002, 0o000])
def test_a_stricter_umask_than_at_the_beginning(umask, pair, cli):
    """What others could write to meanwhile is not continued, and what to do is said."""
    killed(f"import os\nos.umask({umask})\n" + AFTER_A_SHARD, [*pair.command, "--workers", "1"])
    lock(pair).unlink(missing_ok=True)
    said = f"mode is {0o777 & ~umask:04o}), more than the umask (0022)"
    left_alone(pair, cli, partial(pair), what=said)
    left_alone(pair, cli, partial(pair), what="run again under that one, or remove the folder")


@pytest.mark.parametrize("mode", [0o1777, 0o2775, 0o777])
def test_any_mode_of_the_folder_around(mode, pair, cli):
    pair.output.parent.chmod(mode)
    killed(AFTER_A_SHARD, [*pair.command, "--workers", "1"])
    assert cli(*pair.command).code == 0
    assert cli(*pair.command, "--overwrite").code == 0
    assert alone(pair)


def test_through_a_folder_that_is_a_link(pair, cli):
    (pair.root / "link").symlink_to(pair.output.parent)
    command = [*pair.command[:-1], str(pair.root / "link" / "merged")]
    killed(AFTER_A_SHARD, [*command, "--workers", "1"])
    assert cli(*command).code == 0
    assert cli(*command, "--overwrite").code == 0
    assert alone(pair)


BEFORE_THE_NOTE = """
from streamshard.engine.lock import Lock
Lock.note = lambda *_: kill()
"""
AFTER_THE_NOTE = """
from streamshard.engine.staging import Staging
Staging.remove_journal = lambda _: kill()
"""
WITHOUT_JOURNAL = """
from streamshard.engine.staging import Staging
remove = Staging.remove_journal
def last(self):
    remove(self)
    kill()
Staging.remove_journal = last
"""
AFTER_THE_RENAMES = """
from streamshard.disk.system import system
rename = system.rename
def last(path, other):
    rename(path, other)
    if str(path).endswith(".partial"):
        kill()
system.rename = last
"""
THE_RECORD_LAST = """
from streamshard.disk.system import system
unlink = system.unlink
def last(path):
    unlink(path)
    if str(path).endswith(".merged.old/streamshard.json"):
        kill()
system.unlink = last
"""
STEPS = [
    BEFORE_THE_NOTE,
    AFTER_THE_NOTE,
    WITHOUT_JOURNAL,
    BETWEEN_THE_RENAMES,
    AFTER_THE_RENAMES,
    REMOVING_THE_OLD,
    THE_RECORD_LAST,
]


@pytest.mark.parametrize("again", [[], ["--overwrite"], ["--overwrite", "--weight", "0.25"]])
@pytest.mark.parametrize("step", range(len(STEPS)))
def test_an_overwrite_that_was_killed_is_finished_or_undone(step, again, pair, cli):
    before = make_output(pair)
    clean = pair.root / "clean"
    streamshard.merge_lora(base=pair.base, adapter=pair.adapter, output=clean)
    killed(STEPS[step], [*pair.command, "--overwrite"])
    left_alone_in_a_dry_run(pair, cli)
    outcome = cli(*pair.command, *again)
    found = content(pair.output)
    if again:
        assert outcome.code == 0, outcome.err
        assert alone(pair)
    else:
        assert outcome.code == 5
        assert found == (before if step < 4 else content(clean))
        assert not old(pair).exists()
    assert cli(*pair.command, "--overwrite", *again).code == 0
    assert alone(pair)


def left_alone_in_a_dry_run(pair: Pair, cli: Cli) -> None:
    before = state(pair.output.parent)
    assert cli(*pair.command, "--overwrite", "--dry-run").code == 0
    assert state(pair.output.parent) == before


@pytest.mark.parametrize("step", [1, 2])
def test_a_kill_right_before_the_only_rename(step, pair, cli):
    killed(STEPS[step], pair.command)
    assert lock(pair).exists()
    assert cli(*pair.command).code == 0
    assert alone(pair)


def test_a_folder_of_a_user_after_a_run_was_killed(pair, cli):
    """The note in the lock is of another folder."""
    make_output(pair)
    killed(BETWEEN_THE_RENAMES, [*pair.command, "--overwrite"])
    old(pair).rename(pair.root / "kept")
    old(pair).mkdir()
    (old(pair) / "mine").write_text("mine")
    before = state(old(pair))
    outcome = cli(*pair.command)
    assert outcome.code == 5
    assert str(old(pair)) in outcome.err
    assert state(old(pair)) == before
    assert not pair.output.exists()


def test_a_file_in_the_old_output_after_a_run_was_killed(pair, cli):
    make_output(pair)
    killed(AFTER_THE_RENAMES, [*pair.command, "--overwrite"])
    (old(pair) / "mine").write_text("mine")
    outcome = cli(*pair.command, "--overwrite")
    assert outcome.code == 5
    assert "'mine'" in outcome.err
    assert (old(pair) / "mine").read_text() == "mine"


# --- disks that cannot say ------------------------------------------------------------------------


@needs_root
def test_where_all_files_belong_to_somebody_else(pair, cli, monkeypatch):
    """As on FAT: what is made there shows a fixed owner and mode."""
    killed(AFTER_A_SHARD, [*pair.command, "--workers", "1"])
    shown: list[str] = []

    def fixed(call: Callable[..., os.stat_result]) -> Callable[..., os.stat_result]:
        def look(path: Any) -> os.stat_result:
            real = call(path)
            shown.append(str(path))
            found = list(real)
            found[4], found[0] = 4711, found[0] | 0o777
            times = {name: getattr(real, name) for name in ("st_mtime_ns", "st_ctime_ns")}
            return os.stat_result(found, times)

        return look

    for name in ("stat", "lstat", "fstat"):
        monkeypatch.setattr(system, name, fixed(getattr(system, name)))
    outcome = cli(*pair.command, "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["resumed"] == 1
    assert shown
    assert alone(pair)


def test_a_probe_is_removed_and_one_is_enough(tmp_path):
    file = tmp_path / "file"
    file.touch()
    file.chmod(0o646)
    decides = ours.Ours(tmp_path)
    for _ in range(3):
        with pytest.raises(OutputError, match="0646"):
            decides.check_file(file)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a" * 255, "a" * 247, "é" * 127, "🦆" * 63, "a" * 246 + "éé"])
def test_names_as_long_as_a_disk_takes(name, pair, cli):
    output = pair.output.parent / name
    command = [*pair.command[:-1], str(output)]
    for path in places_beside(output).values():
        assert len(os.fsencode(path.name)) <= 255
        path.name.encode()
    killed(AFTER_A_SHARD, [*command, "--workers", "1"])
    outcome = cli(*command, "--json")
    assert json.loads(outcome.out)["resumed"] == 1
    assert cli(*command, "--overwrite").code == 0
    assert [path.name for path in output.parent.iterdir()] == [name]


def test_names_beside_names():
    assert long_names.beside(".", "x", ".old") == ".x.old"
    long = [long_names.beside(".", "a" * 250 + end, ".old") for end in "bc"]
    assert len({*long, long_names.beside(".", "a" * 250 + "b", ".partial")}) == 3
    assert all(name.endswith(".old") and name.startswith(".aaa") for name in long)


@pytest.mark.parametrize("characters", [119, 120, 121])
def test_a_weight_file_with_a_long_name(characters, pair, cli):
    name = "é" * characters + ".safetensors"
    assert len(name.encode()) in {250, 252, 254}
    (pair.base / FIRST).rename(pair.base / name)
    index = pair.base / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(FIRST, name))
    outcome = cli(*pair.command)
    assert outcome.code == 0, outcome.err
    assert (pair.output / name).exists()
    assert alone(pair)


@pytest.mark.parametrize("name", ["a" * 256, "é" * 128, "a/" * 2100 + "a"])
def test_names_that_are_longer_than_that(name, pair, cli):
    before = state(pair.root)
    outcome = cli(*pair.command[:-1], str(pair.output.parent / name))
    assert outcome.code == 6
    assert "too long" in outcome.err
    assert "Traceback" not in outcome.err
    assert state(pair.root) == before


# --- parts ----------------------------------------------------------------------------------------


def test_only_what_is_listed_is_removed(tmp_path):
    for name in ("a", "inner/b", "inner/c", "more/d"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    listed = ["a", "inner/b", "more/d", "link", "../outside", "/etc"]
    with streamshard.disk.folders.held(tmp_path):
        assert claims.strangers(tmp_path, listed) == ["inner/c", "link (a symbolic link)"]
        assert claims.remove_listed(tmp_path, listed, last="a") == ["inner/c", "link"]
    there = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert there == {"inner", "inner/c", "link"}


def test_a_base_with_a_journal_of_its_own(pair, cli):
    """It is what a copied staging folder has; it is no part of a model."""
    (pair.base / "streamshard.journal").write_text("x")
    assert cli(*pair.command).code == 0
    assert not (pair.output / "streamshard.journal").exists()


def test_a_stopped_run_that_is_swapped_is_noticed(pair):
    """In a process of its own, stopped at its first shard."""
    stop = AFTER_A_SHARD.replace("kill()", "os.kill(os.getpid(), signal.SIGSTOP)")
    line = [sys.executable, "-c", "import os, signal\n" + stop + MAIN, *pair.command]
    before = state(pair.base)
    with subprocess.Popen([*line, "--workers", "1"], stderr=subprocess.PIPE, text=True) as run:
        _, status = os.waitpid(run.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        partial(pair).rename(pair.root / "away")
        partial(pair).symlink_to(pair.base)
        run.send_signal(signal.SIGCONT)
        _, said = run.communicate(timeout=60)
    assert run.returncode == 5, said
    assert str(partial(pair)) in said
    assert state(pair.base) == before


MAIN = "\nfrom streamshard.cli import main\nmain()\n"
