"""What a run of ours has left goes on, whatever the umask, the folder around or the step."""

from __future__ import annotations

import json
import stat
import subprocess
import sys

import pytest
from foreign_things import (
    Cli,
    lock,
    make_output,
    old,
    state,
)
from interrupted_runs import (
    AFTER_A_SHARD,
    BETWEEN_THE_RENAMES,
    FIRST,
    REMOVING_THE_OLD,
    alone,
    content,
    killed,
)
from pairs import Pair

import streamshard


@pytest.mark.parametrize("umask", [0o002, 0o077, 0o022, 0o000])
def test_any_umask(umask, pair):
    """Killed and continued, with the same one; under 000 all may write everything, as was asked for."""
    line = ["sh", "-c", f'umask {umask:04o}; exec "$@"', "sh", sys.executable, "-m", "streamshard"]
    code = f"import os\nos.umask({umask})\n"
    killed(code + AFTER_A_SHARD, [*pair.command, "--workers", "1"])
    done = subprocess.run([*line, *pair.command, "--json"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["resumed"] == 1
    assert stat.S_IMODE(pair.output.stat().st_mode) == 0o777 & ~umask
    assert stat.S_IMODE((pair.output / FIRST).stat().st_mode) == 0o666 & ~umask
    assert alone(pair)


@pytest.mark.parametrize("mode", [0o1777, 0o2775, 0o777])
def test_any_mode_of_the_folder_around(mode, pair, cli):
    pair.output.parent.chmod(mode)
    killed(AFTER_A_SHARD, [*pair.command, "--workers", "1"])
    assert cli(*pair.command).code == 0
    assert cli(*pair.command, "--overwrite").code == 0
    assert alone(pair)


def test_through_a_folder_that_is_a_link(pair, cli):
    (pair.root / "link").symlink_to(pair.output.parent)
    command = [*pair.command[:-1], str(pair.root / "link" / "merged")]
    killed(AFTER_A_SHARD, [*command, "--workers", "1"])
    assert cli(*command).code == 0
    assert cli(*command, "--overwrite").code == 0
    assert alone(pair)


BEFORE_THE_NOTE = """
from streamshard.engine.lock import Lock
Lock.note = lambda *_: kill()
"""
AFTER_THE_NOTE = """
from streamshard.engine.staging import Staging
Staging.remove_journal = lambda _: kill()
"""
WITHOUT_JOURNAL = """
from streamshard.engine.staging import Staging
remove = Staging.remove_journal
def last(self):
    remove(self)
    kill()
Staging.remove_journal = last
"""
AFTER_THE_RENAMES = """
from streamshard.disk.system import system
rename = system.rename
def last(path, other):
    rename(path, other)
    if str(path).endswith(".partial"):
        kill()
system.rename = last
"""
THE_RECORD_LAST = """
from streamshard.disk.system import system
unlink = system.unlink
def last(path):
    unlink(path)
    if str(path).endswith(".merged.old/streamshard.json"):
        kill()
system.unlink = last
"""
STEPS = [
    BEFORE_THE_NOTE,
    AFTER_THE_NOTE,
    WITHOUT_JOURNAL,
    BETWEEN_THE_RENAMES,
    AFTER_THE_RENAMES,
    REMOVING_THE_OLD,
    THE_RECORD_LAST,
]


@pytest.mark.parametrize("again", [[], ["--overwrite"], ["--overwrite", "--weight", "0.25"]])
@pytest.mark.parametrize("step", range(len(STEPS)))
def test_an_overwrite_that_was_killed_is_finished_or_undone(step, again, pair, cli):
    before = make_output(pair)
    clean = pair.root / "clean"
    streamshard.merge_lora(base=pair.base, adapter=pair.adapter, output=clean)
    killed(STEPS[step], [*pair.command, "--overwrite"])
    left_alone_in_a_dry_run(pair, cli)
    outcome = cli(*pair.command, *again)
    found = content(pair.output)
    if again:
        assert outcome.code == 0, outcome.err
        assert alone(pair)
    else:
        assert outcome.code == 5
        assert found == (before if step < 4 else content(clean))
        assert not old(pair).exists()
    assert cli(*pair.command, "--overwrite", *again).code == 0
    assert alone(pair)


def left_alone_in_a_dry_run(pair: Pair, cli: Cli) -> None:
    before = state(pair.output.parent)
    assert cli(*pair.command, "--overwrite", "--dry-run").code == 0
    assert state(pair.output.parent) == before


@pytest.mark.parametrize("step", [1, 2])
def test_a_kill_right_before_the_only_rename(step, pair, cli):
    killed(STEPS[step], pair.command)
    assert lock(pair).exists()
    assert cli(*pair.command).code == 0
    assert alone(pair)


def test_a_folder_of_a_user_after_a_run_was_killed(pair, cli):
    """The note in the lock is of another folder."""
    make_output(pair)
    killed(BETWEEN_THE_RENAMES, [*pair.command, "--overwrite"])
    old(pair).rename(pair.root / "kept")
    old(pair).mkdir()
    (old(pair) / "mine").write_text("mine")
    before = state(old(pair))
    outcome = cli(*pair.command)
    assert outcome.code == 5
    assert str(old(pair)) in outcome.err
    assert state(old(pair)) == before
    assert not pair.output.exists()


def test_a_file_in_the_old_output_after_a_run_was_killed(pair, cli):
    make_output(pair)
    killed(AFTER_THE_RENAMES, [*pair.command, "--overwrite"])
    (old(pair) / "mine").write_text("mine")
    outcome = cli(*pair.command, "--overwrite")
    assert outcome.code == 5
    assert "'mine'" in outcome.err
    assert (old(pair) / "mine").read_text() == "mine"
