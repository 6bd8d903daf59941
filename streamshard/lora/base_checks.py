"""Bases that must not be merged into: quantized, wrapped, or with the update in them already."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from streamshard.errors import AdapterError, InputError, argument, listed
from streamshard.lora.samples import samples
from streamshard.tensor_names import PREFIX, factors_among, is_wrapped
from streamshard.tensors.arrays import Float32, Float64
from streamshard.tensors.computed import Computed
from streamshard.tensors.dtypes import FLOATS
from streamshard.tensors.lazy import Lazy, NotFiniteError, read_float32
from streamshard.tensors.workspace import Workspace

__all__ = ["check_base", "check_not_merged", "projection", "quantization_keys"]


_QUANTIZED = re.compile(
    r".*\.(?:qweight|qzeros|scales|g_idx|SCB|absmax|quant_state\..+|weight_scale(?:_inv)?|"
    r"weight_packed|weight_format|(?:.+_)?(?:blocks|scales))"
)

SPAN_ELEMENTS = 128 * 1024  # looked at at a time
# Of so many tensors, and a noise below that, a base that is clearly clean is told.
CLEAR_TENSORS, CLEAR_NOISE = 16, 0.02


def check_not_merged(where: str, tensors: Iterable[Lazy], work: Workspace) -> None:
    """Refuse a base that seems to hold the updates of an adapter already.

    A clean base has no more than noise of an update in it; after a merge every tensor has it once.
    `tensors` are those that an adapter updates, by itself and with weight 1; `where` is what
    messages call it. Raises `AdapterError`.
    """
    found, noise, typical = projection(tensors, work)
    times = round(found) if math.isfinite(found) else 0
    if times >= 1 and abs(found - times) < 0.15 and noise < 0.1 and abs(typical - times) < 0.3:
        raise AdapterError(
            f"{where}: the base seems to have this update in it already ({found:.2f} "
            f"times, by the projection of the weights on it, with noise of about {noise:.2g}): merging "
            "would add it once more. Give the base that the adapter was trained on; if you are sure "
            "that this is it, pass --allow-merged-base."
        )


def projection(tensors: Iterable[Lazy], work: Workspace) -> tuple[float, float, float]:
    """`<W, D> / <D, D>` over a sample of rows, `D` the updates, and its deviation for an unrelated W.

    The deviation is that of independent elements: `|W| / (sqrt(n) |D|)`. The third number is the
    median over the tensors: a large update of a few must not speak for all.
    """
    pieces = [
        piece
        for tensor in tensors
        for piece in tensor.pieces
        if isinstance(piece, Computed) and piece.terms and piece.magnitude is None
    ]
    sums = np.zeros(3)
    each: list[float] = []
    count = 0
    for chosen in samples(pieces, work) if pieces else ():
        for piece, start, stop in chosen:
            own = np.zeros(3)
            for W, D in _tiles(piece, start, stop, work):
                weight, update = _wide("weight", W, work), _wide("update", D, work)
                pairs = (weight, update), (weight, weight), (update, update)
                own += [np.einsum("i,i->", *pair) for pair in pairs]
                count += W.size
            if own[2]:
                each.append(own[0] / own[2])
            sums += own
            work.forget()
        if len(each) >= CLEAR_TENSORS and sums[0] < sums[2] / 2:
            noise = math.sqrt(sums[1] / sums[2] / count)
            if noise < CLEAR_NOISE:
                break
    if not each:
        return 0.0, math.inf, 0.0
    both, weights, updates = map(float, sums)
    return both / updates, math.sqrt(weights / updates / count), float(np.median(each))


def _wide(name: str, values: Float32, work: Workspace) -> Float64:
    """The elements in fp64, in a buffer of this name."""
    found = work.bytes(name, values.size * 8).view(np.float64)
    np.copyto(found.reshape(values.shape), values)
    return found


def _tiles(
    piece: Computed, start: int, stop: int, work: Workspace
) -> Iterator[tuple[Float32, Float32]]:
    step = max(SPAN_ELEMENTS // max(piece.columns, 1), 1)
    for row in range(start, stop, step):
        end = min(row + step, stop)
        with contextlib.suppress(NotFiniteError):  # told when it is merged
            update = piece.update(row, end, 0, piece.columns, work)
            yield read_float32(piece.source, row, end, work), update


def quantization_keys(config: Mapping[str, Any]) -> Iterator[str]:
    """Where a config says that weights are quantized: at its top, or for a part of the model."""
    if config.get("quantization_config"):
        yield "quantization_config"
    for part, inner in config.items():
        if isinstance(inner, dict):
            yield from (f"{part}.{key}" for key in quantization_keys(inner))


def check_base(
    base: Mapping[str, Lazy],
    config: Mapping[str, Any] | None,
    where: str,
    goal: str = "merged into",
) -> None:
    """Raise `InputError` if a checkpoint is quantized or wrapped by PEFT, and so cannot be `goal`."""
    quantized = [name for name in base if _QUANTIZED.fullmatch(name)]
    key = next(quantization_keys(config or {}), None)
    if key is not None and not quantized:
        quantized = [n for n, t in base.items() if len(t.shape) > 1 and t.dtype not in FLOATS]
        if not quantized:
            kinds = ", ".join(sorted({tensor.dtype for tensor in base.values()}))
            raise InputError(
                f"{where}: its config.json has a {key}, but its weights are not quantized ({kinds}): it "
                "is left over. Loaders would quantize, or fail: remove that key from config.json and "
                "try again."
            )
    if quantized:
        raise InputError(
            f"{where}: is quantized: it has {listed(quantized, 3)}. What is quantized cannot be {goal} "
            "without a further loss: use the unquantized checkpoint."
        )
    wrapped = factors_among(base)
    if wrapped:
        raise InputError(
            f"{where}: is a LoRA-wrapped training checkpoint: it has {listed(wrapped, 1)}. "
            + (
                f"Merge its pairs first, and convert the result: `merge-lora {argument(where)}`."
                if goal == "converted"
                else "Use the checkpoint that the training started from, or merge its own pairs: "
                f"`merge-lora {argument(where)}`."
            )
        )
    named = [name for name in base if is_wrapped([name])]
    if len(named) < len(base):  # a model may have a part that is called base_model
        named = [name for name in named if is_wrapped([name.removeprefix(PREFIX)])]
    if named:
        raise InputError(
            f"{where}: its names are those of a model that PEFT has wrapped, as {listed(named, 2)}, but "
            "it has no lora_A and lora_B: they are lost, or were merged before, and nothing says which. "
            "Save the model itself (`get_base_model()` or `merge_and_unload()` of PEFT)."
        )
