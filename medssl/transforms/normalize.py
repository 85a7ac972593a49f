"""How one channel is normalized. Numpy alone: this file travels in exported bundles as it is."""

import numpy as np
from numpy.typing import NDArray

LOW, HIGH = 0.5, 99.5  # percentiles between which the intensities of a scan are believed
_EMPTY = 1 / 3  # share of exact zeros above which zero means: nothing was measured here


def normalize(
    channel: NDArray[np.float32],
    kind: str,
    low: float | None = None,
    high: float | None = None,
    mean: float | None = None,
    std: float | None = None,
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
    """
    if kind == "ct":
        assert mean is not None, "validated"
        assert std is not None, "validated"
        return (np.clip(channel, low, high) - np.float32(mean)) / np.float32(std)
    numbers = None
    measured = channel[channel != 0]
    if measured.size < (1 - _EMPTY) * channel.size:
        numbers = _measure_zscore(measured)
    numbers = numbers or _measure_zscore(channel.ravel())
    if numbers is None:
        return np.zeros(channel.shape, dtype=np.float32)
    bottom, top, middle, width = numbers
    return ((np.clip(channel, bottom, top) - middle) / width).astype(np.float32)


def _measure_zscore(values: NDArray[np.float32]) -> tuple[float, float, float, float] | None:
    """Return clip limits, mean and standard deviation of values (n,); None if all are equal."""
    if values.size == 0 or values.min() == values.max():
        return None
    low, high = (float(limit) for limit in np.percentile(values, (LOW, HIGH)))
    if low == high:  # a few bright voxels on an even ground: they are what there is to see
        low, high = float(values.min()), float(values.max())
    believed = np.clip(values.astype(np.float64), low, high)
    return low, high, float(believed.mean()), float(believed.std())
