"""What an engine makes against the golden outputs of PyTorch float32: arrays by their direction, greedy tokens one by
one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def cosine(left: NDArray[Any], right: NDArray[Any]) -> float:
    """Of the flattened arrays; 0 where one of them is all zero or not finite, or they are not of one size."""
    a, b = left.ravel().astype(np.float64), right.ravel().astype(np.float64)
    if a.size != b.size:
        return 0.0
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norms if np.isfinite(norms) and norms else 0.0


def first_divergence(tokens: Sequence[int], golden: Sequence[int]) -> int | None:
    """The first position where the two differ, None where they are equal; a missing token differs."""
    for position, (token, wanted) in enumerate(zip(tokens, golden, strict=False)):
        if token != wanted:
            return position
    return None if len(tokens) == len(golden) else min(len(tokens), len(golden))


def summarize(cases: Iterable[tuple[Sequence[int], Sequence[int]]]) -> dict[str, Any]:
    """`cases`, `equal` and `first_divergence` (a position, or None where equal, per case) of (tokens, golden) pairs."""
    positions = [first_divergence(tokens, golden) for tokens, golden in cases]
    return {"cases": len(positions), "equal": positions.count(None), "first_divergence": positions}
