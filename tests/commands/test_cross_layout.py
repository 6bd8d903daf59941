"""Adapters and bases of different layouts, and merging with conversion in one pass.

Expected elements are computed in fp64 in the layout of the adapter (`reference`), on tensors
that `folders` carried over; models are judged by running them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import transformers
from adapters import HOME, adapter_of, carried_to, flat, respelled, rewritten, weights_of
from folders import (
    INNER,
    OTHER,
    as_custom,
    as_hf,
    assert_files_of_safetensors,
    assert_same,
    carried,
    config_of,
    convert,
    make,
    put,
    refused,
    settings_of,
)
from marks import PEERS
from models import custom_model, hf_model, load_custom, logits_of, scramble
from presets import PRESETS, Preset
from reference import digests, normal, read, same_tensor, save_adapter
from safetensors.torch import load_file

from streamshard import merge_lora
from streamshard.errors import AdapterError

peft = pytest.importorskip("peft")

pytestmark = PEERS


# Presets whose HF adapters have no pairs on packed experts.
DENSE = ["tiny", "tiny-6b-vit", "tiny-qwen3", "tiny-llama", "tiny-internlm2", "tiny-internlm3",
         "tiny-phi3"]  # fmt: skip


def assert_merged_as_there(
    base: Path, adapter: Path, written: Mapping[str, Any], preset: Preset, trained: str
) -> None:
    """What was written into a base of the other layout, compared in the adapter's layout."""
    content = carried(read(base), preset, trained)
    updates = reference.updates_of(adapter, home=HOME[trained])
    reference.assert_merged(carried(written, preset, trained), content, updates, equal=0.999)


# --- every family ---------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", ["hf", "custom"])
@pytest.mark.parametrize("name", DENSE)
def test_an_adapter_of_the_other_layout(name, trained, tmp_path):
    preset = PRESETS[name]
    base = make(tmp_path / "base", preset, OTHER[trained], max_shard_size="100KB")
    adapter = adapter_of(tmp_path / "adapter", preset, trained)
    before = digests(tmp_path)
    report = merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    written = read(tmp_path / "out")
    assert_merged_as_there(base, adapter, written, preset, trained)
    assert report["layout"] == OTHER[trained]
    assert_files_of_safetensors(tmp_path / "out")
    assert {n: d for n, d in digests(tmp_path).items() if not re.match("out|again", n)} == before
    # Fused tensors are one, however many pairs go in.
    content = read(base)
    changed = [n for n in content if not same_tensor(content[n], written[n])]
    assert report["merged"] == len(changed)
    targets = carried(content, preset, trained)
    assert len(targets) == len(carried(written, preset, trained))


@pytest.mark.parametrize("trained", ["hf", "custom"])
@pytest.mark.parametrize("name", ["tiny-qwen3-moe", "tiny-gpt-oss"])
def test_mixtures_of_experts_without_their_experts(name, trained, tmp_path):
    preset = PRESETS[name]
    base = make(tmp_path / "base", preset, OTHER[trained])
    adapter = adapter_of(tmp_path / "adapter", preset, trained, r"self_attn|vision_")
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    assert_merged_as_there(base, adapter, read(tmp_path / "out"), preset, trained)


def test_single_experts_into_an_hf_base(tmp_path):
    preset = PRESETS["tiny-qwen3-moe"]
    base = make(tmp_path / "base", preset, "hf")
    adapter = adapter_of(tmp_path / "adapter", preset, "custom")
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    assert_merged_as_there(base, adapter, read(tmp_path / "out"), preset, "custom")


@pytest.mark.parametrize(
    "keep",
    [
        r"vision_tower.*\.q_proj",
        r"vision_tower.*\.[qv]_proj",
        r"vision_tower.*\.k_proj",
        r"vision_tower\.encoder\.layer\.1\..*v_proj",
        r"language_model.*\.q_proj",
        r"language_model.*\.[qv]_proj",
        r"language_model.*\.[kv]_proj",
        r"\.[qv]_proj",
    ],
)
@pytest.mark.parametrize("spelling", ["flat"])
def test_some_parts_into_fused_tensors(keep, spelling, tmp_path):
    """What has no pair keeps every bit."""
    preset = PRESETS["tiny-internlm2"]
    base = make(tmp_path / "base", preset, "custom")
    adapter = adapter_of(tmp_path / "adapter", preset, "hf", keep)
    report = merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    written = read(tmp_path / "out")
    assert_merged_as_there(base, adapter, written, preset, "hf")
    updates = reference.updates_of(adapter, home=flat)
    fused = {re.sub(r"[qkv]_proj", "*", update.home) for update in updates}
    assert report["merged"] == len(fused)
    before, after = (as_hf(tensors, preset) for tensors in (read(base), written))
    touched = {update.home for update in updates}
    assert {n for n in before if not same_tensor(before[n], after[n])} == touched


@pytest.mark.parametrize("keep", [r"attn\.qkv", r"attention\.wqkv", r"layers\.0\.att.*qkv"])
def test_fused_pairs_into_split_tensors(keep, tmp_path):
    preset = PRESETS["tiny-internlm2"]
    base = make(tmp_path / "base", preset, "hf")
    adapter = adapter_of(tmp_path / "adapter", preset, "custom", keep)
    report = merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    assert_merged_as_there(base, adapter, read(tmp_path / "out"), preset, "custom")
    assert report["merged"] == 3 * len(reference.updates_of(adapter))


SPELLINGS: dict[str, Callable[[str], str]] = {
    "flat": lambda key: re.sub(
        r"^base_model\.model\.(.+)", lambda m: "base_model.model." + flat_module(m[1]), key
    ),
    "module": lambda key: f"module.{key}",
    "base-then-module": lambda key: key.replace("base_model.model.", "base_model.model.module.", 1),
    "adapter-name": lambda key: key.replace(".weight", ".default.weight"),
    "compiled": lambda key: key.replace("layers.0.", "layers.0._orig_mod."),
    "no-prefix": lambda key: key.removeprefix("base_model.model."),
    "hybrid": lambda key: key.replace(".language_model.", ".language_model.model.", 1),
    "short": lambda key: key.replace("base_model.model.model.", "base_model.model."),
}


def flat_module(module: str) -> str:
    if module.startswith("model.language_model."):
        return "language_model.model." + module.removeprefix("model.language_model.")
    return module.removeprefix("model.")


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", ["tiny", "tiny-internlm2"])
def test_spellings_of_hf_adapters(name, spelling, tmp_path):
    base = make(tmp_path / "base", name, "custom")
    nested = adapter_of(tmp_path / "nested", name, "hf")
    other = respelled(adapter_of(tmp_path / "other", name, "hf"), SPELLINGS[spelling])
    assert set(load_file(other / "adapter_model.safetensors")) != set(
        load_file(nested / "adapter_model.safetensors")
    )
    files = []
    for adapter in (nested, other):
        out = tmp_path / f"out-{adapter.name}"
        merge_lora(base=base, adapter=adapter, output=out)
        files.append((out / "model.safetensors").read_bytes())
    assert files[0] == files[1]
    assert files[0] != (base / "model.safetensors").read_bytes()


@pytest.mark.parametrize("spelling", ["flat", "nested", "hybrid", "mid", "short"])
def test_spellings_of_hf_bases(spelling, tmp_path):
    preset = PRESETS["tiny-internlm2"]
    base = make(tmp_path / "base", preset, "hf", spelling=spelling)
    plain = make(tmp_path / "plain", preset, "hf")
    adapter = adapter_of(tmp_path / "adapter", preset, "custom")
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    merge_lora(base=plain, adapter=adapter, output=tmp_path / "plain-out")
    assert read(tmp_path / "out").keys() == read(base).keys()
    found = [t.flatten().view(torch.int16).tolist() for t in read(tmp_path / "out").values()]
    expected = [
        t.flatten().view(torch.int16).tolist() for t in read(tmp_path / "plain-out").values()
    ]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("options", [{"use_rslora": True}, {"lora_alpha": 3}], ids=str)
def test_scaling(options, tmp_path):
    preset = PRESETS["tiny-internlm2"]
    base = make(tmp_path / "base", preset, "custom")
    adapter = adapter_of(tmp_path / "adapter", preset, "hf", **options)
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    assert_merged_as_there(base, adapter, read(tmp_path / "out"), preset, "hf")


def test_patterns_are_those_of_the_trained_model(tmp_path):
    """`rank_pattern` and `alpha_pattern` name modules as the adapter has them."""
    preset = PRESETS["tiny-internlm2"]
    base = make(tmp_path / "base", preset, "custom")
    modules = {
        "model.vision_tower.encoder.layer.0.attention.q_proj": (3, 12, 32, 32),
        "model.vision_tower.encoder.layer.0.attention.k_proj": (4, 8, 32, 32),
        "model.language_model.layers.1.self_attn.v_proj": (5, 8, 32, 64),
        "model.language_model.layers.1.mlp.up_proj": (4, 30, 96, 64),
    }
    pairs, expected = {}, []
    for seed, (module, (r, alpha, rows, columns)) in enumerate(modules.items()):
        A, B = normal((r, columns), 1, seed=seed), normal((rows, r), 0.1, seed=9 + seed)
        pairs[f"base_model.model.{module}.lora_A.weight"] = A
        pairs[f"base_model.model.{module}.lora_B.weight"] = B
        made = reference.Update(flat(module), alpha / r, reference.double(A), reference.double(B))
        expected.append(made)
    adapter = save_adapter(
        tmp_path / "adapter",
        pairs,
        r=4,
        lora_alpha=8,
        rank_pattern={"vision_tower.encoder.layer.0.attention.q_proj": 3, "v_proj": 5},
        alpha_pattern={"model.vision_tower.encoder.layer.0.attention.q_proj": 12, "up_proj": 30},
    )
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    written = as_hf(read(tmp_path / "out"), preset)
    reference.assert_merged(written, as_hf(read(base), preset), expected, equal=0.999)


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_adapters_of_both_layouts_are_summed(layout, tmp_path):
    preset = PRESETS["tiny-internlm2"]
    base = make(tmp_path / "base", preset, layout, dtype="fp32")
    one = adapter_of(tmp_path / "one", preset, "hf")
    other = adapter_of(tmp_path / "other", preset, "custom", seed=3)
    merge_lora(base=base, adapter=[one, other], weight=[0.5, 2], output=tmp_path / "out")
    # In fp64, one after the other, each in its own layout.
    content = {n: t.double() for n, t in carried_to(read(base), preset, layout, "hf").items()}
    for home, scale, A, B in reference.updates_of(one, home=flat, weight=0.5):
        content[home] = content[home] + torch.from_numpy(scale * (B @ A))
    content = as_custom(content, preset)
    for home, scale, A, B in reference.updates_of(other, weight=2):
        content[home] = content[home] + torch.from_numpy(scale * (B @ A))
    written = carried_to(read(tmp_path / "out"), preset, layout, "custom")
    for name, tensor in content.items():
        torch.testing.assert_close(written[name].double(), tensor, atol=1e-6, rtol=1e-6)


def test_names_that_prove_nothing_fit_both(tmp_path):
    """Language model pairs in flat HF spelling are those of the custom layout, but InternLM2's."""
    for name in ("tiny", "tiny-internlm2"):
        preset = PRESETS[name]
        base = make(tmp_path / name, preset, "custom")
        adapter = adapter_of(tmp_path / f"{name}-adapter", preset, "hf", targets="llm")
        merge_lora(base=base, adapter=adapter, output=tmp_path / f"{name}-nested")
        respelled(adapter, SPELLINGS["flat"])
        merge_lora(base=base, adapter=adapter, output=tmp_path / f"{name}-flat")
        assert_same(read(tmp_path / f"{name}-flat"), read(tmp_path / f"{name}-nested"))


@pytest.mark.parametrize("trained", ["hf", "custom"])
@pytest.mark.parametrize("name", ["tiny", "tiny-internlm2"])
def test_a_pair_on_the_head(name, trained, tmp_path):
    """InternLM2 calls it `output`, and not below `model`."""
    preset = PRESETS[name]
    base = make(tmp_path / "base", preset, OTHER[trained])
    head = "lm_head" if trained == "hf" else "language_model.lm_head"
    if (name, trained) == ("tiny-internlm2", "custom"):
        head = "language_model.output"
    stem = f"base_model.model.{head}"
    vision = {
        "hf": "model.vision_tower.encoder.layer.0.mlp.fc1",
        "custom": "vision_model.encoder.layers.0.mlp.fc1",
    }[trained]
    pairs = {
        f"{stem}.lora_A.weight": normal((4, 64), 1, seed=1),
        f"{stem}.lora_B.weight": normal((288, 4), 0.1, seed=2),
        f"base_model.model.{vision}.lora_A.weight": normal((4, 32), 1, seed=3),
        f"base_model.model.{vision}.lora_B.weight": normal((64, 4), 0.1, seed=4),
    }
    adapter = save_adapter(tmp_path / "adapter", pairs, r=4, lora_alpha=8)
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    assert_merged_as_there(base, adapter, read(tmp_path / "out"), preset, trained)


# --- refused --------------------------------------------------------------------------------------


MISFITS = {
    "rows": (r"vision_tower.encoder.layer.0.attention.k_proj.lora_B", lambda t: t[:-1]),
    "more-rows": (
        r"vision_tower.encoder.layer.0.attention.v_proj.lora_B",
        lambda t: torch.cat([t, t]),
    ),
    "columns": (r"vision_tower.encoder.layer.0.attention.q_proj.lora_A", lambda t: t[:, 1:]),
    "grouped-rows": (r"layers.1.self_attn.k_proj.lora_B", lambda t: torch.cat([t, t])),
    "grouped-columns": (r"layers.1.self_attn.q_proj.lora_A", lambda t: t[:, 1:]),
    "rank": (r"layers.1.self_attn.q_proj.lora_A", lambda t: t[1:]),
    "plain": (r"layers.1.mlp.up_proj.lora_B", lambda t: t[1:]),
}


@pytest.mark.parametrize("case", MISFITS)
def test_an_update_that_does_not_fit(case, tmp_path, cli):
    pattern, change = MISFITS[case]
    base = make(tmp_path / "base", "tiny-internlm2", "custom")
    adapter = adapter_of(tmp_path / "adapter", "tiny-internlm2", "hf")
    content = load_file(adapter / "adapter_model.safetensors")
    (key,) = [key for key in content if re.search(pattern, key)]
    content[key] = change(content[key]).contiguous()
    rewritten(adapter, content)
    call = ["merge-lora", "--base", base, "--adapter", adapter, "--output", tmp_path / "out"]
    text = refused(cli, tmp_path, 4, *call)
    assert key.partition(".lora_")[0].rpartition("model.")[2] in text


FUSED_MISFITS = {
    "rows": (r"layers.0.attn.qkv.lora_B", lambda t: t[:-3]),
    "two-thirds": (r"layers.0.attn.qkv.lora_B", lambda t: t[:64]),
    "columns": (r"layers.0.attn.qkv.lora_A", lambda t: t[:, 1:]),
    "grouped-rows": (r"layers.1.attention.wqkv.lora_B", lambda t: t[:-4]),
}


@pytest.mark.parametrize("case", FUSED_MISFITS)
def test_a_fused_update_that_does_not_fit(case, tmp_path, cli):
    pattern, change = FUSED_MISFITS[case]
    base = make(tmp_path / "base", "tiny-internlm2", "hf")
    adapter = adapter_of(tmp_path / "adapter", "tiny-internlm2", "custom")
    content = load_file(adapter / "adapter_model.safetensors")
    (key,) = [key for key in content if re.search(pattern, key)]
    content[key] = change(content[key]).contiguous()
    rewritten(adapter, content)
    call = ["merge-lora", "--base", base, "--adapter", adapter, "--output", tmp_path / "out"]
    refused(cli, tmp_path, 4, *call)


@pytest.mark.parametrize("trained", ["custom", "hf"])
def test_a_module_that_nobody_knows(trained, tmp_path):
    base = make(tmp_path / "base", "tiny-internlm2", OTHER[trained])
    adapter = adapter_of(tmp_path / "adapter", "tiny-internlm2", trained)
    respelled(
        adapter, lambda key: re.sub(r"layers\.1\.(.*)\.(w2|down_proj)\.", r"layers.1.\1.w9.", key)
    )
    with pytest.raises(AdapterError, match="w9"):
        merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_layer_that_the_base_has_not(tmp_path):
    base = make(tmp_path / "base", "tiny-internlm2", "custom")
    adapter = adapter_of(tmp_path / "adapter", "tiny-internlm2", "hf")
    respelled(
        adapter, lambda key: key.replace("language_model.layers.2.", "language_model.layers.3.")
    )
    with pytest.raises(AdapterError, match="layers up to 3 of"):
        merge_lora(base=base, adapter=adapter, output=tmp_path / "out")


def test_a_part_twice(tmp_path):
    """Two spellings of one module are no two updates."""
    base = make(tmp_path / "base", "tiny-internlm2", "custom")
    adapter = adapter_of(
        tmp_path / "adapter", "tiny-internlm2", "hf", r"layers\.0\.self_attn\.q_proj"
    )
    content = load_file(adapter / "adapter_model.safetensors")
    more = {SPELLINGS["flat"](key): tensor.clone() for key, tensor in content.items()}
    rewritten(adapter, content | more)
    with pytest.raises(AdapterError):
        merge_lora(base=base, adapter=adapter, output=tmp_path / "out")


# --- real adapters, running models ----------------------------------------------------------------


TARGETS = {
    "names": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
    "q-and-v": ["q_proj", "v_proj"],
    "vision": r".*vision_tower.*(q_proj|k_proj|v_proj|projection_layer|fc1|fc2)",
    "projector": ["linear_1", "linear_2", "gate_proj", "q_proj"],
}


def trained_by_peft(folder: Path, model: Any, targets: Any) -> Any:
    config = peft.LoraConfig(r=6, lora_alpha=15, target_modules=targets)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                parameter.copy_(normal(parameter.shape, 0.1, seed=sum(key.encode())))
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return adapted.eval()


def parts_of(
    name: str, tmp_path: Path, targets: Any
) -> tuple[Preset, Path, Path, torch.Tensor, torch.Tensor]:
    """An HF base that transformers wrote, an adapter by peft, logits without and with it."""
    preset = PRESETS[name]
    model = hf_model(settings_of(preset, "hf"))
    scramble(model)
    model.save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    before = logits_of(model, preset.image_token)
    adapted = trained_by_peft(tmp_path / "adapter", model, targets)
    expected = logits_of(adapted, preset.image_token)
    assert (before - expected).abs().max() > 1e-2
    return preset, tmp_path / "hf", tmp_path / "adapter", before, expected


def assert_runs(folder: Path, preset: Preset, expected: torch.Tensor) -> None:
    model = custom_model(config_of(folder), preset.image_token)
    load_custom(model, read(folder), preset)
    found = logits_of(model, preset.image_token)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        *((name, targets) for name in ("tiny", "tiny-internlm2") for targets in TARGETS),
        ("tiny-6b-vit", "names"),
        ("tiny-qwen3", "names"),
        ("tiny-llama", "names"),
    ],
)
def test_an_adapter_by_peft_in_a_custom_model(name, targets, tmp_path):
    preset, base, adapter, _, expected = parts_of(name, tmp_path, TARGETS[targets])
    ref = make(tmp_path / "ref", preset, "custom", dtype="fp32")
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out", layout="custom", reference=ref)
    assert_runs(tmp_path / "out", preset, expected)
    # And by hand: convert, then merge into the custom base.
    convert("custom", base, ref, tmp_path / "custom")
    merge_lora(base=tmp_path / "custom", adapter=adapter, output=tmp_path / "by-hand")
    assert weights_of(tmp_path / "by-hand") == weights_of(tmp_path / "out")


@pytest.mark.parametrize("name", ["tiny", "tiny-internlm2"])
def test_an_adapter_by_peft_on_a_custom_model_in_transformers(name, tmp_path):
    preset = PRESETS[name]
    model = custom_model(settings_of(preset, "custom"), preset.image_token)
    scramble(model)
    base = make(tmp_path / "base", preset, "custom", dtype="fp32")
    put(base, model.state_dict())
    config = peft.LoraConfig(r=5, lora_alpha=7, target_modules=r".*(qkv|proj|fc1|w1|w2|wo)")
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                parameter.copy_(normal(parameter.shape, 0.1, seed=sum(key.encode())))
    adapted.eval().save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    expected = logits_of(model, preset.image_token)  # the layers within are wrapped in place
    hf = hf_model(settings_of(preset, "hf"))
    hf.save_pretrained(tmp_path / "ref")
    convert("hf", base, tmp_path / "ref", tmp_path / "hf")
    plain, merged = (load_hf(tmp_path / "hf", preset), None)
    assert (plain - expected).abs().max() > 1e-2
    merge_lora(base=tmp_path / "hf", adapter=tmp_path / "adapter", output=tmp_path / "out")
    merged = load_hf(tmp_path / "out", preset)
    torch.testing.assert_close(merged, expected, atol=2e-5, rtol=2e-5)


def load_hf(folder: Path, preset: Preset) -> torch.Tensor:
    model, info = transformers.InternVLForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not {kind: found for kind, found in info.items() if found}
    return logits_of(model.eval(), preset.image_token)


def test_an_adapter_of_add_adapter(tmp_path):
    """`model.add_adapter` and `model.save_pretrained`: another prefix and the model's own dtype."""
    preset = PRESETS["tiny"]
    model = hf_model(settings_of(preset, "hf"))
    scramble(model)
    model.save_pretrained(tmp_path / "hf")
    model.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(normal(parameter.shape, 0.1, seed=sum(key.encode())))
    model.save_pretrained(tmp_path / "adapter")
    expected = logits_of(model.eval(), preset.image_token)
    ref = make(tmp_path / "ref", preset, "custom", dtype="fp32")
    merge_lora(
        base=tmp_path / "hf",
        adapter=tmp_path / "adapter",
        output=tmp_path / "out",
        layout="custom",
        reference=ref,
    )
    assert_runs(tmp_path / "out", preset, expected)
    assert config_of(tmp_path / "out")[INNER["custom"]]["vocab_size"] == preset.vocab
