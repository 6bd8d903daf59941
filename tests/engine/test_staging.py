"""An output is replaced as a whole."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from interrupted_runs import (
    BETWEEN_THE_RENAMES,
    FIRST,
    REMOVING_THE_OLD,
    alone,
    content,
    failing,
    killed,
)
from pairs import Pair

import streamshard


@pytest.fixture
def old(pair: Pair) -> dict[str, Any]:
    """An older output in the place of the new one."""
    streamshard.merge_lora(base=pair.base, adapter=pair.adapter, output=pair.output, weight=[0.5])
    return content(pair.output)


def test_a_kill_between_the_renames_loses_nothing(pair, old, clean, cli):
    killed(BETWEEN_THE_RENAMES, [*pair.command, "--overwrite"])
    assert not pair.output.exists()
    outcome = cli(*pair.command)
    assert outcome.code == 5
    assert content(pair.output) == old, "the next run puts it back, whatever it does then"
    assert cli(*pair.command, "--overwrite").code == 0
    assert content(pair.output) == clean
    assert alone(pair)


def test_a_kill_while_the_old_output_is_removed(pair, old, clean, cli):
    killed(REMOVING_THE_OLD, [*pair.command, "--overwrite"])
    assert content(pair.output) == clean
    assert pair.output.with_name(".merged.old").exists()
    assert cli(*pair.command).code == 5
    assert content(pair.output) == clean
    assert alone(pair)


def test_what_took_the_place_of_an_old_output_is_not_lost_either(pair, old, clean, cli):
    killed(BETWEEN_THE_RENAMES, [*pair.command, "--overwrite"])
    pair.output.mkdir()
    outcome = cli(*pair.command, "--overwrite")
    assert outcome.code == 5
    assert ".merged.old" in outcome.err
    assert content(pair.output.with_name(".merged.old")) == old


def test_an_old_output_that_cannot_be_removed_is_told(pair, old, clean, cli, monkeypatch):
    failing(monkeypatch, "unlink", OSError(errno.EIO, "broken"), ".merged.old", pair.root)
    outcome = cli(*pair.command, "--overwrite")
    assert outcome.code == 6
    assert "is complete" in outcome.err
    assert content(pair.output) == clean


def test_readers_of_the_old_output_are_not_disturbed(pair, old, cli):
    """It is replaced by rename and never written through."""
    with (pair.output / FIRST).open("rb") as reader:
        assert cli(*pair.command, "--overwrite").code == 0
        assert reader.read() == old[FIRST]
        assert (pair.output / FIRST).read_bytes() != old[FIRST]
