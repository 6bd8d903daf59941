"""HF names in the spellings of several versions of transformers."""

from __future__ import annotations

import pytest
from models import TINY, config, dims, lazy, message, shapes_of
from presets import SPELLINGS, tensor_shapes

from streamshard.errors import UsageError
from streamshard.internvl.detection import detect, layout_of
from streamshard.internvl.layouts import to_custom, to_hf
from streamshard.internvl.spelling import flat_name, spell


@pytest.mark.parametrize(
    "wrapper", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("preset", ["tiny", "tiny-internlm2", "tiny-qwen3-moe", "tiny-gpt-oss"])
def test_every_spelling_is_read(preset, spelling, wrapper):
    flat = lazy(preset, "hf")
    spelled = {wrapper + n: t for n, t in lazy(preset, "hf", spelling=spelling).items()}
    assert to_custom(spelled, dims(preset, "hf")) == to_custom(flat, dims(preset, "hf"))
    assert [flat_name(name) for name in spelled] == list(flat)
    found = detect(spelled, config(preset, "hf"))
    assert (found.layout, found.spelling, found.warnings) == ("hf", spelling, ())


def test_wrappers_within_names_are_removed():
    custom = lazy("tiny", "custom")
    wrapped = {
        "module." + n.replace("layers.", "layers._orig_mod.", 1): t for n, t in custom.items()
    }
    assert to_hf(wrapped, dims("tiny")) == to_hf(custom, dims("tiny"))
    assert layout_of(wrapped) == "custom"


@pytest.mark.parametrize("spelling", ["flat", "nested"])
@pytest.mark.parametrize("preset", TINY)
def test_spellings_that_are_written(preset, spelling):
    made = to_hf(lazy(preset, "custom"), dims(preset), spelling=spelling)
    assert shapes_of(made) == tensor_shapes(preset, "hf", spelling=spelling)


@pytest.mark.parametrize("spelling", ["hybrid", "mid", "short", "other"])
def test_spellings_that_are_not_written(spelling):
    with pytest.raises(UsageError, match="cannot be written; flat, nested can"):
        to_hf(lazy("tiny", "custom"), dims("tiny"), spelling=spelling)
    with pytest.raises(UsageError, match="cannot be written"):
        spell("lm_head.weight", spelling)


def test_the_head_that_upstream_misnames_is_read():
    hf = lazy("tiny", "hf", spelling="nested")
    hf["model.lm_head.weight"] = hf.pop("lm_head.weight")
    made = to_custom(hf, dims("tiny", "hf"))
    assert made["language_model.lm_head.weight"] == hf["model.lm_head.weight"]
    assert detect(hf).spelling == "mixed"


@pytest.mark.parametrize(
    ("name", "again"),
    [
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("language_model.lm_head.weight", "model.lm_head.weight"),
        ("language_model.model.norm.weight", "model.language_model.norm.weight"),
        ("vision_tower.embeddings.cls_token", "model.vision_tower.embeddings.cls_token"),
        ("multi_modal_projector.linear_1.bias", "module.multi_modal_projector.linear_1.bias"),
    ],
)
def test_two_spellings_of_one_tensor_are_refused(name, again):
    hf = lazy("tiny", "hf")
    hf[again] = hf[name]
    text = message(lambda: to_custom(hf, dims("tiny", "hf")))
    assert f"'{name}' and '{again}' are both '{name}'" in text
