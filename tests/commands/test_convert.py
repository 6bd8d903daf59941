"""Conversions end to end: files in, files out, every family, both ways, and what is refused.

What a conversion must give is computed here by plain renaming and slicing of torch tensors
(`as_hf`, `as_custom`), and judged by running models.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from typing import Any

import pytest
import reference
import torch
import transformers
from folders import (
    COMMAND,
    INNER,
    OTHER,
    as_custom,
    as_hf,
    assert_files_of_safetensors,
    assert_same,
    carried,
    config_of,
    convert,
    distances,
    edit,
    make,
    put,
    settings_of,
    without_weights,
)
from models import TINY, custom_model, hf_model, load_custom, logits_of, pack
from models import scramble as randomise
from presets import PRESETS, SPELLINGS, tensor_shapes
from reference import digests, normal, read
from safetensors.torch import save_file

from streamshard.errors import InputError

# --- every family, both ways ----------------------------------------------------------------------


def test_the_expectation_is_its_own_inverse():
    preset = PRESETS["tiny-internlm2"]
    shapes = tensor_shapes(preset, "custom")
    custom = {name: normal(shape, 1, seed=len(name)) for name, shape in shapes.items()}
    hf = as_hf(custom, preset)
    assert {n: tuple(t.shape) for n, t in hf.items()} == tensor_shapes(preset, "hf")
    assert_same(as_custom(hf, preset), custom)


@pytest.mark.parametrize("size", ["5GB", "30KB"])
@pytest.mark.parametrize("layout", ["custom", "hf"])
@pytest.mark.parametrize("preset", TINY)
def test_there_and_back(preset, layout, size, tmp_path):
    source = make(tmp_path / "source", preset, OTHER[layout], max_shard_size=size)
    ref = make(tmp_path / "ref", preset, layout, seed=1)
    before = digests(source), digests(ref)
    report = convert(layout, source, ref, tmp_path / "out")
    content, written = read(source), read(tmp_path / "out")
    assert_same(written, carried(content, PRESETS[preset], layout))
    assert_files_of_safetensors(tmp_path / "out")
    expected = tensor_shapes(preset, layout)
    assert (report["command"], report["layout"]) == (COMMAND[layout], layout)
    assert (report["tensors"], report["missing"], report["unexpected"]) == (len(expected), [], [])
    assert report["parameters"] == sum(map(math.prod, expected.values()))
    assert report["shards"] == len(list((tmp_path / "out").glob("*.safetensors")))
    assert report["merged"] is None

    convert(OTHER[layout], tmp_path / "out", source, tmp_path / "back")
    assert_same(read(tmp_path / "back"), content)
    assert_files_of_safetensors(tmp_path / "back")
    assert (digests(source), digests(ref)) == before
    kept = json.loads((tmp_path / "out" / "streamshard.json").read_text())
    assert kept["l2"] == report["l2"]


@pytest.mark.parametrize("preset", ["tiny-6b-vit", "tiny-internlm2", "tiny-qwen3-moe"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_read(preset, spelling, tmp_path):
    source = make(tmp_path / "source", preset, "hf", spelling=spelling, max_shard_size="50KB")
    flat = make(tmp_path / "flat", preset, "hf", max_shard_size="50KB")
    ref = make(tmp_path / "ref", preset, "custom")
    report = convert("custom", source, ref, tmp_path / "out")
    assert report["warnings"] == []
    assert_same(read(tmp_path / "out"), as_custom(read(flat), PRESETS[preset]))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_wrappers_of_training_are_taken_off(prefix, tmp_path):
    for layout in ("custom", "hf"):
        source = make(tmp_path / layout, "tiny", OTHER[layout])
        content = read(source)
        put(source, {prefix + name: tensor for name, tensor in content.items()})
        ref = without_weights(make(tmp_path / f"{layout}-ref", "tiny", layout))
        convert(layout, source, ref, tmp_path / f"{layout}-out")
        expected = carried(content, PRESETS["tiny"], layout)
        assert_same(read(tmp_path / f"{layout}-out"), expected)


@pytest.mark.parametrize("preset", ["tiny", "tiny-internlm2"])
def test_fused_parts_in_different_files(preset, tmp_path):
    """q, k and v each in a file of its own, and the last part in the first file."""
    ref = without_weights(make(tmp_path / "ref", preset, "custom"))
    source = make(tmp_path / "source", preset, "hf")
    content = read(source)
    without_weights(source)
    shards: list[dict[str, torch.Tensor]] = [{}, {}, {}, {}]
    for name, tensor in content.items():
        part = re.search(r"\.([qkv])_proj\.", name)
        shards["vqk".index(part[1]) if part else 3][name] = tensor
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-00004.safetensors"
        save_file(shard, source / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    reference.save_index(source, weight_map)
    convert("custom", source, ref, tmp_path / "out")
    assert_same(read(tmp_path / "out"), as_custom(content, PRESETS[preset]))
    assert_files_of_safetensors(tmp_path / "out")


@pytest.mark.parametrize("size", ["20KB", "200KB"])
def test_files_of_another_size(size, tmp_path):
    for layout in ("custom", "hf"):
        source = make(tmp_path / layout, "tiny-internlm2", OTHER[layout], max_shard_size="70KB")
        ref = make(tmp_path / f"{layout}-ref", "tiny-internlm2", layout)
        out = tmp_path / f"{layout}-out"
        convert(layout, source, ref, out, max_shard_size=size)
        assert_same(read(out), carried(read(source), PRESETS["tiny-internlm2"], layout))
        assert_files_of_safetensors(out)


def test_a_bare_file_is_a_source(tmp_path):
    for layout in ("custom", "hf"):
        source = make(tmp_path / layout, "tiny-internlm2", OTHER[layout])
        ref = make(tmp_path / f"{layout}-ref", "tiny-internlm2", layout)
        out = tmp_path / f"{layout}-out"
        if layout == "custom":
            convert(layout, source / "model.safetensors", ref, out)
            assert_same(read(out), as_custom(read(source), PRESETS["tiny-internlm2"]))
        else:
            # An HF config does not tell InternLM2 from Llama.
            (source / "config.json").unlink()
            with pytest.raises(InputError, match="may be any of"):
                convert(layout, source / "model.safetensors", ref, out)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_another_dtype(dtype, tmp_path):
    source = make(tmp_path / "source", "tiny", "custom", dtype="fp32")
    ref = make(tmp_path / "ref", "tiny", "hf")
    convert("hf", source, ref, tmp_path / "out", dtype=dtype)
    torch_dtype = reference.TORCH[{"bf16": "BF16", "fp16": "F16", "fp32": "F32"}[dtype]]
    expected = as_hf(read(source), PRESETS["tiny"])
    assert_same(read(tmp_path / "out"), {n: t.to(torch_dtype) for n, t in expected.items()})


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_another_dtype_is_in_the_config(layout, tmp_path):
    source = make(tmp_path / "source", "tiny", OTHER[layout])
    ref = make(tmp_path / "ref", "tiny", layout)
    convert(layout, source, ref, tmp_path / "out", dtype="fp32")
    config = config_of(tmp_path / "out")
    assert config["torch_dtype"] == "float32"
    assert config[INNER[layout]]["torch_dtype"] == "float32"


def test_integers_and_other_dtypes_pass(tmp_path):
    """Old Llama checkpoints hold rotary frequencies, which no class has; other dtypes are kept."""
    source = make(tmp_path / "source", "tiny-llama", "custom")
    content = read(source)
    extra = {
        f"language_model.model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8)
        for i in range(3)
    }
    name = "language_model.model.norm.weight"
    content[name] = content[name].float()
    put(source, content | extra)
    ref = make(tmp_path / "ref", "tiny-llama", "hf")
    report = convert("hf", source, ref, tmp_path / "out")
    assert_same(read(tmp_path / "out"), as_hf(content, PRESETS["tiny-llama"]))
    assert report["unexpected"] == []
    assert_files_of_safetensors(tmp_path / "out")


# --- heads, ties, experts -------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["flat", "nested"])
@pytest.mark.parametrize("preset", ["tiny", "tiny-internlm2", "tiny-qwen3"])
def test_a_tied_source_gets_a_head_of_its_own(preset, spelling, tmp_path):
    source = make(tmp_path / "source", preset, "hf", tied=True, spelling=spelling)
    flat = make(tmp_path / "flat", preset, "hf", tied=True)
    ref = make(tmp_path / "ref", preset, "custom")
    report = convert("custom", source, ref, tmp_path / "out")
    content = read(flat)
    content["language_model.lm_head.weight"] = content["language_model.model.embed_tokens.weight"]
    assert_same(read(tmp_path / "out"), as_custom(content, PRESETS[preset]))
    assert report["missing"] == []
    config = config_of(tmp_path / "out")
    assert config["tie_word_embeddings"] is False
    assert config["llm_config"]["tie_word_embeddings"] is False
    assert_files_of_safetensors(tmp_path / "out")


@pytest.mark.parametrize("preset", ["tiny", "tiny-internlm2"])
@pytest.mark.parametrize("weights", [True, False], ids=["weights", "config-only"])
def test_a_tied_reference(preset, weights, tmp_path):
    """What is written is untied, whatever the reference was; L2 sees its head as the embedding."""
    source = make(tmp_path / "source", preset, "custom")
    ref = make(tmp_path / "ref", preset, "hf", tied=True)
    theirs = read(ref)
    if not weights:
        without_weights(ref)
    report = convert("hf", source, ref, tmp_path / "out")
    expected = as_hf(read(source), PRESETS[preset])
    assert_same(read(tmp_path / "out"), expected)
    config = config_of(tmp_path / "out")
    assert config["tie_word_embeddings"] is False
    assert config["text_config"]["tie_word_embeddings"] is False
    assert (report["missing"], report["unexpected"]) == ([], [])
    if weights:
        theirs["language_model.lm_head.weight"] = theirs["language_model.model.embed_tokens.weight"]
        shared = {n: t for n, t in expected.items() if n in theirs}
        assert report["l2"]["sum"] == pytest.approx(distances(shared, theirs)["sum"], rel=1e-9)


@pytest.mark.parametrize("flags", itertools.product([True, False, None], repeat=2))
@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_all_four_flags_are_false(layout, flags, tmp_path):
    source = make(tmp_path / "source", "tiny", OTHER[layout])
    ref = without_weights(make(tmp_path / "ref", "tiny", layout))

    def change(config: dict[str, Any]) -> None:
        for section, flag in zip((config, config[INNER[layout]]), flags, strict=True):
            section.pop("tie_word_embeddings")
            if flag is not None:
                section["tie_word_embeddings"] = flag

    convert(layout, source, edit(ref, change), tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config["tie_word_embeddings"] is False
    assert config[INNER[layout]]["tie_word_embeddings"] is False


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_packed_experts(layout, tmp_path):
    """transformers 5 may hold experts packed; they are written one by one, on both sides."""
    preset = PRESETS["tiny-qwen3-moe"]
    source = make(tmp_path / "source", preset, OTHER[layout])
    content = read(source)
    put(source, pack(content, preset))
    assert len(read(source)) < len(content)
    ref = make(tmp_path / "ref", preset, layout)
    expected = carried(content, preset, layout)
    put(ref, pack(read(ref), preset))
    report = convert(layout, source, ref, tmp_path / "out")
    assert_same(read(tmp_path / "out"), expected)
    assert report["l2"]["compared"] == len(expected)
    assert report["l2"]["skipped"] == []


# --- forward passes -------------------------------------------------------------------------------


FORWARD = [
    "tiny", "tiny-6b-vit", "tiny-qwen3", "tiny-llama", "tiny-internlm2", "tiny-internlm3",
    "tiny-qwen3-moe", "tiny-phi3", "tiny-gpt-oss",
]  # fmt: skip


@pytest.mark.parametrize("name", FORWARD)
def test_what_transformers_saved_runs_as_a_custom_model(name, tmp_path):
    preset = PRESETS[name]
    model = hf_model(settings_of(preset, "hf"))
    randomise(model)
    expected = logits_of(model, preset.image_token)
    model.save_pretrained(tmp_path / "hf", max_shard_size="100KB")
    ref = make(tmp_path / "ref", preset, "custom", dtype="fp32")
    report = convert("custom", tmp_path / "hf", ref, tmp_path / "out")
    assert (report["missing"], report["unexpected"]) == ([], [])
    config = config_of(tmp_path / "out")
    made = custom_model(config, preset.image_token)
    load_custom(made, read(tmp_path / "out"), preset)
    found = logits_of(made, preset.image_token)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FORWARD)
def test_a_custom_model_runs_in_transformers(name, tmp_path):
    """The reference is what transformers 5 writes: its config has rope_parameters only."""
    preset = PRESETS[name]
    model = custom_model(settings_of(preset, "custom"), preset.image_token)
    randomise(model)
    expected = logits_of(model, preset.image_token)
    source = make(tmp_path / "source", preset, "custom", dtype="fp32")
    shapes, state = tensor_shapes(preset, "custom"), model.state_dict()
    for tensor in [n for n in state if n not in shapes]:  # transformers 5 packs the experts
        stem = tensor.rpartition(".")[0]
        for e, matrix in enumerate(state.pop(tensor)):
            split = (
                zip(("gate", "up"), matrix.chunk(2), strict=True)
                if tensor.endswith("gate_up_proj")
                else [("down", matrix)]
            )
            state |= {f"{stem}.{e}.{part}_proj.weight": rows for part, rows in split}
    put(source, state)
    hf_model(settings_of(preset, "hf")).save_pretrained(tmp_path / "ref", max_shard_size="100KB")
    report = convert("hf", source, tmp_path / "ref", tmp_path / "out")
    assert report["l2"]["skipped"] == []
    loaded, info = transformers.InternVLForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype="auto", attn_implementation="eager"
    )
    assert not {kind: found for kind, found in info.items() if found}
    assert loaded.dtype == torch.float32
    found = logits_of(loaded.eval(), preset.image_token)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
