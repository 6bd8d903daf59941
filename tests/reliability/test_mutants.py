"""`bench/mutants.py`: its table fits the code and the tests, and what survives is told."""

from __future__ import annotations

from dataclasses import replace

import mutants
import pytest
from marks import slow
from mutants import SECONDS, NotApplicableError, apply, find_source, find_tests, outcome
from mutations import MUTANTS, Mutant

HARMLESS = Mutant(
    "harmless",
    '"""Threads that share work, ',
    '"""Threads that do work, ',
    "nothing",
    ("test_integers_are_always_finite",),
)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_table_fits_the_code(mutant):
    """If the code has changed: give the mutant the new text, or another of the same meaning."""
    find_source(mutants.ROOT, mutant.old)
    assert find_tests(mutants.ROOT, mutant.tests)
    assert mutant.old != mutant.new
    assert mutant.breaks


def test_names_are_there_once():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@slow
def test_what_survives_is_told(tmp_path):
    good, text = outcome(HARMLESS, tmp_path, SECONDS)
    assert not good
    assert text.startswith("SURVIVES: harmless (workers.py")
    assert [*tmp_path.iterdir()] == []


@slow
def test_what_is_noticed_and_what_has_a_reason(tmp_path):
    (mutant,) = (mutant for mutant in MUTANTS if mutant.name == "verify-finite")
    good, text = outcome(mutant, tmp_path, SECONDS)
    assert good, text
    assert text.startswith("noticed: verify-finite (dtypes.py")
    assert "test_the_count_is_that_of_torch[F8_E4M3]" in text
    good, text = outcome(replace(HARMLESS, reason="nobody reads it"), tmp_path, SECONDS)
    assert good
    assert "as nobody reads it" in text


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"old": "no such text anywhere"}, "0 times"),
        ({"old": "from __future__ import annotations"}, "not once"),
        ({"tests": ("test_that_nobody_wrote",)}, "no test test_that_nobody_wrote"),
    ],
    ids=str,
)
def test_what_does_not_apply_is_told(changed, expected, tmp_path):
    good, text = outcome(replace(HARMLESS, **changed), tmp_path, SECONDS)
    assert not good
    assert text.startswith("does not apply: harmless: ")
    assert expected in text


def test_the_tree_itself_is_never_changed(tmp_path):
    before = find_source(mutants.ROOT, HARMLESS.old).read_bytes()
    mutants.copy_tree(tmp_path)
    changed = apply(HARMLESS, tmp_path)
    assert changed.is_relative_to(tmp_path)
    assert HARMLESS.new in changed.read_text("utf-8")
    assert find_source(mutants.ROOT, HARMLESS.old).read_bytes() == before
    with pytest.raises(NotApplicableError):
        find_source(tmp_path, HARMLESS.old)
