"""How the weight of a loss rises within a round."""

import math


def ramp_value(name: str, t: float, start: float = 0.0, end: float = 1.0) -> float:
    """Return the factor in [0, 1] by which a weight counts at progress t.

    Every ramp is 0 before `start` and 1 from `end` on. With x = (t - start) / (end - start),
    `linear` is x and `sigmoid` is exp(-5 (1 - x)^2) in between; `constant` is 1 from `start` on.

    Args:
        name: "constant", "linear" or "sigmoid".
        t: Progress within the round, a fraction.
        start: Where the ramp begins, a fraction of the round.
        end: Where it is complete, a fraction of the round.

    Raises:
        ValueError: The name is unknown, or not 0 <= start <= end <= 1.

    Source: Lee 2013, Pseudo-Label, eq. 16 (linear); Laine and Aila 2017, Temporal Ensembling
        (sigmoid), both without the start, or the end, that the other one has.

    Example:
        >>> [ramp_value("linear", t, end=0.5) for t in (0.0, 0.25, 0.9)]
        [0.0, 0.5, 1.0]
    """
    if not 0 <= start <= end <= 1:
        raise ValueError(f"a ramp wants 0 <= start <= end <= 1, but start is {start}, end {end}")
    if name not in ("constant", "linear", "sigmoid"):
        raise ValueError(f"ramp {name!r} is unknown; there are 'constant', 'linear' and 'sigmoid'")
    if t < start:
        return 0.0
    if name == "constant" or t >= end:
        return 1.0
    x = (t - start) / (end - start)
    return x if name == "linear" else math.exp(-5 * (1 - x) ** 2)
