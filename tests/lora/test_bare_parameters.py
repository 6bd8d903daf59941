"""R5: names without a module in `target_parameters`, beside ordinary targets; and what peft ignores.

So peft writes configs of mixtures that were trained by transformers 4 names, with a pattern for the
rank of the fused pair. What is merged, peft says.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import trainer_models
from marks import PEERS
from peft_cases import adapted, configure, language_model, raises, save_adapter, save_base
from reference import read

import streamshard
from streamshard import merge_lora
from streamshard.lora.experts import Fused, parameter_names

pytestmark = PEERS

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16}
CONFIGS: dict[str, dict[str, Any]] = {
    "beside-attention": {
        "target_modules": ["q_proj", "o_proj"],
        "target_parameters": ["gate_up_proj", "down_proj"],
    },
    "with-its-rank": {
        "target_modules": ["v_proj"],
        "target_parameters": ["gate_up_proj", "down_proj"],
        "rank_pattern": {r".*\.gate_up_proj": 8},
        "alpha_pattern": {r".*\.gate_up_proj": 12},
    },
    "one": {"target_modules": ["v_proj"], "target_parameters": ["down_proj"]},
    "mixed": {"target_modules": [], "target_parameters": ["gate_up_proj", "experts.down_proj"]},
    "twice": {
        "target_modules": ["v_proj"],
        "target_parameters": ["down_proj", "mlp.experts.down_proj"],
    },
    # As peft itself writes it, given the names that transformers 4 had.
    "converted": {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
    "beside-saved": {
        "target_modules": ["q_proj"],
        "target_parameters": ["gate_up_proj"],
        "modules_to_save": ["lm_head"],
    },
}


@pytest.mark.parametrize("version", [True, False], ids=["stated", "not-stated"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_R5_bare_names_are_where_the_base_has_them(config, version, tmp_path):
    model = language_model("qwen3_moe", **MOE)
    wrapped = adapted(model, **config)
    adapter = save_adapter(tmp_path / "adapter", wrapped)
    if not version:
        configure(adapter, peft_version=...)
    base = save_base(tmp_path / "base", model)
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    merged = wrapped.merge_and_unload()
    expected = read(save_base(tmp_path / "expected", merged))
    written = read(tmp_path / "out")
    assert written.keys() == expected.keys()
    for name, tensor in written.items():
        assert torch.allclose(tensor, expected[name], rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("targets", [["gate_up_proj"], ["experts.gate_up_proj", "w13"]])
def test_R5_parameters_that_the_base_has_not(targets, tmp_path):
    """peft warns and trains the rest."""
    model = language_model()
    adapter = save_adapter(tmp_path / "adapter", adapted(model, target_modules=["q_proj"]))
    configure(adapter, target_parameters=targets)
    base = save_base(tmp_path / "base", model)
    report = merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    assert [w for w in report["warnings"] if f"target_parameters has '{targets[0]}'" in w]
    assert report["merged"] == 2


@pytest.mark.parametrize("target", ["gate_up_proj", "down_proj", "mlp.experts.down_proj"])
def test_R5_parameters_that_the_base_has_are_missed(target, tmp_path):
    model = language_model("qwen3_moe", **MOE)
    adapter = save_adapter(tmp_path / "adapter", adapted(model, target_modules=["q_proj"]))
    configure(adapter, target_parameters=[target])
    base = save_base(tmp_path / "base", model)
    raises(tmp_path, f"target_parameters has '{target}'", base=base, adapter=adapter)


def test_R5_by_names_alone():
    base = Fused(["model.layers.0.mlp.experts.0.gate_proj.weight", "model.layers.0.attn.q.weight"])
    names = ["layers.0.mlp.experts", "layers.0.attn.q"]
    assert parameter_names(names, ["gate_up_proj"], "a", base) == {names[0]: "gate_up_proj"}
    assert parameter_names(names, ["down_proj", "weight"], "a", base) == {}
    assert base.has_any("mlp.experts.gate_up_proj")
    assert base.has_any("model.layers.0.mlp.experts.gate_up_proj")
    assert not base.has_any("down_proj")


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_R5_live_models_with_packed_experts(kind, capsys):
    """As the docstring says: only the attention around packed experts gets LoRA."""
    model = trainer_models.model_of("tiny", "fp32")
    more = MOE if kind == "qwen3_moe" else {"num_local_experts": 4, "head_dim": 16}
    model.language_model = language_model(kind, **more)
    streamshard.wrap_llm_lora(model, r=2, lora_alpha=4)
    adapted_ones = {n.split(".lora_")[0] for n in model.state_dict() if ".lora_" in n}
    assert len(adapted_ones) == 2 * 4
    assert all(".self_attn." in name for name in adapted_ones)
    assert "trainable params: " in capsys.readouterr().out
