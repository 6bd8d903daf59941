"""Adapters of embeddings, heads and token rows, resized vocabularies, and tied embeddings."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import reference
import torch
from folders import config_of
from marks import PEERS, slow_but
from peft_cases import (
    adapted,
    assert_close,
    assert_distance,
    assert_exact,
    check,
    double,
    edited,
    exact_weights,
    fill,
    language_model,
    loaded,
    outputs,
    raises,
    save_adapter,
    save_base,
    trained,
)
from reference import read

from streamshard import merge_lora
from streamshard.errors import AdapterError

pytestmark = PEERS


# --- vocabularies ---------------------------------------------------------------------------------


LLM_CASES: dict[str, dict[str, Any]] = {
    "head-and-embedding": {"target_modules": ["lm_head", "embed_tokens", "q_proj"]},
    "head-saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "both-saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 159, 40]},
    "rows-by-module": {
        "target_modules": ["v_proj"],
        "trainable_token_indices": {"embed_tokens": [9, 5], "lm_head": [0, 159, 7]},
    },
    "dora-all-linear": {"target_modules": "all-linear", "use_dora": True},
    "bias-all": {"target_modules": ["q_proj", "down_proj"], "bias": "all"},
}


@pytest.mark.parametrize("config", LLM_CASES.values(), ids=LLM_CASES)
def test_a_language_model(config, tmp_path):
    """As saved by default: embeddings that are targets are in the file, under `base_layer`."""
    model = language_model()
    check(tmp_path, model, adapted(model, **config))
    keys = reference.load_file(tmp_path / "adapter" / "adapter_model.safetensors").keys()
    embeds = "embed_tokens" in config["target_modules"]
    assert any(key.endswith("base_layer.weight") for key in keys) == embeds
    assert config_of(tmp_path / "out") == config_of(tmp_path / "base")


def test_a_saved_base_embedding_replaces_that_of_the_base(tmp_path):
    """As peft does on loading: the weight under `base_layer`, then the update."""
    model = language_model()
    wrapped = adapted(model, target_modules=["lm_head", "embed_tokens"])
    adapter = save_adapter(tmp_path / "adapter", wrapped)
    other = language_model()
    with torch.no_grad():
        other.lm_head.weight.mul_(2)
        other.model.embed_tokens.weight.add_(0.5)
    base = save_base(tmp_path / "base", other)
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    assert_close(outputs(loaded(model, tmp_path / "out")), outputs(wrapped))
    peer = peft.PeftModel.from_pretrained(other, adapter)
    assert_close(outputs(peer), outputs(wrapped))


def test_copies_of_what_the_base_has_do_not_stand_in_the_way(tmp_path):
    """PEFT saves embedding and head beside their pairs; unchanged, they leave a sum a sum."""
    model = language_model()
    config = {"target_modules": ["embed_tokens", "lm_head"]}
    adapters = [adapted(model, std=0.02 * (i + 1), **config) for i in range(2)]
    paths = [save_adapter(tmp_path / str(i), each) for i, each in enumerate(adapters)]
    copies = {
        f"base_model.model.{name}.base_layer.weight" for name in ("model.embed_tokens", "lm_head")
    }
    assert copies <= reference.load_file(paths[0] / "adapter_model.safetensors").keys()
    plain = {name: double(tensor) for name, tensor in model.state_dict().items()}
    one, other = (exact_weights(each) for each in adapters)
    exact = {n: W + 0.5 * (one[n] - W) - 2 * (other[n] - W) for n, W in plain.items()}
    for dtype in ("F32", "BF16"):
        base = save_base(tmp_path / dtype, model, dtype)
        out = tmp_path / f"out-{dtype}"
        report = merge_lora(base=base, adapter=paths, weight=[0.5, -2], output=out)
        assert_exact(read(out), read(base), exact)
        assert all(set(said["inert"]) == copies for said in report["adapters"])
    raises(
        tmp_path,
        "`weight`",
        base=save_base(tmp_path / "other", trained(model)),
        adapter=paths,
        weight=[1, 2],
    )


@pytest.mark.parametrize("rows", [150, 170])
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens", "lm_head"]], ids=len)
def test_a_resized_vocabulary(targets, rows, tmp_path):
    model = language_model()
    resized = language_model()
    resized.resize_token_embeddings(rows)
    fill(resized)
    wrapped = adapted(resized, target_modules=targets)
    adapter = save_adapter(tmp_path / "adapter", wrapped, save_embedding_layers=True)
    base = save_base(tmp_path / "base", model)
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    assert_close(outputs(loaded(model, tmp_path / "out")), outputs(wrapped))
    assert config_of(tmp_path / "out") == config_of(base) | {"vocab_size": rows}
    assert read(tmp_path / "out")["lm_head.weight"].shape == (rows, 64)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_an_adapter_of_token_rows_alone(dtype, tmp_path):
    model = language_model()
    config = peft.TrainableTokensConfig(token_indices=[7, 3, 150], target_modules=["embed_tokens"])
    wrapped = trained(peft.get_peft_model(language_model(), config), 0.3)
    adapter = save_adapter(tmp_path / "adapter", wrapped)
    base = save_base(tmp_path / "base", model, dtype)
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    content, written = read(base), read(tmp_path / "out")
    assert_exact(written, content, exact_weights(wrapped))
    if dtype == "F32":
        assert_close(outputs(loaded(model, tmp_path / "out")), outputs(wrapped))


# --- tied embeddings --------------------------------------------------------------------------------

TIED: dict[str, tuple[dict[str, Any], bool]] = {
    "head": ({"target_modules": ["lm_head"]}, False),
    "embedding": ({"target_modules": ["embed_tokens"]}, False),
    "both-apart": ({"target_modules": ["embed_tokens", "lm_head"]}, False),
    "both-tied": (
        {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
        True,
    ),
    "saved-head": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
    "saved-embedding": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
    "saved-both": (
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
        False,
    ),
    "rows": ({"target_modules": ["q_proj"], "trainable_token_indices": [3, 9, 40]}, True),
    "neither": ({"target_modules": ["q_proj"]}, True),
    "dora-head": ({"target_modules": ["lm_head"], "use_dora": True}, False),
    "rows-and-head": ({"target_modules": ["lm_head"], "trainable_token_indices": [3, 9]}, False),
    "dora-tied": (
        {"target_modules": ["lm_head"], "use_dora": True, "ensure_weight_tying": True},
        False,
    ),
}


@pytest.mark.parametrize("both_stored", slow_but([False, True], False))
@pytest.mark.parametrize("case", TIED)
def test_tied_embeddings(case, both_stored, tmp_path):
    """The truth is what the adapted model computed; both sides are written once they differ."""
    config, stays_tied = TIED[case]
    model = language_model(tied=True)
    wrapped = adapted(model, **config)
    expected = outputs(wrapped)
    adapter = save_adapter(tmp_path / "adapter", wrapped)
    base = save_base(tmp_path / "base", model)
    if both_stored:
        content = read(base)
        content["lm_head.weight"] = content["model.embed_tokens.weight"].clone()
        reference.save_file(content, base / "model.safetensors", {"format": "pt"})
    report = merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    merged, info = type(model).from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not {kind: found for kind, found in info.items() if found}
    assert_close(outputs(merged), expected)
    written, exact = read(tmp_path / "out"), exact_weights(wrapped)
    if not (stays_tied and both_stored):  # then either flag is right
        assert config_of(tmp_path / "out")["tie_word_embeddings"] == stays_tied
    if stays_tied:
        assert (exact["lm_head.weight"] == exact["model.embed_tokens.weight"]).all()
        if "lm_head.weight" not in written:
            del exact["lm_head.weight"]
    else:
        assert "lm_head.weight" in written
    assert_exact(written, read(base), exact)
    if both_stored or stays_tied:
        assert_distance(report, written, read(base))


def test_rows_of_one_adapter_and_a_head_of_another(tmp_path):
    """The rows are the tied head's too, so that both change it."""
    model = language_model(tied=True)
    paths = [
        save_adapter(tmp_path / name, adapted(model, **TIED[name][0])) for name in ("rows", "head")
    ]
    raises(tmp_path, "lm_head.weight", base=save_base(tmp_path / "base", model), adapter=paths)


def test_tied_embeddings_and_a_resized_vocabulary(tmp_path):
    model, resized = language_model(tied=True), language_model(tied=True)
    resized.resize_token_embeddings(180)
    fill(resized)
    wrapped = adapted(resized, target_modules=["q_proj"])
    adapter = save_adapter(tmp_path / "adapter", wrapped, save_embedding_layers=True)
    merge_lora(base=save_base(tmp_path / "base", model), adapter=adapter, output=tmp_path / "out")
    assert_close(outputs(loaded(model, tmp_path / "out")), outputs(wrapped))
    assert config_of(tmp_path / "out")["vocab_size"] == 180


def test_tied_factors_that_are_not_transposes_are_refused(tmp_path):
    """With `ensure_weight_tying` both sides must have one update."""
    model = language_model(tied=True)
    config, _ = TIED["both-tied"]
    adapter = save_adapter(tmp_path / "adapter", adapted(model, **config))
    file = adapter / "adapter_model.safetensors"
    content = reference.load_file(file)
    content["base_model.model.lm_head.lora_A.weight"] *= 2
    reference.save_file(content, file, {"format": "pt"})
    base = save_base(tmp_path / "base", model)
    with pytest.raises(AdapterError, match="ensure_weight_tying"):
        merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- what one of embedding and head has for both of a tied model ----------------------------------


OF_BOTH: dict[str, dict[str, Any]] = {
    "lora-embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "lora-head": {"target_modules": ["q_proj", "lm_head"]},
    "dora-embedding": {"target_modules": ["embed_tokens"], "use_dora": True},
    "dora-head": {"target_modules": ["lm_head"], "use_dora": True},
    "lora-both": {"target_modules": ["embed_tokens", "lm_head"]},
    "head-saved": {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]},
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 149]},
    "rows-without-head": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 149]},
}


@pytest.mark.parametrize("rows", [150, 160, 170])
@pytest.mark.parametrize("kind", OF_BOTH)
def test_R3_S9_the_table_beneath_a_pair_is_that_of_both(kind, rows, tmp_path):
    """The model was tied, so the head has the saved table too, without the embedding's update."""
    base = language_model(tied=True)
    trained_on = language_model(tied=True)
    trained_on.resize_token_embeddings(rows)
    fill(trained_on)
    if rows == 160:
        with torch.no_grad():
            base.model.embed_tokens.weight.add_(0.25)
    wrapped = adapted(trained_on, **OF_BOTH[kind])
    adapter = save_adapter(tmp_path / "adapter", wrapped, save_embedding_layers=True)
    if kind == "rows-without-head":
        edited(adapter, lambda c: {k: t for k, t in c.items() if "lm_head" not in k})
    merge_lora(base=save_base(tmp_path / "base", base), adapter=adapter, output=tmp_path / "out")
    assert_close(outputs(loaded(trained_on, tmp_path / "out")), outputs(wrapped))
    assert config_of(tmp_path / "out")["vocab_size"] == rows


def test_S9_other_rows_of_the_head_that_the_file_lacks(tmp_path):
    model = language_model(tied=True)
    named = {"embed_tokens": [3, 149], "lm_head": [5]}
    wrapped = adapted(model, target_modules=["q_proj"], trainable_token_indices=named)
    adapter = save_adapter(tmp_path / "adapter", wrapped)
    edited(adapter, lambda c: {k: t for k, t in c.items() if "lm_head" not in k})
    raises(tmp_path, "incomplete", base=save_base(tmp_path / "base", model), adapter=adapter)
