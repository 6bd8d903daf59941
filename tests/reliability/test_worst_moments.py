"""Things that happen at the worst moment: a file that grows, an output that appears, a lock that goes."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference
from marks import slow
from pairs import Pair, record_of

import streamshard
from streamshard.checkpoint.record import read_record, sealed
from streamshard.checkpoint.recorded_files import name_problem
from streamshard.disk.files import InputFile
from streamshard.disk.inputs import watching
from streamshard.disk.system import system
from streamshard.engine import lock as lock_module
from streamshard.engine.beside_output import places_beside
from streamshard.engine.staging import output_folder
from streamshard.errors import ChangedError, InputError, OutputError

pytestmark = slow

SECOND = "model-00002-of-00002.safetensors"
PLAN = {
    "streamshard": "0", "command": "test", "options": {}, "arithmetic": {}, "inputs": [],
    "files": {}, "recipe": "",
}  # fmt: skip


def partial(pair: Pair) -> Path:
    return places_beside(pair.output)["partial"]


@pytest.fixture
def when_read(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Path]]:
    """Have something happen once: when `path` is read for the first time since `made` exists."""
    names: dict[int, Path] = {}
    opened, read = system.open, system.pread

    def watch(path: Path, made: Path, happen: Callable[[], Any]) -> list[Path]:
        done: list[Path] = []

        def noted(name: Any, flags: int, *rest: Any) -> int:
            descriptor = opened(name, flags, *rest)
            names[descriptor] = Path(name)
            return descriptor

        def reading(descriptor: int, out: memoryview, offset: int) -> int:
            if names.get(descriptor) == path and made.exists() and not done:
                done.append(path)
                happen()
            return read(descriptor, out, offset)

        monkeypatch.setattr(system, "open", noted)
        monkeypatch.setattr(system, "pread", reading)
        return done

    return watch


def grow(file: Path) -> Callable[[], None]:
    def append() -> None:
        with file.open("ab") as opened:
            opened.write(b"more")

    return append


def refused(pair: Pair, cli: Callable[..., Any], code: int, *expected: str, more: Any = ()) -> None:
    """The command ends so, and what was finished of the output is all that is left."""
    outcome = cli(*pair.command, "--workers", "1", *more)
    assert outcome.code == code, outcome.err
    assert "Traceback" not in outcome.err
    for part in expected:
        assert part in outcome.err
    assert not pair.output.exists()
    assert {path.name for path in pair.output.parent.iterdir()} <= {".merged.partial"}


# --- inputs ---------------------------------------------------------------------------------------


def test_a_base_that_grows_while_it_is_read(pair, cli, when_read):
    file = pair.base / SECOND
    done = when_read(file, partial(pair) / f"{SECOND}.part", grow(file))
    refused(pair, cli, 7, str(file))
    assert done


@pytest.mark.parametrize("what", ["base", "adapter"])
def test_an_input_that_changes_between_plan_and_reading(what, pair):
    file = pair.base / SECOND
    if what == "adapter":
        file = pair.adapter / "adapter_model.safetensors"
    with pytest.raises(streamshard.StreamshardError, match=file.name) as raised:
        streamshard.merge_lora(
            base=pair.base,
            adapter=pair.adapter,
            output=pair.output,
            on_plan=lambda _: grow(file)(),
        )
    assert raised.value.exit_code == 7
    assert not pair.output.exists()


@pytest.mark.parametrize("nbytes", [1, 300_000, 600_000])
def test_a_side_file_that_grows_while_it_is_copied(nbytes, pair, cli, when_read):
    file = pair.base / "chat_template.jinja"
    file.write_bytes(bytes(nbytes))
    done = when_read(file, partial(pair) / file.name, grow(file))
    refused(pair, cli, 7, str(file))
    assert done


def test_a_folder_that_is_another_one_for_a_moment(tmp_path):
    """At the end everything is as it was, also the times of all files; what was read is not."""
    mine, other, away = (tmp_path / name for name in ("mine", "other", "away"))
    for folder in (mine, other):
        folder.mkdir()
        (folder / "config.json").write_text(folder.name)
    with watching():
        with InputFile(mine / "config.json") as file:
            assert file.read(0, 9) == b"mine"
        mine.rename(away)
        other.rename(mine)
        with pytest.raises(ChangedError, match=r"config\.json: was replaced"):
            InputFile(mine / "config.json")
        mine.rename(other)
        away.rename(mine)
    assert (mine / "config.json").read_text() == "mine"


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_regular_file_is_never_read(kind, tmp_path):
    """Neither waited for nor taken for an empty file."""
    path = tmp_path / kind
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(InputError, match=kind):
        InputFile(path)


def test_the_samples_reach_from_the_first_byte_to_the_last(tmp_path):
    """Of a base too large to be read twice."""
    import torch

    from streamshard.checkpoint.folder import open_checkpoint
    from streamshard.engine.fingerprint import SAMPLE_NBYTES, SAMPLES, fingerprint

    def content() -> Any:
        tensor = open_checkpoint(folder).tensors["a"]
        inputs = fingerprint("", {}, [tensor]).identity({})["inputs"]
        return [digest for _, digest, _ in inputs]

    folder = reference.save_checkpoint(tmp_path / "base", {"a": torch.zeros(1024, 1024)})
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    assert len(data) > 2 * SAMPLES * SAMPLE_NBYTES
    before = content()
    begin = 8 + int.from_bytes(data[:8], "little")
    for place in (0, 9, begin, begin + SAMPLE_NBYTES - 1, len(data) - SAMPLE_NBYTES, len(data) - 1):
        changed = data.copy()
        changed[place] ^= 1
        with file.open("r+b") as opened:
            opened.write(changed)
        if place >= begin:  # with another header it is no checkpoint, or another one
            assert content() != before, place
    file.write_bytes(data)
    assert content() == before


def test_the_place_of_a_tensor_is_part_of_the_plan(pair):
    from dataclasses import replace

    from streamshard.checkpoint.folder import open_checkpoint
    from streamshard.engine.fingerprint import differences, fingerprint

    def plan(tensor: Any) -> Any:
        return fingerprint("", {}, [tensor]).identity({})

    for tensor in open_checkpoint(pair.base).tensors.values():
        one, other = plan(tensor), plan(replace(tensor, offset=tensor.offset - 2))
        assert differences(one, plan(tensor)) == []
        assert differences(one, other) == ["other tensors are to be written, or from other sources"]


# --- the output -----------------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_appears_before_the_lock_is_held(overwrite, tmp_path, monkeypatch):
    """Unless it is an empty folder."""
    target, lock = tmp_path / "out", system.lock

    def late(descriptor: int) -> None:
        target.mkdir()
        if not overwrite:
            (target / "streamshard.json").write_bytes(record_of())
        lock(descriptor)

    monkeypatch.setattr(system, "lock", late)
    if overwrite:
        with output_folder(target, PLAN, names={"mine"}, overwrite=True) as staging:
            (staging.folder / "mine").write_text("x")
        assert (target / "mine").exists()
    else:
        with (
            pytest.raises(OutputError, match="exists"),
            output_folder(target, PLAN, names={"mine"}, overwrite=False),
        ):
            pytest.fail("all of it would be written for nothing")
        assert [path.name for path in target.iterdir()] == ["streamshard.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [errno.EIO, errno.EACCES, errno.ENOSPC])
def test_an_older_output_is_back_when_the_new_one_cannot_take_its_place(
    error, pair, cli, monkeypatch
):
    streamshard.merge_lora(base=pair.base, adapter=pair.adapter, output=pair.output, weight=[0.5])
    before, rename = reference.digests(pair.output), system.rename

    def fail(path: Path, other: Path) -> None:
        if Path(path) == partial(pair):
            raise OSError(error, os.strerror(error))
        rename(path, other)

    with monkeypatch.context() as patch:
        patch.setattr(system, "rename", fail)
        outcome = cli(*pair.command, "--overwrite")
    assert outcome.code == 6
    assert reference.digests(pair.output) == before
    assert not places_beside(pair.output)["old"].exists()
    assert cli(*pair.command, "--overwrite").code == 0
    assert reference.digests(pair.output) != before


@pytest.mark.parametrize("inner", ["", "deep/inside"])
def test_an_input_under_another_name(inner, pair, cli, monkeypatch):
    """As on disks that ignore case, or through a bind mount: only the disk knows it is the same."""
    alias = pair.root / "BASE"
    alias.mkdir()
    look = system.stat
    monkeypatch.setattr(
        system, "stat", lambda path: look(pair.base if Path(path) == alias else path)
    )
    before = reference.digests(pair.root)
    output = alias / inner / "out" if inner else alias / "out"
    command = [str(output) if part == str(pair.output) else part for part in pair.command]
    outcome = cli(*command)
    assert outcome.code == 5, outcome.err
    assert "input" in outcome.err
    assert reference.digests(pair.root) == before


# --- locks ----------------------------------------------------------------------------------------


def test_a_lock_whose_file_was_removed_is_taken_again(tmp_path, monkeypatch):
    """Its last holder ended between our opening and our locking: what we hold has no name."""
    path, lock, tries = tmp_path / "lock", system.lock, []

    def late(descriptor: int) -> None:
        if not tries:
            path.unlink()
        tries.append(descriptor)
        lock(descriptor)

    monkeypatch.setattr(system, "lock", late)
    refusals = []
    with lock_module.locked(path, tmp_path / "out"):
        assert len(tries) == 2

        def second() -> None:
            try:
                with lock_module.locked(path, tmp_path / "out"):
                    pass
            except OutputError as error:
                refusals.append(error)

        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert len(refusals) == 1, "of two runs one must be refused"


# --- records --------------------------------------------------------------------------------------


def test_a_record_in_which_any_byte_was_changed(tmp_path):
    file = tmp_path / "streamshard.json"
    record = {"command": "merge-lora", "tensors": {"ä": [1, 2.5, None]}, "last": ""}
    text = json.dumps(record, indent=2).encode() + b"\n"
    data = b"".join(sealed([text[:7], text[7:8], b"", text[8:]]))
    file.write_bytes(data)
    found = read_record(file)
    assert len(found.pop("record_digest")) == 32
    assert found == record
    for place in range(len(data)):
        for changed in (
            data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :],
            data[:place],
            data[:place] + data[place + 1 :],
            data[:place] + b" " + data[place:],
        ):
            file.write_bytes(changed)
            with pytest.raises(InputError, match=r"streamshard\.json"):
                read_record(file)


@pytest.mark.parametrize(
    "name", ["../x", "a/../../x", "a/..", "..", "/x", "", ".", "./x", "a//x", "a/", "x\0", "\udc80"]
)
def test_names_that_lead_elsewhere_are_not_followed(name):
    """Nothing outside of the folder is opened: what a record says is not believed so far."""
    assert name_problem(name) is not None


@pytest.mark.parametrize("name", ["x", "a/x", "..x", "a/...", ".x", "ä\n"])
def test_names_within_the_folder_are(name):
    assert name_problem(name) is None
