"""A table beyond the limit becomes several side by side that are looked up alike; others stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from vlmc.engines.passes import large_tables

GRAPH = "(int64[2,3] ids) => (float[2,3,7] y) { rows = Gather(table, ids) y = Neg(rows) }"
TABLE = np.arange(5 * 7, dtype=np.float32).reshape(5, 7)


@pytest.mark.parametrize(("most", "widths"), [(34, [4, 3]), (20, [4, 3]), (19, [3, 3, 1]), (5, [1] * 7)])
def test_a_large_table_is_split_by_columns(most: int, widths: list[int], load: Any, written: Any) -> None:
    exact, model = load(written(GRAPH, {"table": TABLE})), written(GRAPH, {"table": TABLE})
    assert large_tables.apply(model, most) == 1
    tables = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    assert [table.shape.numpy() for table in tables] == [(5, width) for width in widths]
    assert max(table.size for table in tables) <= most
    given = {"ids": np.array([[0, 4, 2], [1, 1, 3]])}
    np.testing.assert_array_equal(load(model).run(None, given)[0], exact.run(None, given)[0])


def test_a_table_within_the_limit_stays(written: Any) -> None:
    model = written(GRAPH, {"table": TABLE})
    assert large_tables.apply(model, TABLE.size) == 0
    assert [node.op_type for node in model.graph] == ["Gather", "Neg"]


def test_the_limit_is_tensorrts(written: Any) -> None:
    assert np.iinfo(np.int32).max == large_tables.MOST
    assert large_tables.apply(written(GRAPH, {"table": TABLE})) == 0
