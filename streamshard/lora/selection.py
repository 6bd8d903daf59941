"""Which modules an adapter's config selects, by PEFT's rules.

The tensors say what was trained. The config says what would have been trained in other layers, and
so whether an adapter of few layers is one for a shallow base or one that chose its layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from itertools import pairwise
from typing import Any

from streamshard.lora.module_patterns import full_match
from streamshard.values import frozen

__all__ = ["Selection", "read_selection", "with_number"]

# What is left of a pattern's digits once classes, counts and words are taken away.
_NO_NUMBERS = re.compile(r"\\[dDwWsSbB]|\{[\d,]*\}|[A-Za-z_]\w*")


@frozen(slots=False)
class Selection:
    """The fields of `LoraConfig` that choose modules; everything, unless they say otherwise.

    `targets` and `excluded` are ends of names, or one pattern for whole names. A config that has no
    targets selects nothing that is known.
    """

    targets: str | frozenset[str] | None = ".*"
    parameters: frozenset[str] = frozenset()
    excluded: str | frozenset[str] = frozenset()
    saved: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    layers_after: tuple[str, ...] = ()

    def takes(self, module: str) -> bool:
        """Whether PEFT adapts a module of this name (`check_target_module_exists`).

        A pattern that is not understood here takes every layer unless it has numbers in it.
        """
        if _ends(self.excluded, module) or any(f".{s}." in f".{module}." for s in self.saved):
            return False
        if self.targets is None:
            return False
        if isinstance(self.targets, str) or module in self.targets:
            return _ends(self.targets, module)
        return _ends(self.targets, module) and self._takes_layer(module)

    def leaves_out(self, module: str) -> str | None:
        """Which field keeps PEFT from loading pairs of this module, or None if none surely does.

        Names may be spelled otherwise in a config than in its tensors, up to a layer's number; what a
        pattern means that is not understood here is open.
        """
        if _matched(self.excluded, module):
            return "exclude_modules"
        if any(f".{s}." in f".{module}." for s in self.saved):
            return "modules_to_save"
        if not self.targets:
            # PEFT has targets of its own for a model of which nothing is said.
            return "target_modules" if self.parameters else None
        if isinstance(self.targets, str):
            return "target_modules" if _matched(self.targets, module) is False else None
        tail = _after_number(module)
        if module in self.targets or (tail and tail in self._tails):
            return None
        if not _matched(self.targets, module):
            return "target_modules"
        if not self.layers or not all(word.isidentifier() for word in self.layers_after):
            return None
        return None if {*self._numbers(module)} & {*self.layers} else "layers_to_transform"

    def takes_parameter(self, name: str) -> bool:
        """Whether PEFT adapts a parameter of this name, as one of `target_parameters`."""
        return _ends(self.parameters, name)

    @cached_property
    def _tails(self) -> set[tuple[str, ...] | None]:
        """What the targets are from a layer's number on: a config may list every module."""
        return set(map(_after_number, self.targets or ()))

    def _takes_layer(self, module: str) -> bool:
        if not self.layers:
            return True
        numbers = self._numbers(module)
        return bool(numbers) and {*numbers} <= {*self.layers}

    def _numbers(self, module: str) -> list[int]:
        """The number of a module's layer.

        Experts have numbers too; releases differ in whether the first one or the last one counts.
        """
        numbers = [
            int(word)
            for before, word in pairwise(module.split("."))
            if _is_number(word) and (not self.layers_after or before in self.layers_after)
        ]
        return [*numbers[:1], *numbers[1:][-1:]]


def _ends(wanted: str | frozenset[str], name: str) -> bool:
    """Whether a name is among the wanted ones, a pattern that is not understood being guessed at."""
    found = _matched(wanted, name)
    if found is not None or not isinstance(wanted, str):
        return bool(found)
    return not re.search(r"\d", _NO_NUMBERS.sub("", wanted))


def _matched(wanted: str | frozenset[str], name: str) -> bool | None:
    """Whether a name ends with one of the given ones, or matches the one pattern as a whole.

    None if the pattern is one that is not understood here.
    """
    if isinstance(wanted, str):
        return full_match(wanted, name)
    words = name.split(".")
    return any(".".join(words[at:]) in wanted for at in range(len(words)))


def _after_number(name: str) -> tuple[str, ...] | None:
    """A name from its first number between dots on; None if it has none before its last word."""
    words = name.split(".")
    at = next((at for at, word in enumerate(words[:-1]) if _is_number(word)), None)
    return None if at is None else tuple(words[at:])


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdecimal() and len(word) <= 6


def with_number(name: str, old: int, new: int) -> str:
    """A name whose first number between dots that is `old` is `new` instead.

    >>> with_number("model.layers.1.mlp.fc1", 1, 2)
    'model.layers.2.mlp.fc1'
    """
    words = name.split(".")
    for at, word in enumerate(words):
        if _is_number(word) and int(word) == old:
            return ".".join([*words[:at], str(new), *words[at + 1 :]])
    return name


def read_selection(config: Mapping[str, Any]) -> Selection:
    """What an `adapter_config.json` selects; of fields with values of other types, nothing."""
    targets, excluded = (_names_or_pattern(config.get(f"{w}_modules")) for w in _FIELDS)
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = ".*"
    return Selection(
        targets=targets,
        parameters=frozenset(_strings(config.get("target_parameters"))),
        excluded=excluded or frozenset(),
        saved=tuple(_strings(config.get("modules_to_save"))),
        layers=tuple(_integers(config.get("layers_to_transform"))),
        layers_after=tuple(_strings(config.get("layers_pattern"))),
    )


_FIELDS = ("target", "exclude")


def _names_or_pattern(value: object) -> str | frozenset[str] | None:
    if isinstance(value, str):
        return value
    return frozenset(_strings(value)) if isinstance(value, list) else None


def _strings(value: object) -> Iterator[str]:
    yield from (v for v in _listed(value) if isinstance(v, str))


def _integers(value: object) -> Iterator[int]:
    yield from (v for v in _listed(value) if type(v) is int)


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]
