"""Conversions: configs, files beside the weights, and vocabularies."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from folders import (
    INNER,
    OTHER,
    assert_same,
    carried,
    command,
    config_of,
    convert,
    edit,
    make,
    refused,
    without_weights,
)
from presets import PRESETS, tensor_shapes
from reference import digests, read

from streamshard.errors import InputError, UsageError

# --- config and side files ------------------------------------------------------------------------


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
    assert set(ours) - set(side) == {"README.md", "model.safetensors", "streamshard.json"}
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


# --- vocabularies ---------------------------------------------------------------------------------


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
    with pytest.raises(UsageError, match="`tokenizer_from` is"):
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
