"""Runs that end early: what is kept, what continues it, what is refused, and who may write."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import xxhash
from conftest import Pair, heed_interrupts, new_pair
from reference import load_file, save_file
from test_cli import sparse_adapter, sparse_base

import streamshard
from streamshard import checkpoint, files, identity, locks
from streamshard.errors import OutputError
from streamshard.files import system
from streamshard.staging import places_beside

BENCH = Path(__file__).resolve().parent.parent / "bench"
FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
VARYING = {"seconds", "peak_rss_bytes", "resumed", "record_digest"}

# Ends the process after something has happened; `main` runs the command line after it.
KILL = "import os, signal, sys\nkill = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
MAIN = "\nfrom streamshard.cli import main\nmain()\n"
AFTER_A_SHARD = """
from streamshard.journal import Journal
add = Journal.add
def last(self, shard):
    add(self, shard)
    kill()
Journal.add = last
"""
BETWEEN_THE_RENAMES = """
from streamshard.files import system
rename = system.rename
def last(path, other):
    if str(path).endswith(".partial"):
        kill()
    rename(path, other)
system.rename = last
"""
REMOVING_THE_OLD = """
from streamshard.files import system
unlink = system.unlink
def last(path):
    if ".merged.old" in str(path):
        kill()
    unlink(path)
system.unlink = last
"""


def killed(code: str, command: list[str]) -> None:
    """Run a command that kills itself where `code` says."""
    line = [sys.executable, "-c", KILL + code + MAIN, *command]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


def report_of(folder: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((folder / "streamshard.json").read_bytes())
    return report


def content(folder: Path) -> dict[str, Any]:
    """Every file of an output, without what a report says of the run itself."""
    found: dict[str, Any] = {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }
    report = report_of(folder)
    found["streamshard.json"] = {k: v for k, v in report.items() if k not in VARYING | {"output"}}
    return found


def partial(pair: Pair) -> Path:
    return pair.output.with_name(".merged.partial")


def alone(pair: Pair) -> bool:
    """Whether there is nothing beside the output."""
    return [p.name for p in pair.output.parent.iterdir()] == ["merged"]


@pytest.fixture
def clean(pair: Pair) -> dict[str, Any]:
    """What an uninterrupted run writes."""
    output = pair.root / "clean"
    streamshard.merge_lora(base=pair.base, adapter=pair.adapter, output=output)
    return content(output)


@pytest.fixture(scope="module")
def killed_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a killed run has left, of a base and an adapter in a place of their own."""
    pair = new_pair(tmp_path_factory.mktemp("killed"))
    killed(AFTER_A_SHARD, [*pair.command, "--workers", "1"])
    assert pair.output.with_name(".merged.lock").exists()
    assert not pair.output.exists()
    return partial(pair)


@pytest.fixture
def interrupted(pair: Pair, clean: dict[str, Any], killed_once: Path) -> Pair:
    """A run that was killed when one of two shards was finished."""
    # Inputs are told by content, so that it serves for a base elsewhere.
    shutil.copytree(killed_once, partial(pair))
    assert (partial(pair) / FIRST).read_bytes() == clean[FIRST]
    assert not (partial(pair) / SECOND).exists()
    return pair


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


# --- another plan ---------------------------------------------------------------------------------


def flip(file: Path, where: int) -> None:
    """Change one bit, and neither size nor time."""
    times = file.stat()
    data = bytearray(file.read_bytes())
    data[where] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def another_version(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamshard.identity.__version__", "99.1")


def another_processor(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamshard.identity.platform.machine", lambda: "another")


CHANGES: dict[str, tuple[Callable[..., Any] | None, list[str], list[str]]] = {
    "base": (lambda p, _: flip(p.base / FIRST, -1), [], [f"base/{FIRST} is another one"]),
    "adapter": (
        lambda p, _: flip(p.adapter / "adapter_model.safetensors", -1),
        [],
        ["adapter_model.safetensors is another one"],
    ),
    "side-file": (
        lambda p, _: (p.base / "tokenizer_config.json").write_text("{}"),
        [],
        ["tokenizer_config.json", "has changed"],
    ),
    "new-file": (lambda p, _: (p.base / "x.txt").write_text(""), [], ["x.txt", "is new"]),
    "gone-file": (
        lambda p, _: (p.base / "tokenizer_config.json").unlink(),
        [],
        ["tokenizer_config.json", "is gone"],
    ),
    "alpha": (
        lambda p, _: edit(p.adapter / "adapter_config.json", lora_alpha=4),
        [],
        ["other tensors"],
    ),
    "dtype": (None, ["--dtype", "fp32"], ["--dtype was keep and is fp32"]),
    "weight": (None, ["--weight", "0.5"], ["--weight was not given and is [0.5]"]),
    "shards": (None, ["--max-shard-size", "1GB"], ["--max-shard-size was not given and is 1000000000"]),
    "version": (another_version, [], ["it was version", "this is 99.1"]),
    "processor": (another_processor, [], ["processor was", "is another"]),
}  # fmt: skip


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("what", CHANGES)
def test_another_plan_is_refused_by_name(what, interrupted, refused, cli, monkeypatch):
    change, more, expected = CHANGES[what]
    if change is not None:
        change(interrupted, monkeypatch)
    said = ["cannot be continued", str(partial(interrupted)), "--overwrite", *expected]
    refused(5, *said, more=more)
    # With --overwrite it begins anew.
    outcome = cli(*interrupted.command, *more, "--overwrite", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["resumed"] == 0
    assert alone(interrupted)
    again = interrupted.root / "again"
    command = [
        str(again) if part == str(interrupted.output) else part for part in interrupted.command
    ]
    assert cli(*command, *more).code == 0
    assert content(interrupted.output) == content(again)


def test_another_kernel_continues(interrupted, cli, monkeypatch):
    """Nothing that is written depends on whether it is compiled."""
    monkeypatch.setattr("streamshard.arithmetic._kernels", None)
    outcome = cli(*interrupted.command, "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["resumed"] == 1


def identity_of(folder: Path) -> Any:
    tensor = checkpoint.open_checkpoint(folder).tensors["a"]
    found = identity.identity(command="", options={}, recipe=[tensor], files={})
    return json.loads(json.dumps(found))


@pytest.mark.parametrize("how", ["changed", "copied", "moved", "read"])
def test_large_inputs_are_told_by_their_times_too(how, tmp_path):
    """Between what is looked at of their content somebody may have written."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    file = folder / "model.safetensors"
    save_file({"a": torch.zeros(1024, 1024)}, file, {"format": "pt"})
    before = identity_of(folder)
    assert file.stat().st_size > 2 * identity.SAMPLES * identity.SAMPLE_NBYTES
    if how == "changed":
        flip(file, file.stat().st_size // 2 + 100_000)
    elif how == "copied":
        shutil.copytree(folder, tmp_path / "other")
        folder = tmp_path / "other"
    elif how == "moved":
        folder = folder.rename(tmp_path / "other")
    else:
        file.read_bytes()
    changes = identity.differences(before, identity_of(folder))
    if how in {"moved", "read"}:
        assert changes == []
    else:
        expected = f"{folder / 'model.safetensors'} was copied or written to since"
        assert len(changes) == 1
        assert expected in changes[0]


@pytest.mark.parametrize("what", [f"base/{SECOND}", "adapter/adapter_model.safetensors"])
def test_an_input_that_has_changed_is_named(what, pair, cli):
    """Neither its size nor its time need tell."""
    killed(AFTER_A_SHARD, [*pair.command, "--workers", "1"])
    flip(pair.root / what, -1)
    outcome = cli(*pair.command)
    assert outcome.code == 5
    assert f"{what} has changed" in outcome.err
    flip(pair.root / what, -1)
    assert cli(*pair.command).code == 0


def test_another_adapter_is_named(interrupted, refused):
    other = interrupted.root / "other"
    shutil.copytree(interrupted.adapter, other)
    flip(other / "adapter_model.safetensors", -1)
    command = [part.replace(str(interrupted.adapter), str(other)) for part in interrupted.command]
    refused(5, str(other), "is another one", "is no longer one", command=command)


@pytest.mark.parametrize(
    "more", [["--workers", "2"], ["--max-memory", "1GB"], ["--overwrite"], ["--quiet"]]
)
def test_options_that_change_no_byte_continue(more, interrupted, cli):
    assert cli(*interrupted.command, *more).code == 0
    assert report_of(interrupted.output)["resumed"] == 1


# --- what is kept ---------------------------------------------------------------------------------


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def failing(
    monkeypatch: pytest.MonkeyPatch, method: str, error: BaseException, where: str, after: Path
) -> None:
    """Fail the calls of a method on files, open or named, whose names `where` matches."""
    original, opened = getattr(system, method), system.open
    names: dict[int, str] = {}

    def noted(path: Any, flags: int) -> int:
        descriptor = opened(path, flags)
        names[descriptor] = str(path)
        return descriptor

    def fail(first: Any, *rest: Any) -> Any:
        name = names.get(first, "") if isinstance(first, int) else str(first)
        if re.search(where, name):
            if SECOND in where:  # the disk must have the first one
                until(lambda: [*after.glob(f".merged.partial/{FIRST}")])
            raise error
        return original(first, *rest)

    monkeypatch.setattr(system, "open", noted)
    monkeypatch.setattr(system, method, fail)


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


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
def test_a_signal_keeps_what_is_finished(number, code, tmp_path):
    base = sparse_base(tmp_path / "base", tensors=8)  # 512 MB
    adapter = sparse_adapter(tmp_path / "adapter")
    output = tmp_path / "out" / "merged"
    arguments = ["--base", base, "--adapter", adapter, "--output", output, "--workers", "1"]
    arguments += ["--max-shard-size", "100MB"]
    command = [sys.executable, "-m", "streamshard", "merge-lora", *map(str, arguments)]
    staging = output.with_name(".merged.partial")
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heed_interrupts,  # noqa: PLW1509 - before any thread
    ) as run:
        until(lambda: len([*staging.glob("*.safetensors")]) > 1)
        started = time.monotonic()
        run.send_signal(number)
        _, err = run.communicate(timeout=60)
    assert time.monotonic() - started < 2
    assert run.returncode == code, err
    assert "run the same command again" in err
    assert str(staging) in err
    assert not [*staging.glob("*.part")]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert report["resumed"] >= 1
    assert report["shards"] > report["resumed"]
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
    assert "10 are free" in outcome.err
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


# --- who may write --------------------------------------------------------------------------------


def test_of_two_runs_one_wins(pair, clean, refused, cli):
    """The first is stopped while it holds the lock; when it is killed, the second may go on."""
    stop = AFTER_A_SHARD.replace("kill()", "os.kill(os.getpid(), signal.SIGSTOP)")
    line = [sys.executable, "-c", KILL + stop + MAIN, *pair.command, "--workers", "1"]
    with subprocess.Popen(line) as first:
        try:
            _, status = os.waitpid(first.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status)
            for more in ([], ["--overwrite"], ["--weight", "0.5"]):
                refused(5, f"process {first.pid}", "another run", str(pair.output), more=more)
        finally:
            first.kill()
    assert cli(*pair.command).code == 0
    assert content(pair.output) == clean
    # The signal may come to another thread, and this one do a little more.
    assert report_of(pair.output)["resumed"] >= 1
    assert alone(pair)


def test_of_two_runs_at_once_one_wins(pair, clean):
    command = [sys.executable, "-m", "streamshard", *pair.command]
    runs = [
        subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        for _ in range(4)
    ]
    codes = sorted(run.wait() for run in runs)
    assert codes == [0, 5, 5, 5]
    assert content(pair.output) == clean
    assert alone(pair)


def test_threads_of_one_process_exclude_each_other(tmp_path):
    path, inside = tmp_path / "lock", threading.Event()
    errors: list[BaseException] = []

    def second() -> None:
        try:
            with locks.locked(path, tmp_path / "out"):
                inside.set()
        except OutputError as error:
            errors.append(error)

    with locks.locked(path, tmp_path / "out"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(errors) == 1
    assert not inside.is_set()
    assert not path.exists()
    second()
    assert inside.is_set()


@pytest.mark.parametrize(
    ("record", "free"),
    [
        ({"pid": os.getppid()}, False),
        ({"pid": 2**22 + 1}, True),  # no such process
        ({"pid": os.getppid(), "boot": "an earlier one"}, True),
        ({"host": "elsewhere"}, False),
        (None, True),
    ],
    ids=["alive", "dead", "rebooted", "elsewhere", "unreadable"],
)
def test_where_a_disk_knows_no_locks_the_record_decides(record, free, tmp_path, monkeypatch):
    def unsupported(_: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(system, "lock", unsupported)
    path = tmp_path / "lock"
    with locks.locked(path, tmp_path / "out"):
        mine = json.loads(path.read_text())
    assert mine["pid"] == os.getpid()
    path.write_text("{" if record is None else json.dumps(mine | record))
    if free:
        with locks.locked(path, tmp_path / "out"):
            pass
        assert not path.exists()
    else:
        with pytest.raises(OutputError, match="remove"), locks.locked(path, tmp_path / "out"):
            pass
        assert path.exists()


def test_a_link_in_the_place_of_the_partial_output(pair, refused):
    (pair.root / "elsewhere").mkdir()
    (pair.root / "elsewhere" / "precious").write_text("x")
    partial(pair).symlink_to(pair.root / "elsewhere")
    refused(5, "symbolic link")


@pytest.mark.parametrize("beside", ["partial", "old"])
def test_inputs_are_never_taken_for_leftovers(beside, pair, refused):
    place = places_beside(pair.output)[beside]
    pair.base.rename(place)
    refused(5, "input", command=[p.replace(str(pair.base), str(place)) for p in pair.command])


# --- replacing ------------------------------------------------------------------------------------


@pytest.fixture
def old(pair: Pair) -> dict[str, Any]:
    """An older output in the place of the new one."""
    streamshard.merge_lora(base=pair.base, adapter=pair.adapter, output=pair.output, weight=[0.5])
    return content(pair.output)


def test_a_kill_between_the_renames_loses_nothing(pair, old, clean, cli):
    killed(BETWEEN_THE_RENAMES, [*pair.command, "--overwrite"])
    assert not pair.output.exists()
    outcome = cli(*pair.command)
    assert outcome.code == 5
    assert content(pair.output) == old, "the next run puts it back, whatever it does then"
    assert cli(*pair.command, "--overwrite").code == 0
    assert content(pair.output) == clean
    assert alone(pair)


def test_a_kill_while_the_old_output_is_removed(pair, old, clean, cli):
    killed(REMOVING_THE_OLD, [*pair.command, "--overwrite"])
    assert content(pair.output) == clean
    assert pair.output.with_name(".merged.old").exists()
    assert cli(*pair.command).code == 5
    assert content(pair.output) == clean
    assert alone(pair)


def test_what_took_the_place_of_an_old_output_is_not_lost_either(pair, old, clean, cli):
    killed(BETWEEN_THE_RENAMES, [*pair.command, "--overwrite"])
    pair.output.mkdir()
    outcome = cli(*pair.command, "--overwrite")
    assert outcome.code == 5
    assert ".merged.old" in outcome.err
    assert content(pair.output.with_name(".merged.old")) == old


def test_an_old_output_that_cannot_be_removed_is_told(pair, old, clean, cli, monkeypatch):
    failing(monkeypatch, "unlink", OSError(errno.EIO, "broken"), ".merged.old", pair.root)
    outcome = cli(*pair.command, "--overwrite")
    assert outcome.code == 6
    assert "is complete" in outcome.err
    assert content(pair.output) == clean


def test_readers_of_the_old_output_are_not_disturbed(pair, old, cli):
    """It is replaced by rename and never written through."""
    with (pair.output / FIRST).open("rb") as reader:
        assert cli(*pair.command, "--overwrite").code == 0
        assert reader.read() == old[FIRST]
        assert (pair.output / FIRST).read_bytes() != old[FIRST]


# --- digests --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more", [{}, {"workers": 3}, {"max_shard_size": "5KB"}, {"dtype": "fp32"}], ids=str
)
def test_digests_are_those_of_what_safetensors_loads(more, pair):
    streamshard.merge_lora(base=pair.base, adapter=pair.adapter, output=pair.output, **more)
    digests = report_of(pair.output)["digests"]
    assert digests["algorithm"] == "xxh3-128"
    loaded = reference.read(pair.output)
    assert digests["tensors"] == {
        name: xxhash.xxh3_128_hexdigest(reference.bits(tensor)) for name, tensor in loaded.items()
    }
    there = {p.relative_to(pair.output).as_posix() for p in pair.output.rglob("*") if p.is_file()}
    assert set(digests["files"]) == there - {"streamshard.json"}
    for name, record in digests["files"].items():
        data = (pair.output / name).read_bytes()
        assert record.keys() == {"bytes", "digest"}
        assert record["bytes"] == len(data)
        if name.endswith(".safetensors"):
            end = 8 + int.from_bytes(data[:8], "little")
            header = {k: v for k, v in json.loads(data[8:end]).items() if k != "__metadata__"}
            order = sorted(header, key=lambda tensor: header[tensor]["data_offsets"])
            parts = [bytes.fromhex(digests["tensors"][tensor]) for tensor in order]
            data = data[:end] + b"".join(parts)
        assert record["digest"] == xxhash.xxh3_128_hexdigest(data)


def test_digests_of_empty_tensors(tmp_path):
    base = reference.save_checkpoint(
        tmp_path / "base",
        {"a": torch.zeros(0, 3), "language_model.x.weight": reference.normal((8, 8), 1, seed=1)},
    )
    adapter = reference.save_adapter(
        tmp_path / "adapter",
        {
            "base_model.model.language_model.x.lora_A.weight": reference.normal((2, 8), 1, seed=2),
            "base_model.model.language_model.x.lora_B.weight": reference.normal((8, 2), 1, seed=3),
        },
        r=2,
        lora_alpha=2,
    )
    streamshard.merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    assert report_of(tmp_path / "out")["digests"]["tensors"]["a"] == xxhash.xxh3_128_hexdigest(b"")


@pytest.mark.parametrize("before", [[], ["--sha256"]], ids=["without", "with"])
def test_sha256_also_of_what_was_finished_before(before, pair, cli):
    killed(AFTER_A_SHARD, [*pair.command, "--workers", "1", *before])
    assert cli(*pair.command, "--sha256").code == 0
    report = report_of(pair.output)
    assert report["resumed"] == 1
    for name, record in report["digests"]["files"].items():
        assert record["sha256"] == hashlib.sha256((pair.output / name).read_bytes()).hexdigest()
    assert set(report["digests"]["files"]) >= {FIRST, SECOND, "config.json"}


def test_the_seam_has_every_call_of_files():
    """`os` is asked by the methods of `System` only, so that a test that replaces them sees all."""
    import ast
    import inspect

    tree = ast.parse(inspect.getsource(files))
    outside = [node for node in tree.body if getattr(node, "name", "") != "System"]
    calls = {
        ast.unparse(node.func)
        for part in outside
        if not isinstance(part, ast.If)  # the positioned calls that `System` chooses from
        for node in ast.walk(part)
        if isinstance(node, ast.Call)
    }
    assert not {call for call in calls if call.startswith(("os.", "shutil."))}
