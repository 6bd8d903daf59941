"""Every call to the operating system fails once: a small version of what `bench/faults.py` does."""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import itertools
import os
import threading
from functools import partial
from pathlib import Path
from typing import Any

import faults
import pytest
import scenarios as runs
from faults import KINDS, Faults, Kind, check, sweep
from marks import slow

import streamshard
from streamshard.disk import files, new_files
from streamshard.disk.mapped import _mapping
from streamshard.disk.system import system
from streamshard.errors import ReadError

pytestmark = slow

SECOND = "00002-of-00003.safetensors.part"
NAMES = [
    "merge-lora",
    "merge-lora --overwrite",
    "merge-lora, resumed",
    "merge-lora, direct",
    "merge-lora, all in a part",
    "merge-lora, one part of two",
    "merge-lora, the last part",
    "merge-lora, parts completed",
    "hf2custom",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def scenarios(made: Path) -> dict[str, runs.Scenario]:
    return runs.scenarios(made)


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, runs.Scenario]:
    return runs.scenarios(tmp_path_factory.mktemp("two"), workers=2)


@pytest.mark.parametrize("name", NAMES)
def test_calls_that_fail(name, scenarios, made):
    step = 149 if name == "hf2custom" else 59
    calls, done, wrong = sweep(scenarios[name], KINDS, made, step)
    assert wrong == []
    assert calls > 400
    assert done > 40


@pytest.mark.parametrize("name", ["merge-lora, direct", "hf2custom"])
def test_calls_that_fail_while_files_are_mapped(name, scenarios, made, monkeypatch):
    if _mapping is None:
        pytest.skip("nothing is mapped on this system")
    monkeypatch.setenv("STREAMSHARD_READ", "mmap")
    calls, done, wrong = sweep(scenarios[name], KINDS, made, 211 if name == "hf2custom" else 53)
    assert wrong == []
    assert calls > 400
    assert done > 30


def test_calls_that_fail_while_two_threads_work(two_workers):
    scenario = two_workers["merge-lora"]
    calls, done, wrong = sweep(scenario, KINDS, scenario.output.parent.parent, 41)
    assert wrong == []
    assert calls > 400
    assert done > 80


# --- the harness itself ---------------------------------------------------------------------------


def problems(scenario: runs.Scenario, faulty: Faults) -> str:
    return "\n".join(check(scenario, faulty, runs.content(scenario.inputs)))


def test_a_swallowed_error_is_noticed(scenarios, made, monkeypatch):
    """As if `sync` forgot to look at what `fsync` says."""
    scenario = scenarios["merge-lora"]
    faulty = partial(Faults, Kind(("fsync",), error=errno.EIO), 1, made, SECOND)
    assert problems(scenario, faulty()) == ""

    def forgetful(self: new_files.OutputFile) -> None:
        with contextlib.suppress(OSError):
            system.fsync(self._descriptor)

    monkeypatch.setattr(new_files.OutputFile, "sync", forgetful)
    found = problems(scenario, faulty())
    assert "success although fsync failed" in found


def test_wrong_bytes_are_noticed(scenarios, made, monkeypatch):
    """As if short writes were taken for whole ones."""
    scenario = scenarios["merge-lora"]
    faulty = partial(Faults, Kind(("pwrite",), part=0.5), 1, made, "vocab.json")
    assert problems(scenario, faulty()) == ""
    monkeypatch.setattr(
        new_files, "write_all", lambda descriptor, _, data, at: system.pwrite(descriptor, data, at)
    )
    found = problems(scenario, faulty())
    assert "the output is neither old nor complete" in found


def test_an_open_descriptor_is_noticed(scenarios, made, monkeypatch):
    scenario = scenarios["merge-lora"]
    monkeypatch.setattr(new_files.OutputFile, "abandon", lambda _: None)
    found = problems(scenario, Faults(Kind(("pwrite",), error=errno.EIO), 1, made, SECOND))
    assert "descriptors left open" in found


# --- what the harness has found -------------------------------------------------------------------


def test_a_part_whose_sync_fails_is_no_success(pair, cli, monkeypatch):
    """Though all that it had to do is there by then."""
    fsync, rename, done = system.fsync, system.rename, []

    def noting(path: Path, other: Path) -> None:
        rename(path, other)
        done.extend([path] * (other.suffix == ".done"))

    def failing(descriptor: int) -> None:
        if done:
            raise OSError(errno.EIO, "not on the disk")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(system, "rename", noting)
        patch.setattr(system, "fsync", failing)
        outcome = cli(*pair.command, "--part", "1/2")
    assert outcome.code == 6
    assert "run the same command again" in outcome.err
    assert cli(*pair.command, "--part", "2/2").code == 0


def test_what_a_part_has_finished_is_told_when_an_input_cannot_be_looked_at(pair, cli, monkeypatch):
    stat, file = system.stat, pair.adapter / "adapter_config.json"
    folder = pair.output.with_name(".merged.parts")

    def failing(path: Path) -> os.stat_result:
        if str(path) == str(file) and [*folder.glob("*.done")]:
            raise OSError(errno.EIO, "broken", str(path))
        return stat(path)

    with monkeypatch.context() as patch:
        patch.setattr(system, "stat", failing)
        outcome = cli(*pair.command, "--part", "1/2")
    assert outcome.code == 7
    assert str(folder) in outcome.err


@pytest.mark.parametrize("where", ["adapter_model.safetensors", "vocab.json"])
def test_a_file_that_ends_too_early(where, scenarios, made):
    """While it is copied or hashed: no zeros in its place, and no digest of a part of it."""
    scenario = scenarios["merge-lora"]
    for at in itertools.count(1):
        faulty = Faults(Kind(("pread",)), at, made, where)
        assert problems(scenario, faulty) == ""
        if not faulty.failed:
            break
    assert at > 3


def test_the_error_that_came_first_is_told(pair, cli, monkeypatch):
    """A file that cannot be closed does not hide that another could not be read."""
    read, close = system.pread, system.close
    broken = []

    def fail_to_read(descriptor: int, out: memoryview, offset: int) -> int:
        if list(pair.output.parent.glob(".merged.partial/tokenizer_config.json")):
            broken.append(offset)
            raise OSError(errno.EIO, "unreadable")
        return read(descriptor, out, offset)

    def fail_to_close(descriptor: int) -> None:
        close(descriptor)
        if broken:
            raise OSError(errno.EIO, "not closed")

    with monkeypatch.context() as patch:
        patch.setattr(system, "pread", fail_to_read)
        patch.setattr(system, "close", fail_to_close)
        outcome = cli(*pair.command)
    assert outcome.code == 7
    assert "unreadable" in outcome.err


def test_where_the_old_output_is_when_no_rename_works_any_more(pair, cli, monkeypatch):
    streamshard.merge_lora(base=pair.base, adapter=pair.adapter, output=pair.output, weight=[0.5])
    rename, done = system.rename, []

    def fail(path: Path, other: Path) -> None:
        if done:
            raise OSError(errno.EIO, "broken")
        rename(path, other)
        if other.name == ".merged.old":
            done.append(path)

    with monkeypatch.context() as patch:
        patch.setattr(system, "rename", fail)
        outcome = cli(*pair.command, "--overwrite")
    assert outcome.code == 6
    assert f"{pair.output.with_name('.merged.old')}, the next run puts back" in outcome.err
    assert not pair.output.exists()
    assert cli(*pair.command).code == 5
    assert pair.output.exists()


def test_a_rename_that_was_done_but_is_told_as_failed(pair, cli, monkeypatch):
    rename = system.rename

    def late(path: Path, other: Path) -> None:
        rename(path, other)
        if other == pair.output:
            raise OSError(errno.EIO, "lost the answer")

    monkeypatch.setattr(system, "rename", late)
    outcome = cli(*pair.command)
    assert outcome.code == 6
    assert "is complete" in outcome.err
    assert "kept" not in outcome.err
    assert (pair.output / "streamshard.json").exists()


def test_a_read_that_ends_early_says_where(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(bytes(100))
    monkeypatch.setattr(system, "pread", lambda *_: 0)
    with pytest.raises(ReadError, match=r"file: the file ended at byte 10, 90 bytes too early"):
        files.InputFile(tmp_path / "file").read(10, 20)


def test_a_run_that_fails_nowhere_is_told_apart(scenarios, made):
    every = Faults(Kind("*", error=errno.EIO), 10**6, made)
    scenario = scenarios["merge-lora"]
    assert problems(scenario, every) == ""
    assert every.failed == []
    assert every.calls > 400
    assert faults.HANGS_SECONDS > 10


def test_a_folder_that_was_made_but_is_told_as_failed(pair, cli, monkeypatch):
    mkdir = system.mkdir

    def late(path: Path) -> None:
        mkdir(path)
        raise OSError(errno.EIO, "lost the answer")

    pair.output.parent.rmdir()
    monkeypatch.setattr(system, "mkdir", late)
    assert cli(*pair.command).code == 6
    assert not pair.output.parent.exists()


def test_a_folder_that_cannot_be_listed_is_not_taken_for_empty(scenarios, made):
    """A reference without weights is one that nothing is compared with."""
    scenario = scenarios["hf2custom"]
    kind = Kind(("scandir", "listdir"), error=errno.EACCES)
    at = 1
    while True:
        faulty = Faults(kind, at, made)
        assert problems(scenario, faulty) == ""
        if not faulty.failed:
            break
        at += 1
    assert at > 3


@pytest.mark.parametrize("name", NAMES)
def test_nothing_goes_past_the_seam(name, scenarios, made, monkeypatch):
    """What modules of Python do with files is done within a call of the seam too."""
    inside = threading.local()
    past: list[str] = []

    def seam(call: Any) -> Any:
        def calling(*arguments: Any) -> Any:
            inside.depth = getattr(inside, "depth", 0) + 1
            try:
                return call(*arguments)
            finally:
                inside.depth -= 1

        return calling

    def looking(what: str, call: Any) -> Any:
        def calling(path: Any = ".", *rest: Any, **options: Any) -> Any:
            if not getattr(inside, "depth", 0) and str(path).startswith(str(made)):
                past.append(f"{what} {path}")
            return call(path, *rest, **options)

        return calling

    scenario = scenarios[name]
    scenario.begin()
    with monkeypatch.context() as patch:
        for what in ("stat", "lstat", "scandir", "listdir", "readlink", "open", "mkdir", "unlink"):
            patch.setattr(os, what, looking(what, getattr(os, what)))
        patch.setattr(io, "open", looking("io.open", io.open))
        patch.setattr(builtins, "open", looking("open", builtins.open))
        for call in runs.CALLS:
            patch.setattr(system, call, seam(getattr(system, call)))
        code, said = runs.run(scenario.command)
    scenario.end()
    assert (code, said) == (0, "")
    assert past == []


def test_a_folder_in_the_output_that_cannot_be_made(pair, cli, monkeypatch):
    mkdir = system.mkdir

    def failing(path: Path) -> None:
        if path.name == "examples":
            raise OSError(errno.EACCES, "no", str(path))
        mkdir(path)

    (pair.base / "examples").mkdir()
    (pair.base / "examples" / "image.jpg").write_bytes(b"\xff\xd8")
    monkeypatch.setattr(system, "mkdir", failing)
    outcome = cli(*pair.command)
    assert outcome.code == 6
    assert "examples: cannot be written" in outcome.err
