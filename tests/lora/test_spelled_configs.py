"""R12: values of a config that peft reads in another way than they stand there."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers
from marks import PEERS
from peft_cases import adapted, configure, fill, language_model, raises, save_adapter, save_base
from reference import read

from streamshard import merge_lora

pytestmark = PEERS


@pytest.mark.parametrize("name", ["Gaussian", "GAUSSIAN", "Orthogonal", "EVA", "MiCA", "mica"])
def test_R12_plain_initialisations_in_any_case(name, tmp_path):
    model = language_model()
    wrapped = adapted(model, target_modules=["q_proj"])
    adapter = save_adapter(tmp_path / "adapter", wrapped)
    configure(adapter, init_lora_weights=name)
    base = save_base(tmp_path / "base", model)
    report = merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    assert report["merged"] == 2


@pytest.mark.parametrize(
    "name", ["OLoRA", "PiSSA", "PISSA_niter_4", "pissa_niter_16", "CorDA", "LoftQ", "LoRA_GA"]
)
def test_R12_residual_bases_in_any_case(name, tmp_path):
    model = language_model()
    adapter = save_adapter(tmp_path / "adapter", adapted(model, target_modules=["q_proj"]))
    configure(adapter, init_lora_weights=name)
    base = save_base(tmp_path / "base", model)
    raises(tmp_path, name, "base_is_residual", base=base, adapter=adapter)
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out", base_is_residual=True)


def test_R12_olora_as_peft_trains_it(tmp_path):
    """peft takes the name in any case and changes the base; the residual base is what it leaves."""
    model = language_model()
    wrapped = adapted(model, target_modules=["q_proj"], init_lora_weights="OLoRA")
    adapter = save_adapter(tmp_path / "adapter", wrapped)
    residual = fill(language_model())
    with torch.no_grad():
        for name, module in wrapped.get_base_model().named_modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                residual.get_submodule(name).weight.copy_(module.base_layer.weight)
    base = save_base(tmp_path / "base", residual)
    raises(tmp_path, "OLoRA", base=base, adapter=adapter)
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out", base_is_residual=True)
    assert_merged(tmp_path / "out", wrapped)


@pytest.mark.parametrize("name", ["true", "kaiming", "", "pissa2x"])
def test_unknown_initialisations_stay_refused(name, tmp_path):
    model = language_model()
    adapter = save_adapter(tmp_path / "adapter", adapted(model, target_modules=["q_proj"]))
    configure(adapter, init_lora_weights=name)
    raises(tmp_path, "init_lora_weights", base=save_base(tmp_path / "base", model), adapter=adapter)


# --- fan_in_fan_out ---------------------------------------------------------------------------------


def gpt2() -> Any:
    config = transformers.GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=90, n_positions=32)
    model = transformers.GPT2LMHeadModel._from_config(config, attn_implementation="eager")
    return fill(model)


def assert_merged(out: Any, wrapped: Any) -> None:
    expected = wrapped.merge_and_unload().state_dict()
    for name, tensor in read(out).items():
        assert torch.allclose(tensor, expected[name], rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize("says", [False, True, None])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(
    "targets", [["c_attn"], ["c_attn", "c_fc"], ["mlp.c_proj"], ["attn.c_proj"], ["c_proj"]]
)
def test_R12_the_form_that_fits(targets, dora, says, tmp_path):
    """peft takes the form from the class, here Conv1D, whatever the config says.

    Of the square `attn.c_proj` the one of the MLP tells, also where it is not adapted.
    """
    model = gpt2()
    wrapped = adapted(model, target_modules=targets, fan_in_fan_out=True, use_dora=dora)
    adapter = save_adapter(tmp_path / "adapter", wrapped)
    configure(adapter, fan_in_fan_out=says)
    base = save_base(tmp_path / "base", model)
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    assert_merged(tmp_path / "out", wrapped)


@pytest.mark.parametrize("says", [False, True])
def test_R12_linear_layers_whatever_the_config_says(says, tmp_path):
    """`q_proj` and `o_proj` are square; the others, and biases of the base, are of linear layers."""
    model = language_model()
    wrapped = adapted(model, target_modules=["q_proj", "o_proj", "v_proj"])
    adapter = save_adapter(tmp_path / "adapter", wrapped)
    configure(adapter, fan_in_fan_out=says)
    merge_lora(base=save_base(tmp_path / "base", model), adapter=adapter, output=tmp_path / "out")
    assert_merged(tmp_path / "out", wrapped)


class Mixed(torch.nn.Module):
    """Square layers of both kinds, and others of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(90, 40)
        self.one = transformers.pytorch_utils.Conv1D(40, 40)
        self.two = torch.nn.Linear(40, 40)
        self.three = transformers.pytorch_utils.Conv1D(56, 40)
        self.four = torch.nn.Linear(56, 40)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.four(self.three(self.two(self.one(self.embed(tokens)))))


@pytest.mark.parametrize("targets", [["one"], ["two"], ["one", "two", "three", "four"]])
def test_square_layers_of_which_nothing_tells_are_refused(targets, tmp_path):
    adapter = save_adapter(tmp_path / "adapter", adapted(fill(Mixed()), target_modules=targets))
    base = save_base(tmp_path / "base", fill(Mixed()))
    raises(tmp_path, "fan_in_fan_out", "square", base=base, adapter=adapter)


class Apart(torch.nn.Module):
    """A square linear layer in a model whose other layers are all the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(90, 40)
        self.wide = transformers.pytorch_utils.Conv1D(56, 40)
        self.back = transformers.pytorch_utils.Conv1D(40, 56)
        self.fc = torch.nn.Linear(40, 40)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.fc(self.back(self.wide(self.embed(tokens))))


@pytest.mark.parametrize("targets", [["fc"], ["wide", "fc"]])
def test_other_layers_do_not_turn_what_the_config_says_is_not(targets, tmp_path):
    """The update was silently transposed: shapes of strangers were believed, the config was not."""
    adapter = save_adapter(tmp_path / "adapter", adapted(fill(Apart()), target_modules=targets))
    configure(adapter, fan_in_fan_out=False)
    base = save_base(tmp_path / "base", fill(Apart()))
    raises(tmp_path, "fan_in_fan_out is false", "'fc' are square", base=base, adapter=adapter)
