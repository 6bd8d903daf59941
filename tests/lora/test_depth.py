"""S11 and R7: which configs choose layers, and which are of adapters for a base of fewer layers.

peft says what a config selects: adapters are made by it, on a model of two layers and of three.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from marks import PEERS
from peft_cases import (
    adapted,
    assert_as_peft,
    fill,
    language_model,
    raises,
    save_adapter,
    save_base,
)
from reference import read, same_tensor

from streamshard import merge_lora
from streamshard.lora.selection import Selection, read_selection

pytestmark = PEERS


class Block(torch.nn.Module):
    """Modules whose names have digits, as InternLM2, InternViT and projectors have them."""

    def __init__(self) -> None:
        super().__init__()
        self.w1 = torch.nn.Linear(24, 20)
        self.fc2 = torch.nn.Linear(20, 24)
        self.mlp1 = torch.nn.Sequential(torch.nn.LayerNorm(24), torch.nn.Linear(24, 24))
        self.linear_1 = torch.nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear_1(self.mlp1(self.fc2(self.w1(x))))


class Stack(torch.nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(90, 24)
        self.layers = torch.nn.ModuleList(Block() for _ in range(depth))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return x


# What a config says of layers, of a model of two layers: nothing ...
ANY: dict[str, dict[str, Any]] = {
    "fc2": {"target_modules": ["fc2"]},
    "w1": {"target_modules": ["w1"]},
    "mlp1.1": {"target_modules": ["mlp1.1"]},
    "linear_1": {"target_modules": ["linear_1"]},
    "pattern": {"target_modules": r".*\.(w1|fc2)"},
    "pattern-any-number": {"target_modules": r".*layers\.\d+\.(w1|fc2)"},
    "pattern-counted": {"target_modules": r"layers\.[0-9]{1,2}\.fc2"},
    "pattern-look": {"target_modules": r"^(?!vision)layers(?=\.).*\.(w1|linear_1)$"},
    "all-linear": {"target_modules": r".*(w1|fc2|mlp1\.1|linear_1)"},
    "excluded-elsewhere": {"target_modules": ["w1"], "exclude_modules": ["fc2"]},
    "rank-of-a-layer": {"target_modules": ["w1"], "rank_pattern": {"layers.1.w1": 3}},
    "saved-elsewhere": {"target_modules": ["w1"], "modules_to_save": ["embed"]},
}
# ... or which.
CHOSEN: dict[str, dict[str, Any]] = {
    "full-names": {"target_modules": ["layers.0.w1", "layers.1.fc2"]},
    "ends": {"target_modules": ["0.w1", "1.w1"]},
    "pattern": {"target_modules": r"layers\.(0|1)\.w1"},
    "pattern-class": {"target_modules": r".*\.[01]\.(w1|fc2)"},
    "pattern-look": {"target_modules": r"^(?!layers\.2)layers.*\.fc2"},
    "layers": {"target_modules": ["w1"], "layers_to_transform": [0, 1], "layers_pattern": "layers"},
    "excluded": {"target_modules": ["w1"], "exclude_modules": ["layers.2.w1"]},
    "excluded-pattern": {"target_modules": ["w1"], "exclude_modules": r"layers\.[2-9]\..*"},
}


class Wrapped(torch.nn.Module):
    """`layers_to_transform` wants something before `layers`."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.model = Stack(depth)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model(tokens)


@pytest.mark.parametrize("config", ANY.values(), ids=ANY)
def test_S11_a_digit_in_a_name_is_no_layer(config, tmp_path):
    adapter = save_adapter(tmp_path / "adapter", adapted(Stack(2), **config))
    deep = save_base(tmp_path / "deep", fill(Stack(3)))
    raises(tmp_path, "3 layers", "does not choose layers", base=deep, adapter=adapter)
    base = save_base(tmp_path / "base", fill(Stack(2)))
    assert merge_lora(base=base, adapter=adapter, output=tmp_path / "out")["warnings"] == []


@pytest.mark.parametrize("config", CHOSEN.values(), ids=CHOSEN)
def test_S11_layers_that_a_config_chooses(config, tmp_path):
    """By peft the same config adapts two of three layers: that is what was trained."""
    made = Wrapped if "layers_to_transform" in config else Stack
    wrapped = adapted(fill(made(3)), **config)
    adapter = save_adapter(tmp_path / "adapter", wrapped)
    base = save_base(tmp_path / "base", fill(made(3)))
    report = merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    assert report["warnings"] == []
    before, after = read(base), read(tmp_path / "out")
    assert_as_peft(tmp_path / "out", wrapped)
    for name, tensor in after.items():
        assert same_tensor(tensor, before[name]) or ".2." not in name


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16}
UP = "mlp.experts.gate_up_proj"


def test_R7_fused_parameters_choose_layers(tmp_path):
    model = language_model("qwen3_moe", num_hidden_layers=3, **MOE)
    config = {"target_modules": [], "target_parameters": [f"0.{UP}", f"layers.1.{UP}"]}
    adapter = save_adapter(tmp_path / "adapter", adapted(model, **config))
    report = merge_lora(
        base=save_base(tmp_path / "base", model), adapter=adapter, output=tmp_path / "out"
    )
    assert report["merged"] == 2 * 4 * 2  # gate and up of four experts each
    assert report["warnings"] == []


@pytest.mark.parametrize("target", [UP, "experts.gate_up_proj"])
def test_R7_fused_parameters_of_every_layer_choose_none(target, tmp_path):
    shallow = language_model("qwen3_moe", num_hidden_layers=2, **MOE)
    wrapped = adapted(shallow, target_modules=[], target_parameters=[target])
    adapter = save_adapter(tmp_path / "adapter", wrapped)
    deep = save_base(tmp_path / "deep", language_model("qwen3_moe", num_hidden_layers=3, **MOE))
    raises(tmp_path, "3 layers", base=deep, adapter=adapter)


@pytest.mark.parametrize("depth", [2, 3])
def test_S11_all_linear_of_a_model_of_few_modules(depth, tmp_path):
    """PEFT lists their names in full then, which are those of layers that somebody chose, too."""
    shallow = language_model(num_hidden_layers=2)
    adapter = save_adapter(tmp_path / "adapter", adapted(shallow, target_modules="all-linear"))
    base = save_base(tmp_path / "base", language_model(num_hidden_layers=depth))
    report = merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    told = [warning for warning in report["warnings"] if "first 2 of the 3 layers" in warning]
    assert len(told) == (depth == 3)


@pytest.mark.parametrize(
    ("config", "taken"),
    [
        ({}, False),
        ({"target_modules": "all-linear"}, True),
        ({"target_modules": r"(?i)LAYERS.*"}, True),  # not understood, and no number in it
        ({"target_modules": r"(?i)layers\.0\..*"}, False),
        ({"target_modules": r"(?<=x)layers\.\d{1,2}\..*w1"}, True),
        ({"target_modules": None, "target_parameters": ["experts.w"]}, False),
        ({"target_modules": ["w1"], "modules_to_save": ["layers.2"]}, False),
        ({"target_modules": ["w1"], "layers_to_transform": 2}, True),
        ({"target_modules": ["w1"], "layers_to_transform": [1], "layers_pattern": "layers"}, False),
        ({"target_modules": ["w1"], "layers_to_transform": [2], "layers_pattern": ["h"]}, False),
        ({"target_modules": ["model.layers.2.w1"], "layers_to_transform": [1]}, True),
        ({"target_modules": {"odd": 1}, "layers_to_transform": "odd"}, False),
    ],
)
def test_S11_what_a_config_selects(config, taken):
    assert read_selection(config).takes("model.layers.2.w1") is taken


def test_a_pattern_that_would_take_forever_is_no_trap():
    assert Selection(targets=r"(a+)+$").takes("a" * 2000 + "b")
    assert not Selection(targets=r"(?:(?!z)a?){1000}c").takes("a" * 500 + "b")
