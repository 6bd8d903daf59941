"""`find_homes`: which tensors of a base the names of an adapter mean."""

from __future__ import annotations

import numpy as np
import pytest

from streamshard.errors import AdapterError
from streamshard.lora.name_matching import OtherNames, Place, Wanted, find_homes
from streamshard.tensors.lazy import Array, Lazy

NO_OTHERS = OtherNames(lambda name: name)


def tensor(*shape: int) -> Lazy:
    return Array(np.zeros(int(np.prod(shape)) * 2, np.uint8), shape, "BF16")


def homes(base, wanted, others=NO_OTHERS):
    wanted = {name: Wanted(rows, f"{name}.lora_A") for name, rows in wanted.items()}
    return find_homes(base, wanted, "the adapter", others)


@pytest.mark.parametrize(
    ("named", "stored"),
    [
        ("a.q.weight", "a.q.weight"),
        ("model.a.q.weight", "a.q.weight"),
        ("a.q.weight", "model.a.q.weight"),
        ("language_model.a.q.weight", "a.q.weight"),
        ("a.q.weight", "language_model.a.q.weight"),
    ],
)
def test_one_rewrite_for_all_names(named, stored):
    found = homes({stored: tensor(8, 4), "other": tensor(1)}, {named: 8})
    assert found == {named: [Place(stored, 0, 0, 8, whole=True)]}


def test_names_are_never_rewritten_in_two_ways():
    base = {"a.q.weight": tensor(8, 4), "model.b.q.weight": tensor(8, 4)}
    with pytest.raises(AdapterError, match="1 of 2 modules are not in the base"):
        homes(base, {"a.q.weight": 8, "b.q.weight": 8})


def test_a_choice_is_not_guessed():
    base = {"q.weight": tensor(8, 4), "model.q.weight": tensor(8, 4)}
    with pytest.raises(
        AdapterError, match=r"in more than one way \(as named, with leading 'model\.'\)"
    ):
        homes(base, {"q.weight": 8})


def test_a_spelling_of_its_own():
    others = OtherNames(lambda name: name.replace("lm.", "language_model.model."))
    found = homes({"language_model.model.q.weight": tensor(8, 4)}, {"lm.q.weight": 8}, others)
    assert found["lm.q.weight"][0].target == "language_model.model.q.weight"


def test_experts_fused_in_the_adapter_and_one_by_one_in_the_base():
    """Rows of gate, then of up, expert by expert, as transformers 5 fuses them."""
    parts = [(number, part) for number in (0, 1) for part in ("gate", "up")]
    base = {f"l.experts.{n}.{part}_proj.weight": tensor(3, 4) for n, part in parts}
    (places,) = homes(base, {"l.experts.gate_up_proj": 12}).values()
    assert [(place.target, place.source_start) for place in places] == [
        *zip(base, (0, 3, 6, 9), strict=True)
    ]
    assert all((place.start, place.rows, place.whole) == (0, 3, True) for place in places)


def test_experts_one_by_one_in_the_adapter_and_fused_in_the_base():
    base = {"l.experts.gate_up_proj": tensor(2, 6, 4)}
    wanted = {"l.experts.1.gate_proj.weight": 3, "l.experts.1.up_proj.weight": 3}
    assert [found for (found,) in homes(base, wanted).values()] == [
        Place("l.experts.gate_up_proj", 6, 0, 3, whole=False),
        Place("l.experts.gate_up_proj", 9, 0, 3, whole=False),
    ]


def test_another_layout_comes_last():
    place = Place("qkv.weight", 8, 0, 8, whole=False)
    others = OtherNames(lambda name: name, lambda name, rows: [place] if rows == 8 else [])
    base = {"qkv.weight": tensor(24, 4)}
    assert homes(base, {"k.weight": 8}, others) == {"k.weight": [place]}
    with pytest.raises(AdapterError, match=r"for the same rows of 'qkv\.weight'"):
        homes(base, {"k.weight": 8, "v.weight": 8}, others)
    with pytest.raises(AdapterError, match="1 of 1 modules are not in the base"):
        homes(base, {"k.weight": 9}, others)
