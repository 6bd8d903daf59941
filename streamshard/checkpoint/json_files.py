"""JSON of files that nobody vouches for, strict, plain, and bounded in time and memory.

And JSON as it is written: in pieces.
"""

from __future__ import annotations

import codecs
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from json.decoder import scanstring  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any

from streamshard.checkpoint.lfs_pointers import check_pointer
from streamshard.disk.files import read_bytes
from streamshard.errors import InputError, printable

__all__ = [
    "MAX_DEPTH",
    "MAX_JSON_BYTES",
    "MAX_TOKENIZER_BYTES",
    "MAX_VALUES",
    "json_object",
    "json_pieces",
    "parse_index",
    "parse_json",
    "parse_prefix",
    "parse_small",
    "read_json_object",
]

MAX_JSON_BYTES = 10_000_000  # the index of the largest InternVL has 4 MB
MAX_TOKENIZER_BYTES = 50_000_000  # the largest tokenizer.json have 28 MB

MAX_DEPTH = (
    64  # real configs have 5; what later walks a config by recursion stays far from its limit
)
MAX_VALUES = 500_000  # the index of the largest InternVL has 40,000


def parse_json(text: bytes, file: object, max_values: int = MAX_VALUES) -> Any:
    """JSON of an untrusted file; raises `InputError` for what is no strict, plain JSON.

    Duplicate keys, NaN, numbers that no double holds, lone surrogates, more than `MAX_DEPTH` levels
    and more than `max_values` values are refused; the message begins with `file`.
    """
    with _told(file):
        decoded = _decoded(text, max_values)
        del text
        content = _DECODER.decode(decoded)
        del decoded
        _check(content)
    return content


def parse_index(text: bytes, file: object) -> dict[str, Any]:
    """An index: the like of `parse_json`, for an object whose `weight_map` has many names.

    Names are interned, and made one after the other: the headers of the files have them too, and
    once in memory is enough.
    """

    def member(name: str, decoded: str, at: int) -> tuple[Any, int]:
        if name == "weight_map" and decoded.startswith("{", at):
            return _object(decoded, at, _interned)
        return _DECODER.raw_decode(decoded, at)

    with _told(file):
        decoded = _decoded(text, MAX_VALUES)
        del text
        content, end = _object(decoded, 0, member)
        if decoded[end:].strip(_SPACES):
            raise ValueError("something follows the object")
        del decoded
        _check(content)
    return content


def _decoded(text: bytes, max_values: int) -> str:
    # Each value is a hundred bytes of memory or more, but may be two bytes of text. Commas and
    # brackets within strings count too; no real file comes near the limit.
    found = sum(text.count(mark) for mark in (b",", b"[", b"{"))
    if found > max_values:
        raise _TooManyError(f"has {found:,} values; {max_values:,} is the limit here.")
    if text.startswith(codecs.BOM_UTF8):
        raise ValueError("it begins with a byte order mark (BOM); save it as UTF-8 without one")
    return text.decode()


class _TooManyError(Exception):
    """There are more values than are looked at."""


@contextmanager
def _told(file: object) -> Iterator[None]:
    """Turn what can be wrong with JSON into an `InputError` that begins with `file`."""
    try:
        yield
    except _TooManyError as error:
        raise InputError.at(file, f"{error}") from error
    except UnicodeDecodeError as error:
        hint = " Save it as UTF-8, without a byte order mark." if error.start == 0 else ""
        raise InputError.at(file, f"is not UTF-8 (byte {error.start:,}).{hint}") from error
    except RecursionError as error:
        raise InputError.at(file, "is nested too deeply.") from error
    except ValueError as error:
        raise InputError.at(
            file,
            f"is not valid JSON: {printable(str(error))}. Correct it there, "
            "or fetch or save the file again.",
        ) from error


def _interned(_name: str, text: str, at: int) -> tuple[Any, int]:
    value, end = _DECODER.raw_decode(text, at)
    return sys.intern(value) if isinstance(value, str) else value, end


def _object(
    text: str, at: int, member: Callable[[str, str, int], tuple[Any, int]]
) -> tuple[dict[str, Any], int]:
    """The JSON object at `at`, and where it ends; `member` parses the value of each name."""
    found: dict[str, Any] = {}
    start = _BEGIN.match(text, at)
    if start is None:
        raise ValueError("it is not a JSON object")
    at, mark = start.end(), start[1] or ","
    while mark == ",":
        if not text.startswith('"', at):
            raise ValueError(f"a name in quotes was expected at character {at:,}")
        name, at = scanstring(text, at + 1)
        colon = _COLON.match(text, at)
        if colon is None:
            raise ValueError(f"a colon was expected at character {at:,}")
        value, at = member(name, text, colon.end())
        if name in found:
            raise ValueError(f"the key {name!r} occurs twice")
        found[sys.intern(name)] = value
        following = _NEXT.match(text, at)
        if following is None:
            raise ValueError(f"',' or '}}' was expected at character {at:,}")
        at, mark = following.end(), following[1]
    return found, at


def parse_prefix(text: bytes, at: int, limit: int) -> tuple[Any, int]:
    """The JSON value that begins at byte `at` and ends within `limit` bytes, and where it ends.

    Raises `ValueError` for what `parse_json` would refuse.
    """
    window = text[at : at + limit].decode("utf-8", "surrogateescape")  # may end within a character
    try:
        content, end = _DECODER.raw_decode(window)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    _check(content)  # a byte that is not UTF-8 is a lone surrogate now
    return content, at + len(window[:end].encode("utf-8", "surrogateescape"))


def parse_small(text: bytes) -> Any:
    """A small JSON value of ASCII characters without a minus sign: fast.

    Raises `ValueError` for anything else. Strings may have halves of surrogate pairs.
    """
    if b"-" in text:
        raise ValueError("a minus sign has no place there")
    try:
        content, end = _SMALL.raw_decode(text.decode("ascii"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if end != len(text):
        raise ValueError("something follows the value")
    return content


def _check(content: Any) -> None:
    """Raise `ValueError` for too many levels, or for strings that are no text."""
    level = [content]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value.values()
            elif isinstance(value, list):
                inner += value
        _check_strings(level)
        if not inner:
            return
        level = inner
    raise ValueError(f"it is nested too deeply; {MAX_DEPTH} levels are the limit here")


def _check_strings(values: list[Any]) -> None:
    for text in _strings(values):
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError:
                raise ValueError("a string has half of a surrogate pair") from None


def _strings(values: list[Any]) -> Iterator[str]:
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            yield from value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} occurs twice")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text} is too large")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"the constant {name} is not JSON")


def _whole(text: str) -> int:
    # What a double holds: nobody further on must think of larger ones.
    if len(text) > 300:
        raise ValueError(f"a number of {len(text):,} digits is too large")
    return int(text)


_SPACES = " \t\n\r"
_BEGIN = re.compile(rf"[{_SPACES}]*\{{[{_SPACES}]*(\}}?)")
_COLON = re.compile(rf"[{_SPACES}]*:[{_SPACES}]*")
_NEXT = re.compile(rf"[{_SPACES}]*([,}}])[{_SPACES}]*")
_SMALL = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite
)
_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique,
    parse_constant=_no_constant,
    parse_float=_finite,
    parse_int=_whole,
)


def read_json_object(file: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in an untrusted file; raises `InputError` if it is none."""
    return json_object(read_bytes(file, max_bytes), file, max_bytes)


def json_object(text: bytes, file: Path, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object that is the content of an untrusted file, which may have so many bytes."""
    check_pointer(file, text)
    # Text of real files has more bytes a value.
    content = parse_json(text, file, max_bytes // 20)
    if not isinstance(content, dict):
        raise InputError.at(file, "is not a JSON object.")
    return content


def json_pieces(content: Mapping[str, Any], *, sort_keys: bool = False) -> Iterator[bytes]:
    """JSON as this package writes it into output folders, some KB at a time.

    Indexes and reports of large models have megabytes, and several times that in Python's encoder. A
    byte of a path that is not UTF-8 is spelled out as text: JSON that has halves of surrogate pairs is
    refused by strict readers, ours too.
    """
    encoder = json.JSONEncoder(indent=2, ensure_ascii=False, allow_nan=False, sort_keys=sort_keys)
    tokens = encoder.iterencode(content)
    while text := "".join(itertools.islice(tokens, 4096)):
        try:
            yield text.encode()
        except UnicodeEncodeError:
            yield re.sub("[\ud800-\udfff]", lambda found: rf"\\u{ord(found[0]):04x}", text).encode()
    yield b"\n"
