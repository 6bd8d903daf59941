"""What a checkpoint is, asked once; and configs that leave out what is the default."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import transformers
from folders import OTHER, config_of, convert, edit, sparse, without_weights
from models import config, lazy, message
from presets import PRESETS, tensor_shapes

from streamshard.checkpoint.folder import Checkpoint
from streamshard.commands import identify
from streamshard.commands.identify import Model, architecture_of, dims_of

DEFAULTS = {
    "InternVL2-8B": transformers.LlamaConfig,
    "InternVL3-9B": transformers.LlamaConfig,
    "InternVL3_5-8B": transformers.Qwen3Config,
}


@pytest.mark.parametrize("weights", [True, False], ids=["weights", "config-only"])
@pytest.mark.parametrize("layout", ["custom", "hf"])
@pytest.mark.parametrize("preset", ["InternVL2-8B", "InternVL3-9B", "InternVL3_5-8B"])
def test_a_config_without_what_is_the_default(preset, layout, weights, tmp_path, monkeypatch):
    """As transformers 4 writes text configs: values of the config class are left out."""
    monkeypatch.setattr("streamshard.engine.plan.disk_free", lambda _: 10**15)
    made = {side: sparse(tmp_path / side, PRESETS[preset], side) for side in ("custom", "hf")}
    default = DEFAULTS[preset]().to_dict()
    config = config_of(made["hf"])
    text = config["text_config"]
    kept = {k: v for k, v in text.items() if k == "model_type" or default.get(k, ...) != v}
    assert "hidden_size" not in kept
    edit(made["hf"], lambda config: config.update(text_config=kept))
    if not weights:
        without_weights(made[layout])
    out = tmp_path / "out"
    report = convert(layout, made[OTHER[layout]], made[layout], out, dry_run=True)
    assert report["tensors"] == len(tensor_shapes(preset, layout))
    shutil.rmtree(tmp_path)


def test_transformers_reads_such_a_config(tmp_path):
    """So that the test above is about something that exists."""
    text = {"model_type": "llama", "vocab_size": 92553, "num_key_value_heads": 8}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "internvl", "text_config": text})
    )
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (config.text_config.num_attention_heads, config.text_config.hidden_size) == (32, 4096)


def model(preset: str, layout: str, **how) -> Model:
    names = lazy(preset, layout, **how)
    return Model(Checkpoint(Path("m"), names, {}, config(preset, layout, **how), {}))


@pytest.mark.parametrize("layout", ["custom", "hf"])
@pytest.mark.parametrize("preset", ["tiny", "tiny-internlm2", "tiny-qwen3-moe"])
def test_what_a_model_is(preset, layout):
    found = model(preset, layout)
    assert found.layout == found.detected.layout == layout
    assert found.dims.layers == PRESETS[preset].layers
    assert found.given(layout) == {name: name for name in found.tensors}
    assert set(found.embedding_and_head) <= set(found.tensors)
    assert found.tie is None


def test_every_question_is_asked_once(monkeypatch):
    asked = []

    def noted(name, answer):
        return lambda *given: asked.append(name) or answer(*given)

    for name in ("layout_of", "flat_names", "embedding_and_head", "tied_names", "detect"):
        monkeypatch.setattr(identify, name, noted(name, getattr(identify, name)))
    found = model("tiny", "hf", tied=True)
    for _ in range(2):
        assert found.tie == (
            "language_model.model.embed_tokens.weight",
            "language_model.lm_head.weight",
        )
        assert (found.layout, found.detected.spelling, len(found.given("hf"))) == (
            "hf",
            "flat",
            len(found.tensors),
        )
    assert sorted(asked) == [
        "detect",
        "embedding_and_head",
        "flat_names",
        "layout_of",
        "tied_names",
    ]


def test_a_model_is_a_value():
    found = model("tiny", "hf")
    with pytest.raises(TypeError):
        found.given("hf")["x"] = "y"


def test_what_hf_calls_llama_has_several_classes():
    hf = config("tiny-internlm2", "hf")
    assert architecture_of(config("tiny", "hf")) is None
    assert architecture_of(config("tiny-internlm2", "custom")) is None
    assert architecture_of(hf) == "LlamaForCausalLM"
    for name, family in (
        ("language_model.model.layers.0.attention.wqkv.weight", "internlm2"),
        ("language_model.output.weight", "internlm2"),
        ("language_model.model.layers.0.self_attn.q_proj.weight", "llama"),
    ):
        assert dims_of(hf, name).family == family
    assert "c.json: model_type is" in message(lambda: dims_of({}, where="c.json"))
