"""What a row of samples says: the eight numbers that every table of vlmc shows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def summarize(samples: Sequence[float]) -> dict[str, float | int]:
    """mean, std (of the sample, n - 1), min, max, median, p90, p99 and count, in the unit of the samples.

    Percentiles interpolate linearly between the two nearest ranks (numpy's default). An empty row is a ValueError:
    who has no samples has nothing to report.
    """
    if not samples:
        raise ValueError("statistics of no samples")
    values = np.asarray(samples, np.float64)
    median, p90, p99 = np.percentile(values, [50, 90, 99])
    low, high = values.min(), values.max()
    return {
        "mean": float(np.clip(values.mean(), low, high)),  # rounding may carry the mean of equal samples past them
        "std": float(values.std(ddof=1)) if len(values) > 1 else 0.0,
        "min": float(low),
        "max": float(high),
        "median": float(median),
        "p90": float(p90),
        "p99": float(p99),
        "count": len(values),
    }
