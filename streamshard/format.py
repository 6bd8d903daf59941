"""The safetensors file format: reading and building headers, nothing else.

Rules: https://github.com/huggingface/safetensors (README, `Metadata::validate`). A header is
accepted if our own strict reading and the official parser both accept it; what the official
parser lets through against the written rules (duplicate names, a leading space, unknown
fields) is refused.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamshard.errors import InputError, printable
from streamshard.files import reading
from streamshard.tensors import DTYPE_BITS, Lazy, Stored

__all__ = ["Header", "build_header", "json_pieces", "parse_json", "read_header"]

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_RANK = 64
_ORDER = {name: place for place, name in enumerate(DTYPE_BITS)}


@dataclass(frozen=True, slots=True)
class Header:
    """What a file's header says: tensors in the order of their bytes, and the metadata."""

    tensors: dict[str, Stored]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file; no tensor data is read.

    Raises `InputError` if any rule of the format is broken, `ReadError` if the file cannot be
    read.
    """
    with reading(path), path.open("rb") as file:
        file_nbytes = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        if len(prefix) < 8:
            raise _broken(path, f"has only {file_nbytes} bytes; a header needs at least 8")
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER_BYTES:
            raise _broken(path, f"claims a header of {length:,} bytes; 100,000,000 is the limit")
        if length > file_nbytes - 8:
            raise _broken(path, f"claims a header of {length:,} bytes in {file_nbytes:,}")
        text = file.read(length)
    if len(text) != length:
        raise _broken(path, "ends inside its header")
    header = _parse(path, text, 8 + length, file_nbytes)
    _ask_official_parser(path)
    return header


def build_header(
    tensors: Mapping[str, Lazy], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file with these tensors, and where each tensor's data begins.

    Offsets are counted from the first byte of the file. Order, spacing and padding are those
    of the official writer (`prepare` in safetensors/src/tensor.rs): widest dtype first, then by
    name; JSON without spaces or escapes, padded with spaces to a multiple of 8.
    """
    names = sorted(tensors, key=lambda name: (-_ORDER[tensors[name].dtype], name))
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    begins = {}
    for name in names:
        tensor = tensors[name]
        begins[name] = begin
        end = begin + tensor.nbytes
        entries[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise InputError(f"a header of {len(text):,} bytes is over the format's limit; re-shard.")
    first = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {n: first + at for n, at in begins.items()}


def parse_json(text: bytes, where: str) -> Any:
    """JSON of an untrusted file; raises `InputError` for what is no strict, plain JSON.

    Duplicate keys, NaN, absurd numbers and absurd nesting are refused.
    """
    try:
        decoded = text.decode()
        del text  # an index has megabytes
        return json.loads(
            decoded,
            object_pairs_hook=_unique,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: is not UTF-8 (byte {error.start:,}).") from error
    except RecursionError as error:
        raise InputError(f"{where}: is nested too deeply.") from error
    except ValueError as error:
        raise InputError(f"{where}: is not valid JSON: {printable(str(error))}.") from error


def json_pieces(content: Mapping[str, Any], *, sort_keys: bool = False) -> Iterator[bytes]:
    """JSON as this package writes it into output folders, some KB at a time.

    Indexes and reports of large models have megabytes, and several times that in Python's encoder.
    """
    encoder = json.JSONEncoder(indent=2, ensure_ascii=False, allow_nan=False, sort_keys=sort_keys)
    tokens = encoder.iterencode(content)
    while text := "".join(itertools.islice(tokens, 4096)):
        # A path that is not UTF-8 has surrogates, which this turns into JSON's own escapes.
        yield text.encode(errors="backslashreplace")
    yield b"\n"


def _parse(path: Path, text: bytes, data_start: int, file_nbytes: int) -> Header:
    if not text.startswith(b"{"):
        raise _broken(path, "has a header that does not begin with '{'")
    if not text.rstrip(b" ").endswith(b"}"):
        raise _broken(path, "has a header that does not end with '}' and spaces")
    entries = parse_json(text, f"{printable(str(path))}: the header")
    metadata = entries.pop("__metadata__", None)
    if metadata is None:
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _broken(path, "has __metadata__ that does not map names to strings")
    parsed = []
    where = str(path)
    for name, entry in entries.items():
        dtype, shape, begin, end = _check_entry(path, name, entry)
        parsed.append((begin, end, name, dtype, shape))
    parsed.sort(key=lambda item: item[:2])
    reached = 0
    tensors = {}
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}  # one of each, as few differ
    for begin, end, name, dtype, shape in parsed:
        if begin != reached:
            problem = "overlaps the one before it" if begin < reached else "leaves a hole before it"
            raise _broken(path, f"{problem}: begins at {begin:,}, not at {reached:,}", name)
        reached = end
        kept = shapes.setdefault(shape, shape)
        # Most names are in source and reference alike: interned, they are in memory once.
        place = sys.intern(name)
        tensors[place] = Stored(where, data_start + begin, kept, dtype, file_nbytes)
    if data_start + reached != file_nbytes:
        raise _broken(
            path,
            f"has {file_nbytes:,} bytes but its header describes {data_start + reached:,}; "
            "it is truncated or has something appended",
        )
    return Header(tensors, metadata)


def _check_entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _broken(path, "must have just dtype, shape and data_offsets", name)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _broken(path, f"has the unknown dtype {printable(str(dtype))!r}", name)
    if not isinstance(shape, list) or not all(_is_size(n) for n in shape):
        raise _broken(path, "has a shape that is no list of sizes", name)
    if len(shape) > MAX_RANK:
        raise _broken(path, f"has {len(shape)} dimensions; {MAX_RANK} is the limit here", name)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise _broken(path, "has data_offsets that are not two sizes", name)
    # The format multiplies in 64 bits from left to right: an overflow on the way counts even if a
    # later dimension is 0.
    elements = 1
    for size in shape:
        elements *= size
        if elements >= 2**64:
            raise _broken(path, "has a shape whose product overflows 64 bits", name)
    bits = elements * DTYPE_BITS[dtype]
    if bits >= 2**64 or bits % 8:
        raise _broken(path, f"has a size of {bits} bits, which is no whole number of bytes", name)
    if offsets[1] - offsets[0] != bits // 8:
        found = offsets[1] - offsets[0]
        raise _broken(
            path, f"is {bits // 8:,} bytes by shape and dtype but {found:,} by offsets", name
        )
    # The table's own string: one for all tensors.
    return sys.intern(dtype), tuple(shape), offsets[0], offsets[1]


def _ask_official_parser(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        raise _broken(path, f"is refused by safetensors: {printable(str(error))}") from error
    except OSError as error:
        raise _broken(path, f"cannot be opened: {error}") from error


def _broken(path: Path, problem: str, name: str | None = None) -> InputError:
    tensor = "" if name is None else f"tensor '{printable(name)}' "
    return InputError(
        f"{printable(str(path))}: {tensor}{problem}. "
        "The file is damaged or not a safetensors file: fetch or save it again."
    )


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**64


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} occurs twice")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text} is too large")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"the constant {name} is not JSON")


def total_nbytes(tensors: Mapping[str, Lazy]) -> int:
    """Bytes of tensor data, headers not counted."""
    return sum(tensor.nbytes for tensor in tensors.values())


def total_parameters(tensors: Mapping[str, Lazy]) -> int:
    """Number of elements."""
    return sum(math.prod(tensor.shape) for tensor in tensors.values())
