"""Patterns and numbers of adapter configs that nobody vouches for."""

from __future__ import annotations

import copy
import json

import pytest
from hostile_json import only_our_errors

from streamshard import merge_lora
from streamshard.errors import AdapterError


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", ["(a+)+$", "(.*)*x", r"(\w*_?)*proj!", "(?=a)", "a" * 5000])
def test_patterns_that_could_take_forever_are_refused(field, pattern, pair, refused):
    file = pair.adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: {pattern: 4}}))
    refused(4, field)


def test_huge_numbers_in_the_adapter_config(pair):
    file = pair.adapter / "adapter_config.json"
    before = json.loads(file.read_text())
    for field in ("r", "lora_alpha"):
        for value in (10**299, 10**30, 2**64):
            file.write_text(json.dumps(copy.deepcopy(before) | {field: value}))
            try:
                merge_lora(base=pair.base, adapter=pair.adapter, output=pair.output, dry_run=True)
            except AdapterError as error:
                assert field in str(error) or "says" in str(error) or "row" in str(error)  # noqa: PT017


@pytest.mark.parametrize("digest", [[], {}, 1, None, "x"])
def test_any_record_of_earlier_merges(digest, pair):
    (pair.base / "streamshard.json").write_text(json.dumps({"adapters": [{"digest": digest}, 1]}))
    only_our_errors(
        merge_lora, base=pair.base, adapter=pair.adapter, output=pair.output, dry_run=True
    )


def test_a_record_of_many_tensors_is_read(pair):
    norms = {f"model.layers.{n}.mlp.experts.1.gate_proj.weight" * 3: 0.5 for n in range(80_000)}
    (pair.base / "streamshard.json").write_text(json.dumps({"l2_per_tensor": norms}, indent=2))
    merge_lora(base=pair.base, adapter=pair.adapter, output=pair.output, dry_run=True)
