"""The rows that are looked at before a merge: of streams in few places, and never fewer than of files."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from streamshard.disk.sources import Abilities
from streamshard.lora.samples import GAP_NBYTES, samples
from streamshard.tensors.computed import Computed
from streamshard.tensors.lazy import Stored

LAYER = {
    "norm": (896,),
    "down": (896, 4864),
    "gate": (4864, 896),
    "up": (4864, 896),
    "k": (128, 896),
    "o": (896, 896),
    "q": (896, 896),
    "v": (128, 896),
}


def model(layers, files, updated):
    """The updated weights of a model of so many layers, in files of equal size."""
    found = []
    for file in range(files):
        at = 10_000
        for _ in range(layers // files):
            for name, shape in LAYER.items():
                stored = Stored(f"file-{file}", at, shape, "BF16", 1 << 40)
                at += stored.nbytes
                if name in updated:
                    found.append(Computed(stored, (), "BF16", shape))
    return found


def work(*, in_order):
    abilities = Abilities(ranges=True, local=None, in_order=in_order)
    source = SimpleNamespace(abilities=abilities)
    return SimpleNamespace(files=SimpleNamespace(source=lambda path, nbytes: source))


def places(found):
    """How often a stream would have to be opened in each file, in this order."""
    counts, ends = {}, {}
    for piece, start, stop in found:
        path = piece.source.path
        begin = piece.source.offset + start * piece.source.row_nbytes
        if not ends.get(path, -math.inf) <= begin <= ends.get(path, -math.inf) + GAP_NBYTES:
            counts[path] = counts.get(path, 0) + 1
        ends[path] = piece.source.offset + stop * piece.source.row_nbytes
    return counts


def elements(rounds):
    return sum(one.elements for found in rounds for one in found)


@pytest.mark.parametrize(
    ("layers", "files", "updated", "most"),
    [
        (24, 1, "down gate up k o q v", 2),
        (24, 4, "down gate up k o q v", 1),
        (24, 24, "down gate up k o q v", 1),
        (96, 12, "q v", 4),
        (24, 4, "q", 6),
    ],
)
def test_streams_are_opened_in_few_places(layers, files, updated, most):
    pieces = model(layers, files, updated.split())
    spread = samples(pieces, work(in_order=False))
    (placed,) = samples(pieces, work(in_order=True))
    found = places(placed)
    assert len(found) == files
    assert max(found.values()) <= most
    assert elements([placed]) >= elements(spread)
    assert len({id(one.piece) for one in placed}) >= min(16, len(pieces))
    assert elements([placed]) <= 2.5 * elements(spread)


def test_of_files_all_over_the_model():
    pieces = model(24, 4, ["q", "down"])
    rounds = samples(pieces, work(in_order=False))
    assert len(rounds) == 16
    assert {id(one.piece) for found in rounds for one in found} == {id(one) for one in pieces}
    assert all(len({one.piece.source.path for one in found}) == 4 for found in rounds)


def test_rows_are_those_of_the_weights():
    for in_order in (False, True):
        for found in samples(model(24, 2, LAYER.keys() - {"norm"}), work(in_order=in_order)):
            assert all(0 <= one.start < one.stop <= one.piece.rows for one in found)
