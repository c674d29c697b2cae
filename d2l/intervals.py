"""Confidence intervals of a proportion."""

from __future__ import annotations

import math


def wilson(successes: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Return Wilson's score interval (low, high) for `successes` out of `n`; (0, 1) for n = 0.

    `z` is the normal quantile, 95 % two-sided unless told.  The interval never leaves [0, 1] and
    stays informative at 0 and n successes, where the usual +- one collapses to a point.

    >>> tuple(round(x, 3) for x in wilson(0, 200))
    (0.0, 0.019)
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes must lie between 0 and n={n}, got {successes}")
    if n == 0:
        return 0.0, 1.0
    share, z2 = successes / n, z * z
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high
