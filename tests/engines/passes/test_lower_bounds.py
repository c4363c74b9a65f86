"""A Clip from below becomes a Max with the same numbers; what is clipped from above stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from vlmc.engines.passes import lower_bounds

GRAPH = "(float[5] x) => (float[5] y) {{ c = {clip} y = Sqrt(c) }}"
BOUNDS = {"low": np.array(1e-5, np.float32), "high": np.array(2, np.float32)}


def test_a_bound_from_below_is_a_maximum(load: Any, written: Any) -> None:
    graph = GRAPH.format(clip="Clip(x, low)")
    exact, model = load(written(graph, BOUNDS)), written(graph, BOUNDS)
    assert lower_bounds.apply(model) == 1
    assert [node.op_type for node in model.graph] == ["Max", "Sqrt"]
    given = {"x": np.array([-1, 0, 1e-6, 1e-4, 9], np.float32)}
    np.testing.assert_array_equal(load(model).run(None, given)[0], exact.run(None, given)[0])


@pytest.mark.parametrize("clip", ["Clip(x, low, high)", "Clip(x, , high)", "Clip(x)"])
def test_other_clips_stay(clip: str, written: Any) -> None:
    model = written(GRAPH.format(clip=clip), BOUNDS)
    assert lower_bounds.apply(model) == 0
    assert [node.op_type for node in model.graph] == ["Clip", "Sqrt"]
