"""One output by several processes: the bytes of one run, whoever does what, is killed, or comes twice."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from foreign_things import FOREIGN, foreign, state
from hangs import until
from interrupted_runs import (
    BETWEEN_THE_RENAMES,
    FIRST,
    SECOND,
    alone,
    content,
    flip,
    killed,
    partial,
)
from marks import slow
from pairs import Pair
from parts_runs import (
    AFTER_A_RECORD,
    AFTER_ADOPTING,
    BEFORE_THE_NAME,
    WHILE_ADOPTING,
    all_parts_with_kills,
    folder_of,
    process,
    written,
)

import streamshard
from streamshard.disk.system import System
from streamshard.engine import parts as engine_parts
from streamshard.engine import parts_cleanup, parts_folder, resume
from streamshard.engine.division import divided
from streamshard.engine.fingerprint import Fingerprint
from streamshard.engine.lock import locked
from streamshard.engine.marks import mark_of
from streamshard.engine.parts_files import read_checked
from streamshard.engine.parts_folder import PartsFolder
from streamshard.errors import OutputError, UsageError, WriteError

BENCH = Path(__file__).resolve().parents[2] / "bench"


def part(pair: Pair, which: str, **options: object) -> streamshard.Report:
    return streamshard.merge_lora(
        base=pair.base, adapter=pair.adapter, output=pair.output, part=which, **options
    )


# --- who does what --------------------------------------------------------------------------------


def of_sizes(*sizes: int) -> list[SimpleNamespace]:
    return [SimpleNamespace(name=f"{place}", nbytes=size) for place, size in enumerate(sizes)]


def test_shards_are_divided_by_bytes():
    parts = divided(of_sizes(5, 1, 9, 4, 4, 1), 3)
    assert [[shard.nbytes for shard in own] for own in parts] == [[9], [5, 1, 1], [4, 4]]


def test_more_parts_than_shards_have_nothing():
    parts = divided(of_sizes(5, 7), 5)
    assert [[shard.name for shard in own] for own in parts] == [["1"], ["0"], [], [], []]


@pytest.mark.parametrize("count", [1, 2, 7, 96, 97, 98, 500])
def test_every_shard_is_in_one_part(count):
    chance = random.Random(count)
    shards = of_sizes(*(chance.randrange(1, 5_000_000_000) for _ in range(97)))
    parts = divided(shards, count)
    assert sorted(shard.name for own in parts for shard in own) == sorted(s.name for s in shards)
    loads = [sum(shard.nbytes for shard in own) for own in parts]
    # What the largest has more than the smallest is at most one shard.
    assert max(loads) - min(loads) <= max(shard.nbytes for shard in shards)
    assert divided(shards, count) == parts


def test_a_dry_run_shows_it(pair, cli):
    outcome = cli(*pair.command, "--part", "2/3", "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert [one["files"] for one in report["plan"]["parts"]] == [[SECOND], [FIRST], []]
    assert report["part"] == {
        "part": "2/3",
        "files": [FIRST],
        "bytes": report["plan"]["parts"][1]["bytes"],
        "resumed": 0,
        "finished": 0,
        "complete": False,
    }
    said = cli(*pair.command, "--part", "2/3", "--dry-run").out
    assert f"-> part 2/3: {FIRST}" in said
    assert "part 3/3: nothing" in said
    assert not folder_of(pair).exists()


# --- the same bytes -------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["12", "21"])
def test_the_last_part_completes_the_output(order, pair, clean, cli):
    first, last = (cli(*pair.command, "--part", f"{number}/2", "--json") for number in order)
    assert (first.code, last.code) == (0, 0), first.err + last.err
    told = json.loads(first.out)["part"]
    assert (told["finished"], told["complete"]) == (1, False)
    report = json.loads(last.out)
    assert report["part"]["complete"]
    assert report["l2"] == clean["streamshard.json"]["l2"]
    assert content(pair.output) == clean
    assert alone(pair)


def test_inputs_are_told_apart_once(pair, monkeypatch):
    """An adapter is read whole for it."""
    identity, seen = Fingerprint.identity, []

    def counted(*given: object) -> object:
        seen.append(given)
        return identity(*given)

    monkeypatch.setattr(Fingerprint, "identity", counted)
    assert part(pair, "1/1")["part"]["complete"]
    assert len(seen) == 1


@pytest.fixture
def read(monkeypatch):
    """The shards that are read again, in turn."""
    found, own = [], resume._unlike

    def noted(shards, *more):
        found.append([shard.name for shard, _ in shards])
        return own(shards, *more)

    monkeypatch.setattr(resume, "_unlike", noted)
    return found


def test_a_part_reads_what_the_one_before_has_written(pair, clean, read):
    first, second = (part_files(pair, number) for number in "12")
    part(pair, "1/2")
    assert read == []
    part(pair, "2/2")
    assert read == [first, second]  # the one of its own when it completes all
    assert content(pair.output) == clean
    assert alone(pair)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_shard_that_was_damaged_is_written_anew(when, pair, clean, read, monkeypatch):
    """Before another part has read it, or after that."""
    (name,) = part_files(pair, "1")
    part(pair, "1/2")
    place = folder_of(pair) / name

    def damage():
        data = bytearray(place.read_bytes())
        data[-1] ^= 1
        written = place.stat().st_mtime_ns
        while place.stat().st_mtime_ns == written:  # until the clock of files has ticked
            place.write_bytes(data)

    if when == "before":
        damage()
    else:
        own = PartsFolder.add_checked
        monkeypatch.setattr(PartsFolder, "add_checked", lambda *given: (own(*given), damage()))
    part(pair, "2/2")
    assert read[-1] == [FIRST, SECOND]
    assert content(pair.output) == clean
    assert alone(pair)


def test_a_check_counts_for_what_was_checked(pair):
    """Not for a shard that was noted otherwise, another plan, or a note that is not as it was written."""
    part(pair, "1/2")
    with parts_folder.opened_parts(pair.output) as found:
        shared = found.shared
    with parts_folder.shared_parts(pair.output, shared, overwrite=False) as parts:
        ((name, shard),) = parts.finished.items()
        assert parts.checked(shard) is None
        mark = mark_of(parts.folder / name)
        parts.add_checked(shard, mark)
        assert parts.checked(shard) == mark
        assert parts.checked(replace(shard, digest="0" * len(shard.digest))) is None
        assert read_checked(parts.folder, shard, "0" * len(shared.digest)) is None
        assert parts.checked(replace(shard, name=SECOND if name == FIRST else FIRST)) is None
        note = parts.folder / f"{name}.checked"
        for place in range(note.stat().st_size):
            flip(note, place)
            assert parts.checked(shard) is None
            flip(note, place)
        assert parts.checked(shard) == mark


def part_files(pair, number: str) -> list[str]:
    """What a part of two writes."""
    shown = part(pair, "1/2", dry_run=True)["plan"]["parts"]
    return shown[int(number) - 1]["files"]


def test_finish_completes_it(pair, clean, monkeypatch):
    monkeypatch.setattr(engine_parts.Output, "is_finished", False)
    part(pair, "1/2")
    assert not part(pair, "2/2")["part"]["complete"]
    monkeypatch.undo()
    assert not pair.output.exists()
    report = part(pair, "finish")
    assert report["part"] == {
        "part": "finish",
        "files": [],
        "bytes": 0,
        "resumed": 0,
        "finished": 2,
        "complete": True,
    }
    assert content(pair.output) == clean
    assert alone(pair)


def test_parts_of_several_divisions_go_together(pair, clean):
    part(pair, "1/3")
    part(pair, "3/3")
    assert not pair.output.exists()
    assert part(pair, "2/2")["part"]["complete"]
    assert content(pair.output) == clean


def test_a_part_with_nothing_to_do_leaves_nothing(pair):
    report = part(pair, "3/3")
    assert report["part"]["files"] == []
    assert not folder_of(pair).exists()


def test_a_part_again_does_nothing(pair):
    part(pair, "1/2")
    before = state(folder_of(pair))
    report = part(pair, "1/2")
    assert report["part"]["resumed"] == 1
    assert {k: v for k, v in state(folder_of(pair)).items() if k != "."} == {
        k: v for k, v in before.items() if k != "."
    }


@pytest.mark.parametrize("which", ["1/2", "2/2", "3/7", "finish"])
def test_a_part_of_what_is_complete_says_so(which, pair, clean, cli):
    part(pair, "1/1")
    before = state(pair.output)
    outcome = cli(*pair.command, "--part", which, "--json")
    assert outcome.code == 0, outcome.err
    assert "complete already" in outcome.err
    report = json.loads(outcome.out)
    assert report["part"]["complete"]
    assert report["l2"] == clean["streamshard.json"]["l2"]
    assert "digests" not in report
    assert state(pair.output) == before
    assert alone(pair)


@pytest.mark.parametrize("which", ["1/2", "finish"])
def test_a_disk_that_is_full_of_it(which, pair, monkeypatch):
    """It has no room for another one, and needs none."""
    monkeypatch.setattr(System, "disk_free", lambda *_: 20_000)
    with pytest.raises(WriteError, match=r"are needed but 20\.00 KB are free"):
        part(pair, "1/2")
    with pytest.raises(WriteError, match=r"are needed but 20\.00 KB are free"):
        part(pair, "1/2", dry_run=True)
    assert not [*pair.output.parent.iterdir()]
    monkeypatch.undo()
    part(pair, "1/1")
    monkeypatch.setattr(System, "disk_free", lambda *_: 20_000)
    assert part(pair, which, dry_run=True)["part"]["complete"]
    assert part(pair, which)["part"]["complete"]


def test_of_an_ordinary_run_too(pair, clean):
    streamshard.merge_lora(base=pair.base, adapter=pair.adapter, output=pair.output)
    assert part(pair, "1/2")["part"]["complete"]


def test_sha256_is_asked_for_by_who_completes(pair):
    part(pair, "1/2")
    part(pair, "2/2", sha256=True)
    files = json.loads((pair.output / "streamshard.json").read_bytes())["digests"]["files"]
    assert all("sha256" in found for found in files.values())


def test_progress_is_of_the_part(pair):
    seen: list[int] = []
    steps: list[tuple[str, int, int]] = []
    part(pair, "1/2", progress=lambda n, _: seen.append(n), on_step=lambda *s: steps.append(s))
    assert steps[0] == ("writing", sum(seen), 0)
    assert sum(seen) == 130 * 40 * 2 + 40 * 2


def test_updates_that_change_nothing(pair):
    """Known only when all is written: of that nothing stays, as in one run."""
    part(pair, "1/2", weight=[1e-30])
    with pytest.raises(streamshard.errors.AdapterError, match="change no weight"):
        part(pair, "2/2", weight=[1e-30])
    assert [*pair.output.parent.iterdir()] == []


# --- with other things ----------------------------------------------------------------------------


def test_an_older_output_is_replaced_at_the_end(pair, clean):
    streamshard.merge_lora(base=pair.base, adapter=pair.adapter, output=pair.output, weight=[0.5])
    older = content(pair.output)
    with pytest.raises(OutputError, match="exists"):
        part(pair, "1/2")
    part(pair, "1/2", overwrite=True)
    assert content(pair.output) == older
    part(pair, "2/2", overwrite=True)
    assert content(pair.output) == clean
    assert alone(pair)


def test_an_interrupted_run_is_continued(interrupted, clean):
    report = part(interrupted, "2/2")  # does what is done already
    assert report["part"]["resumed"] == 1
    assert part(interrupted, "1/2")["part"]["complete"]
    assert content(interrupted.output) == clean
    assert alone(interrupted)


def test_what_an_interrupted_run_has_is_seen(interrupted):
    assert part(interrupted, "2/2")["part"]["finished"] == 1


def test_a_run_of_the_whole_says_what_is_there(pair, refused, cli, clean):
    part(pair, "1/2")
    refused(5, str(folder_of(pair)), "1 finished", "--part finish", "--overwrite")
    refused(5, str(folder_of(pair)), more=["--dry-run"])
    assert cli(*pair.command, "--overwrite").code == 0
    assert content(pair.output) == clean
    assert alone(pair)


def test_what_is_being_written_is_not_discarded(pair, cli, monkeypatch):
    add = PartsFolder.add
    outcomes = []

    def meanwhile(self, shard):
        add(self, shard)
        outcomes.append(
            subprocess.run(
                [sys.executable, "-m", "streamshard", *pair.command, "--overwrite"],
                capture_output=True,
                text=True,
                check=False,
            )
        )

    monkeypatch.setattr(PartsFolder, "add", meanwhile)
    part(pair, "1/2")
    assert outcomes[0].returncode == 5
    assert "another run (process" in outcomes[0].stderr
    assert f"{FIRST}.done" in written(pair) or f"{SECOND}.done" in written(pair)


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "fragment"),
    [
        ("0/4", "counted from 1, to 4. If yours are counted from 0, add 1"),
        ("5/4", "counted from 1, to 4"),
        ("a/b", "I/N was expected"),
        ("3", "I/N was expected"),
        ("1/0", "counted from 1"),
        ("-1/4", "I/N was expected"),
        ("1/4/2", "I/N was expected"),
        ("Finish", "I/N was expected"),
        ("\u0663/\u0668", "I/N was expected"),
    ],
)
def test_what_is_no_part(value, fragment, refused):
    refused(2, fragment, more=["--part", value])


def test_in_python_too(pair):
    with pytest.raises(UsageError, match="`part` is '2/x'"):
        part(pair, "2/x")
    with pytest.raises(UsageError, match="I/N or finish was expected"):
        part(pair, 3)


def test_finish_without_parts(refused):
    refused(5, "no part of it was written", "--part 1/N", more=["--part", "finish"])


def test_finish_before_all_are_there(pair, refused):
    part(pair, "1/2")
    refused(5, "1 of its 2 weight files are missing", FIRST, more=["--part", "finish"])
    refused(5, "are missing", more=["--part", "finish", "--dry-run"])


def test_an_output_of_another_plan_is_there(pair, refused):
    """That is what is said to who completes, too, and not that parts are missing."""
    part(pair, "1/1")
    for which in ("1/2", "finish"):
        refused(5, "exists. Choose another output", more=["--part", which, "--weight", "0.5"])


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (["--weight", "0.5"], "--weight was"),
        (["--dtype", "fp32"], "--dtype was keep and is fp32"),
        (["--max-shard-size", "5KB"], "--max-shard-size was not given"),
    ],
)
def test_another_plan(options, fragment, pair, refused, cli):
    part(pair, "1/2")
    for which in ("1/2", "2/2"):
        refused(5, "begun otherwise", fragment, more=["--part", which, *options])
    assert cli(*pair.command, "--part", "1/1", *options, "--overwrite").code == 0
    assert alone(pair)


def test_another_input(pair, refused):
    part(pair, "1/2")
    (pair.base / "tokenizer_config.json").write_text('{"model_max_length": 9}')
    refused(5, "tokenizer_config.json", "has changed", more=["--part", "2/2"])


def test_another_version(pair, refused, monkeypatch):
    part(pair, "1/2")
    monkeypatch.setattr("streamshard.engine.fingerprint.__version__", "0.0.9")
    refused(5, "it was version", "this is 0.0.9", more=["--part", "2/2"])


@pytest.mark.parametrize("how", FOREIGN)
@pytest.mark.parametrize(
    "name", [f"{FIRST}.done", f"{FIRST}.checked", FIRST, "0123456789abcdef.lock"]
)
def test_what_is_not_ours(name, how, pair, cli):
    part(pair, "1/2")
    said = foreign(folder_of(pair) / name, how, pair)
    for more in (["--part", "2/2"], ["--part", "2/2", "--overwrite"], ["--overwrite"]):
        before = state(pair.root)
        outcome = cli(*pair.command, *more)
        assert outcome.code == 5, outcome
        assert said in outcome.err
        assert str(folder_of(pair) / name) in outcome.err
        assert state(pair.root) == before


@pytest.mark.parametrize("name", ["notes.txt", f"x{FIRST}.0123456789abcdef.part", "plan/more"])
def test_what_no_part_makes(name, pair, cli):
    part(pair, "1/2")
    (folder_of(pair) / name).write_text("mine")
    for more in (["--part", "2/2"], ["--part", "finish"], ["--overwrite"]):
        before = state(pair.root)
        outcome = cli(*pair.command, *more)
        assert outcome.code == 5
        assert name in outcome.err
        assert state(pair.root) == before


@pytest.mark.parametrize("how", ["link", "owner", "mode", "file"])
def test_a_folder_that_is_not_ours(how, pair, cli):
    folder = folder_of(pair)
    if how == "file":
        folder.write_text("mine")
    else:
        (pair.root / "mine").mkdir()
        if how == "link":
            folder.symlink_to(pair.root / "mine")
        else:
            folder.mkdir()
            if how == "mode":
                folder.chmod(0o777)
            else:
                import os

                os.chown(folder, 65533, -1)
    for more in (["--part", "1/1"], ["--overwrite"]):
        before = state(pair.root)
        outcome = cli(*pair.command, *more)
        assert outcome.code == 5, outcome
        assert str(folder) in outcome.err
        assert state(pair.root) == before


def test_a_plan_that_was_changed(pair, cli):
    part(pair, "1/2")
    flip(folder_of(pair) / "plan" / "identity.json", 50)
    for more in (["--part", "2/2"], ["--part", "finish"], ["--overwrite"]):
        outcome = cli(*pair.command, *more)
        assert outcome.code == 5
        assert "is not as it was written" in outcome.err


# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [f"{SECOND}.done", SECOND])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_damage_is_noticed(name, how, pair, clean):
    """Of a shard of which only the content differs, when it is read again in the end."""
    part(pair, "1/2")
    file = folder_of(pair) / name
    if how == "flipped":
        flip(file, file.stat().st_size - 20)
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.unlink()
    report = part(pair, "2/2")
    if not report["part"]["complete"]:
        assert part(pair, "1/2")["part"]["complete"]
    assert content(pair.output) == clean
    assert alone(pair)


def test_the_record_of_another_plan(pair, clean):
    """As of a process that was still writing when the folder was begun anew."""
    part(pair, "1/2", weight=[0.5])
    (name,) = {path.name for path in folder_of(pair).glob("*.done")}
    record = (folder_of(pair) / name).read_bytes()
    shard = (folder_of(pair) / name.removesuffix(".done")).read_bytes()
    part(pair, "1/2", overwrite=True)
    (folder_of(pair) / name).write_bytes(record)
    (folder_of(pair) / name.removesuffix(".done")).write_bytes(shard)
    assert part(pair, "1/2", dry_run=True)["part"]["finished"] == 0
    part(pair, "1/2")
    part(pair, "2/2")
    assert content(pair.output) == clean


# --- killed, and twice at once --------------------------------------------------------------------


@pytest.mark.parametrize("code", [AFTER_A_RECORD, BEFORE_THE_NAME])
def test_a_killed_part_is_run_again(code, pair, clean):
    command = [*pair.command, "--part", "1/1"]
    killed(code, command)
    left = written(pair)
    assert any(name.endswith(".lock") for name in left)
    assert any(name.endswith(".done") for name in left) == (code is AFTER_A_RECORD)
    part(pair, "3/3")  # has nothing to do but to remove what is left
    if code is AFTER_A_RECORD:
        assert not any(name.endswith((".lock", ".part")) for name in written(pair))
    else:
        assert not folder_of(pair).exists()
    part(pair, "1/1")
    assert content(pair.output) == clean
    assert alone(pair)


@pytest.mark.parametrize("then", ["finish", "1/2", "2/2", "1/3"])
@pytest.mark.parametrize("replaces", [False, True])
def test_who_completes_is_killed_right_before_the_end(replaces, then, pair, clean):
    """All of it is there, and no journal: whoever comes next gives it its name, and writes nothing."""
    if replaces:
        streamshard.merge_lora(
            base=pair.base, adapter=pair.adapter, output=pair.output, dtype="fp32"
        )
    part(pair, "1/2", overwrite=replaces)
    killed(BETWEEN_THE_RENAMES, [*pair.command, "--part", "2/2", *["--overwrite"] * replaces])
    assert not (partial(pair) / "streamshard.journal").exists()
    before = (partial(pair) / FIRST).stat().st_ino
    told = part(pair, then, overwrite=replaces, dry_run=True)["part"]
    assert (told["finished"], told["complete"]) == (2, False)
    assert part(pair, then, overwrite=replaces)["part"]["complete"]
    assert (pair.output / FIRST).stat().st_ino == before
    assert content(pair.output) == clean
    assert alone(pair)


@pytest.mark.parametrize("spoiled", [FIRST, "config.json", "streamshard.json"])
def test_what_is_no_longer_whole_gets_no_name(spoiled, pair, clean):
    part(pair, "1/2")
    killed(BETWEEN_THE_RENAMES, [*pair.command, "--part", "2/2"])
    (partial(pair) / spoiled).write_bytes(b"{}")
    with contextlib.suppress(OutputError):
        assert part(pair, "1/2", dry_run=True)["part"]["finished"] == 0
    with contextlib.suppress(OutputError):
        assert not part(pair, "1/2")["part"]["complete"]
    assert not pair.output.exists()


@pytest.mark.parametrize("code", [WHILE_ADOPTING, AFTER_ADOPTING])
@pytest.mark.parametrize("then", ["finish", "2/2", "1/3"])
def test_who_completes_is_killed(code, then, pair, clean):
    part(pair, "1/2")
    killed(code, [*pair.command, "--part", "2/2"])
    assert partial(pair).exists()
    assert not pair.output.exists()
    assert part(pair, then)["part"]["complete"]
    assert content(pair.output) == clean
    assert alone(pair)


def test_a_run_of_the_whole_continues_what_was_adopted(pair, clean, cli):
    part(pair, "1/2")
    killed(AFTER_ADOPTING, [*pair.command, "--part", "2/2"])
    outcome = cli(*pair.command, "--json")
    assert json.loads(outcome.out)["resumed"] == 2
    assert content(pair.output) == clean


def test_the_same_part_many_times_at_once(pair, clean):
    found = [process([*pair.command, "--part", "1/1"]) for _ in range(6)]
    for one in found:
        said = one.communicate()[1]
        assert one.returncode == 0, said
    assert content(pair.output) == clean
    assert alone(pair)


def test_one_that_wakes_when_all_is_done(pair, clean, monkeypatch):
    """As a frozen process does: what it was writing to is gone."""
    add, awake = PartsFolder.add, threading.Event()

    def frozen(self, shard):
        if threading.current_thread() is not threading.main_thread() and not awake.is_set():
            awake.set()
            done = subprocess.run(
                [sys.executable, "-m", "streamshard", *pair.command, "--part", "1/1"],
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
        add(self, shard)

    monkeypatch.setattr(PartsFolder, "add", frozen)
    report = part(pair, "1/2")
    assert report["part"]["complete"]
    assert content(pair.output) == clean
    assert alone(pair)


def test_one_that_is_late(pair, clean, monkeypatch):
    """All was done, and the folder of the parts removed, between its look at the place and its own."""
    write, others = engine_parts.Output.write, []

    def late(self, *given):
        if not others:
            others.append(process([*pair.command, "--part", "1/1"]))
            said = others[0].communicate()[1]
            assert others[0].returncode == 0, said
        write(self, *given)

    def nothing(*_, **__):
        raise AssertionError("is written again")

    monkeypatch.setattr(engine_parts.Output, "write", late)
    monkeypatch.setattr(engine_parts, "write_shards", nothing)
    assert part(pair, "1/2")["part"]["complete"]
    assert content(pair.output) == clean
    assert alone(pair)


@pytest.mark.parametrize("stays", [False, True])
def test_what_comes_into_a_folder_that_is_removed(stays, pair, clean, monkeypatch):
    """Its plan must not be gone then: nobody could tell whose the rest is."""
    part(pair, "1/2")
    (name,) = (name for name in written(pair) if name.endswith(".safetensors"))
    shard, folder = (folder_of(pair) / name).read_bytes(), folder_of(pair)
    remove, came = parts_cleanup.remove, []

    def coming(where, names):
        remove(where, names)
        if names == {parts_cleanup.PLAN} and (stays or not came):
            came.append((folder / name).write_bytes(shard))

    monkeypatch.setattr(parts_cleanup, "remove", coming)
    monkeypatch.setattr(parts_folder, "TRIES", 3)
    assert parts_folder.discard_parts(pair.output) is not stays
    assert folder.exists() is stays
    monkeypatch.undo()
    part(pair, "1/2")
    part(pair, "2/2")
    assert content(pair.output) == clean
    assert alone(pair)


@pytest.mark.parametrize("step", ["held_parts", "checked"])
def test_a_folder_that_is_removed_when_it_is_opened(step, pair, monkeypatch):
    part(pair, "1/2")
    original = getattr(parts_folder, step)

    def removed(folder):
        shutil.rmtree(folder)
        return original(folder)

    monkeypatch.setattr(parts_folder, step, removed)
    with parts_folder.opened_parts(pair.output) as parts:
        assert parts is None


@pytest.mark.parametrize("which", ["1/1", "finish"])
def test_one_that_only_looks(which, pair, clean):
    """A lock is taken to see what is beside an output; who comes then waits until it is free."""
    part(pair, "1/2")
    if which == "finish":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine_parts.Output, "is_finished", False)
            part(pair, "2/2")
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(pair.output.with_name(".merged.lock"), pair.output))
        waited = []
        waiting = SimpleNamespace(sleep=lambda _: waited.append(stack.close()))
        stack.enter_context(pytest.MonkeyPatch.context()).setattr(engine_parts, "time", waiting)
        assert part(pair, which)["part"]["complete"]
        assert waited
    assert content(pair.output) == clean
    assert alone(pair)


def test_one_that_has_only_to_rename(pair, clean, monkeypatch):
    """There is no journal then, and its lock is held: what it has is finished all the same."""
    monkeypatch.setattr(engine_parts, "TRIES", 2)
    part(pair, "1/2")
    stops = BETWEEN_THE_RENAMES.replace("kill()", "os.kill(os.getpid(), signal.SIGSTOP)")
    last = process([*pair.command, "--part", "2/2"], stops)
    until(lambda: partial(pair).exists() and not (partial(pair) / "streamshard.journal").exists())
    os.waitpid(last.pid, os.WUNTRACED)
    told = part(pair, "1/2")["part"]
    assert (told["finished"], told["complete"]) == (2, False)
    last.send_signal(signal.SIGCONT)
    said = last.communicate()[1]
    assert last.returncode == 0, said
    assert content(pair.output) == clean
    assert alone(pair)


def test_the_folder_is_put_elsewhere(pair, monkeypatch):
    add = PartsFolder.add

    def moving(self, shard):
        self.folder.rename(pair.root / "moved")
        add(self, shard)

    monkeypatch.setattr(PartsFolder, "add", moving)
    with pytest.raises(OutputError, match="no longer the folder"):
        part(pair, "1/2")
    assert not [name for name in (pair.root / "moved").iterdir() if name.suffix == ".part"]


def test_an_error_says_what_is_kept(pair, monkeypatch):
    part(pair, "1/2")
    from streamshard.disk.system import system

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(system, "pwrite", full)
    with pytest.raises(WriteError, match=r"What parts have finished of it is kept in .*parts"):
        part(pair, "2/2")
    assert {name for name in written(pair) if name.endswith(".part")} == set()


def test_an_interrupt_says_what_is_kept(pair):
    part(pair, "1/2")
    code = "import signal\nkill = lambda: os.kill(os.getpid(), signal.SIGINT)\n" + BEFORE_THE_NAME
    found = process([*pair.command, "--part", "2/2"], code)
    said = found.communicate()[1]
    assert found.returncode == 130
    assert "is kept in" in said
    assert not [name for name in written(pair) if name.endswith((".part", ".lock"))]


@slow
def test_eight_parts_that_are_killed_at_random(tmp_path, clean_of_many):
    command, expected = clean_of_many
    for round_ in range(3):
        output = tmp_path / f"out-{round_}" / "merged"
        output.parent.mkdir()
        kills = all_parts_with_kills([*command, "--output", str(output)], 8, random.Random(round_))
        assert kills > 2
        assert content(output) == expected
        assert [path.name for path in output.parent.iterdir()] == ["merged"]


@pytest.fixture
def clean_of_many(tmp_path):
    """A merge of a base of many files, and what one run makes of it."""
    tools = BENCH.parent / "tools" / "make_checkpoint.py"
    make = [sys.executable, str(tools), "--preset", "tiny", "--layout", "custom"]
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    make += ["--max-shard-size", "20KB", "--output", str(base), "--adapter", str(adapter)]
    subprocess.run(make, check=True, capture_output=True)
    command = ["merge-lora", "--base", str(base), "--adapter", str(adapter)]
    streamshard.merge_lora(base=base, adapter=adapter, output=tmp_path / "clean")
    return command, content(tmp_path / "clean")
