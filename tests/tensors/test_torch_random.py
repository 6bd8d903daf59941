"""The numbers that torch draws, without torch."""

from __future__ import annotations

import itertools

import numpy as np
import peft
import pytest
import reference
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from marks import PEERS
from peft_models import DTYPES
from torch import nn

from streamshard.disk.files import Files
from streamshard.lora.new_pairs import draws_of_pair, initial_pair
from streamshard.tensors.constructors import cast
from streamshard.tensors.lazy import Lazy
from streamshard.tensors.torch_random import Draws, Uniform, Zeros
from streamshard.tensors.workspace import Workspace

pytestmark = PEERS


def filled(tensor: Lazy, *cuts: int) -> bytes:
    """All bytes, in blocks that end at some rows."""
    work = Workspace(Files())
    ends = sorted({0, tensor.rows, *(cut for cut in cuts if cut < tensor.rows)})
    blocks = []
    for start, stop in itertools.pairwise(ends):
        out = np.full((stop - start) * tensor.row_nbytes, 255, np.uint8)
        tensor.fill(start, stop, out, work)
        blocks.append(out.tobytes())
    return b"".join(blocks)


SIZES = st.tuples(st.integers(1, 40), st.integers(1, 700), st.integers(1, 300))


@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(SIZES, min_size=1, max_size=4),
    dtype=st.sampled_from(sorted(DTYPES)),
    cut=st.integers(1, 40),
)
@example(seed=0, sizes=[(1, 1, 1)], dtype="F32", cut=1)
@example(seed=2**32 - 1, sizes=[(16, 896, 4864), (16, 4864, 896)], dtype="F32", cut=7)
@example(seed=7, sizes=[(64, 18944, 3584), (3, 5, 7)], dtype="BF16", cut=9)
@settings(max_examples=60)
def test_initial_values_are_those_of_peft(seed, sizes, dtype, cut):
    torch.manual_seed(seed)
    draws = Draws(seed, sum(draws_of_pair(*size) for size in sizes))
    first = 0
    for r, inputs, outputs in sizes:
        expected = pair_of_peft(r, inputs, outputs).to(DTYPES[dtype])
        A, B = initial_pair(draws, first, r, inputs, outputs, dtype)
        assert (A.shape, B.shape) == ((r, inputs), (outputs, r))
        assert filled(A, cut) == reference.bits(expected)
        assert not any(filled(B))
        first += draws_of_pair(r, inputs, outputs)


def pair_of_peft(r: int, inputs: int, outputs: int) -> torch.Tensor:
    """lora_A as LoraLayer's own methods make it, and the state of the generator that they leave."""
    with torch.random.fork_rng():
        base = nn.Linear(1, 1)  # drawn aside: the base is there before
        base.in_features, base.out_features = inputs, outputs
    layer = peft.tuners.lora.layer.LoraLayer(base)
    layer.in_features, layer.out_features = inputs, outputs
    layer.update_layer("x", r, 2 * r, peft.LoraConfig(r=r))
    return layer.lora_A["x"].weight.detach()


def test_draws_far_from_the_beginning():
    """Behind the first kept state, in the middle of a stride, and on its edge."""
    torch.manual_seed(3)
    expected = torch.empty(2**20 + 5000).uniform_(-0.5, 0.5)
    draws = Draws(3, len(expected))
    for first in (0, 1, 623, 624, 2**20 - 1, 2**20, 2**20 + 4000):
        part = Uniform(draws, first, 0.5, (1000,), "F32")
        assert filled(part) == reference.bits(expected[first : first + 1000])


def test_nodes_are_tensors_like_others():
    draws = Draws(0, 1000)
    for node in (Uniform(draws, 10, 0.3, (20, 30), "BF16"), Zeros((20, 30), "F16")):
        whole = filled(node)
        assert filled(node.take(3, 11)) == whole[3 * node.row_nbytes : 11 * node.row_nbytes]
        assert filled(node.reshape((10, 60))) == whole
        assert filled(cast(cast(node, "F32"), node.dtype)) == whole
        with pytest.raises(ValueError, match="rows"):
            node.take(0, 21)
    assert repr(Draws(5, 10)) == "Draws(seed=5)"
