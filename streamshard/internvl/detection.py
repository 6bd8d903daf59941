"""Telling by the names of its tensors what a checkpoint is; the config is a cross-check."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from streamshard.errors import InputError, listed, printable
from streamshard.internvl.families import FAMILIES, Layout
from streamshard.internvl.model_config import OTHER, Dims, config_layout, llm_architecture
from streamshard.internvl.relatives import relative_of
from streamshard.internvl.spelling import SPELLINGS, flat_parts
from streamshard.internvl.tables import TITLES, opened, table_of
from streamshard.tensor_names import plain_name
from streamshard.values import frozen

__all__ = ["Detected", "check_side", "detect", "dims_from_names", "layout_of"]


_CUSTOM = re.compile(r"(?:vision_model|mlp1)\.")
_HF = re.compile(r"(?:model\.)?(?:vision_tower|multi_modal_projector)\.")


@frozen
class Detected:
    """What the names of a checkpoint's tensors say it is.

    `spelling` is that of HF names (see `SPELLINGS`), "mixed" if of several, None for custom.
    `family` is None if the names fit no table. `evidence` names what decided.
    """

    layout: Layout
    spelling: str | None
    family: str | None
    packed_experts: bool
    evidence: tuple[str, ...]
    warnings: tuple[str, ...]


def layout_of(names: Iterable[str]) -> Layout | None:
    """Answer "custom", "hf", or None where the names do not tell.

    Names of the language model prove nothing: most families have the same in both layouts.
    """
    custom, hf = _evidence(names)
    if (custom is None) == (hf is None):
        return None
    return "custom" if hf is None else "hf"


def _evidence(names: Iterable[str]) -> tuple[str | None, str | None]:
    """The first name that proves the custom layout, and the first that proves the HF layout."""
    custom = hf = None
    for name in names:
        if "vision_" in name or "mlp1." in name or "projector." in name:
            plain = plain_name(name)
            if custom is None and _CUSTOM.match(plain):
                custom = name
            elif hf is None and _HF.match(plain):
                hf = name
    return custom, hf


def detect(names: Collection[str], config: Mapping[str, Any] | None = None) -> Detected:
    """Tell layout, spelling and family of a checkpoint by its names; the config is a cross-check.

    The names are trusted where the config disagrees, with a warning. Raises `InputError` if the
    names are of both layouts, or if neither names nor config tell.
    """
    by_config = None if config is None else config_layout(config)
    custom, hf = _evidence(names)
    if custom is not None and hf is not None:
        raise InputError(_mixed(custom, hf))
    layout = "custom" if custom is not None else "hf" if hf is not None else by_config
    if layout is None:
        raise InputError(
            f"no tensor of a vision encoder or projector among {listed(names)}, and no config that "
            "says what this is. Names of a language model do not tell the layout: give the folder "
            "of a whole InternVL checkpoint."
        )
    evidence = [name for name in (custom, hf) if name is not None] or ["config.json: model_type"]
    warnings = []
    if by_config is not None and by_config != layout and relative_of((), config) is None:
        warnings.append(
            f"config.json is of the {TITLES[by_config]} layout, but "
            f"'{printable(evidence[0])}' of the {TITLES[layout]} layout; the names are believed"
        )
    spelling, example = _spelling(map(plain_name, names)) if layout == "hf" else (None, None)
    if example is not None:
        evidence.append(example)
    keys = _llm_keys(names, layout)
    families = [family for family in FAMILIES if _fits(keys, family, layout)]
    family = families[0] if families else None
    stated = None if config is None else _stated_families(config)
    if stated and families and not set(stated) & set(families):
        warnings.append(
            f"config.json says that the language model is {stated[0]}, but the names are those of "
            f"{families[0]}; the names are believed"
        )
    elif stated and families:
        family = next(f for f in families if f in stated)
    return Detected(
        layout=layout,
        spelling=spelling,
        family=family,
        packed_experts=bool(family)
        and not keys.isdisjoint(table_of(family, packed=True).found["hf"]),
        evidence=tuple(evidence),
        warnings=tuple(warnings),
    )


def dims_from_names(names: Collection[str], layout: Layout) -> Dims:
    """What names alone say: the family, the first of several that have the same HF names.

    For state dicts without a config. Raises `InputError` if the names fit no family.
    """
    keys = _llm_keys(names, layout)
    fitting = [family for family in FAMILIES if _fits(keys, family, layout)]
    if not keys:
        raise InputError(
            f"no name begins with language_model, as in the {layout} layout; there are "
            f"{listed(sorted(names), 3) or 'none'}. Give the state dict of the whole model."
        )
    if not fitting:
        raise InputError(
            f"the names of the language model, such as {listed(sorted(keys))}, are not those of "
            f"any of the families {listed(FAMILIES, len(FAMILIES))}. Give the config."
        )
    return Dims(fitting[0])


def _stated_families(config: Mapping[str, Any]) -> list[str]:
    """The families that a config may mean."""
    if config_layout(config) == "custom":
        try:
            architecture = llm_architecture(config)
        except InputError:
            return []
        return [f.name for f in FAMILIES.values() if f.architecture == architecture]
    text = config.get("text_config")
    kind = text.get("model_type", "qwen2") if isinstance(text, dict) else None
    return [f.name for f in FAMILIES.values() if f.hf_type == kind]


def _spelling(names: Iterable[str]) -> tuple[str, str | None]:
    """The spelling that fits all names, and a name of the language model as an example."""
    seen: dict[str, set[str]] = {"head": set(), "llm": set(), "vision": set()}
    example = None
    for name in names:
        _, kind, beginning = flat_parts(name)
        if kind:
            seen[kind].add(beginning)
            example = name if kind == "llm" and example is None else example
    for spelling, beginnings in SPELLINGS.items():
        if all(seen[kind] <= {b} for kind, b in zip(seen, beginnings, strict=True)):
            return spelling, example
    return "mixed", example


def check_side(names: Iterable[str], side: Layout) -> None:
    """Raise `InputError` if the names are not of the layout `side`."""
    custom, hf = _evidence(names)
    if custom is not None and hf is not None:
        raise InputError(_mixed(custom, hf))
    found = custom if side == "hf" else hf
    if found is not None:
        raise InputError(
            f"'{printable(found)}' is of the {TITLES[OTHER[side]]} layout, but a checkpoint of "
            f"the {TITLES[side]} layout was expected. Are the folders given the wrong way round?"
        )


def _mixed(custom: str, hf: str) -> str:
    return (
        f"'{printable(custom)}' is of the custom layout and '{printable(hf)}' of the HF layout: "
        "two checkpoints are mixed. Keep the files of one."
    )


def _llm_keys(names: Iterable[str], layout: Layout) -> set[str]:
    """The names of the language model with their indexes taken out, LoRA left aside."""
    plain = (plain_name(name) for name in names if ".lora_" not in name)
    flat = (flat_parts(name)[0] for name in plain) if layout == "hf" else plain
    return {opened(name)[0] for name in flat if name.startswith("language_model.")}


def _fits(keys: Collection[str], family: str, layout: Layout) -> bool:
    """Whether the table of a family has all names of the language model, and misses none."""
    table, packed = table_of(family), table_of(family, packed=True)
    known, unpacked = table.found[layout], packed.found["hf"]
    seen: set[str] = set()
    for key in keys:
        seen |= set(packed.entries[unpacked[key][0]].custom) if key in unpacked else {key}
    if not keys or not seen <= known.keys():
        return False
    switched: dict[str, set[bool]] = {}
    for entry in table.entries:
        rule, mine = entry.rule, [n for n in entry.names(layout) if n.startswith("language_model.")]
        if rule.op == "drop" or rule.layers or (rule.tied_to and layout == "hf"):
            continue
        if rule.only:
            switched.setdefault(rule.only, set()).update(name in seen for name in mine)
        elif not seen.issuperset(mine):
            return False
    return all(len(states) < 2 for states in switched.values())
