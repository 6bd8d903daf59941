"""Inputs that change while a run reads them: an error that names the file, and no result."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from interrupted_runs import content
from make_checkpoint import write_checkpoint
from pairs import Pair
from reference import load_file, save_file

import streamshard
from streamshard.checkpoint import digests, pickled
from streamshard.commands import identify, verify_content
from streamshard.disk import files, inputs
from streamshard.disk.files import ByteRange, Files, InputFile
from streamshard.disk.system import system
from streamshard.engine.journal import Journal
from streamshard.errors import ChangedError, InputError, ReadError
from streamshard.internvl import detection

FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
INDEX = "model.safetensors.index.json"
READ_OF_A_BASE = [FIRST, SECOND, INDEX, "config.json"]
BESIDE = ["tokenizer.json", "generation_config.json", "modeling_x.py", "more/vocab.txt"]


# --- how a file changes ---------------------------------------------------------------------------


def other(file: Path) -> bytes:
    """Other content of the same kind and length."""
    data = file.read_bytes()
    if file.suffix == ".bin":
        tensors = torch.load(file, weights_only=True)
        copy = file.with_name("copy")
        torch.save({name: -tensor for name, tensor in tensors.items()}, copy)
        data = copy.read_bytes()
        copy.unlink()
        return data
    if file.suffix == ".safetensors":
        return data[:-1] + bytes([data[-1] ^ 0x80])  # the sign of the last element
    if data[-1:] != b"\n":
        return data[:-1] + bytes([data[-1] ^ 1])
    return data[:-1] + b" "


def in_place(file: Path) -> None:
    data = other(file)
    with file.open("r+b") as opened:
        opened.write(data)


def set_back(file: Path) -> None:
    times = file.stat()
    in_place(file)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def replaced(file: Path) -> None:
    times = file.stat()
    new = file.with_name("new")
    new.write_bytes(other(file))
    os.utime(new, ns=(times.st_atime_ns, times.st_mtime_ns))
    new.replace(file)


def replaced_by_the_same(file: Path) -> None:
    new = file.with_name("new")
    shutil.copy2(file, new)
    new.replace(file)


def linked(file: Path) -> None:
    elsewhere = file.with_name("elsewhere")
    elsewhere.write_bytes(other(file))
    file.unlink()
    file.symlink_to(elsewhere)


def in_another_folder(file: Path) -> None:
    """All of the folder is replaced."""
    shutil.copytree(file.parent, file.parent.with_name("copied"))
    file.parent.rename(file.parent.with_name("was"))
    file.parent.with_name("copied").rename(file.parent)


CHANGES: dict[str, Callable[[Path], Any]] = {
    "in place": in_place,
    "set back": set_back,
    "replaced": replaced,
    "by the same": replaced_by_the_same,
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "grown": lambda file: os.truncate(file, file.stat().st_size + 1),
    "removed": lambda file: file.unlink(),
    "linked": linked,
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "folder": in_another_folder,
}


# --- when it does ---------------------------------------------------------------------------------


def staged(root: Path, name: str) -> Callable[[], bool]:
    """Whether there is such a file where an output is built."""
    return lambda: any(root.glob(f"**/.*.partial/{name}"))


@contextlib.contextmanager
def at(moment: Callable[[], bool], change: Callable[[], Any]) -> Iterator[list[bool]]:
    """Do something once, at the first write when `moment` has come."""
    pwrite, lock, done = system.pwrite, threading.Lock(), []

    def call(descriptor: int, data: memoryview, offset: int) -> int:
        with lock:
            if not done and moment():
                done.append(True)
                change()
        return pwrite(descriptor, data, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(system, "pwrite", call)
        yield done


MOMENTS = {
    "a shard": "*.part",
    "beside": "tokenizer.json",
    "the record": "streamshard.json",
}


@pytest.fixture
def full(pair: Pair) -> Pair:
    """A pair with all that may lie beside a base."""
    for name in BESIDE:
        (pair.base / name).parent.mkdir(exist_ok=True)
        (pair.base / name).write_text('{"a": 1}\n')
    for file in [pair.base / "config.json", pair.base / INDEX, *pair.adapter.glob("*.json")]:
        file.write_text(file.read_text() + "\n")
    (pair.base / "streamshard.json").write_text('{"adapters": []}\n')
    return pair


def stopped(
    cli: Callable[..., Any], root: Path, command: list[str], file: Path, how: str, moment: str
) -> str:
    """Run a command while `file` changes: it must fail for that reason, and leave nothing."""
    after: list[dict[str, str]] = []
    folders = [root / name for name in os.listdir(root) if name != "out"]

    def change() -> None:
        CHANGES[how](file)
        after.extend(map(reference.digests, folders))

    with at(staged(root, MOMENTS[moment]), change) as done:
        outcome = cli(*command)
    assert done, "the moment did not come"
    assert outcome.code == 7, outcome.err
    assert outcome.out == ""
    assert str(file) in outcome.err or how == "folder"
    assert "while this run was reading it" in outcome.err
    assert "Traceback" not in outcome.err
    assert not list((root / "out").iterdir())
    assert list(map(reference.digests, folders)) == after
    return str(outcome.err)


# --- merges ---------------------------------------------------------------------------------------


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
import os, signal, sys
from streamshard.disk.new_files import OutputFile
write = OutputFile.write
def stop(self, data, offset):
    if not stopped and self.path.name.endswith(".part"):
        stopped.append(True)
        os.kill(os.getpid(), signal.SIGSTOP)
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
    _, said = process.communicate(timeout=60)
    assert process.returncode == 7, said
    assert str(full.root / name) in said
    assert not list(full.output.parent.iterdir())


# --- other commands -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model in both layouts, and wrapped as after a training."""
    root = tmp_path_factory.mktemp("made")
    for layout in ("hf", "custom"):
        write_checkpoint(root / layout, "tiny", layout=layout, max_shard_size="200KB")
    streamshard.wrap_lora(base=root / "custom", output=root / "wrapped", llm_r=4)
    for file in sorted((root / "wrapped").glob("*.safetensors")):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if ".lora_B." in name:
                tensors[name] = torch.full_like(tensor, 0.01)
        save_file(tensors, file, {"format": "pt"})
    return root


@pytest.fixture
def models(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    (tmp_path / "out").mkdir()
    return tmp_path


COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "hf2custom": (
        ["hf2custom", "--hf-path", "hf", "--custom-path", "custom", "--save-path", "out/x"],
        [
            *(f"hf/{name}" for name in READ_OF_A_BASE),
            *(f"custom/{name}" for name in READ_OF_A_BASE),
            "custom/tokenizer_config.json",
            "custom/vocab.json",
            "custom/modeling_internvl_chat.py",
        ],
    ),
    "custom2hf": (
        [
            *("custom2hf", "--custom-path", "custom", "--hf-path", "hf", "--save-path", "out/x"),
            *("--tokenizer-from", "source"),
        ],
        [
            *(f"custom/{SECOND}", "custom/vocab.json", "custom/added_tokens.json"),
            *(f"hf/{FIRST}", "hf/config.json"),
        ],
    ),
    "merge-lora CHECKPOINT": (
        ["merge-lora", "wrapped", "--output", "out/x"],
        [*(f"wrapped/{name}" for name in READ_OF_A_BASE), "wrapped/merges.txt"],
    ),
    "merge-lora CHECKPOINT --reference": (
        ["merge-lora", "wrapped", "--layout", "hf", "--reference", "hf", "--output", "out/x"],
        [f"wrapped/{FIRST}", "hf/config.json", f"hf/{SECOND}", "hf/vocab.json"],
    ),
    "extract-lora": (
        ["extract-lora", "wrapped", "--base", "custom", "--output", "out/x"],
        [f"wrapped/{SECOND}", f"custom/{FIRST}", "custom/config.json", f"wrapped/{INDEX}"],
    ),
    "wrap-lora": (
        ["wrap-lora", "--base", "custom", "--llm-r", "4", "--output", "out/x"],
        [f"custom/{FIRST}", "custom/config.json", "custom/conversation.py"],
    ),
    "wrap-lora --format peft": (
        ["wrap-lora", "--base", "custom", "--llm-r", "4", "--format", "peft", "--output", "out/x"],
        [f"custom/{FIRST}", "custom/config.json", f"custom/{INDEX}"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", ["set back", "replaced"])
@pytest.mark.parametrize(
    ("command", "name"), [(command, name) for command in COMMANDS for name in COMMANDS[command][1]]
)
def test_whatever_other_commands_read(command, name, how, models, cli):
    folders = {"hf", "custom", "wrapped", "out/x"}
    line = [str(models / part) if part in folders else part for part in COMMANDS[command][0]]
    # `hf` is a folder and a layout.
    line = ["hf" if line[i - 1] == "--layout" else part for i, part in enumerate(line)]
    stopped(cli, models, line, models / name, how, "a shard")


@pytest.mark.parametrize("how", [how for how in CHANGES if how != "a folder"])
@pytest.mark.parametrize(
    "name", [f"hf/{FIRST}", f"custom/{SECOND}", "hf/config.json", f"custom/{INDEX}"]
)
def test_diff(name, how, models):
    done: list[str] = []

    def change(_: int, tensor: str) -> None:
        if not done:
            done.append(tensor)
            CHANGES[how](models / name)

    with pytest.raises(ChangedError) as raised:
        streamshard.diff(models / "hf", models / "custom", workers=1, progress=change)
    assert done
    assert how == "folder" or Path(name).name in str(raised.value)


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("name", [FIRST, SECOND, INDEX, "config.json", "streamshard.json"])
def test_verify(name, how, full):
    streamshard.merge_lora(base=full.base, adapter=full.adapter, output=full.output)
    done: list[str] = []

    def change(_: int, tensor: str) -> None:
        done.append(tensor)
        if len(done) == 4:  # the last one
            CHANGES[how](full.output / name)

    with pytest.raises(ChangedError, match="was "):
        streamshard.verify(full.output, workers=1, progress=change)
    assert len(done) == 4


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("name", ["tokenizer.json", "more/vocab.txt"])
def test_verify_what_lies_beside(name, how, full, monkeypatch):
    """It is opened by the threads that read: they note it too."""
    streamshard.merge_lora(base=full.base, adapter=full.adapter, output=full.output)
    hash_file, done = digests.hash_file, []

    def later(path: Path, *hashes: Any, **options: Any) -> int:
        if path == full.output / name:
            done.append(path)
            CHANGES[how](path)
        return hash_file(path, *hashes, **options)

    monkeypatch.setattr(verify_content, "hash_file", later)
    with pytest.raises(ChangedError, match="was "):
        streamshard.verify(full.output, workers=1)
    assert done


@pytest.mark.parametrize("name", [FIRST, "config.json"])
def test_inspect(name, full, monkeypatch):
    detect = detection.detect

    def later(*arguments: Any) -> Any:
        replaced(full.base / name)
        return detect(*arguments)

    monkeypatch.setattr(identify, "detect", later)
    with pytest.raises(ChangedError, match=name):
        streamshard.inspect(full.base)


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
    """New files in the folder, those that are not carried, and the tokenizer of an adapter."""
    (full.base / "trainer_state.json").write_text("{}")
    (full.adapter / "tokenizer.json").write_text("{}")

    def change() -> None:
        (full.base / "new.txt").write_text("x")
        (full.base / "trainer_state.json").write_text("{ }")
        (full.adapter / "tokenizer.json").unlink()

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
        if len(os.listdir("/proc/self/fd")) > before + 20:
            full.append(path)
            raise OSError(errno.EMFILE, "too many")
        return opened(path, flags)

    before = len(os.listdir("/proc/self/fd"))
    with pytest.MonkeyPatch.context() as patch, inputs.watching():
        patch.setattr(system, "open", scarce)
        for number in range(30):
            with InputFile(tmp_path / str(number)) as file:
                assert file.read(0, 1) == b"x"
    assert len(full) == 1
    assert len(os.listdir("/proc/self/fd")) == before


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
            raise OSError(errno.EIO, "broken")
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


# --- stamps and who notes them --------------------------------------------------------------------


def test_a_change_within_one_tick(tmp_path):
    """Just after the file was made: the times alone would be those of the first content."""
    file = tmp_path / "file"
    for _ in range(20):
        with inputs.watching() as noted:
            file.write_bytes(b"one")
            assert files.read_bytes(file, 3) == b"one"
            with file.open("r+b") as opened:
                opened.write(b"two")
            with pytest.raises(ChangedError, match="was written to"):
                noted.check()
            noted.close()
        file.unlink()


def test_an_old_file_is_not_waited_for(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"x")
    time.sleep(0.05)
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("waits"))
    with inputs.watching():
        assert files.read_bytes(tmp_path / "file", 9) == b"x"


def test_the_number_of_a_held_file_is_not_used_again(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    with contextlib.suppress(ChangedError), inputs.watching() as noted:
        files.file_nbytes(tmp_path / "file")
        inode = (tmp_path / "file").stat().st_ino
        (tmp_path / "file").unlink()
        made = [tmp_path / str(number) for number in range(50)]
        for path in made:
            path.write_bytes(b"y")
        assert inode not in {path.stat().st_ino for path in made}
        assert [*noted.stamps] == [str(tmp_path / "file")]


def test_files_have_the_stamps_that_they_must_have(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"one")
    with inputs.watching() as noted:
        files.file_nbytes(file)
        stamps = pickle.loads(pickle.dumps(noted.stamps))
    source = ByteRange(str(file), 0, 3, 3)
    out = bytearray(3)
    with contextlib.closing(Files(stamps)) as opened:
        opened.read_into(source, memoryview(out))
    assert out == b"one"
    file.unlink()
    file.write_bytes(b"two")
    with (
        contextlib.closing(Files(stamps)) as opened,
        pytest.raises(ChangedError, match="file: was"),
    ):
        opened.read_into(source, memoryview(out))
    with contextlib.closing(Files()) as opened:
        opened.read_into(source, memoryview(out))
        opened.check(source)
        set_back(file)
        with pytest.raises(ChangedError, match="its content, or"):
            opened.check(source)


def test_threads_that_share_files_note_them(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"one")
    source = ByteRange(str(file), 0, 3, 3)
    with inputs.watching() as noted:
        with contextlib.closing(Files()) as opened:
            read = threading.Thread(
                target=lambda: opened.read_into(source, memoryview(bytearray(3)))
            )
            read.start()
            read.join()
        assert [*noted.stamps] == [str(file)]


def test_each_run_has_its_own(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    with inputs.watching() as outer:
        with inputs.watching() as inner:
            files.file_nbytes(tmp_path / "file")
        assert [*inner.stamps] == [str(tmp_path / "file")]
        assert outer.stamps == {}
        assert inputs.active() is outer
    assert inputs.active() is None


def test_a_pickle_is_read_through_the_door(tmp_path, monkeypatch):
    """Not by its name, which may lead elsewhere by then; and an error of the disk stays one."""
    folder = reference.save_adapter(tmp_path / "adapter", {"a": torch.ones(1000)}, pickled=True)
    file = folder / "adapter_model.bin"
    inode = file.stat().st_ino
    with inputs.watching() as noted:
        assert pickled.read_pickled(file)["a"].nbytes == 4000
        assert noted.stamps[str(file)].inode == inode
    monkeypatch.setattr(
        system, "pread", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "bad"))
    )
    with pytest.raises(ReadError, match=r"adapter_model\.bin: cannot be read: bad"):
        pickled.read_pickled(file)


def test_what_is_noted_is_cheap(tmp_path):
    """A hundred shards and what lies beside them are compared in milliseconds."""
    for number in range(130):
        (tmp_path / str(number)).write_bytes(b"x")
    time.sleep(0.05)
    with inputs.watching() as noted:
        for number in range(130):
            files.file_nbytes(tmp_path / str(number))
        before = time.perf_counter()
        noted.check()
        assert time.perf_counter() - before < 0.1
