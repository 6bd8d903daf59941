"""Names of wrapped checkpoints, against the state dicts of models that peft wrapped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from marks import PEERS
from torch import nn

from streamshard.errors import AdapterError, InputError
from streamshard.lora.wrapped_names import Pair, unwrap
from streamshard.tensor_names import is_wrapped

peft = pytest.importorskip("peft")

pytestmark = PEERS


BACKBONE = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
LLM = ["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"]


def nested(**children: nn.Module) -> nn.Module:
    module = nn.Module()
    for name, child in children.items():
        module.add_module(name, child)
    return module


def model() -> nn.Module:
    """The names of an InternVLChatModel of one layer a side."""
    block = nested(
        attn=nested(qkv=nn.Linear(4, 12), proj=nn.Linear(4, 4)),
        mlp=nested(fc1=nn.Linear(4, 8), fc2=nn.Linear(8, 4)),
        norm1=nn.LayerNorm(4),
    )
    layer = nested(
        self_attn=nested(q_proj=nn.Linear(6, 6), v_proj=nn.Linear(6, 3)),
        mlp=nested(up_proj=nn.Linear(6, 9, bias=False)),
    )
    return nested(
        vision_model=nested(encoder=nested(layers=nn.ModuleList([block]))),
        mlp1=nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 6)),
        language_model=nested(
            model=nested(embed_tokens=nn.Embedding(10, 6), layers=nn.ModuleList([layer])),
            lm_head=nn.Linear(6, 10, bias=False),
        ),
    )


def wrap(whole: nn.Module, child: str, name: str = "default", **config: Any) -> nn.Module:
    settings = peft.LoraConfig(**({"r": 2} | config))
    setattr(whole, child, peft.get_peft_model(getattr(whole, child), settings, adapter_name=name))
    return whole


def both() -> nn.Module:
    whole = wrap(model(), "vision_model", target_modules=BACKBONE)
    return wrap(whole, "language_model", target_modules=LLM)


def old(names: Iterable[str]) -> list[str]:
    """The names as peft 0.6 and before had them."""
    return [name.replace(".base_layer.", ".") for name in names]


PLAIN = [*model().state_dict()]


@pytest.mark.parametrize("spelled", [list, old], ids=["base_layer", "old"])
@pytest.mark.parametrize("around", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_both_parts_wrapped(spelled, around):
    names = [around + name for name in spelled(both().state_dict())]
    assert is_wrapped(names)
    found = unwrap(names)
    assert [*found.base] == PLAIN
    assert {*found.pairs} == {
        *(f"vision_model.encoder.layers.0.{target}" for target in BACKBONE),
        *(f"language_model.model.layers.0.{target}" for target in LLM),
    }
    assert found.depths == {"vision_model": 1, "language_model": 1}
    assert not found.others
    assert not found.saved
    # Every given name is in one place, and each pair is that of its module.
    given = [*found.base.values(), *found.tensors.values()]
    assert sorted(given) == sorted(names)
    for module, pair in found.pairs.items():
        child, _, rest = module.partition(".")
        stem = f"{around}{child}.base_model.model.{rest}"
        assert pair == Pair(f"{stem}.lora_A.default.weight", f"{stem}.lora_B.default.weight")
    assert found.base["mlp1.1.weight"] == f"{around}mlp1.1.weight"


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        ({}, []),
        ({"use_dora": True}, ["a DoRA magnitude"]),
        ({"lora_bias": True}, ["a bias of lora_B"]),
        ({"target_modules": ["embed_tokens"]}, ["LoRA on an embedding"]),
    ],
    ids=["plain", "dora", "lora_bias", "embedding"],
)
def test_keys_are_those_of_the_adapter_file(config, kinds):
    """What PEFT itself would save, under the names of the whole model."""
    targets = {"target_modules": ["self_attn.q_proj", "self_attn.v_proj"]}
    whole = wrap(model(), "language_model", **(targets | config))
    saved = peft.get_peft_model_state_dict(whole.language_model, save_embedding_layers=False)
    found = unwrap(whole.state_dict())
    assert {*found.tensors} == {
        key.replace("base_model.model.", "base_model.model.language_model.", 1) for key in saved
    }
    assert sorted({*found.others.values()}) == kinds


def test_the_whole_model_wrapped():
    whole = peft.get_peft_model(model(), peft.LoraConfig(r=2, target_modules=LLM))
    found = unwrap(whole.state_dict())
    assert [*found.base] == PLAIN
    assert found.depths == {"": 1}
    assert {*found.tensors} == {*peft.get_peft_model_state_dict(whole)}


def test_wrapped_twice():
    whole = wrap(both(), "language_model", target_modules=LLM)
    found = unwrap(whole.state_dict())
    assert [*found.base] == PLAIN
    assert found.depths == {"vision_model": 1, "language_model": 2}
    assert len(found.pairs) == 7


def test_what_is_no_pair_is_told_by_kind():
    whole = wrap(
        model(),
        "language_model",
        target_modules=["self_attn.q_proj", "embed_tokens"],
        modules_to_save=["lm_head"],
        use_dora=True,
    )
    found = unwrap(whole.state_dict())
    assert [*found.base] == PLAIN
    assert [*found.pairs] == ["language_model.model.layers.0.self_attn.q_proj"]
    head = "language_model.base_model.model.lm_head"
    assert found.base["language_model.lm_head.weight"] == f"{head}.original_module.weight"
    assert found.saved == {
        "language_model.lm_head.weight": f"{head}.modules_to_save.default.weight"
    }
    assert sorted({*found.others.values()}) == [
        "LoRA on an embedding",
        "a DoRA magnitude",
        "a fully trained module",
    ]


def test_trained_tokens():
    whole = wrap(
        model(),
        "language_model",
        target_modules=LLM,
        trainable_token_indices={"embed_tokens": [1, 2]},
    )
    found = unwrap(whole.state_dict())
    assert [*found.base] == PLAIN
    assert [*found.others.values()] == ["trained token rows"]


def test_several_adapters_are_asked_for():
    whole = wrap(model(), "language_model", target_modules=LLM)
    whole.language_model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["up_proj"]))
    names = [*whole.state_dict()]
    with pytest.raises(AdapterError, match="several adapters, 'default', 'other'"):
        unwrap(names)
    with pytest.raises(AdapterError, match="no adapter named 'third', but 'default', 'other'"):
        unwrap(names, "third")
    assert len(unwrap(names, "default").pairs) == 3
    found = unwrap(names, "other")
    assert [*found.pairs] == ["language_model.model.layers.0.mlp.up_proj"]
    assert [*found.base] == PLAIN


def test_of_a_plain_model_there_is_nothing_to_tell():
    assert not is_wrapped(PLAIN)
    found = unwrap(PLAIN)
    assert found.base == dict(zip(PLAIN, PLAIN, strict=True))
    assert not found.pairs
    assert not found.depths


@pytest.mark.parametrize("side", ["A", "B"])
def test_a_lone_factor(side):
    names = [*both().state_dict()]
    lone = next(name for name in names if f".lora_{side}." in name)
    names.remove(lone)
    partner = lone.replace(f"lora_{side}", {"A": "lora_B", "B": "lora_A"}[side])
    with pytest.raises(AdapterError, match=partner):
        unwrap(names)


def test_two_names_of_one_tensor():
    names = [*both().state_dict()]
    name = next(name for name in names if ".base_layer." in name)
    with pytest.raises(InputError, match=r"are both 'vision_model.*attn.qkv.weight'"):
        unwrap([*names, name.replace(".base_layer.", ".")])
    with pytest.raises(InputError, match="are both"):
        unwrap([*names, "module." + names[0]])


@pytest.mark.parametrize("extra", ["", "base_model.model.base_model.model."])
def test_a_part_that_is_wrapped_in_some_names_only(extra):
    names = [*both().state_dict(), f"language_model.{extra}model.extra.weight"]
    with pytest.raises(InputError, match=r"model\.extra\.weight'.* not wrapped by PEFT equally"):
        unwrap(names)


def test_a_factor_of_an_unknown_kind_is_told_as_such():
    names = ["base_model.model.x.weight", "base_model.model.x.lora_new.default.a.b"]
    found = unwrap(names)
    assert found.others == {names[1]: "of an unknown kind of LoRA"}
    assert found.tensors == {"base_model.model.x.lora_new.a.b": names[1]}
