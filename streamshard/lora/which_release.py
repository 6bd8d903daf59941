"""Which release of PEFT wrote a config, as far as its patterns of ranks and alphas depend on that.

Configs say it since PEFT 0.18. Of older ones the ranks in the file tell: a release that would have
trained another rank did not write it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from streamshard.errors import AdapterError, printable
from streamshard.lora.module_patterns import matches, matches_before_015
from streamshard.lora.pattern_eras import ERAS, Version
from streamshard.lora.settings import LoraSettings

__all__ = ["settled"]


def settled(settings: LoraSettings, found: Mapping[str, int], where: str) -> LoraSettings:
    """The settings, with what the ranks of the modules in the file say of their patterns.

    Raises `AdapterError` if releases that fit all ranks give a module different values of alpha.
    """
    if not (settings.rank_pattern or settings.alpha_pattern):
        return settings
    eras = ERAS if settings.version is None else (settings.version,)
    readings = [_reading(settings, era, found) for era in eras]
    fitting = [reading for reading in readings if reading is not None]
    if not fitting:  # config and tensors disagree, which is told elsewhere
        return settings
    if settings.version is None and settings.rank_pattern and settings.alpha_pattern:
        for module in found:
            values = sorted({reading.alpha(module) for reading in fitting})
            if len(values) > 1:
                raise AdapterError(
                    f"{where}: module '{printable(module)}': rank_pattern and alpha_pattern give "
                    f"lora_alpha {', '.join(f'{value:g}' for value in values)} depending on the PEFT "
                    "release that trained it, and adapter_config.json has no peft_version. Add "
                    '"peft_version" with that release to the config.'
                )
    return fitting[0]


def _reading(settings: LoraSettings, era: Version, found: Mapping[str, int]) -> LoraSettings | None:
    """The settings as one release has them; None if it would have given a module another rank."""
    patterns, told = settings.rank_pattern, {}
    fits = matches if era >= ERAS[0] else matches_before_015
    sorted_ones = list(patterns) == sorted(patterns)
    plain = replace(settings, version=era)
    for module, rank in found.items():
        if plain.rank(module) == rank:
            continue
        # Which pattern came first is lost where PEFT has sorted them; the tensors tell.
        if not sorted_ones or rank not in {patterns[p] for p in fits(patterns, module)}:
            return None
        told[module] = rank
    return replace(plain, told_ranks=told)
