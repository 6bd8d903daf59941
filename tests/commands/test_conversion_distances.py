"""Conversions: distances from the reference."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from folders import (
    OTHER,
    as_custom,
    as_hf,
    assert_same,
    carried,
    convert,
    distances,
    flattened,
    make,
    put,
    without_weights,
)
from models import TINY
from presets import PRESETS, tensor_shapes
from reference import read


def upstream(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> Any:
    """The figures of InternVL's scripts, in their arithmetic."""
    total, count = 0.0, 0
    for name in ours.keys() & theirs.keys():
        if ours[name].shape == theirs[name].shape:
            total += torch.norm(ours[name].float() - theirs[name].float(), p=2).item()
            count += ours[name].numel()
    return total, total / count


REFERENCES: dict[str, dict[str, Any]] = {
    "alike": {},
    "sharded": {"max_shard_size": "20KB"},
    "fp32": {"dtype": "fp32"},
    "fp16": {"dtype": "fp16", "max_shard_size": "50KB"},
    "nested": {"spelling": "nested"},
    "hybrid": {"spelling": "hybrid", "max_shard_size": "50KB"},
    "tied": {"tied": True},
}
CASES = [
    (layout, name)
    for layout in ("custom", "hf")
    for name, how in REFERENCES.items()
    if layout == "hf" or not how.keys() & {"spelling", "tied"}
]


@pytest.mark.parametrize("preset", ["tiny-6b-vit", "tiny-internlm2"])
@pytest.mark.parametrize(("layout", "case"), CASES)
def test_distance_from_the_reference(layout, case, preset, tmp_path):
    source = make(tmp_path / "source", preset, OTHER[layout], max_shard_size="40KB")
    ref = make(tmp_path / "ref", preset, layout, seed=5, **REFERENCES[case])
    report = convert(layout, source, ref, tmp_path / "out")
    ours = carried(read(source), PRESETS[preset], layout)
    theirs = flattened(read(ref), PRESETS[preset], layout)
    expected = distances(ours, theirs)
    assert expected["sum"] > 1
    found = report["l2"]
    for key in ("sum", "per_parameter", "global"):
        assert found[key] == pytest.approx(expected[key], rel=1e-9)
    assert found["compared"] == expected["compared"] == len(ours)
    assert found["skipped"] == []
    assert found["reference"] == str(ref)
    total, average = upstream(ours, theirs)
    assert found["sum"] == pytest.approx(total, rel=1e-5)
    assert found["per_parameter"] == pytest.approx(average, rel=1e-5)
    kept = json.loads((tmp_path / "out" / "streamshard.json").read_text())["l2_per_tensor"]
    assert math.fsum(kept.values()) == pytest.approx(expected["sum"], rel=1e-9)


@pytest.mark.parametrize("spelling", ["flat", "nested"])
@pytest.mark.parametrize("preset", TINY)
def test_no_distance_from_the_same_model(preset, spelling, tmp_path):
    hf = make(tmp_path / "hf", preset, "hf", max_shard_size="50KB", spelling=spelling)
    ref = without_weights(make(tmp_path / "ref", preset, "custom"))
    convert("custom", hf, ref, tmp_path / "custom")
    report = convert("hf", tmp_path / "custom", hf, tmp_path / "back", max_shard_size="30KB")
    l2 = report["l2"]
    assert (l2["sum"], l2["per_parameter"], l2["global"]) == (0.0, 0.0, 0.0)
    assert (l2["compared"], l2["skipped"]) == (len(tensor_shapes(preset, "hf")), [])
    report = convert("custom", hf, tmp_path / "custom", tmp_path / "again")
    assert report["l2"]["sum"] == 0.0
    assert report["l2"]["compared"] == len(tensor_shapes(preset, "custom"))


def test_no_distance_of_the_same_values_in_another_dtype(tmp_path):
    source = make(tmp_path / "source", "tiny", "custom")
    ref = make(tmp_path / "ref", "tiny", "hf")
    wide = {n: t.float() for n, t in as_hf(read(source), PRESETS["tiny"]).items()}
    put(ref, wide)
    assert convert("hf", source, ref, tmp_path / "out")["l2"]["sum"] == 0.0


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_distances_of_large_tensors_do_not_depend_on_workers(dtype, tmp_path):
    """Embeddings of more than one unit of work, with a last block that is not full."""
    preset = replace(PRESETS["tiny-internlm2"], vocab=70_001)
    source = make(tmp_path / "source", preset, "hf")
    ref = make(tmp_path / "ref", preset, "custom", dtype=dtype)
    reports = [convert("custom", source, ref, tmp_path / f"out-{n}", workers=n) for n in (1, 2, 3)]
    assert reports[0]["l2"] == reports[1]["l2"] == reports[2]["l2"]
    ours = as_custom(read(source), preset)
    expected = distances(ours, read(ref))
    for key in ("sum", "per_parameter", "global"):
        assert reports[0]["l2"][key] == pytest.approx(expected[key], rel=1e-9)
    files = [(tmp_path / f"out-{n}" / "model.safetensors").read_bytes() for n in (1, 2, 3)]
    assert files[0] == files[1] == files[2]
    assert_same(read(tmp_path / "out-1"), ours)
