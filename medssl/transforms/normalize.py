"""How one channel is normalized. Numpy alone: this file travels in exported bundles as it is."""

import math

import numpy as np
from numpy.typing import NDArray

LOW, HIGH = 0.5, 99.5  # percentiles between which the intensities of a scan are believed
_PIECE = 2**22  # values in float64 at once
_EMPTY = 1 / 3  # share of exact zeros above which zero means: nothing was measured here


def normalize(
    channel: NDArray[np.float32],
    kind: str,
    low: float | None = None,
    high: float | None = None,
    mean: float | None = None,
    std: float | None = None,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Return a channel (I, J, K) normalized; a constant one becomes zero.

    Args:
        channel: Raw intensities (I, J, K).
        kind: `zscore` takes its numbers from the scan, `ct` those given; see
            `medssl.transforms.preprocess.Normalization`.
        low: Lower clip limit of `ct`.
        high: Upper clip limit of `ct`.
        mean: What `ct` subtracts.
        std: What `ct` divides by.
        out: Where the result goes, plane by plane; None: into an array of its own.
    """
    result: NDArray[np.float32] = np.empty(channel.shape, np.float32) if out is None else out
    numbers: tuple[float | None, float | None, float | None, float | None] | None
    numbers = low, high, mean, std
    if kind == "zscore":
        numbers = None
        if np.count_nonzero(channel) < (1 - _EMPTY) * channel.size:
            numbers = _measure_zscore(channel[channel != 0])
        numbers = numbers or _measure_zscore(channel.ravel())
    if numbers is None:
        result[:] = 0
        return result
    bottom, top, middle, width = numbers
    assert middle is not None, "validated"
    assert width is not None, "validated"
    for plane, target in zip(channel, result, strict=True):
        target[:] = (np.clip(plane, bottom, top) - np.float32(middle)) / np.float32(width)
    return result


def _measure_zscore(values: NDArray[np.float32]) -> tuple[float, float, float, float] | None:
    """Return clip limits, mean and standard deviation of values (n,); None if all are equal."""
    if values.size == 0 or values.min() == values.max():
        return None
    low, high = (float(limit) for limit in np.percentile(values, (LOW, HIGH)))
    if low == high:  # a few bright voxels on an even ground: they are what there is to see
        low, high = float(values.min()), float(values.max())

    def add(center: float, power: int) -> float:
        pieces = (values[start : start + _PIECE] for start in range(0, values.size, _PIECE))
        return sum(
            float(((np.clip(piece.astype(np.float64), low, high) - center) ** power).sum())
            for piece in pieces
        )

    mean = add(0.0, 1) / values.size
    return low, high, mean, math.sqrt(add(mean, 2) / values.size)
