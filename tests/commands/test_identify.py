"""Configs that leave out what is the default."""

from __future__ import annotations

import json
import shutil

import pytest
import transformers
from folders import OTHER, config_of, convert, edit, sparse, without_weights
from presets import PRESETS, tensor_shapes

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
