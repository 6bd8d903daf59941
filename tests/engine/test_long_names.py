"""Outputs and weight files with names as long as a disk takes, and longer."""

from __future__ import annotations

import json
import os

import pytest
from foreign_things import (
    state,
)
from interrupted_runs import (
    AFTER_A_SHARD,
    FIRST,
    alone,
    killed,
)

from streamshard.engine import long_names
from streamshard.engine.beside_output import places_beside


@pytest.mark.parametrize("name", ["a" * 255, "a" * 247, "é" * 127, "🦆" * 63, "a" * 246 + "éé"])
def test_names_as_long_as_a_disk_takes(name, pair, cli):
    output = pair.output.parent / name
    command = [*pair.command[:-1], str(output)]
    for path in places_beside(output).values():
        assert len(os.fsencode(path.name)) <= 255
        path.name.encode()
    killed(AFTER_A_SHARD, [*command, "--workers", "1"])
    outcome = cli(*command, "--json")
    assert json.loads(outcome.out)["resumed"] == 1
    assert cli(*command, "--overwrite").code == 0
    assert [path.name for path in output.parent.iterdir()] == [name]


def test_names_beside_names():
    assert long_names.beside(".", "x", ".old") == ".x.old"
    long = [long_names.beside(".", "a" * 250 + end, ".old") for end in "bc"]
    assert len({*long, long_names.beside(".", "a" * 250 + "b", ".partial")}) == 3
    assert all(name.endswith(".old") and name.startswith(".aaa") for name in long)


@pytest.mark.parametrize("characters", [119, 120, 121])
def test_a_weight_file_with_a_long_name(characters, pair, cli):
    name = "é" * characters + ".safetensors"
    assert len(name.encode()) in {250, 252, 254}
    (pair.base / FIRST).rename(pair.base / name)
    index = pair.base / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(FIRST, name))
    outcome = cli(*pair.command)
    assert outcome.code == 0, outcome.err
    assert (pair.output / name).exists()
    assert alone(pair)


@pytest.mark.parametrize("name", ["a" * 256, "é" * 128, "a/" * 2100 + "a"])
def test_names_that_are_longer_than_that(name, pair, cli):
    before = state(pair.root)
    outcome = cli(*pair.command[:-1], str(pair.output.parent / name))
    assert outcome.code == 6
    assert "too long" in outcome.err
    assert "Traceback" not in outcome.err
    assert state(pair.root) == before
