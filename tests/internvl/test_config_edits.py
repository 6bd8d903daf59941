"""`config.json`, changed: the rest stays as it is, and so does what was given."""

from __future__ import annotations

import copy

import pytest

from streamshard.internvl.config_edits import config_fixes, untied, with_dtype, with_vocabulary

CONFIG = {
    "torch_dtype": "bfloat16",
    "vocab_size": 10,
    "vision_config": {"torch_dtype": "float32", "vocab_size": 3},
    "llm_config": {"dtype": "bfloat16", "vocab_size": 10, "other": {"dtype": None}},
    "text_config": None,
}


@pytest.mark.parametrize(
    "change",
    [untied, lambda c: with_vocabulary(c, 5), lambda c: with_dtype(c, "float16"),
     lambda c: config_fixes(c, "custom")],
)  # fmt: skip
def test_what_is_given_stays(change):
    before = copy.deepcopy(CONFIG)
    change(CONFIG)
    assert before == CONFIG


def test_a_tie_is_denied_everywhere():
    found = untied(CONFIG)
    assert found["tie_word_embeddings"] is found["llm_config"]["tie_word_embeddings"] is False
    assert found["vision_config"] == CONFIG["vision_config"]


def test_a_vocabulary_is_set_where_there_is_one():
    found = with_vocabulary(CONFIG, 12)
    assert (found["vocab_size"], found["llm_config"]["vocab_size"]) == (12, 12)
    assert found["vision_config"]["vocab_size"] == 3
    assert "vocab_size" not in with_vocabulary({"llm_config": {}}, 12)["llm_config"]


def test_a_dtype_is_set_where_one_is_stated():
    found = with_dtype(CONFIG, "float16")
    assert found["torch_dtype"] == found["vision_config"]["torch_dtype"] == "float16"
    assert found["llm_config"]["dtype"] == "float16"
    assert found["llm_config"]["other"] == {"dtype": None}
    assert list(found) == list(CONFIG)


def test_flags_of_the_trainer_are_only_of_the_custom_layout():
    fixed = config_fixes(CONFIG | {"use_llm_lora": 8}, "custom")
    assert (fixed["use_llm_lora"], fixed["use_backbone_lora"]) == (0, 0)
    assert "use_llm_lora" not in config_fixes({"text_config": {}}, "hf")
