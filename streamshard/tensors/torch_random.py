"""The numbers that torch draws on a CPU, without torch.

torch's CPU generator is MT19937 (`ATen/core/MT19937RNGEngine.h`), which numpy has too. A uniform
fp32 number takes 24 bits of one draw (`ATen/core/DistributionsHelper.h`), in tensors of any size.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from streamshard.tensors.arrays import Bytes
from streamshard.tensors.dtypes import FLOATS
from streamshard.tensors.lazy import Lazy, Shape, by_elements, check_rows
from streamshard.tensors.rounding import narrow
from streamshard.tensors.workspace import Workspace
from streamshard.values import frozen

__all__ = ["MAX_SEED", "Draws", "Uniform", "Zeros"]


# torch takes 64 bits, of which its CPU generator uses 32.
MAX_SEED = 2**32 - 1

_DIGITS = np.uint64((1 << 24) - 1)
_BLOCK = 1 << 15
_LEAST_STRIDE = 1 << 20
_MOST_STATES = 4096


class Draws:
    """The first `count` 32-bit draws after `torch.manual_seed(seed)`, to be read from any place.

    MT19937 can only go forwards, so its state (2.5 KB) is kept every `stride` draws.
    """

    def __init__(self, seed: int, count: int) -> None:
        self.seed, self.count = seed, count
        self.stride = max(_LEAST_STRIDE, count // _MOST_STATES)
        bits = np.random.MT19937()
        # The seeding of 2002 (init_genrand), which numpy keeps in the older of its interfaces.
        seeded: Any = np.random.RandomState(seed).get_state(legacy=False)
        bits.state = seeded
        self._states = [bits.state]
        for _ in range(self.stride, count, self.stride):
            bits.random_raw(self.stride, output=False)
            self._states.append(bits.state)

    def __repr__(self) -> str:
        """All that the numbers depend on: a plan is told from another one by this."""
        return f"Draws(seed={self.seed})"

    def at(self, place: int) -> np.random.MT19937:
        """A generator whose next draw is number `place`."""
        bits = np.random.MT19937()
        bits.state = self._states[place // self.stride]
        bits.random_raw(place % self.stride, output=False)
        return bits


@frozen
class Uniform(Lazy):
    """fp32 numbers from `-bound` to `bound`, one a draw from number `first` on, rounded to `dtype`."""

    draws: Draws
    first: int
    bound: float
    shape: Shape
    dtype: str

    def take(self, start: int, stop: int) -> Uniform:
        check_rows(self, start, stop)
        first = self.first + start * self.columns
        shape = (stop - start, *self.shape[1:])
        return Uniform(self.draws, first, self.bound, shape, self.dtype)

    def reshape(self, shape: Shape) -> Uniform:
        return Uniform(self.draws, self.first, self.bound, shape, self.dtype)

    def window(
        self, start: int, stop: int, first: int, last: int, out: Bytes, work: Workspace
    ) -> None:
        by_elements(self, (start, stop, first, last), out, work)

    def elements(self, start: int, stop: int, out: Bytes, work: Workspace) -> None:
        bits = self.draws.at(self.first + start)
        # torch computes fma(u, 2 * bound, -bound), u with 24 binary digits: rounded once. In fp64 all
        # digits of the product have their place, so that the cast is the only rounding here too.
        step = np.float64(np.float32(self.bound)) / 2**23
        place = out.view(FLOATS[self.dtype])[None]
        for begin in range(0, place.size, _BLOCK):
            count = min(_BLOCK, place.size - begin)
            whole = (bits.random_raw(count) & _DIGITS).astype(np.float64) - 2.0**23
            values = (whole * step).astype(np.float32)[None]
            narrow(values, self.dtype, place[:, begin : begin + count], np.empty_like(values))


@frozen
class Zeros(Lazy):
    """Zeros, of any dtype."""

    shape: Shape
    dtype: str

    def take(self, start: int, stop: int) -> Zeros:
        check_rows(self, start, stop)
        return Zeros((stop - start, *self.shape[1:]), self.dtype)

    def reshape(self, shape: Shape) -> Zeros:
        return Zeros(shape, self.dtype)

    def window(
        self, start: int, stop: int, first: int, last: int, out: Bytes, work: Workspace
    ) -> None:
        out[:] = 0
