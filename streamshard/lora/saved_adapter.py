"""Keys and config of a PEFT adapter folder that this package writes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from streamshard.tensor_names import PREFIX

__all__ = ["adapter_config", "adapter_key", "selection"]


_V = TypeVar("_V", int, float)


def adapter_key(module: str, factor: str) -> str:
    """The key of "lora_A" or "lora_B" of a module in an adapter file."""
    return f"{PREFIX}{module}.{factor}.weight"


def adapter_config(
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    *,
    targets: Sequence[str],
    task_type: str | None,
    base: str | None,
    dropout: float,
    saved: Sequence[str] = (),
) -> dict[str, Any]:
    """The `adapter_config.json` of plain LoRA, given rank and alpha of every module.

    Only fields that peft 0.10, which InternVL's trainer is used with, already had. `saved` are
    modules that were trained as a whole.
    """
    r, rank_pattern = _pattern(ranks)
    lora_alpha, alpha_pattern = _pattern(alphas)
    return {
        "alpha_pattern": alpha_pattern,
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": lora_alpha,
        "lora_dropout": dropout,
        "modules_to_save": list(saved) or None,
        "peft_type": "LORA",
        "r": r,
        "rank_pattern": rank_pattern,
        "revision": None,
        "target_modules": list(targets),
        "task_type": task_type,
        "use_dora": False,
        "use_rslora": False,
    }


def selection(chosen: Collection[str], modules: Iterable[str]) -> list[str]:
    """Ends of names that select the `chosen` of all `modules`, as PEFT does, and no other one.

    >>> selection(["a.0.attn.qkv", "a.1.attn.qkv"], ["a.0.attn.qkv", "a.1.attn.qkv", "a.0.mlp.fc1"])
    ['attn.qkv']
    >>> selection(["a.0.attn.qkv"], ["a.0.attn.qkv", "a.1.attn.qkv"])
    ['a.0.attn.qkv']
    """
    ends = {_end(module) for module in chosen}
    selected = {m for m in modules if _end(m) in ends or m.rpartition(".")[2] in ends}
    return list(dict.fromkeys(map(_end, chosen))) if selected == {*chosen} else list(chosen)


def _end(module: str) -> str:
    """The last two words of a name, or the last one of `experts.0.up_proj`."""
    words = module.split(".")[-2:]
    return words[-1] if words[0].isdecimal() else ".".join(words)


def _pattern(values: Mapping[str, _V]) -> tuple[_V, dict[str, _V]]:
    """The most common value, and patterns for modules that have another one.

    A pattern is the end of a name, which every release of PEFT finds: those before 0.15 want
    something to be before it.
    """
    common = Counter(values.values()).most_common(1)[0][0]
    different = {module: value for module, value in values.items() if value != common}
    short = {_end(module): value for module, value in different.items()}
    found = re.compile("|".join(rf"(?P<_{i}>.+\.{end})" for i, end in enumerate(short)))
    told = list(short.values())
    for module, value in values.items():
        match = found.fullmatch(module) if short else None
        if value != (told[int(match.lastgroup[1:])] if match and match.lastgroup else common):
            return common, {m.partition(".")[2]: value for m, value in different.items()}
    return common, short
