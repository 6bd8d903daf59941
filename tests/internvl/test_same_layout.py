"""Names brought to the layout that they have: nothing is lost, and nothing let through."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from models import GROUPED, MODELS, MOE, NUMPY, TINY, dims, lazy, message, packed_values
from presets import SPELLINGS, tensor_shapes

from streamshard.internvl.detection import detect, layout_of
from streamshard.internvl.layouts import convert, pieces, to_custom, to_hf
from streamshard.internvl.model_config import OTHER, Dims
from streamshard.tensors.lazy import Stored


@pytest.mark.parametrize("layout", ["custom", "hf"])
@pytest.mark.parametrize("preset", MODELS)
def test_to_its_own_layout_nothing_changes(preset, layout):
    tensors = lazy(preset, layout)
    result = convert(tensors, dims(preset, layout), layout, side=layout)
    assert list(result.tensors.items()) == list(tensors.items())
    assert (result.missing, result.unexpected, result.left) == ((), {}, ())
    # A large model has 40,000 names: no second set of them is made (the head's is a constant).
    assert len({id(name) for name in result.tensors} - {id(name) for name in tensors}) <= 1


@pytest.mark.parametrize("spelling", sorted(SPELLINGS))
def test_to_its_own_layout_names_are_flat(spelling):
    tensors = lazy("tiny", "hf", spelling=spelling)
    result = convert(tensors, dims("tiny", "hf"), "hf", side="hf")
    assert result.tensors == lazy("tiny", "hf")


def test_to_its_own_layout_a_tied_head_is_written_out():
    result = convert(lazy("tiny", "hf", tied=True), dims("tiny", "hf", tied=True), "hf", side="hf")
    embedding = result.tensors["language_model.model.embed_tokens.weight"]
    assert result.tensors["language_model.lm_head.weight"] == embedding
    assert result.tensors.keys() == tensor_shapes("tiny", "hf").keys()


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_to_its_own_layout_packed_experts_come_apart(layout):
    plain, packed = packed_values(layout)
    result = convert(packed, dims(MOE, layout), layout, NUMPY, side=layout)
    assert result.tensors.keys() == plain.keys()
    assert all(np.array_equal(result.tensors[name], plain[name]) for name in plain)


def test_what_nothing_was_made_of():
    hf = lazy("tiny", "hf")
    triple = [f"vision_tower.encoder.layer.1.attention.{part}_proj.weight" for part in "qkv"]
    dropped = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
    del hf[triple[0]]
    hf |= dict.fromkeys(("x", dropped), hf[triple[1]])
    result = convert(hf, dims("tiny", "hf"), "custom")
    assert (result.missing, list(result.unexpected)) == ((triple[0],), ["x"])
    assert sorted(result.left) == sorted([*triple[1:], dropped, "x"])
    # In their own layout the rest of a triple stays what it is.
    result = convert(hf, dims("tiny", "hf"), "hf", side="hf")
    assert sorted(result.left) == sorted([dropped, "x"])
    assert result.tensors.keys() == hf.keys() - {dropped, "x"}


@pytest.mark.parametrize("layout", ["custom", "hf"])
@pytest.mark.parametrize("preset", TINY)
def test_every_tensor_is_needed(preset, layout):
    tensors = lazy(preset, layout)
    made = dims(preset, layout)
    for name in tensors:
        rest = {n: t for n, t in tensors.items() if n != name}
        assert convert(rest, made, OTHER[layout]).missing == (name,)


@pytest.mark.parametrize("layout", ["custom", "hf"])
@pytest.mark.parametrize("preset", TINY)
def test_no_other_name_is_accepted(preset, layout):
    tensors, made = lazy(preset, layout), dims(preset, layout)
    for name in (
        "language_model.model.layers.0.self_attn.q_proj.scale",
        "language_model.model.layers.00.mlp.up_proj.weight",
        "language_model.model.layers.{}.mlp.up_proj.weight",
        "language_model.model.layers.0.mlp.up_proj.weight.weight",
        "language_model.model.layers.9999999999999.mlp.up_proj.weight",
        "mlp1.2.weight",
        "mlp1.{}.weight" if layout == "custom" else "vision_tower.layernorm.weight",
        "x",
        "",
    ):
        extra = {**tensors, name: tensors["language_model.model.norm.weight"]}
        result = convert(extra, made, OTHER[layout]) if layout_of(extra) else None
        if result is None:
            assert "two checkpoints are mixed" in message(
                lambda extra=extra: convert(extra, made, OTHER[layout])
            )
        else:
            assert list(result.unexpected) == [name]
            assert not result.missing


def test_unknown_names_are_listed_with_the_nearest():
    hf = lazy("tiny", "hf")
    hf["vision_tower.encoder.layer.1.attention.query.weight"] = hf["language_model.lm_head.weight"]
    text = message(lambda: to_custom(hf, dims("tiny", "hf")))
    assert "not in the HF layout of qwen2 (1):\n" in text
    assert "'vision_tower.encoder.layer.1.attention.query.weight': nearest: 'vision_tower" in text
    assert "layer.1.attention." in text.split("nearest")[1]
    assert "is this its config?" in text


def test_unexpected_names_are_as_the_file_has_them():
    hf = lazy("tiny", "hf", spelling="nested")
    hf["model.language_model.layers.7.mlp.up_proj.weight"] = hf["lm_head.weight"]
    assert convert(hf, dims("tiny", "hf"), "custom").unexpected == {
        "model.language_model.layers.7.mlp.up_proj.weight": "by the config there are 3 language "
        "model layers"
    }


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_a_layer_too_few_and_too_many(layout):
    tensors, made = lazy("tiny", layout), dims("tiny", layout)
    call = to_hf if layout == "custom" else to_custom
    text = message(lambda: call(tensors, replace(made, layers=4)))
    assert "layout of qwen2 (12): 'language" in text
    assert "'language_model.model.layers.3.self_attn.q_proj.weight'" in text
    text = message(lambda: call(tensors, replace(made, layers=2)))
    assert "layout of qwen2 (12):\n" in text
    assert "by the config there are 2 language model layers" in text
    text = message(lambda: call(tensors, replace(made, blocks=1)))
    assert "by the config there are 1 vision layers" in text
    # Without a config, a hole between layers still shows.
    holed = {n: t for n, t in tensors.items() if "language_model.model.layers.1." not in n}
    assert "layers.1." in message(lambda: call(holed, Dims("qwen2")))


def test_absurd_counts_cost_nothing():
    hf = lazy("tiny", "hf")
    hf["language_model.model.layers.999999.mlp.up_proj.weight"] = hf[
        "language_model.lm_head.weight"
    ]
    text = message(lambda: to_custom(hf, Dims("qwen2")))
    assert "missing in the HF layout of qwen2 (1,000 or more)" in text


@pytest.mark.parametrize(
    ("preset", "switch", "wrong", "name"),
    [
        ("tiny", "qkv_bias", False, "vision_model.encoder.layers.0.attn.qkv.bias"),
        ("tiny", "norm_bias", False, "vision_model.encoder.layers.0.norm1.bias"),
        ("tiny", "qk_norm", True, "vision_model.encoder.layers.0.attn.q_norm.weight"),
        ("tiny-6b-vit", "qk_norm", False, "vision_model.encoder.layers.0.attn.k_norm.weight"),
        ("tiny-6b-vit", "qkv_bias", True, "vision_model.encoder.layers.1.attn.qkv.bias"),
        ("tiny-llama", "mlp_bias", True, "language_model.model.layers.0.mlp.gate_proj.bias"),
        ("tiny-llama", "attention_bias", True, "language_model.model.layers.2.self_attn"),
    ],
)
def test_switches_of_the_config_are_checked(preset, switch, wrong, name):
    made = replace(dims(preset), **{switch: wrong})
    text = message(lambda: to_hf(lazy(preset, "custom"), made))
    assert name in text or name.replace(".0.", ".1.") in text
    assert ("missing" if wrong else "by the config there is no") in text
    unknown = replace(dims(preset), **{switch: None})
    assert len(to_hf(lazy(preset, "custom"), unknown)) == len(lazy(preset, "hf"))


def test_a_switch_is_on_in_all_layers_or_in_none():
    custom = lazy("tiny-6b-vit", "custom")
    for name in [n for n in custom if ".layers.1." in n and "q_norm" in n]:
        del custom[name]
    text = message(lambda: to_hf(custom, Dims("qwen2")))
    assert "'vision_model.encoder.layers.1.attn.q_norm.weight'" in text


def test_the_other_layout_is_refused():
    text = message(lambda: to_custom(lazy("tiny", "custom"), dims("tiny")))
    assert "'vision_model.embeddings.class_embedding' is of the custom layout" in text
    assert "the wrong way round" in text
    text = message(lambda: to_hf(lazy("tiny", "hf"), dims("tiny")))
    assert "'vision_tower.embeddings.cls_token' is of the HF layout" in text


def test_another_family_is_refused():
    text = message(lambda: to_custom(lazy("tiny-qwen3", "hf"), dims("tiny", "hf")))
    assert "self_attn.q_norm.weight'" in text
    assert "missing in the HF layout of qwen2 (9)" in text
    both = {**lazy("tiny-internlm2", "custom"), **lazy("tiny-llama", "custom")}
    text = message(lambda: to_hf(both, dims("tiny-internlm2")))
    assert "not in the custom layout of internlm2" in text


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("vision_model.encoder.layers.0.attn.qkv.weight", (97, 32), "has 97 rows; 3 x 32 were"),
        ("vision_model.encoder.layers.0.attn.qkv.bias", (99,), "has 99 rows; 3 x 32 were"),
        ("vision_model.encoder.layers.0.attn.qkv.bias", (), "is a single number"),
    ],
)
def test_shapes_that_do_not_fit_when_split(name, shape, expected):
    custom = lazy("tiny", "custom")
    custom[name] = replace(custom[name], shape=shape)
    text = message(lambda: to_hf(custom, dims("tiny")))
    assert f"'{name}' {expected}" in text


def test_rows_that_cannot_be_cut_in_three():
    custom = lazy("tiny", "custom")
    name = "vision_model.encoder.layers.0.attn.qkv.weight"
    custom[name] = replace(custom[name], shape=(97, 32))
    text = message(lambda: to_hf(custom, Dims("qwen2")))
    assert f"'{name}' has 97 rows; 3 x 32 were expected" in text


def test_shapes_and_dtypes_that_do_not_fit_when_joined():
    stem = "vision_tower.encoder.layer.0.attention."
    for change, expected in (
        ({"shape": (31, 32)}, f"'{stem}k_proj.weight' has 31 rows; 32 were expected"),
        ({"shape": (32, 33)}, "is BF16 with columns [32] and"),
        ({"dtype": "F32"}, "'vision_tower.encoder.layer.0.attention.k_proj.weight' is F32"),
    ):
        hf = lazy("tiny", "hf")
        hf[f"{stem}k_proj.weight"] = replace(hf[f"{stem}k_proj.weight"], **change)
        assert expected in message(lambda hf=hf: to_custom(hf, dims("tiny", "hf")))


def test_grouped_rows_that_do_not_fit():
    custom, hf = lazy("tiny-internlm2", "custom"), lazy("tiny-internlm2", "hf")
    made = dims("tiny-internlm2")
    text = message(lambda: to_hf(custom, replace(made, head_dim=8)))
    assert f"'{GROUPED}' has 128 rows; 32 + 16 + 16 were expected" in text
    text = message(lambda: to_hf(custom, replace(made, heads=None)))
    assert "the config must say num_attention_heads" in text
    text = message(lambda: to_hf(custom, replace(made, heads=3)))
    assert "3 heads cannot be shared by 2 key-value heads" in text
    text = message(lambda: to_custom(hf, replace(made, kv_heads=4)))
    assert "self_attn.k_proj.weight' has 32 rows; 64 were expected" in text


def test_frequencies_of_old_files_are_dropped():
    for preset, name in (
        ("tiny-llama", "language_model.model.layers.1.self_attn.rotary_emb.inv_freq"),
        ("tiny-internlm2", "language_model.model.layers.1.attention.rotary_emb.inv_freq"),
        ("tiny", "language_model.model.rotary_emb.inv_freq"),
    ):
        custom = lazy(preset, "custom")
        extra = {**custom, name: Stored("", 0, (8,), "F32", 99)}
        assert to_hf(extra, dims(preset)) == to_hf(custom, dims(preset))
        assert detect(extra).family in (dims(preset).family, "llama")
        assert pieces(name, 8, dims(preset), "hf") == []
