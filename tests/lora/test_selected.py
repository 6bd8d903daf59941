"""Pairs in a file that its config does not select: peft drops them, and here they are merged and told.

peft itself says which pairs of a file it loads with a config.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
from make_checkpoint import write_adapter, write_checkpoint
from marks import PEERS
from peft_cases import adapted, language_model, save_adapter, save_base
from safetensors.numpy import load_file, save_file

from streamshard import merge_lora
from streamshard.lora.selection import read_selection
from streamshard.tensor_names import PREFIX

pytestmark = PEERS

ALL = ["q_proj", "v_proj", "up_proj", "lm_head"]
PAIRS = [
    *(f"model.layers.{n}.self_attn.{p}_proj" for n in range(2) for p in "qv"),
    *(f"model.layers.{n}.mlp.up_proj" for n in range(2)),
    "lm_head",
]

# What the config says instead of ALL, and the field that leaves something out.
NARROW: dict[str, tuple[dict[str, Any], str]] = {
    "list": ({"target_modules": ["q_proj", "lm_head"]}, "target_modules"),
    "names": ({"target_modules": [n for n in PAIRS if "1.mlp" not in n]}, "target_modules"),
    "ends": ({"target_modules": ["0.self_attn.q_proj", "v_proj", "lm_head"]}, "target_modules"),
    "pattern": ({"target_modules": r"model\..*\.(q|v)_proj"}, "target_modules"),
    "look": (
        {"target_modules": r"(?!.*up_proj)(?:model|lm_head).*(?:[qv]_proj|head)"},
        "target_modules",
    ),
    "other": ({"target_modules": ["k_proj"]}, "target_modules"),
    "excluded": ({"exclude_modules": ["lm_head"]}, "exclude_modules"),
    "excluded-pattern": ({"exclude_modules": r".*\.1\..*q_proj"}, "exclude_modules"),
    "layers": ({"layers_to_transform": [0]}, "layers_to_transform"),
    "layer": ({"layers_to_transform": 1, "layers_pattern": "layers"}, "layers_to_transform"),
}
SAME: dict[str, dict[str, Any]] = {
    "all": {},
    "more": {"target_modules": [*ALL, "k_proj", "no_such"]},
    "names": {"target_modules": PAIRS},
    "pattern": {"target_modules": r".*(q_proj|v_proj|up_proj|lm_head)"},
    "not-understood": {"target_modules": r"(?<!x)(?:.*\.)?(q_proj|v_proj|up_proj|lm_head)"},
    "excluded-others": {"exclude_modules": ["k_proj", "proj", "head"]},
}


def trained(folder: Path, config: dict[str, Any], **settings: Any) -> tuple[Any, Path]:
    """A model and an adapter with all pairs, whose config says something else of modules."""
    model = language_model()
    made = save_adapter(folder / "adapter", adapted(model, target_modules=ALL, **settings))
    file = made / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    return model, made


def loaded_by_peft(model: Any, folder: Path) -> set[str]:
    """The modules for which peft loads pairs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.PeftModel.from_pretrained(model, folder)
    modules = wrapped.get_base_model().named_modules()
    return {n for n, m in modules if isinstance(m, peft.tuners.lora.LoraLayer)} & {*PAIRS}


@pytest.mark.parametrize(("config", "field"), NARROW.values(), ids=NARROW)
def test_pairs_that_peft_would_drop_are_told(config, field, tmp_path):
    model, made = trained(tmp_path, config)
    base = save_base(tmp_path / "base", model)
    selection = read_selection(json.loads((made / "adapter_config.json").read_text()))
    left = {name: selection.leaves_out(name) for name in PAIRS}
    assert {name for name in PAIRS if not left[name]} == loaded_by_peft(model, made)
    assert {why for why in left.values() if why} == {field}
    dropped = [name for name in PAIRS if left[name]]
    report = merge_lora(base=base, adapter=made, output=tmp_path / "out")
    assert report["merged"] == len(PAIRS)
    (warning,) = report["warnings"]
    assert f"{len(dropped)} of {len(PAIRS)} modules that have pairs in the file" in warning
    assert dropped[0] in warning
    assert field in warning


@pytest.mark.parametrize("config", SAME.values(), ids=SAME)
def test_what_selects_everything_is_merged(config, tmp_path):
    model, made = trained(tmp_path, config)
    base = save_base(tmp_path / "base", model)
    assert loaded_by_peft(model, made) == {*PAIRS}
    report = merge_lora(base=base, adapter=made, output=tmp_path / "out")
    assert (report["merged"], report["warnings"]) == (len(PAIRS), [])


@pytest.mark.parametrize("pattern", [r"model\.language_model\..*_proj", "up_proj"])
def test_a_pattern_for_names_of_another_spelling_is_a_warning(pattern, tmp_path):
    """Trainers write patterns of whole names, which the writer of the tensors may spell otherwise."""
    model, made = trained(tmp_path, {"target_modules": pattern})
    report = merge_lora(
        base=save_base(tmp_path / "base", model), adapter=made, output=tmp_path / "out"
    )
    assert report["merged"] == len(PAIRS)
    (warning,) = report["warnings"]
    assert "a pattern that fits none of the modules" in warning


def test_full_names_may_be_spelled_otherwise_before_the_layer(tmp_path):
    names = [name.replace("model.", "model.language_model.") for name in PAIRS]
    model, made = trained(tmp_path, {"target_modules": names})
    base = save_base(tmp_path / "base", model)
    assert merge_lora(base=base, adapter=made, output=tmp_path / "out")["warnings"] == []


@pytest.mark.parametrize(
    ("config", "left"),
    [
        ({}, None),
        ({"target_modules": []}, None),
        ({"target_modules": "all-linear", "exclude_modules": "all-linear"}, None),
        ({"target_modules": ["up"], "exclude_modules": r"(?<!x).*up"}, None),  # not understood
        ({"target_modules": [], "target_parameters": ["experts.w"]}, "target_modules"),
        ({"target_modules": ["up"], "layers_to_transform": [3]}, None),  # of the expert
        ({"target_modules": ["up"], "layers_to_transform": [2, 4]}, "layers_to_transform"),
        ({"target_modules": ["up"], "layers_to_transform": [4], "layers_pattern": "[hl]"}, None),
        ({"target_modules": ["up"], "modules_to_save": ["experts"]}, "modules_to_save"),
        ({"target_modules": ["p"]}, "target_modules"),
    ],
)
def test_what_a_config_leaves_out(config, left):
    assert read_selection(config).leaves_out("model.layers.1.experts.3.up") == left


@pytest.mark.parametrize("pattern", [r"model\.layers\.\d+\..*_proj", r"language_model\..*_proj"])
def test_a_pattern_may_be_for_the_part_that_was_wrapped(pattern, tmp_path):
    """InternVL wraps its language model alone: a pattern is for names from there, or for whole ones."""
    base, made = tmp_path / "base", tmp_path / "adapter"
    write_checkpoint(base, "tiny", layout="custom")
    write_adapter(made, "tiny", layout="custom")
    file = made / "adapter_model.safetensors"
    named = {
        f"language_model.{PREFIX}{key.partition('language_model.')[2]}": values
        for key, values in load_file(file).items()
    }
    save_file(named, file)
    config = json.loads((made / "adapter_config.json").read_text())
    config["target_modules"] = pattern
    (made / "adapter_config.json").write_text(json.dumps(config))
    report = merge_lora(base=base, adapter=made, output=tmp_path / "out")
    assert (report["merged"], report["warnings"]) == (21, [])
