"""Inputs that change while a run reads them: an error that names the file, and no result."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from changing_files import (
    BESIDE,
    CHANGES,
    FIRST,
    INDEX,
    MOMENTS,
    READ_OF_A_BASE,
    SECOND,
    at,
    in_place,
    other,
    replaced,
    replaced_by_the_same,
    set_back,
    staged,
    stopped,
)
from hangs import HANGS
from interrupted_runs import content, open_below
from pairs import Pair
from reference import load_file

import streamshard
from streamshard.disk import inputs
from streamshard.disk.files import InputFile
from streamshard.disk.system import system
from streamshard.engine.journal import Journal
from streamshard.errors import ChangedError, InputError


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize(
    "name",
    [
        *(f"base/{name}" for name in [*READ_OF_A_BASE, *BESIDE, "streamshard.json"]),
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
    ],
)
def test_whatever_a_merge_reads(name, how, full, cli):
    stopped(cli, full.root, full.command, full.root / name, how, "a shard")


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("how", ["in place", "set back", "replaced", "removed", "linked"])
@pytest.mark.parametrize("name", [f"base/{FIRST}", "base/tokenizer.json", "base/config.json"])
def test_whenever_it_happens(name, how, moment, full, cli):
    stopped(cli, full.root, full.command, full.root / name, how, moment)


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_config.json"])
def test_a_pickled_adapter(name, how, full, cli):
    tensors = load_file(full.adapter / "adapter_model.safetensors")
    (full.adapter / "adapter_model.safetensors").unlink()
    torch.save(tensors, full.adapter / "adapter_model.bin")
    stopped(cli, full.root, full.command, full.adapter / name, how, "a shard")


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("how", ["in place", "replaced", "by the same", "linked"])
@pytest.mark.parametrize(
    "name", [f"base/{SECOND}", "base/tokenizer.json", "adapter/adapter_model.safetensors"]
)
def test_the_same_command_again(name, how, workers, full, cli):
    """It begins anew: nothing is left of the first state."""
    command = [*full.command, "--workers", str(workers)]
    assert cli(*command).code == 0
    first = content(full.output)
    shutil.rmtree(full.output)
    stopped(cli, full.root, command, full.root / name, how, "the record")
    outcome = cli(*command)
    assert outcome.code == 0, outcome.err
    assert [p.name for p in full.output.parent.iterdir()] == ["merged"]
    again = full.root / "again"
    streamshard.merge_lora(base=full.base, adapter=full.adapter, output=again)
    assert content(full.output) == content(again)
    assert (content(again) == first) == (how == "by the same")


def test_what_an_earlier_run_has_finished_goes_too(full, cli):
    """It is of the first state: a third run must not take it for its own."""
    from interrupted_runs import AFTER_A_SHARD, killed

    killed(AFTER_A_SHARD, [*full.command, "--workers", "1"])
    assert (full.output.with_name(".merged.partial") / FIRST).exists()
    stopped(cli, full.root, full.command, full.base / FIRST, "replaced", "a shard")
    assert cli(*full.command).code == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_no_shard_counts_as_finished_after_a_change(workers, full, cli, monkeypatch):
    """A run that is killed later would continue what is of the first state."""
    added: list[str] = []
    monkeypatch.setattr(Journal, "add", lambda _, shard: added.append(shard.name))
    with at(staged(full.root, "*.part"), lambda: in_place(full.base / "config.json")):
        assert cli(*full.command, "--workers", str(workers)).code == 7
    assert added == []


@pytest.mark.parametrize(
    "name", [f"base/{INDEX}", "base/config.json", "adapter/adapter_config.json"]
)
def test_what_changes_while_it_is_read_is_told_before_anything_is_written(name, full, monkeypatch):
    file = full.root / name
    pread, done = system.pread, []

    def change(descriptor: int, out: memoryview, offset: int) -> int:
        if not done and os.fstat(descriptor).st_ino == file.stat().st_ino:
            done.append(True)
            in_place(file)
        return pread(descriptor, out, offset)

    monkeypatch.setattr(system, "pread", change)
    with pytest.raises(ChangedError, match=Path(name).name):
        streamshard.merge_lora(
            base=full.base,
            adapter=full.adapter,
            output=full.output,
            on_plan=lambda _: pytest.fail("planned"),
        )
    assert done


def test_the_old_output_stays(full, cli):
    assert cli(*full.command).code == 0
    before = content(full.output)
    command = [*full.command, "--overwrite", "--weight", "0.5"]
    with at(staged(full.root, "*.part"), lambda: in_place(full.base / "tokenizer.json")) as done:
        outcome = cli(*command)
    assert done
    assert outcome.code == 7
    assert [p.name for p in full.output.parent.iterdir()] == ["merged"]
    assert content(full.output) == before


def test_between_the_plan_and_the_first_byte(full):
    def change(_: Any) -> None:
        replaced(full.base / SECOND)

    with pytest.raises(ChangedError, match=f"{SECOND}: was replaced"):
        streamshard.merge_lora(
            base=full.base, adapter=full.adapter, output=full.output, on_plan=change
        )
    assert not list(full.output.parent.iterdir())


@pytest.mark.parametrize("name", ["base/config.json", "adapter/adapter_model.safetensors"])
def test_a_dry_run(name, full):
    with pytest.raises(ChangedError, match=Path(name).name):
        streamshard.merge_lora(
            base=full.base,
            adapter=full.adapter,
            output=full.output,
            dry_run=True,
            on_plan=lambda _: in_place(full.root / name),
        )


@pytest.mark.parametrize(
    "name", [f"base/{FIRST}", "adapter/adapter_config.json", "base/config.json"]
)
def test_what_is_half_written_is_no_malformed_input(name, full, cli, monkeypatch):
    """The file is cut off just after it was opened, and would be called damaged."""
    file = full.root / name
    pread, done = system.pread, []

    def cut(descriptor: int, out: memoryview, offset: int) -> int:
        if not done and os.fstat(descriptor).st_ino == file.stat().st_ino:
            done.append(True)
            os.truncate(file, 5)
        return pread(descriptor, out, offset)

    monkeypatch.setattr(system, "pread", cut)
    outcome = cli(*full.command)
    assert done
    assert outcome.code == 7
    assert f"{file}: was written to" in outcome.err


def test_what_only_seems_to_be_wrong_with_an_input(full, cli, monkeypatch):
    """Who reads by the name, as the official parser does, may see another file."""

    def other_parser(path: Path) -> None:
        replaced_by_the_same(path)
        raise InputError("is refused by safetensors")

    monkeypatch.setattr("streamshard.checkpoint.header._is_as_written", lambda *_: False)
    monkeypatch.setattr("streamshard.checkpoint.header._ask_official_parser", other_parser)
    outcome = cli(*full.command)
    assert outcome.code == 7
    assert f"{FIRST}: was replaced by another file" in outcome.err


@pytest.mark.parametrize(
    "name", [f"base/{FIRST}", "adapter/adapter_model.safetensors", "base/more/vocab.txt"]
)
def test_a_process_that_is_stopped_meanwhile(name, full):
    """As people do it: the run is stopped at its first shard, and goes on later."""
    code = """
import signal, threading
from streamshard.disk.new_files import OutputFile
write = OutputFile.write
def stop(self, data, offset):
    if not stopped and self.path.name.endswith(".part"):
        stopped.append(True)
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # this thread at once, then all
    write(self, data, offset)
stopped = []
OutputFile.write = stop
from streamshard.cli import main
main()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *full.command],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    replaced(full.root / name)
    process.send_signal(signal.SIGCONT)
    _, said = process.communicate(timeout=HANGS)
    assert process.returncode == 7, said
    assert str(full.root / name) in said
    assert not list(full.output.parent.iterdir())


# --- what is no change ----------------------------------------------------------------------------


def test_others_may_read(full, cli):
    def read() -> None:
        for file in [*full.base.rglob("*"), *full.adapter.rglob("*")]:
            if file.is_file():
                file.read_bytes()

    with at(staged(full.root, "*.part"), read) as done:
        assert cli(*full.command).code == 0
    assert done


def test_what_is_not_read_may_change(full, cli):
    """New files in the folder, those that are not carried, and pictures beside an adapter."""
    (full.base / "trainer_state.json").write_text("{}")
    (full.adapter / "loss.png").write_text("x")

    def change() -> None:
        (full.base / "new.txt").write_text("x")
        (full.base / "trainer_state.json").write_text("{ }")
        (full.adapter / "loss.png").unlink()

    with at(staged(full.root, "*.part"), change) as done:
        assert cli(*full.command).code == 0
    assert done
    assert not (full.output / "new.txt").exists()


@pytest.fixture
def cached(full: Pair) -> Path:
    """The base as it is in the hub's cache: links to blobs; returns the folder of these."""
    blobs = full.root / "hub" / "blobs"
    snapshot = full.root / "hub" / "snapshots" / "1"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (full.base / "streamshard.json").unlink()
    for file in [path for path in full.base.rglob("*") if path.is_file()]:
        link = snapshot / file.relative_to(full.base)
        link.parent.mkdir(exist_ok=True)
        file.rename(blobs / file.name)
        link.symlink_to(os.path.relpath(blobs / file.name, link.parent))
    shutil.rmtree(full.base)
    snapshot.rename(full.base.with_name("kept"))
    full.base.symlink_to(full.root / "hub" / "snapshots" / "1")
    full.base.with_name("kept").rename(full.root / "hub" / "snapshots" / "1")
    return blobs


def test_links_of_the_hub(full, cached, cli):
    def touch_links() -> None:
        """The same blob by another link."""
        link = full.base / "tokenizer.json"
        target = link.resolve()
        link.unlink()
        link.symlink_to(target)

    with at(staged(full.root, "*.part"), touch_links) as done:
        outcome = cli(*full.command)
    assert outcome.code == 0, outcome.err
    assert done


@pytest.mark.parametrize("name", [FIRST, "tokenizer.json"])
@pytest.mark.parametrize("what", ["blob", "link", "snapshot"])
def test_links_of_the_hub_that_lead_elsewhere(what, name, full, cached, cli):
    def change() -> None:
        if what == "blob":
            return set_back(cached / name)
        copy = cached / "another"
        copy.write_bytes(other(cached / name))
        if what == "link":
            (full.base / name).unlink()
            (full.base / name).symlink_to(copy)
            return None
        shutil.copytree(
            full.root / "hub" / "snapshots" / "1", full.root / "hub" / "snapshots" / "2"
        )
        full.base.unlink()
        return full.base.symlink_to(full.root / "hub" / "snapshots" / "2")

    with at(staged(full.root, "*.part"), change) as done:
        outcome = cli(*full.command)
    assert done
    assert outcome.code == 7
    assert what == "snapshot" or str(full.base / name) in outcome.err
    assert not list(full.output.parent.iterdir())


@pytest.mark.parametrize("limit", [24, 64])
def test_few_descriptors(limit, full):
    """Files are held open only as far as there is room."""
    code = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit}))\n"
    line = [sys.executable, "-c", code + "from streamshard.cli import main; main()", *full.command]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_held_files_make_room(tmp_path):
    for number in range(30):
        (tmp_path / str(number)).write_bytes(b"x")
    opened, full = system.open, []

    def scarce(path: Path, flags: int) -> int:
        if len(open_below(tmp_path)) > 20:
            full.append(path)
            raise OSError(errno.EMFILE, "too many")
        return opened(path, flags)

    with pytest.MonkeyPatch.context() as patch, inputs.watching():
        patch.setattr(system, "open", scarce)
        for number in range(30):
            with InputFile(tmp_path / str(number)) as file:
                assert file.read(0, 1) == b"x"
    assert len(full) == 1
    assert open_below(tmp_path) == []


# --- calls that fail ------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["fstat", "stat"])
@pytest.mark.parametrize(
    "name", [f"base/{SECOND}", "adapter/adapter_config.json", "base/more/vocab.txt"]
)
def test_a_file_that_can_no_longer_be_looked_at(name, call, full, cli, monkeypatch):
    file, own = full.root / name, getattr(system, call)
    inode = file.stat().st_ino

    def fail(what: Any) -> os.stat_result:
        found: os.stat_result = own(what)
        if found.st_ino == inode:
            # As the system's own errors: those of calls for a path name it.
            named = () if isinstance(what, int) else (str(what),)
            raise OSError(errno.EIO, "broken", *named)
        return found

    monkeypatch.setattr(system, call, fail)
    outcome = cli(*full.command)
    assert outcome.code == 7
    assert f"{file}: cannot be read: broken" in outcome.err
    assert not full.output.exists()


def test_a_check_that_fails_at_the_end_is_no_change(full, cli, monkeypatch):
    """What is finished is kept, and continued."""
    own = system.stat

    def fail(path: Path) -> os.stat_result:
        if staged(full.root, "streamshard.json")():
            raise OSError(errno.EIO, "broken")
        return own(path)

    with monkeypatch.context() as patch:
        patch.setattr(system, "stat", fail)
        outcome = cli(*full.command)
    assert outcome.code == 7
    assert "is kept" in outcome.err
    assert '"resumed": 2' in cli(*full.command, "--json").out
