"""Which tensor goes into which file, and that its header is known before any byte of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from streamshard.checkpoint.folder import Checkpoint
from streamshard.checkpoint.header import parse_header
from streamshard.checkpoint.shards import (
    index_pieces,
    numbered_anew,
    plan_shards,
    shard_names,
)
from streamshard.tensors.constructors import cast
from streamshard.tensors.joined import concat
from streamshard.tensors.lazy import Array, Stored


def array(*shape: int, dtype: str = "BF16") -> Array:
    nbytes = int(np.prod(shape)) * {"BF16": 2, "F32": 4}[dtype]
    return Array(np.zeros(nbytes, np.uint8), shape, dtype)


def stored(file: str, rows: int = 2) -> Stored:
    return Stored(f"/folder/{file}", 100, (rows, 3), "BF16", 1000)


def checkpoint(*files: str) -> Checkpoint:
    return Checkpoint(Path("/folder"), {}, {file: {} for file in files}, None, {})


def test_a_tensor_stays_in_the_file_of_its_first_byte():
    tensors = {
        "plain": stored("a.safetensors"),
        "joined": concat([stored("b.safetensors"), stored("a.safetensors")]),
        "cast": cast(stored("b.safetensors"), "F32"),
    }
    source = checkpoint("a.safetensors", "b.safetensors")
    assert shard_names(tensors, source) == {
        "plain": "a.safetensors",
        "joined": "b.safetensors",
        "cast": "b.safetensors",
    }


def test_files_get_new_numbers_if_one_is_empty():
    names = {"x": "model-00001-of-00003.safetensors", "y": "model-00003-of-00003.safetensors"}
    assert numbered_anew(names, 2) == names
    assert numbered_anew(names, 3) == {
        "x": "model-00001-of-00002.safetensors",
        "y": "model-00002-of-00002.safetensors",
    }


def test_one_file_is_called_as_loaders_look_for_it():
    tensors = {"b": array(2), "a": array(2)}
    shard_of = dict.fromkeys(tensors, "model-00001-of-00001.safetensors")
    metadata = {"model-00001-of-00001.safetensors": {"kept": "x"}}
    (shard,) = plan_shards(tensors, shard_of=shard_of, metadata=metadata, max_shard_size=None)
    assert shard.name == "model.safetensors"
    assert shard.metadata == {"format": "pt", "kept": "x"}
    assert list(shard.tensors) == ["a", "b"]


@pytest.mark.parametrize("limit", [None, 30])
def test_headers_are_those_of_the_files_to_be(limit):
    tensors = {f"t{i}": array(2, 3, dtype=("F32", "BF16")[i % 2]) for i in range(6)}
    shard_of = {name: f"file{i % 2}.safetensors" for i, name in enumerate(tensors)}
    shards = plan_shards(tensors, shard_of=shard_of, metadata={}, max_shard_size=limit)
    assert len(shards) > 1
    for shard in shards:
        header, begins = shard.header()
        assert len(header) == shard.header_nbytes
        parsed = parse_header(Path(shard.name), header[8:], shard.nbytes)
        assert {name: found.offset for name, found in parsed.tensors.items()} == begins
        assert list(parsed.tensors) == list(shard.tensors) == list(begins)
    assert {name for shard in shards for name in shard.tensors} == set(tensors)


def test_the_index_lists_every_tensor():
    tensors = {"b": array(2, 5), "a": array(3, dtype="F32")}
    shard_of = {"b": "one.safetensors", "a": "two.safetensors"}
    shards = plan_shards(tensors, shard_of=shard_of, metadata={}, max_shard_size=None)
    index = json.loads(b"".join(index_pieces(shards)))
    assert index == {
        "metadata": {"total_parameters": 13, "total_size": 32},
        "weight_map": {"a": "two.safetensors", "b": "one.safetensors"},
    }
