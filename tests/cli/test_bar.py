"""The line of progress: in every width it fits, and says what cannot be left out."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamshard.cli.bar import State
from streamshard.cli.terminal_text import fitted, shortened, width

NAME = "language_model.model.layers.12.mlp.gate_proj.weight"
MANY = State("converting", 15_890_000_000, 7_150_000_000, 0, 7.0, NAME)
STEPS = ("checking", "merging", "converting", "hashing", "verifying", "comparing", "extracting")


def test_the_line_at_the_usual_widths():
    assert MANY.line(50) == "converting  44%  7.2/15.9 GB 1.02 GB/s  0:09 left"
    assert MANY.line(80) == (
        "converting  44%  ██░░░░   7.2/15.9 GB  1.02 GB/s   0:09 left  …gate_proj.weight"
    )
    assert MANY.line(120, plain=True) == (
        "converting  44%  #######.........   7.2/15.9 GB  1.02 GB/s   0:09 left"
        "  ...model.layers.12.mlp.gate_proj.weight"
    )


@given(
    columns=st.integers(1, 300),
    what=st.sampled_from(STEPS),
    total=st.integers(1, 10**13),
    share=st.floats(0, 1),
    before=st.floats(0, 1),
    seconds=st.floats(0, 10**6),
    name=st.text(st.characters(codec="utf-8", categories=["L", "N", "P"]), max_size=200),
    plain=st.booleans(),
)
def test_it_fits_every_width(columns, what, total, share, before, seconds, name, plain):
    done = int(total * share)
    state = State(what, total, done, int(done * before), seconds, name)
    text = state.line(columns, plain=plain)
    assert width(text) <= max(columns - 1, 1)
    assert "\n" not in text
    if columns >= 55:
        assert text.startswith(what)
    if columns >= 36:
        assert re.search(r"[\d.]+/[\d.]+ [KMGTP]?B", text)
        assert re.search(r"([\d.]+ [KMGTP]?|-- )B/s", text)
        assert re.search(r"\d:\d\d|-:--", text)


@given(st.integers(1, 80), st.text("abc.", max_size=60))
def test_a_name_is_shortened_to_whole_parts(columns, name):
    short = shortened(name, columns)
    assert width(short) <= columns
    if short != name:
        assert short == "" or name.endswith(f".{short.removeprefix('…')}")
        assert short.count(".") >= bool(short)


def test_what_was_done_before_is_no_speed():
    state = State("merging", 100_000_000, 60_000_000, 50_000_000, 10.0)
    assert " 60%" in state.line(80)
    assert "1.00 MB/s" in state.line(80)
    assert "0:40 left" in state.line(80)
    assert replace(state, done=50_000_000, seconds=0).log_line() == (
        "merging: 100 MB, 50.0 MB of that are done"
    )


def test_lines_of_a_log():
    assert replace(MANY, done=0, seconds=0).log_line() == "converting: 15.9 GB"
    assert MANY.log_line() == "converting: 44%, 7.2/15.9 GB, 1.02 GB/s, 0:09 left"
    assert replace(MANY, done=MANY.total).log_line().endswith("15.9/15.9 GB, 2.27 GB/s, in 0:07")


@pytest.mark.parametrize("total", [1, 999, 1000, 999_499, 999_500, 10**6, 99_950_000, 10**15])
def test_sizes_have_three_digits(total):
    (number,) = re.fullmatch(
        r"x: ([\d.]+) [KMGTP]?B", State("x", total, 0, 0, 0).log_line()
    ).groups()
    assert 1 <= len(number.replace(".", "")) <= 3


@given(st.text("ab \n模é", max_size=200), st.integers(1, 60))
def test_text_is_broken_between_words(text, columns):
    broken = fitted(text, columns)
    assert broken.split() == text.split()
    longest = max((width(word) for word in text.split()), default=0)
    indent = max((len(line) - len(line.lstrip(" ")) for line in text.split("\n")), default=0) + 2
    for line in broken.split("\n"):
        assert width(line) <= columns or width(line.strip()) <= longest or " " not in line.strip()
    assert indent >= 2
    assert fitted(text, None) == text
