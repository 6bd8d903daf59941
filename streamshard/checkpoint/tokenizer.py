"""A tokenizer as a value: what a folder's files say of it, and how two of them differ.

A tokenizer is its tokens with their ids, its settings, its chat template and its code; which files it
is spread over, and how these are written, is up to the release that saved it. Two that mean the same
are the same here, whatever their bytes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from streamshard.checkpoint.file_names import TEMPLATE, TOKENIZER
from streamshard.checkpoint.json_files import MAX_TOKENIZER_BYTES, json_object
from streamshard.checkpoint.vocabulary import (
    TokenizerJson,
    Vocabulary,
    of_vocab_json,
    scan_tokenizer_json,
    sentencepiece,
)
from streamshard.disk.files import read_bytes
from streamshard.errors import InputError

__all__ = [
    "ADDED",
    "COMMON",
    "JINJA",
    "JSON",
    "SETTINGS",
    "SPECIAL",
    "TEMPLATE_JSON",
    "Content",
    "Tokenizer",
    "differences",
    "is_comparable",
    "is_processors",
    "modules_of",
]

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
_VOCABULARIES = re.compile(
    r"tokenizer\.json|vocab\.json|.*\.model(?:\..*)?|vocab\.txt|vocab\.bpe|.*\.tiktoken|tekken\.json"
)
# Tokens that every tokenizer has a name for; other names are those of a processor.
COMMON = {f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")}
_NAMED = ("extra_special_tokens", "model_specific_special_tokens")


@dataclass(frozen=True)
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
        return any(_VOCABULARIES.fullmatch(name) for name in self.files)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """`tokenizer_config.json`."""
        return self.json(SETTINGS)

    @cached_property
    def modules(self) -> list[str]:
        """The files of code that the settings name."""
        return list(modules_of(self.settings.get("auto_map")))

    @cached_property
    def scanned(self) -> TokenizerJson | None:
        """`tokenizer.json`, if there is one that can be read."""
        return self._read(JSON, scan_tokenizer_json)

    @cached_property
    def added(self) -> dict[int, dict[str, Any]]:
        """Tokens beside the vocabulary, or named once more, by id: entries with their `content`."""
        found: dict[int, dict[str, Any]] = {}
        decoder = self.settings.get("added_tokens_decoder")
        entries = list(decoder.items()) if isinstance(decoder, dict) else []
        if self.scanned is not None:
            try:
                entries += [(entry.get("id"), entry) for entry in self.scanned.added_tokens()]
            except InputError as error:
                self.problems.append(str(error))
        entries += [(number, {"content": token}) for token, number in self.json(ADDED).items()]
        seen = set()
        for given, entry in entries:
            number = int(given) if isinstance(given, str) and given.isdecimal() else given
            content = entry.get("content") if isinstance(entry, dict) else None
            if isinstance(number, int) and isinstance(content, str) and content not in seen:
                found.setdefault(number, entry)
                seen.add(content)
        return found

    @cached_property
    def vocabulary(self) -> Vocabulary | None:
        """The tokens of the vocabulary proper; None if none can be read."""
        if self.scanned is not None and self.scanned.vocab is not None:
            found = self._told(JSON, self.scanned.vocabulary)
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
        """Added tokens whose ids no embedding of so many rows has, by id."""
        found = {n: e["content"] for n, e in sorted(self.added.items()) if n >= rows}
        return {n: token for n, token in found.items() if token not in self.placeholders}

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


def differences(one: Tokenizer, other: Tokenizer) -> dict[int, tuple[str | None, str | None]]:
    """The tokens by whose meaning two tokenizers differ, by id: what each of them has there.

    None is no token. Where one of them has no vocabulary that can be read, only tokens that either of
    them lists beside its vocabulary are compared. What a processor replaces does not count.
    """
    # Read where they are needed, which is not where two have the same files.
    mine, theirs = cache(lambda: _table(one)), cache(lambda: _table(other))
    numbers: Iterable[int] = one.added.keys() | other.added.keys()
    if not _same_vocabulary(one, other) and None not in (one.vocabulary, other.vocabulary):
        numbers = range(max(len(mine()), len(theirs()), *(n + 1 for n in numbers)))
    ignored = {None, *one.placeholders, *other.placeholders}
    found = {}
    for number in sorted(numbers):
        pair = _at(one, mine, number), _at(other, theirs, number)
        if pair[0] != pair[1] and not ignored.issuperset(pair):
            found[number] = pair
    return found


def is_comparable(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether the vocabularies of two tokenizers, if they have some, can be compared."""
    if not (one.is_whole and other.is_whole) or _same_file(one, other):
        return True
    return None not in (one.vocabulary, other.vocabulary)


def _same_vocabulary(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers have the same tokens with the same ids, added ones aside."""
    return _same_file(one, other) or one.vocabulary == other.vocabulary


def _same_file(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether both have the same bytes in the first file of a vocabulary that both have."""
    for name in one.files:
        if _VOCABULARIES.fullmatch(name) and name in other.files:
            mine = one.content(name)
            return mine is not None and mine == other.content(name)
    return False


def _table(tokenizer: Tokenizer) -> list[bytes]:
    return [] if tokenizer.vocabulary is None else tokenizer.vocabulary.tokens()


def _at(tokenizer: Tokenizer, table: Callable[[], list[bytes]], number: int) -> str | None:
    entry = tokenizer.added.get(number)
    if entry is not None:
        return str(entry["content"])
    tokens = table()
    return _text(tokens[number]) if number < len(tokens) and tokens[number] else None


def _text(token: bytes) -> str:
    return token.decode("utf-8", "replace")
