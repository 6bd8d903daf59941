"""Dimensions and layouts by config.json."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import transformers
from models import MODELS, MOE, TINY, config, dims, message
from presets import PRESETS

from streamshard.internvl.config_edits import config_fixes
from streamshard.internvl.model_config import (
    INNER,
    Dims,
    check_config,
    config_layout,
    dims_from_config,
)


@pytest.mark.parametrize("preset", MODELS)
def test_both_configs_of_a_model_say_the_same(preset):
    one, other = dims(preset, "custom"), dims(preset, "hf")
    assert replace(one, attention_bias=None, mlp_bias=None, head_dim=None) == replace(
        other, attention_bias=None, mlp_bias=None, head_dim=None
    )
    assert (one.vision_hidden, one.blocks) == (
        PRESETS[preset].vision.hidden,
        PRESETS[preset].vision.layers,
    )


def test_dimensions_of_a_real_config():
    assert dims("InternVL2-8B") == Dims(
        family="internlm2",
        blocks=24,
        layers=32,
        vision_hidden=1024,
        heads=32,
        kv_heads=8,
        head_dim=128,
        qkv_bias=True,
        qk_norm=False,
        norm_bias=True,
        attention_bias=False,
        mlp_bias=False,
        tied=False,
        vision_inner=4096,
        positions=1025,
        channels=3,
        patch_height=14,
        patch_width=14,
        shuffled=4096,
        hidden=4096,
        inner=14336,
    )


def test_absent_keys_mean_the_defaults_of_the_class():
    custom, hf = config("tiny", "custom"), config("tiny", "hf")
    custom["vision_config"], hf["vision_config"] = {}, {}
    made = dims_from_config(custom)
    assert (made.blocks, made.vision_hidden) == (48, 3200)
    assert (made.qkv_bias, made.qk_norm, made.norm_bias) == (False, True, False)
    made = dims_from_config(hf)
    assert (made.blocks, made.vision_hidden) == (24, 1024)
    assert (made.qkv_bias, made.qk_norm, made.norm_bias) == (False, False, True)
    expected = transformers.InternVLConfig().vision_config
    assert (expected.num_hidden_layers, expected.hidden_size) == (24, 1024)
    assert (expected.attention_bias, expected.use_qk_norm) == (False, False)


def test_configs_that_transformers_writes(tmp_path):
    for preset in TINY:
        made = transformers.InternVLConfig.from_dict(config(preset, "hf"))
        made.save_pretrained(tmp_path)
        saved = json.loads((tmp_path / "config.json").read_text())
        found = dims_from_config(saved, architecture=PRESETS[preset].arch)
        assert found == dims(preset, "hf")


def test_llama_may_be_three_families():
    hf = config("tiny-internlm2", "hf")
    text = message(lambda: dims_from_config(hf))
    assert "'LlamaForCausalLM', 'InternLM2ForCausalLM', 'InternLM3ForCausalLM'" in text
    assert "Only the config of the custom model tells" in text
    for architecture, family in (
        ("LlamaForCausalLM", "llama"),
        ("InternLM2ForCausalLM", "internlm2"),
        ("InternLM3ForCausalLM", "internlm3"),
    ):
        assert dims_from_config(hf, architecture=architecture).family == family


def changed(layout: str, **changes: Any) -> dict[str, Any]:
    """A config with some values of the language model, or of `vision`, changed or taken out."""
    made = config("tiny", layout)
    inner = made[INNER[layout]]
    for key, value in changes.items():
        section = made["vision_config"] if key.startswith("vision_") else inner
        section[key.removeprefix("vision_")] = value
        if value is None:
            del section[key]
    return made


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        ({}, "model_type is 'None'; 'internvl_chat' or 'internvl' was expected"),
        ({"model_type": "qwen2_vl"}, "model_type is 'qwen2_vl'"),
        ({"model_type": "internvl_chat"}, "llm_config.architectures is missing"),
        ({"model_type": "internvl", "text_config": []}, "text_config is no object"),
        (changed("custom", architectures=["Gemma2ForCausalLM"]), "is 'Gemma2ForCausalLM'"),
        (changed("custom", architectures=[], model_type=None), "architectures is missing"),
        (changed("hf", model_type="gemma2"), "text_config.model_type is 'gemma2'"),
        (changed("hf", num_key_value_heads=3), "is 4, which num_key_value_heads, 3, does not"),
        (changed("hf", hidden_size=65), "hidden_size is 65, which num_attention_heads, 4, does"),
        (changed("hf", num_hidden_layers=-1), "num_hidden_layers is -1; a whole number"),
        (changed("hf", num_hidden_layers=10**9), "num_hidden_layers is 1000000000; a whole"),
        (changed("hf", num_hidden_layers="3"), "num_hidden_layers is '3'; a whole number"),
        (changed("hf", num_attention_heads=True), "num_attention_heads is True; a whole"),
        (changed("hf", vision_attention_bias=1), "vision_config.attention_bias is 1; true or"),
        (changed("hf", vision_norm_type="group"), "norm_type is 'group'; layer_norm or rms_norm"),
        (changed("hf", attention_bias="no"), "text_config.attention_bias is 'no'; true or false"),
    ],
)
def test_configs_that_are_refused(made, expected):
    text = message(lambda: dims_from_config(made, where="some/config.json"))
    assert text.startswith("some/config.json: ")
    assert expected in text


def test_lists_of_dense_layers_that_are_none():
    made = config(MOE, "hf")
    made["text_config"]["mlp_only_layers"] = "1"
    assert "mlp_only_layers is no list of layers" in message(lambda: dims_from_config(made))


def test_configs_of_different_models():
    for layout in ("custom", "hf"):
        text = message(
            lambda layout=layout: dims_from_config(
                config("tiny", layout), architecture="Phi3ForCausalLM"
            )
        )
        assert "Phi3ForCausalLM" in text
        assert "configs of different models" in text


def test_what_hf_cannot_do_is_refused():
    made = config("tiny", "custom")
    check_config(made)
    check_config(config("tiny", "hf"))
    text = message(lambda: check_config({**made, "ps_version": "v1"}, "a/config.json"))
    assert text.startswith("a/config.json: ps_version is v1; the HF layout has only v2")
    del made["ps_version"]
    assert "ps_version is absent, which means v1" in message(lambda: check_config(made))


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_flags_of_a_written_config(layout):
    before = config("tiny", layout, tied=True)
    before |= {"use_llm_lora": 16} if layout == "custom" else {}
    kept = json.dumps(before)
    after = config_fixes(before, layout)
    inner = INNER[layout]
    assert after["tie_word_embeddings"] is False
    assert after[inner]["tie_word_embeddings"] is False
    assert json.dumps(before) == kept
    assert config_layout(after) == layout
    if layout == "custom":
        assert (after["use_llm_lora"], after["use_backbone_lora"]) == (0, 0)
        after |= {"use_llm_lora": 16, "use_backbone_lora": 0}
    after["tie_word_embeddings"] = after[inner]["tie_word_embeddings"] = True
    assert after == before


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"rope_theta": 1e6, "rope_type": "default"}, None),
        ({"rope_theta": 1e6}, None),
        (
            {"rope_theta": 1e6, "rope_type": "dynamic", "type": "dynamic", "factor": 2.0},
            {"type": "dynamic", "factor": 2.0},
        ),
        ({"rope_theta": 1e6, "type": "linear", "factor": 2.0}, {"type": "linear", "factor": 2.0}),
        (
            {"rope_theta": 1e6, "rope_type": "yarn", "factor": 32.0, "truncate": False},
            {"rope_type": "yarn", "factor": 32.0, "truncate": False},
        ),
    ],
)
@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_rotary_settings_of_transformers_5_are_written_back(layout, parameters, expected):
    made = changed(layout, rope_theta=None, rope_scaling=None, rope_parameters=parameters)
    inner = config_fixes(made, layout)[INNER[layout]]
    assert inner["rope_theta"] == 1e6
    assert inner.get("rope_scaling") == expected
    # transformers 5 still reads what it wrote.
    read = transformers.Qwen2Config(**inner).rope_parameters
    assert read["rope_theta"] == 1e6
    assert read["rope_type"] == (expected or {"type": "default"}).get("type", "yarn")


def test_rotary_settings_that_are_there_are_kept():
    made = changed("hf", rope_parameters={"rope_theta": 5.0, "rope_type": "default"})
    inner = config_fixes(made, "hf")["text_config"]
    assert inner["rope_theta"] == 10000.0
    made = changed("hf", rope_parameters={"full_attention": {"rope_theta": 5.0}})
    assert "differ between kinds of layers" in message(lambda: config_fixes(made, "hf"))
