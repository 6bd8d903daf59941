"""What is said of a step while it goes on, in a terminal of any width or in a log: pure text."""

from __future__ import annotations

from streamshard.cli.terminal_text import shortened, width
from streamshard.values import frozen

__all__ = ["State"]


_UNITS = ("B", "KB", "MB", "GB", "TB", "PB")
_FEWEST, _MOST = 6, 30  # columns of a bar


@frozen
class State:
    """How far a step is: `done` of `total` bytes, of which `before` were done when it began."""

    what: str
    total: int
    done: int
    before: int
    seconds: float
    name: str = ""

    @property
    def is_done(self) -> bool:
        """Whether nothing is left."""
        return self.done >= self.total

    def line(self, columns: int, *, plain: bool = False) -> str:
        """One line that is shorter than the terminal: bytes, rate and time are always there.

        Where there is room also what is done, a bar, and the end of the tensor's name. `plain` takes
        ASCII only.
        """
        room = max(columns - 1, 1)  # a letter in the last column may move the cursor
        facts = [self._bytes(), self._rate(), self._time()]
        head = f"{self.what} {self._percent():3d}%"
        bare = [fact.strip().removesuffix(" left").removeprefix("in ") for fact in facts]
        fixed, gap, left = "", "  ", -1
        # No more is left out than must be.
        for gap, parts in (("  ", [head, *facts]), (" ", [head, *facts]), (" ", bare)):
            fixed = gap.join(parts)
            left = room - len(fixed) - len(gap)
            if len(fixed) <= room:
                break
        if left < _FEWEST or parts == bare:
            return fixed[:room]
        quarter = min(left // 4, _MOST)  # the rest is for the name
        bar = self._bar(quarter if quarter >= _FEWEST else left, plain=plain)
        text = gap.join([head, bar, *facts])
        name = "" if self.is_done else self.name
        name = shortened(name, room - width(text) - len(gap), "..." if plain else "…")
        return f"{text}{gap}{name}" if name else text

    def log_line(self) -> str:
        """The line for a log."""
        if self.done <= self.before:
            there = f", {_size(self.before)} of that are done" if self.before else ""
            return f"{self.what}: {_size(self.total)}{there}"
        facts = f"{self._bytes().strip()}, {self._rate().strip()}, {self._time().strip()}"
        return f"{self.what}: {self._percent()}%, {facts}"

    def _percent(self) -> int:
        return min(int(100 * self.done / self.total), 100) if self.total else 100

    def _bytes(self) -> str:
        """Like 7.2/15.9 GB, both in the unit of the total."""
        unit = _unit(self.total)
        total = _number(self.total / 1000**unit) if unit else str(self.total)
        places = len(total.partition(".")[2])
        done = f"{min(self.done, self.total) / 1000**unit:.{places}f}"
        return f"{done:>{len(total)}}/{total} {_UNITS[unit]}"

    def _speed(self) -> float:
        return (self.done - self.before) / self.seconds if self.seconds > 1e-3 else 0

    def _rate(self) -> str:
        speed = self._speed()
        return f"{_size(speed) if speed else '-- B':>7}/s"

    def _time(self) -> str:
        if self.is_done:
            return f"in {_clock(self.seconds)}"
        speed = self._speed()
        left = _clock((self.total - self.done) / speed) if speed else "-:--"
        return f"{left:>5} left"

    def _bar(self, columns: int, *, plain: bool) -> str:
        full = columns if not self.total else min(columns * self.done // self.total, columns)
        return ("#" if plain else "█") * full + ("." if plain else "░") * (columns - full)


def _unit(count: float) -> int:
    unit = 0
    while count >= 999.5 and unit < len(_UNITS) - 1:
        count /= 1000
        unit += 1
    return unit


def _number(value: float) -> str:
    """Three digits.

    >>> _number(9.994), _number(9.996), _number(99.96), _number(999.4)
    ('9.99', '10.0', '100', '999')
    """
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}"


def _size(count: float) -> str:
    unit = _unit(count)
    return f"{_number(count / 1000**unit) if unit else round(count)} {_UNITS[unit]}"


def _clock(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> _clock(8.4), _clock(754), _clock(3723)
    ('0:08', '12:34', '1:02:03')
    """
    minutes, rest = divmod(round(min(seconds, 360_000)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
