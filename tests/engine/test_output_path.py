"""Where output goes: two runs, what killed runs leave, mounts, and what must not be followed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pairs import Pair, record_of
from reference import load_file, save_file

from streamshard.disk import system
from streamshard.engine import beside_output
from streamshard.engine.staging import output_folder
from streamshard.errors import OutputError, WriteError

PLAN: dict[str, Any] = {
    "streamshard": "0",
    "command": "test",
    "options": {},
    "arithmetic": {},
    "inputs": [],
    "files": {},
    "recipe": "",
}


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path):
    target = tmp_path / "out"

    def late() -> None:
        with output_folder(target, PLAN, names=["mine"], overwrite=False) as staging:
            (staging.folder / "mine").write_text("second")
            target.mkdir()
            (target / "theirs").write_text("first")

    with pytest.raises(OutputError, match="appeared while"):
        late()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (target / "theirs").read_text() == "first"


def test_a_mount_point_is_not_replaced(pair: Pair, cli, monkeypatch):
    pair.output.mkdir()
    monkeypatch.setattr("streamshard.engine.output_path.is_mount", lambda path: path == pair.output)
    outcome = cli(*pair.command, "--overwrite")
    assert outcome.code == 5
    assert str(pair.output / "merged") in outcome.err


def test_a_name_that_is_too_long_is_a_write_error(pair: Pair, cli):
    command = ["merge-lora", "--base", pair.base, "--adapter", pair.adapter]
    outcome = cli(*command, "--output", pair.root / ("a" * 300))
    assert outcome.code == 6
    assert "too long" in outcome.err


def test_a_linked_folder_in_the_base_is_named(pair: Pair, cli):
    (pair.root / "elsewhere").mkdir()
    (pair.base / "assets").symlink_to(pair.root / "elsewhere")
    outcome = cli(*pair.command)
    assert outcome.code == 3
    assert "'assets'" in outcome.err
    assert not pair.output.exists()


def test_updates_that_cancel_are_an_error(pair: Pair, cli):
    other = pair.root / "negated"
    shutil.copytree(pair.adapter, other)
    tensors = load_file(pair.adapter / "adapter_model.safetensors")
    negated = {name: -t if ".lora_B." in name else t for name, t in tensors.items()}
    save_file(negated, other / "adapter_model.safetensors", {"format": "pt"})
    outcome = cli(*pair.command, "--adapter", other)
    assert outcome.code == 4
    assert "change no weight" in outcome.err
    assert list(pair.output.parent.iterdir()) == []


@pytest.mark.parametrize("count", [0, 65, 10**20])
def test_absurd_numbers_of_workers_are_a_usage_error(count, pair: Pair, cli):
    assert cli(*pair.command, "--workers", count).code == 2


def test_a_hub_id_is_told_from_a_missing_folder(pair: Pair, cli):
    command = ["merge-lora", "--adapter", pair.adapter, "--output", pair.output]
    outcome = cli(*command, "--base", "OpenGVLab/InternVL3-8B")
    assert outcome.code == 9
    assert "a model on the hub" in outcome.err
    assert "Check the path" in cli(*command, "--base", "/no/such/folder").err
    assert cli(*command, "--base", "").code == 2


def test_a_report_that_cannot_be_printed_is_not_a_failed_merge(pair: Pair):
    with Path("/dev/full").open("w") as full:
        run = subprocess.run(
            [sys.executable, "-m", "streamshard", *pair.command],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert run.returncode == 6
    assert "is complete" in run.stderr
    assert "Traceback" not in run.stderr
    assert (pair.output / "model.safetensors.index.json").exists()


def test_the_default_name_is_that_of_a_link_and_not_of_its_target(pair: Pair, cli, monkeypatch):
    (pair.root / "MyModel").symlink_to(pair.base)
    monkeypatch.chdir(pair.root)
    outcome = cli("merge-lora", "--base", "MyModel", "--adapter", pair.adapter)
    assert outcome.code == 0
    assert (pair.root / "MyModel-merged" / "config.json").exists()


def test_a_link_to_nothing_in_the_base_is_named(pair: Pair, cli):
    (pair.base / "vocab.json").symlink_to(pair.root / "never fetched")
    outcome = cli(*pair.command)
    assert outcome.code == 3
    assert "vocab.json" in outcome.err


def test_an_interrupted_swap_restores_the_old_output(tmp_path, monkeypatch):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    (target / "streamshard.json").write_bytes(record_of("old"))

    class Interrupted(system.System):
        def rename(self, path: Any, other: Any) -> None:
            if str(path).endswith(".partial"):
                raise KeyboardInterrupt
            super().rename(path, other)

    def swap() -> None:
        with output_folder(target, PLAN, names=[], overwrite=True):
            monkeypatch.setattr(system.system, "rename", Interrupted().rename)

    with pytest.raises(KeyboardInterrupt):
        swap()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (target / "old").read_text() == "old"


def test_a_hang_up_that_is_ignored_stays_ignored(pair: Pair, cli):
    import signal

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert cli(*pair.command).code == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_help_names_the_program(cli):
    assert "Usage: streamshard merge-lora" in cli("merge-lora", "--help").out


def test_the_json_of_a_diff_with_nan_is_json(pair: Pair, cli):
    import json

    import reference
    import torch
    from reference import save_file

    content = reference.read(pair.base)
    name = next(iter(content))
    for folder in ("a", "b"):
        (pair.root / folder).mkdir()
        save_file(content, pair.root / folder / "model.safetensors", {"format": "pt"})
        content[name] = torch.full_like(content[name], float("nan"))
    outcome = cli("diff", pair.root / "a", pair.root / "b", "--json")
    assert outcome.code == 0

    def refuse(constant: str) -> float:
        raise AssertionError(constant)

    report = json.loads(outcome.out, parse_constant=refuse)
    assert report["l2"]["sum"] is None
    assert [row["name"] for row in report["different"]] == [name]


def test_a_dry_run_says_that_nothing_can_be_written(pair: Pair, cli, monkeypatch):
    """As the run would."""
    monkeypatch.setattr(system.system, "may_change", lambda path: path != pair.output.parent)
    for output in (pair.output, pair.output / "deeper" / "still"):
        outcome = cli(*pair.command[:-1], output, "--dry-run")
        assert outcome.code == 6
        assert str(pair.output.parent) in outcome.err
    (pair.root / "file").touch()
    assert cli(*pair.command[:-1], pair.root / "file" / "merged", "--dry-run").code == 6
    monkeypatch.undo()
    assert cli(*pair.command, "--dry-run").code == 0


@pytest.mark.parametrize("what", ["tidy", "staged_nbytes", "resolved", "check_writable"])
def test_links_in_circles_are_an_output_that_cannot_be_written(what, tmp_path, monkeypatch):
    def loop(path: Path) -> Path:
        raise RuntimeError(f"Symlink loop from {path}")  # of pathlib before Python 3.13

    monkeypatch.setattr(Path, "resolve", loop)
    call = getattr(beside_output, what)
    if what == "tidy":
        call(tmp_path / "x")
        return
    with pytest.raises(WriteError, match="circle"):
        call(tmp_path / "x")
