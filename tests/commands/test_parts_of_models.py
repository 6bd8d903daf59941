"""R1: adapters that peft trained on a part of the model, in either layout, merged into the whole.

peft wraps the part alone, so names begin where the part begins. What the whole model is then in exact
arithmetic says `peft_cases.exact_weights` of the part; `folders` carries it to the other layout.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import reference
import torch
from adapters import flat_name
from folders import OTHER, carried, make, put, settings_of
from marks import PEERS
from models import custom_model, hf_model
from peft_cases import (
    adapted,
    assert_exact,
    configure,
    edited,
    exact_weights,
    fill,
    raises,
    save_adapter,
)
from presets import PRESETS
from reference import double, read

from streamshard import merge_lora

pytestmark = PEERS

# Layout, the part's name in the model that runs, and a configuration of peft for it.
PARTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("custom", "vision_model", {"target_modules": ["attn.qkv", "mlp.fc1"]}),
    "vit-encoder": ("custom", "vision_model.encoder", {"target_modules": ["attn.qkv", "fc2"]}),
    "vit-dora": ("custom", "vision_model", {"target_modules": ["qkv", "fc1"], "use_dora": True}),
    "vit-biases": ("custom", "vision_model", {"target_modules": ["attn.qkv"], "bias": "all"}),
    "vit-lora-bias": ("custom", "vision_model", {"target_modules": ["fc1"], "lora_bias": True}),
    "vit-patches": ("custom", "vision_model", {"target_modules": ["patch_embedding", "fc1"]}),
    "vit-pattern": (
        "custom",
        "vision_model",
        {"target_modules": ["fc1", "fc2"], "rank_pattern": {"encoder.layers.1.mlp.fc1": 2}},
    ),
    "hf-vit": ("hf", "model.vision_tower", {"target_modules": ["attention.q_proj", "fc1"]}),
    "hf-vit-encoder": ("hf", "model.vision_tower.encoder", {"target_modules": ["q_proj"]}),
    "projector": ("custom", "mlp1", {"target_modules": ["1", "3"]}),
    "hf-projector": ("hf", "model.multi_modal_projector", {"target_modules": ["linear_1"]}),
    "llm": (
        "custom",
        "language_model",
        {"target_modules": ["v_proj", "lm_head", "wqkv", "output"]},
    ),
    "llm-saved": (
        "custom",
        "language_model",
        {
            "target_modules": ["v_proj", "wqkv"],
            "modules_to_save": ["lm_head", "embed_tokens", "tok_embeddings", "output"],
        },
    ),
    "llm-rows": (
        "custom",
        "language_model",
        {"target_modules": ["v_proj"], "trainable_token_indices": {"embed_tokens": [3, 4, 250]}},
    ),
    "llm-without-head": ("custom", "language_model.model", {"target_modules": ["v_proj", "w1"]}),
    "hf-llm-without-head": (
        "hf",
        "model.language_model",
        {"target_modules": ["layers.1.self_attn.q_proj", "layers.1.mlp.up_proj"]},
    ),
    "hf-without-head": ("hf", "model", {"target_modules": ["q_proj", "fc1", "linear_2"]}),
    "experts": (
        "custom",
        "language_model",
        {"target_modules": ["v_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
    ),
    "experts-without-head": (
        "hf",
        "model.language_model",
        {
            "target_modules": [],
            "target_parameters": ["experts.down_proj", "experts.gate_up_proj"],
        },
    ),
}
FAMILY = {"llm-without-head": "tiny-internlm2", "hf-vit": "tiny-internlm2"} | dict.fromkeys(
    ("experts", "experts-without-head"), "tiny-qwen3-moe"
)


def model_of(preset: Any, layout: str) -> Any:
    settings = settings_of(preset, layout)
    return fill(
        hf_model(settings) if layout == "hf" else custom_model(settings, preset.image_token)
    )


def on_disk(name: str, layout: str) -> str:
    return flat_name(name) if layout == "hf" else name


def unpacked(tensors: dict[str, Any]) -> dict[str, Any]:
    """Experts one by one, as files have them."""
    found = {}
    for name, tensor in tensors.items():
        stem, _, last = name.rpartition(".")
        if not (stem.endswith(".experts") and len(tensor.shape) == 3):
            found[name] = tensor
            continue
        for e, matrix in enumerate(tensor):
            halves = matrix.chunk(2) if last == "gate_up_proj" else [matrix]
            parts = ("gate", "up") if len(halves) == 2 else ("down",)
            for part, rows in zip(parts, halves, strict=True):
                found[f"{stem}.{e}.{part}_proj.weight"] = rows
    return found


def trained(folder: Path, kind: str) -> tuple[Any, str, dict[str, Any], dict[str, Any], Path]:
    """Preset and layout of a model, its tensors before and after in fp64, and the adapter's folder."""
    layout, part, config = PARTS[kind]
    preset = PRESETS[FAMILY.get(kind, "tiny")]
    model = model_of(preset, layout)
    before = {
        on_disk(n, layout): torch.from_numpy(double(t)) for n, t in model.state_dict().items()
    }
    wrapped = adapted(model.get_submodule(part), **config)
    after = before | {
        on_disk(f"{part}.{n}", layout): torch.from_numpy(v)
        for n, v in exact_weights(wrapped).items()
    }
    adapter = save_adapter(folder / "adapter", wrapped, save_embedding_layers=False)
    return preset, layout, unpacked(before), unpacked(after), adapter


WRAPPERS: dict[str, Callable[[str], str]] = {
    "ddp": lambda key: f"module.{key}",
    "compiled": lambda key: key.replace("base_model.model.", "base_model.model._orig_mod.", 1),
    "no-prefix": lambda key: key.removeprefix("base_model.model."),
    "twice": lambda key: f"base_model.model.{key}",
    "lightning": lambda key: f"model.{key}",
}


@pytest.mark.parametrize("same", [True, False], ids=["same", "other"])
@pytest.mark.parametrize("kind", PARTS)
def test_R1_an_adapter_of_a_part(kind, same, tmp_path):
    preset, layout, before, after, adapter = trained(tmp_path, kind)
    home = layout if same else OTHER[layout]
    if not same:
        before, after = (carried(t, preset, home) for t in (before, after))
    base = put(make(tmp_path / "base", preset, home), {n: t.float() for n, t in before.items()})
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    exact = {name: tensor.numpy() for name, tensor in after.items()}
    assert_exact(read(tmp_path / "out"), read(base), exact)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("kind", ["vit", "hf-vit", "llm", "projector"])
def test_R1_with_words_of_training(kind, wrapper, tmp_path):
    preset, layout, before, after, adapter = trained(tmp_path, kind)
    change = WRAPPERS[wrapper]
    edited(adapter, lambda content: {change(key): t for key, t in content.items()})
    base = put(make(tmp_path / "base", preset, layout), {n: t.float() for n, t in before.items()})
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    exact = {name: tensor.numpy() for name, tensor in after.items()}
    assert_exact(read(tmp_path / "out"), read(base), exact)


SPELLINGS = {
    "flat": ("language_model.lm_head.", "language_model.model.", ""),
    "nested": ("lm_head.", "model.language_model.", "model."),
    "hybrid": ("language_model.lm_head.", "model.language_model.model.", "model."),
    "mid": ("lm_head.", "language_model.model.", ""),
    "short": ("lm_head.", "language_model.", ""),
}


@pytest.mark.parametrize("around", ["", "_orig_mod.", "module."])
@pytest.mark.parametrize("kind", ["llm", "hf-vit-encoder", "hf-llm-without-head"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_R1_bases_of_every_spelling(spelling, kind, around, tmp_path):
    """As versions of transformers wrote them, and as trainings left them: their words are taken off."""
    preset, layout, before, after, adapter = trained(tmp_path, kind)
    if layout == "custom":
        before, after = (carried(t, preset, "hf") for t in (before, after))

    def spelled(name: str) -> str:
        head, llm, vision = SPELLINGS[spelling]
        for old, new in (("language_model.lm_head.", head), ("language_model.model.", llm)):
            if name.startswith(old):
                return new + name.removeprefix(old)
        return vision + name

    before, after = ({spelled(n): t.float() for n, t in each.items()} for each in (before, after))
    base = put(make(tmp_path / "base", preset, "hf"), {around + n: t for n, t in before.items()})
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    exact = {name: tensor.numpy() for name, tensor in after.items()}
    assert_exact(read(tmp_path / "out"), before, exact)


@pytest.mark.parametrize("kind", ["llm", "vit", "hf-vit"])
def test_R1_bases_that_are_the_part(kind, tmp_path):
    """The other way round: trained on the whole, merged into the part alone."""
    layout, part, config = PARTS[kind]
    preset = PRESETS["tiny"]
    model = model_of(preset, layout)
    wrapped = adapted(model, target_modules=rf"{part}\..*({'|'.join(config['target_modules'])})")
    exact = {n: v for n, v in exact_weights(wrapped).items() if n.startswith(f"{part}.")}
    exact = {n.removeprefix(f"{part}."): v for n, v in exact.items()}
    adapter = save_adapter(tmp_path / "adapter", wrapped, save_embedding_layers=False)
    (tmp_path / "base").mkdir()
    base = put(tmp_path / "base", model.get_submodule(part).state_dict())
    (base / "config.json").write_text(json.dumps({"model_type": "other"}))
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    assert_exact(read(tmp_path / "out"), read(base), exact)


class Towers(torch.nn.Module):
    """Two parts whose modules have the same names, of the same sizes or of others."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        for name, width in zip(("left", "right"), widths, strict=False):
            layers = [torch.nn.ModuleDict({"fc": torch.nn.Linear(24, width)}) for _ in range(2)]
            self.add_module(name, torch.nn.ModuleDict({"layers": torch.nn.ModuleList(layers)}))


def towers(folder: Path, *widths: int) -> tuple[Path, Path, Any]:
    torch.manual_seed(5)
    model = Towers(*widths)
    wrapped = peft.get_peft_model(
        model.get_submodule("left"), peft.LoraConfig(r=2, target_modules=["fc"])
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapter = save_adapter(folder / "adapter", wrapped)
    (folder / "base").mkdir()
    put(folder / "base", Towers(*widths).state_dict())
    (folder / "base" / "config.json").write_text('{"model_type": "towers"}')
    return folder / "base", adapter, wrapped


def test_R1_two_parts_of_one_shape_are_refused_by_name(tmp_path):
    base, adapter, _ = towers(tmp_path, 20, 20)
    raises(
        tmp_path,
        "more than one way",
        "with leading 'left.'",
        "with leading 'right.'",
        "'left.layers.0.fc.weight'",
        base=base,
        adapter=adapter,
    )


def test_R1_of_two_parts_the_one_that_fits(tmp_path):
    base, adapter, _ = towers(tmp_path, 20, 28)
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    before, after = read(base), read(tmp_path / "out")
    changed = {n for n in before if not reference.same_tensor(before[n], after[n])}
    assert changed == {"left.layers.0.fc.weight", "left.layers.1.fc.weight"}


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_R1_names_of_two_parts_have_no_one_rewrite(layout, tmp_path):
    """ViT alone and projector alone in one file: no one model has these names."""
    _, part, config = PARTS["vit"]
    preset = PRESETS["tiny"]
    model = model_of(preset, "custom")
    adapter = save_adapter(tmp_path / "adapter", adapted(model.get_submodule(part), **config))
    other = save_adapter(
        tmp_path / "other", adapted(model.get_submodule("mlp1"), target_modules=["1"])
    )
    more = reference.load_file(other / "adapter_model.safetensors")
    edited(adapter, lambda content: content | more)
    base = make(tmp_path / "base", preset, layout)
    raises(tmp_path, "are not in the base", base=base, adapter=adapter)


def test_one_layer_is_no_part(tmp_path):
    """`self_attn.q_proj` of a model of one layer: which layer was trained would be a guess."""
    preset = PRESETS["tiny"]
    model = model_of(preset, "custom")
    layer = model.get_submodule("language_model.model.layers.0")
    adapter = save_adapter(tmp_path / "adapter", adapted(layer, target_modules=["q_proj"]))
    configure(adapter, task_type=None)
    raises(
        tmp_path, "not in the base", base=make(tmp_path / "base", preset, "custom"), adapter=adapter
    )
