"""Greedy tokens against the golden ones that PyTorch float32 chose: how many cases are equal, where others part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


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
