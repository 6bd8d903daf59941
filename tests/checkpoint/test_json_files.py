"""JSON that nobody vouches for, strict and bounded."""

from __future__ import annotations

import json
import time

import pytest
from hostile_json import anything
from hypothesis import given, settings
from reference import INDEX

from streamshard.checkpoint.json_files import MAX_DEPTH, MAX_VALUES, parse_json, read_json_object
from streamshard.errors import InputError


@settings(max_examples=500)
@given(anything)
def test_plain_json_is_read_as_by_python(value):
    text = json.dumps(value).encode("utf-8")
    assert parse_json(text, "x") == json.loads(text)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b'{"a": 1, "a": 1}', "'a' occurs twice"),
        (b'{"x": {"a": 1, "\\u0061": 1}}', "'a' occurs twice"),
        (b"[NaN]", "NaN"),
        (b"[-Infinity]", "Infinity"),
        (b"[1e999]", "1e999"),
        (b"[" + b"9" * 301 + b"]", "301 digits"),
        (b"[" + b"9" * 10**6 + b"]", "digits"),
        (b"[" * 65 + b"]" * 65, "nested too deeply"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'["\\ud800"]', "surrogate"),
        (b'{"\\ud800": 1}', "surrogate"),
        (b'["\xff"]', "UTF-8"),
        (b"\xef\xbb\xbf{}", "JSON"),
        (b"{} {}", "JSON"),
        (b"{'a': 1}", "JSON"),
        (b"[1,]", "JSON"),
        (b'["\n"]', "JSON"),
        (b"[" + b"0," * MAX_VALUES + b"0]", "values"),
        (b"[" + b"[]," * MAX_VALUES + b"0]", "values"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_what_is_no_strict_json(text, problem):
    started = time.thread_time()
    with pytest.raises(InputError, match=problem) as raised:
        parse_json(text, "x")
    assert len(str(raised.value)) < 1000
    assert time.thread_time() - started < 10


def test_limits_of_json_are_reached():
    assert parse_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH, "x")
    assert parse_json(b"[" + b"9" * 300 + b"]", "x") == [int("9" * 300)]
    assert parse_json('["\\ud83d\\ude00", "ä"]'.encode(), "x") == ["😀", "ä"]


def test_a_large_index(tmp_path, pair, refused):
    """One of 4 MB, as 241B has, is read; above 10 MB is not."""
    file = tmp_path / "x.json"
    content = {
        f"model.layers.{n}.mlp.experts.{n}.gate_proj.weight": "x" * 60 for n in range(40_000)
    }
    file.write_text(json.dumps({"weight_map": content}))
    assert file.stat().st_size > 4_000_000
    assert len(read_json_object(file)["weight_map"]) == 40_000
    (pair.base / INDEX).write_bytes(b'{"weight_map":{"a":"' + b"b" * 10**7 + b'"}}')
    refused(3, INDEX, "10,000,000 bytes")
