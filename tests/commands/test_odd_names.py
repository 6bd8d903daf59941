"""Folders, files and tensors of any name: what is written and printed is text, or they are refused."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from reference import INDEX, load_file, save_file
from verify_helpers import FIRST, RECORD, SECOND, files_of, flip, put

import streamshard
from streamshard.checkpoint.record import read_record
from streamshard.engine.journal import Journal
from streamshard.errors import InputError

NAMES = [
    b"b\xff", b"\xed\xa0\x80", b"line\nbreak", b"tab\t", b"\x1b[31m", b"a b", "ü日本".encode(),
    b"x" * 190, b"'q'", b'"d"', b"back\\slash", b"a:b", b"-dash",
]  # fmt: skip


@pytest.fixture(params=NAMES, ids=repr)
def odd(request, tmp_path) -> str:
    name = os.fsdecode(request.param)
    try:
        (tmp_path / name).mkdir()
    except (OSError, UnicodeEncodeError):
        pytest.skip("the file system does not take it")
    (tmp_path / name).rmdir()
    return name


def test_folders_of_any_name(odd, pair, cli):
    """Base, adapter and output; everything that is printed is text."""
    base, adapter, output = (pair.root / "out" / f"{kind}{odd}" for kind in "bao")
    pair.base.rename(base)
    pair.adapter.rename(adapter)
    command = ["merge-lora", "--base", base, "--adapter", adapter, "--output", output]
    assert cli(*command, "--dry-run").code == 0
    outcome = cli(*command, "--json")
    assert outcome.code == 0, outcome.err
    json.loads(outcome.out)["output"].encode()
    read_record(output / RECORD)
    report = streamshard.verify(output, strict=True)
    assert set(report["checked_files"]) == files_of(output)
    report["path"].encode()
    outcome = cli("verify", output)
    assert outcome.code == 0
    assert "is right" in outcome.out
    outcome = cli("verify", output, "--json")
    json.loads(outcome.out)["path"].encode()
    assert cli(*command, "--overwrite").code == 0
    assert cli("inspect", output, "--json").code == cli("diff", base, output).code == 0
    put(output, f"x{odd}.md")
    outcome = cli("verify", output, "--json")
    assert outcome.code == 0
    (extra,) = json.loads(outcome.out)["extra"]
    extra.encode()
    put(output, f"x{odd}.py")
    assert cli("verify", output).code == 8


def test_an_interrupted_run_in_a_folder_of_any_name(odd, pair, cli, monkeypatch):
    """The journal names it too."""
    base, output = pair.root / "out" / f"b{odd}", pair.root / "out" / f"o{odd}"
    pair.base.rename(base)
    command = ["merge-lora", "--base", base, "--adapter", pair.adapter, "--output", output]
    add = Journal.add

    def add_one_and_stop(journal: Journal, shard: Any) -> None:
        add(journal, shard)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", add_one_and_stop)
        assert cli(*command).code == 130
    outcome = cli(*command, "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["resumed"] == 1
    assert cli("verify", output, "--strict").code == 0


def test_a_config_that_names_an_odd_folder(tmp_path, cli):
    """An adapter's config has the path of its base; all readers must understand it."""
    from make_checkpoint import write_checkpoint

    base = tmp_path / os.fsdecode(b"b\xff")
    try:
        base.mkdir()
    except OSError:
        pytest.skip("the file system does not take it")
    base.rmdir()
    write_checkpoint(base, "tiny", layout="custom")
    out = tmp_path / "out"
    assert (
        cli("wrap-lora", "--base", base, "--output", out, "--llm-r", "2", "--format", "peft").code
        == 0
    )
    json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"].encode()
    assert cli("verify", out, "--strict").code == 0
    assert cli("inspect", out).code == 0


def test_side_files_of_any_name_are_carried_or_refused(odd, pair, cli, refused):
    put(pair.base, f"sub/{odd}")
    put(pair.base, f"{odd}/x.txt")
    try:
        odd.encode()
    except UnicodeEncodeError:
        said = refused(3, "is not UTF-8", "Rename", "\\udc")
        assert said.isprintable() or said.strip().isprintable()
        refused(3, "is not UTF-8", more=["--dry-run"])
        return
    assert cli(*pair.command).code == 0
    report = streamshard.verify(pair.output, strict=True)
    assert {f"sub/{odd}", f"{odd}/x.txt"} <= set(report["checked_files"])
    assert cli("verify", pair.output).code == 0
    flip(pair.output / "sub" / odd, 0)
    assert cli("verify", pair.output).code == 8


@pytest.mark.parametrize(
    "name",
    ["streamshard.json/x", f"{FIRST}/x.txt", f"{INDEX}/x", f"{SECOND}/a/b"],
)
def test_side_files_that_would_take_the_place_of_ours(name, pair, refused):
    """Folders of these names; a journal of the base is no part of it, and left out (`test_ours`)."""
    if name.startswith((FIRST, SECOND, INDEX)):
        whole = load_file(pair.base / FIRST) | load_file(pair.base / SECOND)
        for file in (FIRST, SECOND, INDEX):
            (pair.base / file).unlink()
        save_file(whole, pair.base / "model.safetensors", {"format": "pt"})
        more = ["--max-shard-size", "8KB"]
    else:
        more = []
    if name.startswith(SECOND):
        more = ["--max-shard-size", "12KB"]
    put(pair.base, name)
    refused(3, name.partition("/")[0], more=more)


def test_weights_of_others_are_left_out_whatever_their_names(pair):
    for name in ("two\nlines.bin", "two\nlines.index.json", "checkpoint-1/x.py"):
        put(pair.base, name)
    streamshard.merge_lora(base=pair.base, adapter=pair.adapter, output=pair.output)
    assert {name for name in files_of(pair.output) if "\n" in name or "/" in name} == set()


def test_a_record_in_a_folder_beside_the_weights_is_left_out(pair):
    put(pair.base, "sub/streamshard.json")
    put(pair.base, "sub/kept.txt")
    streamshard.merge_lora(base=pair.base, adapter=pair.adapter, output=pair.output)
    assert not (pair.output / "sub" / RECORD).exists()
    assert "sub/kept.txt" in streamshard.verify(pair.output, strict=True)["checked_files"]


def test_tensors_have_no_names_that_are_no_text(pair):
    """So that no record has them: a header that has one is refused."""
    file = pair.base / FIRST
    file.write_bytes(file.read_bytes().replace(b"class_embedding", b"class_embe\\ud800"[:15], 1))
    with pytest.raises(InputError):
        streamshard.merge_lora(base=pair.base, adapter=pair.adapter, output=pair.output)
