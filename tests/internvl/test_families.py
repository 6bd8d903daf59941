"""The tables themselves."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from models import dims, shapes_of
from presets import tensor_shapes

from streamshard.internvl.families import FAMILIES
from streamshard.internvl.layouts import to_custom
from streamshard.tensors.lazy import Array


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_no_name_is_in_two_rules(family):
    for side in ("custom", "hf"):
        names = [name for rule in (*family.rules, *family.packed) for name in rule.names(side)]
        one_sided = [n for n in names if not (side == "custom" and family.packed and "expert" in n)]
        assert len(set(one_sided)) == len(one_sided)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES.keys())
def test_rules_have_the_same_holes_on_both_sides(family):
    for rule in family.rules:
        holes = [re.findall(r"\{\w+\}", n) for side in ("custom", "hf") for n in rule.names(side)]
        assert all(each == holes[0] for each in holes)


def test_arrays_convert_too():
    """Tensors in memory are `Lazy` as well: those of adapters that were pickled."""
    hf = {
        n: Array(np.zeros(math.prod(s) * 2, np.uint8), s, "BF16")
        for n, s in tensor_shapes("tiny", "hf").items()
    }
    assert shapes_of(to_custom(hf, dims("tiny", "hf"))) == tensor_shapes("tiny", "custom")
