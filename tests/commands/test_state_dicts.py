"""State dicts in memory, and the scripts with the names of InternVL's own."""

from __future__ import annotations

import json
import math
import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from folders import as_custom, as_hf, assert_same, distances, settings_of
from models import TINY, custom_model, hf_model, load_custom, pack, scramble
from presets import PRESETS, SPELLINGS, tensor_shapes
from reference import normal

import streamshard
from streamshard import compute_l2_distance, convert_keys_back, convert_keys_to_hf
from streamshard.errors import InputError

# Families whose HF names say all: the others need the config.
PLAIN = [name for name in TINY if not name.startswith("tiny-internlm")]


def state(preset: str, layout: str, **how: Any) -> dict[str, torch.Tensor]:
    shapes = tensor_shapes(preset, layout, **how)
    return {
        name: normal(shape, 1, seed=number) for number, (name, shape) in enumerate(shapes.items())
    }


def back_options(preset: str) -> dict[str, Any]:
    if not preset.startswith("tiny-internlm"):
        return {}
    return {"config": settings_of(PRESETS[preset], "hf"), "architecture": PRESETS[preset].arch}


def there_options(preset: str) -> dict[str, Any]:
    return {"config": settings_of(PRESETS[preset], "custom")} if preset == "tiny-internlm2" else {}


# --- names of running models ----------------------------------------------------------------------


@pytest.mark.parametrize("preset", TINY)
def test_the_names_are_those_of_transformers(preset):
    """`load_state_dict(strict=True)` of a running model takes what comes out."""
    custom = custom_model(settings_of(PRESETS[preset], "custom"), PRESETS[preset].image_token)
    scramble(custom)
    model = hf_model(settings_of(PRESETS[preset], "hf"))
    made = convert_keys_to_hf(custom.state_dict(), **there_options(preset))
    if preset == "tiny-qwen3-moe":  # experts come out one by one
        made = pack(made, PRESETS[preset])
    assert made.keys() == model.state_dict().keys()
    model.load_state_dict(made, strict=True)


@pytest.mark.parametrize("preset", TINY)
def test_the_names_are_those_of_the_custom_class(preset):
    model = hf_model(settings_of(PRESETS[preset], "hf"))
    scramble(model)
    custom = custom_model(settings_of(PRESETS[preset], "custom"), PRESETS[preset].image_token)
    made = convert_keys_back(model.state_dict(), **back_options(preset))
    load_custom(custom, made, PRESETS[preset])
    back = convert_keys_to_hf(made, **there_options(preset))
    if preset == "tiny-qwen3-moe":  # experts come out one by one
        back = pack(back, PRESETS[preset])
    assert_same(back, dict(model.state_dict()))


@pytest.mark.parametrize("preset", TINY)
def test_one_is_the_inverse_of_the_other(preset):
    custom = state(preset, "custom")
    hf = convert_keys_to_hf(custom, **there_options(preset))
    assert set(hf) == set(tensor_shapes(preset, "hf", spelling="nested"))
    assert_same(convert_keys_back(hf, **back_options(preset)), custom)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("preset", ["tiny", "tiny-internlm2", "tiny-gpt-oss"])
def test_every_spelling(preset, spelling):
    hf = state(preset, "hf", spelling=spelling)
    flat = dict(zip(tensor_shapes(preset, "hf"), hf.values(), strict=True))
    made = convert_keys_back(hf, **back_options(preset))
    assert_same(made, as_custom(flat, PRESETS[preset]))


def test_a_config_is_as_good_as_the_names():
    for preset in PLAIN:
        custom = state(preset, "custom")
        config = settings_of(PRESETS[preset], "custom")
        assert_same(convert_keys_to_hf(custom, config=config), convert_keys_to_hf(custom))
        hf = state(preset, "hf")
        config = settings_of(PRESETS[preset], "hf")
        options = {"architecture": PRESETS[preset].arch, "config": config}
        assert_same(convert_keys_back(hf, **options), convert_keys_back(hf))


def test_what_upstreams_own_functions_did():
    """`convert_keys_back(convert_keys_to_hf(x))` is x, q_norm and k_norm included."""
    custom = state("tiny-6b-vit", "custom")
    assert any("q_norm" in name for name in custom)
    hf = convert_keys_to_hf(custom)
    flat = dict(as_hf(custom, PRESETS["tiny-6b-vit"]))
    name = "vision_tower.encoder.layer.0.attention.q_norm.weight"
    assert torch.equal(hf[f"model.{name}"], flat[name])
    assert_same(convert_keys_back(hf), custom)


# --- kinds of values ------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["tiny", "tiny-internlm2", "tiny-qwen3-moe"])
def test_numpy_arrays(preset):
    custom = {n: t.numpy() for n, t in state(preset, "custom").items()}
    hf = convert_keys_to_hf(custom, **there_options(preset))
    assert all(isinstance(array, np.ndarray) for array in hf.values())
    back = convert_keys_back(hf, **back_options(preset))
    assert back.keys() == custom.keys()
    for name, array in custom.items():
        assert back[name].dtype == array.dtype
        assert np.array_equal(back[name], array)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_of_torch(dtype):
    custom = {n: t.to(dtype) for n, t in state("tiny", "custom").items()}
    assert_same(convert_keys_back(convert_keys_to_hf(custom)), custom)


def test_nothing_is_changed_and_nothing_copied_needlessly():
    custom = state("tiny", "custom")
    before = {name: tensor.clone() for name, tensor in custom.items()}
    hf = convert_keys_to_hf(custom)
    qkv = custom["vision_model.encoder.layers.0.attn.qkv.weight"]
    k = hf["model.vision_tower.encoder.layer.0.attention.k_proj.weight"]
    assert k.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()
    assert_same(custom, before)


@pytest.mark.parametrize("tied_at", ["config", "nowhere"])
def test_a_tied_state_dict(tied_at):
    hf = state("tiny", "hf", tied=True)
    if tied_at == "nowhere":
        with pytest.raises(InputError, match="lm_head"):
            convert_keys_back(hf)
        return
    config = settings_of(PRESETS["tiny"], "hf") | {"tie_word_embeddings": True}
    made = convert_keys_back(hf, config=config)
    head = made["language_model.lm_head.weight"]
    assert torch.equal(head, hf["language_model.model.embed_tokens.weight"])


# --- refused --------------------------------------------------------------------------------------


def test_internlm2_needs_its_heads():
    with pytest.raises(InputError, match="heads"):
        convert_keys_to_hf(state("tiny-internlm2", "custom"))
    with pytest.raises(InputError, match="config"):
        convert_keys_back(state("tiny-internlm2", "hf"), architecture="InternLM2ForCausalLM")


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_the_wrong_way_round(layout):
    call = {"custom": convert_keys_back, "hf": convert_keys_to_hf}[layout]
    with pytest.raises(InputError, match="layout"):
        call(state("tiny", layout))


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_names_missing_and_unknown(layout):
    call = {"custom": convert_keys_to_hf, "hf": convert_keys_back}[layout]
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    content = state("tiny", layout)
    with pytest.raises(InputError, match="other"):
        call(content | {"other": torch.ones(1)})
    del content[name]
    with pytest.raises(InputError, match=re.escape(name)):
        call(content)


def test_rows_that_do_not_divide():
    content = state("tiny", "custom")
    name = "vision_model.encoder.layers.0.attn.qkv.weight"
    content[name] = content[name][:-1]
    with pytest.raises(InputError, match="95 rows"):
        convert_keys_to_hf(content)


# --- distance -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "float32")], ids=str)
def test_distance_of_state_dicts(dtypes):
    one, other = (
        {n: (t + seed).to(getattr(torch, dtype)) for n, t in state("tiny", "custom").items()}
        for seed, dtype in enumerate(dtypes)
    )
    found = compute_l2_distance(one, other)
    assert found == pytest.approx(distances(one, other)["sum"], rel=1e-12)
    upstream = sum(torch.norm(one[n].float() - other[n].float()).item() for n in one)
    assert found == pytest.approx(upstream, rel=1e-5)
    assert compute_l2_distance(other, one) == found
    assert compute_l2_distance(one, one) == 0.0


def test_distance_of_modules():
    settings = settings_of(PRESETS["tiny"], "custom")
    one, other = (custom_model(settings, PRESETS["tiny"].image_token) for _ in range(2))
    scramble(one)
    expected = distances(one.state_dict(), other.state_dict())["sum"]
    assert compute_l2_distance(one, other) == pytest.approx(expected, rel=1e-12)
    assert compute_l2_distance(one, other.state_dict()) == pytest.approx(expected, rel=1e-12)
    assert compute_l2_distance(one, one) == 0.0


def test_distance_of_what_both_have():
    one = {"a": torch.ones(2, 2), "b": torch.ones(3), "c": torch.ones(2), "s": torch.tensor(4.0)}
    other = {"a": torch.zeros(2, 2), "b": torch.zeros(4), "d": torch.ones(1), "s": torch.tensor(1)}
    assert compute_l2_distance(one, other) == 2.0 + 3.0


def test_distance_of_arrays():
    one = {"a": np.arange(6, dtype=np.float16).reshape(2, 3), "b": np.arange(3, dtype=np.int64)}
    other = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(3, np.int64)}
    assert compute_l2_distance(one, other) == pytest.approx(math.sqrt(55) + math.sqrt(5))
    mixed = {name: torch.from_numpy(array) for name, array in other.items()}
    assert compute_l2_distance(one, mixed) == compute_l2_distance(one, other)


def test_distance_of_a_tensor_of_several_pieces():
    one = torch.linspace(-1, 1, (1 << 20) + 3)
    other = torch.zeros_like(one)
    found = compute_l2_distance({"w": one}, {"w": other})
    assert found == pytest.approx(float(one.double().norm()), rel=1e-12)


def test_distance_of_views_and_parameters():
    one = torch.arange(12.0).reshape(3, 4).t()
    other = torch.nn.Parameter(torch.zeros(4, 3))
    assert compute_l2_distance({"w": one}, {"w": other}) == pytest.approx(float(one.norm()))


def test_the_functions_are_public():
    for name in ("compute_l2_distance", "convert_keys_back", "convert_keys_to_hf"):
        assert name in streamshard.__all__
        assert getattr(streamshard, name).__doc__


# --- S13: what cannot be compared is no distance of 0 ----------------------------------------------

ONES = np.ones(3, np.float32)


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ({}, {}, "no name is in both"),
        ({}, {"w": ONES}, "no name is in both"),
        ({"w": ONES}, {"v": ONES}, "'w'.*'v'"),
        ({"w": ONES}, {"module.w": ONES}, "wrappers"),
        ({"w": ONES}, {"w": np.ones(4)}, r"'w' is \[3\] and \[4\]"),
        ({"w": ONES}, {"w": np.ones((3, 1))}, "no shape"),
        ({"w": ONES}, {"w": np.float32(1)}, "no shape"),
        ({"w": torch.ones(3)}, {"w": torch.ones(1, 3)}, "no shape"),
        ({"w": np.ones(0)}, {"w": np.ones(0)}, "no tensor has elements"),
        ({"w": torch.empty(0, 4)}, {"w": torch.empty(0, 4)}, "no tensor has elements"),
        ({"w": np.array(["1", "2"])}, {"w": np.array([1, 2])}, "'w' cannot be compared"),
        ({"w": "text"}, {"w": "text"}, "'w' cannot be compared"),
        ({"w": None}, {"w": None}, "'w' cannot be compared"),
        ({"w": {"a": 1}}, {"w": {"a": 1}}, "'w' cannot be compared"),
        ({"w": np.array(["2020-01-01"], "M8[D]")}, {"w": np.array([1])}, "'w' cannot be compared"),
        ({"v": ONES, "w": b"x"}, {"v": ONES, "w": b"x"}, "'w' cannot be compared"),
        ({"w": torch.empty(3, device="meta")}, {"w": torch.ones(3)}, "'w' cannot be compared"),
        ({"_extra_state": b"x"}, {"_extra_state": b"x"}, "nothing can be compared"),
        (torch.nn.Linear(2, 3), torch.nn.LayerNorm(4), "no shape"),
        (torch.nn.Linear(2, 3), torch.nn.Sequential(torch.nn.Linear(2, 3)), "no name is in both"),
        (torch.nn.ReLU(), torch.nn.ReLU(), "no name is in both"),
    ],
    ids=str,
)
def test_s13_nothing_to_compare(a, b, said):
    for one, other in ((a, b), (b, a)):
        with pytest.raises(ValueError, match=said if one is a else "compared"):
            compute_l2_distance(one, other)


@pytest.mark.parametrize("wrong", [3, None, "a/folder", torch.nn.Linear, [("w", ONES)]], ids=str)
def test_s13_neither_mapping_nor_module(wrong):
    with pytest.raises(TypeError, match="mapping of names to tensors"):
        compute_l2_distance(wrong, {"w": ONES})
    with pytest.raises(TypeError, match="mapping of names to tensors"):
        convert_keys_to_hf(wrong)


@pytest.mark.parametrize("kind", [np.bool_, np.int64, np.uint8, np.float16, np.complex64])
def test_s13_all_numbers_can_be_compared(kind):
    """By fp64 (complex128), also between the libraries."""
    one, other = np.arange(6).reshape(2, 3).astype(kind), (np.ones((2, 3)) * 2).astype(kind)
    if kind is np.complex64:
        other = other * 1j
    wide = np.complex128 if kind is np.complex64 else np.float64
    expected = np.linalg.norm((one.astype(wide) - other.astype(wide)).ravel())
    for left in (one, torch.from_numpy(one)):
        for right in (other, torch.from_numpy(other)):
            found = compute_l2_distance({"w": left, "x": ONES}, {"w": right, "y": ONES})
            assert found == pytest.approx(expected, rel=1e-12)


def test_s13_what_else_compares():
    assert compute_l2_distance({"w": [1, 2]}, {"w": (1.0, 4.0)}) == 2.0
    assert compute_l2_distance({"w": 3}, {"w": np.float64(1)}) == 2.0
    sparse = torch.eye(3).to_sparse()
    assert compute_l2_distance({"w": sparse}, {"w": torch.zeros(3, 3)}) == pytest.approx(3**0.5)
    assert math.isnan(compute_l2_distance({"w": [math.inf]}, {"w": [math.inf]}))
    conjugate = torch.tensor([1j]).conj()
    assert compute_l2_distance({"w": conjugate}, {"w": np.array([1j])}) == 2.0
    extra = {"w": ONES, "m._extra_state": b"x"}
    assert compute_l2_distance(extra, extra) == 0.0


def test_modules_are_converted_like_their_state_dicts():
    model = hf_model(settings_of(PRESETS["tiny"], "hf"))
    made, same = convert_keys_back(model), convert_keys_back(model.state_dict())
    assert made.keys() == same.keys()
    assert compute_l2_distance(made, same) == 0.0


# --- what is no state dict, or none of this layout --------------------------------------------------


def test_tensors_that_are_not_compared_are_counted():
    import numpy as np

    one = {"a": np.ones(3), "b": np.ones(2), "c": np.ones(2)}
    other = {"a": np.ones(3), "b": np.ones(4), "d": np.ones(2), "x._extra_state": b"1"}
    with pytest.warns(streamshard.StreamshardWarning, match=r"only 1 of 4 .* 2 names .* 1 have"):
        assert streamshard.compute_l2_distance(one, other) == 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert streamshard.compute_l2_distance(one, dict(one)) == 0.0


@pytest.mark.parametrize("convert", ["convert_keys_back", "convert_keys_to_hf"])
def test_a_state_dict_of_the_other_layout_is_told_what_converts_it(convert):
    import numpy as np

    other = {"convert_keys_back": "convert_keys_to_hf", "convert_keys_to_hf": "convert_keys_back"}
    name = {
        "convert_keys_back": "vision_model.encoder.layers.0.attn.qkv.weight",
        "convert_keys_to_hf": "model.vision_tower.encoder.layer.0.attention.q_proj.weight",
    }[convert]
    with pytest.raises(streamshard.InputError, match=other[convert]) as raised:
        getattr(streamshard, convert)({name: np.ones((2, 2))})
    assert "folders" not in str(raised.value)


@pytest.mark.parametrize("convert", ["convert_keys_back", "convert_keys_to_hf"])
def test_a_wrapped_state_dict_is_told_at_once(convert):
    import numpy as np

    names = [f"language_model.base_model.model.model.layers.{n}.mlp.up_proj" for n in range(20)]
    wrapped = {f"{n}.lora_{side}.default.weight": np.ones((2, 2)) for n in names for side in "AB"}
    with pytest.raises(streamshard.InputError, match=r"^this is the state dict .* merge its pairs"):
        getattr(streamshard, convert)(wrapped)


@pytest.mark.parametrize("convert", ["convert_keys_back", "convert_keys_to_hf"])
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({1: 2}, "1 is no name of a tensor"),
        ({"a": 0}, "'a' is 0; a tensor was expected"),
        ({"a": None}, "'a' is None; a tensor was expected"),
        ({"a": [1]}, "'a' is of type list; a tensor was expected"),
        (3, "was expected, not 3"),
    ],
    ids=str,
)
def test_what_is_no_state_dict(convert, given, said):
    with pytest.raises(TypeError, match=said):
        getattr(streamshard, convert)(given)


def test_a_config_of_transformers_is_taken(folders):
    """As `model.config` is: it has `to_dict`, and is no mapping."""
    from safetensors.torch import load_file
    from transformers import AutoConfig

    tensors = load_file(folders["hf"] / "model.safetensors")
    plain = json.loads((folders["hf"] / "config.json").read_text())
    found = streamshard.convert_keys_back(tensors, config=AutoConfig.from_pretrained(folders["hf"]))
    assert found.keys() == streamshard.convert_keys_back(tensors, config=plain).keys()
    with pytest.raises(TypeError, match=r"`config` is of type pathlib.*\.PosixPath"):
        streamshard.convert_keys_back(tensors, config=folders["hf"])
