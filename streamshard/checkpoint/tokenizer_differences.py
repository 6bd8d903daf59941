"""By which tokens two tokenizers differ, whatever files they are in."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import chain

from streamshard.checkpoint.tokenizer import VOCABULARIES, Tokenizer, text_of

__all__ = ["differences", "is_comparable"]


def differences(one: Tokenizer, other: Tokenizer) -> dict[int, tuple[str | None, str | None]]:
    """The tokens by whose meaning two tokenizers differ, by id: what each of them has there.

    None is no token. Where one of them has no vocabulary that can be read, only tokens that either of
    them lists beside its vocabulary are compared. What a processor replaces does not count.
    """
    # Read where they are needed, which is not where two have the same files.
    mine, theirs = cache(lambda: _table(one)), cache(lambda: _table(other))
    size = 0
    if not _same_vocabulary(one, other) and None not in (one.vocabulary, other.vocabulary):
        size = max(len(mine()), len(theirs()))
    listed = (number for number in sorted({*one.added, *other.added}) if number >= size)
    ignored = {None, *one.placeholders, *other.placeholders}
    found = {}
    for number in chain(range(size), listed):
        pair = _at(one, mine, number), _at(other, theirs, number)
        if pair[0] != pair[1] and not ignored.issuperset(pair):
            found[number] = pair
    return found


def is_comparable(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether the vocabularies of two tokenizers, if they have some, can be compared."""
    if not (one.is_whole and other.is_whole) or _same_bytes(one, other):
        return True
    return None not in (one.vocabulary, other.vocabulary)


def _same_vocabulary(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers have the same tokens with the same ids, added ones aside."""
    return _same_bytes(one, other) or one.vocabulary == other.vocabulary


def _same_bytes(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two vocabularies are the same without a look at any token."""
    if one.print is not None and one.print == other.print:
        return True
    for name in one.files:
        if VOCABULARIES.fullmatch(name) and name in other.files:
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
    return text_of(tokens[number]) if number < len(tokens) and tokens[number] else None
