"""Places where an output cannot go."""

from __future__ import annotations

from pathlib import Path

import pytest
import reference
from pairs import record_of
from shards_of_pair import Q, merge, ones, put, single


@pytest.mark.parametrize("kind", ["folder", "empty-folder", "file"])
def test_an_output_that_exists(kind, pair, refused):
    if kind == "file":
        pair.output.write_text("mine")
    else:
        pair.output.mkdir()
        if kind == "folder":
            (pair.output / "mine.txt").write_text("mine")
    refused(5, str(pair.output), "--overwrite")


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["", "overwrite"])
@pytest.mark.parametrize("place", ["base", "adapter", "base/out", "base/a/b/out", "adapter/out"])
def test_an_output_at_or_inside_an_input(place, overwrite, pair, refused):
    refused(5, str(pair.root / place), command=merge(pair, pair.root / place, *overwrite))


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["", "overwrite"])
def test_an_output_that_contains_an_input(overwrite, pair, refused):
    refused(5, str(pair.root), command=merge(pair, pair.root, *overwrite))
    refused(5, command=merge(pair, pair.root / "base" / ".." / "base", *overwrite))


def test_an_output_that_contains_a_base_file(pair, refused):
    single()(pair)
    command = merge(pair, pair.base, "--overwrite")
    command[command.index("--base") + 1] = str(pair.base / "model.safetensors")
    refused(5, str(pair.base), command=command)


@pytest.mark.parametrize("place", ["link/out", "link"])
def test_an_output_inside_an_input_through_a_link(place, pair, refused):
    (pair.root / "link").symlink_to(pair.base)
    refused(5, command=merge(pair, pair.root / place, "--overwrite"))


def test_an_input_given_as_a_link(pair, refused):
    (pair.root / "link").symlink_to(pair.base)
    command = merge(pair, pair.base / "out")
    command[command.index("--base") + 1] = str(pair.root / "link")
    refused(5, command=command)


@pytest.mark.parametrize("target", ["there", "nowhere"])
@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["", "overwrite"])
def test_an_output_that_is_a_link(target, overwrite, pair, refused):
    (pair.root / "there").mkdir()
    (pair.root / "link").symlink_to(pair.root / target)
    refused(5, "link", command=merge(pair, pair.root / "link", *overwrite))


def test_the_current_folder_as_output(pair, refused, monkeypatch):
    (pair.root / "here").mkdir()
    monkeypatch.chdir(pair.root / "here")
    refused(5, command=merge(pair, Path()))


def test_overwriting_the_current_folder_by_its_short_name(pair, cli, monkeypatch):
    """A dot is a folder like any other: replaced, or refused; never an unexpected error."""
    (pair.root / "here").mkdir()
    monkeypatch.chdir(pair.root / "here")
    outcome = cli(*merge(pair, Path(), "--overwrite"))
    assert outcome.code in (0, 5), outcome.err
    if outcome.code == 0:
        assert (pair.root / "here" / "config.json").exists()


def test_a_failed_overwrite_keeps_the_old_output(pair, refused):
    single((Q, put(95, float("nan"))(ones(96, 40))))(pair)
    pair.output.mkdir()
    (pair.output / "model.safetensors").write_text("old")
    (pair.output / "streamshard.json").write_bytes(record_of("model.safetensors"))
    refused(4, "row 95", more=["--overwrite"])


@pytest.mark.parametrize("kind", ["folder", "file", "home", "weights of others"])
def test_only_own_outputs_are_overwritten(kind, pair, refused, monkeypatch):
    if kind == "file":
        pair.output.write_text("mine")
    else:
        pair.output.mkdir()
        names = {"folder": "mine.txt", "home": "streamshard.json"}
        (pair.output / names.get(kind, "a.safetensors")).write_text("mine")
    if kind == "home":
        (pair.output / "deep").mkdir()
        monkeypatch.chdir(pair.output / "deep")
    refused(5, str(pair.output), more=["--overwrite"])


@pytest.mark.parametrize("empty", [True, False])
def test_an_empty_output_path_is_not_this_folder(empty, pair, cli, monkeypatch, tmp_path):
    """As of a shell variable that is not set."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    output = "" if empty else "there"
    outcome = cli("merge-lora", "--adapter", pair.adapter, "--base", pair.base, "--output", output)
    assert outcome.code == (2 if empty else 0)
    assert ("the path of the output is empty" in outcome.err) == empty
    assert [path.name for path in here.iterdir()] == ([] if empty else ["there"])


def test_an_empty_folder_may_be_overwritten(pair, cli):
    pair.output.mkdir()
    assert cli(*pair.command, "--overwrite").code == 0
    assert (pair.output / "config.json").exists()


def test_folders_made_for_a_failed_run_are_removed(pair, refused):
    single((Q, put(95, float("nan"))(ones(96, 40))))(pair)
    refused(4, "row 95", "Nothing was written", command=merge(pair, pair.root / "new" / "a" / "o"))


def test_overwrite_replaces_the_whole_folder(pair, cli):
    pair.output.mkdir()
    (pair.output / "model-00001-of-00009.safetensors").write_text("stale")
    record = record_of("model-00001-of-00009.safetensors")
    (pair.output / "streamshard.json").write_bytes(record)
    assert cli(*pair.command, "--overwrite").code == 0
    assert not (pair.output / "model-00001-of-00009.safetensors").exists()
    assert sorted(p.name for p in pair.output.parent.iterdir()) == [pair.output.name]
    assert len(reference.read(pair.output)) == 4
