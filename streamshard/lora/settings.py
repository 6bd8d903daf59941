"""What `adapter_config.json` says, and which of it can be merged exactly.

The fields are those of PEFT's `LoraConfig` (peft 0.21). Only fields that are known, and known
not to change the merged weight, are let through: a field that a later PEFT adds is refused
until its meaning is known.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from streamshard.errors import AdapterError, listed, printable
from streamshard.lora.module_patterns import check_pattern, matches
from streamshard.lora.pattern_eras import Version, pattern_keys
from streamshard.lora.selection import Selection, read_selection
from streamshard.values import frozen

__all__ = ["LoraSettings", "read_settings"]


# Not part of the mathematics of a merge: training, provenance, or a choice of modules that the
# tensors of the file answer.
_INERT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "monteclora_config",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_qalora",  # acts on GPTQ layers only, whose factors have another shape
        "velora_config",
    }
)
_USED = frozenset(
    {
        "alpha_pattern",
        "bias",
        "ensure_weight_tying",
        "fan_in_fan_out",
        "init_lora_weights",
        "lora_alpha",
        "lora_bias",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "r",
        "rank_pattern",
        "target_parameters",
        "trainable_token_indices",
        "use_dora",
        "use_rslora",
    }
)
# The fields of `TrainableTokensConfig` beside those that are inert anyway.
_USED_BY_TOKENS = frozenset({"init_weights", "peft_type", "peft_version", "token_indices"})
# Initialisations that leave the base weights as they were.
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
# Initialisations that left a residual base behind.
_RESIDUAL_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")

_REASONS = {
    "alora_invocation_tokens": "an activated LoRA applies only after certain tokens",
    "arrow_config": "a router chooses among adapters at run time",
    "kasa_config": "it truncates the base weight and needs a third factor",
    "layer_replication": "the merged model has another number of layers",
    "megatron_config": "tensor-parallel layers may be stored in parts",
    "use_bdlora": "its factors are block-diagonal and stored packed",
}
_BIASES = ("none", "all", "lora_only")


@frozen
class LoraSettings:
    """What a merge needs of one adapter's config; the fields are those of PEFT's `LoraConfig`."""

    r: int
    lora_alpha: float
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_dora: bool = False
    fan_in_fan_out: bool = False
    bias: str = "none"
    lora_bias: bool = False
    modules_to_save: tuple[str, ...] = ()
    token_indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Module (or "" for the input embedding) to the tokens whose rows were trained."""
    target_parameters: tuple[str, ...] = ()
    ensure_weight_tying: bool = False
    selection: Selection = field(default_factory=Selection)
    """Which modules the config has adapted, so that others may lack updates."""
    base_class: str | None = None
    """The class of the model that was trained, where the config says it (`auto_mapping`)."""
    version: Version | None = None
    """`peft_version`, which configs have since 0.18, or what the ranks in the file told."""
    told_ranks: Mapping[str, int] = field(default_factory=dict)
    """Ranks of modules that several patterns fit, as the file has them."""

    def rank(self, module: str) -> int:
        """The rank that the config gives to `module` (its name in the base model)."""
        told = self.told_ranks.get(module)
        if told is not None:
            return told
        key = self._keys(module)[0]
        return self.rank_pattern.get(key, self.r)

    def alpha(self, module: str) -> float:
        """`lora_alpha` of `module`.

        Raises `AdapterError` where several patterns fit it with different values.
        """
        key = self._keys(module)[1]
        self._check_order(module)
        return self.alpha_pattern.get(key, self.lora_alpha)

    def scaling(self, module: str) -> float:
        """`lora_alpha / r`, or `lora_alpha / sqrt(r)` with rsLoRA (arXiv:2312.03732)."""
        rank = self.rank(module)
        return self.alpha(module) / (math.sqrt(rank) if self.use_rslora else rank)

    def _keys(self, module: str) -> tuple[str, str]:
        """The entries of both patterns for `module`; most configs have none."""
        if not (self.rank_pattern or self.alpha_pattern):
            return module, module
        return pattern_keys(self.rank_pattern, self.alpha_pattern, self.version, module)

    def _check_order(self, module: str) -> None:
        if not self.alpha_pattern:
            return
        # PEFT trains by the first pattern that fits, and then saves them in alphabetical order.
        fitting = {p: self.alpha_pattern[p] for p in matches(self.alpha_pattern, module)}
        if len(set(fitting.values())) > 1 and list(self.alpha_pattern) == sorted(
            self.alpha_pattern
        ):
            raise AdapterError(
                f"module '{printable(module)}': of alpha_pattern {listed(fitting)} fit it with different "
                "values. Which one came first in the training is not known: PEFT saves patterns in "
                "alphabetical order. Leave only the right one in adapter_config.json."
            )


def read_settings(
    config: Mapping[str, Any], where: str, *, base_is_residual: bool = False
) -> LoraSettings:
    """Check every field of an `adapter_config.json` and return what a merge needs.

    `base_is_residual` states that the base is the one that an initialisation such as PiSSA left
    behind. Raises `AdapterError` naming the field for everything that cannot be merged exactly.
    """
    kind = config.get("peft_type")
    if kind not in ("LORA", "TRAINABLE_TOKENS"):
        raise AdapterError(
            f"{where}: peft_type is {printable(repr(kind))}; only LORA and TRAINABLE_TOKENS adapters "
            "can be merged. Merge it with the tool that trained it."
        )
    used = _USED if kind == "LORA" else _USED_BY_TOKENS
    for name, value in config.items():
        if name not in used | _INERT and value:
            reason = _REASONS.get(name, "it is not known whether it changes the merged weight")
            raise AdapterError(
                f"{where}: '{printable(name)}' is {printable(repr(value), 60)}; {reason}. "
                "Merging without it would give wrong weights, so nothing is written. "
                "Merge this adapter with PEFT."
            )
    version = _version(config.get("peft_version"), where)
    if kind == "TRAINABLE_TOKENS":
        indices = _token_indices(config.get("token_indices"), f"{where}: token_indices", kind)
        return LoraSettings(r=0, lora_alpha=0, token_indices=indices, version=version)
    _check_init(config.get("init_lora_weights", True), where, base_is_residual=base_is_residual)
    bias = config.get("bias") or "none"
    if bias not in _BIASES:
        raise AdapterError(
            f"{where}: bias is {printable(repr(bias), 60)}; one of {', '.join(_BIASES)} was expected."
        )
    flags = {
        name: _flag(config.get(name), f"{where}: {name}")
        for name in ("use_rslora", "use_dora", "fan_in_fan_out", "lora_bias", "ensure_weight_tying")
    }
    field_name = "trainable_token_indices"
    return LoraSettings(
        r=_rank(config.get("r"), f"{where}: r"),
        lora_alpha=_alpha(config.get("lora_alpha"), f"{where}: lora_alpha"),
        rank_pattern={
            key: _rank(value, f"{where}: rank_pattern['{printable(key)}']")
            for key, value in _patterns(config.get("rank_pattern"), f"{where}: rank_pattern")
        },
        alpha_pattern={
            key: _alpha(value, f"{where}: alpha_pattern['{printable(key)}']")
            for key, value in _patterns(config.get("alpha_pattern"), f"{where}: alpha_pattern")
        },
        bias=bias,
        modules_to_save=_names(config.get("modules_to_save"), f"{where}: modules_to_save"),
        token_indices=_token_indices(config.get(field_name), f"{where}: {field_name}"),
        target_parameters=_names(config.get("target_parameters"), f"{where}: target_parameters"),
        selection=read_selection(config),
        base_class=_base_class(config),
        version=version,
        told_ranks={},
        **flags,
    )


def _check_init(init: object, where: str, *, base_is_residual: bool) -> None:
    # PEFT takes most names in any case.
    name = init.lower() if isinstance(init, str) else init
    plain = any(name is p or (isinstance(p, str) and name == p) for p in _PLAIN_INITS)
    changes_base = isinstance(name, str) and name.startswith(_RESIDUAL_INITS)
    if plain or (changes_base and base_is_residual):
        return
    if not changes_base:
        raise AdapterError(
            f"{where}: init_lora_weights is {printable(repr(init), 60)}, which is not known here; it may "
            "have changed the base weights. Merge this adapter with PEFT."
        )
    raise AdapterError(
        f"{where}: init_lora_weights is {printable(repr(init))}, which changed the base weights "
        "before training; adding the update to the original base would be wrong. If the base that "
        "you give is the residual one, as saved by that training, pass --base-is-residual. "
        "Otherwise convert the adapter to plain LoRA when saving it (PEFT: "
        "path_initial_model_for_weight_conversion)."
    )


def _base_class(config: Mapping[str, Any]) -> str | None:
    found = config.get("auto_mapping")
    name = found.get("base_model_class") if isinstance(found, dict) else None
    return name if isinstance(name, str) else None


def _version(value: object, where: str) -> Version | None:
    if value is None:
        return None
    match = (
        re.match(r"(\d{1,9})\.(\d{1,9})(?:\.(\d{1,9}))?", value) if isinstance(value, str) else None
    )
    if match is None:
        raise AdapterError(
            f"{where}: peft_version is {printable(repr(value), 60)}; a version like '0.18.0' was "
            "expected."
        )
    return int(match[1]), int(match[2]), int(match[3] or 0)


def _names(value: object, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise AdapterError(
            f"{where} is {printable(repr(value), 60)}; a list of names was expected."
        )
    return tuple(value)


def _token_indices(value: object, where: str, kind: str = "LORA") -> dict[str, tuple[int, ...]]:
    if value is None:
        if kind != "LORA":
            raise AdapterError(f"{where} is missing: which rows were trained is not known.")
        return {}
    found: dict[str, Any] = value if isinstance(value, dict) else {"": value}
    for name, indices in found.items():
        if not isinstance(indices, list) or not all(type(i) is int and i >= 0 for i in indices):
            raise AdapterError(
                f"{where}{f' of {printable(name)}' if name else ''} is no list of token numbers."
            )
        twice = next((index for index, n in Counter(indices).items() if n > 1), None)
        if twice is not None:
            raise AdapterError(
                f"{where} names token {twice} twice: which of its rows is meant is not known."
            )
    return {name: tuple(indices) for name, indices in found.items() if indices}


def _rank(value: object, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        found = printable(repr(value), 60)
        raise AdapterError(
            f"{where} is {'missing' if value is None else found}; a positive whole number was expected. "
            "Save the adapter again, or correct its config."
        )
    return value


def _alpha(value: object, where: str) -> float:
    # PEFT takes 8 where lora_alpha is missing; a guess has no place in a merge.
    # What fp32 does not hold would make infinite updates.
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not abs(value) < 2.0**127:
        found = printable(repr(value), 60)
        raise AdapterError(f"{where} is {found}; a number was expected. Add it to the config.")
    return float(value)


def _flag(value: object, where: str) -> bool:
    if value is not None and not isinstance(value, bool):
        found = printable(repr(value), 60)
        raise AdapterError(f"{where} is {found}; true or false was expected.")
    return bool(value)


def _patterns(value: object, where: str) -> list[tuple[str, object]]:
    if value is None:
        return []
    if not isinstance(value, dict):
        raise AdapterError(f"{where} is {printable(repr(value), 60)}; an object was expected.")
    for key in value:
        try:
            check_pattern(key)
        except ValueError as error:
            raise AdapterError(
                f"{where}: '{printable(key)}' {printable(str(error))}. "
                "Names, |, ( ), [ ], ., *, + and ? can be used."
            ) from error
    return list(value.items())
