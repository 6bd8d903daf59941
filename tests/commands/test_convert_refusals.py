"""Conversions that are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from folders import (
    HEADS,
    INNER,
    OTHER,
    as_hf,
    assert_same,
    carried,
    command,
    config_of,
    convert,
    edit,
    make,
    put,
    refused,
    without_weights,
    wrapped,
)
from presets import PRESETS, tensor_shapes
from reference import read

from streamshard.errors import InputError, OutputError


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_swapped_folders(layout, folders, tmp_path, cli):
    call = command(layout, folders[layout], folders[OTHER[layout]], tmp_path / "out")
    text = refused(cli, tmp_path, 3, *call)
    assert "swapped" in text


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_one_folder_for_both_is_not_swapped(layout, folders, tmp_path, cli):
    own = folders[OTHER[layout]]
    text = refused(cli, tmp_path, 3, *command(layout, own, own, tmp_path / "out"))
    option = "--custom-path" if layout == "custom" else "--hf-path"
    kind = "custom" if layout == "custom" else "HF"
    assert f"Give, as {option}, the original model in the {kind} layout" in text
    assert "--reference" not in text
    assert "swapped" not in text


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_a_source_that_needs_the_other_command(layout, folders, tmp_path, cli):
    """What lacks is the model to convert, not an original one."""
    own = folders[layout]
    text = refused(cli, tmp_path, 3, *command(layout, own, own, tmp_path / "out"))
    option, kind = ("--hf-path", "HF") if layout == "custom" else ("--custom-path", "custom")
    assert f"Give, as {option}, the model to convert, which is in the {kind} layout." in text
    other = "custom2hf" if layout == "custom" else "hf2custom"
    assert f"goes through `streamshard {other}`" in text
    assert "original" not in text


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
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        convert("hf", folders["custom"], folders["hf"], tmp_path / "out")
    (tmp_path / "out" / "mine.txt").unlink()
    convert("hf", folders["custom"], folders["hf"], tmp_path / "out", overwrite=True)
    assert_same(read(tmp_path / "out"), as_hf(read(folders["custom"]), PRESETS["tiny"]))
