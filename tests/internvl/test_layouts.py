"""Layouts: names and shapes of every model, forward passes, spellings, ties, and what is refused.

Names and shapes are compared with `tools/presets.py`, values with running models: transformers'
own for the HF layout, and those of `internvit` for the custom layout.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from marks import slow_but
from models import (
    GROUPED,
    MODELS,
    MOE,
    NUMPY,
    TINY,
    TORCH,
    config,
    custom_model,
    dims,
    hf_model,
    lazy,
    load_custom,
    logits_of,
    message,
    packed_values,
    scramble,
    shapes_of,
    values,
)
from presets import PRESETS, model_config, tensor_shapes
from safetensors.torch import load_file, save_file

from streamshard.internvl.config_edits import config_fixes
from streamshard.internvl.detection import detect
from streamshard.internvl.layouts import convert, pieces, to_custom, to_hf
from streamshard.internvl.model_config import INNER, OTHER, Dims, dims_from_config, llm_architecture
from streamshard.tensors.joined import Concat
from streamshard.tensors.lazy import Stored

# Published numbers of tensors, custom and HF (None where there is no HF model).
COUNTS = {
    "InternVL2-2B": (517, 661), "InternVL2-8B": (573, 733), "InternVL2-26B": (934, 1120),
    "InternVL2-4B": (541, None), "InternVL2-40B": (1138, None), "InternVL2-1B": (637, None),
    "InternVL-Chat-V1-2": (1138, None), "InternVL2-Llama3-76B": (1318, None),
    "InternVL2_5-1B": (637, 733), "InternVL3-1B": (637, 733), "InternVL3-2B": (685, 781),
    "InternVL2_5-4B": (781, 877), "InternVL3-8B": (685, 781), "InternVL3-9B": (781, 877),
    "InternVL3-14B": (925, 1021), "InternVL2_5-38B": (1366, 1456), "InternVL3-38B": (1366, 1456),
    "InternVL2_5-78B": (1558, 1648), "InternVL3-78B": (1558, 1648), "InternVL3_5-1B": (657, 753),
    "InternVL3_5-2B": (657, 753), "InternVL3_5-4B": (745, 841), "InternVL3_5-8B": (745, 841),
    "InternVL3_5-14B": (789, 885), "InternVL3_5-38B": (1302, 1392),
    "InternVL3_5-30B-A3B": (19213, 19309), "InternVL3_5-241B-A28B": (37540, 37630),
    "InternVL3_5-GPT-OSS-20B-A4B-Preview": (757, 853),
}  # fmt: skip


# --- every model, by headers ----------------------------------------------------------------------


@pytest.mark.parametrize("preset", MODELS)
def test_names_and_shapes_of_every_model(preset):
    custom, hf = lazy(preset, "custom"), lazy(preset, "hf")
    made_hf = to_hf(custom, dims(preset))
    made_custom = to_custom(hf, dims(preset, "hf"))
    assert shapes_of(made_hf) == shapes_of(hf)
    assert shapes_of(made_custom) == shapes_of(custom)
    # There and back is the very same place in the very same file, in the same order.
    again = to_custom(made_hf, dims(preset, "hf"))
    assert again == custom
    assert list(again) == list(custom)
    assert to_hf(made_custom, dims(preset)) == hf


@pytest.mark.parametrize("preset", COUNTS)
def test_counts_of_every_published_model(preset):
    custom, hf = COUNTS[preset]
    assert len(tensor_shapes(preset, "custom")) == custom
    if hf is not None:
        assert len(to_hf(lazy(preset, "custom"), dims(preset))) == hf


def test_the_parts_of_a_qkv_are_rows_of_one_range():
    made = to_hf(lazy("tiny", "custom"), dims("tiny"))
    whole = lazy("tiny", "custom")["vision_model.encoder.layers.0.attn.qkv.weight"]
    q, k, v = (made[f"vision_tower.encoder.layer.0.attention.{p}_proj.weight"] for p in "qkv")
    assert [q, k, v] == [whole.take(0, 32), whole.take(32, 64), whole.take(64, 96)]


def test_parts_may_lie_in_different_files():
    hf = lazy("tiny", "hf")
    names = [f"vision_tower.encoder.layer.0.attention.{p}_proj.weight" for p in "qkv"]
    for name, path in zip(names, ("a", "b", "c"), strict=True):
        hf[name] = replace(hf[name], path=path)
    whole = to_custom(hf, dims("tiny", "hf"))["vision_model.encoder.layers.0.attn.qkv.weight"]
    assert isinstance(whole, Concat)
    assert whole.parts == tuple(hf[name] for name in names)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("preset", TINY)
def test_the_order_of_the_source_does_not_matter(preset, seed):
    hf = lazy(preset, "hf")
    names = list(hf)
    random.Random(seed).shuffle(names)
    shuffled = {name: hf[name] for name in names}
    assert to_custom(shuffled, dims(preset, "hf")) == to_custom(hf, dims(preset, "hf"))
    assert to_hf(to_custom(shuffled, dims(preset, "hf")), dims(preset)) == hf


# --- InternLM2's grouped rows ---------------------------------------------------------------------


def wqkv_rows(heads: int, kv_heads: int, head_dim: int) -> list[np.ndarray]:
    """Convert a `wqkv` whose rows hold their own number; answer the rows of q, k and v."""
    made = dims("tiny-internlm2")
    made = replace(made, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    custom = values("tiny-internlm2", "custom")
    total = (heads + 2 * kv_heads) * head_dim
    for name in [n for n in custom if n.endswith("wqkv.weight")]:
        custom[name] = np.arange(total)[:, None] * np.ones((1, 3))
    result = to_hf(custom, made, NUMPY)
    stem = "language_model.model.layers.0.self_attn."
    back = to_custom(result, made, NUMPY)
    assert np.array_equal(back[GROUPED], custom[GROUPED])
    return [result[f"{stem}{p}_proj.weight"][:, 0].astype(int) for p in "qkv"]


def test_grouped_rows_of_a_small_model():
    q, k, v = wqkv_rows(4, 2, 2)
    assert q.tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert k.tolist() == [4, 5, 12, 13]
    assert v.tolist() == [6, 7, 14, 15]


def test_grouped_rows_of_internvl2_8b():
    q, k, v = wqkv_rows(32, 8, 128)
    assert q[:512].tolist() == list(range(512))
    assert (q[512], q[4095], k[0], k[128], v[0], v[1023]) == (768, 5887, 512, 1280, 640, 6143)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))
def test_grouped_rows_are_those_of_a_view(kv_heads, share, head_dim):
    q, k, v = wqkv_rows(kv_heads * share, kv_heads, head_dim)
    view = np.arange(kv_heads * (share + 2) * head_dim).reshape(kv_heads, share + 2, head_dim)
    assert np.array_equal(q, view[:, :share].ravel())
    assert np.array_equal(k, view[:, share].ravel())
    assert np.array_equal(v, view[:, share + 1].ravel())


def test_grouped_biases():
    custom = lazy("tiny-internlm2", "custom")
    stem = "language_model.model.layers.{}.attention."
    for layer in range(3):
        custom[f"{stem.format(layer)}wqkv.bias"] = Stored("b", 0, (128,), "BF16", 999)
        custom[f"{stem.format(layer)}wo.bias"] = Stored("b", 500, (64,), "BF16", 999)
    made = dims_from_config({**config("tiny-internlm2", "custom")})
    made = replace(made, attention_bias=True)
    hf = to_hf(custom, made)
    assert hf["language_model.model.layers.2.self_attn.k_proj.bias"].shape == (32,)
    assert to_custom(hf, made) == custom


# --- forward passes -------------------------------------------------------------------------------


KINDS = [*TINY, "tiny-6b-vit tiny-internlm2", "tiny-6b-vit tiny-qwen3"]


def preset_of(kind: str) -> Any:
    """A tiny preset; two names are the vision encoder of one with the language model of another."""
    first, *rest = kind.split()
    if not rest:
        return PRESETS[first]
    return replace(PRESETS[rest[0]], vision=PRESETS[first].vision)


def load_hf(folder: Any, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> Any:
    """Load with transformers from a folder; every tensor must find its place."""
    folder.mkdir(exist_ok=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors",
              {"format": "pt"})  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config_fixes(settings, "hf")))
    model, info = transformers.InternVLForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    problems = {kind: found for kind, found in info.items() if found}
    assert not problems
    return model.eval()


@pytest.mark.parametrize("kind", slow_but(KINDS, *KINDS[:1]))
def test_logits_are_equal_after_conversion(kind, tmp_path):
    preset = preset_of(kind)
    settings = {
        layout: model_config(preset, layout, tied=False, torch_dtype="float32")
        for layout in ("custom", "hf")
    }
    from_custom = dims_from_config(settings["custom"])
    from_hf = dims_from_config(settings["hf"], architecture=llm_architecture(settings["custom"]))
    original = hf_model(settings["hf"])
    scramble(original)
    expected = logits_of(original, preset.image_token)
    assert expected.std() > 0.1
    assert (expected[0] - expected[1]).abs().max() > 0.1

    # HF to custom, from the names in memory and from those on disk.
    original.save_pretrained(tmp_path / "saved")
    on_disk = load_file(tmp_path / "saved" / "model.safetensors")
    made = to_custom(original.state_dict(), from_hf, TORCH)
    also = to_custom(on_disk, from_hf, TORCH)
    assert made.keys() == also.keys()
    assert all(torch.equal(made[name], also[name]) for name in made)
    converted = custom_model(settings["custom"], preset.image_token)
    load_custom(converted, made, preset)
    found = logits_of(converted, preset.image_token)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    # Custom to HF, in both spellings that are written.
    fresh = custom_model(settings["custom"], preset.image_token)
    scramble(fresh)
    expected = logits_of(fresh, preset.image_token)
    for spelling in ("flat", "nested"):
        tensors = to_hf(fresh.state_dict(), from_custom, TORCH, spelling=spelling)
        loaded = load_hf(tmp_path / spelling, tensors, settings["hf"])
        found = logits_of(loaded, preset.image_token)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_naive_split_would_be_noticed(tmp_path):
    """The forward pass is a judge: rows of wqkv cut in three give other logits."""
    preset = PRESETS["tiny-internlm2"]
    settings = model_config(preset, "custom", tied=False, torch_dtype="float32")
    model = custom_model(settings, preset.image_token)
    scramble(model)
    made = to_hf(model.state_dict(), dims_from_config(settings), TORCH)
    for name in [n for n in made if n.endswith("self_attn.q_proj.weight")]:
        wqkv = model.state_dict()[name.replace("self_attn.q_proj", "attention.wqkv")]
        made[name] = wqkv[: len(made[name])]
    hf = load_hf(tmp_path, made, model_config(preset, "hf", tied=False, torch_dtype="float32"))
    difference = logits_of(hf, preset.image_token) - logits_of(model, preset.image_token)
    assert difference.abs().max() > 1e-3


# --- experts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_packed_experts_are_read(layout):
    plain, packed = packed_values(layout)
    assert detect(packed, config(MOE, layout)).packed_experts
    assert detect(packed).family == "qwen3_moe"
    for made in (dims(MOE, layout), Dims("qwen3_moe")):
        call = to_custom if layout == "hf" else to_hf
        one, other = call(plain, made, NUMPY), call(packed, made, NUMPY)
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)


def test_packed_experts_are_ranges_of_one_tensor():
    hf = {n: t for n, t in lazy(MOE, "hf").items() if ".experts." not in n}
    for layer in range(3):
        stem = f"language_model.model.layers.{layer}.mlp.experts"
        hf[f"{stem}.gate_up_proj"] = Stored("p", 0, (4, 48, 64), "BF16", 10**9)
        hf[f"{stem}.down_proj"] = Stored("p", 24576, (4, 64, 24), "BF16", 10**9)
    made = to_custom(hf, dims(MOE, "hf"))
    stem = "language_model.model.layers.1.mlp.experts.2"
    assert made[f"{stem}.up_proj.weight"] == Stored(
        "p", 2 * (2 * 48 * 64 + 24 * 64), (24, 64), "BF16", 10**9
    )
    assert made[f"{stem}.down_proj.weight"] == Stored(
        "p", 24576 + 2 * 2 * 64 * 24, (64, 24), "BF16", 10**9
    )


def test_experts_packed_and_single_are_refused():
    hf = lazy(MOE, "hf")
    name = "language_model.model.layers.1.mlp.experts.down_proj"
    hf[name] = Stored("p", 0, (4, 64, 24), "BF16", 10**9)
    text = message(lambda: to_custom(hf, dims(MOE, "hf")))
    assert "layers.1.mlp.experts.0.down_proj.weight' is there twice" in text


@pytest.mark.parametrize("shape", [(3, 48, 64), (4, 48), (4, 48, 8, 8)])
def test_packed_experts_of_another_number(shape):
    hf = {n: t for n, t in lazy(MOE, "hf").items() if ".experts." not in n}
    hf["language_model.model.layers.0.mlp.experts.gate_up_proj"] = Stored("", 0, shape, "BF16", 9)
    text = message(lambda: to_custom(hf, dims(MOE, "hf")))
    assert "experts.gate_up_proj' has the shape" in text
    assert "[4, rows, columns] was expected" in text


def moe_with_dense_layer(layout: str) -> tuple[dict[str, Stored], dict[str, Any]]:
    """The middle one of three layers has no experts."""
    made = config(MOE, layout)
    made[INNER[layout]]["mlp_only_layers"] = [1]
    tensors = {
        n: t for n, t in lazy(MOE, layout).items() if not re.search(r"model\.layers\.1\.mlp", n)
    }
    for part in ("gate", "up", "down"):
        tensors[f"language_model.model.layers.1.mlp.{part}_proj.weight"] = Stored(
            "d", 0, (128, 64), "BF16", 10**9
        )
    return tensors, made


def test_layers_without_experts():
    custom, made = moe_with_dense_layer("custom")
    for known in (dims_from_config(made), Dims("qwen3_moe")):
        assert to_custom(to_hf(custom, known), replace(known, tied=False)) == custom
    assert dims_from_config(made).dense_layers == {1}
    assert detect(custom, made).family == "qwen3_moe"
    text = message(lambda: to_hf(custom, dims(MOE)))
    assert "layers.1.mlp.gate_proj.weight': by the config this layer has experts" in text
    assert "(14)" not in text
    assert "missing in the custom layout of qwen3_moe (13)" in text
    text = message(lambda: to_hf(lazy(MOE, "custom"), dims_from_config(made)))
    assert "by the config this layer has no experts" in text


def test_every_second_layer_without_experts():
    made = config(MOE, "custom")
    made["llm_config"] |= {"decoder_sparse_step": 2, "mlp_only_layers": None}
    assert dims_from_config(made).dense_layers == {0, 2}


# --- incomplete, foreign, damaged -----------------------------------------------------------------


@pytest.mark.parametrize("part", "qkv")
@pytest.mark.parametrize("known", [True, False])
def test_a_missing_part_of_a_triple(part, known):
    hf = lazy("tiny", "hf")
    name = f"vision_tower.encoder.layer.1.attention.{part}_proj.weight"
    del hf[name]
    made = dims("tiny", "hf") if known else Dims("qwen2")
    text = message(lambda: to_custom(hf, made))
    assert f"missing in the HF layout of qwen2 (1): '{name}'" in text
    result = convert(hf, made, "custom")
    assert result.missing == (name,)
    assert not result.unexpected
    assert "vision_model.encoder.layers.1.attn.qkv.weight" not in result.tensors
    assert len(result.tensors) == len(lazy("tiny", "custom")) - 1


# --- updates --------------------------------------------------------------------------------------


def moved(preset: str, layout: str, delta: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Carry every row of every tensor to `layout` by `pieces`."""
    target = {n: np.full(s, np.nan) for n, s in tensor_shapes(preset, layout).items()}
    for name, rows in delta.items():
        matrix = rows.reshape(-1, rows.shape[-1]) if ".experts." in name else rows
        source = dims(preset, OTHER[layout])
        for piece in pieces(name, len(matrix), source, layout):
            start, stop = piece.source_start, piece.source_start + piece.rows
            into = target[piece.target]
            into = into.reshape(-1, into.shape[-1]) if ".experts." in piece.target else into
            place = into[piece.target_start : piece.target_start + piece.rows]
            assert np.isnan(place).all()
            place[:] = matrix[start:stop]
    return target


@pytest.mark.parametrize("layout", ["custom", "hf"])
@pytest.mark.parametrize("preset", TINY)
def test_updates_go_where_the_weights_go(preset, layout):
    delta = values(preset, OTHER[layout])
    call = to_custom if layout == "custom" else to_hf
    expected = call(delta, dims(preset, OTHER[layout]), NUMPY)
    found = moved(preset, layout, delta)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_updates_of_packed_experts(layout):
    plain, packed = packed_values(OTHER[layout])
    one, other = moved(MOE, layout, plain), moved(MOE, layout, packed)
    assert all(np.array_equal(one[name], other[name]) for name in one)
    name = "language_model.model.layers.0.mlp.experts.gate_up_proj"
    text = message(lambda: pieces(name, 4, Dims("qwen3_moe"), layout))
    assert "the config must say num_experts" in text


def test_updates_in_any_spelling():
    for name in (
        "model.vision_tower.encoder.layer.3.attention.v_proj.weight",
        "vision_tower.encoder.layer.3.attention.v_proj.weight",
    ):
        (piece,) = pieces(name, 32, dims("tiny"), "custom")
        assert piece.target == "vision_model.encoder.layers.3.attn.qkv.weight"
        assert (piece.target_start, piece.source_start, piece.rows) == (64, 0, 32)


def test_updates_that_have_no_place():
    text = message(lambda: pieces("vision_model.x.weight", 4, dims("tiny"), "hf"))
    assert "'vision_model.x.weight' is no tensor of the custom layout of qwen2" in text
    name = "vision_tower.encoder.layer.0.attention.q_proj.weight"
    text = message(lambda: pieces(name, 31, dims("tiny"), "custom"))
    assert f"'{name}' has 31 rows; 32 were expected" in text


def test_a_lora_pair_moves_with_its_rows():
    """B @ A of an InternLM2 `wqkv` is, row by row, that of q, k and v."""
    rng = np.random.default_rng(3)
    A, B = rng.standard_normal((2, 64)), rng.standard_normal((128, 2))
    custom = values("tiny-internlm2", "custom")
    custom[GROUPED] = B @ A
    expected = to_hf(custom, dims("tiny-internlm2"), NUMPY)
    for piece in pieces(GROUPED, 128, dims("tiny-internlm2"), "hf"):
        rows = B[piece.source_start : piece.source_start + piece.rows] @ A
        place = slice(piece.target_start, piece.target_start + piece.rows)
        np.testing.assert_allclose(expected[piece.target][place], rows)
