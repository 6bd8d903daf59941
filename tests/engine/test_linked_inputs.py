"""Inputs that are in truth in the output, by links: never removed by the run that reads them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from folders import make
from foreign_things import Cli, make_output, old, state
from interrupted_runs import AFTER_A_SHARD, BETWEEN_THE_RENAMES, FIRST, killed, partial
from pairs import Outcome, Pair, record_of

DRY = pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry run"])


def refused(pair: Pair, cli: Cli, path: Path, *command: str) -> None:
    before = state(pair.root)
    outcome: Outcome = cli(*command)
    assert outcome.code == 5, outcome
    assert str(path) in outcome.err
    assert "which this run reads" in outcome.err
    assert state(pair.root) == before


def swapped(pair: Pair, name: str, folder: str) -> list[str]:
    return [*pair.command[:1], *(str(pair.root / folder) if part == name else part
            for part in pair.command[1:])]  # fmt: skip


def linked(folder: Path, to: Path, how: str, *names: str) -> None:
    """Put links in the place of files: as from a folder that somebody has made of an output."""
    for name in names:
        (folder / name).unlink()
        if how == "link":
            (folder / name).symlink_to(os.path.relpath(to / name, folder))
        elif how == "link to a link":
            (folder.parent / f"link-{name}").symlink_to(to / name)
            (folder / name).symlink_to(folder.parent / f"link-{name}")
        else:
            os.link(to / name, folder / name)


@DRY
@pytest.mark.parametrize("how", ["link", "link to a link", "hard link"])
@pytest.mark.parametrize("name", [FIRST, "model.safetensors.index.json"])
def test_a_base_of_links_into_the_output(name, how, dry, pair, cli):
    make_output(pair)
    base = pair.root / "base2"
    shutil.copytree(pair.output, base)
    (base / "streamshard.json").unlink()
    linked(base, pair.output, how, name)
    command = swapped(pair, str(pair.base), "base2")
    refused(pair, cli, base / name, *command, "--overwrite", *dry)


@DRY
def test_an_adapter_whose_weights_are_a_link_into_the_output(dry, pair, cli):
    name = "adapter_model.safetensors"
    pair.output.mkdir()
    shutil.copy(pair.adapter / name, pair.output)
    (pair.output / "streamshard.json").write_bytes(record_of(name))
    linked(pair.adapter, pair.output, "link", name)
    refused(pair, cli, pair.adapter / name, *pair.command, "--overwrite", *dry)


@DRY
@pytest.mark.parametrize("more", [[], ["--overwrite"]], ids=["plain", "overwrite"])
def test_a_base_of_links_into_what_a_killed_run_has_left(more, dry, pair, cli):
    shutil.copytree(pair.base, pair.root / "base2")
    killed(AFTER_A_SHARD, [*pair.command, "--workers", "1"])
    linked(pair.root / "base2", partial(pair), "link", FIRST)
    command = swapped(pair, str(pair.base), "base2")
    refused(pair, cli, pair.root / "base2" / FIRST, *command, *more, *dry)


@DRY
@pytest.mark.parametrize("how", ["link", "hard link"])
def test_a_base_of_links_into_what_a_killed_run_was_replacing(how, dry, pair, cli):
    make_output(pair)
    shutil.copytree(pair.base, pair.root / "base2")
    killed(BETWEEN_THE_RENAMES, [*pair.command, "--overwrite"])
    linked(pair.root / "base2", old(pair), how, FIRST)
    command = swapped(pair, str(pair.base), "base2")
    refused(pair, cli, pair.root / "base2" / FIRST, *command, "--overwrite", *dry)


@DRY
def test_a_reference_of_links_into_the_output(dry, tmp_path, cli):
    folders = {side: make(tmp_path / side, "tiny", side) for side in ("custom", "hf")}
    output = tmp_path / "out" / "custom"
    output.parent.mkdir()
    command = ["hf2custom", "--hf-path", folders["hf"], "--save-path", output, "--custom-path"]
    assert cli(*command, folders["custom"]).code == 0
    weights = sorted(output.glob("*.safetensors"))
    linked(folders["custom"], output, "link", *(file.name for file in weights[:1]))
    before = state(tmp_path)
    outcome = cli(*command, folders["custom"], "--overwrite", *dry)
    assert outcome.code == 5, outcome
    assert str(folders["custom"] / weights[0].name) in outcome.err
    assert state(tmp_path) == before


def test_a_folder_of_links_to_elsewhere_is_no_hindrance(pair, cli):
    """As the hub's cache has it."""
    shutil.copytree(pair.base, pair.root / "base2")
    linked(pair.root / "base2", pair.base, "link", FIRST)
    make_output(pair)
    assert cli(*swapped(pair, str(pair.base), "base2"), "--overwrite").code == 0
