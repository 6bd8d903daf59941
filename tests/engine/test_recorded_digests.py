"""Digests that an output's record keeps."""

from __future__ import annotations

import hashlib
import json

import pytest
import reference
import torch
import xxhash
from interrupted_runs import AFTER_A_SHARD, FIRST, SECOND, killed, report_of

import streamshard


@pytest.mark.parametrize(
    "more", [{}, {"workers": 3}, {"max_shard_size": "5KB"}, {"dtype": "fp32"}], ids=str
)
def test_digests_are_those_of_what_safetensors_loads(more, pair):
    streamshard.merge_lora(base=pair.base, adapter=pair.adapter, output=pair.output, **more)
    digests = report_of(pair.output)["digests"]
    assert digests["algorithm"] == "xxh3-128"
    loaded = reference.read(pair.output)
    assert digests["tensors"] == {
        name: xxhash.xxh3_128_hexdigest(reference.bits(tensor)) for name, tensor in loaded.items()
    }
    there = {p.relative_to(pair.output).as_posix() for p in pair.output.rglob("*") if p.is_file()}
    assert set(digests["files"]) == there - {"streamshard.json"}
    for name, record in digests["files"].items():
        data = (pair.output / name).read_bytes()
        assert record.keys() == {"bytes", "digest"}
        assert record["bytes"] == len(data)
        if name.endswith(".safetensors"):
            end = 8 + int.from_bytes(data[:8], "little")
            header = {k: v for k, v in json.loads(data[8:end]).items() if k != "__metadata__"}
            order = sorted(header, key=lambda tensor: header[tensor]["data_offsets"])
            parts = [bytes.fromhex(digests["tensors"][tensor]) for tensor in order]
            data = data[:end] + b"".join(parts)
        assert record["digest"] == xxhash.xxh3_128_hexdigest(data)


def test_digests_of_empty_tensors(tmp_path):
    base = reference.save_checkpoint(
        tmp_path / "base",
        {"a": torch.zeros(0, 3), "language_model.x.weight": reference.normal((8, 8), 1, seed=1)},
    )
    adapter = reference.save_adapter(
        tmp_path / "adapter",
        {
            "base_model.model.language_model.x.lora_A.weight": reference.normal((2, 8), 1, seed=2),
            "base_model.model.language_model.x.lora_B.weight": reference.normal((8, 2), 1, seed=3),
        },
        r=2,
        lora_alpha=2,
    )
    streamshard.merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    assert report_of(tmp_path / "out")["digests"]["tensors"]["a"] == xxhash.xxh3_128_hexdigest(b"")


@pytest.mark.parametrize("before", [[], ["--sha256"]], ids=["without", "with"])
def test_sha256_also_of_what_was_finished_before(before, pair, cli):
    killed(AFTER_A_SHARD, [*pair.command, "--workers", "1", *before])
    assert cli(*pair.command, "--sha256").code == 0
    report = report_of(pair.output)
    assert report["resumed"] == 1
    for name, record in report["digests"]["files"].items():
        assert record["sha256"] == hashlib.sha256((pair.output / name).read_bytes()).hexdigest()
    assert set(report["digests"]["files"]) >= {FIRST, SECOND, "config.json"}
