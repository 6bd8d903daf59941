"""Which shape every tensor of a checkpoint has: that of its line in the tables, by its config.

What a config does not fix, such as the rows of the embedding, or where there is no config, must at
least be the same wherever it occurs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from streamshard.errors import InputError, listed, printable
from streamshard.internvl.dims import Dims
from streamshard.internvl.families import Layout, Rule
from streamshard.internvl.tables import opened, table_of
from streamshard.values import frozen

__all__ = [
    "GATHER",
    "Misfit",
    "check_gathered",
    "check_shapes",
    "expected_shapes",
    "misfits",
    "not_gathered",
]

GATHER = (
    "The checkpoint was saved from a partitioned (ZeRO-3) model before its weights were gathered: "
    "run the zero_to_fp32.py that DeepSpeed left in the training's folder, with --safe_serialization, "
    "put config and tokenizer beside what it writes, and use that"
)

# What quantized weights are packed into: no weight of a model is of whole numbers.
_PACKED = ("BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64")

# A size of a shape: a number, or the words (see `Dims.size`) whose sizes are added.
Size = tuple[str, ...]


class HasShape(Protocol):
    """What is asked of a tensor."""

    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def dtype(self) -> object: ...


@frozen
class Misfit:
    """A tensor of another shape than its model has, or of no floats; None stands for any size.

    `like` is the tensor that it does not agree with, empty if it is the config.
    """

    name: str
    found: tuple[int, ...]
    expected: tuple[int | None, ...]
    like: str = ""
    dtype: str = ""

    @property
    def fits(self) -> bool:
        """Whether the shape itself is the right one."""
        return _agree(self.found, self.expected)

    def __str__(self) -> str:
        # A size that is free is as good as any.
        free = (
            self.found if len(self.found) == len(self.expected) else ("any",) * len(self.expected)
        )
        expected = zip(self.expected, free, strict=True)
        sizes = ", ".join(str(mine or "any" if size is None else size) for size, mine in expected)
        why = f"as '{printable(self.like)}' has it" if self.like else "by the config"
        text = f"'{printable(self.name)}' has the shape {list(self.found)}; [{sizes}] was expected, {why}"
        if self.fits and all(self.found):
            text = f"'{printable(self.name)}' has whole numbers, where weights are floats"
        if not all(self.found):
            return f"{text}. {GATHER}"
        if self.dtype in _PACKED:
            return (
                f"{text}. As {self.dtype} it seems to be quantized: use the unquantized checkpoint"
            )
        return text


@dataclass(slots=True)
class Shape:
    """The shapes of a model of these dimensions, as far as they are known.

    `sizes` are those of words, with the tensor that they are from where the config does not say.
    """

    dims: Dims
    sizes: dict[str, tuple[int, str]] = field(default_factory=dict)

    def size(self, word: str) -> int | None:
        """The size that a word stands for, by the config or by the first tensor that has it."""
        stated = self.dims.size(word)
        return self.sizes[word][0] if stated is None and word in self.sizes else stated

    def of(self, pattern: Sequence[Size]) -> tuple[int | None, ...]:
        """A shape in numbers; None where nothing says it yet."""
        found: list[int | None] = []
        for words in pattern:
            sizes = [self.size(word) for word in words]
            known = [size for size in sizes if size is not None]
            found.append(sum(known) if len(known) == len(sizes) else None)
        return tuple(found)

    def learn(self, pattern: Sequence[Size], shape: Sequence[int], name: str) -> bool:
        """Take note of sizes that only this tensor says; answers whether there were any."""
        new = {
            words[0]: (int(size), name)
            for words, size in zip(pattern, shape, strict=True)
            if len(words) == 1 and self.size(words[0]) is None
        }
        self.sizes |= new
        return bool(new)


def expected_shapes(dims: Dims, layout: Layout) -> dict[str, tuple[int | None, ...]]:
    """The shape of every tensor of a model, by the flat names with empty holes; None is any size.

    Experts that one tensor packs are there too, whatever the layout.

    >>> expected_shapes(Dims("qwen2", vision_hidden=16), "custom")[
    ...     "vision_model.encoder.layers.{}.attn.qkv.weight"]
    (48, 16)
    """
    shape = Shape(dims)
    return {name: shape.of(pattern) for name, pattern in _patterns(dims.family, layout).items()}


def misfits(
    tensors: Mapping[str, HasShape], given: Mapping[str, str], dims: Dims, layout: Layout
) -> Iterator[Misfit]:
    """The tensors that are not of the shape of their line in the tables, by the order of the names.

    No size may be zero, and no weight may be of whole numbers.

    `given` maps flat names of `layout` to those of `tensors`; names that no table knows are passed
    over.
    """
    patterns = _patterns(dims.family, layout)
    shape = Shape(dims)
    known: dict[str, tuple[int | None, ...]] = {}
    for flat, name in given.items():
        key = flat if flat in patterns and "{" not in flat else opened(flat)[0]
        pattern = patterns.get(key)
        if pattern is None:
            continue
        tensor = tensors[name]
        found, packed = tensor.shape, tensor.dtype in _PACKED
        expected = known.get(key)
        if expected is None:
            expected = known[key] = shape.of(pattern)
        if found == expected and not packed:
            continue
        found = tuple(map(int, found))
        expected = known[key] = shape.of(pattern)
        if not _agree(found, expected) or not all(found) or packed:
            like = _like(shape, pattern, found, expected)
            yield Misfit(name, found, expected, like, str(tensor.dtype))
        elif shape.learn(pattern, found, name):
            known.clear()


def check_shapes(
    where: str,
    tensors: Mapping[str, HasShape],
    given: Mapping[str, str],
    dims: Dims,
    layout: Layout,
) -> None:
    """Raise `InputError` if there are misfits, with the first one and the names of others."""
    found = list(misfits(tensors, given, dims, layout))
    if found:
        more = [misfit.name for misfit in found[1:]]
        rest = f" The like holds for {listed(more, 3)}." if more else ""
        raise InputError(
            f"{where}: {found[0]}.{rest} Is the checkpoint whole, and is this its config?"
        )


def check_gathered(where: str, tensors: Mapping[str, HasShape]) -> None:
    """Raise `InputError` for tensors that a partitioned model left empty, whatever their names."""
    empty = [name for name, tensor in tensors.items() if tuple(tensor.shape) == (0,)]
    if empty:
        raise not_gathered(where, empty)


def not_gathered(where: str, empty: Collection[str]) -> InputError:
    """The error for tensors, by their names, that a partitioned model left empty."""
    return InputError(f"{where}: {listed(empty)} have no elements. {GATHER}.")


def _agree(found: Sequence[int], expected: Sequence[int | None]) -> bool:
    """Whether a shape is an expected one, of which None is any size."""
    return len(found) == len(expected) and all(
        size in (None, mine) for size, mine in zip(expected, found, strict=True)
    )


def _like(
    shape: Shape, pattern: Sequence[Size], found: Sequence[int], expected: Sequence[int | None]
) -> str:
    """The tensor that says a size which another one has not; empty if the config does."""
    if len(found) != len(expected):
        return ""
    for words, mine, size in zip(pattern, found, expected, strict=True):
        if size not in (None, mine):
            known = [shape.sizes[word][1] for word in words if word in shape.sizes]
            return known[0] if known else ""
    return ""


def _patterns(family: str, layout: Layout) -> dict[str, tuple[Size, ...]]:
    """The shapes in the tables, by names with empty holes."""
    found: dict[str, tuple[Size, ...]] = {}
    sides: tuple[tuple[Layout, bool], ...] = ((layout, False), ("hf", True))
    for side, packed in sides:
        for entry in table_of(family, packed=packed).entries:
            names = entry.custom if side == "custom" else entry.hf
            found |= dict(zip(names, _of_rule(entry.rule, len(names)), strict=False))
    return found


def _of_rule(rule: Rule, count: int) -> list[tuple[Size, ...]]:
    """The shapes of a rule's tensors on the side that has so many of them."""
    each = [tuple(tuple(word.split("+")) for word in shape) for shape in rule.shapes()]
    if not each or rule.op == "same":
        return each
    if rule.op == "experts" or count < len(each):
        rows: Size = tuple(word for shape in each for word in shape[0])
        whole = (rows, *each[0][1:])
        return [(("experts",), *whole) if rule.op == "experts" else whole]
    return each
