"""The tokens of tokenizer files, read as bytes: a vocabulary is never a mapping in memory.

The largest have 200,000 tokens and their files 28 MB; as Python's objects that would be more memory
than whole merges take. So files are scanned, and the result is one string of bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from streamshard.checkpoint.digests import new_digest
from streamshard.checkpoint.json_files import parse_json
from streamshard.values import frozen

__all__ = [
    "TokenizerJson",
    "Vocabulary",
    "most_id",
    "of_vocab_json",
    "print_of",
    "scan_tokenizer_json",
    "sentencepiece",
]

_SPACES = b" \t\r\n"
_BETWEEN = b"\xff"  # in no text of UTF-8
_MAX_ID = 10_000_000  # no model has so many rows; a hostile file must not make us count further
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_SPACE = rb"[ \t\n\r]*"
_PAIR = re.compile(rb"%s(%s)%s:%s(\d+)%s([,}])" % (_SPACE, _STRING, _SPACE, _SPACE, _SPACE))
_SCORED = re.compile(
    rb"%s\[%s(%s)%s,%s[-+.\deE]+%s\]%s([,\]])"
    % (_SPACE, _SPACE, _STRING, _SPACE, _SPACE, _SPACE, _SPACE)
)
_KEY = re.compile(rb"%s(%s)%s:%s" % (_SPACE, _STRING, _SPACE, _SPACE))
_BRACKET = re.compile(rb'(?:[^"\[\]{}]++|%s)*+([\[\]{}])' % _STRING)
_TEXT = re.compile(_STRING)
_PLAIN = re.compile(rb"[^\s,\]}]+")
_NEXT = re.compile(rb"%s([,}])" % _SPACE)
_OPEN = re.compile(rb"%s\{" % _SPACE)
_PAIRS = re.compile(rb"\[%s\[" % _SPACE)
_TIGHT = re.compile(
    rb"%s\{(?:%s%s%s:%s\d++%s[,}])*+%s"
    % (_SPACE, _SPACE, rb'"[^"\\\s]*+(?:\\[^\s][^"\\\s]*+)*+"', _SPACE, _SPACE, _SPACE, _SPACE)
)
_ID = re.compile(rb":[ \t\r\n]*(\d+)[ \t\r\n]*[,}]")
_CLOSED = re.compile(rb"%s\}" % _SPACE)


@frozen
class Vocabulary:
    """Tokens by their ids: the text of each in UTF-8, in the order of ids, empty where none is."""

    joined: bytes

    def tokens(self) -> list[bytes]:
        """The text of each token, by id."""
        return self.joined.split(_BETWEEN) if self.joined else []

    def id_of(self, token: str) -> int | None:
        """The id of a token; None if there is none."""
        at = (_BETWEEN + self.joined + _BETWEEN).find(_BETWEEN + token.encode() + _BETWEEN)
        return None if at < 0 else self.joined[:at].count(_BETWEEN)


@frozen
class TokenizerJson:
    """Where in a `tokenizer.json` things are: spans of its bytes, None where they are not there."""

    text: bytes
    added: tuple[int, int] | None
    """The list of added tokens."""
    vocab: tuple[int, int] | None
    merges: tuple[int, int] | None
    kind: str | None
    """`BPE`, `Unigram`, …"""

    def added_tokens(self) -> list[dict[str, Any]]:
        """The entries of the added tokens, as they are."""
        if self.added is None:
            return []
        found = parse_json(self.text[slice(*self.added)], "tokenizer.json")
        return [entry for entry in found if isinstance(entry, dict)] if found else []

    def merge_lines(self) -> Iterator[bytes]:
        """The merges of a BPE model, each as two texts with a space between."""
        if self.merges is None:
            return
        start, stop = self.merges
        texts = (_plain(found[0]) for found in _TEXT.finditer(self.text, start, stop))
        if _PAIRS.match(self.text, start):  # newer releases write two strings
            yield from (b"%s %s" % (one, next(texts, b"")) for one in texts)
        else:
            yield from texts

    def vocabulary(self) -> Vocabulary | None:
        """The tokens of the model; raises `ValueError` for what is no vocabulary."""
        if self.vocab is None:
            return None
        start, stop = self.vocab
        if self.text[start : start + 1] == b"{":
            return of_pairs(_pairs(self.text, start + 1, stop))
        return of_pieces(_scored(self.text, start + 1, stop))


def print_of(text: bytes, start: int = 0, stop: int | None = None) -> bytes | None:
    """A digest of an object of tokens with their ids that is the same however it is indented.

    None if it cannot be made of the bytes at once: not an object, or a token has spaces in it.
    """
    found = _TIGHT.fullmatch(text, start, len(text) if stop is None else stop)
    if found is None:
        return None
    digest = new_digest()
    digest.update(found[0].translate(None, _SPACES))
    return digest.digest()


def most_id(text: bytes, start: int = 0, stop: int | None = None) -> int:
    """A number that no id in an object of tokens with their ids exceeds; -1 where there is none.

    It may be too large where a token looks like an id.
    """
    found = _ID.findall(text, start, len(text) if stop is None else stop)
    return max((int(number[:18]) for number in found), default=-1)


def of_vocab_json(text: bytes) -> Vocabulary:
    """The tokens of a `vocab.json`; raises `ValueError` for what is none."""
    begin = _OPEN.match(text)
    if begin is None:
        raise ValueError("it is not a JSON object")
    return of_pairs(_pairs(text, begin.end(), len(text)))


def of_pairs(pairs: Iterable[tuple[bytes, int]]) -> Vocabulary:
    """A vocabulary of tokens with their ids, in any order."""
    slots: list[bytes] = []
    for token, number in pairs:
        if number >= len(slots):
            if number > _MAX_ID:
                raise ValueError(f"a token has the id {number:,}")
            slots += [b""] * (number + 1 - len(slots))
        slots[number] = token
    return Vocabulary(_BETWEEN.join(slots))


def of_pieces(pieces: Iterable[bytes]) -> Vocabulary:
    """A vocabulary of tokens in the order of their ids."""
    return Vocabulary(_BETWEEN.join(pieces))


def scan_tokenizer_json(text: bytes, *, merges: bool = False) -> TokenizerJson:
    """Find added tokens, vocabulary and kind, and the merges if they are asked for.

    Nothing behind the last of them is looked at. Raises `ValueError` for what is no JSON object.
    """
    found: dict[bytes, tuple[int, int]] = {}
    wanted = {b"added_tokens", b"type", b"vocab", *([b"merges"] if merges else [])}
    for key, start in _members(text, 0):
        if key == b"added_tokens":
            found[key] = start, _end(text, start)
        elif key == b"model" and text[start : start + 1] == b"{":
            for inner, at in _members(text, start):
                if inner in wanted:
                    found[inner] = at, _end(text, at)
                if found.keys() >= wanted:
                    break
        if found.keys() >= wanted:
            break
    kind = found.get(b"type")
    return TokenizerJson(
        text,
        found.get(b"added_tokens"),
        found.get(b"vocab"),
        found.get(b"merges"),
        None if kind is None else text[slice(*kind)].decode("utf-8", "replace").strip('"'),
    )


def _pairs(text: bytes, at: int, stop: int) -> Iterator[tuple[bytes, int]]:
    if _CLOSED.match(text, at, stop):
        return
    while True:
        found = _PAIR.match(text, at, stop)
        if found is None:
            raise ValueError(f"a token with its id was expected at byte {at:,}")
        yield _plain(found[1]), int(found[2][:18])
        if found[3] == b"}":
            return
        at = found.end()


def _scored(text: bytes, at: int, stop: int) -> Iterator[bytes]:
    while at < stop:
        found = _SCORED.match(text, at, stop)
        if found is None:
            raise ValueError(f"a token with its score was expected at byte {at:,}")
        yield _plain(found[1])
        if found[2] == b"]":
            return
        at = found.end()


def _plain(literal: bytes) -> bytes:
    """The text of a JSON string."""
    if b"\\" not in literal:
        return literal[1:-1]
    return str(json.loads(literal)).encode("utf-8", "surrogatepass")


def _members(text: bytes, at: int) -> Iterator[tuple[bytes, int]]:
    """The keys of the JSON object at `at`, and where the value of each begins."""
    begin = _OPEN.match(text, at)
    if begin is None:
        raise ValueError("it is not a JSON object")
    at = begin.end()
    if _CLOSED.match(text, at):
        return
    while True:
        key = _KEY.match(text, at)
        if key is None:
            raise ValueError(f"a name in quotes was expected at byte {at:,}")
        yield _plain(key[1]), key.end()
        at = _end(text, key.end())
        following = _NEXT.match(text, at)
        if following is None:
            raise ValueError(f"',' or '}}' was expected at byte {at:,}")
        if following[1] == b"}":
            return
        at = following.end()


def _end(text: bytes, at: int) -> int:
    """Where the JSON value that begins at `at` ends."""
    if text[at : at + 1] not in (b"{", b"["):
        plain = _TEXT.match(text, at) or _PLAIN.match(text, at)
        if plain is None:
            raise ValueError(f"a value was expected at byte {at:,}")
        return plain.end()
    depth = 0
    while found := _BRACKET.match(text, at):
        depth += 1 if found[1] in b"[{" else -1
        at = found.end()
        if not depth:
            return at
    raise ValueError("it ends within a value")


def sentencepiece(text: bytes) -> Vocabulary:
    """The pieces of a sentencepiece model, which is a protobuf: field 1, and in it field 1.

    Raises `ValueError` for anything else.
    """
    pieces = [
        piece
        for field, content in _fields(text)
        if field == 1
        for inner, piece in _fields(content)
        if inner == 1
    ]
    if not pieces:
        raise ValueError("it is no sentencepiece model")
    return of_pieces(pieces)


def _fields(text: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and content of the fields of a protobuf that have a length; others are passed over."""
    at = 0
    while at < len(text):
        tag, at = _varint(text, at)
        wire = tag & 7
        if wire == 0:
            _, at = _varint(text, at)
        elif wire == 2:
            nbytes, at = _varint(text, at)
            if at + nbytes > len(text):
                raise ValueError("it ends within a field")
            yield tag >> 3, text[at : at + nbytes]
            at += nbytes
        elif wire in (1, 5):
            at += 8 if wire == 1 else 4
        else:
            raise ValueError("it is no protobuf")


def _varint(text: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(text) and shift < 64:
        byte = text[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError("it is no protobuf")
