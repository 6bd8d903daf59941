"""Places where an output cannot go."""

from __future__ import annotations

from pathlib import Path

import pytest
import reference
from folders import make
from interrupted_runs import BETWEEN_THE_RENAMES, REMOVING_THE_OLD, alone, killed
from make_checkpoint import write_adapter
from pairs import record_of
from shards_of_pair import Q, merge, ones, put, single

from streamshard.engine import run


@pytest.mark.parametrize("kind", ["folder", "file", "record", "more", "mount", "working folder"])
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_overwrite_is_advised_only_where_it_would_do(kind, dry, pair, refused, monkeypatch):
    """Part 4: "or pass --overwrite", which was then refused as well."""
    if kind == "file":
        pair.output.write_text("mine")
    else:
        pair.output.mkdir()
        (pair.output / "model.safetensors").write_text("old")
    if kind not in {"folder", "file"}:
        (pair.output / "streamshard.json").write_bytes(record_of("model.safetensors"))
    if kind == "more":
        (pair.output / "mine.txt").write_text("mine")
    elif kind == "working folder":
        monkeypatch.chdir(pair.output)
    elif kind == "mount":
        place = "streamshard.engine.output_path.is_mount"
        monkeypatch.setattr(place, lambda path: path == pair.output)
    said = refused(5, str(pair.output), more=dry)
    assert ("or pass --overwrite" in said) == (kind == "record")
    if kind != "record":
        assert refused(5, str(pair.output), more=[*dry, "--overwrite"]) == said


@pytest.mark.parametrize("command", ["merge-lora", "hf2custom", "custom2hf", "wrap-lora"])
def test_R13_an_empty_folder_as_output(command, tmp_path, cli):
    made = {side: make(tmp_path / side, "tiny", side) for side in ("custom", "hf")}
    write_adapter(tmp_path / "lora", "tiny", layout="custom")
    both = ["--hf-path", made["hf"], "--custom-path", made["custom"], "--save-path"]
    arguments = {
        "merge-lora": ["--base", made["custom"], "--adapter", tmp_path / "lora", "--output"],
        "hf2custom": both,
        "custom2hf": both,
        "wrap-lora": ["--base", made["custom"], "--llm-r", "2", "--output"],
    }[command]
    output = tmp_path / "out" / "made"
    output.mkdir(parents=True)
    dry = cli(command, *arguments, output, "--dry-run")
    assert dry.code == 0, dry.err
    assert [*output.iterdir()] == []
    outcome = cli(command, *arguments, output)
    assert outcome.code == 0, outcome.err
    assert (output / "streamshard.json").exists()
    assert [path.name for path in output.parent.iterdir()] == ["made"]


def test_R13_what_comes_into_an_empty_output_is_not_lost(pair, cli, monkeypatch):
    pair.output.mkdir()
    put_index = run.write_new

    def late(path, pieces):
        put_index(path, pieces)
        (pair.output / "mine").write_text("mine")

    monkeypatch.setattr(run, "write_new", late)
    outcome = cli(*pair.command)
    assert outcome.code == 5
    assert [path.name for path in pair.output.iterdir()] == ["mine"]


@pytest.mark.parametrize("moment", [BETWEEN_THE_RENAMES, REMOVING_THE_OLD], ids=["between", "end"])
def test_R13_a_kill_while_an_empty_folder_is_replaced(moment, pair, cli):
    pair.output.mkdir()
    if moment is REMOVING_THE_OLD:
        moment = moment.replace("unlink", "rmdir")
    killed(moment, pair.command)
    outcome = cli(*pair.command)
    assert outcome.code == (0 if moment is BETWEEN_THE_RENAMES else 5), outcome.err
    assert (pair.output / "streamshard.json").exists()
    assert alone(pair)


@pytest.mark.parametrize(
    ("base", "output", "named"),
    [(".", None, "base-merged"), (".", "out", "out"), ("..", None, "base-merged")],
)
def test_an_input_that_is_a_dot_is_named(base, output, named, pair, cli, monkeypatch):
    """Part 4: `--base .` named ".."."""
    here = pair.base if base == "." else pair.base / "inner"
    here.mkdir(exist_ok=True)
    monkeypatch.chdir(here)
    where = [] if output is None else ["--output", output]
    outcome = cli("merge-lora", "--base", base, "--adapter", pair.adapter, *where)
    assert outcome.code == 5
    assert outcome.err.startswith(f"error: {named}: is, or lies inside, the input '{base}' (")
    assert f"({pair.base})." in outcome.err


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
