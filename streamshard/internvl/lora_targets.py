"""Where InternVL's trainer puts LoRA, and with which settings.

Which modules get a pair is said by the tables of `families`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from streamshard.errors import InputError, listed
from streamshard.internvl.families import FAMILIES, VISION_TARGETS, Layout
from streamshard.internvl.model_config import Dims
from streamshard.internvl.tables import TITLES, compared_names, find, table_of
from streamshard.tensors.lazy import Lazy
from streamshard.values import frozen

__all__ = [
    "FLAGS",
    "PARTS",
    "TASK_TYPES",
    "UPSTREAM",
    "UPSTREAM_DROPOUT",
    "UPSTREAM_R",
    "Target",
    "beginning",
    "check_complete",
    "flags_of",
    "parameters",
    "target_ends",
    "target_modules",
    "upstream_alpha",
]


# What InternVLChatModel.wrap_llm_lora and wrap_backbone_lora do, and store nowhere.
UPSTREAM_DROPOUT = 0.05
UPSTREAM_R = 128
# Families that wrap_llm_lora knows.
UPSTREAM = ("llama", "qwen2", "internlm2", "phi3")

# The parts of a model that are wrapped, in this order, and how their names begin in each layout.
PARTS: dict[str, dict[Layout, str]] = {
    "vision_model": {"custom": "vision_model.", "hf": "vision_tower."},
    "language_model": {"custom": "language_model.", "hf": "language_model."},
}
# What PEFT takes a model for: InternVLChatModel lacks a method that its class for CAUSAL_LM needs.
TASK_TYPES: dict[Layout, str | None] = {"custom": None, "hf": "CAUSAL_LM"}
# The part that each field of the config wraps, with this rank; 0 stands for none.
FLAGS = {"use_llm_lora": "language_model", "use_backbone_lora": "vision_model"}


def upstream_alpha(r: int) -> int:
    """The alpha that InternVL's trainer has with a rank."""
    return 2 * r


def flags_of(ranks: Mapping[str, int]) -> dict[str, int]:
    """The fields of the config of a model whose parts are wrapped with these ranks."""
    return {flag: ranks.get(part, 0) for flag, part in reversed(FLAGS.items())}


def beginning(part: str, layout: Layout) -> str:
    """How the names of a part begin; those of the whole "model" begin with anything."""
    return PARTS[part][layout] if part in PARTS else ""


@frozen
class Target:
    """A module that gets a pair of rank `r`; HF names are in the flat spelling."""

    module: str
    r: int


def check_complete(names: Iterable[str], dims: Dims, layout: Layout) -> None:
    """Raise `InputError` if a checkpoint lacks tensors of its family's tables, or has others."""
    unknown, missing = compared_names(names, dims, layout, 10)
    if unknown or missing:
        what = f"has {listed(list(unknown), 3)}" if unknown else f"lacks {listed(missing, 3)}"
        raise InputError(
            f"the base {what}, by the {TITLES[layout]} layout of {dims.family}. "
            "Is the checkpoint complete, and is this its config?"
        )


def target_modules(
    names: Iterable[str], dims: Dims, layout: Layout, ranks: Mapping[str, int]
) -> list[Target]:
    """The modules that get LoRA, in the order in which PEFT finds them in the model.

    `names` are those of all tensors, HF ones in the flat spelling; `ranks` maps some of `PARTS`
    to ranks.
    """
    table = table_of(dims.family)
    ends = {part: _adapted(dims.family, part) for part in ranks}
    found = []
    for name in names:
        match = find(table, layout, name) if name.endswith(".weight") else None
        if match is None:
            continue
        number, position, holes = match
        for part in ranks:
            if number in ends[part]:
                # Experts come one after the other, behind everything else of their layer.
                inside = (holes[0], *(holes[1:] or (-1,)), ends[part][number], position)
                target = Target(name.removesuffix(".weight"), ranks[part])
                found.append(((list(PARTS).index(part), *inside), target))
    return [target for _, target in sorted(found, key=lambda item: item[0])]


def target_ends(family: str, layout: Layout, part: str) -> list[str]:
    """The ends of names by which PEFT is told the modules (`LoraConfig.target_modules`)."""
    table = table_of(family)
    found: list[str] = []
    for number, end in sorted(_adapted(family, part).items(), key=lambda item: item[1]):
        words = _targets(family, part)[end].count(".") + 1
        modules = (name.removesuffix(".weight") for name in table.entries[number].names(layout))
        found += [".".join(module.split(".")[-words:]) for module in modules]
    return list(dict.fromkeys(found))


def _targets(family: str, part: str) -> tuple[str, ...]:
    return VISION_TARGETS if part == "vision_model" else FAMILIES[family].targets


def _adapted(family: str, part: str) -> dict[int, int]:
    """Rules of the tables that get LoRA, by number, to the position of their module in its layer."""
    found = {}
    for number, entry in enumerate(table_of(family).entries):
        name = entry.custom[0]
        for position, end in enumerate(_targets(family, part)):
            if name.startswith(PARTS[part]["custom"]) and name.endswith(f".{end}.weight"):
                found[number] = position
    return found


def parameters(base: Mapping[str, Lazy], dims: Dims, layout: Layout, prefix: str = "") -> int:
    """Elements of the parameters whose names begin with `prefix`; buffers do not count."""
    table, total = table_of(dims.family), 0
    for name, tensor in base.items():
        if name.startswith(prefix):
            match = find(table, layout, name)
            if match is None or table.entries[match[0]].rule.op != "drop":
                total += math.prod(tensor.shape)
    return total
