"""LoRA in live models."""

from __future__ import annotations

import peft
import pytest
import torch
import trainer_models
from marks import PEERS
from models import TINY
from peft_models import layers
from torch import nn

import streamshard
from streamshard.errors import InputError, UsageError

pytestmark = PEERS


@pytest.mark.parametrize("preset", [p for p in TINY if p != "tiny-internlm2"])
def test_live_models(preset, capsys):
    """The same modules, settings and initial values as the methods of InternVLChatModel give."""
    made = []
    for wrapped in (False, True):
        model = trainer_models.model_of(preset, "fp32")
        torch.manual_seed(4)
        if wrapped:
            streamshard.wrap_backbone_lora(model, r=3, lora_alpha=6)
            streamshard.wrap_llm_lora(model, r=4, lora_alpha=9, lora_dropout=0.1)
        else:
            trainer_models.wrap(model, preset, backbone=3)
            trainer_models.wrap(
                model, preset, llm=4, lora_alpha=9, lora_dropout=0.1, task_type="CAUSAL_LM"
            )
        made.append(model)
    expected, found = made
    assert capsys.readouterr().out.count("trainable params: ") == 2
    assert type(found.language_model) is type(expected.language_model) is peft.PeftModelForCausalLM
    assert type(found.vision_model) is peft.PeftModel
    for name, tensor in expected.state_dict().items():
        if "lora_" in name:
            assert torch.equal(tensor, found.state_dict()[name])
    assert found.state_dict().keys() == expected.state_dict().keys()
    for (name, one), (_, other) in zip(layers(expected), layers(found), strict=True):
        assert one.scaling == other.scaling, name
        assert one.lora_dropout["default"].p == other.lora_dropout["default"].p
    embedded = found.language_model.get_input_embeddings()(torch.tensor([1]))
    assert embedded.requires_grad  # as gradient checkpointing of frozen layers needs it


def test_live_defaults_are_those_of_upstream():
    model = trainer_models.model_of("tiny", "fp32")
    streamshard.wrap_llm_lora(model)
    config = model.language_model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (128, 256, 0.05)
    with pytest.raises(UsageError, match="wrapped by peft already"):
        streamshard.wrap_llm_lora(model)


def test_live_models_of_other_kinds(monkeypatch):
    with pytest.raises(UsageError, match="has no language_model"):
        streamshard.wrap_llm_lora(nn.Linear(1, 1))
    model = trainer_models.model_of("tiny", "fp32")
    model.llm_arch_name = "BertModel"
    with pytest.raises(InputError, match="is a BertModel; 'LlamaForCausalLM'"):
        streamshard.wrap_llm_lora(model)
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(UsageError, match=r"pip install 'peft>="):
        streamshard.wrap_backbone_lora(model)
