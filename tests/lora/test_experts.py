"""One pair for all fused experts: whose rows and columns are whose."""

from __future__ import annotations

import numpy as np
import pytest
from arrays import array

from streamshard.errors import AdapterError
from streamshard.lora.experts import Stack, expert_updates, parameter_names, stacked_as
from streamshard.tensors.constructors import add_low_rank
from streamshard.tensors.lazy import Array, read_float32
from streamshard.tensors.low_rank import LowRank
from streamshard.tensors.workspace import Workspace

EXPERTS, R, ROWS, COLUMNS = 3, 2, 5, 4
STACK = Stack(EXPERTS, ROWS, COLUMNS)


def whole(update: LowRank, work: Workspace) -> np.ndarray:
    shape = update.stop - update.start, update.A.columns
    node = add_low_rank(array(np.zeros(shape)), [update])
    out = np.empty(node.nbytes, np.uint8)
    node.fill(0, node.rows, out, work)
    work.forget()
    return out.view(np.float32).reshape(shape)


@pytest.mark.parametrize("order", ["peft", "unsloth"])
def test_the_columns_of_an_expert(order, work):
    rng = np.random.default_rng(0)
    A, B = rng.standard_normal((EXPERTS, R, COLUMNS)), rng.standard_normal((EXPERTS, ROWS, R))
    columns = B.transpose(1, 2, 0) if order == "peft" else B.transpose(1, 0, 2)
    factors = array(A.reshape(-1, COLUMNS)), array(columns.reshape(ROWS, -1))
    updates = expert_updates(STACK, *factors, 1.0, turned=False, order=order)
    for expert, update in enumerate(updates):
        np.testing.assert_allclose(whole(update, work), B[expert] @ A[expert], rtol=1e-5, atol=1e-6)


def test_turned_is_the_transpose(work):
    rng = np.random.default_rng(1)
    A, B = (
        array(rng.standard_normal((EXPERTS * R, ROWS))),
        array(rng.standard_normal((COLUMNS, EXPERTS * R))),
    )
    updates = expert_updates(STACK, A, B, 1.0, turned=True, order="peft")
    for expert, update in enumerate(updates):
        left = read_float32(B, 0, COLUMNS, work).copy()[:, expert::EXPERTS]
        right = read_float32(A, expert * R, (expert + 1) * R, work).copy()
        np.testing.assert_allclose(whole(update, work), (left @ right).T, rtol=1e-5, atol=1e-6)


def factors(into: int, out: int) -> tuple[Array, Array]:
    return array(np.zeros((EXPERTS * R, into))), array(np.zeros((out, EXPERTS * R)))


def test_which_side_is_in_is_told_by_the_shapes():
    assert stacked_as({"x": (STACK, *factors(COLUMNS, ROWS))}, "a") == {"x": False}
    assert stacked_as({"x": (STACK, *factors(ROWS, COLUMNS))}, "a") == {"x": True}
    with pytest.raises(AdapterError, match="fit no 3 matrices of 5 x 4"):
        stacked_as({"x": (STACK, *factors(ROWS, ROWS))}, "a")


def test_a_square_one_is_as_the_others_are():
    square = Stack(EXPERTS, ROWS, ROWS), *factors(ROWS, ROWS)
    for turned, other in ((False, (COLUMNS, ROWS)), (True, (ROWS, COLUMNS))):
        found = stacked_as({"square": square, "x": (STACK, *factors(*other))}, "a")
        assert found == {"square": turned, "x": turned}
    with pytest.raises(AdapterError, match="'square' are square"):
        stacked_as({"square": square}, "a")


def test_the_first_parameter_registered_is_the_innermost():
    modules = ["mlp.experts", "mlp.experts.base_layer"]
    targets = ["experts.down_proj", "experts.gate_up_proj"]
    assert parameter_names(modules, targets, "a") == {
        "mlp.experts.base_layer": "gate_up_proj",
        "mlp.experts": "down_proj",
    }
    assert not parameter_names(["q_proj"], targets, "a")
    with pytest.raises(AdapterError, match="has 1 pairs for fused parameters"):
        parameter_names(["mlp.experts"], targets, "a")
