"""Whether the LoRA pairs of an adapter, or of a wrapped checkpoint, are whole and fit their weights."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from streamshard.checkpoint.file_names import MODEL_CONFIG_NAME
from streamshard.errors import printable
from streamshard.internvl.lora_targets import FLAGS
from streamshard.lora.wrapped_names import Unwrapped
from streamshard.tensors.lazy import Lazy

__all__ = ["flag_problems", "pair_problems", "wrapping_problems"]

_FACTOR = re.compile(r"(.+\.lora_(?:embedding_)?)([AB])((?:\..+)?)")


def pair_problems(tensors: Mapping[str, Lazy]) -> Iterator[str]:
    """What is wrong with the factors among the names: a partner that lacks, or has another rank."""
    for name, tensor in tensors.items():
        match = _FACTOR.fullmatch(name) if ".lora_" in name else None
        if match is None or name.endswith(".bias"):
            continue
        other = tensors.get(f"{match[1]}{'B' if match[2] == 'A' else 'A'}{match[3]}")
        if other is None:
            yield f"'{printable(name)}': the partner (lora_A or lora_B) is missing."
            continue
        matrices = len(tensor.shape) == len(other.shape) == 2 and tensor.nbytes and other.nbytes
        if match[2] == "A" and matrices and tensor.shape[0] != other.shape[1]:
            yield (
                f"'{printable(name)}' has the rank {tensor.shape[0]}, but its lora_B "
                f"{other.shape[1]}: they make no update."
            )


def wrapping_problems(tensors: Mapping[str, Lazy], inside: Unwrapped) -> Iterator[str]:
    """What is wrong with a wrapped checkpoint: no pairs, or updates of another shape than the weight."""
    if not inside.tensors:
        yield (
            "The names are those of a wrapped model, but there are no lora_A and lora_B: the pairs are "
            "lost, or were merged before."
        )
    for module, pair in inside.pairs.items():
        given = inside.base.get(f"{module}.weight")
        shape = () if given is None else tuple(tensors[given].shape)
        made = (*tensors[pair.B].shape[:1], *tensors[pair.A].shape[1:2])
        # Conv1D has its weights the other way round.
        if len(shape) == 2 and made not in (shape, shape[::-1]):
            yield (
                f"'{printable(pair.A)}' and its lora_B make an update of the shape {list(made)}, but "
                f"'{printable(given or module)}' is {list(shape)}."
            )


def flag_problems(tensors: Mapping[str, Lazy], config: Mapping[str, Any]) -> Iterator[str]:
    """Flags by which `InternVLChatModel` wraps a part, whose names in the file are not wrapped."""
    for flag, part in FLAGS.items():
        rank = config.get(flag)
        if rank and not any(part in name and ".lora_" in name for name in tensors):
            yield (
                f"{MODEL_CONFIG_NAME} has {flag}: {printable(str(rank))}, but there are no pairs in "
                f"{part}: a loader would wrap it, and find none of its weights. Write 0 there, if "
                "the updates are merged."
            )
