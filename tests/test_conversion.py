"""Conversions end to end: files in, files out, every family, both ways, and what is refused.

What a conversion must give is computed here by plain renaming and slicing of torch tensors
(`as_hf`, `as_custom`), and judged by running models.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
import transformers
from families import PRESETS, SPELLINGS, Preset, model_config, tensor_shapes
from make_checkpoint import write_checkpoint
from reference import INDEX, bits, digests, normal, read, same_tensor
from safetensors.torch import load_file, save_file
from test_layouts import MODELS, TINY, custom_model, hf_model, load_custom, logits_of, pack
from test_layouts import scramble as randomise

from streamshard import custom_to_hf, hf_to_custom
from streamshard.errors import InputError, OutputError, UsageError

OTHER = {"custom": "hf", "hf": "custom"}
INNER = {"custom": "llm_config", "hf": "text_config"}
COMMAND = {"custom": "hf2custom", "hf": "custom2hf"}
HEADS = {"language_model.lm_head.weight", "language_model.output.weight"}


# --- what a conversion must give -----------------------------------------------------------------

VISION_NAMES = {
    "vision_model.embeddings.class_embedding": "vision_tower.embeddings.cls_token",
    "vision_model.embeddings.position_embedding": "vision_tower.embeddings.position_embeddings",
    "vision_model.embeddings.patch_embedding": "vision_tower.embeddings.patch_embeddings.projection",
    "vision_model.encoder.layers.": "vision_tower.encoder.layer.",
    "attn.proj.": "attention.projection_layer.",
    "attn.": "attention.",
    "norm1.": "layernorm_before.",
    "norm2.": "layernorm_after.",
    "mlp1.0.": "multi_modal_projector.layer_norm.",
    "mlp1.1.": "multi_modal_projector.linear_1.",
    "mlp1.3.": "multi_modal_projector.linear_2.",
}
INTERNLM2_NAMES = {
    "language_model.output.": "language_model.lm_head.",
    "tok_embeddings": "embed_tokens",
    "attention.wo.": "self_attn.o_proj.",
    "feed_forward.w1.": "mlp.gate_proj.",
    "feed_forward.w3.": "mlp.up_proj.",
    "feed_forward.w2.": "mlp.down_proj.",
    ".attention_norm.": ".input_layernorm.",
    ".ffn_norm.": ".post_attention_layernorm.",
}


def as_hf(custom: Mapping[str, torch.Tensor], preset: Preset) -> dict[str, torch.Tensor]:
    """A custom checkpoint's tensors in the HF layout, flat spelling."""
    out: dict[str, torch.Tensor] = {}
    for name, tensor in custom.items():
        if name.startswith("language_model."):
            if ".wqkv." in name:
                share, groups = preset.heads // preset.kv_heads, preset.kv_heads
                view = tensor.reshape(groups, share + 2, preset.head_dim, -1)
                stem = name.replace("attention.wqkv.weight", "self_attn.{}_proj.weight")
                for part, rows in zip("qkv", (view[:, :share], view[:, share], view[:, share + 1]),
                                      strict=True):  # fmt: skip
                    out[stem.format(part)] = rows.reshape(-1, tensor.shape[1])
                continue
            names = INTERNLM2_NAMES if preset.arch == "InternLM2ForCausalLM" else {}
        elif ".qkv." in name:
            stem = name.replace("vision_model.encoder.layers.", "vision_tower.encoder.layer.")
            stem = stem.replace("attn.qkv.", "attention.{}_proj.")
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                out[stem.format(part)] = rows
            continue
        else:
            names = VISION_NAMES
        for old, new in names.items():
            name = name.replace(old, new, 1)  # noqa: PLW2901
        name = re.sub(r"(vision_tower\..*)\.ls([12])$", r"\1.lambda_\2", name)  # noqa: PLW2901
        out[name] = tensor
    return out


def as_custom(hf: Mapping[str, torch.Tensor], preset: Preset) -> dict[str, torch.Tensor]:
    """The inverse of `as_hf`, by the place of each element."""
    shapes = tensor_shapes(preset, "custom")
    ends = list(itertools.accumulate(map(math.prod, shapes.values()), initial=0))
    places = {
        name: torch.arange(start, start + math.prod(shape)).reshape(shape)
        for (name, shape), start in zip(shapes.items(), ends, strict=False)
    }
    moved = as_hf(places, preset)
    assert moved.keys() == hf.keys()
    flat = torch.zeros(ends[-1], dtype=next(iter(hf.values())).dtype)
    for name, place in moved.items():
        flat[place.reshape(-1)] = hf[name].reshape(-1)
    return {name: flat[place] for name, place in places.items()}


def carried(tensors: Mapping[str, torch.Tensor], preset: Preset, layout: str) -> dict[str, Any]:
    return (as_custom if layout == "custom" else as_hf)(tensors, preset)


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if not same_tensor(found[name], expected[name])]
    assert not different


# --- making and reading folders ------------------------------------------------------------------


def make(folder: Path, preset: Preset | str, layout: str, **how: Any) -> Path:
    write_checkpoint(folder, preset, layout=layout, **how)
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Change the config of a folder in place."""
    config = config_of(folder)
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def without_weights(folder: Path) -> Path:
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    return folder


def put(folder: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Replace the weights of a folder by these, in one file."""
    without_weights(folder)
    content = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(content, folder / "model.safetensors", {"format": "pt"})
    return folder


def convert(layout: str, source: Path, ref: Path, output: Path, **options: Any) -> dict[str, Any]:
    if layout == "custom":
        return hf_to_custom(hf_path=source, custom_path=ref, save_path=output, **options)
    return custom_to_hf(custom_path=source, hf_path=ref, save_path=output, **options)


def command(layout: str, source: Path, ref: Path, output: Path) -> list[str | Path]:
    paths = {f"--{OTHER[layout]}-path": source, f"--{layout}-path": ref, "--save-path": output}
    return [COMMAND[layout], *itertools.chain.from_iterable(paths.items())]


def assert_files_of_safetensors(folder: Path) -> None:
    """Each file is what `save_file` writes of its content, and the index what transformers does."""
    files = sorted(folder.glob("*.safetensors"))
    weight_map, size, parameters = {}, 0, 0
    for file in files:
        content = load_file(file)
        again = folder.parent / "again.safetensors"
        save_file(content, again, {"format": "pt"})
        assert file.read_bytes() == again.read_bytes(), file.name
        weight_map |= dict.fromkeys(content, file.name)
        size += sum(tensor.nbytes for tensor in content.values())
        parameters += sum(tensor.numel() for tensor in content.values())
    index = folder / INDEX
    assert index.exists() == (len(files) > 1)
    if len(files) == 1:
        assert files[0].name == "model.safetensors"
        return
    count = len(files)
    assert [f.name for f in files] == [
        f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)
    ]
    content = {
        "metadata": {"total_parameters": parameters, "total_size": size},
        "weight_map": weight_map,
    }
    assert index.read_text() == json.dumps(content, indent=2, sort_keys=True) + "\n"


# --- every family, both ways ---------------------------------------------------------------------


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


# --- heads, ties, experts ------------------------------------------------------------------------


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


# --- forward passes ------------------------------------------------------------------------------

FORWARD = [
    "tiny", "tiny-6b-vit", "tiny-qwen3", "tiny-llama", "tiny-internlm2", "tiny-internlm3",
    "tiny-qwen3-moe", "tiny-phi3", "tiny-gpt-oss",
]  # fmt: skip


def settings_of(preset: Preset, layout: str) -> dict[str, Any]:
    return model_config(preset, layout, tied=False, torch_dtype="float32")


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


# --- config and side files -----------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_side_files_are_those_of_the_reference(layout, tmp_path):
    source = make(tmp_path / "source", "tiny-internlm2", OTHER[layout])
    ref = make(tmp_path / "ref", "tiny-internlm2", layout, max_shard_size="50KB")
    (source / "of-the-source.txt").write_text("not carried")
    for name in (
        "video_preprocessor_config.json",
        "chat_template.json",
        "tokenizer.model",
        "LICENSE",
    ):
        (ref / name).write_text(f"{name} of the reference")
    (ref / "examples").mkdir()
    (ref / "examples" / "image.jpg").write_bytes(b"\xff\xd8")
    for name in ("added_tokens.json", "preprocessor_config.json"):
        (ref / name).write_text((ref / name).read_text() + "\n\n")
    # Spaces that no JSON writer makes: a copy has them.
    (ref / "config.json").write_text((ref / "config.json").read_text().replace("{", "{  ") + "\n")
    convert(layout, source, ref, tmp_path / "out")
    theirs, ours = digests(ref), digests(tmp_path / "out")
    side = {n: d for n, d in theirs.items() if not re.match(r"model[-.]", n)}
    assert {n: d for n, d in ours.items() if n in side} == side
    assert set(ours) - set(side) == {"model.safetensors", "streamshard.json"}
    if layout == "custom":
        assert {"modeling_internvl_chat.py", "tokenization_internlm2.py"} <= set(ours)
    else:
        assert {"chat_template.jinja", "preprocessor_config.json"} <= set(ours)
        assert not [name for name in ours if name.endswith(".py")]


@pytest.mark.parametrize(
    ("parameters", "scaling"),
    [
        ({"rope_type": "default", "rope_theta": 10000.0}, None),
        (
            {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
            {"type": "dynamic", "factor": 2.0},
        ),
    ],
)
@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_rope_parameters_are_translated(layout, parameters, scaling, tmp_path):
    source = make(tmp_path / "source", "tiny", OTHER[layout])
    ref = make(tmp_path / "ref", "tiny", layout)

    def change(config: dict[str, Any]) -> None:
        inner = config[INNER[layout]]
        del inner["rope_theta"], inner["rope_scaling"]
        inner["rope_parameters"] = parameters

    convert(layout, source, edit(ref, change), tmp_path / "out")
    inner = config_of(tmp_path / "out")[INNER[layout]]
    assert inner["rope_theta"] == 10000.0
    assert inner.get("rope_scaling") == scaling
    assert inner["rope_parameters"] == parameters


def test_lora_flags_of_the_reference_are_reset(tmp_path):
    source = make(tmp_path / "source", "tiny", "hf")
    ref = make(tmp_path / "ref", "tiny", "custom")
    edit(ref, lambda config: config.update(use_llm_lora=128, use_backbone_lora=16))
    convert("custom", source, ref, tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert (config["use_llm_lora"], config["use_backbone_lora"]) == (0, 0)


@pytest.mark.parametrize("version", ["v1", None])
@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_the_old_order_of_pixels_is_refused(layout, version, tmp_path):
    folders = {side: make(tmp_path / side, "tiny", side) for side in ("custom", "hf")}
    edit(folders["custom"], lambda config: config.pop("ps_version"))
    if version is not None:
        edit(folders["custom"], lambda config: config.update(ps_version=version))
    with pytest.raises(InputError, match="ps_version"):
        convert(layout, folders[OTHER[layout]], folders[layout], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_a_reference_without_weights(layout, tmp_path, cli):
    source = make(tmp_path / "source", "tiny", OTHER[layout])
    ref = without_weights(make(tmp_path / "ref", "tiny", layout))
    outcome = cli(*command(layout, source, ref, tmp_path / "out"), "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["l2"] is None
    assert_same(read(tmp_path / "out"), carried(read(source), PRESETS["tiny"], layout))


# --- vocabularies --------------------------------------------------------------------------------

# As a fine-tune with nine more tokens has it.
GROWN = replace(PRESETS["tiny"], vocab=297, image_token=270)


def token_files(folder: Path) -> dict[str, bytes]:
    names = ("added_tokens", "special_tokens_map", "tokenizer_config", "vocab")
    return {n: (folder / f"{n}.json").read_bytes() for n in names}


@pytest.mark.parametrize("weights", [True, False], ids=["weights", "config-only"])
@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_other_vocabularies_need_a_word(layout, weights, tmp_path, cli):
    source = make(tmp_path / "source", GROWN, OTHER[layout])
    ref = make(tmp_path / "ref", "tiny", layout)
    if not weights:
        without_weights(ref)
    text = refused(cli, tmp_path, 3, *command(layout, source, ref, tmp_path / "out"))
    assert "--tokenizer-from" in text
    assert "297" in text
    assert "288" in text


@pytest.mark.parametrize("whose", ["source", "reference"])
@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_whose_tokenizer(layout, whose, tmp_path):
    source = make(tmp_path / "source", GROWN, OTHER[layout])
    ref = make(tmp_path / "ref", "tiny", layout)
    (source / "tokenizer.json").write_text("{}")
    (ref / "tokenizer.model").write_text("old")
    before = digests(tmp_path)
    report = convert(layout, source, ref, tmp_path / "out", tokenizer_from=whose)
    out = tmp_path / "out"
    assert token_files(out) == token_files(tmp_path / {"reference": "ref"}.get(whose, whose))
    assert (out / "tokenizer.json").exists() == (whose == "source")
    assert (out / "tokenizer.model").exists() == (whose == "reference")
    config = config_of(out)
    assert config[INNER[layout]]["vocab_size"] == 297
    if layout == "hf":
        assert config["image_token_id"] == (270 if whose == "source" else 261)
        assert (out / "chat_template.jinja").exists()
    preprocessor = "preprocessor_config.json"
    assert (out / preprocessor).read_bytes() == (ref / preprocessor).read_bytes()
    assert_same(read(out), carried(read(source), GROWN, layout))
    # Embedding and head have no twin of their shape.
    assert len(report["l2"]["skipped"]) == 2
    assert report["l2"]["compared"] == len(tensor_shapes("tiny", layout)) - 2
    assert {n: d for n, d in digests(tmp_path).items() if not n.startswith("out")} == before


@pytest.mark.parametrize("kept", ["added_tokens.json", "tokenizer_config.json", "tokenizer.json"])
def test_the_image_token_is_found_in_any_file(kept, tmp_path):
    source = make(tmp_path / "source", GROWN, "custom")
    entries = [{"id": 7, "content": "<img>"}, {"id": 270, "content": "<IMG_CONTEXT>"}]
    (source / "tokenizer.json").write_text(json.dumps({"added_tokens": entries}))
    for name in {"added_tokens.json", "tokenizer_config.json", "tokenizer.json"} - {kept}:
        (source / name).unlink()
    ref = make(tmp_path / "ref", "tiny", "hf")
    convert("hf", source, ref, tmp_path / "out", tokenizer_from="source")
    assert config_of(tmp_path / "out")["image_token_id"] == 270


def test_an_image_token_that_no_file_has(tmp_path, cli):
    source = make(tmp_path / "source", GROWN, "custom")
    (source / "added_tokens.json").unlink()
    (source / "tokenizer_config.json").write_text("{}")
    ref = make(tmp_path / "ref", "tiny", "hf")
    call = [*command("hf", source, ref, tmp_path / "out"), "--tokenizer-from", "source"]
    assert "<IMG_CONTEXT>" in refused(cli, tmp_path, 3, *call)


def test_a_source_without_tokenizer(tmp_path, cli):
    source = make(tmp_path / "source", GROWN, "custom")
    for name in ("added_tokens", "special_tokens_map", "tokenizer_config", "vocab"):
        (source / f"{name}.json").unlink()
    (source / "merges.txt").unlink()
    ref = make(tmp_path / "ref", "tiny", "hf")
    call = [*command("hf", source, ref, tmp_path / "out"), "--tokenizer-from", "source"]
    assert "no tokenizer files" in refused(cli, tmp_path, 3, *call)


def test_an_unknown_tokenizer_choice(tmp_path):
    source, ref = make(tmp_path / "s", "tiny", "custom"), make(tmp_path / "r", "tiny", "hf")
    with pytest.raises(UsageError, match="tokenizer-from"):
        convert("hf", source, ref, tmp_path / "out", tokenizer_from="both")


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_a_reference_that_does_not_state_its_vocabulary(layout, tmp_path, cli):
    """Not known is not equal; it must not be an unexpected error either."""
    source = make(tmp_path / "source", "tiny", OTHER[layout])
    ref = without_weights(make(tmp_path / "ref", "tiny", layout))
    edit(ref, lambda config: config[INNER[layout]].pop("vocab_size"))
    outcome = cli(*command(layout, source, ref, tmp_path / "out"))
    assert outcome.code in {0, 3}, outcome.err


def test_the_config_says_how_many_rows_there_are(tmp_path):
    """A config may disagree with its own weights; what is written does not."""
    source = make(tmp_path / "source", "tiny", "custom")
    ref = make(tmp_path / "ref", "tiny", "hf")
    edit(ref, lambda config: config["text_config"].update(vocab_size=300))
    convert("hf", source, ref, tmp_path / "out")
    assert config_of(tmp_path / "out")["text_config"]["vocab_size"] == 288


# --- L2 ------------------------------------------------------------------------------------------


def distances(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> Any:
    """In fp64, what upstream prints and the global norm."""
    shared = [n for n in ours if n in theirs and ours[n].shape == theirs[n].shape]
    squares = [float(((ours[n].double() - theirs[n].double()) ** 2).sum()) for n in shared]
    total = math.fsum(math.sqrt(square) for square in squares)
    count = sum(ours[n].numel() for n in shared)
    return {
        "sum": total,
        "per_parameter": total / count,
        "global": math.sqrt(math.fsum(squares)),
        "compared": len(shared),
    }


def upstream(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> Any:
    """The figures of InternVL's scripts, in their arithmetic."""
    total, count = 0.0, 0
    for name in ours.keys() & theirs.keys():
        if ours[name].shape == theirs[name].shape:
            total += torch.norm(ours[name].float() - theirs[name].float(), p=2).item()
            count += ours[name].numel()
    return total, total / count


REFERENCES: dict[str, dict[str, Any]] = {
    "alike": {},
    "sharded": {"max_shard_size": "20KB"},
    "fp32": {"dtype": "fp32"},
    "fp16": {"dtype": "fp16", "max_shard_size": "50KB"},
    "nested": {"spelling": "nested"},
    "hybrid": {"spelling": "hybrid", "max_shard_size": "50KB"},
    "tied": {"tied": True},
}
CASES = [
    (layout, name)
    for layout in ("custom", "hf")
    for name, how in REFERENCES.items()
    if layout == "hf" or not how.keys() & {"spelling", "tied"}
]


def flattened(tensors: Mapping[str, torch.Tensor], preset: Preset, layout: str) -> dict[str, Any]:
    """The tensors of `make`'s HF folders under flat names, with a head."""
    if layout == "custom":
        return dict(tensors)
    rules = (
        (r"^(?:model\.)?(?:language_model\.)?lm_head\.", "language_model.lm_head."),
        (r"^(?:model\.)?(vision_tower|multi_modal_projector)\.", r"\1."),
        (r"^(?:model\.)?language_model\.(?!lm_head)(?:model\.)?", "language_model.model."),
    )
    out = {}
    for name, tensor in tensors.items():
        rule = next((p, r) for p, r in rules if re.match(p, name))
        out[re.sub(*rule, name)] = tensor
    out.setdefault("language_model.lm_head.weight", out["language_model.model.embed_tokens.weight"])
    return out


@pytest.mark.parametrize("preset", ["tiny-6b-vit", "tiny-internlm2"])
@pytest.mark.parametrize(("layout", "case"), CASES)
def test_distance_from_the_reference(layout, case, preset, tmp_path):
    source = make(tmp_path / "source", preset, OTHER[layout], max_shard_size="40KB")
    ref = make(tmp_path / "ref", preset, layout, seed=5, **REFERENCES[case])
    report = convert(layout, source, ref, tmp_path / "out")
    ours = carried(read(source), PRESETS[preset], layout)
    theirs = flattened(read(ref), PRESETS[preset], layout)
    expected = distances(ours, theirs)
    assert expected["sum"] > 1
    found = report["l2"]
    for key in ("sum", "per_parameter", "global"):
        assert found[key] == pytest.approx(expected[key], rel=1e-9)
    assert found["compared"] == expected["compared"] == len(ours)
    assert found["skipped"] == []
    assert found["reference"] == str(ref)
    total, average = upstream(ours, theirs)
    assert found["sum"] == pytest.approx(total, rel=1e-5)
    assert found["per_parameter"] == pytest.approx(average, rel=1e-5)
    kept = json.loads((tmp_path / "out" / "streamshard.json").read_text())["l2_per_tensor"]
    assert math.fsum(kept.values()) == pytest.approx(expected["sum"], rel=1e-9)


@pytest.mark.parametrize("spelling", ["flat", "nested"])
@pytest.mark.parametrize("preset", TINY)
def test_no_distance_from_the_same_model(preset, spelling, tmp_path):
    hf = make(tmp_path / "hf", preset, "hf", max_shard_size="50KB", spelling=spelling)
    ref = without_weights(make(tmp_path / "ref", preset, "custom"))
    convert("custom", hf, ref, tmp_path / "custom")
    report = convert("hf", tmp_path / "custom", hf, tmp_path / "back", max_shard_size="30KB")
    l2 = report["l2"]
    assert (l2["sum"], l2["per_parameter"], l2["global"]) == (0.0, 0.0, 0.0)
    assert (l2["compared"], l2["skipped"]) == (len(tensor_shapes(preset, "hf")), [])
    report = convert("custom", hf, tmp_path / "custom", tmp_path / "again")
    assert report["l2"]["sum"] == 0.0
    assert report["l2"]["compared"] == len(tensor_shapes(preset, "custom"))


def test_no_distance_of_the_same_values_in_another_dtype(tmp_path):
    source = make(tmp_path / "source", "tiny", "custom")
    ref = make(tmp_path / "ref", "tiny", "hf")
    wide = {n: t.float() for n, t in as_hf(read(source), PRESETS["tiny"]).items()}
    put(ref, wide)
    assert convert("hf", source, ref, tmp_path / "out")["l2"]["sum"] == 0.0


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_distances_of_large_tensors_do_not_depend_on_workers(dtype, tmp_path):
    """Embeddings of more than one unit of work, with a last block that is not full."""
    preset = replace(PRESETS["tiny-internlm2"], vocab=70_001)
    source = make(tmp_path / "source", preset, "hf")
    ref = make(tmp_path / "ref", preset, "custom", dtype=dtype)
    reports = [convert("custom", source, ref, tmp_path / f"out-{n}", workers=n) for n in (1, 2, 3)]
    assert reports[0]["l2"] == reports[1]["l2"] == reports[2]["l2"]
    ours = as_custom(read(source), preset)
    expected = distances(ours, read(ref))
    for key in ("sum", "per_parameter", "global"):
        assert reports[0]["l2"][key] == pytest.approx(expected[key], rel=1e-9)
    files = [(tmp_path / f"out-{n}" / "model.safetensors").read_bytes() for n in (1, 2, 3)]
    assert files[0] == files[1] == files[2]
    assert_same(read(tmp_path / "out-1"), ours)


# --- refused -------------------------------------------------------------------------------------


def refused(cli: Any, root: Path, code: int, *call: Any) -> str:
    """Run a command that must fail, say so in words, and leave every file as it is."""
    before = digests(root)
    outcome = cli(*call)
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")
    assert "unexpected " not in outcome.err.partition("\n")[0].partition(":")[2][:20]
    assert digests(root) == before
    return outcome.err


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """A tiny model in both layouts."""
    return {side: make(tmp_path / side, "tiny", side) for side in ("custom", "hf")}


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_swapped_folders(layout, folders, tmp_path, cli):
    call = command(layout, folders[layout], folders[OTHER[layout]], tmp_path / "out")
    text = refused(cli, tmp_path, 3, *call)
    assert "swapped" in text


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_weights_of_the_wrong_layout(layout, folders, tmp_path, cli):
    """The config is right, the weights are not."""
    source = folders[OTHER[layout]]
    put(source, read(folders[layout]))
    text = refused(cli, tmp_path, 3, *command(layout, source, folders[layout], tmp_path / "out"))
    assert "layout" in text


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_a_reference_with_weights_of_the_wrong_layout(layout, folders, tmp_path, cli):
    source = folders[OTHER[layout]]
    put(folders[layout], read(source))
    text = refused(cli, tmp_path, 3, *command(layout, source, folders[layout], tmp_path / "out"))
    assert "layout" in text


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_mixed_layouts(layout, folders, tmp_path, cli):
    source = folders[OTHER[layout]]
    put(source, read(source) | read(folders[layout]))
    text = refused(cli, tmp_path, 3, *command(layout, source, folders[layout], tmp_path / "out"))
    assert "of the custom layout" in text
    assert "of the HF layout" in text
    assert "multi_modal_projector." in text


@pytest.mark.parametrize(
    ("one", "other"), [("tiny", "tiny-qwen3"), ("tiny-internlm2", "tiny-llama")]
)
def test_mixed_families(one, other, tmp_path, cli):
    source = make(tmp_path / "source", one, "custom")
    second = read(make(tmp_path / "second", other, "custom"))
    put(source, second | read(source))
    ref = make(tmp_path / "ref", one, "hf")
    text = refused(cli, tmp_path, 3, *command("hf", source, ref, tmp_path / "out"))
    assert "unexpected" in text
    name = next(n for n in second if n not in tensor_shapes(one, "custom"))
    assert name in text


@pytest.mark.parametrize("weights", [True, False], ids=["weights", "config-only"])
@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_a_reference_of_another_family(layout, weights, tmp_path, cli):
    source = make(tmp_path / "source", "tiny", OTHER[layout])
    ref = make(tmp_path / "ref", "tiny-qwen3", layout)
    if not weights:
        without_weights(ref)
    refused(cli, tmp_path, 3, *command(layout, source, ref, tmp_path / "out"))


@pytest.mark.parametrize("part", "qkv")
@pytest.mark.parametrize("weights", [True, False], ids=["weights", "config-only"])
@pytest.mark.parametrize("preset", ["tiny", "tiny-internlm2"])
def test_a_missing_part_of_a_triple(preset, weights, part, tmp_path, cli):
    name = f"vision_tower.encoder.layer.1.attention.{part}_proj.weight"
    fused = "vision_model.encoder.layers.1.attn.qkv.weight"
    if preset == "tiny-internlm2":
        name = f"language_model.model.layers.1.self_attn.{part}_proj.weight"
        fused = "language_model.model.layers.1.attention.wqkv.weight"
    source = make(tmp_path / "source", preset, "hf")
    content = read(source)
    del content[name]
    put(source, content)
    ref = make(tmp_path / "ref", preset, "custom")
    if not weights:
        without_weights(ref)
    call = command("custom", source, ref, tmp_path / "out")
    text = refused(cli, tmp_path, 3, *call)
    assert "missing" in text
    assert name in text
    outcome = cli(*call, "--allow-missing", "--json")
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert name in report["missing"] or fused in report["missing"]
    written = read(tmp_path / "out")
    assert set(written) == set(tensor_shapes(preset, "custom")) - {fused}


def test_a_missing_tensor_is_reported_once(tmp_path, cli):
    """One tensor is missing, so one name is reported, with a reference's weights or without."""
    name = "vision_model.encoder.layers.0.mlp.fc1.bias"
    source = make(tmp_path / "source", "tiny", "custom")
    content = read(source)
    del content[name]
    put(source, content)
    ref = make(tmp_path / "ref", "tiny", "hf")
    report = convert("hf", source, ref, tmp_path / "out", allow_missing=True)
    assert len(report["missing"]) == 1, report["missing"]


@pytest.mark.parametrize("weights", [True, False], ids=["weights", "config-only"])
@pytest.mark.parametrize("layout", ["custom", "hf"])
@pytest.mark.parametrize("what", ["missing", "unexpected"])
def test_missing_and_unexpected_tensors(what, layout, weights, folders, tmp_path, cli):
    source, ref = folders[OTHER[layout]], folders[layout]
    if not weights:
        without_weights(ref)
    content = read(source)
    # A name that both layouts share.
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    if what == "missing":
        del content[name]
        expected = carried(read(source), PRESETS["tiny"], layout)
        del expected[name]
    else:
        name = "language_model.model.layers.1.mlp.up_proj.other"
        expected = carried(content, PRESETS["tiny"], layout)
        content[name] = torch.ones(3)
    put(source, content)
    call = command(layout, source, ref, tmp_path / "out")
    text = refused(cli, tmp_path, 3, *call)
    assert name in text
    assert f"--allow-{what}" in text
    other = {"missing": "unexpected", "unexpected": "missing"}[what]
    refused(cli, tmp_path, 3, *call, f"--allow-{other}")
    outcome = cli(*call, f"--allow-{what}", "--json")
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert report[what] == [name]
    assert report[other] == []
    assert_same(read(tmp_path / "out"), expected)


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_a_missing_head_is_not_invented(layout, folders, tmp_path, cli):
    source = folders[OTHER[layout]]
    content = read(source)
    del content["language_model.lm_head.weight"]
    put(source, content)
    call = command(layout, source, folders[layout], tmp_path / "out")
    assert "language_model.lm_head.weight" in refused(cli, tmp_path, 3, *call)
    assert cli(*call, "--allow-missing").code == 0
    assert not HEADS & set(read(tmp_path / "out"))


@pytest.mark.parametrize("weights", [True, False], ids=["weights", "config-only"])
@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_a_head_of_other_rows_than_the_embedding(layout, weights, folders, tmp_path, cli):
    """No class can load it: both have vocab_size rows."""
    source = folders[OTHER[layout]]
    content = read(source)
    content["language_model.lm_head.weight"] = content["language_model.lm_head.weight"][:280]
    put(source, content)
    if not weights:
        without_weights(folders[layout])
    refused(cli, tmp_path, 3, *command(layout, source, folders[layout], tmp_path / "out"))


def test_a_layer_too_many(folders, tmp_path, cli):
    content = read(folders["hf"])
    more = {n.replace(".layers.2.", ".layers.3."): t for n, t in content.items()}
    put(folders["hf"], content | more)
    call = command("custom", folders["hf"], folders["custom"], tmp_path / "out")
    assert "layers.3." in refused(cli, tmp_path, 3, *call)


def test_a_layer_too_few(folders, tmp_path, cli):
    content = {n: t for n, t in read(folders["hf"]).items() if ".layers.2." not in n}
    put(folders["hf"], content)
    without_weights(folders["custom"])
    call = command("custom", folders["hf"], folders["custom"], tmp_path / "out")
    assert "layers.2." in refused(cli, tmp_path, 3, *call)


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("tiny", {"num_key_value_heads": 3}),
        ("tiny-internlm2", {"num_key_value_heads": 3}),
        ("tiny-internlm2", {"num_attention_heads": 6, "head_dim": None}),
        ("tiny-internlm2", {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}),
    ],
)
@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_heads_that_do_not_fit(layout, preset, changes, tmp_path, cli):
    """Both configs agree on it, so that only the counts themselves are wrong."""
    made = {side: make(tmp_path / side, preset, side) for side in ("custom", "hf")}
    for side, folder in made.items():
        edit(folder, lambda config, side=side: config[INNER[side]].update(changes))
    refused(cli, tmp_path, 3, *command(layout, made[OTHER[layout]], made[layout], tmp_path / "out"))


OTHERS: dict[str, tuple[str | None, dict[str, tuple[str, Any]]]] = {
    "heads": ("inner", {"both": ("num_attention_heads", 2)}),
    "kv-heads": ("inner", {"both": ("num_key_value_heads", 4)}),
    "layers": ("inner", {"both": ("num_hidden_layers", 4)}),
    "rope_theta": ("inner", {"both": ("rope_theta", 1e6)}),
    "rms_norm_eps": ("inner", {"both": ("rms_norm_eps", 1e-5)}),
    "hidden": ("inner", {"both": ("hidden_size", 128)}),
    "intermediate": ("inner", {"both": ("intermediate_size", 128)}),
    "vision-layers": ("vision_config", {"both": ("num_hidden_layers", 3)}),
    "vision-hidden": ("vision_config", {"both": ("hidden_size", 64)}),
    "vision-eps": ("vision_config", {"both": ("layer_norm_eps", 1e-5)}),
    "vision-norm": ("vision_config", {"both": ("norm_type", "rms_norm")}),
    "image": ("vision_config", {"custom": ("image_size", 56), "hf": ("image_size", [56, 56])}),
    "vision-heads": ("vision_config", {"both": ("num_attention_heads", 4)}),
    "qk-norm": ("vision_config", {"custom": ("qk_normalization", True), "hf": ("use_qk_norm", True)}),
    "qkv-bias": ("vision_config", {"custom": ("qkv_bias", False), "hf": ("attention_bias", False)}),
    "ratio": (None, {"both": ("downsample_ratio", 0.25)}),
    "layer": (None, {"custom": ("select_layer", -2), "hf": ("vision_feature_layer", -2)}),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_a_reference_of_another_model(layout, case, folders, tmp_path, cli):
    section, choices = OTHERS[case]
    key, value = choices.get("both") or choices[layout]
    ref = without_weights(folders[layout])

    def change(config: dict[str, Any]) -> None:
        inside = INNER[layout] if section == "inner" else section
        (config[inside] if inside else config)[key] = value

    edit(ref, change)
    refused(cli, tmp_path, 3, *command(layout, folders[OTHER[layout]], ref, tmp_path / "out"))


def test_the_rope_of_the_reference_may_be_in_parameters(folders, tmp_path, cli):
    def change(config: dict[str, Any]) -> None:
        del config["text_config"]["rope_theta"]
        config["text_config"]["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e6}

    ref = edit(without_weights(folders["hf"]), change)
    call = command("hf", folders["custom"], ref, tmp_path / "out")
    assert "rope_theta" in refused(cli, tmp_path, 3, *call)


@pytest.mark.parametrize("key", ["num_experts_per_tok", "norm_topk_prob"])
@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_a_reference_that_routes_otherwise(layout, key, tmp_path, cli):
    source = make(tmp_path / "source", "tiny-qwen3-moe", OTHER[layout])
    ref = without_weights(make(tmp_path / "ref", "tiny-qwen3-moe", layout))
    value = {"num_experts_per_tok": 3, "norm_topk_prob": False}[key]
    edit(ref, lambda config: config[INNER[layout]].update({key: value}))
    assert key in refused(cli, tmp_path, 3, *command(layout, source, ref, tmp_path / "out"))


ROPES: dict[str, dict[str, Any]] = {
    "none": {"rope_scaling": None},
    "two": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "four": {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "new-none": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "new-two": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("none", "two"),
        ("two", "none"),
        ("two", "four"),
        ("none", "new-two"),
        ("two", "new-none"),
        ("four", "new-two"),
        ("two", "new-two"),
        ("none", "new-none"),
    ],
)
def test_a_reference_that_scales_positions_otherwise(one, other, folders, tmp_path):
    """The least is a warning; where it is the same in new words, there is none."""
    edit(folders["custom"], lambda config: config["llm_config"].update(ROPES[one]))

    def change(config: dict[str, Any]) -> None:
        if "rope_parameters" in ROPES[other]:
            del config["text_config"]["rope_theta"], config["text_config"]["rope_scaling"]
        config["text_config"].update(ROPES[other])

    edit(folders["hf"], change)
    same = one == other.removeprefix("new-")
    try:
        report = convert("hf", folders["custom"], folders["hf"], tmp_path / "out")
    except InputError as error:
        assert not same
        assert "rope" in str(error)  # noqa: PT017
    else:
        assert bool(report["warnings"]) == (not same)


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_a_reference_with_other_shapes(layout, folders, tmp_path, cli):
    """Its config is that of the source, its weights are not."""
    content = read(folders[layout])
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    content[name] = torch.cat([content[name], content[name]])
    put(folders[layout], content)
    call = command(layout, folders[OTHER[layout]], folders[layout], tmp_path / "out")
    assert name in refused(cli, tmp_path, 3, *call)


def test_a_quantized_source(folders, tmp_path, cli):
    call = command("custom", folders["hf"], folders["custom"], tmp_path / "out")
    content = read(folders["hf"])
    edit(folders["hf"], lambda config: config.update(quantization_config={"quant_method": "awq"}))
    assert "quantiz" in refused(cli, tmp_path, 3, *call)
    edit(folders["hf"], lambda config: config.pop("quantization_config"))
    content["language_model.model.layers.0.mlp.up_proj.qweight"] = torch.ones(3)
    put(folders["hf"], content)
    assert "quantiz" in refused(cli, tmp_path, 3, *call)


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_a_quantized_reference(layout, folders, tmp_path, cli):
    """Its config would be written beside weights that are not quantized."""
    ref = without_weights(folders[layout])
    edit(ref, lambda config: config.update(quantization_config={"quant_method": "awq"}))
    call = command(layout, folders[OTHER[layout]], ref, tmp_path / "out")
    outcome = cli(*call)
    if outcome.code == 0:
        assert "quantization_config" not in config_of(tmp_path / "out")
    else:
        assert outcome.code == 3
        assert "quantiz" in outcome.err


def wrapped(content: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As upstream's trainer saves a model whose language model is wrapped by PEFT."""
    out = {}
    for name, tensor in content.items():
        inner = name.replace("language_model.", "language_model.base_model.model.", 1)
        if name.endswith("self_attn.q_proj.weight"):
            stem = inner.removesuffix(".weight")
            out[f"{stem}.base_layer.weight"] = tensor
            out[f"{stem}.lora_A.default.weight"] = normal((4, tensor.shape[1]), 1, seed=1)
            out[f"{stem}.lora_B.default.weight"] = normal((tensor.shape[0], 4), 1, seed=2)
        else:
            out[inner] = tensor
    return out


def test_a_wrapped_source(folders, tmp_path, cli):
    put(folders["custom"], wrapped(read(folders["custom"])))
    call = command("hf", folders["custom"], folders["hf"], tmp_path / "out")
    assert "LoRA" in refused(cli, tmp_path, 3, *call)


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_a_reference_without_config(layout, folders, tmp_path, cli):
    (folders[layout] / "config.json").unlink()
    call = command(layout, folders[OTHER[layout]], folders[layout], tmp_path / "out")
    assert "config.json" in refused(cli, tmp_path, 3, *call)


@pytest.mark.parametrize("which", ["custom", "hf", "inside", "around"])
def test_the_output_is_an_input(which, folders, tmp_path, cli):
    places = {"inside": folders["hf"] / "new", "around": tmp_path}
    out = places.get(which) or folders[which]
    for more in ([], ["--overwrite"]):
        call = command("custom", folders["hf"], folders["custom"], out)
        refused(cli, tmp_path, 5, *call, *more)


def test_an_output_that_exists(folders, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists"):
        convert("hf", folders["custom"], folders["hf"], tmp_path / "out")
    convert("hf", folders["custom"], folders["hf"], tmp_path / "out", overwrite=True)
    assert_same(read(tmp_path / "out"), as_hf(read(folders["custom"]), PRESETS["tiny"]))


# --- command line --------------------------------------------------------------------------------

KEYS = {
    "command", "version", "output", "layout", "tensors", "bytes", "shards", "seconds",
    "peak_rss_bytes", "merged", "l2", "missing", "unexpected", "warnings",
}  # fmt: skip


@pytest.mark.parametrize("style", ["-", "_"])
@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_the_command_gives_what_the_function_gives(layout, style, folders, tmp_path, cli):
    convert(layout, folders[OTHER[layout]], folders[layout], tmp_path / "expected")
    call = command(layout, folders[OTHER[layout]], folders[layout], tmp_path / "out")
    spelled = [a.replace("-path", f"{style}path") if isinstance(a, str) else a for a in call]
    outcome = cli(*spelled, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.err == ""
    report = json.loads(outcome.out)
    assert report.keys() >= KEYS
    assert report["command"] == COMMAND[layout]
    assert set(report["l2"]) == {
        "reference", "sum", "per_parameter", "global", "compared", "skipped",
    }  # fmt: skip
    made, expected = digests(tmp_path / "out"), digests(tmp_path / "expected")
    del made["streamshard.json"], expected["streamshard.json"]
    assert made == expected


def test_the_command_says_what_it_did(folders, tmp_path, cli):
    outcome = cli(*command("hf", folders["custom"], folders["hf"], tmp_path / "out"))
    assert outcome.code == 0
    assert "Converted 85 tensors" in outcome.out
    assert "missing: none" in outcome.out
    assert "total" in outcome.out
    assert "average" in outcome.out


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_a_dry_run(layout, folders, tmp_path, cli):
    before = digests(tmp_path)
    call = command(layout, folders[OTHER[layout]], folders[layout], tmp_path / "out")
    outcome = cli(*call, "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert report["dry_run"]
    assert report["tensors"] == len(tensor_shapes("tiny", layout))
    assert [file["name"] for file in report["plan"]["files"]] == ["model.safetensors"]
    assert digests(tmp_path) == before
    assert "Nothing was written" in cli(*call, "--dry-run").out


HEAVY = "torch transformers peft"


def test_nothing_heavy_is_imported(folders, tmp_path):
    """In a process of its own, with a reference that differs."""
    call = [*map(str, command("hf", folders["custom"], folders["hf"], tmp_path / "out")), "--json"]
    code = f"""
import json, sys
from streamshard.cli import main
sys.argv[1:] = {call!r}
try:
    main()
except SystemExit as exit_:
    assert not exit_.code, exit_.code
print(json.dumps([name for name in {HEAVY!r}.split() if name in sys.modules]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report, heavy = done.stdout.splitlines()
    assert json.loads(report)["l2"]["sum"] > 0
    assert json.loads(heavy) == []


# --- true sizes, no data -------------------------------------------------------------------------


def sparse(folder: Path, preset: Preset, layout: str, size: float = 5e9) -> Path:
    """A checkpoint of true names and shapes whose files are holes after their headers."""
    folder.mkdir(parents=True)
    config = model_config(preset, layout, tied=False, torch_dtype="bfloat16")
    (folder / "config.json").write_text(json.dumps(config))
    shards: list[dict[str, Any]] = [{}]
    filled = 0
    for name, shape in tensor_shapes(preset, layout).items():
        nbytes = 2 * math.prod(shape)
        if filled and filled + nbytes > size:
            shards.append({})
            filled = 0
        shards[-1][name] = shape, nbytes
        filled += nbytes
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in sorted(shard):
            shape, nbytes = shard[name]
            begin, end = end, end + nbytes
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        file = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with file.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
        weight_map |= dict.fromkeys(shard, file.name)
    if len(shards) == 1:
        file.rename(folder / "model.safetensors")
    else:
        reference.save_index(folder, weight_map)
    return folder


@cache
def parameters_of(preset: str, layout: str) -> int:
    return sum(map(math.prod, tensor_shapes(preset, layout).values()))


REAL = [name for name in MODELS if name not in TINY and parameters_of(name, "custom") < 80e9]


@pytest.mark.parametrize("layout", ["custom", "hf"])
@pytest.mark.parametrize("preset", REAL)
def test_real_models_convert_both_ways(preset, layout, tmp_path, monkeypatch):
    monkeypatch.setattr("streamshard.run.disk_free", lambda _: 10**15)
    made = {side: sparse(tmp_path / side, PRESETS[preset], side) for side in ("custom", "hf")}
    source, ref = made[OTHER[layout]], made[layout]
    report = convert(layout, source, ref, tmp_path / "out", dry_run=True)
    assert report["tensors"] == len(tensor_shapes(preset, layout))
    assert report["parameters"] == parameters_of(preset, layout)
    assert (report["missing"], report["unexpected"], report["warnings"]) == ([], [], [])
    assert report["bytes"] == sum(file["bytes"] for file in report["plan"]["files"])
    assert report["bytes"] > 2 * report["parameters"]
    assert not (tmp_path / "out").exists()
    shutil.rmtree(tmp_path)


def test_every_preset_is_one_of_these():
    """Names of one size share a test; what is left out is 80B or more."""
    left = [name for name in MODELS if name not in REAL and name not in TINY]
    assert left == ["InternVL3_5-241B-A28B"]
    assert {"InternVL3_5-30B-A3B", "InternVL3_5-GPT-OSS-20B-A4B-Preview"} <= set(REAL)


def test_a_check_of_bits():
    """What these tests compare with: equal bits, not equal numbers."""
    zeros = torch.tensor([0.0, -0.0])
    assert bits(zeros[:1]) != bits(zeros[1:])
    assert np.array_equal(zeros[:1].numpy(), zeros[1:].numpy())


# --- configs that leave out what is the default --------------------------------------------------

DEFAULTS = {
    "InternVL2-8B": transformers.LlamaConfig,
    "InternVL3-9B": transformers.LlamaConfig,
    "InternVL3_5-8B": transformers.Qwen3Config,
}


@pytest.mark.parametrize("weights", [True, False], ids=["weights", "config-only"])
@pytest.mark.parametrize("layout", ["custom", "hf"])
@pytest.mark.parametrize("preset", ["InternVL2-8B", "InternVL3-9B", "InternVL3_5-8B"])
def test_a_config_without_what_is_the_default(preset, layout, weights, tmp_path, monkeypatch):
    """As transformers 4 writes text configs: values of the config class are left out."""
    monkeypatch.setattr("streamshard.run.disk_free", lambda _: 10**15)
    made = {side: sparse(tmp_path / side, PRESETS[preset], side) for side in ("custom", "hf")}
    default = DEFAULTS[preset]().to_dict()
    config = config_of(made["hf"])
    text = config["text_config"]
    kept = {k: v for k, v in text.items() if k == "model_type" or default.get(k, ...) != v}
    assert "hidden_size" not in kept
    edit(made["hf"], lambda config: config.update(text_config=kept))
    if not weights:
        without_weights(made[layout])
    out = tmp_path / "out"
    report = convert(layout, made[OTHER[layout]], made[layout], out, dry_run=True)
    assert report["tensors"] == len(tensor_shapes(preset, layout))
    shutil.rmtree(tmp_path)


def test_transformers_reads_such_a_config(tmp_path):
    """So that the test above is about something that exists."""
    text = {"model_type": "llama", "vocab_size": 92553, "num_key_value_heads": 8}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "internvl", "text_config": text})
    )
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (config.text_config.num_attention_heads, config.text_config.hidden_size) == (32, 4096)
