"""Digests of tensors and files, as their page says that they are made."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import xxhash

from streamshard.checkpoint.digests import (
    DIGEST_NBYTES,
    file_digest,
    file_record,
    hash_file,
    new_digest,
    shard_digest,
    tensor_digest,
)
from streamshard.checkpoint.new_header import build_header
from streamshard.disk.files import BLOCK_NBYTES
from streamshard.tensors.joined import concat
from streamshard.tensors.lazy import Array, Stored


@pytest.mark.parametrize("nbytes", [0, 1, 2 * BLOCK_NBYTES, 2 * BLOCK_NBYTES + 7])
def test_a_tensor_has_the_digest_of_its_bytes(nbytes, work, tmp_path):
    data = np.random.default_rng(1).integers(0, 256, nbytes, np.uint8)
    file = tmp_path / "x"
    file.write_bytes(b"before" + data.tobytes() + b"behind")
    stored = Stored(str(file), 6, (nbytes,), "U8", nbytes + 12)
    expected = xxhash.xxh3_128(data.tobytes()).digest()
    assert len(expected) == DIGEST_NBYTES
    assert tensor_digest(stored, work) == expected
    assert tensor_digest(Array(data, (nbytes,), "U8"), work) == expected
    if nbytes > 2:
        parts = concat([stored.take(0, 1), Array(data[1:], (nbytes - 1,), "U8")])
        assert tensor_digest(parts, work) == expected


def test_it_may_be_ended(work):
    calls = []

    def check():
        calls.append(None)
        if len(calls) == 2:
            raise KeyError

    data = np.zeros(5 * BLOCK_NBYTES, np.uint8)
    with pytest.raises(KeyError):
        tensor_digest(Array(data, (data.size,), "U8"), work, check=check)
    assert len(calls) == 2


def test_a_weight_file_has_the_digest_of_header_and_digests(work):
    tensors = {n: Array(np.full(8, i, np.uint8), (4,), "BF16") for i, n in enumerate("ab")}
    header, _ = build_header(tensors, {})
    digests = b"".join(tensor_digest(tensor, work) for tensor in tensors.values())
    assert shard_digest(header, digests) == xxhash.xxh3_128(header + digests).hexdigest()
    assert shard_digest(header, digests) != shard_digest(header, digests[::-1])


@pytest.mark.parametrize("nbytes", [0, 5, BLOCK_NBYTES, 3 * BLOCK_NBYTES + 1])
def test_files(nbytes, tmp_path):
    data = bytes(range(251)) * (nbytes // 251 + 1)
    file, data = tmp_path / "x", data[:nbytes]
    file.write_bytes(data)
    digest = xxhash.xxh3_128(data).hexdigest()
    assert file_digest(file) == digest
    assert file_record(file, sha256=False) == {"bytes": nbytes, "digest": digest}
    sha256 = hashlib.sha256(data).hexdigest()
    assert file_record(file, sha256=True) == {"bytes": nbytes, "digest": digest, "sha256": sha256}
    assert hash_file(file, new_digest(), going=lambda: False) == 0
