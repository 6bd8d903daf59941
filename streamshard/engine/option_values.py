"""What options say, as values: sizes and dtypes as people type them."""

from __future__ import annotations

import numbers
import re

from streamshard.errors import UsageError, printable
from streamshard.tensors.dtypes import DTYPES, TORCH_DTYPES
from streamshard.values import frozen

__all__ = ["MAX_WORKERS", "PROCESS_NBYTES", "Part", "check_memory", "check_workers"]
__all__ += ["dtype_option", "parse_size", "part_option", "size_option"]


MAX_WORKERS = 64
PROCESS_NBYTES = 45_000_000
"""Measured: what interpreter and numpy with BLAS take of memory, whatever is done."""
_NO_SIZE = 2**63  # bytes that no system can count
_NO_NUMBER = 1000  # bytes that nobody means

_UNITS = {"": 0, "B": 1}
for _place, _letter in enumerate("KMGT", start=1):
    _UNITS |= {_letter: 1000**_place, f"{_letter}B": 1000**_place, f"{_letter}IB": 1024**_place}

_DTYPE_NAMES = {"keep": "keep", "half": "fp16", "float": "fp32"}
for _option, _name in DTYPES.items():
    _DTYPE_NAMES |= dict.fromkeys((_option, _name.lower(), TORCH_DTYPES[_name]), _option)


def parse_size(size: int | str) -> int:
    """Bytes of "5GB", "500 MB" (decimal) or "1GiB" (binary), in any case; a number is bytes already.

    Text without a unit is refused: people mean gigabytes by it, and programs bytes. So are numbers
    below a thousand, by which nobody means bytes.

    >>> parse_size("1.5GB"), parse_size("1 kib"), parse_size(5_000_000_000)
    (1500000000, 1024, 5000000000)
    """
    count: float = -1
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", size)
        if match is not None and not match[2] and float(match[1]):
            number = match[1]
            raise ValueError(f"{number} has no unit; write {number}GB or {number}MB")
        if match is None or match[2].upper() not in _UNITS:
            raise ValueError(f"{printable(repr(size))} is no size; write it like 5GB or 500MB")
        count = float(match[1]) * _UNITS[match[2].upper()]
    elif isinstance(size, numbers.Real) and not isinstance(size, bool):
        count = int(size) if isinstance(size, numbers.Integral) else float(size)  # also numpy's
    if count >= _NO_SIZE:
        raise ValueError(f"{printable(str(size))} is more than any disk has")
    if not count >= 1:  # NaN is not, either
        raise ValueError(f"{size!r} is no size greater than 0")
    if not isinstance(size, str) and count < _NO_NUMBER:
        raise ValueError(f'{size!r} would be bytes; write "{size}GB" or "{size}MB"')
    return int(count)


def size_option(size: int | str | None, option: str) -> int | None:
    """The bytes that an option says; None where it is not given."""
    if size is None:
        return None
    try:
        return parse_size(size)
    except ValueError as error:
        raise UsageError(f"{option}: {error}") from error


def dtype_option(dtype: object) -> str:
    """The choice of `--dtype` that is meant: torch's names and types are understood too, in any case.

    >>> dtype_option("torch.bfloat16"), dtype_option("Float16"), dtype_option("F32")
    ('bf16', 'fp16', 'fp32')
    """
    known = _DTYPE_NAMES.get(str(dtype).strip().lower().removeprefix("torch."))
    if known is None:
        raise UsageError(
            f"--dtype is {printable(repr(dtype))}; keep, {', '.join(DTYPES)} can be chosen."
        )
    return known


def check_workers(workers: int | None) -> None:
    """Raise `UsageError` for a number of threads that is absurd."""
    if workers is not None and not 1 <= workers <= MAX_WORKERS:
        raise UsageError(f"--workers is {workers}; 1 to {MAX_WORKERS} can be chosen.")


def check_memory(nbytes: int | None) -> None:
    """Raise `UsageError` for less memory than any run takes; how much this one does is known later."""
    if nbytes is not None and nbytes < PROCESS_NBYTES:
        raise UsageError(
            f"--max-memory is {nbytes:,} bytes, but one worker needs {PROCESS_NBYTES:,} at least, and "
            "more for a large model. Allow more, or leave the option out."
        )


@frozen
class Part:
    """Which part of an output is wanted: `number` (from 1) of `count`; number 0 completes it."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}" if self.number else "finish"


def part_option(part: object) -> Part | None:
    """What `--part` says; None if it is not given.

    >>> str(part_option("3/8")), str(part_option("finish"))
    ('3/8', 'finish')
    """
    if part is None:
        return None
    text = str(part).strip()
    if text == "finish":
        return Part(0, 0)
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if match is None:
        raise UsageError(
            f"--part is {printable(repr(part))}; I/N was expected, as 3/8 for the third of eight parts, "
            "or finish."
        )
    number, count = int(match[1]), int(match[2])
    if not 1 <= number <= count:
        hint = " If yours are counted from 0, add 1." if number == 0 < count else ""
        raise UsageError(f"--part is {text}; parts are counted from 1, to {count}.{hint}")
    return Part(number, count)
