"""Nothing of others is touched: links, owners, modes, and what lies where a run writes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest
from foreign_things import (
    FOREIGN,
    MORE,
    foreign,
    interrupt,
    left_alone,
    lock,
    make_output,
    needs_root,
    old,
)
from interrupted_runs import (
    AFTER_A_SHARD,
    FIRST,
    alone,
    killed,
    partial,
)

import streamshard
from streamshard.disk.system import system
from streamshard.engine import claims, ours
from streamshard.errors import OutputError

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


def test_an_empty_folder_and_an_output_that_lost_a_file_are_replaced(pair, cli):
    pair.output.mkdir()
    assert cli(*pair.command, "--overwrite").code == 0
    (pair.output / FIRST).unlink()
    assert cli(*pair.command, "--overwrite").code == 0
    assert (pair.output / FIRST).exists()
    assert alone(pair)


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
