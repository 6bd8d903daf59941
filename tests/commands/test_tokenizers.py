"""Whose tokenizer an output gets, decided by tokens, and what a tokenizer takes along.

Names have the rows of cases: S3 tokens in spare rows, S4 what moves as one, S5 one pass as two.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import transformers
from adapters import weights_of
from folders import OTHER, config_of, convert, make, put, without_weights
from make_checkpoint import write_adapter
from presets import PRESETS
from reference import digests, read
from safetensors.torch import load_file

from streamshard import extract_lora, merge_lora
from streamshard.errors import AdapterError, InputError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

VOCAB = PRESETS["tiny"].vocab
EMBED = {"hf": "model.language_model.embed_tokens", "custom": "language_model.model.embed_tokens"}
HEAD = {"hf": "lm_head", "custom": "language_model.lm_head"}
NO_CONFIG = transformers.PreTrainedConfig()
THINK = {285: "<think>", 286: "</think>"}
FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "vocab.json",
)


def json_of(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def put_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def add_tokens(folder: Path, tokens: Mapping[int, str], *, forms: str = "list decoder") -> Path:
    """Add tokens to a folder's tokenizer, in the files that say so in transformers 4."""
    if "list" in forms:
        added = (
            json_of(folder / "added_tokens.json") if (folder / "added_tokens.json").exists() else {}
        )
        put_json(folder / "added_tokens.json", added | {t: n for n, t in tokens.items()})
    if "decoder" in forms:
        settings = json_of(folder / "tokenizer_config.json")
        flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
        settings["added_tokens_decoder"] |= {
            str(n): {"content": token, **flags, "special": False} for n, token in tokens.items()
        }
        put_json(folder / "tokenizer_config.json", settings)
    return folder


def copied(source: Path, target: Path, names: tuple[str, ...] = FILES) -> Path:
    for name in names:
        (target / name).write_bytes((source / name).read_bytes())
    return target


def adapter_with(
    folder: Path,
    base: Path,
    layout: str,
    changed: Mapping[int, float],
    rows: int = VOCAB,
    kind: str = "tables",
) -> Path:
    """An adapter whose embedding and head differ from the base's in some rows."""
    write_adapter(folder, "tiny", layout=layout, targets="llm", r=4)
    content = load_file(folder / "adapter_model.safetensors")
    config = json_of(folder / "adapter_config.json")
    tensors = read(base)
    if kind == "rows":
        config["trainable_token_indices"] = {"embed_tokens": sorted(changed)}
        key = f"base_model.model.{EMBED[layout]}.token_adapter.trainable_tokens_delta"
        content[key] = torch.stack([torch.full((64,), changed[n]) for n in sorted(changed)])
    elif kind == "tables":
        config["modules_to_save"] = ["embed_tokens", "lm_head"]
        for module, names in (("embed_tokens", EMBED), ("lm_head", HEAD)):
            (name,) = [n for n in tensors if n.endswith(f"{module}.weight")]
            more = torch.ones(max(rows - len(tensors[name]), 0), 64, dtype=torch.bfloat16)
            table = torch.cat([tensors[name], more])[:rows]
            for number, value in changed.items():
                table[number] = value
            content[f"base_model.model.{names[layout]}.weight"] = table
    reference.save_file(content, folder / "adapter_model.safetensors", {"format": "pt"})
    put_json(folder / "adapter_config.json", config)
    return folder


def tokens_of(folder: Path) -> dict[int, str]:
    """What both lists of a folder say; they must agree."""
    listed = {n: t for t, n in json_of(folder / "added_tokens.json").items()}
    decoder = json_of(folder / "tokenizer_config.json")["added_tokens_decoder"]
    assert listed == {int(n): entry["content"] for n, entry in decoder.items()}
    return listed


def told(report: Mapping[str, Any], *words: str) -> bool:
    return any(all(word in text for word in words) for text in report["warnings"])


# --- S3: merges ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tables", "rows"])
@pytest.mark.parametrize("trained", ["custom", "hf"])
@pytest.mark.parametrize("home", ["custom", "hf"])
def test_S3_tokens_in_spare_rows_come_along(home, trained, kind, tmp_path):
    """No row is added, but a token: the adapter's tokenizer is the one that knows it."""
    base = make(tmp_path / "base", "tiny", home)
    adapter = adapter_with(tmp_path / "a", base, trained, {285: 1.0, 286: 2.0}, kind=kind)
    add_tokens(copied(base, adapter), THINK)
    report = merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    assert all((tmp_path / "out" / n).read_bytes() == (adapter / n).read_bytes() for n in FILES)
    assert told(report, "'<think>' (285)", str(adapter))
    assert config_of(tmp_path / "out") == config_of(base)


@pytest.mark.parametrize("forms", ["list", "decoder"])
def test_S3_whichever_file_says_it(forms, tmp_path):
    base = make(tmp_path / "base", "tiny", "custom")
    adapter = adapter_with(tmp_path / "a", base, "custom", {285: 1.0})
    add_tokens(copied(base, adapter), {285: "<think>"}, forms=forms)
    report = merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    assert all((tmp_path / "out" / n).read_bytes() == (adapter / n).read_bytes() for n in FILES)
    assert told(report, "'<think>' (285)")


def test_S3_a_list_of_tokens_and_no_tokenizer(tmp_path):
    """What the adapter's folder lacks is the base's, and every file of it knows the token."""
    base = make(tmp_path / "base", "tiny", "custom")
    adapter = adapter_with(tmp_path / "a", base, "custom", {285: 1.0, 286: 1.0})
    add_tokens(adapter, THINK, forms="list")
    report = merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    assert tokens_of(tmp_path / "out") == tokens_of(base) | THINK
    assert told(report, "'<think>' (285)")


@pytest.mark.parametrize("kind", ["tables", "pairs"])
def test_S3_tokens_that_were_not_trained_are_told(kind, tmp_path):
    base = make(tmp_path / "base", "tiny", "custom")
    adapter = adapter_with(tmp_path / "a", base, "custom", {7: 1.0}, kind=kind)
    add_tokens(copied(base, adapter), THINK)
    report = merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    assert tokens_of(tmp_path / "out") == tokens_of(base)
    assert told(report, "285", "'<think>'", "the base's is written")


def test_S3_the_same_tokenizer_in_other_bytes_is_silent(tmp_path):
    base = make(tmp_path / "base", "tiny", "custom")
    adapter = adapter_with(tmp_path / "a", base, "custom", {7: 1.0})
    copied(base, adapter)
    for name in FILES[2:]:
        put_json(adapter / name, dict(reversed(json_of(adapter / name).items())))
    vocab = json_of(adapter / "vocab.json")
    (adapter / "vocab.json").write_text(json.dumps(vocab, indent=3))  # \u0120 for Ġ
    (adapter / "added_tokens.json").unlink()
    report = merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    assert report["warnings"] == []
    assert all((tmp_path / "out" / n).read_bytes() == (base / n).read_bytes() for n in FILES)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("row", [285, 7])
def test_S3_rows_that_an_update_trains(row, dora, tmp_path):
    """A pair on the embedding: rows with a zero in lora_A are not trained."""
    base = make(tmp_path / "base", "tiny", "custom")
    adapter = adapter_with(tmp_path / "a", base, "custom", {}, kind="pairs")
    content = load_file(adapter / "adapter_model.safetensors")
    name = f"base_model.model.{EMBED['custom']}"
    A = torch.zeros(4, VOCAB)
    A[:, row] = 1.0
    content[f"{name}.lora_embedding_A"] = A
    content[f"{name}.lora_embedding_B"] = torch.ones(64, 4)
    config = json_of(adapter / "adapter_config.json")
    if dora:
        weight = read(base)[f"{EMBED['custom']}.weight"].float()
        updated = weight + 32 / 4 * (torch.ones(64, 4) @ A).T
        for key in [key for key in content if key.endswith("lora_A.weight")]:
            plain = read(base)[key.split("base_model.model.")[1].replace("lora_A.", "")].float()
            stem = key.removesuffix("lora_A.weight")
            content[f"{stem}lora_magnitude_vector"] = plain.norm(dim=1)
        content[f"{name}.lora_magnitude_vector"] = updated.norm(dim=0)
        config["use_dora"] = True
    config["target_modules"] = [*config["target_modules"], "embed_tokens"]
    reference.save_file(content, adapter / "adapter_model.safetensors", {"format": "pt"})
    put_json(adapter / "adapter_config.json", config)
    add_tokens(copied(base, adapter), {285: "<think>"})
    report = merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    assert (285 in tokens_of(tmp_path / "out")) == (row == 285)
    assert told(report, "'<think>'")


def test_S3_a_tokenizer_that_lacks_tokens_of_the_base(tmp_path):
    """It is taken for what was trained, and what it lacks is named."""
    base = make(tmp_path / "base", "tiny", "custom")
    adapter = copied(base, adapter_with(tmp_path / "a", base, "custom", {285: 1.0}))
    settings = json_of(adapter / "tokenizer_config.json")
    del settings["added_tokens_decoder"]["261"]
    put_json(adapter / "tokenizer_config.json", settings)
    listed = json_of(adapter / "added_tokens.json")
    del listed["<IMG_CONTEXT>"]
    put_json(adapter / "added_tokens.json", listed)
    add_tokens(adapter, {285: "<think>"})
    report = merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    assert told(report, "<IMG_CONTEXT>", "261", "no token in the adapter's")


def test_S3_ids_beyond_the_rows_are_told(tmp_path):
    base = make(tmp_path / "base", "tiny", "custom")
    adapter = adapter_with(tmp_path / "a", base, "custom", {285: 1.0})
    add_tokens(copied(base, adapter), {285: "<think>", 288: "<far>"})
    report = merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    assert told(report, "'<far>' (288)", "288 rows")


@pytest.mark.parametrize("own", [True, False], ids=["tokenizer", "none"])
def test_S6_a_resized_vocabulary_is_told(own, tmp_path):
    base = make(tmp_path / "base", "tiny", "custom")
    adapter = adapter_with(tmp_path / "a", base, "custom", {}, rows=300)
    if own:
        add_tokens(copied(base, adapter), {299: "<last>"})
    report = merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    assert told(report, "300 rows now", "288 before")
    assert told(report, "'<last>' (299)") == own
    assert told(report, "no adapter folder has a tokenizer") == (not own)
    assert report["warnings"] == json_of(tmp_path / "out" / "streamshard.json")["warnings"]
    dry = merge_lora(base=base, adapter=adapter, output=tmp_path / "dry", dry_run=True)
    assert dry["warnings"] == report["warnings"]


def test_S3_several_adapters_with_tokens_of_their_own(tmp_path):
    """Each brings a token and its row: the tokenizer that is written knows both."""
    base = make(tmp_path / "base", "tiny", "custom")
    folders = []
    for row, token in ((285, "<a>"), (286, "<b>")):
        adapter = adapter_with(tmp_path / token[1], base, "custom", {row: row / 64}, kind="rows")
        folders.append(add_tokens(copied(base, adapter), {row: token}))
    report = merge_lora(base=base, adapter=folders, output=tmp_path / "out")
    assert tokens_of(tmp_path / "out") == tokens_of(base) | {285: "<a>", 286: "<b>"}
    assert told(report, "'<b>' (286)")


def test_S3_several_adapters_that_mean_other_tokens(tmp_path):
    base = make(tmp_path / "base", "tiny", "custom")
    folders = []
    for token, row in (("<a>", 285), ("<b>", 286)):
        adapter = adapter_with(tmp_path / token[1], base, "custom", {row: row / 64}, kind="rows")
        folders.append(add_tokens(copied(base, adapter), {285: token, 286: f"{token}2"}))
    with pytest.raises(AdapterError, match=r"'<a>'.*'<b>'"):
        merge_lora(base=base, adapter=folders, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- S3: conversions -------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["source", "reference", "conflict"])
@pytest.mark.parametrize("weights", [True, False], ids=["weights", "config-only"])
@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_S3_a_conversion_asks_whose_tokens(layout, weights, who, tmp_path):
    """The same question that other numbers of rows get."""
    source = make(tmp_path / "source", "tiny", OTHER[layout])
    ref = make(tmp_path / "ref", "tiny", layout)
    if not weights:
        without_weights(ref)
    if who != "reference":
        add_tokens(source, THINK)
    if who != "source":
        add_tokens(ref, {285: "<other>"})
    with pytest.raises(InputError, match=r"285.*tokenizer_from"):
        convert(layout, source, ref, tmp_path / "out")
    for whose, folder in (("source", source), ("reference", ref)):
        out = tmp_path / f"of-{whose}"
        report = convert(layout, source, ref, out, tokenizer_from=whose)
        assert tokens_of(out) == tokens_of(folder)
        if whose == "reference":
            assert told(report, "285", "reference")


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_S3_the_placeholder_of_a_processor_is_no_difference(layout, tmp_path):
    """HF tokenizers have `<video>`, which the processor replaces: no model ever sees it."""
    folders = {side: make(tmp_path / side, "tiny", side) for side in ("custom", "hf")}
    add_tokens(folders["hf"], {268: "<video>"})
    settings = json_of(folders["hf"] / "tokenizer_config.json")
    put_json(folders["hf"] / "tokenizer_config.json", settings | {"video_token": "<video>"})
    report = convert(layout, folders[OTHER[layout]], folders[layout], tmp_path / "out")
    assert report["warnings"] == []


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_S3_a_conversion_tells_ids_beyond_the_rows(layout, tmp_path):
    source = make(tmp_path / "source", "tiny", OTHER[layout])
    ref = add_tokens(make(tmp_path / "ref", "tiny", layout), {300: "<far>"})
    report = convert(layout, source, ref, tmp_path / "out")
    assert told(report, "'<far>' (300)", "288 rows")


def test_S3_a_list_of_some_tokens_says_nothing_of_others(tmp_path):
    """A source with a part of a tokenizer: what it lists must agree, and no more."""
    source, ref = make(tmp_path / "s", "tiny", "hf"), make(tmp_path / "r", "tiny", "custom")
    for name in FILES:
        (source / name).unlink()
    (source / "added_tokens.json").write_text('{"<img>": 259}')
    report = convert("custom", source, ref, tmp_path / "one")
    assert report["warnings"] == []
    (source / "added_tokens.json").write_text('{"<img>": 259, "<think>": 285}')
    with pytest.raises(InputError, match=r"285.*tokenizer_from"):
        convert("custom", source, ref, tmp_path / "two")
    convert("custom", source, ref, tmp_path / "two", tokenizer_from="source")
    assert tokens_of(tmp_path / "two") == tokens_of(ref) | {285: "<think>"}


# --- S3: training checkpoints -----------------------------------------------------------------------


def wrapped_checkpoint(folder: Path, base: Path) -> Path:
    """As the trainer saves it: no code, the whole model with its pairs inside."""
    from folders import wrapped

    make(folder, "tiny", "custom")
    put(folder, wrapped(read(base)))
    for file in folder.glob("*.py"):
        file.unlink()
    put_json(folder / "config.json", config_of(folder) | {"use_llm_lora": 4})
    return folder


def test_S3_a_training_checkpoint_keeps_its_tokenizer(tmp_path):
    """The reference gives code; its `tokenizer.json`, which lacks the token, stays behind."""
    ref = make(tmp_path / "ref", "tiny", "custom")
    source = add_tokens(wrapped_checkpoint(tmp_path / "in", ref), THINK)
    tokenizer_json(ref)
    report = merge_lora(checkpoint=source, reference=ref, output=tmp_path / "out")
    assert tokens_of(tmp_path / "out") == tokens_of(source)
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    assert (tmp_path / "out" / "modeling_internvl_chat.py").exists()
    assert told(report, "285", "'<think>'", "that of the checkpoint")


def test_S3_a_training_checkpoint_that_becomes_hf(tmp_path):
    base = make(tmp_path / "base", "tiny", "custom")
    source = add_tokens(wrapped_checkpoint(tmp_path / "in", base), THINK)
    ref = make(tmp_path / "ref", "tiny", "hf")
    call = {"checkpoint": source, "reference": ref, "layout": "hf"}
    with pytest.raises(InputError, match=r"<think>.*tokenizer_from"):
        merge_lora(**call, output=tmp_path / "out")
    merge_lora(**call, output=tmp_path / "out", tokenizer_from="source")
    assert tokens_of(tmp_path / "out") == tokens_of(source)


def test_S3_a_training_checkpoint_without_tokenizer(tmp_path):
    ref = add_tokens(make(tmp_path / "ref", "tiny", "custom"), {290: "<far>"})
    source = wrapped_checkpoint(tmp_path / "in", ref)
    for name in FILES:
        (source / name).unlink()
    report = merge_lora(checkpoint=source, reference=ref, output=tmp_path / "out")
    assert tokens_of(tmp_path / "out") == tokens_of(ref)
    assert told(report, "'<far>' (290)")


def tokenizer_json(folder: Path) -> dict[str, Any]:
    """Write what transformers 5 does: one file with vocabulary, merges and added tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = json_of(folder / "vocab.json")
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    added = {n: t for t, n in json_of(folder / "added_tokens.json").items()}
    made.add_tokens([AddedToken(added[n], special=True, normalized=False) for n in sorted(added)])
    made.save(str(folder / "tokenizer.json"))
    return json_of(folder / "tokenizer.json")


# --- S4: what moves as one -------------------------------------------------------------------------


@pytest.mark.parametrize("mine", ["file", "key", "json", "more", "none"])
@pytest.mark.parametrize("theirs", ["file", "key", "none"])
@pytest.mark.parametrize("home", ["custom", "hf"])
def test_S4_the_template_goes_with_the_tokens(home, theirs, mine, tmp_path):
    """The one that transformers finds is that of the tokenizer; the base's if it has none."""
    base = with_template(make(tmp_path / "base", "tiny", home), theirs, "of the base")
    adapter = adapter_with(tmp_path / "a", base, home, {285: 1.0})
    add_tokens(copied(base, adapter), {285: "<think>"})
    with_template(adapter, mine, "of the adapter")
    report = merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    assert told(report, "'<think>' (285)")
    whose = base if mine == "none" else adapter
    expected = (
        None if mine == theirs == "none" else f"of the {'base' if whose is base else 'adapter'}"
    )
    if mine == "json":  # which only processors read
        assert json_of(tmp_path / "out" / "chat_template.json") == {"chat_template": expected}
        assert not (tmp_path / "out" / "chat_template.jinja").exists()
        return
    found = transformers.AutoTokenizer.from_pretrained(
        tmp_path / "out", trust_remote_code=False, config=NO_CONFIG
    )
    found = found.chat_template
    assert (found["default"] if isinstance(found, dict) else found) == expected
    extra = tmp_path / "out" / "additional_chat_templates" / "tools.jinja"
    assert extra.exists() == (mine == "more")


def with_template(folder: Path, kind: str, text: str) -> Path:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json_of(folder / "tokenizer_config.json")
    settings.pop("chat_template", None)
    if kind == "key":
        settings["chat_template"] = text
    put_json(folder / "tokenizer_config.json", settings)
    if kind == "json":
        put_json(folder / "chat_template.json", {"chat_template": text})
    if kind in ("file", "more"):
        (folder / "chat_template.jinja").write_text(text)
    if kind == "more":
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tools.jinja").write_text(f"tools {text}")
    return folder


def test_S4_another_template_of_the_same_tokens_is_told(tmp_path):
    base = with_template(make(tmp_path / "base", "tiny", "custom"), "file", "of the base")
    adapter = copied(base, adapter_with(tmp_path / "a", base, "custom", {7: 1.0}))
    with_template(adapter, "key", "of the base\n")
    silent = merge_lora(base=base, adapter=adapter, output=tmp_path / "one")
    assert silent["warnings"] == []
    with_template(adapter, "key", "of the adapter")
    report = merge_lora(base=base, adapter=adapter, output=tmp_path / "two")
    assert told(report, "chat template", str(adapter))
    assert (tmp_path / "two" / "chat_template.jinja").read_text() == "of the base"


@pytest.mark.parametrize("key", ["add_prefix_space", "lstrip"])
def test_S3_tokenizers_that_read_a_text_otherwise_are_told(key, tmp_path):
    """The same tokens and ids, but not the same ids of a text."""

    def change(folder):
        settings = json_of(folder / "tokenizer_config.json")
        entry = settings["added_tokens_decoder"]["261"]
        (entry if key in entry else settings)[key] = True
        put_json(folder / "tokenizer_config.json", settings)

    base, ref = (make(tmp_path / side, "tiny", side) for side in ("custom", "hf"))
    adapter = adapter_with(tmp_path / "adapter", base, "custom", {}, kind="pairs")
    change(copied(base, adapter))
    report = merge_lora(base=base, adapter=adapter, output=tmp_path / "merged")
    assert any(key in warning for warning in report["warnings"])
    change(base)
    report = convert("hf", base, without_weights(ref), tmp_path / "out")
    assert any(key in warning for warning in report["warnings"])


@pytest.mark.parametrize("has_code", [True, False])
def test_S4_code_stays_where_nothing_replaces_it(has_code, tmp_path):
    base = make(tmp_path / "base", "tiny-internlm2", "custom")
    name = "tokenization_internlm2.py"
    adapter = tmp_path / "a"
    write_adapter(adapter, "tiny-internlm2", layout="custom", targets="llm", r=4)
    content = load_file(adapter / "adapter_model.safetensors")
    key = "base_model.model.language_model.model.tok_embeddings.token_adapter"
    content[f"{key}.trainable_tokens_delta"] = torch.ones(1, 64)
    reference.save_file(content, adapter / "adapter_model.safetensors", {"format": "pt"})
    config = json_of(adapter / "adapter_config.json")
    put_json(
        adapter / "adapter_config.json",
        config | {"trainable_token_indices": {"tok_embeddings": [285]}},
    )
    add_tokens(copied(base, adapter), {285: "<think>"})
    if has_code:
        (adapter / name).write_text("code = 'of the adapter'")
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    expected = adapter if has_code else base
    assert (tmp_path / "out" / name).read_bytes() == (expected / name).read_bytes()


def test_S4_code_that_the_settings_name_moves_too(tmp_path):
    base = make(tmp_path / "base", "tiny", "custom")
    adapter = adapter_with(tmp_path / "a", base, "custom", {285: 1.0})
    add_tokens(copied(base, adapter), {285: "<think>"})
    (adapter / "own_tokens.py").write_text("class Own: ...")
    (adapter / "train.py").write_text("not of the tokenizer")
    settings = json_of(adapter / "tokenizer_config.json")
    put_json(
        adapter / "tokenizer_config.json",
        settings | {"auto_map": {"AutoTokenizer": ["own_tokens.Own", None]}},
    )
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    assert (tmp_path / "out" / "own_tokens.py").exists()
    assert not (tmp_path / "out" / "train.py").exists()


# --- S5: one pass as two ----------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [VOCAB, 300])
@pytest.mark.parametrize("trained", ["custom", "hf"])
@pytest.mark.parametrize("whose", ["source", "reference"])
@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_S5_one_pass_is_two(layout, whose, trained, rows, tmp_path):
    """The same weights, and the same files beside them."""
    base = make(tmp_path / "base", "tiny", OTHER[layout])
    ref = make(tmp_path / "ref", "tiny", layout)
    adapter = adapter_with(tmp_path / "a", base, trained, {285: 1.0}, rows=rows)
    add_tokens(copied(base, adapter), {285: "<think>"} | ({299: "<last>"} if rows > VOCAB else {}))
    (adapter / "chat_template.jinja").write_text("with <IMG_CONTEXT> of the adapter")
    call: dict[str, Any] = {"base": base, "adapter": adapter, "layout": layout, "reference": ref}
    with pytest.raises(InputError, match="tokenizer_from"):
        merge_lora(**call, output=tmp_path / "one")
    merge_lora(**call, output=tmp_path / "one", tokenizer_from=whose)
    merge_lora(base=base, adapter=adapter, output=tmp_path / "half")
    convert(layout, tmp_path / "half", ref, tmp_path / "two", tokenizer_from=whose)
    one, two = digests(tmp_path / "one"), digests(tmp_path / "two")
    for name in ("README.md", "streamshard.json"):  # these say how it was done
        del one[name], two[name]
    assert one == two
    assert weights_of(tmp_path / "one") == weights_of(tmp_path / "two")
    knows = 285 in tokens_of(tmp_path / "one")
    assert knows == (whose == "source")


def test_S5_one_pass_is_two_for_training_checkpoints(tmp_path):
    base, ref = make(tmp_path / "base", "tiny", "custom"), make(tmp_path / "ref", "tiny", "hf")
    source = add_tokens(wrapped_checkpoint(tmp_path / "in", base), THINK)
    how: dict[str, Any] = {"reference": ref, "layout": "hf", "tokenizer_from": "source"}
    merge_lora(checkpoint=source, output=tmp_path / "one", **how)
    merge_lora(checkpoint=source, output=tmp_path / "half")
    convert("hf", tmp_path / "half", ref, tmp_path / "two", tokenizer_from="source")
    one, two = digests(tmp_path / "one"), digests(tmp_path / "two")
    for name in ("README.md", "streamshard.json"):  # these say how it was done
        del one[name], two[name]
    assert one == two


def test_S3_a_list_of_tokens_and_a_tokenizer_of_one_file(tmp_path):
    """As transformers 5 saves it: the token is added where that file has tokens."""
    base = make(tmp_path / "base", "tiny", "custom")
    tokenizer_json(base)
    for name in FILES:
        (base / name).unlink()
    adapter = adapter_with(tmp_path / "a", base, "custom", {285: 1.0})
    (adapter / "added_tokens.json").write_text('{"<think>": 285}')
    merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    added = json_of(tmp_path / "out" / "tokenizer.json")["added_tokens"]
    assert added[:-1] == json_of(base / "tokenizer.json")["added_tokens"]
    assert (added[-1]["id"], added[-1]["content"]) == (285, "<think>")
    assert (
        json_of(tmp_path / "out" / "tokenizer.json")["model"]
        == json_of(base / "tokenizer.json")["model"]
    )


def test_S3_an_extracted_adapter_takes_its_tokenizer_along(tmp_path):
    base = make(tmp_path / "base", "tiny", "custom")
    source = add_tokens(wrapped_checkpoint(tmp_path / "in", base), THINK)
    report = extract_lora(checkpoint=source, base=base, output=tmp_path / "adapter")
    assert tokens_of(tmp_path / "adapter") == tokens_of(source)
    assert told(report, "'<think>'")
