"""Ragged layout made once on the host: lengths and offsets of consecutive segments.

Ops take a `Segments` instead of finding boundaries on the device, so none of them synchronises.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Segments:
    """Lengths of segments that lie one after another along an axis; zero lengths are legal.

    Raises ValueError for a negative length.

    >>> Segments.of([3, 0, 2]).offsets
    (0, 3, 3, 5)
    """

    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if any(n < 0 for n in self.lengths):
            raise ValueError(f"segment lengths must be >= 0, got {self.lengths}")

    @classmethod
    def of(cls, lengths: Iterable[int]) -> Segments:
        """Build from any iterable of integers."""
        return cls(tuple(int(n) for n in lengths))

    @classmethod
    def from_offsets(cls, offsets: Iterable[int]) -> Segments:
        """Build from the start of each segment and the end of the last.

        Raises ValueError unless they start at 0 and never fall: segments in order, none
        overlapping another.

        >>> Segments.from_offsets([0, 3, 3, 5]).lengths
        (3, 0, 2)
        """
        starts = [int(n) for n in offsets]
        if starts[:1] != [0] or any(a > b for a, b in itertools.pairwise(starts)):
            raise ValueError(f"offsets must start at 0 and never fall, got {starts}")
        return cls(tuple(b - a for a, b in itertools.pairwise(starts)))

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Start of each segment, and the total at the end."""
        return (0, *itertools.accumulate(self.lengths))

    @property
    def total(self) -> int:
        """Sum of all lengths."""
        return self.offsets[-1]

    @cached_property
    def equal_length(self) -> int | None:
        """The common length, or None when lengths differ or there is no segment."""
        first = self.lengths[0] if self.lengths else None
        return first if all(n == first for n in self.lengths) else None

    def repeat(self, times: int) -> Segments:
        """Lay the whole sequence of segments out ``times`` times."""
        return Segments(self.lengths * times)
