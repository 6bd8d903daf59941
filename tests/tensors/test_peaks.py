"""The largest magnitudes of many small factors, beside torch."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from safetensors.torch import save_file

from streamshard.checkpoint.header import read_header
from streamshard.disk.files import Files
from streamshard.tensors import peaks
from streamshard.tensors.peaks import SMALL_NBYTES, peaks_of
from streamshard.tensors.workspace import Workspace

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("seen", [64, 1 << 20])
def test_they_are_those_of_torch(seen, tmp_path, monkeypatch):
    monkeypatch.setattr(peaks, "SEEN_NBYTES", seen)
    made = torch.Generator().manual_seed(3)
    tensors = {}
    for number, dtype in enumerate(DTYPES * 20):
        values = torch.randn(1 + number % 5, 3, generator=made) * 10.0 ** (number % 9 - 4)
        tensors[f"{number:03}"] = values.to(dtype)
    tensors |= {"zero": torch.zeros(2, 2), "none": torch.zeros(0, 4)}
    tensors |= {"minus": torch.tensor([[-3.0, 1.0], [-0.0, 2.0]], dtype=torch.bfloat16)}
    tensors |= {"small": torch.tensor([[2.0**-149, -(2.0**-140)]])}
    odd = {
        f"{kind}{value}": torch.tensor([[1.0, value], [2.0, -value]], dtype=kind)
        for kind in DTYPES
        for value in (math.inf, math.nan)
    }
    large = {"large": torch.ones(SMALL_NBYTES // 4 + 1)}
    save_file({**tensors, **odd, **large}, tmp_path / "model.safetensors")
    stored = read_header(tmp_path / "model.safetensors").tensors
    with contextlib.closing(Files()) as files:
        found = peaks_of(stored, stored, Workspace(files))
    del tensors["none"]
    assert found == {name: float(one.abs().max()) for name, one in tensors.items()}
