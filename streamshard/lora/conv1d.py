"""Weights that are stored (in, out), as those of transformers' `Conv1D`, and not (out, in).

PEFT takes that from the class of each module and saves as `fan_in_fan_out` what the last one had.
Here the shapes tell; of square weights those of the same name, or all others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from streamshard.errors import AdapterError, listed
from streamshard.tensors.lazy import Lazy

__all__ = ["Linear", "stored_in_out"]


class Linear(NamedTuple):
    """The shape of a weight, and the rows of lora_B and columns of lora_A of its pair."""

    shape: Sequence[int]
    outputs: int
    inputs: int


def stored_in_out(
    modules: Mapping[str, Linear], tensors: Mapping[str, Lazy], where: str, *, says: bool
) -> dict[str, bool]:
    """Whether the weight of each module is stored (in, out); `says` is what the config says.

    Raises `AdapterError` for square weights of which nothing tells.
    """
    found = {
        name: tuple(own.shape) == (own.inputs, own.outputs)
        for name, own in modules.items()
        if own.inputs != own.outputs
    }
    square = [name for name in modules if name not in found]
    if not square:
        return found
    told: dict[str, set[bool]] = {}
    for name, turned in (*found.items(), *_by_biases(tensors)):
        told.setdefault(name.rpartition(".")[2], set()).add(turned)
    every = set().union(*told.values())
    open_names = []
    for name in square:
        # A config that says the usual is a witness where no module of that name is one.
        alike = told.get(name.rpartition(".")[2], every if says else every | {False})
        found[name] = True in alike
        if len(alike) != 1:
            open_names.append(name)
    if open_names:
        raise AdapterError(
            f"{where}: fan_in_fan_out is {str(says).lower()}, {listed(open_names, 3)} are square, and "
            "no other module of their kind tells whether their weights are stored (in, out). Merge "
            "it with PEFT."
        )
    return found


def _by_biases(tensors: Mapping[str, Lazy]) -> Iterable[tuple[str, bool]]:
    """Modules of the base whose bias tells which side of their weight is out."""
    for name, bias in tensors.items():
        if not name.endswith(".bias") or len(bias.shape) != 1:
            continue
        module = name.removesuffix(".bias")
        weight = tensors.get(f"{module}.weight")
        if weight is None or len(weight.shape) != 2:
            continue
        rows, columns = weight.shape
        if rows != columns and bias.shape[0] in (rows, columns):
            yield module, bias.shape[0] == columns
