"""Headers against the official reader and writer."""

from __future__ import annotations

import json
import struct
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from headers import entry, file, ours_alone
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from streamshard.checkpoint.header import header_text, read_header
from streamshard.checkpoint.new_header import build_header
from streamshard.errors import InputError, ReadError
from streamshard.tensors.dtypes import DTYPE_BITS
from streamshard.tensors.lazy import Stored

# --- against the official reader ------------------------------------------------------------------


names = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from('"\\/\x00\x1f\x7f\u2028ä😀'),
    max_size=6,
).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=4)
odd_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 20),
    st.sampled_from([2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), 10**30]),
    st.floats(),
    st.sampled_from(["F32", "BF16", "F4", "I64", "__metadata__", "", "0"]),
    st.lists(st.integers(0, 9), max_size=3),
    st.dictionaries(names, st.integers(0, 9), max_size=2),
)


@st.composite
def headers(draw: Any) -> tuple[dict[str, Any], int]:
    """A valid header and the bytes of data that it describes."""
    found: dict[str, Any] = {}
    if draw(st.booleans()):
        found["__metadata__"] = draw(st.dictionaries(names, names, max_size=2))
    end = 0
    for name in draw(st.lists(names, max_size=4, unique=True)):
        dtype, shape = draw(st.sampled_from(list(DTYPE_BITS))), draw(shapes)
        bits = int(np.prod([1, *shape])) * DTYPE_BITS[dtype]
        if bits % 8:
            shape, bits = [], 0
            dtype, shape = "F4", [0]
        found[name] = entry(dtype, shape, [end, end + bits // 8])
        end += bits // 8
    return found, end


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in a JSON value with each of its keys or positions."""
    keys = value if isinstance(value, dict) else range(len(value))
    found = [(value, key) for key in keys]
    for _, key in list(found):
        if isinstance(value[key], (dict, list)):
            found += places(value[key])
    return found


@st.composite
def mutated(draw: Any) -> bytes:
    """A file of which one or several things have been changed."""
    header, end = draw(headers())
    for _ in range(draw(st.integers(0, 2))):
        found = places(header)
        if found:
            holder, key = draw(st.sampled_from(found))
            how = draw(st.sampled_from(["replace", "nudge", "delete", "add"]))
            if how == "replace":
                holder[key] = draw(odd_values)
            elif how == "nudge" and type(holder[key]) is int:
                holder[key] += draw(st.sampled_from([-8, -4, -2, -1, 1, 2, 4, 8]))
            elif how == "delete":
                del holder[key]
            elif isinstance(holder, dict):
                holder[draw(names)] = draw(odd_values)
            else:
                holder.append(draw(odd_values))
    text = bytearray(json.dumps(header, ensure_ascii=draw(st.booleans())).encode())
    text += draw(st.sampled_from([b"", b" ", b"   ", b"\n", b"\0", b"}"]))
    if draw(st.integers(0, 3)) == 0 and text:
        at = draw(st.integers(0, len(text) - 1))
        text[at : at + draw(st.integers(0, 2))] = draw(st.binary(max_size=2))
    data = bytes(max(end + draw(st.sampled_from([0, 0, 0, 0, -1, 1, 4])), 0))
    length = len(text) + draw(st.sampled_from([0, 0, 0, 0, 0, -1, 1, 2**63]))
    return struct.pack("<Q", max(length, 0)) + bytes(text) + data


@pytest.mark.parametrize("judge", [read_header, ours_alone])
@settings(max_examples=400)
@given(content=mutated())
@example(content=file('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8))
def test_never_more_lenient_than_the_official_reader(judge, content):
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as target:
        target.write(content)
        target.flush()
        try:
            header = judge(Path(target.name))
        except (InputError, ReadError):
            return
        with safe_open(target.name, framework="np") as opened:
            assert set(opened.keys()) == set(header.tensors)
            assert (opened.metadata() or {}) == header.metadata
            for name, tensor in header.tensors.items():
                found = opened.get_slice(name)
                assert (found.get_dtype(), tuple(found.get_shape())) == (tensor.dtype, tensor.shape)


@settings(max_examples=200)
@given(headers())
def test_valid_headers_are_accepted(made):
    header, end = made
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as target:
        target.write(file(header, end))
        target.flush()
        found = read_header(Path(target.name))
    assert set(found.tensors) == set(header) - {"__metadata__"}


# --- against the official writer ------------------------------------------------------------------


TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}


@settings(max_examples=400)
@given(
    st.dictionaries(names, st.tuples(st.sampled_from(list(TORCH_DTYPES)), shapes), max_size=8),
    st.sampled_from([{}, {"format": "pt"}, {"ä\n": '"'}]),
)
@example(dict.fromkeys("aAzZ", ("F32", [])) | {n: (n, [2]) for n in TORCH_DTYPES}, {"format": "pt"})
@example({}, {"format": "pt"})
@example({}, {})
def test_headers_are_those_of_save_file(made, metadata):
    tensors = {n: Stored("", 0, tuple(shape), dtype, 0) for n, (dtype, shape) in made.items()}
    content = {
        n: torch.zeros(shape, dtype=TORCH_DTYPES[dtype]) for n, (dtype, shape) in made.items()
    }
    official = safetensors.torch.save(content, metadata or None)
    header, begins = build_header(tensors, metadata)
    assert header == official[: len(header)]
    assert len(official) == len(header) + sum(t.nbytes for t in tensors.values())
    entries = json.loads(header[8:])
    assert begins == {n: len(header) + entries[n]["data_offsets"][0] for n in tensors}


def test_a_header_is_in_memory_once(tmp_path):
    """The largest one that is allowed has 100 MB."""
    text = b"{}" + b" " * 2_000_000
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    tracemalloc.start()
    try:
        assert header_text(tmp_path / "x.safetensors")[0] == text
        assert tracemalloc.get_traced_memory()[1] < 1.5 * len(text)
    finally:
        tracemalloc.stop()
