"""Which files belong together when a folder gets another tokenizer than its own, and tokens more.

A tokenizer moves as one: tokens, settings, template and code. What was made for the folder's layout
stays: what a processor finds in the settings, code and template where nothing replaces them, and the
files that older loaders want, made anew from `tokenizer.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from streamshard.checkpoint.file_names import TEMPLATE
from streamshard.checkpoint.json_files import json_pieces
from streamshard.checkpoint.tokenizer import (
    ADDED,
    COMMON,
    JINJA,
    JSON,
    SETTINGS,
    SPECIAL,
    TEMPLATE_JSON,
    Content,
    Tokenizer,
    is_processors,
)
from streamshard.notes import note

__all__ = ["exchanged", "with_tokens"]

# What transformers 5 calls classes that no earlier release knows.
_NEW_CLASSES = {"TokenizersBackend", "PythonBackend", "SentencePieceBackend"}
_FAST = "PreTrainedTokenizerFast"
_SLOW = ("vocab.json", "merges.txt")


def exchanged(
    side_files: Mapping[str, Content],
    old: Tokenizer,
    new: Tokenizer,
    *,
    keep_template: bool = False,
) -> dict[str, Content]:
    """The files of a folder with the tokenizer `new` in the place of `old`, its own.

    `new` is whole. `keep_template` says that the template is a matter of the folder. What is lost by
    the exchange is noted.
    """
    own = {n: c for n, c in side_files.items() if n not in old.files}
    code = {n: c for n, c in old.files.items() if n.endswith(".py")}
    keep_template = bool(old.template) and (keep_template or not new.template)
    whose = old if keep_template else new
    files = {n: c for n, c in new.files.items() if not TEMPLATE.fullmatch(n)}
    files |= {n: c for n, c in whose.files.items() if TEMPLATE.fullmatch(n)}
    slow = _slow_files(old, new)
    settings = _settings(old, new, slow)
    if keep_template:
        settings.pop("chat_template", None)
        if "chat_template" in old.settings:
            settings["chat_template"] = old.settings["chat_template"]
    elif set(new.template) == {"default"} and "chat_template" in new.settings:
        # Processors read only a file of its own.
        text = new.template["default"]
        if TEMPLATE_JSON in old.files:
            files.setdefault(TEMPLATE_JSON, _json({"chat_template": text}))
        elif JINJA in old.files:
            files.setdefault(JINJA, text.encode())
    if settings != new.settings:
        files[SETTINGS] = _json(settings)
    return {**own, **code, **files, **slow}


def _settings(old: Tokenizer, new: Tokenizer, slow: Mapping[str, Content]) -> dict[str, Any]:
    """The settings of `new` in the folder of `old`."""
    if new.settings:
        settings = {k: v for k, v in new.settings.items() if not is_processors(k, v)}
    else:
        settings = {k: v for k, v in old.settings.items() if k != "added_tokens_decoder"}
    settings |= old.processor_keys
    listed = settings.get("extra_special_tokens")
    if isinstance(listed, list) and not isinstance(old.settings.get("extra_special_tokens"), list):
        # Transformers 4 wants a mapping there and fails on this list; 5 reads either key.
        settings.setdefault("additional_special_tokens", listed)
        del settings["extra_special_tokens"]
    if settings.get("tokenizer_class") in _NEW_CLASSES:
        known = old.settings.get("tokenizer_class")
        if known not in _NEW_CLASSES:
            settings["tokenizer_class"] = known if "vocab.json" in {*slow, *new.files} else _FAST
    if slow and "added_tokens_decoder" in old.settings and new.added:
        settings.setdefault("added_tokens_decoder", _decoder(new.added))
    return settings


def _slow_files(old: Tokenizer, new: Tokenizer) -> dict[str, Content]:
    """The files that `old` has for loaders without `tokenizer.json`, of the tokens of `new`."""
    if all(name in new.files for name in _SLOW):
        return {}
    models = [name for name in old.files if name.endswith(".model")]
    wanted = [name for name in (*_SLOW, *models) if name in old.files and name not in new.files]
    if not wanted:
        return {}
    found = new.scanned(merges=True)
    if models or found is None or found.kind != "BPE" or found.vocab is None or not found.merges:
        note(
            f"the tokenizer of {new.where} has no {' and '.join(wanted)}, and they cannot be made of "
            "what it has: loaders that are not based on tokenizer.json (use_fast=False, and the "
            "tokenizer class of the original model) cannot read the output"
        )
        return {}
    table = new.vocabulary
    size = 0 if table is None else len(table.tokens())
    named = {k: v for k, v in new.settings.items() if k in COMMON and v is not None}
    more = new.settings.get("additional_special_tokens", new.settings.get("extra_special_tokens"))
    made: dict[str, Content] = {
        "vocab.json": found.text[slice(*found.vocab)] + b"\n",
        "merges.txt": b"\n".join([b"#version: 0.2", *found.merge_lines(), b""]),
        ADDED: _json({e["content"]: n for n, e in sorted(new.added.items()) if n >= size}),
        SPECIAL: _json(
            {**named, "additional_special_tokens": more if isinstance(more, list) else []}
        ),
    }
    return {n: c for n, c in made.items() if n in old.files and n not in new.files}


def with_tokens(
    side_files: Mapping[str, Content], own: Tokenizer, more: Mapping[int, dict[str, Any]]
) -> dict[str, Content]:
    """The files of a folder whose tokenizer gets tokens more: entries with `content`, by id."""
    if not more:
        return dict(side_files)
    entries = {number: _entry(entry) for number, entry in more.items()}
    files = dict(side_files)
    found = own.scanned()
    if found is not None:
        added = found.added_tokens()
        added += [{"id": number, **entry} for number, entry in entries.items()]
        added.sort(key=lambda entry: int(entry.get("id", 0)))
        if found.added is not None:
            first, last = found.added
            content = json.dumps(added, ensure_ascii=False).encode()
            files[JSON] = found.text[:first] + content + found.text[last:]
    decoder = own.settings.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        files[SETTINGS] = _json(
            {**own.settings, "added_tokens_decoder": {**decoder, **_decoder(entries)}}
        )
    if ADDED in files or (found is None and not isinstance(decoder, dict)):
        files[ADDED] = _json({**own.json(ADDED), **{e["content"]: n for n, e in entries.items()}})
    return files


def _entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An added token with all that loaders want to know of it."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"content": entry["content"], **{k: bool(entry.get(k, v)) for k, v in flags.items()}}


def _decoder(added: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    return {str(number): _entry(entry) for number, entry in sorted(added.items())}


def _json(content: Mapping[str, Any]) -> bytes:
    return b"".join(json_pieces(content))
