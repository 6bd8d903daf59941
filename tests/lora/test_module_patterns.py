"""Patterns of module names: what Python's own matcher says, in time that no pattern blows up."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamshard.lora.module_patterns import (
    check_pattern,
    first_match,
    first_match_before_015,
    full_match,
)

pieces = st.sampled_from(
    [
        "a",
        "b",
        "ab",
        ".",
        r"\.",
        "_",
        "-",
        "[ab]",
        "[^a]",
        "[a-c_]",
        r"\d",
        r"\w",
        "1",
        "[0-1]",
        "[^3-4]",
        "^",
        "$",
        "\n",
    ]
)
patterns = st.recursive(
    pieces,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4).map("".join),
        st.lists(inner, max_size=3).map(lambda choices: f"({'|'.join(choices)})"),
        st.tuples(inner, inner).map("|".join),
        st.tuples(
            st.one_of(pieces, inner.map("(?:{})".format)),
            st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,2}", "{,2}", "{2,}", "{0}"]),
        ).map("".join),
    ),
    max_leaves=8,
)
modules = st.text("ab.123_\nA", max_size=12)


@settings(max_examples=3000)
@given(patterns, modules)
@example("^a", "b.a")
@example("a|b$", "b.axx")
@example("a$", "b.a\n")
@example("(a|b){2,}", ".abab")
@example("(a|)*b", "aab")
@example("(?:a|b.){0}", "")
def test_the_same_as_python(pattern, module):
    try:
        check_pattern(pattern)
    except ValueError as error:
        refusals = ["no valid pattern", "itself repeats", "not matched here"]
        assert any(said in str(error) for said in refusals)  # noqa: PT017
        return
    now = re.match(rf"(.*\.)?({pattern})$", module)
    before = re.match(rf".*\.{pattern}$", module)
    assert (first_match([pattern], module) is not None) == (now is not None)
    assert (first_match_before_015([pattern], module) is not None) == (before is not None)
    for name in (module, module.replace("2", "1"), module.replace("1", "2")):
        assert full_match(pattern, name) is (re.fullmatch(pattern, name) is not None)


MODULE = "base.language_model.model.layers.10.self_attn.q_proj"


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [
        ("q_proj", True),
        ("proj", False),
        ("self_attn.q_proj", True),
        (r"layers\.1\d\..*", True),
        (r".*\.layers\.(?:[0-9]|1[0-5])\.self_attn\.(q|k|v)_proj", True),
        (r"^language_model.*", False),
        (r"^base\..*q_proj$", True),
        ("q_proj|k_proj", True),
        (r"layers\.\d{3}\..*", False),
        (MODULE, True),
    ],
)
def test_what_people_write(pattern, fits):
    check_pattern(pattern)
    assert (first_match(["nothing", pattern], MODULE) == pattern) is fits
    assert (re.match(rf"(.*\.)?({pattern})$", MODULE) is not None) is fits


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("q_(proj", "no valid pattern"),
        ("*", "no valid pattern"),
        ("(a+)+$", "itself repeats"),
        ("(a*)*b", "itself repeats"),
        ("((a|b{2,9})?c){5}", "itself repeats"),
        (r"(a)\1", "not matched here"),
        ("(?=a)a", "not matched here"),
        ("(?!lm_head).*", "not matched here"),
        ("(?P<x>a)", "not matched here"),
        (r"\bq_proj", "not matched here"),
        ("a{1001}", "more than 1,000 times"),
        ("a" * 2001, "2,000 is the limit"),
        ("(" * 30 + "a" + ")" * 30, "nested too deeply"),
        ("(" * 9000 + ")" * 9000, "2,000 is the limit"),
    ],
)
def test_what_is_refused(pattern, problem):
    with pytest.raises(ValueError, match=problem):
        check_pattern(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        r"(.*\.)?" * 20 + "x",
        "(a|a)" * 200 + "x",
        "(a|aa)*" * 20 + "x",
        ".*" * 100 + "x",
        "(a?){1000}" + "a" * 900 + "x",
        "a?" * 500 + "a" * 400 + "x",
        "(a|b|ab|ba|aab){1000}x",
    ],
    ids=lambda pattern: pattern[:12],
)
def test_no_pattern_takes_long(pattern):
    """Python's matcher would take years for some; a thousandth of the limit is enough here."""
    check_pattern(pattern)
    for name in ("a" * 1024, "ab." * 340, "." * 1024):
        started = time.thread_time()
        assert first_match([pattern], name) is None
        assert first_match_before_015([pattern], name) is None
        assert time.thread_time() - started < 10


def test_many_plain_patterns_are_fast():
    """A config may have one for each module (EVA): 560 for a model of 80 layers."""
    names = [f"model.layers.{n}.mlp.{m}_proj" for n in range(80) for m in "qkvogud"]
    started = time.thread_time()
    assert [first_match(names, name) for name in names] == names
    assert time.thread_time() - started < 60
