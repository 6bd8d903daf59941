"""S1: the shape of every tensor follows from the config, as the real classes make them."""

from __future__ import annotations

import json
import time
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from models import MODELS, TINY, config, custom_model, dims, lazy, message, pack, stored
from presets import PRESETS, SPELLINGS, tensor_shapes

from streamshard.internvl.config_classes import llm_defaults
from streamshard.internvl.dims import Dims
from streamshard.internvl.families import FAMILIES
from streamshard.internvl.model_config import dims_from_config
from streamshard.internvl.shapes import check_gathered, check_shapes, expected_shapes, misfits
from streamshard.internvl.spelling import flat_names
from streamshard.internvl.tables import compared_names, opened

UP = "language_model.model.layers.1.mlp.up_proj.weight"


def wrong(tensors: Any, found: Dims, layout: str) -> list[Any]:
    return list(misfits(tensors, flat_names(tensors, layout), found, layout))


def on_meta(settings: dict[str, Any]) -> torch.nn.Module:
    """transformers' own model of a config, without values."""
    with torch.device("meta"):
        return transformers.InternVLForConditionalGeneration(
            transformers.InternVLConfig.from_dict(settings)
        )


def assert_as_real(model: torch.nn.Module, settings: dict[str, Any], architecture: str) -> None:
    """Names and shapes of a model are those that its config means, all of them."""
    found = dims_from_config(settings, architecture=architecture)
    state = model.state_dict()
    assert wrong(state, found, "hf") == []
    assert compared_names(flat_names(state, "hf"), found, "hf") == ({}, [])
    shapes = expected_shapes(found, "hf")
    for flat, name in flat_names(state, "hf").items():
        key = flat if flat in shapes else opened(flat)[0]
        expected = shapes[key]
        assert len(expected) == state[name].dim()
        # Only the vocabulary is free.
        assert all(e is not None or "embed_tokens" in key or "lm_head" in key for e in expected)
        assert all(e in (None, size) for e, size in zip(expected, state[name].shape, strict=True))


@pytest.mark.parametrize("preset", TINY)
def test_S1_hf_shapes_are_those_of_transformers(preset):
    settings = config(preset, "hf")
    assert_as_real(on_meta(settings), settings, PRESETS[preset].arch)


@pytest.mark.parametrize("preset", TINY)
def test_S1_custom_shapes_are_those_of_the_modules(preset):
    settings = config(preset, "custom")
    state = custom_model(settings, PRESETS[preset].image_token).state_dict()
    assert wrong(state, dims(preset), "custom") == []


@pytest.mark.parametrize("preset", MODELS)
@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_S1_published_models_fit(preset, layout):
    assert wrong(lazy(preset, layout), dims(preset, layout), layout) == []


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_S1_every_spelling_is_known(spelling):
    shapes = tensor_shapes("tiny", "hf", spelling=spelling)
    name = next(name for name in shapes if name.endswith("layers.1.mlp.up_proj.weight"))
    assert wrong(stored(shapes), dims("tiny", "hf"), "hf") == []
    (misfit,) = wrong(stored({**shapes, name: (95, 64)}), dims("tiny", "hf"), "hf")
    assert (misfit.name, misfit.expected) == (name, (96, 64))


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_S1_every_tensor_is_looked_at(layout):
    """One row more in any tensor, of whatever family, is seen; two tables of tokens go together."""
    for preset in TINY:
        shapes = tensor_shapes(preset, layout)
        for name, shape in shapes.items():
            changed = {**shapes, name: (shape[0] + 1, *shape[1:])}
            found = wrong(stored(changed), dims(preset, layout), layout)
            assert len(found) == 1, (preset, name)
            assert found[0].name == name or shape == shapes[found[0].name]
            if len(shape) > 1:
                longer = {**shapes, name: (*shape[:-1], shape[-1] + 1)}
                assert wrong(stored(longer), dims(preset, layout), layout)
            assert wrong(stored({**shapes, name: (0,)}), dims(preset, layout), layout)


VARIANTS: dict[str, Any] = {
    "image": lambda c: c["vision_config"].update(image_size=[42, 28]),
    "image-number": lambda c: c["vision_config"].update(image_size=42, patch_size=7),
    "patch": lambda c: c["vision_config"].update(patch_size=[7, 14]),
    "channels": lambda c: c["vision_config"].update(num_channels=4),
    "ratio": lambda c: c.update(downsample_ratio=0.25),
    "ratio-of-one": lambda c: c.update(downsample_ratio=1.0),
    "ratio-that-does-not-divide": lambda c: c.update(downsample_ratio=0.4),
    "no-ratio": lambda c: c.pop("downsample_ratio"),
    "vision-inner": lambda c: c["vision_config"].update(intermediate_size=40),
    "6b": lambda c: c["vision_config"].update(
        norm_type="rms_norm", attention_bias=False, use_qk_norm=True
    ),
    "kv-null": lambda c: c["text_config"].update(num_key_value_heads=None),
    "head-dim": lambda c: c["text_config"].update(head_dim=24),
    "vocabulary": lambda c: c["text_config"].update(vocab_size=300),
    "attention-bias": lambda c: c["text_config"].update(attention_bias=True),
}


@pytest.mark.parametrize("case", VARIANTS)
@pytest.mark.parametrize("preset", ["tiny-qwen3", "tiny-llama", "tiny-qwen2"])
def test_S1_each_field_means_what_transformers_takes_it_for(preset, case):
    settings = config(preset, "hf")
    VARIANTS[case](settings)
    if preset == "tiny-qwen2" and case == "head-dim":
        assert dims_from_config(settings).head_dim == 24
    assert_as_real(on_meta(settings), settings, PRESETS[preset].arch)


@pytest.mark.parametrize(
    "changes",
    [
        {"mlp_only_layers": [1]},
        {"decoder_sparse_step": 2},
        {"moe_intermediate_size": 40, "num_experts": 3},
        {"num_local_experts": 5, "num_experts": None},
    ],
    ids=str,
)
def test_S1_experts(changes):
    settings = config("tiny-qwen3-moe", "hf")
    settings["text_config"].update(changes)
    settings["text_config"] = {k: v for k, v in settings["text_config"].items() if v is not None}
    assert_as_real(on_meta(settings), settings, "Qwen3MoeForCausalLM")


def test_S1_packed_experts_in_either_layout():
    preset = "tiny-qwen3-moe"
    for layout in ("custom", "hf"):
        made = {n: torch.zeros(s) for n, s in tensor_shapes(preset, layout).items()}
        packed = pack(made, PRESETS[preset])
        assert wrong(packed, dims(preset, layout), layout) == []
        name = "language_model.model.layers.0.mlp.experts.gate_up_proj"
        (misfit,) = wrong({**packed, name: packed[name].mT}, dims(preset, layout), layout)
        assert (misfit.name, misfit.expected) == (name, (4, 48, 64))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "qwen3_moe", "phi3", "gpt_oss"])
def test_S15_absent_means_the_default_of_the_class(kind):
    """A config that says nothing has the shapes of the class's own model."""
    settings = {"model_type": "internvl", "text_config": {"model_type": kind}, "vision_config": {}}
    assert_as_real(on_meta(settings), settings, FAMILIES[kind].architecture)
    found = transformers.AutoConfig.for_model(kind)
    mine = llm_defaults(FAMILIES[kind], "hf")
    for key in ("rms_norm_eps", "hidden_act", "num_experts_per_tok", "norm_topk_prob"):
        assert mine.get(key) == getattr(found, key, None), key
    assert mine["rope_theta"] == found.rope_parameters["rope_theta"]
    assert mine.get("use_sliding_window") == getattr(found, "use_sliding_window", None)


def test_S15_what_transformers_leaves_out_when_it_saves(tmp_path):
    """Written by the library, defaults left out of it."""
    text = {"model_type": "qwen3", "num_hidden_layers": 2, "vocab_size": 300}
    made = transformers.InternVLConfig(text_config=text, vision_config={"num_hidden_layers": 2})
    made.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    default = transformers.Qwen3Config().to_dict()
    kept = {k: v for k, v in saved["text_config"].items() if default.get(k, ...) != v}
    saved["text_config"] = {**kept, "model_type": "qwen3"}
    assert "hidden_size" not in saved["text_config"]
    assert_as_real(on_meta(saved), saved, "Qwen3ForCausalLM")


def test_the_defaults_of_the_custom_classes():
    """Typed from InternVL's `configuration_internlm2.py` and `configuration_intern_vit.py`."""
    bare = {
        "model_type": "internvl_chat",
        "llm_config": {"architectures": ["InternLM2ForCausalLM"]},
    }
    assert dims_from_config(bare) == Dims(
        family="internlm2",
        blocks=48,
        layers=32,
        vision_hidden=3200,
        heads=32,
        kv_heads=32,
        head_dim=128,
        qkv_bias=False,
        qk_norm=True,
        norm_bias=False,
        attention_bias=True,
        mlp_bias=True,
        tied=False,
        vision_inner=12800,
        positions=257,
        channels=3,
        patch_height=14,
        patch_width=14,
        shuffled=12800,
        hidden=4096,
        inner=11008,
    )


def test_S1_the_vocabulary_is_free_but_one():
    """Padded and resized tables are fine in themselves; a head of other rows is not."""
    shapes = tensor_shapes("tiny", "custom")
    embedding, head = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
    for rows in (100, 288, 512):
        made = stored({**shapes, embedding: (rows, 64), head: (rows, 64)})
        assert wrong(made, dims("tiny"), "custom") == []
    (misfit,) = wrong(stored({**shapes, head: (280, 64)}), dims("tiny"), "custom")
    assert misfit.name == head
    assert misfit.like == embedding
    assert "[288, 64] was expected, as 'language_model.model.embed" in str(misfit)
    both = stored({**shapes, embedding: (288, 32), head: (288, 32)})
    assert [m.name for m in wrong(both, dims("tiny"), "custom")] == [embedding, head]
    headless = {n: s for n, s in shapes.items() if n != head}
    assert wrong(stored(headless), dims("tiny"), "custom") == []


@pytest.mark.parametrize("preset", TINY)
@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_S1_without_a_config_shapes_agree_with_each_other(preset, layout):
    shapes = tensor_shapes(preset, layout)
    bare = Dims(PRESETS[preset].arch and dims(preset).family)
    assert wrong(stored(shapes), bare, layout) == []
    for name in (
        "language_model.model.norm.weight",
        next(n for n in reversed(shapes) if ".layers.2." in n and "norm" in n),
    ):
        changed = {**shapes, name: (shapes[name][0] + 8,)}
        assert wrong(stored(changed), bare, layout), name


@pytest.mark.parametrize(
    ("name", "shape", "dtype", "expected"),
    [
        (
            UP,
            (0,),
            "BF16",
            ["has the shape [0]; [96, 64] was expected", "zero_to_fp32.py", "ZeRO-3"],
        ),
        (UP, (3072, 1), "U8", ["[3072, 1]", "As U8 it seems to be quantized"]),
        (UP, (64, 96), "BF16", ["[64, 96]; [96, 64] was expected, by the config"]),
    ],
)
def test_S1_messages(name, shape, dtype, expected):
    shapes = {**tensor_shapes("tiny", "custom"), name: shape}
    made = stored(shapes)
    object.__setattr__(made[name], "dtype", dtype)
    given = flat_names(made, "custom")
    text = message(lambda: check_shapes("here", made, given, dims("tiny"), "custom"))
    assert text.startswith(f"here: '{name}' has the shape")
    assert all(part in text for part in expected), text


def test_S1_what_no_table_knows_may_be_empty_but_not_left_so():
    check_gathered("m", {"a": np.zeros((0, 3)), "b": np.zeros(())})
    assert "zero_to_fp32.py" in message(lambda: check_gathered("m", {"a": np.zeros(0)}))


def test_37000_tensors_cost_little():
    preset = "InternVL3_5-241B-A28B"
    tensors, found = lazy(preset, "custom"), dims(preset)
    given = flat_names(tensors, "custom")
    assert len(tensors) > 37_000
    started = time.thread_time()
    check_shapes("m", tensors, given, found, "custom")
    assert (
        time.thread_time() - started < 10
    )  # a hundredth of that; each with each would take minutes
    tracemalloc.start()
    check_shapes("m", tensors, given, found, "custom")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5e6
