"""Fresh LoRA pairs, and a checkpoint wrapped in them, as `InternVLChatModel.wrap_llm_lora` does.

The random numbers are those of a model that is wrapped after `torch.manual_seed(seed)`, the vision
encoder before the language model, as upstream's constructor and trainer do. PEFT's
`LoraLayer.update_layer` constructs lora_A and lora_B as `nn.Linear`, which initialise themselves,
and then `reset_lora_parameters` initialises A once more and sets B to zero: of three runs of draws
for a pair only the last one counts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from streamshard.errors import InputError, printable
from streamshard.tensor_names import PREFIX
from streamshard.tensors.dtypes import FLOATS
from streamshard.tensors.lazy import Lazy
from streamshard.tensors.torch_random import Draws, Uniform, Zeros

__all__ = ["draws_of_pair", "initial_pair", "initial_pairs", "wrap"]


def draws_of_pair(rank: int, inputs: int, outputs: int) -> int:
    """How many draws the initialisation of one pair takes."""
    return 2 * rank * inputs + rank * outputs


def initial_pair(
    draws: Draws, first: int, rank: int, inputs: int, outputs: int, dtype: str
) -> tuple[Uniform, Zeros]:
    """lora_A (rank, inputs) and lora_B (outputs, rank) whose draws begin with number `first`.

    A is `kaiming_uniform_(a=sqrt(5))`, which is uniform up to `1 / sqrt(inputs)`.
    """
    # In the order of torch's operations: the result is not always 1 / sqrt(inputs) to the last bit.
    bound = math.sqrt(3.0) * (math.sqrt(2.0 / (1 + math.sqrt(5) ** 2)) / math.sqrt(inputs))
    last = first + draws_of_pair(rank, inputs, outputs) - rank * inputs
    return Uniform(draws, last, bound, (rank, inputs), dtype), Zeros((outputs, rank), dtype)


def initial_pairs(
    base: Mapping[str, Lazy], ranks: Mapping[str, int], seed: int
) -> dict[str, tuple[Lazy, Lazy]]:
    """lora_A (r, in) and lora_B (out, r) of every module, in the dtype of its weight.

    `ranks` maps modules to r, in the order in which their numbers are drawn. Raises `InputError`
    for weights that are no matrices of floats.
    """
    for module in ranks:
        W = base[f"{module}.weight"]
        if len(W.shape) != 2 or W.dtype not in FLOATS or not W.nbytes:
            raise InputError(
                f"'{printable(module)}.weight' is {W.dtype} {list(W.shape)}; a matrix of "
                f"{', '.join(FLOATS)} was expected. Use the unquantized checkpoint."
            )
    shapes = [base[f"{module}.weight"].shape for module in ranks]
    counts = [draws_of_pair(r, W[1], W[0]) for r, W in zip(ranks.values(), shapes, strict=True)]
    draws = Draws(seed, sum(counts))
    starts = itertools.accumulate(counts, initial=0)
    pairs: dict[str, tuple[Lazy, Lazy]] = {}
    for (module, r), first in zip(ranks.items(), starts, strict=False):
        W = base[f"{module}.weight"]
        pairs[module] = initial_pair(draws, first, r, W.shape[1], W.shape[0], W.dtype)
    return pairs


def wrap(
    base: Mapping[str, Lazy], pairs: Mapping[str, tuple[Lazy, Lazy]], prefixes: Sequence[str]
) -> dict[str, tuple[Lazy, str]]:
    """The tensors of a wrapped checkpoint (peft >= 0.7), each with the base's it is with.

    `prefixes` are those of the parts of the model that peft wraps, each by itself. Names as in
    `unwrap`, the other way round.
    """
    out: dict[str, tuple[Lazy, str]] = {}
    for name, tensor in base.items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is None:
            out[name] = tensor, name
            continue
        module, _, leaf = name.removeprefix(prefix).rpartition(".")
        stem = f"{prefix}{PREFIX}{module}."
        pair = pairs.get(f"{prefix}{module}")
        if pair is None:
            out[f"{prefix}{PREFIX}{name.removeprefix(prefix)}"] = tensor, name
            continue
        out[f"{stem}base_layer.{leaf}"] = tensor, name
        if leaf == "weight":
            out[f"{stem}lora_A.default.weight"] = pair[0], name
            out[f"{stem}lora_B.default.weight"] = pair[1], name
    return out
