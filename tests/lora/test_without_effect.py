"""S10, S12, R2 and part 4: adapters that do nothing, in whole or in part, and why; slices; odd names."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import reference
import torch
from folders import put
from marks import PEERS
from peft_cases import (
    adapted,
    assert_as_peft,
    configure,
    edited,
    fill,
    language_model,
    raises,
    save_adapter,
    save_base,
)
from reference import normal, read, same_tensor

from streamshard import merge_lora

pytestmark = PEERS


class Model(torch.nn.Module):
    """A language model's names, and a projector."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(90, 24)
        self.q_proj = torch.nn.Linear(24, 24)
        self.v_proj = torch.nn.Linear(24, 40)
        self.mlp1 = torch.nn.Sequential(torch.nn.LayerNorm(40), torch.nn.Linear(40, 24))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.mlp1(self.v_proj(self.q_proj(self.embed(tokens))))


TARGETS = ["q_proj", "v_proj"]
SAVED: dict[str, dict[str, Any]] = {
    "alone": {},
    "projector": {"modules_to_save": ["mlp1"]},
    "rows": {"trainable_token_indices": {"embed": [3, 4]}},
    "biases": {"bias": "lora_only"},
}


def zero(*sides: str) -> Any:
    def change(content: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            key: t * 0 if any(f"lora_{side}." in key for side in sides) else t
            for key, t in content.items()
        }

    return change


CAUSES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "alpha": (dict, {"lora_alpha": 0}, "lora_alpha is 0"),
    "alpha-rslora": (dict, {"lora_alpha": 0, "use_rslora": True}, "lora_alpha is 0"),
    "alpha-pattern": (dict, {"alpha_pattern": {"q_proj": 0, "v_proj": 0}}, "lora_alpha is 0"),
    "B": (zero("B"), {}, "lora_B is zero (2 of 2)"),
    "A": (zero("A"), {}, "lora_A is zero (2 of 2)"),
    "both": (zero("A", "B"), {}, "lora_B is zero (2 of 2)"),
}


@pytest.mark.parametrize("cause", CAUSES)
@pytest.mark.parametrize("saved", SAVED)
def test_S10_no_pair_has_an_effect(saved, cause, tmp_path):
    wrapped = adapted(fill(Model()), target_modules=TARGETS, **SAVED[saved])
    adapter = save_adapter(tmp_path / "adapter", wrapped)
    change, config, told = CAUSES[cause]
    edited(adapter, change, **config)
    base = save_base(tmp_path / "base", fill(Model()))
    if saved == "alone":
        said = raises(tmp_path, told, base=base, adapter=adapter)
        assert ("lora_B" in said) == ("lora_B" in told)
        return
    report = merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    (warning,) = [w for w in report["warnings"] if "no" in w]
    assert "none of its 2 LoRA pairs has an effect" in warning
    assert told in warning
    for module in TARGETS:
        name = f"{module}.weight"
        assert same_tensor(read(tmp_path / "out")[name], read(base)[name])


def test_S10_some_pairs_have_no_effect(tmp_path):
    adapter = save_adapter(tmp_path / "adapter", adapted(fill(Model()), target_modules=TARGETS))
    configure(adapter, alpha_pattern={"q_proj": 0})
    base = save_base(tmp_path / "base", fill(Model()))
    (warning,) = merge_lora(base=base, adapter=adapter, output=tmp_path / "out")["warnings"]
    assert "1 of 2 updates are exactly zero" in warning
    assert "lora_alpha is 0 (1 of 2): 'q_proj'" in warning


def test_S10_dora_without_direction_and_biases_of_zero(tmp_path):
    wrapped = adapted(fill(Model()), target_modules=TARGETS, use_dora=True)
    adapter = save_adapter(tmp_path / "adapter", wrapped)
    edited(adapter, zero("B"))
    base = save_base(tmp_path / "base", fill(Model()))
    (warning,) = merge_lora(base=base, adapter=adapter, output=tmp_path / "out")["warnings"]
    assert "only the DoRA magnitudes have an effect" in warning
    wrapped = adapted(fill(Model()), target_modules=TARGETS, lora_bias=True)
    other = save_adapter(tmp_path / "other", wrapped)
    edited(other, zero("B"))  # lora_B.bias too
    raises(tmp_path, "lora_B is zero", base=base, adapter=other)


def test_S10_a_weight_of_zero_among_several(tmp_path):
    one = save_adapter(tmp_path / "one", adapted(fill(Model()), target_modules=["q_proj"]))
    two = save_adapter(tmp_path / "two", adapted(fill(Model()), target_modules=["v_proj"]))
    base = save_base(tmp_path / "base", fill(Model()))
    said = raises(tmp_path, "`weight` is 0", base=base, adapter=[one, two], weight=[1, 0])
    assert "two" in said


# --- R2 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ["classifier", "score", "v_head", "mlp1", "vision.mlp"])
def test_R2_modules_that_peft_did_not_find(entry, tmp_path):
    model = language_model()
    wrapped = adapted(model, target_modules=["q_proj"], modules_to_save=[entry])
    adapter = save_adapter(tmp_path / "adapter", wrapped)
    base = save_base(tmp_path / "base", model)
    report = merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    assert [w for w in report["warnings"] if f"modules_to_save has '{entry}'" in w]
    assert_as_peft(tmp_path / "out", wrapped)


@pytest.mark.parametrize("entry", ["lm_head", "head", "norm", "layers.1.mlp", "1.mlp.up_proj"])
def test_R2_modules_that_the_base_has_are_missed(entry, tmp_path):
    """By the ends of names, as peft finds them."""
    model = language_model()
    adapter = save_adapter(tmp_path / "adapter", adapted(model, target_modules=["q_proj"]))
    configure(adapter, modules_to_save=["classifier", entry])
    base = save_base(tmp_path / "base", model)
    raises(tmp_path, f"modules_to_save has '{entry}'", base=base, adapter=adapter)


def test_R2_a_new_head_is_refused_by_name(tmp_path):
    model = language_model()
    adapter = save_adapter(tmp_path / "adapter", adapted(model, target_modules=["q_proj"]))
    score = {"base_model.model.score.weight": normal((2, 64), 1, seed=1)}
    edited(adapter, lambda content: content | score, modules_to_save=["classifier", "score"])
    base = save_base(tmp_path / "base", model)
    raises(tmp_path, "score.weight", "new head", base=base, adapter=adapter)


# --- slices of sharded models ---------------------------------------------------------------------

SLICES = {
    "A": (lambda key, t: t[:2] if "lora_A" in key else t, "rank 2 and its lora_B 4"),
    "both-by-rows": (lambda _, t: t[: len(t) // 2], "rank 2 and its lora_B 4"),
    "B-by-columns": (lambda key, t: t[:, :2] if "lora_B" in key else t, "rank 4 and its lora_B 2"),
    "B-by-rows": (lambda key, t: t[:12] if "lora_B" in key else t, "slice of a sharded"),
    "A-by-columns": (lambda key, t: t[:, :12] if "lora_A" in key else t, "slice of a sharded"),
    "flat": (lambda _, t: t.reshape(-1), "FSDP"),
    "empty": (lambda _, t: t.reshape(-1)[:0], "ZeRO-3"),
}


@pytest.mark.parametrize("kind", SLICES)
def test_part_4_slices_are_told_as_what_they_are(kind, tmp_path):
    adapter = save_adapter(tmp_path / "adapter", adapted(fill(Model()), target_modules=["q_proj"]))
    cut, told = SLICES[kind]
    edited(adapter, lambda content: {k: cut(k, t).contiguous() for k, t in content.items()})
    base = save_base(tmp_path / "base", fill(Model()))
    said = raises(tmp_path, told, "Gather", "FULL_STATE_DICT", base=base, adapter=adapter)
    assert "grouped" not in said


def test_part_4_grouped_convolutions_are_still_told(tmp_path):
    class Grouped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(8, 16, 3, groups=2)

    wrapped = peft.get_peft_model(Grouped(), peft.LoraConfig(r=4, target_modules=["conv"]))
    adapter = save_adapter(tmp_path / "adapter", wrapped)
    base = save_base(tmp_path / "base", Grouped())
    said = raises(tmp_path, "grouped convolution", base=base, adapter=adapter)
    assert "FSDP" not in said


# --- S12 ------------------------------------------------------------------------------------------

WORDS = ["module", "_orig_mod", "_fsdp_wrapped_module", "base_model.model"]


def pair_of(folder: Any, *modules: str) -> Any:
    tensors = {}
    for seed, module in enumerate(modules):
        key = f"base_model.model.{module}.lora_"
        tensors[f"{key}A.weight"] = normal((2, 24), 1, seed=seed)
        tensors[f"{key}B.weight"] = normal((24, 2), 1, seed=9 + seed)
    return reference.save_adapter(folder, tensors, r=2, lora_alpha=2, target_modules=["foo", "bar"])


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("chosen", [["foo"], ["W.foo"], ["foo", "W.foo"]], ids=str)
def test_S12_names_as_they_are_come_first(chosen, word, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "other"}')
    names = ["foo", f"{word}.foo"]
    put(base, {f"{n}.weight": normal((24, 24), 1, seed=i) for i, n in enumerate(names)})
    modules = [name.replace("W", word) for name in chosen]
    merge_lora(base=base, adapter=pair_of(tmp_path / "adapter", *modules), output=tmp_path / "out")
    before, after = read(base), read(tmp_path / "out")
    changed = {n for n in before if not same_tensor(before[n], after[n])}
    assert changed == {f"{module}.weight" for module in modules}


@pytest.mark.parametrize("word", WORDS[:3])
def test_S12_then_names_without_words_of_training(word, tmp_path):
    """Of an adapter all names or none: `bar` has no twin with the word, so it is a wrapper's."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"model_type": "other"}')
    names = ["foo", f"{word}.foo", "bar"]
    put(base, {f"{n}.weight": normal((24, 24), 1, seed=i) for i, n in enumerate(names)})
    adapter = pair_of(tmp_path / "adapter", f"{word}.foo", f"{word}.bar")
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    before, after = read(base), read(tmp_path / "out")
    changed = {n for n in before if not same_tensor(before[n], after[n])}
    assert changed == {"foo.weight", "bar.weight"}
