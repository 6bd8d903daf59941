"""What adapters change, before any file: plans, replacements, updates and what is reported of them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from arrays import array

from streamshard.errors import AdapterError
from streamshard.lora.adapter import Adapter
from streamshard.lora.adapter_plan import plan_adapter
from streamshard.lora.merge import alone, changes_of, merge
from streamshard.lora.name_matching import OtherNames, Place
from streamshard.lora.replacements import Replacement, replaced_tensors
from streamshard.lora.settings import read_settings
from streamshard.tensors.lazy import Array

OTHERS = OtherNames(lambda name: name)
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q", "v"]}


def numbers(*shape: int, seed: int = 0) -> Array:
    return array(np.random.default_rng(seed).standard_normal(shape))


def values(tensor, work) -> np.ndarray:
    data = np.empty(tensor.nbytes, np.uint8)
    tensor.fill(0, tensor.rows, data, work)
    work.forget()
    return data.view(np.float32).reshape(tensor.shape)


def pair(module: str, rows: int = 6, columns: int = 4, seed: int = 1) -> dict[str, Array]:
    start = f"base_model.model.{module}"
    return {
        f"{start}.lora_A.weight": numbers(2, columns, seed=seed),
        f"{start}.lora_B.weight": numbers(rows, 2, seed=seed + 1),
    }


def adapter(tensors, weight: float = 1.0, where: str = "an adapter", **config) -> Adapter:
    return Adapter(where, read_settings(CONFIG | config, where), tensors, weight)


BASE = {f"l.{n}.{m}.weight": numbers(6, 4, seed=9) for n in (0, 1) for m in ("q", "v")}
TOKENS = {"embed_tokens.weight": numbers(8, 4, seed=7)}


def test_a_plan_is_a_value(work):
    plan = plan_adapter(adapter(pair("l.0.q")), BASE, work, OTHERS)
    assert plan.homes == {"l.0.q.weight": [Place("l.0.q.weight", 0, 0, 6, whole=True)]}


@pytest.mark.parametrize(
    ("tensors", "config", "says"),
    [
        (
            pair("l.0.q") | pair("l.9.q"),
            {},
            "layers up to 9 of 'l', but the base ends before layer 9",
        ),
        (pair("l.0.q"), {"r": 3}, "has rank 2 and its lora_B 2, but adapter_config.json says 3"),
        (pair("l.0.q"), {"use_dora": True}, "use_dora is true, but the file lacks magnitudes"),
        (pair("l.0.q"), {"modules_to_save": ["v"]}, "modules_to_save has 'v'"),
        (
            pair("l.0.q") | {"base_model.model.l.9.v.weight": numbers(6, 4)},
            {},
            "the file has whole tensors",
        ),
    ],
)
def test_all_must_fit(tensors, config, says, work):
    with pytest.raises(AdapterError, match=says):
        plan_adapter(adapter(tensors, **config), BASE, work, OTHERS)


def test_updates_of_several_adapters_add_up(work):
    one = adapter(pair("l.0.q") | pair("l.1.q"), weight=0.5)
    other = adapter(pair("l.0.q", seed=5) | pair("l.1.q"), where="another")
    changes = changes_of(BASE, [one, other], work, OTHERS)
    merged = merge(changes, work)
    assert merged.updated == ["l.0.q.weight", "l.1.q.weight"]
    assert not merged.replaced
    expected = values(BASE["l.0.q.weight"], work).astype(np.float64)
    for weight, tensors in ((0.5, one.tensors), (1, other.tensors)):
        A, B = (values(t, work).astype(np.float64) for t in list(tensors.values())[:2])
        expected += weight * 2 * B @ A
    found = values(merged.tensors["l.0.q.weight"], work)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert merged.tensors["l.0.v.weight"] is BASE["l.0.v.weight"]


def test_one_adapter_alone_has_weight_one(work):
    """What a base is asked for: whether it has the adapter already, as it is."""
    own = pair("l.0.q") | pair("l.1.q", seed=3)
    quarter = adapter(own, weight=0.25)
    other = adapter(pair("l.0.q", seed=5) | pair("l.1.q", seed=7), where="another")
    changes = changes_of(BASE, [other, quarter], work, OTHERS)
    by_itself = merge(changes_of(BASE, [adapter(own)], work, OTHERS), work)
    for found, name in zip(alone(changes, 1), by_itself.updated, strict=True):
        assert np.array_equal(values(found, work), values(by_itself.tensors[name], work))


def test_no_warning_is_lost(work):
    """Those of replaced values come first, then each adapter's own."""
    half = Array(np.ones(16, np.float16).view(np.uint8), (4, 4), "F16")
    base = BASE | {"mlp1.weight": numbers(4, 4)}
    zero = {k: array(np.zeros(t.shape)) for k, t in pair("l.1.v").items()}
    one = adapter(pair("l.0.q") | zero, where="one")
    two = adapter(
        pair("l.0.v") | pair("l.1.q") | {"base_model.model.mlp1.weight": half},
        modules_to_save=["mlp1"],
        where="two",
    )
    changes = changes_of(base, [one, two], work, OTHERS)
    assert [warning.partition(":")[0] for warning in changes.warnings] == [
        "two",
        "one",
        "one",
        "two",
    ]
    kinds = ("are saved in another dtype", "exactly zero", "have none", "have none")
    for warning, kind in zip(changes.warnings, kinds, strict=True):
        assert kind in warning
    assert merge(changes, work).replaced == ["mlp1.weight"]


def test_saved_values_of_the_base_change_nothing(work):
    key = "base_model.model.embed_tokens.weight"
    own = pair("l.0.q") | pair("l.1.q") | {key: TOKENS["embed_tokens.weight"]}
    changes = changes_of(BASE | TOKENS, [adapter(own)], work, OTHERS)
    assert not changes.replacements
    assert changes.facts[0]["inert"] == [key]
    assert not plan_adapter(adapter(own), BASE | TOKENS, work, OTHERS).keys.inert


def test_rows_are_replaced_once(work):
    own = adapter(pair("l.0.q"))
    rows = [Replacement(own, "t", start, numbers(2, 4, seed=start)) for start in (1, 5)]
    found = replaced_tensors({"t": numbers(8, 4), "u": numbers(1, 1)}, rows)
    assert list(found) == ["t"]
    expected = values(numbers(8, 4), work)
    expected[1:3], expected[5:7] = (values(one.rows, work) for one in rows)
    assert np.array_equal(values(found["t"], work), expected)
    with pytest.raises(AdapterError, match="two of its tensors bring values of their own for 't'"):
        replaced_tensors({"t": numbers(8, 4)}, [*rows, dataclasses.replace(rows[0], start=2)])


def test_a_head_that_is_the_embedding(work):
    """It follows where both stay the same, and is a tensor of its own where only one changes."""
    base = BASE | TOKENS
    tie = ("embed_tokens.weight", "lm_head.weight")
    own = pair("l.0.q") | pair("l.1.q")
    same = merge(changes_of(base, [adapter(own)], work, OTHERS, tie), work)
    assert list(same.tensors) == list(base)
    assert not same.untied
    rows = {"base_model.model.embed_tokens.trainable_tokens_delta": numbers(2, 4)}
    trained = adapter(own | rows, trainable_token_indices=[3, 4])
    both = merge(changes_of(base, [trained], work, OTHERS, tie), work)
    assert both.replaced == ["embed_tokens.weight"]
    assert not both.untied
    head = adapter(own | pair("lm_head", 8, seed=3), target_modules=["q", "lm_head"])
    apart = merge(changes_of(base, [head], work, OTHERS, tie), work)
    assert apart.untied
    assert apart.updated[-1] == "lm_head.weight"
    assert apart.tensors["embed_tokens.weight"] is base["embed_tokens.weight"]
