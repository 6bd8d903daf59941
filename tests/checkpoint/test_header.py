"""Headers against the written rules of the format, the official reader and the official writer."""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from headers import entry, file, ours_alone
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from streamshard.checkpoint import header
from streamshard.checkpoint.header import read_header
from streamshard.errors import InputError
from streamshard.tensors.dtypes import DTYPE_BITS


def joined(*pairs: tuple[str, Any]) -> str:
    """JSON of an object in which a key may occur more than once."""
    return "{" + ",".join(f"{json.dumps(k)}:{json.dumps(v)}" for k, v in pairs) + "}"


PLAIN = json.dumps({"a": entry()}, separators=(",", ":"))
RAW = '{"a":{"dtype":"F32","shape":%s,"data_offsets":%s}}'


@dataclass(frozen=True)
class Case:
    """A file, whether safetensors takes it, and what our refusal says (None: we take it too)."""

    name: str
    content: bytes
    official: bool
    message: str | None


CASES = [
    # length
    Case("empty", b"", official=False, message="at least 8"),
    Case("7-bytes", bytes(7), official=False, message="at least 8"),
    Case("no-header", bytes(8), official=False, message="does not begin"),
    Case("length-over-cap", file(PLAIN, length=100_000_001), official=False, message="limit"),
    Case("length-2**63", file(PLAIN, length=2**63), official=False, message="limit"),
    Case("length-2**64-1", file(PLAIN, length=2**64 - 1), official=False, message="limit"),
    Case("length-to-end", file(PLAIN, length=len(PLAIN) + 8), official=False, message="JSON|end"),
    Case("length-past-end", file(PLAIN, length=len(PLAIN) + 9), official=False, message="claims"),
    Case("length-short", file(PLAIN, length=len(PLAIN) - 1), official=False, message="JSON"),
    Case("big-endian", struct.pack(">Q", len(PLAIN)) + PLAIN.encode() + bytes(8),
         official=False, message="limit"),
    # text
    Case("plain", file(PLAIN), official=True, message=None),
    Case("not-utf-8", file(PLAIN.replace("a", "\0", 1).encode().replace(b"\0", b"\xff")),
         official=False, message="UTF-8"),
    Case("overlong-utf-8", file(PLAIN.encode().replace(b'"a"', b'"\xc0\x80"')),
         official=False, message="UTF-8"),
    Case("encoded-surrogate", file(PLAIN.replace("a", "\ud800", 1)),
         official=False, message="UTF-8"),
    Case("leading-space", file(" " + PLAIN), official=True, message="does not begin"),
    Case("leading-newline", file("\n" + PLAIN), official=True, message="does not begin"),
    Case("bom", file("\ufeff" + PLAIN), official=False, message="does not begin"),
    Case("list", file([]), official=False, message="does not begin"),
    Case("string", file('"a"', 0), official=False, message="does not begin"),
    Case("null", file("null", 0), official=False, message="does not begin"),
    Case("trailing-spaces", file(PLAIN + "   "), official=True, message=None),
    Case("not-padded", file(PLAIN + " " * (9 - len(PLAIN) % 8)), official=True, message=None),
    Case("trailing-newline", file(PLAIN + "\n"), official=True, message="does not end"),
    Case("trailing-tab", file(PLAIN + "\t"), official=True, message="does not end"),
    Case("newline-then-space", file(PLAIN + "\n "), official=True, message="does not end"),
    Case("trailing-nul", file(PLAIN + "\0"), official=False, message="does not end"),
    Case("two-objects", file(PLAIN + PLAIN), official=False, message="JSON"),
    Case("unclosed", file(PLAIN[:-1]), official=False, message="JSON"),
    Case("single-quotes", file(PLAIN.replace('"', "'")), official=False, message="JSON"),
    Case("trailing-comma", file(PLAIN[:-1] + ",}"), official=False, message="JSON"),
    Case("comment", file("{/**/" + PLAIN[1:]), official=False, message="JSON"),
    Case("nan", file(RAW % ("[NaN]", "[0,8]")), official=False, message="NaN"),
    Case("deep", file('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"),
         official=False, message="'a' must have"),
    Case("deep-entry", file(RAW % ("[" * 2000 + "]" * 2000, "[0,8]")),
         official=False, message="nested"),
    Case("inner-spaces", file(json.dumps({"a": entry()}, indent=2)), official=True, message=None),
    # entries
    Case("no-tensors", file("{}", 0), official=True, message=None),
    Case("no-dtype", file({"a": {"shape": [2], "data_offsets": [0, 8]}}),
         official=False, message="'a' must have"),
    Case("no-shape", file({"a": {"dtype": "F32", "data_offsets": [0, 8]}}),
         official=False, message="'a' must have"),
    Case("no-offsets", file({"a": {"dtype": "F32", "shape": [2]}}),
         official=False, message="'a' must have"),
    Case("extra-field", file({"a": entry(name="a")}), official=True, message="'a' must have"),
    Case("entry-list", file({"a": [1]}), official=False, message="'a' must have"),
    Case("entry-null", file({"a": None}), official=False, message="'a' must have"),
    Case("entry-string", file({"a": "F32"}), official=False, message="'a' must have"),
    Case("twice-equal", file(joined(("a", entry()), ("a", entry()))),
         official=True, message="'a' occurs twice"),
    Case("twice-other-dtype", file(joined(("a", entry()), ("a", entry("I32")))),
         official=True, message="'a' occurs twice"),
    Case("twice-apart", file(joined(("a", entry()), ("a", entry(offsets=(8, 16)))), 16),
         official=False, message="'a' occurs twice"),
    Case("field-twice", file(PLAIN.replace('"shape":', '"dtype":"F32","shape":')),
         official=False, message="'dtype' occurs twice"),
    # metadata
    Case("metadata", file({"__metadata__": {"format": "pt"}, "a": entry()}),
         official=True, message=None),
    Case("metadata-empty", file({"__metadata__": {}, "a": entry()}), official=True, message=None),
    Case("metadata-null", file({"__metadata__": None, "a": entry()}), official=True, message=None),
    Case("metadata-alone", file({"__metadata__": {"a": "b"}}, 0), official=True, message=None),
    Case("metadata-number", file({"__metadata__": {"n": 1}, "a": entry()}),
         official=False, message="__metadata__"),
    Case("metadata-nested", file({"__metadata__": {"n": {}}, "a": entry()}),
         official=False, message="__metadata__"),
    Case("metadata-list", file({"__metadata__": [], "a": entry()}),
         official=False, message="__metadata__"),
    Case("metadata-twice", file(joined(("__metadata__", {}), ("__metadata__", {}), ("a", entry()))),
         official=False, message="'__metadata__' occurs twice"),
    Case("metadata-is-tensor", file({"__metadata__": entry()}),
         official=False, message="__metadata__"),
    # dtype
    Case("dtype-unknown", file({"a": entry("F31")}), official=False, message="dtype 'F31'"),
    Case("dtype-lower", file({"a": entry("f32")}), official=False, message="dtype 'f32'"),
    Case("dtype-space", file({"a": entry("F32 ")}), official=False, message="dtype"),
    Case("dtype-null", file({"a": entry(None)}), official=False, message="dtype"),
    Case("dtype-number", file({"a": entry(1)}), official=False, message="dtype"),
    Case("dtype-list", file({"a": entry(["F32"])}), official=False, message="dtype"),
    # shape
    Case("shape-negative", file({"a": entry(shape=[-2])}), official=False, message="minus"),
    Case("shape-two-negatives", file({"a": entry(shape=[-1, -2])}),
         official=False, message="minus"),
    Case("shape-float", file({"a": entry(shape=[2.0])}), official=False, message="shape"),
    Case("shape-exponent", file(RAW % ("[2e0]", "[0,8]")), official=False, message="shape"),
    Case("shape-minus-zero", file(RAW % ("[-0]", "[0,0]"), 0), official=False, message="minus"),
    Case("shape-string", file({"a": entry(shape=["2"])}), official=False, message="shape"),
    Case("shape-bool", file({"a": entry(shape=[True], offsets=(0, 4))}, 4),
         official=False, message="shape"),
    Case("shape-null", file({"a": entry(shape=None)}), official=False, message="shape"),
    Case("shape-number", file({"a": entry(shape=2)}), official=False, message="shape"),
    Case("shape-nested", file({"a": entry(shape=[[2]])}), official=False, message="shape"),
    Case("shape-2**64", file({"a": entry(shape=[2**64, 0], offsets=(0, 0))}, 0),
         official=False, message="shape"),
    Case("shape-huge-digits", file(RAW % (f"[{'9' * 6000}]", "[0,8]")),
         official=False, message="JSON|must have"),
    Case("shape-overflow", file({"a": entry(shape=[2**32, 2**32])}),
         official=False, message="overflow"),
    Case("shape-overflow-on-the-way", file({"a": entry(shape=[2**63, 2, 0], offsets=(0, 0))}, 0),
         official=False, message="overflow"),
    Case("bits-overflow", file({"a": entry(shape=[2**60])}), official=False, message="bits"),
    Case("rank-64", file({"a": entry(shape=[1] * 63 + [2])}), official=True, message=None),
    Case("rank-65", file({"a": entry(shape=[1] * 64 + [2])}), official=True, message="dimensions"),
    Case("half-a-byte", file({"a": entry("F4", [3], (0, 2))}, 2), official=False, message="bits"),
    Case("six-bits", file({"a": entry("F6_E2M3", [2], (0, 2))}, 2),
         official=False, message="bits"),
    Case("four-times-six-bits", file({"a": entry("F6_E2M3", [4], (0, 3))}, 3),
         official=True, message=None),
    # offsets
    Case("offsets-long", file({"a": entry(offsets=(0, 9))}, 9), official=False, message="8 bytes"),
    Case("offsets-short", file({"a": entry(offsets=(0, 7))}, 7), official=False, message="8 bytes"),
    Case("offsets-three", file({"a": entry(offsets=(0, 8, 8))}), official=False, message="offsets"),
    Case("offsets-one", file({"a": entry(offsets=(8,))}), official=False, message="offsets"),
    Case("offsets-negative", file({"a": entry(offsets=(-8, 0))}),
         official=False, message="minus"),
    Case("offsets-float", file({"a": entry(offsets=(0, 8.0))}), official=False, message="offsets"),
    Case("offsets-string", file({"a": entry(offsets=("0", "8"))}),
         official=False, message="offsets"),
    Case("offsets-null", file({"a": entry(offsets=None)}), official=False, message="offsets"),
    Case("offsets-object", file({"a": entry(offsets={"0": 8})}), official=False, message="offsets"),
    Case("offsets-2**64", file({"a": entry(offsets=(2**64, 2**64 + 8))}),
         official=False, message="offsets"),
    Case("offsets-backwards", file({"a": entry(offsets=(8, 0))}), official=False, message="bytes"),
    Case("hole-first", file({"a": entry(offsets=(8, 16))}, 16), official=False, message="hole"),
    Case("hole-between", file({"a": entry(), "b": entry(offsets=(9, 17))}, 17),
         official=False, message="'b' leaves a hole"),
    Case("overlap", file({"a": entry(), "b": entry(offsets=(4, 12))}, 12),
         official=False, message="'b' overlaps"),
    Case("shared", file({"a": entry(), "b": entry()}), official=False, message="'b' overlaps"),
    Case("one-byte-more", file(PLAIN, 9), official=False, message="appended"),
    Case("one-byte-less", file(PLAIN, 7), official=False, message="truncated"),
    Case("no-data", file(PLAIN, 0), official=False, message="truncated"),
    Case("polyglot", file(PLAIN, bytes(8) + b"PK\x05\x06" + bytes(18)),
         official=False, message="appended"),
    Case("header-backwards", file({"b": entry(offsets=(8, 16)), "a": entry()}, 16),
         official=True, message=None),
    Case("misaligned", file({"a": entry("U8", [1], (0, 1)), "b": entry(offsets=(1, 9))}, 9),
         official=True, message=None),
    Case("scalar", file({"a": entry(shape=[], offsets=(0, 4))}, 4), official=True, message=None),
    Case("zero-size", file({"a": entry(shape=[3, 0], offsets=(0, 0)), "b": entry()}),
         official=True, message=None),
    Case("zero-size-last", file({"a": entry(), "z": entry(shape=[0], offsets=(8, 8))}),
         official=True, message=None),
    Case("zero-size-in-hole", file({"a": entry(), "z": entry(shape=[0], offsets=(4, 4))}),
         official=False, message="overlap|hole"),
    # names
    Case("name-empty", file({"": entry()}), official=True, message=None),
    Case("name-path", file({"../../x": entry()}), official=True, message=None),
    Case("name-nul", file({"a\0b": entry()}), official=True, message=None),
    Case("name-lone-surrogate", file(PLAIN.replace('"a"', '"\\ud800"')),
         official=False, message="surrogate"),
    Case("name-surrogate-pair", file(PLAIN.replace('"a"', '"\\ud83d\\ude00"')),
         official=True, message=None),
    Case("name-surrogates-reversed", file(PLAIN.replace('"a"', '"\\ude00\\ud83d"')),
         official=False, message="surrogate"),
    Case("name-escaped", file(PLAIN.replace('"a"', '"\\u0061\\/\\n\\""')), official=True, message=None),
    Case("name-bad-escape", file(PLAIN.replace('"a"', '"\\x61"')), official=False, message="JSON"),
    Case("name-short-escape", file(PLAIN.replace('"a"', '"\\u61"')), official=False, message="JSON"),
    Case("name-raw-newline", file(PLAIN.replace('"a"', '"\n"')), official=False, message="JSON"),
    Case("name-raw-delete", file(PLAIN.replace('"a"', '"\x7f"')), official=True, message=None),
    Case("name-escaped-twin", file(joined(("a", entry()))[:-1] + "," + PLAIN[1:].replace(
         '"a"', '"\\u0061"')), official=True, message="'a' occurs twice"),
    Case("name-with-braces", file({'}"{[': entry()}), official=True, message=None),
    Case("name-escaped-metadata", file('{"\\u005f_metadata__":{"a":"b"},' + PLAIN[1:]),
         official=True, message=None),
    Case("name-escaped-second-metadata",
         file('{"\\u005f_metadata__":{},"__metadata__":{},' + PLAIN[1:]),
         official=False, message="occurs twice"),
    Case("name-1024", file({"a" * 1024: entry()}), official=True, message=None),
    Case("name-1025", file({"a" * 1025: entry()}), official=True, message="1,024"),
    Case("name-10-MB", file({"a" * 10**7: entry()}), official=True, message="too long"),
    Case("name-escapes", file({"\n" * 512: entry()}), official=True, message=None),
    Case("name-many-escapes", file({"\n" * 10**6: entry()}), official=True, message="too long"),
    # more of metadata, text and numbers
    Case("metadata-with-braces", file({"__metadata__": {"}": '{"\\'}, "a": entry()}),
         official=True, message=None),
    Case("metadata-last", file({"a": entry(), "__metadata__": {"format": "pt"}}),
         official=True, message=None),
    Case("metadata-key-twice", file('{"__metadata__":{"a":"b","a":"c"},' + PLAIN[1:]),
         official=True, message="'a' occurs twice"),
    Case("metadata-lone-surrogate", file('{"__metadata__":{"a":"\\udc00"},' + PLAIN[1:]),
         official=False, message="surrogate"),
    Case("metadata-not-utf-8", file(b'{"__metadata__":{"a":"\xff"},' + PLAIN[1:].encode()),
         official=False, message="surrogate"),
    Case("metadata-value-null", file({"__metadata__": {"a": None}, "b": entry()}),
         official=False, message="__metadata__"),
    Case("metadata-string", file({"__metadata__": "a", "b": entry()}),
         official=False, message="__metadata__"),
    Case("metadata-under-1-MB", file({"__metadata__": {"a": "ä" * 166_000}, "b": entry()}),
         official=True, message=None),
    Case("metadata-over-1-MB", file({"__metadata__": {"a": "b" * 10**6}, "b": entry()}),
         official=True, message="JSON"),
    Case("metadata-deep", file('{"__metadata__":' + '{"a":' * 10**5 + "}" * 10**5 + "}"),
         official=False, message="nested"),
    Case("no-break-space", file(PLAIN.replace(":", ":\xa0", 1)), official=False, message="must have"),
    Case("form-feed", file(PLAIN.replace(":", "\f:", 1)), official=False, message="JSON"),
    Case("empty-spaced", file("{ \n\t\r}", 0), official=True, message=None),
    Case("leading-comma", file("{," + PLAIN[1:]), official=False, message="JSON"),
    Case("no-comma", file(PLAIN[:-1] + PLAIN[1:]), official=False, message="JSON"),
    Case("no-name", file('{:{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'),
         official=False, message="JSON"),
    Case("leading-zero", file(RAW % ("[02]", "[0,8]")), official=False, message="JSON"),
    Case("plus", file(RAW % ("[+2]", "[0,8]")), official=False, message="JSON"),
    Case("underscore", file(RAW % ("[1_0]", "[0,40]"), 40), official=False, message="JSON"),
    Case("hexadecimal", file(RAW % ("[0x2]", "[0,8]")), official=False, message="JSON"),
    Case("arabic-digit", file(RAW % ("[\u0662]", "[0,8]")), official=False, message="JSON"),
    Case("infinity", file(RAW % ("[Infinity]", "[0,8]")), official=False, message="Infinity"),
    Case("exponent-overflow", file(RAW % ("[1e999]", "[0,8]")), official=False, message="1e999"),
    Case("offsets-minus-zero", file(RAW % ("[2]", "[-0,8]")), official=False, message="minus"),
    Case("dtype-escaped", file(PLAIN.replace("F32", "\\u004632")), official=True, message=None),
    Case("field-escaped", file(PLAIN.replace("shape", "sh\\u0061pe")), official=True, message=None),
    Case("field-extra-empty", file({"a": entry(**{"": 0})}), official=True, message="must have"),
    Case("shape-10-MB", file(RAW % (f"[{'1,' * 5_000_000}2]", "[0,8]")),
         official=True, message="must have"),
    Case("spaces-10-MB", file(PLAIN[:-1] + " " * 10**7 + "}"), official=True, message=None),
    Case("padding-10-MB", file(PLAIN + " " * 10**7), official=True, message=None),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rules(case, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(case.content)
    official = None
    try:
        with safe_open(path, framework="np") as opened:
            official = {n: opened.get_slice(n) for n in opened.keys()}  # noqa: SIM118
            official = {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in official.items()}
    except SafetensorError:
        pass
    assert (official is not None) == case.official
    if case.message is not None:
        for judge in (read_header, ours_alone):
            with pytest.raises(InputError) as raised:
                judge(path)
            said = str(raised.value)
            assert str(path) in said
            assert re.search(case.message, said.replace(str(path), "")), said  # has the case's name
            assert said.isprintable()
            assert len(said) < 1000
        return
    tensors = read_header(path).tensors
    assert {n: (t.dtype, t.shape) for n, t in tensors.items()} == official
    reached = 8 + int.from_bytes(case.content[:8], "little")
    for tensor in tensors.values():
        assert (tensor.path, tensor.file_nbytes) == (str(path), len(case.content))
        assert tensor.offset == reached
        reached += tensor.nbytes
    assert reached == len(case.content)


def test_the_table_has_both_kinds():
    assert sum(case.message is None for case in CASES) > 15
    stricter = [case.name for case in CASES if case.official and case.message is not None]
    assert len(stricter) > 8
    assert all(case.official for case in CASES if case.message is None)


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_of_the_format(dtype, tmp_path):
    path = tmp_path / "x.safetensors"
    nbytes = DTYPE_BITS[dtype]  # of 8 elements
    path.write_bytes(file({"a": entry(dtype, [8], (0, nbytes))}, nbytes))
    with safe_open(path, framework="np") as opened:
        assert opened.get_slice("a").get_dtype() == dtype
    assert read_header(path).tensors["a"].nbytes == nbytes


def test_no_dtype_of_the_format_is_unknown(tmp_path):
    """The official parser lists what it knows when it meets what it does not."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(file({"a": entry("F31")}))
    with pytest.raises(SafetensorError) as raised, safe_open(path, framework="np"):
        pass
    known = set(str(raised.value).split("`")[3::2])
    assert "BF16" in known
    assert known == set(DTYPE_BITS)


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: None], ids=["folder", "missing"])
def test_what_is_no_file(make, tmp_path):
    make(tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"x\.safetensors"):
        read_header(tmp_path / "x.safetensors")


def test_metadata_is_returned(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(file({"__metadata__": {"ä": "\n", "format": "pt"}, "a": entry()}))
    assert read_header(path).metadata == {"ä": "\n", "format": "pt"}


def test_the_official_parser_is_asked_unless_the_official_writer_wrote_it(tmp_path, monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr(header, "_ask_official_parser", lambda path: asked.append(path.name))
    content = {'b"\u00fc': np.zeros((2, 3), np.float32), "a": np.zeros(0, np.float16)}
    save_file(content, tmp_path / "plain", {"format": "pt"})
    save_file({**content, "c": np.zeros(2, bool)}, tmp_path / "bool")
    text = PLAIN.replace(":", ": ")
    (tmp_path / "spaced").write_bytes(file(text))
    for name in ("plain", "bool", "spaced"):
        read_header(tmp_path / name)
    assert asked == ["bool", "spaced"]
