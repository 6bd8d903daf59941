"""Which tensor goes into which file: shards, whose headers are known before any byte.

So the place of every byte is known, and so are the index and the size of the whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from streamshard.checkpoint.file_names import SINGLE_NAME, SUFFIX, numbered, written_name
from streamshard.checkpoint.folder import Checkpoint
from streamshard.checkpoint.header import total_nbytes, total_parameters
from streamshard.checkpoint.json_files import json_pieces
from streamshard.checkpoint.new_header import build_header
from streamshard.tensors.lazy import Lazy, Stored
from streamshard.values import frozen

__all__ = ["Shard", "index_pieces", "numbered_anew", "plan_shards", "shard_names"]


def shard_names(tensors: Mapping[str, Lazy], source: Checkpoint) -> dict[str, str]:
    """The file of each tensor: that of its first byte in the source, numbered anew if one is empty."""
    names = {}
    for name, tensor in tensors.items():
        piece: Any = tensor.pieces[0]
        names[name] = Path(getattr(piece, "source", piece).pieces[0].path).name
    return numbered_anew(names, len(source.metadata))


def numbered_anew(names: Mapping[str, str], count: int) -> dict[str, str]:
    """Tensors to files of safetensors, which get new numbers if they are no longer `count`."""
    names = {name: written_name(file) for name, file in names.items()}
    used = sorted(set(names.values()))
    if len(used) == count:
        return names
    total = len(used)
    new = {old: numbered(i, total) for i, old in enumerate(used, 1)}
    return {name: new[file] for name, file in names.items()}


@frozen
class Shard:
    """One output file: its tensors in the order of their bytes, its metadata, its header's length."""

    name: str
    tensors: Mapping[str, Lazy]
    metadata: Mapping[str, str]
    header_nbytes: int

    @property
    def nbytes(self) -> int:
        """Length of the file."""
        return self.header_nbytes + total_nbytes(self.tensors)

    def header(self) -> tuple[bytes, dict[str, int]]:
        """The first bytes of the file, and where each tensor's data begins, in that order.

        Built each time: those of all shards of a large model together have many megabytes.
        """
        return build_header(self.tensors, self.metadata)

    def stored(self, file: Path) -> Iterator[tuple[str, Stored]]:
        """What reading this file at that place will give, tensor by tensor in their order."""
        for name, begin in self.header()[1].items():
            tensor = self.tensors[name]
            yield name, Stored(str(file), begin, tensor.shape, tensor.dtype, self.nbytes)


def plan_shards(
    tensors: Mapping[str, Lazy],
    *,
    shard_of: Mapping[str, str],
    metadata: Mapping[str, Mapping[str, str]],
    max_shard_size: int | None = None,
    single: str = SINGLE_NAME,
) -> list[Shard]:
    """Decide which tensor goes into which file.

    By default files are those of `shard_of` (tensor name to file name) with their `metadata`;
    with `max_shard_size` (bytes) tensors are split anew, in their order, by huggingface_hub. One file
    alone is called `single`.
    """
    files: dict[str, dict[str, Lazy]] = {}
    if max_shard_size is None:
        for name, tensor in tensors.items():
            files.setdefault(shard_of[name], {})[name] = tensor
        if len(files) == 1:
            (only,) = files
            metadata = {single: metadata.get(only, {})}
            files = {single: dict(tensors)}
    else:
        from huggingface_hub import split_state_dict_into_shards_factory

        split = split_state_dict_into_shards_factory(
            dict(tensors),
            get_storage_size=lambda tensor: tensor.nbytes,
            filename_pattern=f"model{{suffix}}{SUFFIX}",
            max_shard_size=max_shard_size,
        )
        files = {
            file: {name: tensors[name] for name in names}
            for file, names in split.filename_to_tensors.items()
        }
        metadata = {}
    shards = []
    for file, members in sorted(files.items()):
        # Loaders up to transformers 4.57 fail without a format.
        entries = {"format": "pt", **metadata.get(file, {})}
        header, begins = build_header(members, entries)
        ordered = {name: members[name] for name in begins}
        shards.append(Shard(file, ordered, entries, len(header)))
    return shards


def index_pieces(shards: Sequence[Shard]) -> Iterator[bytes]:
    """`model.safetensors.index.json` as transformers writes it, in pieces."""
    index = {
        "metadata": {
            "total_parameters": sum(total_parameters(shard.tensors) for shard in shards),
            "total_size": sum(total_nbytes(shard.tensors) for shard in shards),
        },
        "weight_map": {name: shard.name for shard in shards for name in shard.tensors},
    }
    return json_pieces(index, sort_keys=True)
