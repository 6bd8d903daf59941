"""Which modules an adapter's config selects, by PEFT's rules.

The tensors say what was trained. The config says what would have been trained in other layers, and
so whether an adapter of few layers is one for a shallow base or one that chose its layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from streamshard.lora.module_patterns import full_match
from streamshard.values import frozen

__all__ = ["Selection", "read_selection", "with_number"]

# What is left of a pattern's digits once classes, counts and words are taken away.
_NO_NUMBERS = re.compile(r"\\[dDwWsSbB]|\{[\d,]*\}|[A-Za-z_]\w*")


@frozen
class Selection:
    """The fields of `LoraConfig` that choose modules; everything, unless they say otherwise.

    `targets` and `excluded` are ends of names, or one pattern for whole names. A config that has no
    targets selects nothing that is known.
    """

    targets: str | tuple[str, ...] | None = ".*"
    parameters: tuple[str, ...] = ()
    excluded: str | tuple[str, ...] = ()
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

    def takes_parameter(self, name: str) -> bool:
        """Whether PEFT adapts a parameter of this name, as one of `target_parameters`."""
        return _ends(self.parameters, name)

    def _takes_layer(self, module: str) -> bool:
        if not self.layers:
            return True
        words = module.split(".")
        numbers = [
            int(word)
            for before, word in pairwise(words)
            if _is_number(word) and (not self.layers_after or before in self.layers_after)
        ]
        # Experts have numbers too; releases differ in whether the first one or the last one counts.
        return bool(numbers) and {numbers[0], numbers[-1]} <= set(self.layers)


def _ends(wanted: str | tuple[str, ...], name: str) -> bool:
    """Whether a name ends with one of the given ones, or matches the one pattern as a whole."""
    if not isinstance(wanted, str):
        return any(name == end or name.endswith(f".{end}") for end in wanted)
    if wanted.lower() == "all-linear":
        return True
    found = full_match(wanted, name)
    return not re.search(r"\d", _NO_NUMBERS.sub("", wanted)) if found is None else found


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
    return Selection(
        targets=targets,
        parameters=tuple(_strings(config.get("target_parameters"))),
        excluded=excluded or (),
        saved=tuple(_strings(config.get("modules_to_save"))),
        layers=tuple(_integers(config.get("layers_to_transform"))),
        layers_after=tuple(_strings(config.get("layers_pattern"))),
    )


_FIELDS = ("target", "exclude")


def _names_or_pattern(value: object) -> str | tuple[str, ...] | None:
    if isinstance(value, str):
        return value
    return tuple(_strings(value)) if isinstance(value, list) else None


def _strings(value: object) -> Iterator[str]:
    yield from (v for v in _listed(value) if isinstance(v, str))


def _integers(value: object) -> Iterator[int]:
    yield from (v for v in _listed(value) if type(v) is int)


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]
