"""Runs that end early: what is kept, what continues it, what is refused, and who may write."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import reference
from interrupted_runs import (
    AFTER_A_SHARD,
    FIRST,
    INTERRUPT,
    SECOND,
    TOLD,
    alone,
    content,
    failing,
    flip,
    killed,
    partial,
    signalled,
)
from reference import load_file, save_file
from sparse_folders import sparse_adapter, sparse_base

import streamshard
from streamshard.checkpoint.digests import new_digest
from streamshard.disk.system import system

BENCH = Path(__file__).resolve().parents[2] / "bench"


# --- continuing -----------------------------------------------------------------------------------


def test_the_same_command_continues(interrupted, clean, cli):
    outcome = cli(*interrupted.command, "--json")
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert report["resumed"] == 1
    assert content(interrupted.output) == clean
    assert report["l2"] == clean["streamshard.json"]["l2"]
    assert alone(interrupted)


def test_what_is_finished_is_not_written_again(interrupted, cli):
    inode = (partial(interrupted) / FIRST).stat().st_ino
    assert cli(*interrupted.command).code == 0
    assert (interrupted.output / FIRST).stat().st_ino == inode


def test_progress_counts_what_was_finished(interrupted):
    seen: list[int] = []
    plans: list[Any] = []
    streamshard.merge_lora(
        base=interrupted.base,
        adapter=interrupted.adapter,
        output=interrupted.output,
        on_plan=plans.append,
        progress=lambda nbytes, _: seen.append(nbytes),
    )
    assert sum(seen) == plans[0].tensor_nbytes


def test_the_base_may_have_moved(interrupted, clean, cli):
    """Content counts, not paths and times."""
    interrupted.base.rename(interrupted.root / "moved")
    for file in (interrupted.root / "moved").iterdir():
        os.utime(file, (1, 1))
    command = [
        part.replace(str(interrupted.base), f"{interrupted.root}/moved")
        for part in interrupted.command
    ]
    outcome = cli(*command, "--json")
    assert json.loads(outcome.out)["resumed"] == 1
    assert (interrupted.output / SECOND).read_bytes() == clean[SECOND]


@pytest.mark.parametrize("where", [0, 9, -1], ids=["header length", "header", "data"])
def test_what_is_damaged_is_written_again(where, interrupted, clean, cli):
    flip(partial(interrupted) / FIRST, where)
    outcome = cli(*interrupted.command, "--json")
    assert json.loads(outcome.out)["resumed"] == 0
    assert content(interrupted.output) == clean


@pytest.mark.parametrize("how", ["gone", "shorter", "folder gone"])
def test_what_is_missing_is_written_again(how, interrupted, clean, cli):
    file = partial(interrupted) / FIRST
    if how == "gone":
        file.unlink()
    elif how == "shorter":
        os.truncate(file, 100)
    else:
        shutil.rmtree(partial(interrupted))
    outcome = cli(*interrupted.command, "--json")
    assert json.loads(outcome.out)["resumed"] == 0
    assert content(interrupted.output) == clean
    assert alone(interrupted)


@pytest.mark.parametrize("how", ["gone", "empty", "x", "half", "damaged"])
def test_without_the_list_of_a_journal_nothing_is_known_to_be_ours(how, interrupted, clean, cli):
    """It is on disk before anything else, so no crash leaves that."""
    journal = partial(interrupted) / "streamshard.journal"
    data = journal.read_bytes()
    journal.unlink()
    if how != "gone":
        begun = {
            "empty": b"",
            "x": b"x\n",
            "half": data[:200],
            "damaged": data[:99] + b"!" + data[100:],
        }
        journal.write_bytes(begun[how])
    before = reference.digests(interrupted.root)
    outcome = cli(*interrupted.command, "--overwrite")
    assert outcome.code == 5
    assert str(partial(interrupted)) in outcome.err
    assert how == "x" or f"'{FIRST}'" in outcome.err
    assert reference.digests(interrupted.root) == before
    for file in partial(interrupted).iterdir():
        if file != journal or how == "x":
            file.unlink()
    assert cli(*interrupted.command).code == 0
    assert content(interrupted.output) == clean
    assert alone(interrupted)


@pytest.mark.parametrize(("cut", "rest"), [(1, b""), (2, b"\0\0\0"), (200, b"garbage\n")])
def test_a_torn_journal(cut, rest, interrupted, clean, cli):
    journal = partial(interrupted) / "streamshard.journal"
    data = journal.read_bytes()
    journal.write_bytes(data[:-cut] + rest)
    assert data[:-cut].count(b"\n") == 1
    outcome = cli(*interrupted.command, "--json")
    assert json.loads(outcome.out)["resumed"] == 0
    assert content(interrupted.output) == clean


@pytest.mark.parametrize("where", [0, 40, 100, 0.3, 0.5, 0.9, -2, -10])
def test_a_damaged_line_ends_the_journal(where, interrupted, clean, cli):
    """What it says of a shard is not believed, though the shard is as it was."""
    journal = partial(interrupted) / "streamshard.journal"
    plan, line = journal.read_bytes().splitlines(keepends=True)
    at = int(where * len(line)) if isinstance(where, float) else where
    data = bytearray(line)
    digits = [n for n, byte in enumerate(data) if byte in b"0123456789"]
    data[min(digits, key=lambda n: abs(n - at % len(line)))] ^= 1  # still a digit, and JSON
    journal.write_bytes(plan + data)
    outcome = cli(*interrupted.command, "--json")
    assert json.loads(outcome.out)["resumed"] == 0
    assert content(interrupted.output) == clean


def test_a_damaged_shard_is_gone_before_it_is_written_again(interrupted, cli, monkeypatch):
    """A disk that has room for one of it may not have room for two."""
    flip(partial(interrupted) / FIRST, -1)
    there, opened = [], system.open

    def watched(path: Any, flags: int, *rest: Any) -> int:
        if str(path).endswith(f"{FIRST}.part") and flags & os.O_CREAT:
            there.append((partial(interrupted) / FIRST).exists())
        return opened(path, flags, *rest)

    monkeypatch.setattr(system, "open", watched)
    assert cli(*interrupted.command).code == 0
    assert there == [False]


def test_garbage_after_the_journal_hides_nothing(interrupted, clean, cli):
    with (partial(interrupted) / "streamshard.journal").open("ab") as journal:
        journal.write(b"0123 {")
    killed(AFTER_A_SHARD, [*interrupted.command, "--workers", "1"])  # now the second one is noted
    outcome = cli(*interrupted.command, "--json")
    assert json.loads(outcome.out)["resumed"] == 2
    assert content(interrupted.output) == clean


@pytest.mark.parametrize(
    "begun", [b"", bytes(700), b"0123", b'%032x {"plan": {"str' % 7, bytes(512) + b"0123"]
)
def test_a_kill_before_the_plan_is_noted(begun, pair, clean, cli):
    partial(pair).mkdir()
    (partial(pair) / "streamshard.journal").write_bytes(begun)
    assert cli(*pair.command).code == 0
    assert content(pair.output) == clean
    assert alone(pair)


def test_kills_everywhere():
    """A small version of what `bench/crash.py` does by itself."""
    command = [sys.executable, str(BENCH / "crash.py"), "--points", "10"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("10 of 10 (")
    assert "(0 continued" not in done.stdout


# --- what is kept ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "error", "where", "code"),
    [
        ("allocate", OSError(errno.ENOSPC, "full"), SECOND, 6),
        ("pwrite", OSError(errno.ENOSPC, "full"), SECOND, 6),
        ("pwrite", OSError(errno.EIO, "broken"), SECOND, 6),
        ("fsync", OSError(errno.EIO, "broken"), f"{SECOND}.part", 6),
        ("fsync", OSError(errno.EIO, "broken"), "streamshard.json", 6),
        ("rename", OSError(errno.EIO, "broken"), f"{SECOND}.part", 6),
        ("rename", OSError(errno.EIO, "broken"), r"\.partial$", 6),
        ("pwrite", KeyboardInterrupt(), SECOND, 130),
    ],
)  # fmt: skip
def test_what_is_finished_is_kept_when_a_disk_fails(
    method, error, where, code, pair, clean, cli, monkeypatch
):
    with monkeypatch.context() as patch:
        failing(patch, method, error, where, pair.output.parent)
        outcome = cli(*pair.command, "--workers", "1")
    assert outcome.code == code, outcome.err
    assert "Traceback" not in outcome.err
    assert "run the same command again" in outcome.err
    assert str(partial(pair)) in outcome.err
    assert not pair.output.exists()
    assert not [p.name for p in partial(pair).iterdir() if p.suffix == ".part"]
    outcome = cli(*pair.command, "--json")
    assert json.loads(outcome.out)["resumed"] >= 1
    assert content(pair.output) == clean
    assert alone(pair)


def test_nothing_is_kept_where_the_same_would_happen_again(pair, cli):
    """The second shard cannot be merged: its base is not finite."""
    content_ = load_file(pair.base / SECOND)
    name = next(name for name in content_ if "k_proj" in name)
    content_[name][0, 0] = float("inf")
    save_file(content_, pair.base / SECOND, {"format": "pt"})
    outcome = cli(*pair.command, "--workers", "1")
    assert outcome.code == 4
    assert "Nothing was written" in outcome.err
    assert [*pair.output.parent.iterdir()] == []


# A run is signalled in the first write to its third file, when two are finished; what it still writes
# when it has heard of that is counted.
IN_THE_THIRD = f"""{INTERRUPT}
from streamshard.disk.new_files import OutputFile
from streamshard.engine.journal import Journal
write, add, two = OutputFile.write, Journal.add, threading.Event()
names, counted = [], []
def stop(self, data, offset):
    if self.path.name.endswith(".part") and offset:
        if self.path not in names:
            names.append(self.path)
        if len(names) > 2:
            if not counted:
                two.wait()
                interrupt(number)
            counted.append(offset)
    write(self, data, offset)
OutputFile.write = stop
def noted(self, shard):
    add(self, shard)
    if len(self.finished) == 2:
        two.set()
Journal.add = noted
still = lambda: len(counted)
{TOLD}"""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
def test_a_signal_keeps_what_is_finished(number, code, tmp_path):
    base = sparse_base(tmp_path / "base", tensors=8)  # 512 MB
    adapter = sparse_adapter(tmp_path / "adapter")
    output = tmp_path / "out" / "merged"
    arguments = ["--base", base, "--adapter", adapter, "--output", output, "--workers", "1"]
    arguments += ["--max-shard-size", "100MB"]
    staging = output.with_name(".merged.partial")
    run = signalled(IN_THE_THIRD, number, "merge-lora", *arguments)
    assert run.returncode == code, run.stderr
    assert "run the same command again" in run.stderr
    assert str(staging) in run.stderr
    assert int(run.stdout) <= 2
    assert not [*staging.glob("*.part")]
    command = [sys.executable, "-m", "streamshard", "merge-lora", *map(str, arguments)]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert report["resumed"] == 2 < report["shards"]
    assert [p.name for p in output.parent.iterdir()] == ["merged"]
    shutil.rmtree(tmp_path)


def test_space_that_is_taken_already_counts(interrupted, cli, monkeypatch):
    needed = sum(p.stat().st_size for p in interrupted.base.iterdir()) + 2 * 64 * 1024
    room = needed - (partial(interrupted) / FIRST).stat().st_size // 2
    monkeypatch.setattr(system, "disk_free", lambda _: room)
    assert cli(*interrupted.command).code == 0
    outcome = cli(*interrupted.command[:-1], interrupted.root / "out" / "elsewhere")
    assert outcome.code == 6, "it must not be enough for a run that begins"


def test_space_is_looked_at_again_before_each_shard(pair, cli, monkeypatch):
    answers = iter([10**9, 10**9, 10])
    monkeypatch.setattr(system, "disk_free", lambda _: next(answers))
    outcome = cli(*pair.command, "--workers", "1")
    assert outcome.code == 6
    assert "10 B are free" in outcome.err
    assert SECOND in outcome.err


def test_short_reads_and_writes(pair, clean, cli, monkeypatch):
    read, write = system.pread, system.pwrite
    monkeypatch.setattr(system, "pread", lambda d, out, at: read(d, out[:1000], at))
    monkeypatch.setattr(system, "pwrite", lambda d, data, at: write(d, data[:777], at))
    assert cli(*pair.command).code == 0
    assert content(pair.output) == clean


def test_a_write_that_writes_nothing_ends(pair, cli, monkeypatch):
    monkeypatch.setattr(system, "pwrite", lambda *_: 0)
    outcome = cli(*pair.command)
    assert outcome.code == 6
    assert "nothing was written" in outcome.err


# --- records that are none ------------------------------------------------------------------------


def with_digest(text: bytes) -> bytes:
    digest = new_digest()
    digest.update(text)
    return digest.hexdigest().encode() + b" " + text


ODD = [
    b"not JSON",
    b"[" * 100_000,
    b"5",
    b"[5]",
    b"{}",
    b'{"plan": 5, "names": []}',
    b'{"plan": [1], "names": []}',
    b'{"plan": {}, "names": [5]}',
    b'{"plan": {}, "names": "ab"}',
    b'{"plan": {}, "names": 5}',
    b'{"plan": ' + b'{"a": ' * 5000,
]


@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--dry-run"]], ids=str)
@pytest.mark.parametrize("text", ODD, ids=range(len(ODD)))
def test_a_first_line_with_a_digest_that_no_run_has_written(text, more, refused, pair):
    partial(pair).mkdir()
    (partial(pair) / "streamshard.journal").write_bytes(with_digest(text + b"\n"))
    refused(5, "'streamshard.journal'", more=more)


PLANS = [
    {"inputs": [5]},
    {"inputs": 5},
    {"inputs": {"a": 1}},
    {"inputs": [[[], {}, 1]]},
    {"inputs": [["a", "b"]]},
    {"options": 5, "files": [1], "arithmetic": "x", "command": {}, "streamshard": []},
]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_plan_that_no_run_has_written(plan, refused, pair, cli):
    partial(pair).mkdir()
    first = json.dumps({"plan": plan, "names": ["streamshard.journal"]}).encode()
    (partial(pair) / "streamshard.journal").write_bytes(with_digest(first + b"\n"))
    refused(5, "cannot be continued")
    assert cli(*pair.command, "--overwrite").code == 0
    assert alone(pair)


SHARDS = [
    b"not JSON",
    b"[" * 100_000,
    b"[1]",
    *(
        json.dumps({"bytes": 1, "digest": "", "tensors": "", "squared": [], "change": [0, 0, 0, 0],
                    "sha256": None, "shard": FIRST} | odd).encode()
        for odd in (
            {"shard": 5},
            {"shard": [1]},
            {"bytes": "x"},
            {"tensors": 5},
            {"tensors": "é"},
            {"squared": [-1]},
            {"squared": ["x"]},
            {"squared": 5},
            {"change": [[]]},
            {"change": {"a": 1}},
            {"change": [-1, 0, 0, 0]},
            {"sha256": 5},
            {"digest": {}},
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("text", SHARDS, ids=range(len(SHARDS)))
def test_a_record_of_a_shard_that_no_run_has_written(text, interrupted, clean, cli):
    journal = partial(interrupted) / "streamshard.journal"
    first, *_ = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(first + with_digest(text + b"\n"))
    (partial(interrupted) / FIRST).unlink()
    outcome = cli(*interrupted.command, "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["resumed"] == 0
    assert content(interrupted.output) == clean


@pytest.mark.parametrize("odd", [{"squared": [0.0] * 9}, {"bytes": 5}, {"squared": []}], ids=str)
def test_a_record_that_does_not_fit_its_shard(odd, interrupted, clean, cli):
    journal = partial(interrupted) / "streamshard.journal"
    first, shard = journal.read_bytes().splitlines(keepends=True)
    record = json.loads(shard.partition(b" ")[2]) | odd
    journal.write_bytes(first + with_digest(json.dumps(record).encode() + b"\n"))
    outcome = cli(*interrupted.command, "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["resumed"] == 0
    assert content(interrupted.output) == clean
