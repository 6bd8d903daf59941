"""Headers of the safetensors file format, read and judged.

Rules: https://github.com/huggingface/safetensors (README, `Metadata::validate`). A header is
accepted if our own strict reading and the official parser both accept it (which is not asked about
what the official writer writes); what the official parser lets through against the written rules
(duplicate names, a leading space, unknown fields) is refused.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from streamshard.checkpoint.json_files import parse_prefix, parse_small
from streamshard.checkpoint.new_header import MAX_TENSORS, PREFIX_NBYTES, header_pieces
from streamshard.checkpoint.other_kinds import check_beginning
from streamshard.disk.far import far_at
from streamshard.disk.files import open_source
from streamshard.disk.sources import Source
from streamshard.disk.system import reading, system
from streamshard.errors import InputError, printable
from streamshard.tensors.dtypes import DTYPE_BITS, NUMPY
from streamshard.tensors.lazy import Lazy, Stored
from streamshard.values import frozen

__all__ = [
    "MAX_NAME_BYTES",
    "Header",
    "data_start",
    "header_text",
    "parse_header",
    "read_header",
    "total_nbytes",
    "total_parameters",
]


MAX_HEADER_BYTES = 100_000_000  # the format's own limit
# Limits of ours. They bound time and memory, and are far from real files: the largest InternVL has
# 40,000 tensors in all its files, and names of 120 bytes.
MAX_RANK = 64
MAX_NAME_BYTES = 1024
MAX_METADATA_BYTES = 1_000_000

_FIELDS = {"dtype", "shape", "data_offsets"}
# Repetitions are bounded, so that a match that fails has not cost more than the limits above.
_NAME = re.compile(
    rb'[ \t\n\r]*"([^"\\\x00-\x1f]{0,1025}(?:\\[^\x00-\x1f][^"\\\x00-\x1f]{0,1025}){0,513})"'
    rb"[ \t\n\r]*:[ \t\n\r]*"
)
_BODY = re.compile(rb"\{[^{}]{0,4096}\}")
_NEXT = re.compile(rb"[ \t\n\r]*([,}])")
_OLDEST = {*NUMPY, "BF16"}


@frozen
class Header:
    """What a file's header says: tensors in the order of their bytes, and the metadata."""

    tensors: dict[str, Stored]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file; no tensor data is read.

    Raises `InputError` if any rule of the format is broken, `ReadError` if the file cannot be
    read.
    """
    text, file_nbytes = header_text(path)
    header = parse_header(path, text, file_nbytes)
    if not _is_as_written(header, text):
        del text  # it is mapped once more
        _ask_official_parser(path)
    return header


def _is_as_written(header: Header, text: bytes) -> bool:
    """Whether a header is, byte for byte, what the official writer writes, and its parser reads.

    To say so itself that takes 1 KB of memory a tensor, many times what is kept here. It is asked about
    dtypes that came later: not every release knows them.
    """
    if not {tensor.dtype for tensor in header.tensors.values()} <= _OLDEST:
        return False
    at = 0
    for piece in header_pieces(header.tensors, header.metadata):
        if not text.startswith(piece, at):
            return False
        at += len(piece)
    return not text[at:].strip(b" ")


def data_start(file: Source) -> int:
    """Where the tensors' bytes begin in a file, as its first bytes say, which nobody has checked."""
    return PREFIX_NBYTES + int.from_bytes(file.read(0, PREFIX_NBYTES), "little")


def header_text(path: Path) -> tuple[bytes, int]:
    """The JSON of a file's header, not yet looked at, and the size of the file."""
    with open_source(path) as file:
        file_nbytes = file.nbytes
        if file_nbytes < PREFIX_NBYTES:
            raise _broken(path, f"has only {file_nbytes} bytes; a header needs at least 8")
        check_beginning(path, file.read(0, 64), b"\x08\0\0\0\0\0\0\0{}")
        length = data_start(file) - PREFIX_NBYTES
        if length > MAX_HEADER_BYTES:
            raise _broken(path, f"claims a header of {length:,} bytes; 100,000,000 is the limit")
        if length > file_nbytes - PREFIX_NBYTES:
            raise _broken(path, f"claims a header of {length:,} bytes in {file_nbytes:,}")
        text = file.read(PREFIX_NBYTES, length)
    if len(text) != length:
        raise _broken(path, "ends inside its header")
    return text, file_nbytes


def parse_header(path: Path, text: bytes, file_nbytes: int) -> Header:
    """What the JSON of a header says, by our own rules alone; raises `InputError`.

    Entry by entry, so that neither time nor memory depends on what a hostile header nests or
    repeats; each entry is small, and what the first wrong one costs is all that is spent.
    """
    start = PREFIX_NBYTES + len(text)
    metadata: dict[str, str] | None = None
    tensors: dict[str, Stored] = {}
    where = str(path)
    shapes: dict[tuple[int, ...], tuple[int, ...]] = {}  # one of each, as few differ
    reached, in_order = start, True
    for name, value in _entries(path, text):
        if name in tensors or (name == "__metadata__" and metadata is not None):
            raise _broken(path, f"has a header in which {printable(name)!r} occurs twice")
        if name == "__metadata__":
            metadata = _checked_metadata(path, value)
            continue
        if len(tensors) == MAX_TENSORS:
            raise _broken(path, f"has more than {MAX_TENSORS:,} tensors, the limit here")
        dtype, shape, begin, end = _check_entry(path, name, value)
        in_order = in_order and start + begin == reached
        reached = start + end
        # Most names are in source and reference alike: interned, they are in memory once.
        tensors[sys.intern(name)] = Stored(
            where, start + begin, shapes.setdefault(shape, shape), dtype, file_nbytes
        )
    if not in_order:
        tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
        reached = start
        for name, tensor in tensors.items():
            begin = tensor.offset
            if begin != reached:
                problem = (
                    "overlaps the one before it" if begin < reached else "leaves a hole before it"
                )
                at = f"begins at {begin - start:,}, not at {reached - start:,}"
                raise _broken(path, f"{problem}: {at}", name)
            reached += tensor.nbytes
    if reached != file_nbytes:
        raise _broken(
            path,
            f"has {file_nbytes:,} bytes but its header describes {reached:,}; "
            "it is truncated or has something appended",
        )
    return Header(tensors, metadata or {})


def _entries(path: Path, text: bytes) -> Iterator[tuple[str, Any]]:
    """The names of a header, each with its value."""
    if not text.startswith(b"{"):
        raise _broken(path, "has a header that does not begin with '{'")
    at, mark = 1, b","
    if (empty := _NEXT.match(text, at)) and empty[1] == b"}":
        at, mark = empty.end(), b"}"
    while mark == b",":
        match = _NAME.match(text, at)
        if match is None:
            raise _not_json(path, at, "a name in quotes was expected, or it is too long")
        name = _decoded(path, match[1], at)
        body = _BODY.match(text, match.end())
        at = match.end() if body is None or name == "__metadata__" else body.end()
        value: Any = None
        try:
            if name == "__metadata__":
                value, at = parse_prefix(text, at, MAX_METADATA_BYTES)
            elif body is not None:
                value = parse_small(body[0])
        except ValueError as error:
            problem = f"is not described by JSON as the format has it: {printable(str(error))}"
            raise _broken(path, problem, name) from error
        yield name, value
        following = _NEXT.match(text, at)
        if following is None:
            raise _not_json(path, at, "',' or '}' was expected")
        at, mark = following.end(), following[1]
    if any(text[start : start + 65536].strip(b" ") for start in range(at, len(text), 65536)):
        raise _broken(path, "has a header whose JSON does not end with '}' and spaces")


def _decoded(path: Path, literal: bytes, at: int) -> str:
    """A name as a JSON string has it, quotes left out."""
    if len(literal) > MAX_NAME_BYTES:
        raise _broken(path, f"has a name of more than {MAX_NAME_BYTES:,} bytes, the limit here")
    try:
        if b"\\" not in literal:
            return literal.decode()
        name, _ = parse_prefix(b'"%s"' % literal, 0, len(literal) + 2)
    except UnicodeDecodeError as error:
        raise _not_json(path, at + error.start, "it is not UTF-8") from error
    except ValueError as error:
        raise _not_json(path, at, str(error)) from error
    return str(name)


def _checked_metadata(path: Path, metadata: Any) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _broken(path, "has __metadata__ that does not map names to strings")
    return metadata


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and entry.keys() == _FIELDS


def _check_entry(path: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    if not _is_entry(entry):
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

    # It needs a file of this machine; what stands for one of another has at least its header.
    elsewhere = far_at(path)
    local = path if elsewhere is None else elsewhere.local() or path
    try:
        with (
            reading(path),
            system.by_library(local, lambda file: safe_open(file, framework="np")),
        ):
            pass
    except SafetensorError as error:
        raise _broken(path, f"is refused by safetensors: {printable(str(error))}") from error


def _broken(path: Path, problem: str, name: str | None = None) -> InputError:
    tensor = "" if name is None else f"tensor '{printable(name)}' "
    return InputError.at(
        path,
        f"{tensor}{problem}. "
        "The file is damaged or not a safetensors file: fetch or save it again.",
    )


def _not_json(path: Path, at: int, problem: str) -> InputError:
    return _broken(
        path,
        f"has a header that is not JSON as the format has it, near byte {PREFIX_NBYTES + at:,}: "
        f"{printable(problem)}",
    )


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**64


def total_nbytes(tensors: Mapping[str, Lazy]) -> int:
    """Bytes of tensor data, headers not counted."""
    return sum(tensor.nbytes for tensor in tensors.values())


def total_parameters(tensors: Mapping[str, Lazy]) -> int:
    """Number of elements."""
    return sum(math.prod(tensor.shape) for tensor in tensors.values())
