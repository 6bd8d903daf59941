"""Names of LoRA-wrapped training checkpoints, as the names of a base and of a PEFT adapter.

InternVL's trainer saves a model whose `language_model` or `vision_model` (or both) went through
`peft.get_peft_model`: base weights and adapter in one mapping. Here the names are told apart;
nothing is done to a tensor. Names are those of peft 0.5 to 0.21 (`.base_layer.` since 0.7).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from streamshard.errors import AdapterError, InputError, listed, printable
from streamshard.tensor_names import PREFIX, peft_prefix, without_wrappers
from streamshard.values import frozen

__all__ = ["Pair", "Unwrapped", "unwrap"]


_LORA = re.compile(r"(.+?)\.(lora_\w+|trainable_tokens_delta)((?:\..+)?)")
_SAVED = re.compile(r"(.+?)\.modules_to_save\.([^.]+)\.(.+)")
_INNER = re.compile(r"\.(?:base_layer|original_module|token_adapter)(?=\.)")

_KINDS = {
    "lora_A": "a factor without .weight, as AdaLoRA has",
    "lora_B": "a factor without .weight, as AdaLoRA has",
    "lora_B.bias": "a bias of lora_B",
    "lora_E": "a factor without .weight, as AdaLoRA has",
    "lora_embedding_A": "LoRA on an embedding",
    "lora_embedding_B": "LoRA on an embedding",
    "lora_magnitude_vector": "a DoRA magnitude",
    "trainable_tokens_delta": "trained token rows",
}


@frozen
class Pair:
    """The names of lora_A and lora_B of one module, as given."""

    A: str
    B: str


@frozen
class Unwrapped:
    """A wrapped checkpoint as a base and an adapter; all values of mappings are names as given.

    With several adapters `pairs`, `tensors`, `others` and `saved` are those of the chosen one.
    """

    base: dict[str, str]
    """Every tensor of the model as it was before it was wrapped, by its plain name."""
    pairs: dict[str, Pair]
    """The pairs by the plain name of their module.

    A module that ends with `.base_layer` is a wrapper inside a wrapper: of two fused parameters.
    """
    tensors: dict[str, str]
    """Everything of the adapter, pairs too, by its key in a PEFT adapter file."""
    others: dict[str, str]
    """Given names of the adapter's tensors that are in no pair, to what kind of thing they are."""
    saved: dict[str, str]
    """Fully trained tensors (`modules_to_save`) by the plain name of what they replace."""
    depths: dict[str, int]
    """How often each part of the model was wrapped, by its name; "" is the whole model.

    More than once: a wrapped checkpoint was loaded and wrapped again. PEFT initialises an adapter
    of the same name anew then, so what it had learned before is not in the file.
    """


def unwrap(names: Iterable[str], adapter: str | None = None) -> Unwrapped:
    """Tell the names of a wrapped checkpoint apart; `adapter` selects one of several.

    Raises `InputError` if two names are the same tensor, or if a part of the model is wrapped in
    some names only; `AdapterError` for a lone lora_A or lora_B, and if there are several adapters
    of which none is selected.

    >>> found = unwrap([
    ...     "language_model.base_model.model.q_proj.base_layer.weight",
    ...     "language_model.base_model.model.q_proj.lora_A.default.weight",
    ...     "language_model.base_model.model.q_proj.lora_B.default.weight",
    ... ])
    >>> found.base
    {'language_model.q_proj.weight': 'language_model.base_model.model.q_proj.base_layer.weight'}
    >>> list(found.pairs), found.depths
    (['language_model.q_proj'], {'language_model': 1})
    """
    plain, depths = _without_prefixes(names)
    base: dict[str, str] = {}
    tensors: dict[str, dict[str, str]] = {}
    others: dict[str, dict[str, str]] = {}
    saved: dict[str, dict[str, str]] = {}
    for given, name in plain.items():
        if (match := _LORA.fullmatch(name)) is not None:
            module, word, rest = match.groups()
            label, end = _label(rest)
            if word == "lora_magnitude_vector":  # a module of its own since peft 0.12; not in files
                end = end.removesuffix(".weight")
            _put(tensors.setdefault(label, {}), f"{PREFIX}{module}.{word}{end}", given)
            if f"{word}{end}" not in ("lora_A.weight", "lora_B.weight"):
                kind = _KINDS.get(f"{word}{end}", "of an unknown kind of LoRA")
                others.setdefault(label, {})[given] = kind
        elif (match := _SAVED.fullmatch(name)) is not None:
            module, label, rest = match.groups()
            _put(tensors.setdefault(label, {}), f"{PREFIX}{module}.{rest}", given)
            others.setdefault(label, {})[given] = "a fully trained module"
            _put(saved.setdefault(label, {}), f"{module}.{rest}", given)
        else:
            _put(base, _INNER.sub("", name), given)
    chosen = _choose(sorted(tensors), adapter)
    return Unwrapped(
        base=base,
        pairs=_pairs(tensors.get(chosen, {})),
        tensors=tensors.get(chosen, {}),
        others=others.get(chosen, {}),
        saved=saved.get(chosen, {}),
        depths=depths,
    )


def _without_prefixes(names: Iterable[str]) -> tuple[dict[str, str], dict[str, int]]:
    """Given names to names without wrappers of training and of PEFT, and how many PEFT put where."""
    plain: dict[str, str] = {}
    depths: dict[str, int] = {}
    found: dict[str, dict[str, int]] = {}
    for given in names:
        name, own = without_wrappers(given), {}
        while (match := peft_prefix(name)) is not None:
            part = name[: match.start()].removesuffix(".")
            own[part] = len(match[0]) // len(PREFIX)
            name = name[: match.start()] + name[match.end() :]
        plain[given], found[given] = name, own
        for part, depth in own.items():
            depths.setdefault(part, depth)
    for given, name in plain.items():
        for part, depth in depths.items():
            inside = not part or name.startswith(f"{part}.")
            if inside and found[given].get(part, 0) != depth:
                like = next(g for g in plain if found[g].get(part) == depth)
                raise InputError(
                    f"'{printable(given)}' and '{printable(like)}' are not wrapped by PEFT equally "
                    "often. The checkpoint mixes files of several runs: keep those of one."
                )
    return plain, depths


def _label(rest: str) -> tuple[str, str]:
    """The adapter's name in what follows a `lora_` word, "" if there is none, and the end."""
    if rest in {"", ".weight", ".bias"}:
        return "", rest
    label, dot, end = rest[1:].partition(".")
    return label, dot + end


def _put(mapping: dict[str, str], key: str, given: str) -> None:
    if key in mapping:
        raise InputError(
            f"'{printable(mapping[key])}' and '{printable(given)}' are both '{printable(key)}'. "
            "The checkpoint mixes files of several versions of peft: keep those of one."
        )
    mapping[key] = given


def _choose(found: list[str], adapter: str | None) -> str:
    if adapter is None and len(found) > 1:
        raise AdapterError(
            f"the checkpoint holds several adapters, {listed(found)}, and nothing in it says which "
            "one is meant: choose one with --adapter-name."
        )
    if adapter is not None and adapter not in found:
        raise AdapterError(
            f"the checkpoint holds no adapter named '{printable(adapter)}', but "
            f"{listed(found) if found else 'none at all'}."
        )
    return adapter if adapter is not None else found[0] if found else ""


def _pairs(tensors: Mapping[str, str]) -> dict[str, Pair]:
    halves: dict[str, dict[str, str]] = {}
    for key, given in tensors.items():
        for side in "AB":
            if key.endswith(f".lora_{side}.weight"):
                module = key.removeprefix(PREFIX).removesuffix(f".lora_{side}.weight")
                halves.setdefault(module, {})[side] = given
    lone = [given for half in halves.values() if len(half) == 1 for given in half.values()]
    if lone:
        raise AdapterError(
            f"{listed(lone)}: the partner (lora_A or lora_B) is missing. The checkpoint is "
            "incomplete: save or copy it again."
        )
    return {module: Pair(half["A"], half["B"]) for module, half in halves.items()}
