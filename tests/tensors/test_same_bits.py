"""Nothing that is written or told depends on how fast a thread is, or on how much there is."""

from __future__ import annotations

import json
import struct
import threading
from pathlib import Path
from typing import Any

import exactly
import numpy as np
import pytest
import reference
import torch
from exactly import Term
from hangs import HANGS
from pairs import Pair
from reference import load_file

import streamshard
from streamshard.disk.system import system
from streamshard.engine.workers import Stop, share
from streamshard.tensors.comparing import squared_distance
from streamshard.tensors.workspace import Workspace

NAME = "language_model.model.layers.{}.mlp.down_proj"
PRODUCTS = [(1, 40), (4, 300), (8, 1024), (32, 1500), (65, 200)]


def merged(folder: Path, base: reference.Tensors, pairs: reference.Tensors, **config: Any) -> Any:
    """What is merged into a new base, and the report; `pairs` are by names of modules."""
    number = len(list(folder.iterdir()))
    root = folder / str(number)
    adapter = {f"base_model.model.{name}": tensor for name, tensor in pairs.items()}
    report = streamshard.merge_lora(
        base=reference.save_checkpoint(root / "base", base),
        adapter=reference.save_adapter(root / "adapter", adapter, **config),
        output=root / "out",
        workers=1,
    )
    return load_file(root / "out" / "model.safetensors"), report


def one_pair(B: torch.Tensor, A: torch.Tensor, layer: int = 0) -> reference.Tensors:
    stem = NAME.format(layer)
    return {f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": B}


# --- sums -----------------------------------------------------------------------------------------


COUNT = 80


@pytest.fixture
def uneven(tmp_path: Path) -> Pair:
    """A base of zeros, one shard, where the first update is so large that it swallows others.

    2.0**54 + 1 is 2.0**54 in fp64: added one by one to the first square, the others are lost.
    """
    base, adapter = {}, {}
    for layer in range(COUNT):
        name = NAME.format(layer)
        base[f"{name}.weight"] = torch.zeros(4, 4)
        stem = f"base_model.model.{name}"
        B, A = torch.zeros(4, 1), torch.zeros(1, 4)
        B[0], A[0, 0] = 2.0**27 if layer == 0 else 1.0, 1.0
        adapter |= {f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": B}
    return Pair(
        tmp_path,
        reference.save_checkpoint(tmp_path / "base", base),
        reference.save_adapter(tmp_path / "adapter", adapter, r=1, lora_alpha=1),
    )


def test_sums_do_not_depend_on_who_was_faster(uneven, monkeypatch):
    """One thread waits with the tensor that is first in the file until the other has the rest."""

    def merge(output: str, workers: int) -> Any:
        return streamshard.merge_lora(
            base=uneven.base, adapter=uneven.adapter, output=uneven.root / output, workers=workers
        )

    expected = merge("in-order", 1)
    file = uneven.root / "in-order" / "model.safetensors"
    first = NAME.format(0)
    begins = reference_places(file)
    assert min(begins, key=begins.__getitem__) == f"{first}.weight"
    order: list[str] = []
    rest = threading.Event()
    write = system.pwrite
    names = {begin: name for name, begin in begins.items()}

    def waiting(descriptor: int, data: memoryview, offset: int) -> int:
        name = names.get(offset, "") if len(data) == 64 else ""
        if name.startswith(first):
            assert rest.wait(HANGS)
        count = write(descriptor, data, offset)
        if name:
            order.append(name)
        # All before the last but one are noted when the last one is written.
        if len(order) == COUNT - 1:
            rest.set()
        return count

    monkeypatch.setattr(system, "pwrite", waiting)
    found = merge("out-of-order", 2)
    assert len(order) == COUNT
    assert order[-1].startswith(first)
    for key in ("update", "l2"):
        assert {k: v for k, v in found[key].items() if k != "reference"} == {
            k: v for k, v in expected[key].items() if k != "reference"
        }
    assert file.read_bytes() == (uneven.root / "out-of-order" / file.name).read_bytes()


def reference_places(file: Path) -> dict[str, int]:
    """Where each tensor of a file begins, from its header as the format describes it."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    return {
        name: 8 + length + entry["data_offsets"][0]
        for name, entry in header.items()
        if name != "__metadata__"
    }


def test_the_first_error_of_several_threads_is_raised():
    stop, both = Stop(), threading.Barrier(2)

    def fail(item: str, work: Workspace) -> None:
        both.wait(HANGS)
        if item == "second":
            while stop.going():
                threading.Event().wait(0.001)
        raise ValueError(item)

    with pytest.raises(ValueError, match="first"):
        share(["first", "second"], fail, 2, stop)


# --- products -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("r", "columns"), PRODUCTS)
def test_rows_have_the_same_bits_however_many_follow(r, columns, tmp_path):
    A = reference.normal((r, columns), 1, seed=r)
    B = reference.normal((256, r), 1, seed=r + 1)

    def rows(count: int) -> torch.Tensor:
        base = {f"{NAME.format(0)}.weight": torch.zeros(count, columns)}
        found, _ = merged(tmp_path, base, one_pair(B[:count].clone(), A), r=r, lora_alpha=r)
        return found[f"{NAME.format(0)}.weight"]

    whole = rows(256)
    for count in (1, 2, 3, 5, 16, 127, 129, 131, 144, 255):
        assert reference.same_tensor(rows(count), whole[:count]), count


def test_the_product_with_a_scale_is_rounded_once(tmp_path):
    """2/3 is no fp32 number; A chooses columns of B, so that nothing else is rounded."""
    B = reference.normal((200, 6), 1, seed=1)
    base = {f"{NAME.format(0)}.weight": torch.zeros(200, 6)}
    found, _ = merged(tmp_path, base, one_pair(B, torch.eye(6)), r=6, lora_alpha=4)
    expected = (reference.double(B) * (4 / 6)).astype(np.float32)
    np.testing.assert_array_equal(found[f"{NAME.format(0)}.weight"].numpy(), expected)
    twice = B.numpy() * np.float32(4 / 6)
    assert (twice != expected).any()


@pytest.mark.parametrize("r", [64, 128, 300])
def test_high_ranks_are_summed_exactly(r, tmp_path):
    A = reference.normal((r, 150), 1, seed=r)
    B = reference.normal((130, r), 1, seed=r + 1)
    base = {f"{NAME.format(0)}.weight": torch.zeros(130, 150)}
    found, _ = merged(tmp_path, base, one_pair(B, A), r=r, lora_alpha=r)
    expected = exactly.merged(
        np.zeros((130, 150), np.float32), [Term(1.0, B.numpy(), A.numpy())], "F32"
    )
    np.testing.assert_array_equal(found[f"{NAME.format(0)}.weight"].numpy(), expected)


def test_factors_are_kept_for_one_tensor_only(uneven, monkeypatch):
    """Otherwise all of an adapter would be in memory at the end."""
    most, kept = [0], Workspace.kept

    def watched(self: Workspace, *arguments: Any) -> Any:
        found = kept(self, *arguments)
        most[0] = max(most[0], len(self._kept))
        return found

    monkeypatch.setattr(Workspace, "kept", watched)
    streamshard.merge_lora(
        base=uneven.base, adapter=uneven.adapter, output=uneven.root / "out", workers=1
    )
    assert 0 < most[0] <= 4


# --- distances ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_distances_of_tensors_longer_than_a_block(dtype, pair, tmp_path):
    """Measured from the same elements of the reference, also where its dtype is another one."""
    base = tmp_path / "long"
    base.mkdir()
    content = reference.read(pair.base)
    weight = "language_model.lm_head.weight"
    mine = reference.normal((700, 700), 1, seed=1, dtype="BF16")
    reference.save_checkpoint(base / "a", content | {weight: mine})
    theirs = reference.normal((700, 700), 1, seed=2, dtype=dtype)
    reference.save_checkpoint(base / "b", content | {weight: theirs})
    found = streamshard.diff(base / "a", base / "b")
    change = reference.double(mine) - reference.double(theirs)
    assert found["l2"]["global"] == pytest.approx(np.sqrt((change**2).sum()), rel=1e-9)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_equal_blocks_are_at_distance_zero(dtype, bad):
    values = torch.full((70,), 1.5, dtype=reference.TORCH.get(dtype, torch.float64))
    values[5] = bad
    block = np.frombuffer(reference.bits(values), np.uint8)
    assert squared_distance(block, dtype, block.copy(), dtype) == 0.0
    other = block.copy()
    other[-1] ^= 1
    assert not np.isfinite(squared_distance(block, dtype, other, dtype))
