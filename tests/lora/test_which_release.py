"""R6: patterns of ranks and alphas in configs that do not say which release of peft wrote them.

Adapters are of the installed peft, which says the merged weights; the rules of older releases are
those of their sources (`tuners/lora/model.py`, 0.13.2 and 0.14.0), written out here.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
from marks import PEERS
from peft_cases import (
    adapted,
    assert_as_peft,
    configure,
    edited,
    language_model,
    raises,
    save_adapter,
    save_base,
)
from reference import normal

from streamshard import merge_lora
from streamshard.errors import AdapterError
from streamshard.lora.pattern_eras import ERAS, pattern_keys
from streamshard.lora.settings import LoraSettings
from streamshard.lora.which_release import settled

pytestmark = PEERS

LAYER = "model.layers.{}.self_attn.{}_proj"
Q0, V1 = LAYER.format(0, "q"), LAYER.format(1, "v")

MERGED: dict[str, dict[str, Any]] = {
    # As mergekit-extract-lora and EVA write them.
    "full-names": {"rank_pattern": {Q0: 3, V1: 7}, "alpha_pattern": {Q0: 9, V1: 2}},
    "full-names-of-different-modules": {"rank_pattern": {Q0: 3}, "alpha_pattern": {V1: 2}},
    "full-names-of-the-default-rank": {"rank_pattern": {Q0: 4}, "alpha_pattern": {Q0: 12}},
    "rslora": {"rank_pattern": {Q0: 3}, "alpha_pattern": {Q0: 9}, "use_rslora": True},
    "ends": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 9}},
    # Only releases since 0.15 give these ranks.
    "beginning": {"rank_pattern": {f"^{Q0}": 3}, "alpha_pattern": {f"^{V1}": 2}},
    "alternatives": {"rank_pattern": {f"{Q0}|x": 3}, "alpha_pattern": {f"^{Q0}|y": 2}},
    "ranks-alone": {"rank_pattern": {f"^{Q0}": 3, "v_proj": 5}},
    "alphas-alone": {"alpha_pattern": {Q0: 3, "v_proj": 5}},
}


@pytest.mark.parametrize("config", MERGED.values(), ids=MERGED)
def test_R6_releases_with_other_ranks_are_out(config, tmp_path):
    model = language_model()
    wrapped = adapted(model, target_modules=["q_proj", "v_proj"], **config)
    adapter = save_adapter(tmp_path / "adapter", wrapped)
    configure(adapter, peft_version=...)
    base = save_base(tmp_path / "base", model)
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    assert_as_peft(tmp_path / "out", wrapped)


@pytest.mark.parametrize(
    "config",
    [
        # 0.13 and before took one entry for both: of rank_pattern, so alpha was the default.
        {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"self_attn.q_proj": 9}},
        # Before 0.15 ^ fitted nothing, and the default rank is what the tensors have.
        {"rank_pattern": {f"^{Q0}": 4}, "alpha_pattern": {f"^{Q0}": 9}},
    ],
)
def test_R6_releases_that_disagree_are_refused(config, tmp_path):
    model = language_model()
    adapter = save_adapter(
        tmp_path / "adapter", adapted(model, target_modules=["q_proj"], **config)
    )
    base = save_base(tmp_path / "base", model)
    configure(adapter, peft_version=...)
    raises(tmp_path, "6, 9", "peft_version", "release", base=base, adapter=adapter)
    configure(adapter, peft_version="0.19.0")
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out")


def test_R6_an_older_release_by_its_ranks(tmp_path):
    """`^` fitted nothing before 0.15: the tensors have the default rank, and alpha is the default."""
    model = language_model()
    wrapped = adapted(model, target_modules=["q_proj"])
    adapter = save_adapter(tmp_path / "adapter", wrapped)
    patterns = {"rank_pattern": {f"^{Q0}": 3}, "alpha_pattern": {f"^{Q0}": 9}}
    configure(adapter, peft_version=..., **patterns)
    base = save_base(tmp_path / "base", model)
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    assert_as_peft(tmp_path / "out", wrapped)


def test_R6_the_rank_of_several_patterns_is_that_of_the_file(tmp_path):
    """peft trains by the first pattern that fits, and saves them in another order."""
    model = language_model()
    ranks = {"q_proj": 5, Q0: 3}
    wrapped = adapted(model, target_modules=["q_proj"], rank_pattern=ranks)
    adapter = save_adapter(tmp_path / "adapter", wrapped)
    configure(adapter, rank_pattern=dict(sorted(ranks.items())))
    base = save_base(tmp_path / "base", model)
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    assert_as_peft(tmp_path / "out", wrapped)


def test_R6_a_rank_of_no_release_is_refused(tmp_path):
    model = language_model()
    wrapped = adapted(model, target_modules=["q_proj"], rank_pattern={Q0: 3})
    adapter = save_adapter(tmp_path / "adapter", wrapped)
    key = f"base_model.model.{Q0}.lora_"
    more = {
        f"{key}A.weight": normal((6, 64), 1, seed=1),
        f"{key}B.weight": normal((64, 6), 1, seed=2),
    }
    edited(adapter, lambda content: content | more, peft_version=...)
    raises(tmp_path, "rank 6", "says 3", base=save_base(tmp_path / "base", model), adapter=adapter)


def of_013(ranks: dict[str, int], alphas: dict[str, float], module: str) -> tuple[int, float]:
    keys = [*ranks, *alphas]
    key = next((k for k in keys if re.match(rf".*\.{k}$", module)), module)
    return ranks.get(key, 4), alphas.get(key, 6)


def of_014(ranks: dict[str, int], alphas: dict[str, float], module: str) -> tuple[int, float]:
    found = [
        next((k for k in keys if re.match(rf".*\.{k}$", module)), module)
        for keys in (ranks, alphas)
    ]
    return ranks.get(found[0], 4), alphas.get(found[1], 6)


def of_021(ranks: dict[str, int], alphas: dict[str, float], module: str) -> tuple[int, float]:
    from peft.utils.other import get_pattern_key

    return (
        ranks.get(get_pattern_key(ranks, module), 4),
        alphas.get(get_pattern_key(alphas, module), 6),
    )


@pytest.mark.parametrize("module", [Q0, V1, "q_proj"])
@pytest.mark.parametrize(
    "patterns",
    [*({"rank_pattern": {}, "alpha_pattern": {}, **config} for config in MERGED.values())],
    ids=MERGED,
)
def test_R6_each_release_as_its_source_has_it(patterns, module):
    ranks, alphas = patterns["rank_pattern"], patterns["alpha_pattern"]
    for era, rule in zip(ERAS, (of_021, of_014, of_013), strict=True):
        rank, alpha = pattern_keys(ranks, alphas, era, module)
        assert (ranks.get(rank, 4), alphas.get(alpha, 6)) == rule(ranks, alphas, module)


def test_settings_that_no_release_fits_are_left_to_the_check_of_ranks():
    settings = LoraSettings(r=4, lora_alpha=6, rank_pattern={"q": 3})
    assert settled(settings, {"q": 5}, "here") is settings
    assert settled(settings, {"q": 3}, "here").version == ERAS[0]
    both = LoraSettings(r=4, lora_alpha=6, rank_pattern={"q": 4}, alpha_pattern={"a.q": 9})
    with pytest.raises(AdapterError, match=r"here: module 'a\.q'.* 6, 9 depending"):
        settled(both, {"a.q": 4}, "here")
