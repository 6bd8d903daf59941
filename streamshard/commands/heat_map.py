"""How much each module of each layer has changed: a table of relative changes, to be drawn.

The relative change of a module is the L2 norm of its difference over the L2 norm of what it was before,
over all of its tensors together (weight and bias; all experts of a layer). Names alone decide where a
tensor belongs, so that any two checkpoints can be shown.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from streamshard.values import frozen

__all__ = ["FROM_ZERO", "NOT_FINITE", "Place", "heat_map", "place_of"]

FROM_ZERO, NOT_FINITE = "from zero", "not finite"
"""Cells that have no number: what was all zeros before, and what is NaN or infinite."""
MAX_ROWS = 32  # of modules; more are not legible, and no model has as many in a layer

_VISION = re.compile(r"(?:^|\.)vision_(?:model|tower)\.")
_PROJECTOR = re.compile(r"(?:^|\.)(?:mlp[12]|multi_modal_projector|pooling_before_gating|gating)\.")
_LANGUAGE = re.compile(
    r"(?:^|\.)(?:language_model|lm_head|embed_tokens)\.|^model\.(?:layers|norm)\."
)
_LAYER = re.compile(r"\.(?:layers?|blocks|h)\.(\d{1,4})\.")
_EXPERT = re.compile(r"(?<=\.experts)\.\d+(?=\.)")
_BEGINNING = re.compile(
    r"^(?:model\.)?(?:language_model\.|vision_\w+?\.|multi_modal_projector\.)?(?:model\.)?"
)
_END = re.compile(r"\.(?:weight|bias)$|_bias$")
_PARTS = ("vision", "projector", "language model", "other")
_KINDS = (
    ("norms and scales", re.compile(r"norm|(?:^|\.)ls\d$|lambda_\d$")),
    ("experts", re.compile(r"(?:^|\.)experts(?:\.|$)")),
    ("router", re.compile(r"(?:^|\.)(?:gate|router)$")),
    ("attention", re.compile(r"attn|attention")),
    ("mlp", re.compile(r"mlp|feed_forward")),
    ("head", re.compile(r"(?:^|\.)(?:lm_head|output)$")),
    ("embeddings", re.compile(r"embed|wte|cls_token")),
)
_ORDER = (
    "embeddings",
    "attention",
    "mlp",
    "experts",
    "router",
    "norms and scales",
    "head",
    "other",
)
_PROJECTIONS = (
    *("qkv", "wqkv", "qkv_proj", "q_proj", "k_proj", "v_proj", "o_proj", "wo", "gate_proj"),
    *("up_proj", "gate_up_proj", "w1", "w3", "fc1", "down_proj", "w2", "fc2"),
)


@frozen
class Place:
    """Where a tensor is shown: part of the model, layer (None outside of layers) and module in it."""

    part: str
    layer: int | None
    module: str

    @property
    def kind(self) -> str:
        """What sort of module it is."""
        if self.part == "projector":
            return ""
        found = (kind for kind, words in _KINDS if words.search(self.module))
        return next(found, "other")

    def order(self) -> tuple[int, int, str]:
        """Where its row stands among others: as data goes through a layer, whatever the file's order."""
        last = self.module.rpartition(".")[2]
        known = _PROJECTIONS.index(last) if last in _PROJECTIONS else len(_PROJECTIONS)
        return _ORDER.index(self.kind or "other"), known, self.module


def place_of(name: str) -> Place:
    """The place of a tensor, by its name.

    >>> place_of("language_model.model.layers.3.mlp.experts.7.up_proj.weight")
    Place(part='language model', layer=3, module='mlp.experts.up_proj')
    >>> place_of("mlp1.1.bias")
    Place(part='projector', layer=None, module='mlp1.1')
    """
    part = "other"
    for candidate, words in zip(_PARTS, (_VISION, _PROJECTOR, _LANGUAGE), strict=False):
        if words.search(name):
            part = candidate
            break
    layer = _LAYER.search(name)
    if layer is None or part == "projector":
        module = _BEGINNING.sub("", name)
        return Place(part, None, _END.sub("", module) or name)
    module = _EXPERT.sub("", f".{name[layer.end() :]}")[1:]
    return Place(part, int(layer[1]), _END.sub("", module))


@dataclass
class _Sum:
    """What is added up over the tensors of one module."""

    squared: float = 0.0
    norm: float = 0.0

    def cell(self) -> Cell:
        """The relative change, or why there is none."""
        if not math.isfinite(self.squared) or not math.isfinite(self.norm):
            return NOT_FINITE
        if not self.squared:
            return 0.0
        return math.sqrt(self.squared / self.norm) if self.norm else FROM_ZERO


Cell: TypeAlias = float | str | None


@dataclass
class _Panel:
    part: str
    rows: dict[str, dict[int, _Sum]] = field(default_factory=dict)
    """By module and layer; 0 is the only one outside of layers."""

    def as_dict(self, *, in_layers: bool) -> dict[str, Any]:
        layers = max(max(row) for row in self.rows.values()) + 1
        inside = 0 if in_layers else None
        by_place = sorted(self.rows, key=lambda module: Place(self.part, inside, module).order())
        rows, left = {module: self.rows[module] for module in by_place}, 0
        if len(rows) > MAX_ROWS:
            largest = sorted(rows, key=lambda module: -_size(rows[module]))[:MAX_ROWS]
            left = len(rows) - MAX_ROWS
            rows = {module: row for module, row in rows.items() if module in set(largest)}
        return {
            "part": self.part,
            "layers": layers if in_layers else None,
            "modules": [*rows],
            "left_out": left,
            "cells": [
                [row[layer].cell() if layer in row else None for layer in range(layers)]
                for row in rows.values()
            ],
        }


def _size(row: Mapping[int, _Sum]) -> float:
    total = sum(one.squared for one in row.values())
    return total if math.isfinite(total) else math.inf


def heat_map(
    title: str, squared: Mapping[str, float], norms: Mapping[str, float]
) -> dict[str, Any]:
    """The `heat_map` of a report.

    `squared` has the squared L2 distance of each tensor that was compared, `norms` the squared L2 norm of
    what it was before: of all tensors of a module of a layer in which one has changed. In `cells`,
    modules by layers, are relative changes, 0 where nothing changed, `FROM_ZERO` or `NOT_FINITE`, and
    None where the model has no such module; panels without `layers` have one column.
    """
    panels: dict[tuple[str, bool], _Panel] = {}
    parts: dict[tuple[str, str], float] = {}
    for name, value in squared.items():
        place = place_of(name)
        key = place.part, place.layer is not None
        panel = panels.setdefault(key, _Panel(place.part))
        one = panel.rows.setdefault(place.module, {}).setdefault(place.layer or 0, _Sum())
        one.squared += value
        one.norm += norms.get(name, 0.0)
        component = place.part, place.kind
        parts[component] = parts.get(component, 0.0) + value
    order = sorted(panels, key=lambda key: (_PARTS.index(key[0]), not key[1]))
    total = math.fsum(squared.values())
    return {
        "title": title,
        "compared": len(squared),
        "changed": sum(1 for value in squared.values() if value),
        "global": _root(total),
        "panels": [panels[key].as_dict(in_layers=key[1]) for key in order],
        "components": [
            {"part": part, "kind": kind, "l2": _root(value)}
            for (part, kind), value in sorted(
                parts.items(), key=lambda item: (_PARTS.index(item[0][0]), item[0][1])
            )
        ],
    }


def _root(value: float) -> float | None:
    return math.sqrt(value) if math.isfinite(value) else None


def wanted(squared: Mapping[str, float]) -> Iterable[str]:
    """The tensors whose norms a heat map needs: those of modules in which something changed."""
    changed = {place_of(name) for name, value in squared.items() if value}
    return (name for name in squared if place_of(name) in changed)
