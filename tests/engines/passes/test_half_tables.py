"""Large tables are looked up in float16 and give float32; what float16 cannot hold, and what others read too, stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from vlmc.engines.passes import half_tables, large_tables

GRAPH = "(int64[2,3] ids) => (float[2,3,7] y) { rows = Gather(table, ids) y = Neg(rows) }"
TWICE = """(int64[2,3] ids, float[2,5] x) => (float[2,3,7] y, float[2,7] z) {
    y = Gather(table, ids) z = MatMul(x, table)
}"""
TABLE = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
GIVEN = {"ids": np.array([[0, 4, 2], [1, 1, 3]])}


def test_a_large_table_is_float16_and_what_is_found_float32(load: Any, written: Any) -> None:
    model = written(GRAPH, {"table": TABLE})
    assert half_tables.apply(model, TABLE.size) == 1
    assert [value.dtype for value in model.graph.initializers.values()] == [ir.DataType.FLOAT16]
    (found,) = load(model).run(None, GIVEN)
    np.testing.assert_array_equal(found, -TABLE.astype(np.float16).astype(np.float32)[GIVEN["ids"]])


def test_columns_of_a_split_table_are_halved_each(load: Any, written: Any) -> None:
    model = written(GRAPH, {"table": TABLE})
    large_tables.apply(model, 20)
    assert half_tables.apply(model, 1) == 2
    (found,) = load(model).run(None, GIVEN)
    np.testing.assert_array_equal(found, -TABLE.astype(np.float16).astype(np.float32)[GIVEN["ids"]])


@pytest.mark.parametrize(
    ("graph", "table", "least"),
    [
        (GRAPH, TABLE, TABLE.size + 1),  # too small to matter
        (GRAPH, np.where(np.eye(5, 7) > 0, 70000, TABLE).astype(np.float32), 1),  # out of float16's range
        (TWICE, TABLE, 1),  # a product's weights as well
    ],
)
def test_other_tables_stay(graph: str, table: np.ndarray, least: int, written: Any) -> None:
    model = written(graph, {"table": table})
    assert half_tables.apply(model, least) == 0
    assert [value.dtype for value in model.graph.initializers.values()] == [ir.DataType.FLOAT]
