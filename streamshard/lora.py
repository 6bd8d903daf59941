"""Folding LoRA pairs into weights: which pair goes where, and the mapping that results.

`merge` is a function from a base mapping and adapters to a mapping. It reads the adapters'
values (to refuse what is not finite) but no weight of the base. Formula: `W + s * B @ A`
(arXiv:2106.09685), `s` from `peft_config`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np

from streamshard.arithmetic import FLOATS
from streamshard.errors import AdapterError, InputError, listed, nearest, printable
from streamshard.peft_config import LoraSettings
from streamshard.spelling import flat_parts
from streamshard.tensors import Lazy, Workspace, concat, read_float32
from streamshard.updates import LowRank, add_low_rank

__all__ = ["Adapter", "Carry", "Merged", "Place", "check_base", "merge"]


@dataclass(frozen=True, slots=True)
class Adapter:
    """One adapter: what messages call it, its settings, its tensors, and a factor on its scale."""

    where: str
    settings: LoraSettings
    tensors: Mapping[str, Lazy]
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Merged:
    """The new mapping, the names of the tensors that change, and what is worth knowing."""

    tensors: dict[str, Lazy]
    changed: tuple[str, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where rows of an update go: `rows` from `source_start` on, to `target` from `start` on.

    `whole` says that they must be all rows of the target.
    """

    target: str
    start: int
    source_start: int
    rows: int
    whole: bool


# Finds the places of a weight of another layout, given its name and its rows; none if unknown.
Carry: TypeAlias = Callable[[str, int], Sequence[Place]]


@dataclass(frozen=True, slots=True)
class _Pair:
    """lora_A and lora_B of one module, as named in the file."""

    A: str
    B: str


_PAIR_KEY = re.compile(r"(.+)\.lora_([AB])(?:\.([^.]+))?\.weight")
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_PREFIX = re.compile(r"(?:module\.|base_model\.model\.)*")
_QUANTIZED = re.compile(
    r".*\.(?:qweight|qzeros|scales|g_idx|SCB|absmax|quant_state\..+|weight_scale(?:_inv)?|"
    r"weight_packed|weight_format|(?:.+_)?(?:blocks|scales))"
)

# What a key that is no LoRA pair says about the kind of adapter.
_OTHER_KINDS = (
    (r"\.lora_magnitude_vector", "a DoRA magnitude"),
    (r"\.lora_embedding_[AB]", "LoRA on an embedding"),
    (r"\.lora_B\.bias|\.lora_B\.[^.]+\.bias", "a bias of lora_B"),
    (r"\.lora_(?:A|B|E)(?:\.[^.]+)?$", "a factor without .weight, as AdaLoRA has"),
    (r"trainable_tokens", "trained token rows"),
    (r"\.base_layer\.", "a saved base layer"),
    (r"\.modules_to_save\.", "a fully trained module"),
    (r"lora_(?:up|down)|\.alpha$|lora_unet|lora_te", "a kohya-style factor"),
    (r"\.lora_[ab]\.", "a torchtune factor"),
    (r"hada_|lokr_|oft_|vera_|ia3_|ln_tuning|\.hra_|\.bone_|\.miss_", "not LoRA"),
    (r"\.(?:weight|bias)$", "a fully trained tensor (modules_to_save or bias)"),
)


def check_base(base: Mapping[str, Lazy], config: Mapping[str, Any] | None) -> None:
    """Raise `InputError` if a checkpoint is quantized or already wrapped by LoRA."""
    if config is not None and config.get("quantization_config"):
        raise InputError(
            "config.json of the base has a quantization_config. An update cannot be added to "
            "quantized weights without a further loss: use the unquantized checkpoint."
        )
    quantized = [name for name in base if _QUANTIZED.fullmatch(name)]
    if quantized:
        raise InputError(
            f"the base is quantized: it has {listed(quantized, 3)}. An update cannot be added to "
            "quantized weights without a further loss: use the unquantized checkpoint."
        )
    wrapped = [name for name in base if ".lora_A." in name or ".lora_B." in name]
    if wrapped:
        raise InputError(
            f"the base is a LoRA-wrapped training checkpoint: it has {listed(wrapped, 3)}. "
            "Use the checkpoint that the training started from."
        )


def merge(
    base: Mapping[str, Lazy],
    adapters: Sequence[Adapter],
    work: Workspace,
    carry: Carry | None = None,
) -> Merged:
    """Add every pair of every adapter to the weight it was trained on.

    Each tensor of an adapter is used exactly once. `carry` knows the names of another layout, for
    adapters that were trained there. Raises `AdapterError` for what has no home, does not fit, is
    not finite, or changes nothing.
    """
    updates: dict[str, list[tuple[int, LowRank]]] = {}
    warnings: list[str] = []
    for adapter in adapters:
        pairs = _pairs(adapter)
        homes = _homes(base, adapter, pairs, carry)
        fitting = {m: _update(base, adapter, m, pair, homes[m]) for m, pair in pairs.items()}
        idle = []
        for module, update in fitting.items():
            # Both factors are read in any case: a zero must not hide a NaN.
            peaks = [_largest(adapter, key, work) for key in (pairs[module].A, pairs[module].B)]
            if not update.scale or not all(peaks):
                idle.append(module)
                continue
            for place in homes[module]:
                rows = update.take(place.source_start, place.source_start + place.rows)
                updates.setdefault(place.target, []).append((place.start, rows))
        if len(idle) == len(pairs):
            raise AdapterError(
                f"{adapter.where}: every update is exactly zero (lora_B is zero, or the weight is "
                "0): the adapter was not trained, or was saved by a trainer that lost its values."
            )
        if idle:
            warnings.append(
                f"{adapter.where}: {len(idle)} of {len(pairs)} updates are exactly zero and leave "
                f"their weights as they are: {listed(idle, 3)}"
            )
    tensors = dict(base)
    for name, terms in updates.items():
        tensors[name] = _add(base[name], terms)
    changed = tuple(name for name in base if name in updates)
    return Merged(tensors, changed, tuple(warnings))


def _add(tensor: Lazy, terms: Sequence[tuple[int, LowRank]]) -> Lazy:
    """Add updates of some rows each; rows without one keep their bytes."""
    ends = {at for start, term in terms for at in (start, start + term.stop - term.start)}
    parts = []
    for low, high in pairwise(sorted({0, tensor.shape[0], *ends})):
        own = [
            term.take(low - start, high - start)
            for start, term in terms
            if start <= low and high <= start + term.stop - term.start
        ]
        part = tensor.take(low, high)
        parts.append(add_low_rank(part, own) if own else part)
    return concat(parts)


def _pairs(adapter: Adapter) -> dict[str, _Pair]:
    """Module name (as the adapter has it, wrappers and prefix removed) to its pair."""
    halves: dict[str, dict[str, str]] = {}
    prefixes: dict[str, str] = {}
    names: set[str] = set()
    for key in adapter.tensors:
        match = _PAIR_KEY.fullmatch(key)
        if match is None:
            raise _unknown_key(adapter, key)
        module, side, name = match[1], match[2], match[3]
        names.add(name or "")
        plain = _WRAPPERS.sub("", module)
        prefix = _PREFIX.match(plain)
        prefixes.setdefault(prefix[0] if prefix else "", key)
        plain = plain[prefix.end() :] if prefix else plain
        half = halves.setdefault(plain, {})
        if side in half:
            raise AdapterError(
                f"{adapter.where}: '{printable(half[side])}' and '{printable(key)}' are the same "
                f"factor of '{printable(plain)}'. Remove one."
            )
        half[side] = key
    if len(names) > 1:
        found = sorted(name for name in names if name)
        raise AdapterError(
            f"{adapter.where}: holds several adapters ({listed(found)}) or keys with and without "
            "an adapter name. Save one adapter alone."
        )
    if len(prefixes) > 1:
        raise AdapterError(
            f"{adapter.where}: keys begin in different ways, for example "
            f"{listed(prefixes.values())}. One prefix for all is expected: the file mixes "
            "several models."
        )
    lone = [key for half in halves.values() if len(half) == 1 for key in half.values()]
    if lone:
        raise AdapterError(
            f"{adapter.where}: {listed(lone)}: the partner (lora_A or lora_B) is missing. "
            "The file is incomplete: save or copy the adapter again."
        )
    return {module: _Pair(half["A"], half["B"]) for module, half in halves.items()}


def _unknown_key(adapter: Adapter, key: str) -> AdapterError:
    kind = next((kind for pattern, kind in _OTHER_KINDS if re.search(pattern, key)), "not LoRA")
    return AdapterError(
        f"{adapter.where}: tensor '{printable(key)}' is {kind}, which cannot be merged. Only pairs "
        "lora_A.weight, lora_B.weight on linear weights can. Nothing is left out silently. (PEFT adds "
        "the whole layer to the file where lm_head or an embedding is a target: "
        "save_pretrained(..., save_embedding_layers=False) leaves it out.)"
    )


def _flat(module: str) -> str:
    """The weight of a module in the flat spelling of transformers' InternVL classes."""
    return flat_parts(f"{module}.weight")[0]


_REWRITES: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("as named", lambda module: module),
    ("without leading 'model.'", lambda module: re.sub(r"^model\.", "", module)),
    ("with leading 'model.'", lambda module: f"model.{module}"),
    ("without leading 'language_model.'", lambda module: re.sub(r"^language_model\.", "", module)),
    ("with leading 'language_model.'", lambda module: f"language_model.{module}"),
)


def _homes(
    base: Mapping[str, Lazy], adapter: Adapter, pairs: Mapping[str, _Pair], carry: Carry | None
) -> dict[str, Sequence[Place]]:
    """Where the update of every module goes, by one rewrite of names for the whole adapter."""
    weights = {name.removesuffix(".weight"): name for name in base if name.endswith(".weight")}
    flat = {_flat(module): name for module, name in weights.items()}
    found: dict[str, dict[str, str]] = {}
    best: tuple[int, str, list[str]] = (-1, "", [])
    candidates = [(how, weights, rewrite) for how, rewrite in _REWRITES]
    candidates.append(("by the spellings of transformers' InternVL", flat, _flat))
    for how, known, rewrite in candidates:
        homes = {m: known[rewrite(m)] for m in pairs if rewrite(m) in known}
        if len(homes) == len(pairs):
            if len(set(homes.values())) == len(pairs):
                found.setdefault(how, homes)
        elif len(homes) > best[0]:
            best = (len(homes), how, [m for m in pairs if m not in homes])
    different = list({tuple(sorted(homes.items())): how for how, homes in found.items()}.values())
    if len(different) > 1:
        raise AdapterError(
            f"{adapter.where}: its module names fit this base in more than one way "
            f"({', '.join(different)}). Rename the keys as the base has them."
        )
    if found:
        homes = next(iter(found.values()))
        rows = {m: adapter.tensors[pair.B].rows for m, pair in pairs.items()}
        return {m: [Place(name, 0, 0, rows[m], whole=True)] for m, name in homes.items()}
    if carry is not None:
        carried = {
            m: carry(f"{m}.weight", adapter.tensors[pair.B].rows) for m, pair in pairs.items()
        }
        homeless = [m for m, places in carried.items() if not places]
        if not homeless:
            _check_overlaps(adapter, carried)
            return carried
        if len(pairs) - len(homeless) > best[0]:
            best = (len(pairs) - len(homeless), "by the names of the other layout", homeless)
    raise _no_home(weights, adapter, pairs, best)


def _check_overlaps(adapter: Adapter, homes: Mapping[str, Sequence[Place]]) -> None:
    """Refuse two modules that go to the same rows of one tensor: one module, named twice."""
    spans = sorted(
        (place.target, place.start, place.start + place.rows, module)
        for module, places in homes.items()
        for place in places
    )
    for (target, _, stop, one), (other_target, start, _, other) in pairwise(spans):
        if target == other_target and start < stop:
            raise AdapterError(
                f"{adapter.where}: '{printable(one)}' and '{printable(other)}' are both for the same "
                f"rows of '{printable(target)}'. The file mixes spellings: keep one of each."
            )


def _no_home(
    weights: Mapping[str, str],
    adapter: Adapter,
    pairs: Mapping[str, _Pair],
    best: tuple[int, str, list[str]],
) -> AdapterError:
    matched, how, homeless = best
    lines = [
        f"{adapter.where}: {len(homeless)} of {len(pairs)} modules are not in the base "
        f"({matched} are, {how}):"
    ]
    for module in homeless[:3]:
        near = nearest(module, weights.keys())
        lines.append(
            f"  '{printable(pairs[module].A)}': nearest in the base: "
            + (listed(near) if near else "nothing like it")
        )
    lines.append("Is this the base that the adapter was trained on, in the same layout?")
    return AdapterError("\n".join(lines))


def _update(
    base: Mapping[str, Lazy],
    adapter: Adapter,
    module: str,
    pair: _Pair,
    places: Sequence[Place],
) -> LowRank:
    """The update of one module, every shape and dtype checked."""
    A, B = adapter.tensors[pair.A], adapter.tensors[pair.B]
    where = f"{adapter.where}: '{printable(pair.A)}'"
    for key, factor in ((pair.A, A), (pair.B, B)):
        if factor.dtype not in FLOATS:
            raise AdapterError(
                f"{adapter.where}: '{printable(key)}' is {factor.dtype}; "
                f"one of {', '.join(FLOATS)} was expected. Save the adapter as float32."
            )
        if len(factor.shape) != 2 or not factor.nbytes:
            raise AdapterError(
                f"{adapter.where}: '{printable(key)}' has shape {list(factor.shape)}; a matrix was "
                "expected. The adapter may have been saved from a partitioned (ZeRO-3, FSDP) "
                "model, or be for a convolution, which is not supported."
            )
    rank = adapter.settings.rank(module)
    if not A.shape[0] == B.shape[1] == rank:
        raise AdapterError(
            f"{where} has rank {A.shape[0]} and its lora_B {B.shape[1]}, but adapter_config.json "
            f"says {rank}. Config and tensors are not of one adapter."
        )
    for place in places:
        W = base[place.target]
        if W.dtype not in FLOATS:
            raise InputError(
                f"base tensor '{printable(place.target)}' is {W.dtype}; an update can only be added "
                f"to {', '.join(FLOATS)}. Use the unquantized checkpoint."
            )
        end = place.start + place.rows
        fits = end == W.rows if place.whole else end <= W.rows
        if len(W.shape) != 2 or W.columns != A.columns or not fits:
            raise AdapterError(
                f"{where} and its lora_B make an update of shape {[B.rows, A.columns]}, but base "
                f"tensor '{printable(place.target)}' is {list(W.shape)}. The adapter belongs to "
                "another model."
            )
    scale = adapter.settings.scaling(module) * adapter.weight
    return LowRank(A, B, scale, 0, B.shape[0])


def _largest(adapter: Adapter, key: str, work: Workspace) -> float:
    """The largest magnitude in a factor; raises `AdapterError` for NaN and infinities."""
    tensor = adapter.tensors[key]
    step = max(1_000_000 // tensor.columns, 1)
    largest = 0.0
    for start in range(0, tensor.rows, step):
        block = np.abs(read_float32(tensor, start, min(start + step, tensor.rows), work))
        peak = float(block.max())
        if not np.isfinite(peak):
            row = start + int(np.argmin(np.isfinite(block).all(axis=1)))
            raise AdapterError(
                f"{adapter.where}: '{printable(key)}' has a NaN or infinite value in row {row:,}. "
                "The training diverged or the file is damaged: use an earlier checkpoint."
            )
        largest = max(largest, peak)
    return largest
