"""Headers of the safetensors file format as they are written, byte for byte as the official writer's."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping

from streamshard.errors import InputError
from streamshard.tensors.dtypes import DTYPE_BITS
from streamshard.tensors.lazy import Lazy

__all__ = ["MAX_TENSORS", "PREFIX_NBYTES", "build_header", "framed", "header_pieces"]


PREFIX_NBYTES = 8  # the length of the JSON, before it
# A limit of ours, far from real files: the largest InternVL has 40,000 tensors in all its files.
MAX_TENSORS = 100_000
# What the hub's parser reads; what is written shall be read by both.
MAX_WRITTEN_HEADER_BYTES = 25_000_000

_COMPACT = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False)
_ORDER = {name: place for place, name in enumerate(DTYPE_BITS)}


def build_header(
    tensors: Mapping[str, Lazy], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The first bytes of a file with these tensors, and where each tensor's data begins.

    Offsets are counted from the first byte of the file. Order, spacing and padding are those
    of the official writer (`prepare` in safetensors/src/tensor.rs): widest dtype first, then by
    name; JSON without spaces or escapes, padded with spaces to a multiple of 8.
    """
    names = sorted(tensors, key=lambda name: (-_ORDER[tensors[name].dtype], name))
    ordered = {name: tensors[name] for name in names}
    # Entry by entry: all of them as objects would take many times the bytes of the text.
    file = io.BytesIO()
    file.write(bytes(PREFIX_NBYTES))
    for piece in header_pieces(ordered, metadata):
        file.write(piece)
    file.write(b" " * (-file.tell() % 8))
    nbytes = file.tell() - PREFIX_NBYTES
    if nbytes > MAX_WRITTEN_HEADER_BYTES or len(tensors) > MAX_TENSORS:
        raise InputError(
            f"a file of {len(tensors):,} tensors would have a header of {nbytes:,} bytes; not every "
            f"reader takes more than {MAX_WRITTEN_HEADER_BYTES:,} bytes, or {MAX_TENSORS:,} tensors. "
            "Choose a smaller --max-shard-size."
        )
    file.seek(0)
    file.write(nbytes.to_bytes(PREFIX_NBYTES, "little"))
    begins, begin = {}, PREFIX_NBYTES + nbytes
    for name, tensor in ordered.items():
        begins[name] = begin
        begin += tensor.nbytes
    return file.getvalue(), begins


def header_pieces(tensors: Mapping[str, Lazy], metadata: Mapping[str, str]) -> Iterator[bytes]:
    """The JSON of a header as the official writer has it, for tensors that follow each other."""
    mark, begin = b"{", 0
    if metadata:
        yield b'{"__metadata__":%s' % _COMPACT.encode(dict(metadata)).encode()
        mark = b","
    for name, tensor in tensors.items():
        shape, end = ",".join(map(str, tensor.shape)), begin + tensor.nbytes
        entry = f'"dtype":"{tensor.dtype}","shape":[{shape}],"data_offsets":[{begin},{end}]'
        yield b"%s%s:{%s}" % (mark, _COMPACT.encode(name).encode(), entry.encode())
        mark, begin = b",", end
    yield b"}" if mark == b"," else b"{}"


def framed(text: bytes) -> bytes:
    """The JSON of a header as a file begins with it: its length, and then itself."""
    return len(text).to_bytes(PREFIX_NBYTES, "little") + text
