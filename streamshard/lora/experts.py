"""LoRA on fused experts (PEFT `target_parameters`, `ParamWrapper`): one pair for all experts.

`A` is (experts * r, in) with the rows of an expert together, `B` is (out, r * experts) with its
columns interleaved: expert e has every experts-th column from e on. Which of the parameter's
last two dimensions is in and which out has changed between releases of PEFT.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from streamshard.errors import AdapterError, listed, printable
from streamshard.lora.keys import BASE_LAYER
from streamshard.tensors.lazy import Lazy
from streamshard.tensors.low_rank import Columns, LowRank, Transposed
from streamshard.values import frozen

__all__ = ["EXPERT_ORDERS", "Fused", "Stack", "expert_updates", "parameter_names", "stacked_as"]


# How the columns of B are ordered: PEFT interleaves experts, unsloth's own kernels do not.
EXPERT_ORDERS = ("peft", "unsloth")
# In the order in which transformers' classes of experts register them, which nests the wrappers.
_REGISTERED = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")


@frozen
class Stack:
    """A parameter of `experts` matrices (rows, columns) each, or of one."""

    experts: int
    rows: int
    columns: int


class Fused:
    """The parameters that a base has in modules, experts one by one being two fused ones.

    Modules are compared from their layer's number on: what is before that may be called otherwise.
    """

    def __init__(self, base: Iterable[str]) -> None:
        self._found: set[tuple[str, str]] = set()
        for name in base:
            stem, mark, rest = name.partition(".experts.")
            if mark and (single := _SINGLE.fullmatch(rest)) is not None:
                fused = "down_proj" if single["part"] == "down" else "gate_up_proj"
                self._found.add((_from_number(f"{stem}.experts"), fused))
            else:
                module, _, parameter = name.rpartition(".")
                self._found.add((_from_number(module), parameter))

    def has(self, module: str, parameter: str) -> bool:
        """Whether a module has this parameter."""
        return (_from_number(module), parameter) in self._found

    def has_any(self, target: str) -> bool:
        """Whether any module has what `target_parameters` calls so."""
        module, _, parameter = target.rpartition(".")
        inner = _from_number(module)
        return any(
            name == parameter and (_is_of(module, where) or _is_of(inner, where))
            for where, name in self._found
        )


_SINGLE = re.compile(r"\d{1,6}\.(?P<part>gate|up|down)_proj\.weight")


def _from_number(module: str) -> str:
    """The end of a module's name from its last number on; all of it if there is none."""
    words = module.split(".")
    at = max((i for i, word in enumerate(words) if word.isdecimal()), default=0)
    return ".".join(words[at:])


def parameter_names(
    modules: Sequence[str],
    target_parameters: Sequence[str],
    where: str,
    fused: Fused | None = None,
) -> dict[str, str]:
    """Module (as its key has it, `.base_layer` included) to the name of the parameter it adapts.

    Modules that no target parameter is in are left out, as are those whose parameter is "weight",
    which is an ordinary pair. A target without a module is in those that have it by what `fused` says
    of the base. Raises `AdapterError` where the nesting leaves it open.
    """
    levels: dict[str, list[str]] = {}
    for module in modules:
        plain = re.sub(r"(?:\.base_layer)+$", "", module)
        levels.setdefault(plain, []).append(module)
    found: dict[str, str] = {}
    for plain, nested in levels.items():
        names = [
            target.rpartition(".")[2]
            for target in target_parameters
            if _is_of(target.rpartition(".")[0], plain)
            and ("." in target or fused is None or fused.has(plain, target))
        ]
        names = list(dict.fromkeys(names))  # by a whole name and by its end
        if names in ([], ["weight"]) and nested == [plain]:
            continue
        order = [name for name in _REGISTERED if name in names]
        known = len(set(names)) == len(names) == len(order)
        if len(nested) != len(names) or not (known or len(names) == 1):
            raise AdapterError(
                f"{where}: '{printable(plain)}' has {len(nested)} pairs for fused parameters, but "
                f"target_parameters of its config names {listed(names) or 'none'} there. Which "
                "pair belongs to which parameter is not known: train with one parameter a module, or "
                "merge with PEFT."
            )
        # The first one registered is the innermost.
        nested.sort(key=lambda module: -module.count(BASE_LAYER))
        found |= dict(zip(nested, order if known else names, strict=True))
    return found


def _is_of(module: str, name: str) -> bool:
    """Whether a target's module, which may be the end of a name or nothing, is `name`."""
    return not module or name == module or name.endswith(f".{module}")


def stacked_as(stacks: Mapping[str, tuple[Stack, Lazy, Lazy]], where: str) -> dict[str, bool]:
    """Whether each parameter's pairs are transposed: `rows` are those of A's columns.

    `stacks` maps a name to the parameter and its `A` and `B`. Square parameters are as the others of
    the adapter are. Raises `AdapterError` for what does not fit or stays open.
    """
    open_names, found = [], {}
    for name, (stack, A, B) in stacks.items():
        plain = (stack.rows, stack.columns) == (B.rows, A.columns)
        turned = (stack.rows, stack.columns) == (A.columns, B.rows) and stack.experts > 1
        if A.rows != B.columns or A.rows % stack.experts or not (plain or turned):
            raise AdapterError(
                f"{where}: the pair of '{printable(name)}' has shapes {list(A.shape)} and "
                f"{list(B.shape)}, which fit no {stack.experts} matrices of "
                f"{stack.rows} x {stack.columns}. The adapter belongs to another model."
            )
        if plain and turned:
            open_names.append(name)
        else:
            found[name] = turned
    if open_names and len(set(found.values())) != 1:
        raise AdapterError(
            f"{where}: {listed(open_names)} are square, and releases of PEFT differ in which side is "
            "in and which is out; no other fused parameter of the adapter tells. Merge this adapter "
            "with the PEFT that trained it."
        )
    return found | dict.fromkeys(open_names, next(iter(found.values()), False))


def expert_updates(
    stack: Stack, A: Lazy, B: Lazy, scale: float, *, turned: bool, order: str
) -> list[LowRank]:
    """The update of each expert, (rows, columns) each."""
    r = A.rows // stack.experts
    updates = []
    for expert in range(stack.experts):
        right = A.take(expert * r, (expert + 1) * r)
        first, step = (expert, stack.experts) if order == "peft" else (expert * r, 1)
        left: Lazy = Columns(B, first, step, r)
        if turned:
            left, right = Transposed(right), Transposed(left)
        updates.append(LowRank(right, left, scale, 0, stack.rows))
    return updates
