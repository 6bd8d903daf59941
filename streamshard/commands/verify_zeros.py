"""Zeros that no trained model has: what a disk gives of pages that it has lost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from streamshard.errors import listed, printable
from streamshard.tensor_names import is_of_tokens
from streamshard.tensors.arrays import Bytes
from streamshard.tensors.lazy import Lazy

__all__ = ["trailing_zeros", "zero_warnings"]


# A page of memory, as of a file that was cut off and extended.
PAGE_NBYTES = 4096


def trailing_zeros(block: Bytes, before: int) -> int:
    """How many bytes at the end are zero, after a block more; `before` were before it.

    >>> trailing_zeros(np.array([0, 7, 0, 0], np.uint8), 5), trailing_zeros(np.zeros(4, np.uint8), 5)
    (2, 9)
    """
    if block[-8:].any():  # as nearly all blocks
        return int(np.argmax(block[: -9 if len(block) > 8 else None : -1] != 0))
    found = np.flatnonzero(block)
    return len(block) - 1 - int(found[-1]) if len(found) else before + len(block)


def zero_warnings(
    headers: Mapping[str, Mapping[str, Lazy]], zeros: Mapping[str, int]
) -> Iterator[str]:
    """Warnings of weights that are nothing but zeros, and of files that end in many of them.

    `headers` are the tensors of each file by the order of their bytes, `zeros` the zero bytes at the
    end of those that were read and have some. Pairs begin with a lora_B of zeros.
    """
    whole = {
        name
        for tensors in headers.values()
        for name, tensor in tensors.items()
        if tensor.nbytes and zeros.get(name) == tensor.nbytes
    }
    odd = [name for name in whole if name.endswith(".weight") and ".lora_" not in name]
    if odd:
        yield (
            f"{listed(sorted(odd))}: all values are zero, as of no trained model: was the file saved or "
            "fetched in part?"
        )
    for file, tensors in headers.items():
        count = 0
        for name in reversed(list(tensors)):
            found, tensor = zeros.get(name, 0), tensors[name]
            # Tables are filled up to a round number of tokens, by whole rows.
            row = tensor.nbytes // max(1, *tensor.shape[:1]) if is_of_tokens(name) else 0
            filled = name not in whole and row > 0 and found % row == 0
            if ".lora_" in name or filled:
                break
            count += found
            if name not in whole:
                break
        if count >= PAGE_NBYTES:
            yield (
                f"{printable(file)}: ends in {count:,} bytes of zeros, as a file does of which the end "
                "was never written: save or fetch it again"
            )
