"""S9: adapters of tied models, in bases that tie and that do not, in either order of the commands.

What an adapted model is, says `peft_cases.exact_weights` of the model that peft wrapped: embedding and
head of a tied one, each as it is used. A merge that comes before the conversion and one that comes
after must give the same bytes, or the one that cannot know refuses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import flat_name
from folders import carried, edit, make, put, settings_of
from marks import PEERS
from models import custom_model, hf_model
from peft_cases import adapted, configure, edited, fill, raises, save_adapter
from presets import PRESETS
from reference import read, same_tensor

from streamshard import custom_to_hf, hf_to_custom, merge_lora
from streamshard.errors import AdapterError

pytestmark = PEERS

PRESET = PRESETS["tiny"]
E, H = "embed_tokens", "lm_head"
EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
ROWS = [3, 4, 250]

CONFIGS: dict[str, dict[str, Any]] = {
    "rows": {"trainable_token_indices": ROWS},
    "rows-named": {"trainable_token_indices": {E: ROWS}},
    "rows-of-both": {"trainable_token_indices": {E: ROWS, H: ROWS}},
    "other-rows": {"trainable_token_indices": {E: ROWS, H: [3, 5]}},
    "rows-of-head": {"trainable_token_indices": {H: ROWS}},
    "rows-ensured": {"trainable_token_indices": ROWS, "ensure_weight_tying": True},
    "lora-embedding": {"target_modules": [E, "v_proj"]},
    "lora-head": {"target_modules": [H, "v_proj"]},
    "lora-ensured": {"target_modules": [E, H], "ensure_weight_tying": True},
    "saved-embedding": {"modules_to_save": [E]},
    "saved-head": {"modules_to_save": [H]},
    "saved-both": {"modules_to_save": [E, H]},
    "saved-ensured": {"modules_to_save": [E], "ensure_weight_tying": True},
}
# Where the files alone do not say that the model was tied, a base that never ties cannot know.
UNKNOWN = ("rows", "rows-named")


def tied_model() -> Any:
    settings = settings_of(PRESET, "hf")
    settings["tie_word_embeddings"] = settings["text_config"]["tie_word_embeddings"] = True
    return fill(hf_model(settings))


def folders(root: Path, model: Any, *, stored: bool = False) -> dict[str, Path]:
    """The tied HF base, and what it is converted to."""
    content = {flat_name(n): t.bfloat16() for n, t in model.state_dict().items()}
    if not stored:
        content.pop(HEAD)
    hf = put(make(root / "hf", PRESET, "hf", tied=True), content)
    hf_to_custom(
        hf_path=hf,
        custom_path=make(root / "reference", PRESET, "custom"),
        save_path=root / "custom",
    )
    return {"hf": hf, "custom": root / "custom", "reference": root / "reference"}


def effective(wrapped: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Embedding and head as the adapted model uses them."""
    model, width = wrapped.get_base_model(), PRESET.hidden
    with torch.no_grad():
        table = model.get_input_embeddings()(torch.arange(PRESET.vocab))
        return table, model.get_output_embeddings()(torch.eye(width)).T


def both(tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return tensors[EMBEDDING].float(), tensors.get(HEAD, tensors[EMBEDDING]).float()


@pytest.mark.parametrize("stored", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("config", CONFIGS)
def test_S9_either_order(config, stored, tmp_path):
    model = tied_model()
    wrapped = adapted(model, **{"target_modules": ["v_proj"], **CONFIGS[config]})
    adapter = save_adapter(tmp_path / "adapter", wrapped, save_embedding_layers=False)
    base = folders(tmp_path, model, stored=stored)
    merge_lora(base=base["hf"], adapter=adapter, output=tmp_path / "a")
    for found, expected in zip(both(read(tmp_path / "a")), effective(wrapped), strict=True):
        assert torch.allclose(found, expected, rtol=1e-2, atol=2e-2)
        changed = (expected - model.get_input_embeddings().weight).abs().amax(1) > 1e-6
        before = both(read(base["hf"]))[0]
        assert ((found != before).any(1) <= changed).all()
    if config in UNKNOWN:
        raises(tmp_path, "token rows", "never ties", base=base["custom"], adapter=adapter)
    else:
        merge_lora(base=base["custom"], adapter=adapter, output=tmp_path / "b-custom")
    reference = base["reference"]
    hf_to_custom(hf_path=tmp_path / "a", custom_path=reference, save_path=tmp_path / "a-custom")
    merge_lora(
        base=base["hf"],
        adapter=adapter,
        output=tmp_path / "c-custom",
        layout="custom",
        reference=reference,
    )
    one = read(tmp_path / "a-custom")
    for other in ("b-custom", "c-custom"):
        if (tmp_path / other).exists():
            tensors = read(tmp_path / other)
            assert tensors.keys() == one.keys()
            assert [n for n in one if not same_tensor(one[n], tensors[n])] == [], other


@pytest.mark.parametrize("named", [False, True], ids=["by-vision", "by-class"])
def test_S9_rows_that_were_trained_on_the_custom_model(named, tmp_path):
    """It has two tensors, so the head stays: in the custom base, and in a tied HF one."""
    base = folders(tmp_path, tied_model())
    content = read(base["custom"])
    custom = fill(custom_model(settings_of(PRESET, "custom"), PRESET.image_token))
    custom.load_state_dict({n: t.float() for n, t in content.items()})
    targets = ["v_proj"] if named else ["v_proj", "attn.qkv"]
    wrapped = adapted(custom, target_modules=targets, trainable_token_indices={E: ROWS})
    adapter = save_adapter(tmp_path / "adapter", wrapped)
    if named:
        mapping = {"base_model_class": "InternVLChatModel", "parent_library": "x"}
        configure(adapter, auto_mapping=mapping)
    merge_lora(base=base["custom"], adapter=adapter, output=tmp_path / "custom-out")
    merge_lora(base=base["hf"], adapter=adapter, output=tmp_path / "hf-out")
    one, other = read(tmp_path / "custom-out"), read(tmp_path / "hf-out")
    assert same_tensor(one[HEAD], content[HEAD])
    assert not same_tensor(one[EMBEDDING], content[EMBEDDING])
    again = carried(other, PRESET, "custom")
    assert [n for n in one if not same_tensor(one[n], again[n])] == []


def test_S9_a_head_of_its_own_is_not_that_of_a_tied_model(tmp_path):
    model = tied_model()
    wrapped = adapted(model, target_modules=["v_proj"], **CONFIGS["rows-of-both"])
    adapter = save_adapter(tmp_path / "adapter", wrapped)
    base = folders(tmp_path, model)["custom"]
    content = read(base)
    put(base, content | {HEAD: content[HEAD] * 2})
    raises(tmp_path, "ties the two", HEAD, base=base, adapter=adapter)
    configure(adapter, trainable_token_indices=ROWS)  # a model that does not tie: the embedding's
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    assert same_tensor(read(tmp_path / "out")[HEAD], read(base)[HEAD])


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_S9_rows_of_the_language_model_alone(layout, tmp_path):
    """Names that are those of both layouts, or of a part: only the base can say."""
    model = tied_model()
    wrapped = adapted(model, target_modules=["self_attn.v_proj"], **CONFIGS["rows"])
    adapter = save_adapter(tmp_path / "adapter", wrapped)
    start = "base_model.model.model.language_model."
    edited(
        adapter,
        lambda content: {
            k.replace(start, "base_model.model.model."): t for k, t in content.items()
        },
    )
    base = folders(tmp_path, model)
    if layout == "custom":
        with pytest.raises(AdapterError, match="token rows"):
            merge_lora(base=base["custom"], adapter=adapter, output=tmp_path / "out")
        return
    merge_lora(base=base["hf"], adapter=adapter, output=tmp_path / "out")
    assert read(tmp_path / "out").keys() == read(base["hf"]).keys()


def test_S9_to_hf_in_one_pass(tmp_path):
    """From the custom base to a tied reference: the two differ then, and the output says so."""
    model = tied_model()
    wrapped = adapted(model, **CONFIGS["lora-head"], r=3)
    adapter = save_adapter(tmp_path / "adapter", wrapped, save_embedding_layers=False)
    base = folders(tmp_path, model)
    ref = edit(make(tmp_path / "ref", PRESET, "hf"), lambda config: None)
    merge_lora(base=base["custom"], adapter=adapter, output=tmp_path / "a")
    custom_to_hf(custom_path=tmp_path / "a", hf_path=ref, save_path=tmp_path / "a-hf")
    merge_lora(
        base=base["custom"], adapter=adapter, output=tmp_path / "b", layout="hf", reference=ref
    )
    one, other = read(tmp_path / "a-hf"), read(tmp_path / "b")
    assert [n for n in one if not same_tensor(one[n], other[n])] == []
