"""S15, R9, R10: configs of source and reference, and what they say where they say nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from folders import (
    HEADS,
    INNER,
    OTHER,
    as_hf,
    assert_same,
    command,
    config_of,
    convert,
    edit,
    make,
    put,
    refused,
    without_weights,
)
from make_checkpoint import write_adapter
from presets import PRESETS, tensor_shapes
from reference import INDEX, read, save_index

import streamshard
from streamshard.internvl.same_model import rope_scaling

Change = Callable[[dict[str, Any]], Any]
EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
HF_HEAD = "language_model.lm_head.weight"


def inner(layout: str, **values: Any) -> Change:
    """Set values of the language model's config; None takes them out."""

    def change(config: dict[str, Any]) -> None:
        section = config[INNER[layout]]
        section.update(values)
        for key, value in values.items():
            if value is None:
                del section[key]

    return change


@pytest.mark.parametrize("layout", ["custom", "hf"])
@pytest.mark.parametrize(
    ("key", "default", "other"),
    [("rope_theta", 10000.0, 1e6), ("rms_norm_eps", 1e-6, 1e-5), ("hidden_act", "silu", "gelu")],
)
@pytest.mark.parametrize("absent", ["custom", "hf"])
def test_S15_absent_means_the_default_of_the_class(
    absent, key, default, other, layout, folders, tmp_path, cli
):
    """Where one config is silent, it means the value of its class, and not the other's."""
    edit(folders[absent], inner(absent, **{key: None}))
    stating = OTHER[absent]
    edit(folders[stating], inner(stating, **{key: other}))
    call = command(layout, folders[OTHER[layout]], folders[layout], tmp_path / "out")
    text = refused(cli, tmp_path, 3, *call)
    assert f"llm_config.{key}" in text
    assert str(default) in text
    edit(folders[stating], inner(stating, **{key: default}))
    assert cli(*call).code == 0


@pytest.mark.parametrize(
    ("key", "value"), [("use_sliding_window", True), ("partial_rotary_factor", 0.5)]
)
@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_S15_what_changes_attention(layout, key, value, folders, tmp_path, cli):
    edit(folders[layout], inner(layout, **{key: value}))
    call = command("hf", folders["custom"], folders["hf"], tmp_path / "out")
    assert f"llm_config.{key}" in refused(cli, tmp_path, 3, *call)


def test_S15_windows_that_are_not_used_do_not_matter(folders, tmp_path):
    """transformers 5 forgets them, older configs keep them."""
    edit(folders["custom"], inner("custom", use_sliding_window=False, sliding_window=32768,
                                  max_window_layers=70))  # fmt: skip
    edit(folders["hf"], inner("hf", use_sliding_window=False))
    edit(folders["hf"], lambda c: c["text_config"].update(sliding_window=None))
    assert convert("hf", folders["custom"], folders["hf"], tmp_path / "out")["warnings"] == []


def test_S15_rope_parameters_come_before_rope_theta(folders, tmp_path, cli):
    """As in transformers 5, which reads both and keeps the former."""
    parameters = {"rope_type": "default", "rope_theta": 5e6}
    edit(folders["hf"], inner("hf", rope_theta=10000.0, rope_parameters=parameters))
    read_by_it = transformers.AutoConfig.from_pretrained(folders["hf"]).text_config
    assert read_by_it.rope_parameters["rope_theta"] == 5e6
    call = command("hf", folders["custom"], folders["hf"], tmp_path / "out")
    assert "llm_config.rope_theta is 10000.0" in refused(cli, tmp_path, 3, *call)


FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("preset", "key", "value", "same"),
    [
        ("tiny-gpt-oss", "layer_types", [FULL] * 3, False),
        ("tiny-gpt-oss", "layer_types", [SLIDING, FULL, SLIDING], True),
        ("tiny-gpt-oss", "layer_types", None, True),
        ("tiny-gpt-oss", "swiglu_alpha", 1.0, False),
        ("tiny-gpt-oss", "swiglu_alpha", 1.702, True),
        ("tiny", "layer_types", [FULL] * 3, True),
        ("tiny", "layer_types", [FULL, SLIDING, FULL], False),
        ("tiny-qwen3", "layer_types", [SLIDING] * 3, False),
    ],
)
def test_S15_which_layers_see_a_window(preset, key, value, same, tmp_path, cli):
    made = {side: make(tmp_path / side, preset, side) for side in ("custom", "hf")}
    edit(made["hf"], lambda c: c["text_config"].update({key: value}))
    call = command("hf", made["custom"], made["hf"], tmp_path / "out")
    outcome = cli(*call, "--dry-run")
    assert outcome.code == (0 if same else 3)
    assert same or f"llm_config.{key}" in outcome.err


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "longrope"])
def test_S15_lengths_that_a_scaling_is_made_of(kind, folders, tmp_path):
    """Stated beside it, so that equal scalings differ."""
    scaling = {
        "rope_type": kind,
        "factor": 2.0,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
    }
    for side, length in (("custom", 512), ("hf", 256)):
        values = {"rope_scaling": scaling, "max_position_embeddings": length}
        edit(folders[side], inner(side, **values))
    (warning,) = convert("hf", folders["custom"], folders["hf"], tmp_path / "out")["warnings"]
    assert "rope_scaling is" in warning
    assert "512" in warning
    edit(folders["custom"], inner("custom", max_position_embeddings=256))
    assert convert("hf", folders["custom"], folders["hf"], tmp_path / "two")["warnings"] == []


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_S15_force_image_size(layout, folders, tmp_path, cli):
    """`InternVLChatModel` takes it before that of the vision encoder, the HF class knows no other."""
    edit(folders["custom"], lambda config: config.update(force_image_size=56))
    call = command(layout, folders[OTHER[layout]], folders[layout], tmp_path / "out")
    assert "force_image_size is (56, 56)" in refused(cli, tmp_path, 3, *call)
    for silent in (0, None):
        edit(
            folders["custom"], lambda config, silent=silent: config.update(force_image_size=silent)
        )
        assert cli(*call, "--dry-run").code == 0


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


@pytest.mark.parametrize(
    ("more", "same"),
    [
        ({}, True),
        ({"beta_fast": 32.0, "beta_slow": 1}, True),
        ({"truncate": True, "attention_factor": None}, True),
        ({"beta_fast": 16.0}, False),
        ({"beta_slow": 2.0}, False),
        ({"truncate": False}, False),
        ({"attention_factor": 1.5}, False),
        ({"mscale": 0.7}, False),
        ({"original_max_position_embeddings": 256}, False),
        ({"factor": 2.0}, False),
    ],
    ids=str,
)
def test_S15_fields_of_yarn(more, same, folders, tmp_path):
    edit(folders["custom"], inner("custom", rope_scaling=YARN))
    edit(folders["hf"], inner("hf", rope_scaling={**YARN, **more}))
    warnings = convert("hf", folders["custom"], folders["hf"], tmp_path / "out")["warnings"]
    assert [("rope_scaling is" in warning) for warning in warnings] == ([] if same else [True])


def test_S15_scaling_in_old_and_new_words():
    old = {"llm_config": {"rope_scaling": {"type": "su", "short_factor": [1.0]}}}
    new = {"text_config": {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0],
                                               "rope_theta": 1e4}}}  # fmt: skip
    assert rope_scaling(old, "phi3") == rope_scaling(new, "phi3")
    silent: dict[str, Any] = {"text_config": {}}
    assert rope_scaling(silent, "qwen2") is None
    stated = {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "truncate": False,
              "original_max_position_embeddings": 4096, "rope_type": "yarn"}  # fmt: skip
    assert rope_scaling({"llm_config": {"rope_scaling": stated}}, "gpt_oss") == rope_scaling(
        silent, "gpt_oss"
    )


# --- R9 ---


@pytest.mark.parametrize("named", ["missing", "null", [], [""]], ids=str)
@pytest.mark.parametrize("preset", ["tiny", "tiny-internlm2", "tiny-qwen3-moe"])
def test_R9_the_class_by_model_type(preset, named, tmp_path, cli):
    """Converted both ways, merged and verified; what is written names the class."""
    made = {side: make(tmp_path / side, preset, side) for side in ("custom", "hf")}

    def change(config: dict[str, Any]) -> None:
        config["llm_config"]["architectures"] = None if named == "null" else named
        if named == "missing":
            del config["llm_config"]["architectures"]

    edit(made["custom"], change)
    convert("hf", made["custom"], made["hf"], tmp_path / "as-hf")
    assert_same(read(tmp_path / "as-hf"), as_hf(read(made["custom"]), PRESETS[preset]))
    convert("custom", made["hf"], made["custom"], tmp_path / "as-custom")
    written = config_of(tmp_path / "as-custom")["llm_config"]["architectures"]
    assert written == [PRESETS[preset].arch]
    assert streamshard.verify(made["custom"])["problems"] == []
    write_adapter(tmp_path / "adapter", preset, layout="hf")
    merge = ["merge-lora", "--base", made["custom"], "--adapter", tmp_path / "adapter"]
    assert cli(*merge, "--output", tmp_path / "merged").code == 0


def test_R9_checked_against_the_names(tmp_path, cli):
    """A model_type that is not that of the tensors."""
    source = make(tmp_path / "source", "tiny-internlm2", "custom")
    edit(source, lambda c: c["llm_config"].update(architectures=[], model_type="llama"))
    ref = make(tmp_path / "ref", "tiny-internlm2", "hf")
    text = refused(cli, tmp_path, 3, *command("hf", source, ref, tmp_path / "out"))
    assert "model_type there says LlamaForCausalLM" in text
    assert "names of InternLM2ForCausalLM" in text
    edit(source, lambda c: c["llm_config"].pop("model_type"))
    text = refused(cli, tmp_path, 3, *command("hf", source, ref, tmp_path / "out"))
    assert "llm_config.architectures is missing" in text


# --- R10 ---


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_R10_an_index_of_one_file(layout, folders, tmp_path, cli):
    """Which transformers reads whichever of the two it finds."""
    content = read(folders[layout])
    save_index(folders[layout], dict.fromkeys(content, "model.safetensors"))
    assert (folders[layout] / INDEX).is_file()
    other = OTHER[layout]
    convert(other, folders[layout], folders[other], tmp_path / "out")
    assert set(read(tmp_path / "out")) == set(tensor_shapes("tiny", other))
    assert streamshard.verify(folders[layout])["problems"] == []
    write_adapter(tmp_path / "adapter", "tiny", layout=layout)
    merge = ["merge-lora", "--base", folders[layout], "--adapter", tmp_path / "adapter"]
    assert cli(*merge, "--output", tmp_path / "merged").code == 0
    assert streamshard.verify(tmp_path / "merged", strict=True)["problems"] == []
    assert cli("inspect", folders[layout]).code == 0
    # A second file that nobody lists makes it two again.
    save_index(
        folders[layout], {**dict.fromkeys(content, "model.safetensors"), "x": "y.safetensors"}
    )
    assert "both" in refused(cli, tmp_path, 3, "inspect", folders[layout])


def headless(folder: Path, **flags: Any) -> Path:
    """A custom checkpoint without a head, whose config says this."""
    content = read(folder)
    head = (HEADS & set(content)).pop()
    del content[head]
    put(folder, content)

    def change(config: dict[str, Any]) -> None:
        for section, key in ((config, "outer"), (config["llm_config"], "inner")):
            section.pop("tie_word_embeddings", None)
            if flags.get(key) is not None:
                section["tie_word_embeddings"] = flags[key]

    return edit(folder, change)


@pytest.mark.parametrize("preset", ["tiny", "tiny-internlm2"])
@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize("flags", [{"outer": True, "inner": True}, {"inner": True}], ids=str)
def test_R10_a_tied_custom_checkpoint_without_head(flags, allow, preset, tmp_path):
    source = headless(make(tmp_path / "source", preset, "custom"), **flags)
    ref = without_weights(make(tmp_path / "ref", preset, "hf"))
    report = convert("hf", source, ref, tmp_path / "out", allow_missing=allow)
    written = read(tmp_path / "out")
    assert report["missing"] == []
    assert set(written) == set(tensor_shapes(preset, "hf"))
    assert torch.equal(written[HF_HEAD], written[EMBEDDING])
    config = config_of(tmp_path / "out")
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False
    assert streamshard.verify(source)["problems"] == []
    write_adapter(tmp_path / "adapter", preset, layout="custom")
    streamshard.merge_lora(base=source, adapter=tmp_path / "adapter", output=tmp_path / "merged")
    both = {"layout": "hf", "reference": ref}
    streamshard.merge_lora(
        base=source, adapter=tmp_path / "adapter", output=tmp_path / "one", **both
    )
    convert("hf", tmp_path / "merged", ref, tmp_path / "two")
    assert_same(read(tmp_path / "one"), read(tmp_path / "two"))


@pytest.mark.parametrize(
    "flags", [{}, {"outer": False, "inner": False}, {"outer": True, "inner": False}], ids=str
)
def test_R10_a_head_is_still_not_invented(flags, tmp_path, cli):
    source = headless(make(tmp_path / "source", "tiny", "custom"), **flags)
    ref = without_weights(make(tmp_path / "ref", "tiny", "hf", tied=True))
    call = command("hf", source, ref, tmp_path / "out")
    assert HEAD in refused(cli, tmp_path, 3, *call)
    assert cli(*call, "--allow-missing").code == 0
    # What is not written must not be said to be there.
    config = config_of(tmp_path / "out")
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is True
    assert HEAD not in read(tmp_path / "out")
