"""S1, S14: shapes and completeness by the config, in every command that reads a checkpoint.

The models are those of `presets`; transformers says of some of the changes that it cannot load them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from folders import OTHER, command, edit, make, put, refused, without_weights, wrapped
from make_checkpoint import write_adapter
from presets import PRESETS, tensor_shapes
from reference import INDEX, read
from safetensors.torch import load_file, save_file

import streamshard
from streamshard.errors import VerificationError

LAYER = "language_model.model.layers.1."
EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


def packed(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros(tensor.numel() // 2, 1, dtype=torch.uint8)


# Names in the custom layout, in the HF layout (if others), and what is done to all of these.
CASES: dict[str, tuple[str, str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "empty": (f"{LAYER}mlp.up_proj.weight", "", lambda t: t[:0, 0]),
    "a-row-less": (f"{LAYER}mlp.up_proj.weight", "", lambda t: t[:-1]),
    "packed-bytes": (f"{LAYER}mlp.up_proj.weight", "", packed),
    "transposed": (f"{LAYER}mlp.down_proj.weight", "", lambda t: t.mT),
    "empty-o": (f"{LAYER}self_attn.o_proj.weight", "", lambda t: t[:0, 0]),
    "k-of-other-heads": (f"{LAYER}self_attn.k_proj.weight", "", lambda t: t[:16]),
    "bias": (f"{LAYER}self_attn.q_proj.bias", "", lambda t: t[:-1]),
    "norm": (f"{LAYER}input_layernorm.weight", "", lambda t: t[None]),
    "tables-too-narrow": (f"{EMBEDDING} {HEAD}", "", lambda t: t[:, :32]),
    "positions": (
        "vision_model.embeddings.position_embedding",
        "vision_tower.embeddings.position_embeddings",
        lambda t: torch.cat([t, t[:, :2]], 1),
    ),
    "patches": (
        "vision_model.embeddings.patch_embedding.weight",
        "vision_tower.embeddings.patch_embeddings.projection.weight",
        lambda t: t.permute(0, 2, 3, 1),
    ),
    # As a rank of tensor parallelism has it: they agree with each other.
    "attention": (
        "vision_model.encoder.layers.1.attn.qkv.weight",
        " ".join(f"vision_tower.encoder.layer.1.attention.{p}_proj.weight" for p in "qkv"),
        lambda t: t[:, :8],
    ),
    "layer-scale": (
        "vision_model.encoder.layers.1.ls1",
        "vision_tower.encoder.layer.1.lambda_1",
        lambda t: t[:, None],
    ),
    "projector": ("mlp1.1.weight", "multi_modal_projector.linear_1.weight", lambda t: t[:, :64]),
}


def changed(folder: Path, layout: str, case: str) -> tuple[Path, str]:
    """A folder with a case in it, and the first name that is wrong."""
    custom, hf, change = CASES[case]
    names = (custom if layout == "custom" or not hf else hf).split()
    content = read(folder)
    put(folder, content | {name: change(content[name]) for name in names})
    return folder, names[0]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_S1_wrong_shapes_are_refused_everywhere(layout, case, tmp_path, cli):
    """Of the source of a conversion, of the base of a merge, and by `verify`; before a byte."""
    source, name = changed(make(tmp_path / "source", "tiny", layout), layout, case)
    ref = without_weights(make(tmp_path / "ref", "tiny", OTHER[layout]))
    write_adapter(tmp_path / "adapter", "tiny", layout=layout, targets="llm")
    found = list(read(source)[name].shape)
    expected = list(tensor_shapes("tiny", layout)[name])
    conversion = command(OTHER[layout], source, ref, tmp_path / "out")
    merge = ["merge-lora", "--base", source, "--adapter", tmp_path / "adapter"]
    merge += ["--output", tmp_path / "out"]
    both = [*merge, "--layout", OTHER[layout], "--reference", ref]
    for call in (conversion, [*conversion, "--dry-run"], merge, [*merge, "--dry-run"], both):
        text = refused(cli, tmp_path, 3, *call)
        assert f"'{name}'" in text
        assert str(found) in text
        assert str(expected) in text
        assert ("zero_to_fp32.py" in text) == (0 in found)
        assert ("quantized" in text) == (case == "packed-bytes")
    wrap = ["wrap-lora", "--base", source, "--output", tmp_path / "out", "--llm-r", "2"]
    assert f"'{name}'" in refused(cli, tmp_path, 3, *wrap, "--format", "peft")
    outcome = cli("verify", source)
    assert outcome.code == 8
    assert f"'{name}'" in outcome.out


@pytest.mark.parametrize("case", ["a-row-less", "transposed", "tables-too-narrow", "positions"])
def test_S1_transformers_cannot_load_these(case, tmp_path):
    """So that the tests above refuse what nobody can use."""
    folder, _ = changed(make(tmp_path / "m", "tiny", "hf"), "hf", case)
    model = transformers.InternVLForConditionalGeneration
    with pytest.raises(RuntimeError, match="ismatch"):
        model.from_pretrained(folder)


@pytest.mark.parametrize("preset", ["tiny-internlm2", "tiny-phi3", "tiny-qwen3-moe", "tiny-6b-vit"])
def test_S1_fused_and_other_families(preset, tmp_path, cli):
    """A matrix cut by columns, of each kind that is split or joined."""
    ends = ("wqkv.weight", "qkv.weight", "qkv_proj.weight", "experts.2.down_proj.weight")
    base = make(tmp_path / "base", preset, "custom")
    ref = without_weights(make(tmp_path / "ref", preset, "hf"))
    whole = read(base)
    for name in [n for n in whole if n.endswith(ends) and ".1." in n]:
        put(base, {**whole, name: whole[name][:, : whole[name].shape[1] // 2]})
        text = refused(cli, tmp_path, 3, *command("hf", base, ref, tmp_path / "out"))
        assert f"'{name}'" in text
        assert cli("verify", base).code == 8


def test_S1_a_bare_file_of_another_model(tmp_path, cli):
    """It has no config; that of the reference says what it must be."""
    other = make(tmp_path / "other", "tiny-qwen3", "custom")
    edit(
        make(tmp_path / "ref", "tiny-qwen3", "hf"),
        lambda c: c["text_config"].update(hidden_size=32),
    )
    without_weights(tmp_path / "ref")
    (other / "config.json").unlink()  # which would be its config
    bare = other / "model.safetensors"
    text = refused(cli, tmp_path, 3, *command("hf", bare, tmp_path / "ref", tmp_path / "out"))
    assert "'language_model.lm_head.weight' has the shape [288, 64]; [288, 32] was" in text
    assert "config" in text


def test_S1_a_bare_file_agrees_with_itself(tmp_path, cli):
    base = make(tmp_path / "base", "tiny", "custom")
    content = read(base)
    name = "language_model.model.layers.2.mlp.up_proj.weight"
    save_file({**content, name: content[name][:40].clone()}, tmp_path / "bare.safetensors")
    write_adapter(tmp_path / "adapter", "tiny", layout="custom", targets="llm")
    call = [
        "merge-lora",
        "--base",
        tmp_path / "bare.safetensors",
        "--adapter",
        tmp_path / "adapter",
    ]
    text = refused(cli, tmp_path, 3, *call, "--output", tmp_path / "out")
    assert f"'{name}' has the shape [40, 64]; [96, 64] was expected, as 'language_model." in text
    assert cli("verify", tmp_path / "bare.safetensors").code == 8
    assert cli("verify", base / "model.safetensors").code == 0


def test_S1_what_was_never_gathered_is_refused_whatever_it_is(tmp_path, cli):
    """Also of a model that no table knows."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"model_type": "gemma2"}')
    put(tmp_path / "base", {"model.layers.0.q.weight": torch.ones(4, 4), "model.x": torch.ones(0)})
    (tmp_path / "adapter").mkdir()
    key = "base_model.model.model.layers.0.q.lora_{}.weight"
    save_file(
        {key.format("A"): torch.ones(1, 4), key.format("B"): torch.ones(4, 1)},
        tmp_path / "adapter" / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    call = ["merge-lora", "--base", tmp_path / "base", "--adapter", tmp_path / "adapter"]
    text = refused(cli, tmp_path, 3, *call, "--output", tmp_path / "out")
    assert "'model.x' have no elements" in text
    assert "zero_to_fp32.py" in text
    assert cli("verify", tmp_path / "base").code == 8


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_S1_tables_that_are_both_empty(layout, tmp_path, cli):
    """They agree with each other, and the config does not fix their rows."""
    source = make(tmp_path / "source", "tiny", layout)
    content = read(source)
    put(source, {**content, EMBEDDING: content[EMBEDDING][:0], HEAD: content[HEAD][:0]})
    ref = without_weights(make(tmp_path / "ref", "tiny", OTHER[layout]))
    write_adapter(tmp_path / "adapter", "tiny", layout=layout, targets="llm")
    merge = ["merge-lora", "--base", source, "--adapter", tmp_path / "adapter"]
    conversion = command(OTHER[layout], source, ref, tmp_path / "out")
    both = [*conversion, "--tokenizer-from", "source"]
    for call in ([*merge, "--output", tmp_path / "out"], both):
        text = refused(cli, tmp_path, 3, *call)
        assert "has the shape [0, 64]; [any, 64] was expected" in text
        assert "zero_to_fp32.py" in text
    assert cli("verify", source).code == 8


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool], ids=str)
def test_S1_whole_numbers_are_no_weights(dtype, tmp_path, cli):
    """transformers would take the codes of a quantized tensor for its values."""
    source = make(tmp_path / "source", "tiny", "custom")
    name, content = f"{LAYER}mlp.up_proj.weight", read(source)
    put(source, {**content, name: content[name].to(dtype)})
    ref = without_weights(make(tmp_path / "ref", "tiny", "hf"))
    text = refused(cli, tmp_path, 3, *command("hf", source, ref, tmp_path / "out"))
    assert f"'{name}' has whole numbers, where weights are floats" in text
    assert cli("verify", source).code == 8


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_S1_S14_a_checkpoint_without_its_vision_encoder(layout, tmp_path, cli):
    """Nothing in its names tells what it is; its config does."""
    base = make(tmp_path / "base", "tiny", layout)
    content = read(base)
    left = {n: t for n, t in content.items() if n.startswith("language_model.")}
    put(base, left)
    assert set(found_by_verify(base)["missing"]) == set(content) - set(left)
    name = f"{LAYER}mlp.down_proj.weight"
    put(base, {**left, name: left[name].mT})
    write_adapter(tmp_path / "adapter", "tiny", layout=layout, targets="llm")
    merge = ["merge-lora", "--base", base, "--adapter", tmp_path / "adapter"]
    text = refused(cli, tmp_path, 3, *merge, "--output", tmp_path / "out")
    assert f"'{name}' has the shape [96, 64]; [64, 96] was expected" in text


# What transformers 5.23 can build besides the published models.
UNUSUAL: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "no-position-table": ({"use_absolute_position_embeddings": False}, {}, {}),
    "rectangles": ({"image_size": [28, 56], "patch_size": [14, 7]}, {}, {}),
    "rms-without-qk-norm": ({"norm_type": "rms_norm", "attention_bias": True}, {}, {}),
    "one-channel": ({"num_channels": 1}, {}, {}),
    "shuffle": ({"image_size": 56}, {}, {"downsample_ratio": 0.25}),
    "head-dim": ({}, {"head_dim": 16}, {}),
    "llama-biases": ({}, {"model_type": "llama", "attention_bias": True, "mlp_bias": True}, {}),
    "phi3-grouped": ({}, {"model_type": "phi3"}, {}),
    "qwen3-default-head-dim": ({}, {"model_type": "qwen3"}, {}),
    "dense-layers": ({}, {"model_type": "qwen3_moe", "mlp_only_layers": [1], "num_experts": 4}, {}),
    "gpt-oss-no-bias": (
        {}, {"model_type": "gpt_oss", "attention_bias": False, "num_local_experts": 4}, {}
    ),
    "tied": ({}, {"tie_word_embeddings": False}, {"tie_word_embeddings": True}),
    "untied": ({}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False}),
}  # fmt: skip


@pytest.mark.parametrize("case", UNUSUAL)
def test_S1_S14_unusual_models_of_transformers_are_right(case, tmp_path):
    """Whatever the class builds by a config has the shapes and names that we expect by it."""
    vision, text, top = UNUSUAL[case]
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = transformers.InternVLConfig(
        vision_config={**sizes, "num_attention_heads": 2, "image_size": 28, **vision},
        text_config={**sizes, "model_type": "qwen2", "num_attention_heads": 4, "vocab_size": 40,
                     "num_key_value_heads": 2, "pad_token_id": 0, **text},
        **top,
    )  # fmt: skip
    transformers.InternVLForConditionalGeneration(config).save_pretrained(tmp_path / "m")
    report = streamshard.verify(tmp_path / "m")
    assert report["problems"] == []
    checks = {one["what"]: one["why_not"] for one in report["checks"]}
    assert checks["completeness by config.json"] is checks["shapes by config.json"] is None


def test_S1_wrapped_checkpoints(tmp_path, cli):
    """By the name in the file; also after the vocabulary was resized."""
    base = make(tmp_path / "run", "tiny", "custom")
    content = wrapped(read(base))
    more = {
        n: torch.cat([t, t[:12]]) if "embed_tokens" in n or "lm_head" in n else t
        for n, t in content.items()
    }
    put(base, more)
    edit(base, lambda c: c["llm_config"].update(vocab_size=300))
    assert cli("verify", base).code == 0, cli("verify", base).out
    merge = ["merge-lora", base, "--output", tmp_path / "out", "--alpha", "8"]
    assert cli(*merge).code == 0
    assert read(tmp_path / "out")[EMBEDDING].shape == (300, 64)
    name = "language_model.base_model.model.model.layers.0.mlp.down_proj.weight"
    put(base, {**more, name: more[name].mT})
    extract = ["extract-lora", base, "--output", tmp_path / "lora", "--alpha", "8"]
    for call in ([*merge[:3], tmp_path / "out2", "--alpha", "8"], extract):
        text = refused(cli, tmp_path, 3, *call)
        assert f"'{name}' has the shape [96, 64]; [64, 96] was expected" in text
    assert cli("verify", base).code == 8


RESIZED = {
    "padded": lambda c, n: c.update({k: torch.cat([c[k], c[k][:32]]) for k in n}),
    "cut": lambda c, n: c.update({k: c[k][:270] for k in n}),
}


@pytest.mark.parametrize("how", RESIZED)
@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_S1_a_resized_vocabulary_is_fine(layout, how, tmp_path, cli):
    source = make(tmp_path / "source", "tiny", layout)
    content = read(source)
    RESIZED[how](content, [EMBEDDING, HEAD])
    put(source, content)
    ref = without_weights(make(tmp_path / "ref", "tiny", OTHER[layout]))
    call = command(OTHER[layout], source, ref, tmp_path / "out")
    assert cli(*call, "--tokenizer-from", "source").code == 0
    assert cli("verify", tmp_path / "out").code == 0
    # The source itself can only be loaded if its config says so.
    outcome = cli("verify", source)
    assert outcome.code == 8
    assert "states a vocab_size of 288" in outcome.out
    write_adapter(tmp_path / "adapter", "tiny", layout=layout, targets="llm")
    merge = ["merge-lora", "--base", source, "--adapter", tmp_path / "adapter"]
    outcome = cli(*merge, "--output", tmp_path / "merged")
    assert outcome.code == 0
    assert "another vocab_size" in outcome.err
    assert cli("verify", tmp_path / "merged").code == 0


@pytest.mark.parametrize("preset", ["tiny", "tiny-6b-vit", "tiny-internlm2", "tiny-qwen3-moe"])
@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_S14_verify_says_what_it_checked(layout, preset, tmp_path, cli):
    folder = make(tmp_path / "m", preset, layout)
    report = streamshard.verify(folder)
    checks = {one["what"]: one["why_not"] for one in report["checks"]}
    assert checks["completeness by config.json"] is None
    assert checks["shapes by config.json"] is None
    assert checks["infinite and NaN values"] is None
    assert "streamshard.json" in checks["digests"]
    outcome = cli("verify", folder)
    assert outcome.code == 0
    assert "checked: headers, index against files, infinite and NaN" in outcome.out
    assert "not checked: digests: there is no streamshard.json" in outcome.out
    assert outcome.out.splitlines()[-1].endswith("no problem found; no digests to compare")


def found_by_verify(folder: Path) -> Mapping[str, Any]:
    with pytest.raises(VerificationError) as caught:
        streamshard.verify(folder)
    return caught.value.report


LACKS: dict[str, tuple[str, Callable[[str], bool]]] = {
    "a-layer": ("tiny", lambda n: ".layers.1." in n and n.startswith("language_model.")),
    "last-layer": ("tiny", lambda n: ".layers.2." in n),
    "head": ("tiny", lambda n: n == HEAD),
    "bias": ("tiny", lambda n: n.endswith("layers.0.self_attn.k_proj.bias")),
    "a-vision-layer": ("tiny", lambda n: "layer.1." in n or "encoder.layers.1." in n),
    "projector": ("tiny", lambda n: n.startswith(("mlp1.", "multi_modal_projector."))),
    "an-expert": ("tiny-qwen3-moe", lambda n: ".layers.1.mlp.experts.3." in n),
    "qk-norms": ("tiny-6b-vit", lambda n: ".q_norm." in n or ".k_norm." in n),
}


@pytest.mark.parametrize("case", LACKS)
@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_S14_what_lacks_is_found(layout, case, tmp_path):
    preset, lacks = LACKS[case]
    folder = make(tmp_path / "m", preset, layout)
    content = read(folder)
    gone = {n for n in content if lacks(n)}
    assert gone
    put(folder, {n: t for n, t in content.items() if n not in gone})
    report = found_by_verify(folder)
    assert set(report["missing"]) == gone
    assert any("is not complete" in problem for problem in report["problems"])


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_S14_what_the_config_does_not_have(layout, tmp_path):
    """A loader drops a layer too many, and biases that the config denies."""
    folder = make(tmp_path / "m", "tiny", layout)
    edit(folder, lambda c: c["llm_config" if layout == "custom" else "text_config"].update(
        num_hidden_layers=2))  # fmt: skip
    assert any(
        "there are 2 language model layers" in p for p in found_by_verify(folder)["problems"]
    )
    folder = make(tmp_path / "n", "tiny", layout)
    key = "qkv_bias" if layout == "custom" else "attention_bias"
    edit(folder, lambda c: c["vision_config"].update({key: False}))
    assert any("no bias of the vision" in p for p in found_by_verify(folder)["problems"])


def test_S14_tied_heads_may_be_absent(tmp_path):
    folder = make(tmp_path / "m", "tiny", "hf", tied=True)
    assert HEAD not in read(folder)
    assert streamshard.verify(folder)["problems"] == []
    edit(folder, lambda c: c.update(tie_word_embeddings=False))
    edit(folder, lambda c: c["text_config"].update(tie_word_embeddings=False))
    assert found_by_verify(folder)["missing"] == [HEAD]


def test_S14_total_size(tmp_path):
    folder = make(tmp_path / "m", "tiny", "custom", max_shard_size=100_000)
    index = json.loads((folder / INDEX).read_text())
    assert streamshard.verify(folder)["problems"] == []
    index["metadata"]["total_size"] += 2
    (folder / INDEX).write_text(json.dumps(index))
    (problem,) = found_by_verify(folder)["problems"]
    assert "total_size is" in problem
    for unknown in (0, None):
        index["metadata"]["total_size"] = unknown
        (folder / INDEX).write_text(json.dumps(index))
        assert streamshard.verify(folder)["problems"] == []


def test_S14_what_cannot_be_checked_is_told(tmp_path, cli):
    folder = make(tmp_path / "m", "tiny", "custom")
    (folder / "config.json").unlink()
    checks = {one["what"]: one["why_not"] for one in streamshard.verify(folder)["checks"]}
    assert checks["completeness by config.json"] == "there is no config.json"
    assert checks["shapes against each other"] is None
    (folder / "config.json").write_text('{"model_type": "gemma2"}')
    checks = {one["what"]: one["why_not"] for one in streamshard.verify(folder)["checks"]}
    assert "'gemma2'" in checks["completeness by config.json"]
    write_adapter(tmp_path / "a", "tiny", layout="custom", targets="llm")
    outcome = cli("verify", tmp_path / "a")
    assert outcome.code == 0
    assert "not checked: completeness by config.json: this is an adapter" in outcome.out


def test_S1_presets_of_every_family_pass(tmp_path):
    for preset in [name for name in PRESETS if name.startswith("tiny-")]:
        for layout in ("custom", "hf"):
            folder = make(tmp_path / f"{preset}-{layout}", preset, layout)
            assert streamshard.verify(folder)["problems"] == []


# What is done to a wrapped checkpoint, and what `verify` says.
PAIRS: dict[str, tuple[Callable[[dict[str, torch.Tensor], str, str], Any], str]] = {
    "lone-A": (lambda c, _, b: c.pop(b), "the partner"),
    "lone-B": (lambda c, a, _: c.pop(a), "the partner"),
    "ranks": (lambda c, _, b: c.update({b: c[b][:, :2]}), "has the rank 4, but its lora_B 2"),
    "rows": (lambda c, _, b: c.update({b: c[b][:-1]}), "make an update of the shape [63, 64]"),
    "none": (
        lambda c, *_: [c.pop(n) for n in list(c) if ".lora_" in n],
        "the pairs are lost, or were merged before",
    ),
}


@pytest.mark.parametrize("case", PAIRS)
def test_S14_pairs_of_wrapped_checkpoints(case, tmp_path):
    """What merge-lora refuses, `verify` does not call right."""
    run = make(tmp_path / "run", "tiny", "custom")
    content = wrapped(read(run))
    a, b = (min(n for n in content if f".lora_{side}." in n) for side in "AB")
    change, text = PAIRS[case]
    change(content, a, b)
    put(run, content)
    assert any(text in problem for problem in found_by_verify(run)["problems"])


@pytest.mark.parametrize("side", ["A", "B"])
def test_S14_pairs_of_adapters(side, tmp_path):
    write_adapter(tmp_path / "a", "tiny", layout="custom", targets="llm")
    file = tmp_path / "a" / "adapter_model.safetensors"
    content = load_file(file)
    assert streamshard.verify(tmp_path / "a")["problems"] == []
    name = min(n for n in content if f".lora_{side}." in n)
    save_file({n: t for n, t in content.items() if n != name}, file)
    assert "the partner" in found_by_verify(tmp_path / "a")["problems"][0]


def test_S14_flags_without_pairs(tmp_path):
    """`InternVLChatModel` wraps by the flags, and then finds no weight under its name."""
    base = make(tmp_path / "base", "tiny", "custom")
    edit(base, lambda c: c.update(use_llm_lora=16))
    assert any("has use_llm_lora: 16" in p for p in found_by_verify(base)["problems"])
    write_adapter(tmp_path / "adapter", "tiny", layout="custom", targets="llm")
    report = streamshard.merge_lora(
        base=base, adapter=tmp_path / "adapter", output=tmp_path / "out"
    )
    assert "LoRA flags" in report["warnings"][0]
    assert streamshard.verify(tmp_path / "out")["problems"] == []
