"""Telling by names what a checkpoint is."""

from __future__ import annotations

import re

import pytest
from models import NUMPY, TINY, config, dims, lazy, message
from presets import PRESETS

from streamshard.internvl.detection import Detected, detect, dims_from_names, layout_of
from streamshard.internvl.families import FAMILIES
from streamshard.internvl.layouts import to_hf
from streamshard.internvl.model_config import Dims
from streamshard.tensor_names import is_wrapped


@pytest.mark.parametrize("preset", TINY)
def test_detection_without_a_config(preset):
    family = dims(preset).family
    in_hf = "llama" if family.startswith("internlm") else family
    in_custom = "llama" if family == "internlm3" else family
    custom, hf = detect(lazy(preset, "custom")), detect(lazy(preset, "hf"))
    assert (custom.layout, custom.spelling, custom.family) == ("custom", None, in_custom)
    assert (hf.layout, hf.spelling, hf.family) == ("hf", "flat", in_hf)
    assert dims_from_names(list(lazy(preset, "custom")), "custom") == Dims(in_custom)
    assert not is_wrapped([*lazy(preset, "custom"), *lazy(preset, "hf")])
    for found in (custom, hf):
        assert not found.packed_experts
        assert not found.warnings
    assert custom.evidence == ("vision_model.embeddings.class_embedding",)


@pytest.mark.parametrize("layout", ["custom", "hf"])
@pytest.mark.parametrize("preset", TINY)
def test_detection_with_a_config(preset, layout):
    found = detect(lazy(preset, layout), config(preset, layout))
    architecture = FAMILIES[found.family or ""].architecture
    expected = PRESETS[preset].arch
    if layout == "hf" and expected.startswith("InternLM"):
        expected = "LlamaForCausalLM"
    assert (found.layout, architecture, found.warnings) == (layout, expected, ())


def test_detection_of_a_wrapped_checkpoint():
    names = {
        re.sub(r"^(language_model|vision_model)\.", r"\1.base_model.model.", name)
        for name in lazy("tiny-internlm2", "custom")
    }
    for stem in ("attention.wqkv", "attention.wo"):
        plain = f"language_model.base_model.model.model.layers.0.{stem}.weight"
        names.remove(plain)
        names.add(plain.replace(".weight", ".base_layer.weight"))
        names |= {plain.replace(".weight", f".lora_{x}.default.weight") for x in "AB"}
    found = detect(sorted(names), config("tiny-internlm2", "custom"))
    assert (found.layout, found.family) == ("custom", "internlm2")
    assert is_wrapped(names)
    assert not found.warnings
    text = message(lambda: to_hf(dict.fromkeys(names, 0), dims("tiny-internlm2"), NUMPY))
    assert "LoRA-wrapped training checkpoint: merge its pairs first" in text


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("mlp1.0.weight", "custom"),
        ("base_model.model.mlp1.1.weight", "custom"),
        ("vision_model.base_model.model.encoder.layers.0.attn.qkv.base_layer.weight", "custom"),
        ("base_model.model.vision_model.encoder.layers.0.attn.qkv.lora_A.weight", "custom"),
        ("base_model.model.model.vision_tower.encoder.layer.0.mlp.fc1.lora_B.weight", "hf"),
        ("base_model.model.multi_modal_projector.linear_1.weight", "hf"),
        ("module.model.multi_modal_projector.linear_1.weight", "hf"),
        ("language_model.model.vision_model.x", None),
        ("my_vision_model.x", None),
    ],
)
def test_names_that_tell_the_layout(name, layout):
    assert layout_of(["language_model.model.norm.weight", name]) == layout


def test_names_of_the_language_model_alone_prove_nothing():
    names = [name for name in lazy("tiny", "custom") if name.startswith("language_model.")]
    assert layout_of(names) is None
    text = message(lambda: detect(names))
    assert "language model do not tell the layout" in text
    assert "'language_model.model.embed_tokens.weight'" in text
    for layout in ("custom", "hf"):
        found = detect(names, config("tiny", layout))
        assert found.layout == layout
        assert found.evidence[0] == "config.json: model_type"


def test_both_layouts_are_refused():
    names = [*lazy("tiny", "custom"), "model.vision_tower.embeddings.cls_token"]
    both = ("'vision_model.embeddings.class_embedding' is of the custom layout and "
            "'model.vision_tower.embeddings.cls_token' of the HF layout")  # fmt: skip
    assert both in message(lambda: detect(names, config("tiny", "custom")))
    assert both in message(lambda: to_hf(dict.fromkeys(names, 0), dims("tiny"), NUMPY))
    assert layout_of(names) is None


def test_the_names_are_believed_against_the_config():
    found = detect(lazy("tiny", "custom"), config("tiny", "hf"))
    assert found.layout == "custom"
    assert "config.json is of the HF layout" in found.warnings[0]
    found = detect(lazy("tiny-qwen3", "hf"), config("tiny", "hf"))
    assert found.family == "qwen3"
    assert "language model is qwen2, but the names are those of qwen3" in found.warnings[0]


def test_names_of_no_family():
    names = [n.replace("mlp", "ffn") for n in lazy("tiny", "hf")]
    assert detect(names, config("tiny", "hf")).family is None
    assert "are not those of any of the families" in message(lambda: dims_from_names(names, "hf"))
    assert "there are 'a'. Give the state dict" in message(lambda: dims_from_names(["a"], "hf"))
    assert "there are none. Give the state dict" in message(lambda: dims_from_names([], "custom"))


def test_detection_is_a_value():
    assert detect(lazy("tiny", "hf")) == Detected(
        layout="hf",
        spelling="flat",
        family="qwen2",
        packed_experts=False,
        evidence=(
            "vision_tower.embeddings.cls_token",
            "language_model.model.embed_tokens.weight",
        ),
        warnings=(),
    )
