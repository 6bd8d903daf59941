"""Every kind of adapter across layouts: trained on one, merged into a base of the other.

The adapted model is run unmerged; the merged base is carried over by
`folders`, which does not use the package, and run in the class of the adapter.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from adapters import flat_name
from folders import OTHER, as_custom, as_hf, carried, config_of, make, put, settings_of
from marks import PEERS, slow
from models import custom_model, hf_model, logits_of
from peft_cases import adapted, assert_close, assert_exact, exact_weights, fill, save_adapter
from presets import PRESETS, Preset
from reference import Float64, read

from streamshard import merge_lora
from streamshard.errors import AdapterError

pytestmark = PEERS


FAMILIES = ["tiny", "tiny-internlm2"]
LLM = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VISION = ["projection_layer", "fc1", "fc2", "linear_1", "linear_2"]
INTERNLM2 = ["wqkv", "wo", "w1", "w2", "w3"]
CUSTOM_VISION = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
PROJECTOR = {"hf": "multi_modal_projector", "custom": "mlp1"}


def targets(preset: Preset, layout: str) -> list[str]:
    if layout == "hf":
        return LLM + VISION
    internlm2 = preset.arch == "InternLM2ForCausalLM"
    return CUSTOM_VISION + (INTERNLM2 if internlm2 else LLM)


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 6},
    "dora": {"use_dora": True},
    "dora-rslora": {"use_dora": True, "use_rslora": True, "r": 5},
    "bias": {"bias": "all"},
    "bias-lora-only": {"bias": "lora_only"},
    "saved-projector": {"modules_to_save": ["PROJECTOR"]},
    "dora-bias-and-projector": {
        "use_dora": True,
        "bias": "all",
        "modules_to_save": ["PROJECTOR"],
    },
}


def model_of(preset: Preset, layout: str) -> Any:
    settings = settings_of(preset, layout)
    made = hf_model(settings) if layout == "hf" else custom_model(settings, preset.image_token)
    return fill(made)


def on_disk(tensors: Mapping[str, Any], layout: str) -> dict[str, Any]:
    return {flat_name(n) if layout == "hf" else n: t for n, t in tensors.items()}


def run_merged(folder: Path, model: Any, preset: Preset, layout: str, home: str) -> torch.Tensor:
    """A folder of the layout `home` in the class that the adapter was trained on."""
    tensors = read(folder) if home == layout else carried(read(folder), preset, layout)
    plain = copy.deepcopy(model)
    names = on_disk({n: n for n in plain.state_dict()}, layout)
    assert names.keys() == tensors.keys()
    plain.load_state_dict({names[n]: t.float() for n, t in tensors.items()})
    return logits_of(plain, preset.image_token)


def carry(exact: Mapping[str, Float64], preset: Preset, layout: str) -> dict[str, Float64]:
    moved = carried({n: torch.from_numpy(v) for n, v in exact.items()}, preset, layout)
    return {name: tensor.numpy() for name, tensor in moved.items()}


def check(
    folder: Path, preset: Preset, trained: str, home: str, wrapped: Any, model: Any
) -> dict[str, Any]:
    """Merge into fp32 and bf16 bases of the layout `home`; outputs and elements, each exactly."""
    moves = home != trained
    exact = on_disk(exact_weights(wrapped), trained)
    exact = carry(exact, preset, home) if moves else exact
    adapter = save_adapter(folder / "adapter", wrapped, save_embedding_layers=False)
    expected = logits_of(wrapped.get_base_model(), preset.image_token)
    assert (expected - logits_of(model, preset.image_token)).abs().max() > 1e-3
    content = on_disk(model.state_dict(), trained)
    content = carried(content, preset, home) if moves else content
    for dtype in ("F32", "BF16"):
        base = make(folder / f"base-{dtype}", preset, home)
        put(base, {n: t.to(reference.TORCH[dtype]) for n, t in content.items()})
        report = merge_lora(base=base, adapter=adapter, output=folder / dtype)
        assert_exact(read(folder / dtype), read(base), exact)
        assert config_of(folder / dtype) == config_of(base)
    assert_close(run_merged(folder / "F32", model, preset, trained, home), expected)
    return report


def config_for(name: str, preset: Preset, layout: str) -> dict[str, Any]:
    config = {"target_modules": targets(preset, layout), **CONFIGS[name]}
    if "modules_to_save" in config:
        config["modules_to_save"] = [PROJECTOR[layout]]
        config["target_modules"] = [t for t in config["target_modules"] if "linear" not in t]
    return config


# Where nothing is moved the widest of them is enough.
KINDS = [
    pytest.param(config, same, id=f"{config}-{'same' if same else 'other'}")
    for config in CONFIGS
    for same in (False, True)
    if not same or config == "dora-bias-and-projector"
]


@slow
@pytest.mark.parametrize("trained", ["hf", "custom"])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("config", "same"), KINDS)
def test_every_kind_goes_where_its_weights_are(config, name, trained, same, tmp_path):
    preset = PRESETS[name]
    model = model_of(preset, trained)
    wrapped = adapted(model, **config_for(config, preset, trained))
    check(tmp_path, preset, trained, trained if same else OTHER[trained], wrapped, model)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("trained", ["hf", "custom"])
def test_the_patch_embedding_is_a_convolution(trained, dora, tmp_path):
    preset = PRESETS["tiny"]
    model = model_of(preset, trained)
    target = {"hf": "patch_embeddings.projection", "custom": "patch_embedding"}[trained]
    wrapped = adapted(model, target_modules=[target], use_dora=dora)
    check(tmp_path, preset, trained, OTHER[trained], wrapped, model)


@pytest.mark.parametrize("same", [False, True], ids=["other", "same"])
@pytest.mark.parametrize("trained", ["hf", "custom"])
def test_the_bias_of_lora_b_goes_beside_its_weight(trained, same, tmp_path):
    """Only to layers that have a bias: the vision encoder and the projector."""
    preset = PRESETS["tiny"]
    model = model_of(preset, trained)
    modules = CUSTOM_VISION
    if trained == "hf":
        modules = [*VISION, "attention.q_proj", "attention.v_proj"]
    wrapped = adapted(model, target_modules=modules, lora_bias=True)
    check(tmp_path, preset, trained, trained if same else OTHER[trained], wrapped, model)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("trained", ["hf", "custom"])
@pytest.mark.parametrize("name", FAMILIES)
def test_embedding_and_head(name, trained, dora, tmp_path):
    preset = PRESETS[name]
    model = model_of(preset, trained)
    internlm2 = name == "tiny-internlm2" and trained == "custom"
    modules = ["tok_embeddings", "output"] if internlm2 else ["embed_tokens", "lm_head"]
    wrapped = adapted(model, target_modules=modules, use_dora=dora)
    check(tmp_path, preset, trained, OTHER[trained], wrapped, model)


@pytest.mark.parametrize("kind", ["saved", "rows"])
@pytest.mark.parametrize("trained", ["hf", "custom"])
def test_tokens(kind, trained, tmp_path):
    preset = PRESETS["tiny"]
    model = model_of(preset, trained)
    config = {
        "saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
        "rows": {"trainable_token_indices": {"embed_tokens": [200, 5, 261]}},
    }[kind]
    wrapped = adapted(model, target_modules=["v_proj"], **config)
    check(tmp_path, preset, trained, OTHER[trained], wrapped, model)


@pytest.mark.parametrize("home", ["hf", "custom"])
def test_single_parts_of_fused_tensors_under_dora(home, tmp_path):
    """q alone: of `qkv` and `wqkv` only its rows change, and v keeps its bytes."""
    preset = PRESETS["tiny-internlm2"]
    model = model_of(preset, "hf")
    wrapped = adapted(model, target_modules=["q_proj"], use_dora=True)
    check(tmp_path, preset, "hf", home, wrapped, model)
    before, after = (
        as_hf(read(tmp_path / n), preset) if home == "custom" else read(tmp_path / n)
        for n in ("base-BF16", "BF16")
    )
    changed = {n for n in before if not reference.same_tensor(before[n], after[n])}
    assert changed
    assert all(".q_proj." in name for name in changed)


@pytest.mark.parametrize("config", ["dora-bias-and-projector", "bias", "plain"])
@pytest.mark.parametrize("name", FAMILIES)
def test_merging_and_converting_commute(config, name, tmp_path):
    """Merge, then convert; or merge into the converted base; or both in one pass: the same bits."""
    from streamshard import custom_to_hf

    preset = PRESETS[name]
    model = model_of(preset, "custom")
    wrapped = adapted(model, **config_for(config, preset, "custom"))
    adapter = save_adapter(tmp_path / "adapter", wrapped)
    base = make(tmp_path / "base", preset, "custom")
    put(base, {n: t.bfloat16() for n, t in model.state_dict().items()})
    ref = make(tmp_path / "ref", preset, "hf")
    merge_lora(base=base, adapter=adapter, output=tmp_path / "a")
    custom_to_hf(custom_path=tmp_path / "a", hf_path=ref, save_path=tmp_path / "a-hf")
    custom_to_hf(custom_path=base, hf_path=ref, save_path=tmp_path / "b")
    merge_lora(base=tmp_path / "b", adapter=adapter, output=tmp_path / "b-hf")
    merge_lora(base=base, adapter=adapter, output=tmp_path / "c-hf", layout="hf", reference=ref)
    one, *others = (read(tmp_path / f"{n}-hf") for n in "abc")
    for other in others:
        assert one.keys() == other.keys()
        assert [n for n in one if not reference.same_tensor(one[n], other[n])] == []


def test_adapters_of_both_layouts_at_once(tmp_path):
    """One of each, on the same weights, summed and rounded once."""
    preset = PRESETS["tiny-internlm2"]
    custom, hf = model_of(preset, "custom"), model_of(preset, "hf")
    state = on_disk(hf.state_dict(), "hf")
    custom.load_state_dict(as_custom(state, preset))
    first = adapted(hf, target_modules=LLM)
    second = adapted(custom, target_modules=INTERNLM2, r=3)
    adapters = [save_adapter(tmp_path / "one", first), save_adapter(tmp_path / "two", second)]
    base = make(tmp_path / "base", preset, "custom")
    put(base, {n: t.bfloat16() for n, t in custom.state_dict().items()})
    merge_lora(base=base, adapter=adapters, weight=[0.5, 2], output=tmp_path / "out")
    one = carry(on_disk(exact_weights(first, {"default": 0.5}), "hf"), preset, "custom")
    two = exact_weights(second, {"default": 2.0})
    before = {n: reference.double(t) for n, t in custom.state_dict().items()}
    exact = {n: one[n] + two[n] - before[n] for n in before}
    assert_exact(read(tmp_path / "out"), read(base), exact)


def test_two_kinds_on_rows_of_one_fused_tensor(tmp_path):
    """DoRA on q and a plain update of v: different rows of `qkv`, so nothing is undefined."""
    preset = PRESETS["tiny"]
    model = model_of(preset, "hf")
    vision = r".*vision_tower.*\.{}_proj"
    first = adapted(model, target_modules=vision.format("q"), use_dora=True)
    second = adapted(model, target_modules=vision.format("v"))
    adapters = [save_adapter(tmp_path / "one", first), save_adapter(tmp_path / "two", second)]
    base = make(tmp_path / "base", preset, "custom")
    content = as_custom(on_disk(model.state_dict(), "hf"), preset)
    put(base, {n: t.bfloat16() for n, t in content.items()})
    exact = on_disk(exact_weights(first), "hf")
    other = on_disk(exact_weights(second), "hf")
    exact |= {n: v for n, v in other.items() if "vision_tower" in n and ".v_proj." in n}
    merge_lora(base=base, adapter=adapters, output=tmp_path / "out")
    assert_exact(read(tmp_path / "out"), read(base), carry(exact, preset, "custom"))


@pytest.mark.parametrize("home", ["hf", "custom"])
def test_dora_on_one_row_range_twice_is_refused(home, tmp_path):
    preset = PRESETS["tiny"]
    hf, custom = model_of(preset, "hf"), model_of(preset, "custom")
    adapters = [
        save_adapter(
            tmp_path / "one",
            adapted(hf, target_modules=r".*vision_tower.*\.q_proj", use_dora=True),
        ),
        save_adapter(tmp_path / "two", adapted(custom, target_modules=["attn.qkv"])),
    ]
    base = make(tmp_path / "base", preset, home)
    with pytest.raises(AdapterError, match="DoRA"):
        merge_lora(base=base, adapter=adapters, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def resized(folder: Path, preset: Preset, trained: str, rows: int) -> Path:
    """Embedding and head of another length, as PEFT saves them beside the pairs."""
    wrapped = adapted(model_of(preset, trained), target_modules=["v_proj"])
    adapter = save_adapter(folder, wrapped)
    content = reference.load_file(adapter / "adapter_model.safetensors")
    embed = {
        "hf": "model.language_model.embed_tokens",
        "custom": "language_model.model.embed_tokens",
    }
    head = {"hf": "lm_head", "custom": "language_model.lm_head"}
    for seed, name in enumerate((embed[trained], head[trained])):
        key = f"base_model.model.{name}.weight"
        content[key] = reference.normal((rows, 64), 0.1, seed=seed)
    reference.save_file(content, adapter / "adapter_model.safetensors", {"format": "pt"})
    return adapter


@pytest.mark.parametrize("rows", [280, 300])
@pytest.mark.parametrize("home", ["hf", "custom"])
@pytest.mark.parametrize("trained", ["hf", "custom"])
def test_a_resized_vocabulary(trained, home, rows, tmp_path):
    """Every config level that states the number of rows states the new one."""
    preset = PRESETS["tiny"]
    adapter = resized(tmp_path / "adapter", preset, trained, rows)
    base = make(tmp_path / "base", preset, home)
    before = config_of(base)
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    after, written = config_of(tmp_path / "out"), read(tmp_path / "out")
    inner = {"hf": "text_config", "custom": "llm_config"}[home]
    assert after[inner]["vocab_size"] == rows
    assert after.get("vocab_size", rows) == rows
    for config in (before, after):
        config.pop("vocab_size", None)
        config[inner].pop("vocab_size")
    assert after == before
    stored = reference.load_file(adapter / "adapter_model.safetensors")
    for module in ("embed_tokens", "lm_head"):
        (name,) = [n for n in written if f".{module}." in n or n.startswith(f"{module}.")]
        (key,) = [k for k in stored if f"{module}.weight" in k]
        assert (written[name] == stored[key].to(written[name].dtype)).all()


@pytest.mark.parametrize("target", ["head", "embedding"])
def test_a_tied_model_of_the_hf_layout(target, tmp_path):
    """The flag is stated at two levels; both say what the files are then."""
    preset = PRESETS["tiny"]
    base = make(tmp_path / "base", preset, "hf", tied=True, dtype="fp32")
    assert not any("lm_head" in name for name in read(base))
    model = model_of(preset, "hf")
    modules = {"head": ["lm_head"], "embedding": ["embed_tokens"]}[target]
    adapter = save_adapter(
        tmp_path / "adapter",
        adapted(model, target_modules=modules),
        save_embedding_layers=False,
    )
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    written, config = read(tmp_path / "out"), config_of(tmp_path / "out")
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False
    before = read(base)
    embedding = "language_model.model.embed_tokens.weight"
    head = "language_model.lm_head.weight"
    assert written.keys() == before.keys() | {head}
    kept, changed = (embedding, head) if target == "head" else (head, embedding)
    assert reference.same_tensor(written[kept], before[embedding])
    assert not reference.same_tensor(written[changed], before[embedding])
