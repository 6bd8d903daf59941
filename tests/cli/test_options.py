"""Options that make no sense."""

from __future__ import annotations

import os

import pytest


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--weight", "1", "--weight", "2"], "1 --adapter but 2 --weight: give one for each"),
        (["--weight", "nan"], "finite"),
        (["--weight", "inf"], "finite"),
        (["--weight", "x"], "--weight"),
        (["--max-shard-size", "5XB"], "5XB"),
        (["--max-shard-size", "-5GB"], "-5GB"),
        (["--max-shard-size", "0"], "greater than 0"),
        (["--max-shard-size", ""], "--max-shard-size"),
        (["--max-memory", "much"], "--max-memory"),
        (["--max-memory", "1MB"], "--max-memory"),
        (["--workers", "0"], "--workers"),
        (["--workers", "-1"], "--workers"),
        (["--dtype", "fp8"], "--dtype"),
        (["--frobnicate"], "--frobnicate"),
        (["stray"], "stray stands where a training checkpoint does"),
        (["--alpha", "3"], "--alpha"),
        (["--expert-order", "other"], "--expert-order"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options(more, expected, pair, refused):
    refused(2, expected, more=more)


@pytest.mark.parametrize("missing", ["--base", "--adapter"])
def test_missing_options(missing, pair, refused):
    at = pair.command.index(missing)
    refused(2, missing, command=pair.command[:at] + pair.command[at + 2 :])


def test_names_that_are_not_utf_8(pair, cli):
    """A path is bytes: one that is no text must still merge, or be refused."""
    odd = pair.root / os.fsdecode(b"b\xff")
    try:
        pair.base.rename(odd)
    except OSError:
        pytest.skip("the file system takes only text")
    command = [str(odd) if part == str(pair.base) else part for part in pair.command]
    outcome = cli(*command, "--json")
    assert outcome.code in (0, 2, 3), outcome.err
    assert (outcome.code == 0) == pair.output.exists()
