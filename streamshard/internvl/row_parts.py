"""Tensors by rows: taking some, joining several, and how many rows each part has."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

from streamshard.errors import InputError, printable
from streamshard.internvl.families import Rule
from streamshard.internvl.model_config import Dims
from streamshard.tensors.joined import concat
from streamshard.tensors.lazy import Lazy
from streamshard.values import frozen

__all__ = [
    "LAZY",
    "Ops",
    "T",
    "Tensor",
    "fuse",
    "in_memory",
    "part_rows",
    "rows_of",
    "rows_of_parts",
    "segments",
    "split",
    "wrong_rows",
]


class Tensor(Protocol):
    """What the tables ask of a tensor; torch, numpy and `Lazy` have it."""

    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def dtype(self) -> Any: ...
    def reshape(self, shape: Any, /) -> Any: ...


T = TypeVar("T", bound=Tensor)


@frozen
class Ops(Generic[T]):
    """The two things done to tensors: rows `[start, stop)` of one, and several joined by rows."""

    rows: Callable[[T, int, int], T]
    join: Callable[[Sequence[T]], T]


def _take(tensor: Lazy, start: int, stop: int) -> Lazy:
    return tensor.take(start, stop)


LAZY: Ops[Lazy] = Ops(_take, concat)


def in_memory(join: Callable[[Sequence[Any]], Any]) -> Ops[Any]:
    """Operations on tensors that slice: `in_memory(torch.cat)`, `in_memory(np.concatenate)`."""
    return Ops(lambda tensor, start, stop: tensor[start:stop], join)


def split(
    name: str, whole: Any, targets: Sequence[str], rule: Rule, dims: Dims, ops: Ops[Any]
) -> dict[str, Any]:
    """The several targets of a rule, from the one tensor that joins them."""
    sizes = rows_of_parts(rule, len(targets), dims, rows_of(whole, name), name)
    taken: list[list[Any]] = [[] for _ in targets]
    for at, part, start, stop in segments(rule, sizes, dims):
        taken[part].append(ops.rows(whole, at, at + stop - start))
    return {
        target: rows[0] if len(rows) == 1 else ops.join(rows)
        for target, rows in zip(targets, taken, strict=True)
    }


def fuse(parts: Mapping[str, Any], rule: Rule, dims: Dims, ops: Ops[Any]) -> Any:
    """The one tensor of a rule, from the several that it joins."""
    names, tensors = list(parts), list(parts.values())
    sizes = part_rows(rule, len(parts), dims, rows_of(tensors[0], names[0]), names[0])
    first = _kind(tensors[0])
    for (name, tensor), size in zip(parts.items(), sizes, strict=True):
        if rows_of(tensor, name) != size:
            raise wrong_rows(name, rows_of(tensor, name), f"{size:,}")
        if _kind(tensor) != first:
            raise InputError(
                f"'{printable(names[0])}' is {first} and '{printable(name)}' is {_kind(tensor)}, "
                "but they are to become one tensor. Dtype and columns must be the same."
            )
    return ops.join(
        [
            tensors[part]
            if (start, stop) == (0, sizes[part])
            else ops.rows(tensors[part], start, stop)
            for _, part, start, stop in segments(rule, sizes, dims)
        ]
    )


def rows_of(tensor: Any, name: str) -> int:
    """How many rows a tensor has; raises `InputError` for a single number."""
    if not len(tensor.shape):
        raise InputError(f"'{printable(name)}' is a single number; a matrix or vector is needed.")
    return int(tensor.shape[0])


def _kind(tensor: Any) -> str:
    columns = ", ".join(str(int(size)) for size in tensor.shape[1:])
    return f"{tensor.dtype} with columns [{columns}]"


def segments(rule: Rule, sizes: Sequence[int], dims: Dims) -> Iterator[tuple[int, int, int, int]]:
    """The rows of the one tensor in order: where they begin, of which part they are which rows.

    Joined parts follow each other. Grouped ones (`InternLM2Attention`) alternate: for each
    key-value head the query heads that share it, then the key head, then the value head.
    """
    groups = dims.kv_heads or 1 if rule.op == "grouped" else 1
    at = 0
    for group in range(groups):
        for part, size in enumerate(sizes):
            rows = size // groups
            yield at, part, group * rows, (group + 1) * rows
            at += rows


def part_rows(rule: Rule, count: int, dims: Dims, guess: int, name: str) -> list[int]:
    """Rows of each part by the config, or as many as guessed where it does not say.

    Raises `InputError` if the config does not divide, or says nothing and a guess cannot be made.
    """
    stated = [dims.size(shape[0]) for shape in rule.shapes()] or [None]
    stated *= count // len(stated)
    if rule.op != "grouped":
        return [guess if rows is None else rows for rows in stated]
    heads, kv_heads = dims.heads, dims.kv_heads
    if heads is None or kv_heads is None or None in stated:
        raise InputError(
            f"'{printable(name)}': its rows are grouped by heads, so the config must say "
            "num_attention_heads, num_key_value_heads and hidden_size or head_dim."
        )
    if heads % kv_heads:
        raise InputError(
            f"'{printable(name)}': {heads} heads cannot be shared by {kv_heads} key-value heads."
        )
    return [rows for rows in stated if rows is not None]


def rows_of_parts(rule: Rule, count: int, dims: Dims, total: int, name: str) -> list[int]:
    """Rows of each part of a tensor of `total` rows; raises `InputError` if they do not fit."""
    sizes = part_rows(rule, count, dims, total // count, name)
    if sum(sizes) != total:
        equal = len(set(sizes)) == 1
        expected = f"{count} x {sizes[0]:,}" if equal else " + ".join(f"{n:,}" for n in sizes)
        raise wrong_rows(name, total, expected)
    return sizes


def wrong_rows(name: str, found: int, expected: str) -> InputError:
    """The error for a tensor that has not as many rows as expected."""
    return InputError(
        f"'{printable(name)}' has {found:,} rows; {expected} were expected. "
        "Is this the config of that checkpoint?"
    )
