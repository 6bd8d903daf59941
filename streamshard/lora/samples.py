"""Which rows of weights are looked at to tell whether an update is in them already.

Of files on this machine some rows of weights all over the model. Of a file that is best read in order,
as one that comes over a network, each jump is another request: there as many elements are taken in few
places of each file, from each place on as they follow each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from streamshard.tensors.computed import Computed
from streamshard.tensors.workspace import Workspace

__all__ = ["Sample", "samples"]

# Elements of the base that are looked at, some rows from each tensor, and tensors.
SAMPLE_ELEMENTS = 32_000_000
SAMPLE_ROWS = 128
SAMPLE_TENSORS = 512
# All over the model in so many rounds, and of each tensor so many rows in one: of a base that is clearly
# clean few rounds tell.
ROUNDS = 8
ROUND_ROWS = 64
# Tensors that are seen at least, in places, where places are few.
PLACED_TENSORS = 16
# What lies between two weights of a place is read over.
GAP_NBYTES = 512 * 1024


class Sample(NamedTuple):
    """Some rows of a weight."""

    piece: Computed
    start: int
    stop: int

    @property
    def elements(self) -> int:
        """How many these are."""
        return (self.stop - self.start) * self.piece.columns


class _At(NamedTuple):
    """A weight where it is stored."""

    path: str
    begin: int
    end: int
    piece: Computed


def samples(pieces: Sequence[Computed], work: Workspace) -> list[list[Sample]]:
    """The rows to look at, in rounds; after each of these enough may be known."""
    spread = _spread(pieces)
    stored = sorted(map(_stored, pieces), key=lambda one: one[:2])
    if any(_is_in_order(one, work) for one in {one.path: one.piece for one in stored}.values()):
        return [_placed(stored, spread)]
    return [
        [*_rows(spread[first::ROUNDS], row)]
        for row in range(0, SAMPLE_ROWS, ROUND_ROWS)
        for first in range(ROUNDS)
    ]


def _rows(spread: Sequence[Sample], first: int) -> Iterator[Sample]:
    """The rows of one round, from the `first` of each sample on."""
    for piece, start, stop in spread:
        if start + first < stop:
            yield Sample(piece, start + first, min(start + first + ROUND_ROWS, stop))


def _spread(pieces: Sequence[Computed]) -> list[Sample]:
    """Some rows in the middle of weights all over the model."""
    sizes = [min(SAMPLE_ROWS, piece.rows) * piece.columns for piece in pieces]
    step = max(-(-sum(sizes) // SAMPLE_ELEMENTS), -(-len(pieces) // SAMPLE_TENSORS), 1)
    found = []
    for piece in pieces[::step]:
        start = piece.rows // SAMPLE_ROWS // 2 * SAMPLE_ROWS
        found.append(Sample(piece, start, min(start + SAMPLE_ROWS, piece.rows)))
    return found


def _placed(stored: Sequence[_At], spread: Sequence[Sample]) -> list[Sample]:
    """At least as many elements in few places, the same number of them in each file."""
    enough = sum(one.elements for one in spread)
    files: dict[str, list[_At]] = {}
    for one in stored:
        files.setdefault(one.path, []).append(one)
    tensors = min(PLACED_TENSORS, len(stored))
    for places in range(1, max(map(len, files.values())) + 1):
        begun = [part for pieces in files.values() for part in _divided(pieces, places)]
        for most in (enough, 2 * enough):  # some places have fewer than is theirs
            found = [one for part in begun for one in _from(part, -(-most // len(begun)))]
            if sum(one.elements for one in found) >= enough and len(found) >= tensors:
                return found
    return [*spread]


def _divided(stored: Sequence[_At], parts: int) -> Iterator[Sequence[_At]]:
    parts = min(parts, len(stored))
    for part in range(parts):
        yield stored[len(stored) * part // parts : len(stored) * (part + 1) // parts]


def _from(stored: Sequence[_At], most: int) -> Iterator[Sample]:
    """Up to `most` elements, at least a row, as they follow each other in a file."""
    end = stored[0].begin
    for one in stored:
        rows = most // max(one.piece.columns, 1)
        if one is stored[0]:
            rows = max(rows, 1)
        elif rows < 1 or one.begin > end + GAP_NBYTES:
            return
        yield Sample(one.piece, 0, min(rows, one.piece.rows))
        if rows < one.piece.rows:
            return
        most -= one.piece.rows * one.piece.columns
        end = one.end


def _stored(piece: Computed) -> _At:
    found = [one.tensor for one in piece.source.inputs()]
    if not found:
        return _At("", 0, 0, piece)
    path = found[0].path
    mine = [one for one in found if one.path == path]
    end = max(one.offset + one.nbytes for one in mine)
    return _At(path, min(one.offset for one in mine), end, piece)


def _is_in_order(piece: Computed, work: Workspace) -> bool:
    """Whether a file that it is made of is best read from its beginning to its end."""
    return any(
        work.files.source(one.tensor.path, one.tensor.file_nbytes).abilities.in_order
        for one in piece.source.inputs()
    )
