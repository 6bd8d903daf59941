"""A tokenizer as a value: what a folder's files say of it, and how two of them differ.

A tokenizer is its tokens with their ids, its settings, its chat template and its code; which files it
is spread over, and how these are written, is up to the release that saved it. Two that mean the same
are the same here, whatever their bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from streamshard.checkpoint.file_names import TEMPLATE, TOKENIZER
from streamshard.checkpoint.json_files import MAX_TOKENIZER_BYTES, json_object
from streamshard.checkpoint.vocabulary import (
    TokenizerJson,
    Vocabulary,
    most_id,
    of_vocab_json,
    print_of,
    scan_tokenizer_json,
    sentencepiece,
)
from streamshard.disk.files import read_bytes
from streamshard.errors import InputError
from streamshard.values import frozen

__all__ = [
    "ADDED",
    "COMMON",
    "JINJA",
    "JSON",
    "SETTINGS",
    "SPECIAL",
    "TEMPLATE_JSON",
    "VOCABULARIES",
    "Content",
    "Tokenizer",
    "is_processors",
    "modules_of",
    "text_of",
]

_ID = re.compile(r"[0-9]{1,18}")
_NO_ID = 10**18  # what is larger, or less than 0, is no id

T = TypeVar("T")
Content: TypeAlias = Path | bytes
"""A file that lies somewhere, or what is to be written."""

JSON = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
ADDED = "added_tokens.json"
SPECIAL = "special_tokens_map.json"
JINJA = "chat_template.jinja"
TEMPLATE_JSON = "chat_template.json"

# Files that hold a whole vocabulary, the one that loaders prefer first.
VOCABULARIES = re.compile(
    r"tokenizer\.json|vocab\.json|.*\.model(?:\..*)?|vocab\.txt|vocab\.bpe|.*\.tiktoken|tekken\.json"
)
# Tokens that every tokenizer has a name for; other names are those of a processor.
COMMON = {f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
_NAMED = ("extra_special_tokens", "model_specific_special_tokens")


@frozen(slots=False)
class Tokenizer:
    """The tokenizer of a folder; `files` are its files by name, `where` is what messages call the folder.

    Everything else is read when it is first asked for. What cannot be read is left out, and told in
    `problems`: such files are carried all the same.
    """

    where: str
    files: Mapping[str, Content]
    problems: list[str] = field(default_factory=list, compare=False)

    @classmethod
    def of(cls, where: str, side_files: Mapping[str, Content]) -> Tokenizer:
        """The tokenizer among files of a folder."""
        own = {
            n: c for n, c in side_files.items() if TOKENIZER.fullmatch(n) or TEMPLATE.fullmatch(n)
        }
        found = cls(where, own)
        code = {name: side_files[name] for name in found.modules if name in side_files}
        return cls(where, {**own, **code}, found.problems)

    @property
    def has_tokens(self) -> bool:
        """Whether the files name any token, a chat template aside."""
        return self.is_whole or bool(self.added)

    @cached_property
    def is_whole(self) -> bool:
        """Whether there is a vocabulary, without which no loader can build a tokenizer."""
        return any(VOCABULARIES.fullmatch(name) for name in self.files)

    @property
    def lacks_merges(self) -> bool:
        """Whether the vocabulary is in two files, of which the second one is not there."""
        return "vocab.json" in self.files and not {"merges.txt", JSON} & self.files.keys()

    @cached_property
    def settings(self) -> dict[str, Any]:
        """`tokenizer_config.json`."""
        return self.json(SETTINGS)

    @cached_property
    def modules(self) -> list[str]:
        """The files of code that the settings name."""
        return list(modules_of(self.settings.get("auto_map")))

    def scanned(self, *, merges: bool = False) -> TokenizerJson | None:
        """`tokenizer.json`, if there is one that can be read: anew each time, as it is long."""
        return self._read(JSON, lambda text: scan_tokenizer_json(text, merges=merges))

    @cached_property
    def _library(self) -> tuple[list[dict[str, Any]], bool]:
        """Of `tokenizer.json` the added tokens, and whether it has a vocabulary."""
        found = self.scanned()
        if found is None:
            return [], False
        return self._told(JSON, found.added_tokens) or [], found.vocab is not None

    @cached_property
    def print(self) -> bytes | None:
        """What is equal for equal vocabularies that are written alike; None if there is none such."""
        return self._of_vocab(print_of)

    @cached_property
    def _most(self) -> int:
        """No token of the vocabulary has a larger id, if it states ids."""
        most = self._of_vocab(most_id)
        return -1 if most is None else most

    def _of_vocab(self, look: Callable[..., T]) -> T | None:
        """What `look` makes of the JSON object of tokens, wherever it stands."""
        found = self.scanned() if self._library[1] else None
        if found is not None and found.vocab is not None:
            return look(found.text, *found.vocab)
        return self._read("vocab.json", look)

    @cached_property
    def added(self) -> dict[int, dict[str, Any]]:
        """Tokens beside the vocabulary, or named once more, by id: entries with their `content`."""
        found: dict[int, dict[str, Any]] = {}
        decoder = self.settings.get("added_tokens_decoder")
        entries = list(decoder.items()) if isinstance(decoder, dict) else []
        entries += [(entry.get("id"), entry) for entry in self._library[0]]
        entries += [(number, {"content": token}) for token, number in self.json(ADDED).items()]
        seen = set()
        for given, entry in entries:
            number = int(given) if isinstance(given, str) and _ID.fullmatch(given) else given
            content = entry.get("content") if isinstance(entry, dict) else None
            if type(number) is not int or not 0 <= number < _NO_ID:
                continue
            if isinstance(content, str) and content not in seen:
                found.setdefault(number, entry)
                seen.add(content)
        return found

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """The tokens of the vocabulary proper; None if none can be read."""
        if self._library[1]:
            found = self._read(JSON, lambda text: scan_tokenizer_json(text).vocabulary())
            if found is not None:
                return found
        if "vocab.json" in self.files:
            return self._read("vocab.json", of_vocab_json)
        models = [name for name in self.files if name.endswith(".model")]
        return self._read(models[0], sentencepiece) if models else None

    @cached_property
    def template(self) -> dict[str, str]:
        """The chat templates by name, most often one, "default"; as a tokenizer's loader has them."""
        found = {}
        for name in self.files:
            if TEMPLATE.fullmatch(name) and name.endswith(".jinja"):
                text = self._read(name, bytes.decode)
                key = "default" if name == JINJA else Path(name).stem
                if text is not None:
                    found[key] = text
        stated = self.settings.get("chat_template")
        if not found and isinstance(stated, str):
            found = {"default": stated}
        elif not found and isinstance(stated, list):
            found = {
                str(one.get("name")): str(one.get("template"))
                for one in stated
                if isinstance(one, dict)
            }
        if not found and isinstance(text := self.json(TEMPLATE_JSON).get("chat_template"), str):
            found = {"default": text}
        # As jinja reads text: one line end at its end means nothing.
        return {k: text.replace("\r\n", "\n").removesuffix("\n") for k, text in found.items()}

    @cached_property
    def processor_keys(self) -> dict[str, Any]:
        """What of the settings is there for a processor: its class, and the tokens it names."""
        return {key: value for key, value in self.settings.items() if is_processors(key, value)}

    @cached_property
    def named(self) -> dict[str, str]:
        """The tokens that a processor finds by a name, as `video_token`."""
        named: dict[str, Any] = {}
        for group in _NAMED:
            if isinstance(inner := self.settings.get(group), dict):
                named |= inner
        named |= {
            key: value for key, value in self.processor_keys.items() if key.endswith("_token")
        }
        texts = {
            key: value.get("content") if isinstance(value, dict) else value
            for key, value in named.items()
        }
        return {key: text for key, text in texts.items() if isinstance(text, str)}

    @property
    def placeholders(self) -> set[str]:
        """Tokens that a processor replaces before a model sees them: no row is theirs."""
        return {text for key, text in self.named.items() if key == "video_token"}

    def special(self, name: str) -> str | None:
        """The text of a token like `eos_token`; None if the settings have none."""
        value = self.settings.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        return value if isinstance(value, str) else None

    def id_of(self, token: str) -> int | None:
        """The id of a token; None if the files do not say one."""
        for number, entry in self.added.items():
            if entry["content"] == token:
                return number
        return None if self.vocabulary is None else self.vocabulary.id_of(token)

    def beyond(self, rows: int) -> dict[int, str]:
        """Tokens whose ids no embedding of so many rows has, by id.

        Of a sentencepiece model or a list only the added ones, as their numbers are not written.
        """
        found = {n: entry["content"] for n, entry in self.added.items() if n >= rows}
        if self._most >= rows and self.vocabulary is not None:
            tokens = self.vocabulary.tokens()
            found = {n: text_of(tokens[n]) for n in range(rows, len(tokens)) if tokens[n]} | found
        return {n: token for n, token in sorted(found.items()) if token not in self.placeholders}

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object of the tokenizer; empty if it is not there or cannot be read."""
        found = self._read(name, lambda text: json_object(text, Path(name), MAX_TOKENIZER_BYTES))
        return found or {}

    def content(self, name: str) -> bytes | None:
        """The bytes of a file; None if it is not there or too long."""
        return self._read(name, bytes)

    def _read(self, name: str, parse: Callable[[bytes], T]) -> T | None:
        if name not in self.files:
            return None
        found = self.files[name]
        return self._told(
            name,
            lambda: parse(
                found if isinstance(found, bytes) else read_bytes(found, MAX_TOKENIZER_BYTES)
            ),
        )

    def _told(self, name: str, read: Callable[[], T]) -> T | None:
        try:
            return read()
        except (InputError, ValueError) as error:
            told = f"{self.where}: {name} cannot be read as a tokenizer's ({error})"
            if told not in self.problems:
                self.problems.append(told)
            return None


def is_processors(key: str, value: object) -> bool:
    """Whether a key of the settings is there for a processor, and means nothing to a tokenizer."""
    return (
        key == "processor_class"
        or (key in _NAMED and isinstance(value, dict))
        or (key.endswith("_token") and key not in COMMON and isinstance(value, (str, dict)))
    )


def modules_of(auto_map: object) -> Iterator[str]:
    """The files in a folder that an `auto_map` names; those of other repositories are left out."""
    if not isinstance(auto_map, (dict, list)):
        return
    values = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    for value in values:
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, str) and "--" not in one and "." in one:
                yield f"{one.rpartition('.')[0].replace('.', '/')}.py"


def text_of(token: bytes) -> str:
    """A token of a vocabulary as text."""
    return token.decode("utf-8", "replace")
