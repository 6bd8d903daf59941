"""`rank_pattern` and `alpha_pattern` as releases of PEFT looked them up, which differ."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

from streamshard.lora.module_patterns import first_match, first_match_before_015

__all__ = ["ERAS", "Version", "pattern_keys"]

Version: TypeAlias = tuple[int, int, int]

# The first releases of each way, the newest first.
ERAS: tuple[Version, ...] = ((0, 15, 0), (0, 14, 0), (0, 13, 0))


def pattern_keys(
    ranks: Iterable[str], alphas: Iterable[str], version: Version | None, module: str
) -> tuple[str, str]:
    """The entries for rank and alpha of `module`, by the rule of a release of PEFT.

    Where no pattern fits it is the module itself, which may stand there by its whole name.
    """
    if version is None or version >= ERAS[0]:
        found = first_match(ranks, module), first_match(alphas, module)
    elif version >= ERAS[1]:
        found = first_match_before_015(ranks, module), first_match_before_015(alphas, module)
    else:  # one entry of either kind for both
        joint = first_match_before_015([*ranks, *alphas], module)
        found = joint, joint
    return found[0] or module, found[1] or module
