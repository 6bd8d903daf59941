"""Power is lost at every point of a run: `bench/powerloss.py`, and whether it would notice."""

from __future__ import annotations

import powerloss
import pytest
import scenarios as runs
from forgetful_disk import Disk, Inode, Step, written
from marks import slow
from powerloss import examine, record, shown, states

from streamshard.disk import folders, new_files
from streamshard.disk.system import system
from streamshard.engine import staging, staging_folder

pytestmark = slow


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory: pytest.TempPathFactory) -> dict[str, runs.Scenario]:
    return runs.scenarios(tmp_path_factory.mktemp("power"))


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("merge-lora", 150),
        ("merge-lora --overwrite", 250),
        ("merge-lora, resumed", 100),
        ("merge-lora, direct", 150),
    ],
)
def test_no_state_shows_what_is_not_complete(name, least, scenarios):
    steps, count, wrong = examine(scenarios[name], step=3)
    assert wrong == []
    assert steps > 50
    assert count > least


def problems(scenario: runs.Scenario) -> set[str | None]:
    start, steps = record(scenario)
    return {shown(scenario, tree) for _, tree in states(start, steps)}


def test_what_a_run_begins_and_ends_with(scenarios):
    scenario = scenarios["merge-lora --overwrite"]
    start, steps = record(scenario)
    disk = Disk(start)
    (first,) = disk.states()
    assert runs.digests(powerloss.inside(first, "place/merged")) == scenario.old
    for step in steps:
        disk.apply(step)
    trees = list(disk.states())
    for tree in trees:
        assert runs.digests(powerloss.inside(tree, "place/merged")) == scenario.expected
    # The lock may come back; it holds nothing any more.
    assert {path for tree in trees for path in tree if path.startswith("place/.")} == {
        "place/.merged.lock"
    }


# --- without a sync, something wrong would show ---------------------------------------------------


def test_weights_that_are_not_synced(scenarios, monkeypatch):
    monkeypatch.setattr(new_files.OutputFile, "sync", lambda _: None)
    assert "neither old nor complete" in problems(scenarios["merge-lora"])
    assert "neither old nor complete" in problems(scenarios["merge-lora --overwrite"])


def test_names_that_are_not_synced_before_the_rename(scenarios, monkeypatch):
    for module in (staging, staging_folder):
        monkeypatch.setattr(module, "sync_folder", lambda _: None)
    assert "neither old nor complete" in problems(scenarios["merge-lora"])


def test_a_rename_that_is_not_synced_before_the_old_output_is_removed(scenarios, monkeypatch):
    scenario = scenarios["merge-lora --overwrite"]
    sync = folders.sync_folder
    place = scenario.output.parent
    monkeypatch.setattr(staging, "sync_folder", lambda path: None if path == place else sync(path))
    assert problems(scenario) & {"the old output is lost", "neither old nor complete"}


def test_an_output_that_is_written_through(scenarios, monkeypatch):
    """As if the new output were put into the old one's folder."""
    scenario = scenarios["merge-lora --overwrite"]
    start, steps = record(scenario)
    (inode,) = {n for n, path in enumerate(sorted(start), 1) if path == "place/merged/config.json"}
    torn = [Step("write", inode, data=b"x"), *steps]
    assert "neither old nor complete" in {shown(scenario, tree) for _, tree in states(start, torn)}


def test_how_many_syncs_are_missed(scenarios):
    count, unseen = powerloss.unnoticed(scenarios["merge-lora"])
    assert count > 15
    assert 5 < count - len(unseen) < count


# --- the disk itself ------------------------------------------------------------------------------


def test_a_disk_of_one_file():
    """The states of a file that is made, written in two sectors, synced, and given its name."""
    disk = Disk({})
    content = bytes([1] * 512 + [2] * 512)
    made = [
        Step("new", 1, offset=0),
        Step("names", 0, (("a", 1),)),
        Step("write", 1, data=content),
    ]
    for step in made:
        disk.apply(step)
    found = list(disk.states())
    assert {} in found
    shapes = {tree["a"] for tree in found if tree}
    half, other = content[:512] + bytes(512), bytes(512) + content[512:]
    assert shapes == {b"", bytes(1024), content, half, other}
    disk.apply(Step("sync", 1))
    assert {tree["a"] for tree in disk.states() if tree} == {content}
    assert {} in list(disk.states()), "its name is not synced yet"
    disk.apply(Step("names", 0, (("a", None), ("b", 1))))
    assert {tuple(tree) for tree in disk.states()} == {(), ("a",), ("b",)}
    disk.apply(Step("sync", 0))
    assert list(disk.states()) == [{"b": content}]


def test_what_was_synced_before_is_kept():
    inode = Inode(folder=False, data=b"old", pending=[Step("write", 0, data=b"new!", offset=3)])
    assert written(inode, "missing") == b"old"
    assert written(inode, "zeros") == b"old\0\0\0\0"
    assert written(inode, "there") == b"oldnew!"


def test_the_recorder_leaves_nothing_behind(scenarios):
    before = vars(system).copy()
    record(scenarios["merge-lora"])
    assert vars(system) == before
