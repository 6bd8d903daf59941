"""Whether a run may continue another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted_runs import (
    AFTER_A_SHARD,
    FIRST,
    SECOND,
    alone,
    content,
    flip,
    killed,
    partial,
    report_of,
)
from pairs import Pair
from reference import save_file

from streamshard.checkpoint import folder as folder_module
from streamshard.engine import fingerprint


def another_version(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamshard.engine.fingerprint.__version__", "99.1")


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
    monkeypatch.setenv("STREAMSHARD_KERNEL", "numpy")
    outcome = cli(*interrupted.command, "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["resumed"] == 1


def identity_of(folder: Path) -> Any:
    tensor = folder_module.open_checkpoint(folder).tensors["a"]
    found = fingerprint.fingerprint("", {}, [tensor]).identity({})
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
    assert file.stat().st_size > 2 * fingerprint.SAMPLES * fingerprint.SAMPLE_NBYTES
    if how == "changed":
        flip(file, file.stat().st_size // 2 + 100_000)
    elif how == "copied":
        shutil.copytree(folder, tmp_path / "other")
        folder = tmp_path / "other"
    elif how == "moved":
        folder = folder.rename(tmp_path / "other")
    else:
        file.read_bytes()
    changes = fingerprint.differences(before, identity_of(folder))
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
