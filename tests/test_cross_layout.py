"""Adapters and bases of different layouts, and merging with conversion in one pass.

Expected elements are computed in fp64 in the layout of the adapter (`reference`), on tensors that
`test_conversion` carried over; models are judged by running them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import transformers
from families import PRESETS, Preset, Vision
from make_checkpoint import write_adapter
from reference import digests, normal, read, same_tensor, save_adapter
from safetensors.torch import load_file
from test_conversion import (
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
    without_weights,
)
from test_layouts import custom_model, hf_model, load_custom, logits_of, scramble

from streamshard import merge_lora
from streamshard.errors import AdapterError, InputError, UsageError

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

# Presets whose HF adapters have no pairs on packed experts.
DENSE = ["tiny", "tiny-6b-vit", "tiny-qwen3", "tiny-llama", "tiny-internlm2", "tiny-internlm3",
         "tiny-phi3"]  # fmt: skip
# Sizes that no grid of tiles divides, and rows and columns beyond one tile.
ODD = Preset(
    "tiny-odd",
    Vision(136, 1, 2, 1048, image_size=28),
    "InternLM2ForCausalLM",
    hidden=240,
    layers=1,
    heads=6,
    kv_heads=2,
    head_dim=40,
    intermediate=1100,
    vocab=288,
    image_token=261,
    rope_theta=10000.0,
    max_positions=512,
)


def flat(module: str) -> str:
    """The flat HF tensor of a module of a loaded transformers model."""
    for nested, disk in (
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("lm_head", "language_model.lm_head"),
    ):
        if module.startswith(nested):
            return f"{disk}{module.removeprefix(nested)}.weight"
    raise AssertionError(module)


HOME = {"hf": flat, "custom": reference.in_base}


def adapter_of(folder: Path, preset: Preset | str, layout: str, keep: str = "", **how: Any) -> Path:
    """A generated adapter; only pairs whose name has a match of `keep`."""
    write_adapter(folder, preset, layout=layout, **{"targets": "all", "r": 8, **how})
    return respelled(folder, lambda key: key) if not keep else only(folder, keep)


def only(folder: Path, pattern: str) -> Path:
    content = load_file(folder / "adapter_model.safetensors")
    kept = {key: tensor for key, tensor in content.items() if re.search(pattern, key)}
    assert 0 < len(kept) < len(content)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["target_parameters"] = None  # packed experts are not kept
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return rewritten(folder, kept)


def respelled(folder: Path, change: Callable[[str], str]) -> Path:
    content = load_file(folder / "adapter_model.safetensors")
    return rewritten(folder, {change(key): tensor for key, tensor in content.items()})


def rewritten(folder: Path, content: Mapping[str, torch.Tensor]) -> Path:
    reference.save_file(dict(content), folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def assert_merged_as_there(
    base: Path, adapter: Path, written: Mapping[str, Any], preset: Preset, trained: str
) -> None:
    """What was written into a base of the other layout, compared in the adapter's layout."""
    content = carried(read(base), preset, trained)
    updates = reference.updates_of(adapter, home=HOME[trained])
    reference.assert_merged(carried(written, preset, trained), content, updates, equal=0.999)


# --- every family --------------------------------------------------------------------------------


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


def carried_to(tensors: Any, preset: Preset, layout: str, to: str) -> dict[str, Any]:
    return dict(tensors) if layout == to else carried(tensors, preset, to)


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


# --- converting in the same pass -----------------------------------------------------------------


def weights_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("model*.safetensors*")}


@pytest.mark.parametrize("size", ["5GB", "40KB"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("trained", ["custom", "hf"])
@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_merging_and_converting_commute(layout, trained, dtype, size, tmp_path):
    """Base, adapter and output in any two layouts: the same files whichever comes first."""
    preset = PRESETS["tiny-internlm2"]
    base = make(tmp_path / "base", preset, OTHER[layout], dtype=dtype, max_shard_size=size)
    ref = make(tmp_path / "ref", preset, layout, dtype=dtype)
    adapter = adapter_of(tmp_path / "adapter", preset, trained)
    commutes(base, ref, adapter, layout, tmp_path, preset)


@pytest.mark.parametrize("r", [8, 80])
@pytest.mark.parametrize("trained", ["custom", "hf"])
@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_merging_and_converting_commute_for_any_size(layout, trained, r, tmp_path):
    """Heads and rows that do not fill tiles, columns of several tiles, ranks summed in fp64."""
    base = make(tmp_path / "base", ODD, OTHER[layout])
    ref = make(tmp_path / "ref", ODD, layout)
    adapter = adapter_of(tmp_path / "adapter", ODD, trained, r=r)
    commutes(base, ref, adapter, layout, tmp_path, ODD)


def commutes(base: Path, ref: Path, adapter: Path, layout: str, root: Path, preset: Preset) -> None:
    report = merge_lora(
        base=base, adapter=adapter, output=root / "at-once", layout=layout, reference=ref
    )
    assert report["layout"] == layout
    merge_lora(base=base, adapter=adapter, output=root / "merged")
    convert(layout, root / "merged", ref, root / "merged-converted")
    convert(layout, base, ref, root / "converted")
    merge_lora(base=root / "converted", adapter=adapter, output=root / "converted-merged")
    expected = weights_of(root / "at-once")
    assert weights_of(root / "merged-converted") == expected
    assert weights_of(root / "converted-merged") == expected
    assert config_of(root / "at-once") == config_of(root / "merged-converted")
    assert_files_of_safetensors(root / "at-once")
    # And it is right in the first place.
    content = carried(read(base), preset, layout)
    keys = load_file(adapter / "adapter_model.safetensors")
    trained = "custom" if any("vision_model" in key for key in keys) else "hf"
    updates = reference.updates_of(adapter, home=HOME[trained])
    before = carried_to(content, preset, layout, trained)
    after = carried_to(read(root / "at-once"), preset, layout, trained)
    if next(iter(content.values())).dtype != torch.float32:
        reference.assert_merged(after, before, updates, equal=0.999)
        return
    # fp32 is also what sums are made in, so the last digit may differ.
    for name, exact in reference.exactly_merged(before, updates).items():
        found = after.pop(name).double()
        torch.testing.assert_close(found, torch.from_numpy(exact), atol=1e-6, rtol=1e-6)
        del before[name]
    assert_same(after, before)


@pytest.mark.parametrize("trained", ["custom", "hf"])
def test_any_number_of_workers(trained, tmp_path):
    base = make(tmp_path / "base", ODD, "hf", max_shard_size="500KB")
    ref = make(tmp_path / "ref", ODD, "custom")
    adapter = adapter_of(tmp_path / "adapter", ODD, trained)
    found = []
    for workers in (1, 2, 3):
        out = tmp_path / f"out-{workers}"
        report = merge_lora(
            base=base, adapter=adapter, output=out, layout="custom", reference=ref, workers=workers
        )
        found.append((weights_of(out), report["l2"]))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_the_distance_is_that_from_the_base(layout, tmp_path):
    preset = PRESETS["tiny-internlm2"]
    base = make(tmp_path / "base", preset, OTHER[layout])
    ref = make(tmp_path / "ref", preset, layout, seed=3)
    adapter = adapter_of(tmp_path / "adapter", preset, OTHER[layout])
    report = merge_lora(
        base=base, adapter=adapter, output=tmp_path / "out", layout=layout, reference=ref
    )
    before, after = carried(read(base), preset, layout), read(tmp_path / "out")
    squares = [float(((after[n].double() - before[n].double()) ** 2).sum()) for n in before]
    found = report["l2"]
    assert found["reference"] == str(base)
    assert found["global"] == pytest.approx(sum(squares) ** 0.5, rel=1e-9)
    assert found["sum"] == pytest.approx(sum(s**0.5 for s in squares), rel=1e-9)
    assert found["compared"] == len(before)


def test_converting_takes_files_of_the_reference(tmp_path, cli):
    base = make(tmp_path / "base", "tiny", "hf")
    ref = without_weights(make(tmp_path / "ref", "tiny", "custom"))
    adapter = adapter_of(tmp_path / "adapter", "tiny", "hf")
    outcome = cli(
        "merge-lora", "--base", base, "--adapter", adapter, "--output", tmp_path / "out",
        "--layout", "custom", "--reference", ref, "--json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert report["layout"] == "custom"
    assert report["merged"] > 0
    names = {path.name for path in ref.iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *names, "model.safetensors", "streamshard.json",
    }  # fmt: skip


def test_a_layout_that_is_already_there_needs_no_reference(tmp_path):
    base = make(tmp_path / "base", "tiny", "hf")
    adapter = adapter_of(tmp_path / "adapter", "tiny", "hf")
    merge_lora(base=base, adapter=adapter, output=tmp_path / "keep")
    merge_lora(base=base, adapter=adapter, output=tmp_path / "hf", layout="hf")
    assert weights_of(tmp_path / "keep") == weights_of(tmp_path / "hf")


def test_converting_without_a_reference(tmp_path):
    base = make(tmp_path / "base", "tiny", "hf")
    adapter = adapter_of(tmp_path / "adapter", "tiny", "hf")
    with pytest.raises(UsageError, match="--reference"):
        merge_lora(base=base, adapter=adapter, output=tmp_path / "out", layout="custom")
    with pytest.raises(UsageError, match="--layout"):
        merge_lora(base=base, adapter=adapter, output=tmp_path / "out", layout="both")


def test_a_reference_of_the_wrong_layout(tmp_path):
    base = make(tmp_path / "base", "tiny", "hf")
    adapter = adapter_of(tmp_path / "adapter", "tiny", "hf")
    with pytest.raises(InputError, match="layout"):
        merge_lora(
            base=base, adapter=adapter, output=tmp_path / "out", layout="custom", reference=base
        )
    assert not (tmp_path / "out").exists()


def test_a_tied_base_is_untied(tmp_path):
    """The adapter leaves the embedding alone, so head and embedding stay equal."""
    base = make(tmp_path / "base", "tiny", "hf", tied=True)
    ref = make(tmp_path / "ref", "tiny", "custom")
    adapter = adapter_of(tmp_path / "adapter", "tiny", "hf")
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out", layout="custom", reference=ref)
    written = read(tmp_path / "out")
    assert same_tensor(
        written["language_model.lm_head.weight"],
        written["language_model.model.embed_tokens.weight"],
    )
    assert config_of(tmp_path / "out")["llm_config"]["tie_word_embeddings"] is False


def test_another_vocabulary(tmp_path):
    grown = replace(PRESETS["tiny"], vocab=297, image_token=270)
    base = make(tmp_path / "base", grown, "custom")
    ref = make(tmp_path / "ref", "tiny", "hf")
    adapter = adapter_of(tmp_path / "adapter", grown, "custom")
    call = {
        "base": base, "adapter": adapter, "output": tmp_path / "out", "layout": "hf",
        "reference": ref,
    }  # fmt: skip
    with pytest.raises(InputError, match="--tokenizer-from"):
        merge_lora(**call)
    merge_lora(**call, tokenizer_from="source")
    config = config_of(tmp_path / "out")
    assert (config["image_token_id"], config["text_config"]["vocab_size"]) == (270, 297)


# --- refused -------------------------------------------------------------------------------------


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
    with pytest.raises(AdapterError, match=r"layers\.3\."):
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


# --- real adapters, running models ---------------------------------------------------------------

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
