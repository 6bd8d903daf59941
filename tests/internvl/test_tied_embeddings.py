"""Embedding and head: one tensor or two."""

from __future__ import annotations

import json

import pytest
import torch
from models import TINY, TORCH, config, dims, hf_model, lazy, message, shapes_of
from presets import tensor_shapes
from safetensors.torch import load_file

from streamshard.internvl.detection import detect
from streamshard.internvl.layouts import to_custom, to_hf
from streamshard.internvl.model_config import Dims, dims_from_config
from streamshard.internvl.tied_embeddings import embedding_and_head, tied_names


@pytest.mark.parametrize("preset", TINY)
def test_a_tied_head_becomes_one_of_its_own(preset):
    hf = lazy(preset, "hf", tied=True)
    made = to_custom(hf, dims(preset, "hf", tied=True))
    assert shapes_of(made) == tensor_shapes(preset, "custom")
    internlm2 = preset == "tiny-internlm2"
    head = "language_model.output.weight" if internlm2 else "language_model.lm_head.weight"
    assert made[head] == hf["language_model.model.embed_tokens.weight"]
    # Both are written on the way back, as an untied checkpoint has them.
    assert shapes_of(to_hf(made, dims(preset))) == tensor_shapes(preset, "hf")


def test_a_head_that_is_stored_is_kept_though_tied():
    hf = lazy("tiny", "hf")
    made = to_custom(hf, dims("tiny", "hf", tied=True))
    assert made["language_model.lm_head.weight"] == hf["language_model.lm_head.weight"]


@pytest.mark.parametrize("preset", ["tiny", "tiny-internlm2"])
def test_a_head_is_never_invented(preset):
    hf = lazy(preset, "hf", tied=True)
    for made in (dims(preset, "hf"), Dims(dims(preset).family, heads=4, kv_heads=2, head_dim=16)):
        text = message(lambda made=made: to_custom(hf, made))
        assert "missing in the HF layout" in text
        assert "'language_model.lm_head.weight'" in text
        assert "a head is never invented" in text
    custom = lazy("tiny", "custom")
    del custom["language_model.lm_head.weight"]
    assert "'language_model.lm_head.weight'" in message(lambda: to_hf(custom, dims("tiny")))


def test_a_tied_embedding_is_not_invented_either():
    hf = lazy("tiny", "hf", tied=True)
    del hf["language_model.model.embed_tokens.weight"]
    text = message(lambda: to_custom(hf, dims("tiny", "hf", tied=True)))
    assert "missing" in text
    assert "'language_model.model.embed_tokens.weight'" in text


@pytest.mark.parametrize(
    ("outer", "inner", "tied"),
    [
        (True, True, True), (True, False, True), (True, None, True),
        (None, True, True), (None, False, True), (None, None, True),
        (False, True, True), (False, False, False), (False, None, False),
    ],
)  # fmt: skip
def test_what_the_flags_say_of_an_absent_head(outer, inner, tied):
    made = config("tiny", "hf")
    del made["tie_word_embeddings"], made["text_config"]["tie_word_embeddings"]
    made |= {} if outer is None else {"tie_word_embeddings": outer}
    made["text_config"] |= {} if inner is None else {"tie_word_embeddings": inner}
    assert dims_from_config(made).tied is tied


def test_what_transformers_leaves_out_when_tied(tmp_path):
    settings = {**config("tiny", "hf", tied=True), "dtype": "float32"}
    model = hf_model(settings)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == tensor_shapes("tiny", "hf", tied=True).keys()
    made = dims_from_config(json.loads((tmp_path / "config.json").read_text()))
    head = to_custom(saved, made, TORCH)["language_model.lm_head.weight"]
    assert torch.equal(head, saved["language_model.model.embed_tokens.weight"])


def test_the_names_of_both():
    names = lazy("tiny-internlm2", "custom")
    assert embedding_and_head(names) == (
        "language_model.model.tok_embeddings.weight",
        "language_model.output.weight",
    )
    assert embedding_and_head(["lm_head.weight"]) == (None, "lm_head.weight")
    # A projection deep in a layer may be called output, too.
    assert (
        embedding_and_head(["l.0.attention.output.weight", "m.output.weight"])[1]
        == "m.output.weight"
    )


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "absent"])
@pytest.mark.parametrize("tied", [True, False])
def test_what_a_config_ties(tied, stored):
    stated, names = config("tiny", "hf", tied=tied), lazy("tiny", "hf", tied=not stored)
    embedding, head = embedding_and_head(names)
    found = tied_names(embedding, head, stated, lambda: detect(names, stated))
    both = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
    assert found == (both if tied else None)


def test_a_custom_model_never_ties():
    stated, names = config("tiny", "custom", tied=True), lazy("tiny", "custom")
    assert tied_names(*embedding_and_head(names), stated, lambda: detect(names, stated)) is None
    assert tied_names(*embedding_and_head(names), None, lambda: detect(names)) is None
