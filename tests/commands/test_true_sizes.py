"""Conversions of the largest models, true names and shapes without data."""

from __future__ import annotations

import math
import shutil
from functools import cache

import numpy as np
import pytest
import torch
from folders import OTHER, convert, sparse
from marks import slow
from models import MODELS, TINY
from presets import PRESETS, tensor_shapes
from reference import bits

pytestmark = slow


@cache
def parameters_of(preset: str, layout: str) -> int:
    return sum(map(math.prod, tensor_shapes(preset, layout).values()))


REAL = [name for name in MODELS if name not in TINY and parameters_of(name, "custom") < 80e9]


@pytest.mark.parametrize("layout", ["custom", "hf"])
@pytest.mark.parametrize("preset", REAL)
def test_real_models_convert_both_ways(preset, layout, tmp_path, monkeypatch):
    monkeypatch.setattr("streamshard.engine.plan.disk_free", lambda _: 10**15)
    made = {side: sparse(tmp_path / side, PRESETS[preset], side) for side in ("custom", "hf")}
    source, ref = made[OTHER[layout]], made[layout]
    report = convert(layout, source, ref, tmp_path / "out", dry_run=True)
    assert report["tensors"] == len(tensor_shapes(preset, layout))
    assert report["parameters"] == parameters_of(preset, layout)
    assert (report["missing"], report["unexpected"]) == ([], [])
    # These folders have weights and configs only.
    assert [one for one in report["warnings"] if "lacks a vocabulary" not in one] == []
    assert report["bytes"] == sum(file["bytes"] for file in report["plan"]["files"])
    assert report["bytes"] > 2 * report["parameters"]
    assert not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path)


def test_every_preset_is_one_of_these():
    """Names of one size share a test; what is left out is 80B or more."""
    left = [name for name in MODELS if name not in REAL and name not in TINY]
    assert left == ["InternVL3_5-241B-A28B"]
    assert {"InternVL3_5-30B-A3B", "InternVL3_5-GPT-OSS-20B-A4B-Preview"} <= set(REAL)


def test_a_check_of_bits():
    """What these tests compare with: equal bits, not equal numbers."""
    zeros = torch.tensor([0.0, -0.0])
    assert bits(zeros[:1]) != bits(zeros[1:])
    assert np.array_equal(zeros[:1].numpy(), zeros[1:].numpy())
