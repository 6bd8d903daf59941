"""What `adapter_config.json` says, and which of it can be merged exactly.

The fields are those of PEFT's `LoraConfig` (peft 0.21). Only fields that are known, and known
not to change the merged weight, are let through: a field that a later PEFT adds is refused
until its meaning is known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from streamshard.errors import AdapterError, printable

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
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
    }
)
_USED = frozenset(
    {
        "alpha_pattern",
        "init_lora_weights",
        "lora_alpha",
        "peft_type",
        "r",
        "rank_pattern",
        "use_rslora",
    }
)
# Initialisations that leave the base weights as they were.
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")

_REASONS = {
    "alora_invocation_tokens": "an activated LoRA applies only after certain tokens",
    "arrow_config": "a router chooses among adapters at run time",
    "bias": "trained biases would be lost",
    "fan_in_fan_out": "weights stored (in, out) are not supported",
    "kasa_config": "it truncates the base weight and needs a third factor",
    "layer_replication": "the merged model has another number of layers",
    "lora_bias": "biases of lora_B would be lost",
    "megatron_config": "tensor-parallel layers may be stored in parts",
    "modules_to_save": "fully trained modules would be lost",
    "target_parameters": "updates of fused expert parameters are not supported",
    "trainable_token_indices": "trained token rows would be lost",
    "use_bdlora": "its factors are block-diagonal and stored packed",
    "use_dora": "DoRA rescales every row, which is not supported",
}


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Rank and scaling of every module of one adapter."""

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    knows_version: bool

    def rank(self, module: str) -> int:
        """The rank that the config gives to `module` (its name in the base model)."""
        key = _matching(self.rank_pattern, module)
        return self.r if key is None else self.rank_pattern[key]

    def alpha(self, module: str) -> float:
        """`lora_alpha` of `module`.

        Raises `AdapterError` where releases of PEFT before 0.15 would have read the patterns
        differently and the config does not say which release wrote it.
        """
        key = _matching(self.alpha_pattern, module)
        alpha = self.lora_alpha if key is None else self.alpha_pattern[key]
        if self.rank_pattern and self.alpha_pattern and not self.knows_version:
            self._check_eras(module, alpha)
        return alpha

    def scaling(self, module: str) -> float:
        """`lora_alpha / r`, or `lora_alpha / sqrt(r)` with rsLoRA (arXiv:2312.03732)."""
        rank = self.rank(module)
        return self.alpha(module) / (math.sqrt(rank) if self.use_rslora else rank)

    def _check_eras(self, module: str, alpha: float) -> None:
        # peft 0.14 looked rank and alpha up separately, by another expression; 0.13 and before
        # used the first pattern of either kind for both.
        apart = _matching_before_015(self.alpha_pattern, module)
        joint = _matching_before_015([*self.rank_pattern, *self.alpha_pattern], module)
        older = {self.alpha_pattern.get(key or "", self.lora_alpha) for key in (apart, joint)}
        if older != {alpha}:
            values = ", ".join(f"{value:g}" for value in sorted(older | {alpha}))
            raise AdapterError(
                f"module '{printable(module)}': rank_pattern and alpha_pattern give lora_alpha "
                f"{values} depending on the PEFT release that trained it, and adapter_config.json "
                'has no peft_version. Add "peft_version" with that release to the config.'
            )


def read_settings(config: Mapping[str, Any], where: str) -> LoraSettings:
    """Check every field of an `adapter_config.json` and return what a merge needs.

    Raises `AdapterError` naming the field for everything that is not plain LoRA.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(
            f"{where}: peft_type is {printable(repr(kind))}; only LORA adapters can be merged. "
            "Merge it with the tool that trained it."
        )
    for name, value in config.items():
        if name not in _USED | _INERT and not _is_inert(name, value):
            reason = _REASONS.get(name, "it is not known whether it changes the merged weight")
            raise AdapterError(
                f"{where}: '{printable(name)}' is {printable(repr(value), 60)}; {reason}. "
                "Merging without it would give wrong weights, so nothing is written. "
                "Merge this adapter with PEFT."
            )
    init = config.get("init_lora_weights", True)
    if not any(
        init is plain or (isinstance(plain, str) and init == plain) for plain in _PLAIN_INITS
    ):
        raise AdapterError(
            f"{where}: init_lora_weights is {printable(repr(init))}, which changed the base "
            "weights before training; adding the update to the original base would be wrong. "
            "Merge it with PEFT, or convert it to plain LoRA when saving."
        )
    version = config.get("peft_version")
    return LoraSettings(
        r=_rank(config.get("r"), f"{where}: r"),
        lora_alpha=_alpha(config.get("lora_alpha"), f"{where}: lora_alpha"),
        use_rslora=_flag(config.get("use_rslora"), f"{where}: use_rslora"),
        rank_pattern={
            key: _rank(value, f"{where}: rank_pattern['{printable(key)}']")
            for key, value in _patterns(config.get("rank_pattern"), f"{where}: rank_pattern")
        },
        alpha_pattern={
            key: _alpha(value, f"{where}: alpha_pattern['{printable(key)}']")
            for key, value in _patterns(config.get("alpha_pattern"), f"{where}: alpha_pattern")
        },
        knows_version=isinstance(version, str) and _at_least_015(version),
    )


def _is_inert(name: str, value: object) -> bool:
    return not value or (name == "bias" and value == "none")


def _at_least_015(version: str) -> bool:
    match = re.match(r"(\d+)\.(\d+)", version)
    return match is not None and (int(match[1]), int(match[2])) >= (0, 15)


def _rank(value: object, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise AdapterError(f"{where} is {value!r}; a positive whole number was expected.")
    return value


def _alpha(value: object, where: str) -> float:
    # PEFT takes 8 where lora_alpha is missing; a guess has no place in a merge.
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise AdapterError(f"{where} is {value!r}; a number was expected. Add it to the config.")
    return float(value)


def _flag(value: object, where: str) -> bool:
    if value is not None and not isinstance(value, bool):
        raise AdapterError(f"{where} is {value!r}; true or false was expected.")
    return bool(value)


def _patterns(value: object, where: str) -> list[tuple[str, object]]:
    if value is None:
        return []
    if not isinstance(value, dict):
        raise AdapterError(f"{where} is {printable(repr(value), 60)}; an object was expected.")
    for key in value:
        try:
            re.compile(rf"(.*\.)?({key})$")
            re.compile(rf".*\.{key}$")
        except (re.error, RecursionError, OverflowError) as error:
            raise AdapterError(
                f"{where}: '{printable(key)}' is no valid pattern: {error}."
            ) from error
    return list(value.items())


def _matching(patterns: Mapping[str, Any], module: str) -> str | None:
    """The first pattern that fits (PEFT >= 0.15 `get_pattern_key`)."""
    return next((p for p in patterns if re.match(rf"(.*\.)?({p})$", module)), None)


def _matching_before_015(patterns: Mapping[str, Any] | list[str], module: str) -> str | None:
    return next((p for p in patterns if re.match(rf".*\.{p}$", module)), None)
