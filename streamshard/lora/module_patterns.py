"""PEFT's patterns of module names, matched in time that no pattern can blow up.

The keys of `rank_pattern` and `alpha_pattern` are regular expressions from an untrusted file, and
Python's matcher takes exponential time for some. What people write (names, alternatives,
groups, classes, repetition, ends) is matched here by sets of positions instead, each a bit of one
integer: any pattern costs at most its length times the length of the name, squared.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, cached_property, lru_cache
from typing import TypeAlias

from streamshard.values import frozen

__all__ = [
    "check_pattern",
    "first_match",
    "first_match_before_015",
    "full_match",
    "matches",
    "matches_before_015",
]


MAX_LENGTH = 2000
MAX_REPEAT = 1000
_MAX_GROUPS = 20  # nested

_ONE = re.compile(
    r"\\[dDwWsS]|\\[^\w]"  # a class of characters, or a character taken for itself
    r"|\[\^?\]?(?:\\[dDwWsS]|\\[^\w]|[^\]\\\[])*\]"
    r"|[^\\()\[\]{}*+?|^$]"
)
_COUNT = re.compile(r"\{(\d{1,4})?(,)?(\d{1,4})?\}")


@frozen
class _One:
    """One character of a kind."""

    kind: re.Pattern[str]


@frozen
class _End:
    """The beginning (`^`) or the end (`$`) of the name."""

    sign: str


@frozen
class _Any:
    """One of several sequences."""

    choices: tuple[tuple[_Node, ...], ...]


@frozen
class _Repeat:
    """The same from `least` to `most` times; without a limit if that is None."""

    node: _Node
    least: int
    most: int | None


@frozen
class _Look:
    """What must follow here, or must not, without being passed (`(?=...)`, `(?!...)`)."""

    node: _Any
    wanted: bool


_Node: TypeAlias = "_One | _End | _Any | _Repeat | _Look"


def check_pattern(pattern: str) -> None:
    """Raise `ValueError` if it is no regular expression, or one that is not matched here."""
    if len(pattern) > MAX_LENGTH:
        raise ValueError(f"has {len(pattern):,} characters; {MAX_LENGTH:,} is the limit here")
    try:
        re.compile(rf"(.*\.)?({pattern})$")
        re.compile(rf".*\.{pattern}$")
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"is no valid pattern: {error}") from error
    _parsed(pattern)


def matches(patterns: Iterable[str], module: str) -> Iterator[str]:
    r"""The patterns that fit a module: `(.*\.)?(pattern)$` (PEFT >= 0.15 `get_pattern_key`).

    >>> list(matches(["up", r"layers\.\d+\..*proj", "up_proj"], "model.layers.10.mlp.up_proj"))
    ['layers\\.\\d+\\..*proj', 'up_proj']
    """
    name = _Name(module)
    return (p for p in patterns if name.ends(_parsed(p), 1 | name.after_dots) & name.end)


def first_match(patterns: Iterable[str], module: str) -> str | None:
    """The first pattern that fits a module."""
    return next(matches(patterns, module), None)


def matches_before_015(patterns: Iterable[str], module: str) -> Iterator[str]:
    r"""The like as PEFT before 0.15 looked for it: `.*\.pattern$`, alternatives not in a group."""
    name = _Name(module)
    return (p for p in patterns if name.matched_before_015(_parsed(p)))


def first_match_before_015(patterns: Iterable[str], module: str) -> str | None:
    """The first pattern that fitted a module then."""
    return next(matches_before_015(patterns, module), None)


def full_match(pattern: str, name: str) -> bool | None:
    r"""Whether a pattern is one for the whole name, as `target_modules` may be; None if that is open.

    >>> full_match(r"^(?!vision)(?:.*\.)?[qv]_proj$", "model.layers.3.v_proj")
    True
    """
    whole = _whole(pattern)
    if whole is None:
        return None
    # Layers and experts differ in nothing but numbers, most of which are the same to a pattern.
    return _fits(pattern, name.translate(whole[1]))


@lru_cache(maxsize=64)
def _whole(pattern: str) -> tuple[_Any, Mapping[int, str]] | None:
    """A pattern for whole names, and for each digit the first that it does not tell from this one.

    None if it is not understood.
    """
    if len(pattern) > MAX_LENGTH:
        return None
    try:
        re.compile(pattern)
        node = _parsed(pattern, looks=True)
    except (ValueError, re.error, RecursionError, OverflowError):
        return None
    kinds, first = [*_kinds(node)], dict[tuple[bool, ...], str]()
    fits = {digit: tuple(bool(kind.fullmatch(digit)) for kind in kinds) for digit in "0123456789"}
    return node, {ord(digit): first.setdefault(fits[digit], digit) for digit in fits}


@lru_cache(maxsize=4096)
def _fits(pattern: str, name: str) -> bool:
    whole = _whole(pattern)
    return whole is not None and bool(_Name(name).ends(whole[0], 1) & 1 << len(name))


def _kinds(node: _Node) -> Iterator[re.Pattern[str]]:
    """The kinds of characters that a pattern has."""
    if isinstance(node, _One):
        yield node.kind
    elif isinstance(node, _Any):
        for choice in node.choices:
            for inner in choice:
                yield from _kinds(inner)
    elif not isinstance(node, _End):
        yield from _kinds(node.node)


class _Name:
    """A module's name, and sets of positions in it as bits of integers."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._found: dict[re.Pattern[str], int] = {}
        self.end = 1 << len(text)
        if text.endswith("\n"):
            self.end |= self.end >> 1

    @cached_property
    def after_dots(self) -> int:
        """Behind each dot that .* reaches; most configs have no pattern that asks."""
        line = self._text.partition("\n")[0]
        return sum(1 << at + 1 for at, sign in enumerate(line) if sign == ".")

    def ends(self, node: _Node, starts: int) -> int:
        """Where a match of `node` may end that began at one of `starts`."""
        if isinstance(node, _One):
            return (starts & self._places(node.kind)) << 1
        if isinstance(node, _End):
            return starts & (1 if node.sign == "^" else self.end)
        if isinstance(node, _Any):
            found = 0
            for choice in node.choices:
                found |= self._ends_of_all(choice, starts)
            return found
        if isinstance(node, _Look):
            places = (1 << at for at in range(starts.bit_length()) if starts >> at & 1)
            return sum(at for at in places if bool(self.ends(node.node, at)) == node.wanted)
        return self._ends_of_repeats(node, starts)

    def matched_before_015(self, pattern: _Any) -> bool:
        last = len(pattern.choices) - 1
        for number, choice in enumerate(pattern.choices):
            ends = self._ends_of_all(choice, self.after_dots if number == 0 else 1)
            if ends & (self.end if number == last else -1):
                return True
        return False

    def _ends_of_repeats(self, node: _Repeat, starts: int) -> int:
        ends = starts if node.least == 0 else 0
        most = node.least + len(self._text) + 1 if node.most is None else node.most
        for count in range(1, most + 1):
            after = self.ends(node.node, starts)
            if count < node.least and after == starts:
                return after  # it stays so
            if count >= node.least:
                after &= ~ends  # only what is new can lead further
                ends |= after
            if not after:
                break
            starts = after
        return ends

    def _ends_of_all(self, nodes: Iterable[_Node], starts: int) -> int:
        for node in nodes:
            if not starts:
                break
            starts = self.ends(node, starts)
        return starts

    def _places(self, kind: re.Pattern[str]) -> int:
        places = self._found.get(kind)
        if places is None:
            fits = {sign for sign in set(self._text) if kind.fullmatch(sign)}
            places = sum(1 << at for at, sign in enumerate(self._text) if sign in fits)
            self._found[kind] = places
        return places


@cache
def _one(text: str) -> _One:
    return _One(re.compile(text))


@lru_cache(maxsize=4096)
def _parsed(pattern: str, *, looks: bool = False) -> _Any:
    node, at = _alternatives(pattern, 0, 0, looks)
    if at != len(pattern):
        raise ValueError(f"has {pattern[at]!r} at {at}, which is not matched here")
    return node


def _alternatives(pattern: str, at: int, depth: int, looks: bool) -> tuple[_Any, int]:
    if depth > _MAX_GROUPS:
        raise ValueError("has groups nested too deeply")
    choices: list[tuple[_Node, ...]] = []
    nodes: list[_Node] = []
    while at < len(pattern) and pattern[at] != ")":
        if pattern[at] == "|":
            choices.append(tuple(nodes))
            nodes, at = [], at + 1
            continue
        node, at = _atom(pattern, at, depth, looks)
        node, at = _repeated(pattern, at, node)
        nodes.append(node)
    return _Any((*choices, tuple(nodes))), at


def _atom(pattern: str, at: int, depth: int, looks: bool) -> tuple[_Node, int]:
    sign = pattern[at]
    if sign in "^$":
        return _End(sign), at + 1
    if sign == "(":
        look = looks and pattern.startswith(("(?=", "(?!"), at)
        start = at + 3 if look or pattern.startswith("(?:", at) else at + 1
        # Within what is looked for ahead there is no further look: it would cost its square.
        node, end = _alternatives(pattern, start, depth + 1, looks and not look)
        # There is a ")", or re.compile had refused.
        return (_Look(node, pattern[at + 2] == "=") if look else node), end + 1
    one = _ONE.match(pattern, at)
    if one is None:
        raise ValueError(f"has {pattern[at : at + 3]!r} at {at}, which is not matched here")
    return _one(one[0]), one.end()


def _repeated(pattern: str, at: int, node: _Node) -> tuple[_Node, int]:
    sign = pattern[at : at + 1]
    least: int
    most: int | None
    if sign and sign in "*+?":
        least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[sign]
        at += 1
    elif sign == "{":
        count = _COUNT.match(pattern, at)
        if count is None or (count[1] is None and count[3] is None):
            raise ValueError(f"has a brace at {at}, which is not matched here")
        least = int(count[1] or 0)
        most = least if count[2] is None else int(count[3]) if count[3] else None
        if max(least, most or 0) > MAX_REPEAT:
            raise ValueError(f"repeats something more than {MAX_REPEAT:,} times")
        at = count.end()
    else:
        return node, at
    if pattern.startswith("?", at):  # a lazy match finds the same
        at += 1
    if (most is None or most > 1) and _repeats(node):
        raise ValueError("repeats what itself repeats something")
    return _Repeat(node, least, most), at


def _repeats(node: _Node) -> bool:
    if isinstance(node, _Any):
        return any(_repeats(inner) for choice in node.choices for inner in choice)
    if isinstance(node, _Look):
        return _repeats(node.node)
    return isinstance(node, _Repeat) and (node.most is None or node.most > 1 or _repeats(node.node))
