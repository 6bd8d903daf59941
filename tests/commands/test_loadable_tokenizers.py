"""What transformers makes of the tokenizers that are written: S7, and what outputs lack: S8."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from folders import OTHER, config_of, convert, edit, make, without_weights
from make_checkpoint import write_adapter
from transformers.models.internvl import InternVLProcessor

from streamshard import merge_lora, wrap_lora
from streamshard.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

NO_CONFIG = transformers.PreTrainedConfig()
NAMED = {
    "context_image_token": "<IMG_CONTEXT>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "video_token": "<video>",
}
SLOW = ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json")
TEXT = "hé <think> <img><IMG_CONTEXT></img>"


def settings_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))


def put_settings(folder: Path, **changes: Any) -> Path:
    content = json.dumps(settings_of(folder) | changes, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(content, encoding="utf-8")
    return folder


def original(folder: Path, layout: str, **how: Any) -> Path:
    """A folder as the model's makers publish it, by transformers 4."""
    make(folder, "tiny", layout, **how)
    if layout == "hf":
        put_settings(
            folder, **NAMED, extra_special_tokens=NAMED, processor_class="InternVLProcessor"
        )
    return folder


def by_transformers_5(folder: Path, *tokens: str) -> Path:
    """The folder with its tokenizer saved anew by the installed transformers, and tokens more."""
    tokenizer = loaded(folder)
    tokenizer.add_tokens(list(tokens))
    for name in SLOW:
        (folder / name).unlink()
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    assert not any((folder / name).exists() for name in SLOW)
    return folder


def by_transformers_4(folder: Path, *tokens: str) -> Path:
    listed = json.loads((folder / "added_tokens.json").read_text())
    decoder = settings_of(folder)["added_tokens_decoder"]
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word", "special"), False)
    for number, token in enumerate(tokens, max(listed.values()) + 1):
        listed[token] = number
        decoder[str(number)] = {"content": token, **flags}
    (folder / "added_tokens.json").write_text(json.dumps(listed))
    return put_settings(folder, added_tokens_decoder=decoder)


SAVED = {"5": by_transformers_5, "4": by_transformers_4}


def loaded(folder: Path) -> Any:
    layout_config = {} if config_of(folder)["model_type"] == "internvl" else {"config": NO_CONFIG}
    return transformers.AutoTokenizer.from_pretrained(folder, **layout_config)


def processor(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The processor of a folder; its image processor needs packages that tests do without."""
    monkeypatch.setattr(InternVLProcessor, "check_argument_for_proper_class", lambda *_: None)
    found, _ = InternVLProcessor.get_processor_dict(folder)
    return InternVLProcessor(
        image_processor=None, tokenizer=loaded(folder), chat_template=found.get("chat_template")
    )


def told(report: Any, *words: str) -> bool:
    return any(all(word in text for word in words) for text in report["warnings"])


@pytest.mark.parametrize("reference_by", ["4", "5"])
@pytest.mark.parametrize("source_by", ["4", "5"])
def test_S7_a_processor_is_built_of_what_custom2hf_writes(
    source_by, reference_by, tmp_path, monkeypatch
):
    """What it looks for in the settings stays; the tokens are the source's."""
    source = SAVED[source_by](original(tmp_path / "source", "custom"), "<think>")
    ref = SAVED[reference_by](original(tmp_path / "ref", "hf"))
    expected = processor(ref, monkeypatch)
    convert("hf", source, ref, tmp_path / "out", tokenizer_from="source")
    found = processor(tmp_path / "out", monkeypatch)
    for name in ("image_token", "image_token_id", "start_image_token_id", "end_image_token_id"):
        assert getattr(found, name) == getattr(expected, name)
    assert found.video_token == "<video>"
    assert found.chat_template == expected.chat_template
    assert found.tokenizer.encode(TEXT) == loaded(source).encode(TEXT)
    assert settings_of(tmp_path / "out")["processor_class"] == "InternVLProcessor"
    assert config_of(tmp_path / "out")["image_token_id"] == found.image_token_id


@pytest.mark.parametrize("reference_by", ["4", "5"])
@pytest.mark.parametrize("source_by", ["4", "5"])
def test_S7_old_loaders_find_their_files_in_what_hf2custom_writes(
    source_by, reference_by, tmp_path
):
    source = SAVED[source_by](original(tmp_path / "source", "hf"), "<think>")
    ref = SAVED[reference_by](original(tmp_path / "ref", "custom"))
    convert("custom", source, ref, tmp_path / "out", tokenizer_from="source")
    out = tmp_path / "out"
    expected = loaded(source)
    assert loaded(out).encode(TEXT) == expected.encode(TEXT)
    settings = settings_of(out)
    assert not NAMED.keys() & settings.keys()
    assert "processor_class" not in settings
    assert (out / "chat_template.jinja").read_bytes() == (
        source / "chat_template.jinja"
    ).read_bytes()
    if reference_by == "5" and source_by == "5":
        assert not any((out / name).exists() for name in SLOW)
        return
    # What loaders read that know no tokenizer.json: the same tokens by these files alone.
    assert isinstance(settings.get("extra_special_tokens", {}), dict) or reference_by == "5"
    (out / "tokenizer.json").unlink(missing_ok=True)
    assert loaded(out).encode(TEXT) == expected.encode(TEXT)
    listed = json.loads((out / "added_tokens.json").read_text())
    assert listed["<think>"] == expected.convert_tokens_to_ids("<think>")
    decoder = settings["added_tokens_decoder"]
    assert {entry["content"]: int(n) for n, entry in decoder.items()} == listed
    special = json.loads((out / "special_tokens_map.json").read_text())
    assert special["eos_token"] == "<|im_end|>"
    assert "<img>" in special["additional_special_tokens"]


@pytest.mark.parametrize("form", ["text", "pairs"])
def test_S7_merges_are_written_as_old_loaders_read_them(form, tmp_path):
    """tokenizer.json has merges as texts or as pairs."""
    source, ref = original(tmp_path / "s", "hf"), original(tmp_path / "r", "custom")
    vocab = json.loads((source / "vocab.json").read_text(encoding="utf-8"))
    merges = [("h", "Ã"), ("hÃ", "©"), ("a", '"')]
    vocab |= {one + other: 270 + n for n, (one, other) in enumerate(merges)}
    for folder in (source, ref):
        (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
        lines = "".join(f"{one} {other}\n" for one, other in merges)
        (folder / "merges.txt").write_text(f"#version: 0.2\n{lines}", encoding="utf-8")
    by_transformers_5(source)
    file = source / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    spelled = {"text": " ".join, "pairs": list}[form]
    content["model"]["merges"] = [spelled(p) for p in merges]
    file.write_text(json.dumps(content, ensure_ascii=form == "text"), encoding="utf-8")
    convert("custom", source, ref, tmp_path / "out", tokenizer_from="source")
    written = (tmp_path / "out" / "merges.txt").read_text(encoding="utf-8")
    assert written == (ref / "merges.txt").read_text(encoding="utf-8")
    written = json.loads((tmp_path / "out" / "vocab.json").read_text(encoding="utf-8"))
    assert written == vocab


def test_S7_a_class_that_only_transformers_5_knows(tmp_path):
    source = by_transformers_5(original(tmp_path / "source", "hf"))
    put_settings(source, tokenizer_class="TokenizersBackend")
    ref = original(tmp_path / "ref", "custom")
    convert("custom", source, ref, tmp_path / "out", tokenizer_from="source")
    assert settings_of(tmp_path / "out")["tokenizer_class"] == "Qwen2Tokenizer"


def test_S7_a_sentencepiece_model_cannot_be_made(tmp_path):
    source = by_transformers_5(original(tmp_path / "source", "hf"))
    ref = original(tmp_path / "ref", "custom")
    (ref / "tokenizer.model").write_bytes(b"\x0a\x07\x0a\x03<s>\x18\x03")
    report = convert("custom", source, ref, tmp_path / "out", tokenizer_from="source")
    assert told(report, "tokenizer.model", "use_fast=False")


@pytest.mark.parametrize("saved", ["4", "5"])
@pytest.mark.parametrize("home", ["custom", "hf"])
def test_S7_merges_with_an_adapters_tokenizer(home, saved, tmp_path, monkeypatch):
    """An adapter's folder has what transformers saved: the output loads, by old loaders too."""
    import reference
    import torch
    from safetensors.torch import load_file

    base = original(tmp_path / "base", home)
    other = SAVED[saved](original(tmp_path / "other", home), "<think>")
    number = loaded(other).convert_tokens_to_ids("<think>")
    adapter = tmp_path / "adapter"
    write_adapter(adapter, "tiny", layout=home, targets="llm", r=4)
    content = load_file(adapter / "adapter_model.safetensors")
    place = {"hf": "model.language_model", "custom": "language_model.model"}[home]
    key = f"base_model.model.{place}.embed_tokens.token_adapter.trainable_tokens_delta"
    content[key] = torch.ones(1, 64)
    reference.save_file(content, adapter / "adapter_model.safetensors", {"format": "pt"})
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["trainable_token_indices"] = {"embed_tokens": [number]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    for name in (*SLOW, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (other / name).exists():
            shutil.copy(other / name, adapter / name)
    report = merge_lora(base=base, adapter=adapter, output=tmp_path / "out")
    assert told(report, f"'<think>' ({number})")
    out = tmp_path / "out"
    assert loaded(out).encode(TEXT) == loaded(other).encode(TEXT)
    assert all((out / name).exists() for name in SLOW)
    if home == "hf":
        assert processor(out, monkeypatch).tokenizer.convert_tokens_to_ids("<think>") == number
        assert processor(out, monkeypatch).chat_template


# --- S8 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_S8_code_that_is_not_there_is_told(layout, where, tmp_path):
    source = make(tmp_path / "source", "tiny", OTHER[layout])
    ref = make(tmp_path / "ref", "tiny", layout)
    content = json.loads((ref / where).read_text())
    content["auto_map"] = {
        "AutoConfig": "configuration_gone.Gone",
        "AutoTokenizer": ["tokenization_gone.Gone", None],
        "AutoModel": "somebody/else--modeling_elsewhere.Elsewhere",
    }
    (ref / where).write_text(json.dumps(content))
    report = convert(layout, source, ref, tmp_path / "out")
    assert told(report, "configuration_gone.py", "tokenization_gone.py", where)
    assert not told(report, "elsewhere")


def test_S8_code_of_a_part_of_the_model_is_told(tmp_path):
    source = make(tmp_path / "source", "tiny", "hf")
    ref = make(tmp_path / "ref", "tiny", "custom")
    code = {"AutoConfig": "configuration_part.Part"}
    edit(ref, lambda config: config["llm_config"].update(auto_map=code))
    report = convert("custom", source, ref, tmp_path / "out")
    assert told(report, "configuration_part.py", "config.json")


def test_S8_code_that_code_needs_is_told(tmp_path):
    base = make(tmp_path / "base", "tiny", "custom")
    (base / "modeling_internvl_chat.py").write_text(
        "from .conversation import x\nfrom .gone import y\n"
    )
    report = wrap_lora(base=base, output=tmp_path / "out", llm_r=4)
    assert told(report, "'gone.py'", "modeling_internvl_chat.py")
    assert not told(report, "conversation.py")


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_S8_what_is_quantized_inside_is_refused(layout, tmp_path):
    source = make(tmp_path / "source", "tiny", OTHER[layout])
    ref = without_weights(make(tmp_path / "ref", "tiny", layout))
    inner = {"hf": "text_config", "custom": "llm_config"}[layout]
    edit(ref, lambda config: config[inner].update(quantization_config={"quant_method": "awq"}))
    with pytest.raises(InputError, match=rf"{inner}\.quantization_config"):
        convert(layout, source, ref, tmp_path / "out")


@pytest.mark.parametrize("layout", ["custom", "hf"])
def test_S8_weights_in_a_sub_folder_are_told(layout, tmp_path):
    source = make(tmp_path / "source", "tiny", OTHER[layout])
    ref = make(tmp_path / "ref", "tiny", layout)
    write_adapter(tmp_path / "adapter", "tiny", layout=layout, targets="llm", r=4)
    (ref / "P-MTP").mkdir()
    (ref / "P-MTP" / "config.json").write_text("{}")
    shutil.copy(ref / "model.safetensors", ref / "P-MTP" / "model.safetensors")
    for report in (
        convert(layout, source, ref, tmp_path / "out"),
        merge_lora(base=ref, adapter=tmp_path / "adapter", output=tmp_path / "merged"),
    ):
        assert told(report, "P-MTP/model.safetensors")
