"""Names of modules, and bases that an adapter was not made for, or that have it already."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from marks import PEERS
from pairs import LAYER
from peft_cases import (
    adapted,
    assert_exact,
    configure,
    edited,
    exact_weights,
    extended,
    language_model,
    merged,
    raises,
    save_adapter,
    save_base,
)
from reference import normal, read

from streamshard import merge_lora

pytestmark = PEERS


Q, K = f"{LAYER}.q_proj", f"{LAYER}.k_proj"
KEY = "base_model.model."


# --- names ----------------------------------------------------------------------------------------


def named(adapter: Path, *names: str) -> Path:
    """The tensors once for each adapter name, as dumps of the model in memory have them."""

    def change(content: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            key.replace(".weight", f".{name}.weight"): tensor * (number + 1)
            for number, name in enumerate(names)
            for key, tensor in content.items()
        }

    return edited(adapter, change)


def test_adapter_names_that_collide(pair, refused):
    plain = merged(pair, "plain")
    named(pair.adapter, "default", "second")
    refused(4, "default", "second", "--adapter-name")
    refused(4, "third", "second", more=["--adapter-name", "third"])
    first = merged(pair, "first", adapter_name="default")
    assert all(reference.same_tensor(first[name], plain[name]) for name in plain)
    second = merged(pair, "second", adapter_name="second")
    assert not reference.same_tensor(second[f"{Q}.weight"], plain[f"{Q}.weight"])


def test_one_adapter_name_needs_no_choice(pair):
    plain = merged(pair, "plain")
    named(pair.adapter, "mine")
    found = merged(pair)
    assert all(reference.same_tensor(found[name], plain[name]) for name in plain)


def test_a_name_where_there_are_none(pair, refused):
    refused(4, "'second'", "Leave --adapter-name out", more=["--adapter-name", "second"])


def test_a_weight_of_zero(pair, refused):
    refused(4, "--weight is 0", "Leave the adapter out", more=["--weight", "0"])


def test_names_on_some_tensors_only(pair, refused):
    edited(
        pair.adapter,
        lambda c: {
            k.replace("_A.weight", "_A.mine.weight") if Q in k else k: t for k, t in c.items()
        },
    )
    refused(4, "mine")


SPELLINGS: dict[str, Callable[[str], str]] = {
    "module": lambda key: f"module.{key}",
    "module-inside": lambda key: key.replace(KEY, f"{KEY}module.", 1),
    "compiled": lambda key: key.replace(KEY, f"{KEY}_orig_mod.", 1),
    "compiled-layers": lambda key: key.replace("layers.0.", "layers.0._orig_mod."),
    "fsdp": lambda key: key.replace("layers.0.", "layers.0._fsdp_wrapped_module."),
    "checkpointed": lambda key: key.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
    "no-prefix": lambda key: key.removeprefix(KEY),
    "doubled": lambda key: KEY + key,
    "extra-model": lambda key: key.replace(KEY, f"{KEY}model.", 1),
    "without-language-model": lambda key: key.replace("language_model.", "", 1),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_that_others_drop_in_silence(spelling, pair):
    """One rewrite of all keys gives the same bytes; a key of another spelling beside it is an error."""
    plain = merged(pair, "plain")
    change = SPELLINGS[spelling]
    edited(pair.adapter, lambda c: {change(key): tensor for key, tensor in c.items()})
    found = merged(pair)
    assert all(reference.same_tensor(found[name], plain[name]) for name in plain)


@pytest.mark.parametrize("spelling", ["without-language-model"])
def test_no_key_is_rewritten_alone(spelling, pair, refused):
    change = SPELLINGS[spelling]
    edited(pair.adapter, lambda c: {change(k) if Q in k else k: t for k, t in c.items()})
    refused(4, "1 of 2")


def test_layers_of_another_tower(pair, refused):
    """Language model and vision encoder both have `layers.0`, even of one shape."""
    vision = "vision_model.encoder.layers.0.self_attn.q_proj"
    extended(pair.base, **{f"{vision}.weight": normal((96, 40), 1, seed=1, dtype="BF16")})
    edited(
        pair.adapter,
        lambda c: {
            k.replace("language_model.model.layers", "vision.encoder.layers"): t
            for k, t in c.items()
            if Q in k
        },
    )
    refused(4, "vision.encoder.layers.0.self_attn.q_proj")


# --- another base ---------------------------------------------------------------------------------


def test_a_base_with_more_layers(tmp_path):
    """Every tensor fits, but the adapter was to have all layers and has half of them."""
    small, large = language_model(), language_model(num_hidden_layers=4)
    wrapped = adapted(small, target_modules=["q_proj", "v_proj"])
    adapter = save_adapter(tmp_path / "adapter", wrapped)
    base = save_base(tmp_path / "base", large)
    raises(tmp_path, "model.layers", "4 layers", base=base, adapter=adapter)
    # Where the config says so, some layers are what was trained.
    for number, config in enumerate(
        (
            {"layers_to_transform": [0, 1]},
            {"target_modules": r".*layers\.[01]\.self_attn\.[qv]_proj"},
            {
                "target_modules": [
                    f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qv"
                ]
            },
        )
    ):
        kept = json.loads((adapter / "adapter_config.json").read_text())
        configure(adapter, **config)
        merge_lora(base=base, adapter=adapter, output=tmp_path / f"out{number}")
        (adapter / "adapter_config.json").write_text(json.dumps(kept))


def test_excluded_modules_are_not_missed(tmp_path):
    model = language_model()
    wrapped = adapted(
        model, target_modules=["q_proj", "v_proj"], exclude_modules=r".*\.1\..*v_proj"
    )
    adapter = save_adapter(tmp_path / "adapter", wrapped)
    base = save_base(tmp_path / "base", model)
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    assert_exact(read(tmp_path / "out"), read(base), exact_weights(wrapped))


def test_a_base_of_another_size(tmp_path):
    adapter = save_adapter(
        tmp_path / "adapter", adapted(language_model(), target_modules=["q_proj"])
    )
    other = language_model(hidden_size=32)
    raises(
        tmp_path,
        "q_proj",
        "[64, 64]",
        "[32, 32]",
        base=save_base(tmp_path / "base", other),
        adapter=adapter,
    )


def test_an_embedding_and_a_head_of_different_lengths(tmp_path):
    """The embedding was resized and saved, and the head was not: no loader takes that."""
    model = language_model()
    wrapped = adapted(model, target_modules=["q_proj"])
    adapter = save_adapter(tmp_path / "adapter", wrapped)
    key = f"{KEY}model.embed_tokens.weight"
    edited(adapter, lambda c: c | {key: normal((170, 64), 1, seed=1)})
    base = save_base(tmp_path / "base", model)
    raises(tmp_path, "embed_tokens", "170", "160", base=base, adapter=adapter)


@pytest.mark.parametrize("kernel", [(5, 3, 3), (5, 8, 4, 4), (5, 2, 3, 3)], ids=str)
def test_kernels_that_do_not_fit(kernel, tmp_path):
    """Of another rank, another size, or of a convolution in groups."""
    base = reference.save_checkpoint(
        tmp_path / "base",
        {"conv.weight": normal((6, 8, 3, 3), 1, seed=1)},
        config={"model_type": "x"},
    )
    if kernel == (5, 2, 3, 3):
        extended(base, conv__weight=normal((6, 2, 3, 3), 1, seed=1))
        kernel = (5, 8, 3, 3)
    adapter = reference.save_adapter(
        tmp_path / "adapter",
        {
            f"{KEY}conv.lora_A.weight": normal(kernel, 1, seed=2),
            f"{KEY}conv.lora_B.weight": normal((6, 5, 1, 1), 1, seed=3),
        },
        r=5,
        lora_alpha=5,
        target_modules=["conv"],
    )
    raises(tmp_path, "conv", base=base, adapter=adapter)


def test_a_saved_module_that_overflows_fp16(pair, refused):
    extended(pair.base, **{"language_model.model.norm.weight": torch.ones(40).half()})
    saved = torch.ones(40)
    saved[7] = 1e5
    key = f"{KEY}language_model.model.norm.weight"
    edited(pair.adapter, lambda c: c | {key: saved}, modules_to_save=["norm"])
    refused(4, "language_model.model.norm.weight", "F16")


# --- an adapter that is in the base already -------------------------------------------------------


def test_merged_before_by_streamshard(pair, cli):
    """The record in the output names the adapter by its content, wherever it lies now."""
    merged(pair, "once")
    moved = pair.root / "moved"
    pair.adapter.rename(moved)
    call: dict[str, Any] = {"base": pair.root / "out" / "once", "adapter": moved}
    raises(pair.root, "already", "`allow_merged_base=True`", **call)
    arguments = [f"--{k}={v}" for k, v in call.items()]
    outcome = cli(
        "merge-lora", *arguments, f"--output={pair.root / 'out' / 'twice'}", "--allow-merged-base"
    )
    assert outcome.code == 0, outcome.err
    assert (pair.root / "out" / "twice").exists()


def test_one_adapter_given_twice(pair, refused):
    copy = pair.root / "copy"
    shutil.copytree(pair.adapter, copy)
    refused(2, "copy", "--weight", more=["--adapter", copy])
    refused(2, "--weight", more=["--adapter", pair.adapter])


@pytest.mark.parametrize("how", ["bin", "metadata", "named", "alpha"])
def test_part_4_one_adapter_in_another_file_is_given_twice(how, pair, refused):
    """The tensors tell, not the bytes of the file."""
    copy = pair.root / "copy"
    shutil.copytree(pair.adapter, copy)
    file = copy / "adapter_model.safetensors"
    content = reference.load_file(file)
    if how == "bin":
        file.unlink()
        torch.save(content, copy / "adapter_model.bin")
    elif how == "named":
        edited(copy, lambda c: {k.replace(".weight", ".default.weight"): t for k, t in c.items()})
    elif how == "alpha":
        configure(copy, lora_alpha=3)
    else:
        reference.save_file(content, file, {"format": "pt", "step": "3"})
    refused(2, "one adapter", "copy", more=["--adapter", copy])


def test_S9_equal_rows_of_other_tokens_are_two_adapters(tmp_path):
    table = normal((20, 8), 1, seed=1)
    base = reference.save_checkpoint(tmp_path / "base", {"model.embed_tokens.weight": table})
    rows = normal((2, 8), 1, seed=2)
    key = f"{KEY}model.embed_tokens.token_adapter.trainable_tokens_delta"
    indices = {"a": [3, 7], "b": [9, 4], "c": [3, 7]}
    for name, own in indices.items():
        config = {"r": 1, "lora_alpha": 1, "trainable_token_indices": own}
        reference.save_adapter(tmp_path / name, {key: rows}, **config)
    merge_lora(base=base, adapter=[tmp_path / "a", tmp_path / "b"], output=tmp_path / "out")
    expected = table.clone()
    for own in ([3, 7], [9, 4]):
        expected[own] = rows
    assert reference.same_tensor(read(tmp_path / "out")["model.embed_tokens.weight"], expected)
    both = [tmp_path / "a", tmp_path / "c"]
    raises(tmp_path, "one adapter", code=2, base=base, adapter=both)


def test_options_of_a_conversion_need_one(pair, refused):
    """A reference that nothing is taken from is a mistake."""
    refused(2, "--layout", more=["--reference", pair.base])
    refused(2, "--layout", more=["--tokenizer-from", "source"])


def test_merged_before_and_too_small_to_see(pair):
    """Only the record in the output can tell: the update drowns in the noise of the weights."""
    edited(pair.adapter, lambda c: {k: t * 0.05 if "_B" in k else t for k, t in c.items()})
    merged(pair, "once")
    raises(
        pair.root,
        "already",
        "`allow_merged_base=True`",
        base=pair.root / "out" / "once",
        adapter=pair.adapter,
    )


def test_another_adapter_onto_an_earlier_output(pair):
    merged(pair, "once")
    other = reference.save_adapter(
        pair.root / "other",
        {
            f"{KEY}{Q}.lora_A.weight": normal((4, 40), 1, seed=50),
            f"{KEY}{Q}.lora_B.weight": normal((96, 4), 0.02, seed=60),
        },
        r=4,
        lora_alpha=8,
    )
    merge_lora(base=pair.root / "out" / "once", adapter=other, output=pair.root / "out" / "then")


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_merged_before_by_peft(dtype, tmp_path):
    model = language_model()
    wrapped = adapted(model, std=0.1, target_modules=["q_proj", "down_proj"])
    adapter = save_adapter(tmp_path / "adapter", wrapped)
    base = save_base(tmp_path / "base", wrapped.merge_and_unload(), dtype)
    raises(tmp_path, "already", "`allow_merged_base=True`", base=base, adapter=adapter)
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out", allow_merged_base=True)


def test_merged_before_and_weighed(tmp_path):
    """What is in the base once is there once, whatever part of it is to be added."""
    model = language_model()
    wrapped = adapted(model, target_modules=["q_proj", "down_proj"])
    adapter = save_adapter(tmp_path / "adapter", wrapped)
    base = save_base(tmp_path / "base", wrapped.merge_and_unload())
    for weight in (0.7, 3.0):
        raises(tmp_path, "already", base=base, adapter=adapter, weight=[weight])


def test_taking_an_adapter_out_again(tmp_path):
    """A weight of -1 on a base that has the update gives the base before."""
    model = language_model()
    wrapped = adapted(model, target_modules=["q_proj"])
    adapter = save_adapter(tmp_path / "adapter", wrapped)
    base = save_base(tmp_path / "base", wrapped.merge_and_unload())
    merge_lora(
        base=base, adapter=adapter, weight=[-1], output=tmp_path / "out", allow_merged_base=True
    )
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(read(tmp_path / "out")[name], tensor, atol=1e-7, rtol=1e-6)


def test_one_of_two_was_merged_before(tmp_path):
    model = language_model()
    first = adapted(model, target_modules=["q_proj", "down_proj"])
    second = adapted(model, target_modules=["q_proj", "down_proj"], r=8, lora_alpha=32)
    with torch.no_grad():  # an update of its own
        for name, parameter in second.named_parameters():
            if "lora_" in name:
                parameter.copy_(parameter.flip(0))
    paths = [save_adapter(tmp_path / "one", first), save_adapter(tmp_path / "two", second)]
    base = save_base(tmp_path / "base", first.merge_and_unload())
    raises(tmp_path, "already", "one", base=base, adapter=paths)
    merge_lora(base=base, adapter=paths[1], output=tmp_path / "out")


@pytest.mark.parametrize("std", [1.0, 0.1, 0.01, 0.001, 0.0001])
def test_a_clean_base_is_not_suspected(std, tmp_path):
    """However small the update: then the projection is noise, and noise may be near one."""
    for seed in range(12):
        folder = tmp_path / f"{std}-{seed}"
        base = reference.save_checkpoint(
            folder / "base",
            {f"{Q}.weight": normal((48, 40), 0.02, seed=seed, dtype="BF16")},
        )
        adapter = reference.save_adapter(
            folder / "adapter",
            {
                f"{KEY}{Q}.lora_A.weight": normal((2, 40), 0.15, seed=100 + seed),
                f"{KEY}{Q}.lora_B.weight": normal((48, 2), std, seed=200 + seed),
            },
            r=2,
            lora_alpha=4,
        )
        merge_lora(base=base, adapter=adapter, output=folder / "out")


@pytest.mark.parametrize(
    ("name", "warned"),
    [
        ("OpenGVLab/InternVL2_5-8B", True),
        ("OpenGVLab/InternVL3-8B", False),
        ("./models/InternVL3-8B-hf/", False),
        ("my-model", False),
        (None, False),
    ],
)
def test_another_model_of_the_same_shapes_is_named(name, warned, tmp_path):
    """Only names can tell; they are compared where both are those of InternVL models."""
    model = language_model()
    wrapped = adapted(model, target_modules=["q_proj"])
    base = save_base(tmp_path / "InternVL3-8B", model)
    adapter = save_adapter(tmp_path / "adapter", wrapped)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = name
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    report = merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    assert any("right base" in warning for warning in report["warnings"]) == warned
