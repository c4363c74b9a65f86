"""A norm's weight no longer stands between a computed tensor and QuantizeLinear; the numbers stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from vlmc.engines.passes import norm_weights, norms

NORM = "s = Pow(x, two) m = ReduceMean<axes = [1]>(s) e = Add(m, tiny) r = Sqrt(e) i = Reciprocal(r) n = Mul(x, i)"
QUANTIZED = "w = Mul(n, weight) q = QuantizeLinear(w, scale, zero) y = DequantizeLinear(q, scale, zero)"
TWICE = "w = Mul(n, weight) y = Add(w, n)"  # the norm without its weight is needed too
LAYER_SCALE = "c = Mul(x, x) y = Mul(c, weight)"
CONSTANTS = {
    "two": np.array(2.0, np.float32),
    "tiny": np.array(1e-6, np.float32),
    "weight": np.linspace(0.5, 3, 8, dtype=np.float32).reshape(8, 1, 1),
    "scale": np.array(0.03, np.float32),
    "zero": np.array(0, np.int8),
}


@pytest.fixture
def graph(written: Any) -> Callable[[str], ir.Model]:
    """graph(body), of x to y, eight channels of 4 by 4."""
    return lambda body: written(f"(float[1,8,4,4] x) => (float[1,8,4,4] y) {{ {body} }}", CONSTANTS)


def test_what_is_rounded_is_no_product_by_a_constant(load: Any, graph: Any) -> None:
    exact, model = load(graph(f"{NORM} {QUANTIZED}")), graph(f"{NORM} {QUANTIZED}")
    assert norm_weights.apply(model) == 1
    rounded = next(node for node in model.graph if node.op_type == "QuantizeLinear").inputs[0]
    assert rounded is not None and (product := rounded.producer()) is not None
    assert product.op_type == "Mul" and all(value.const_value is None for value in product.inputs if value)
    given = {"x": np.random.default_rng(0).normal(size=(1, 8, 4, 4)).astype(np.float32)}
    np.testing.assert_allclose(load(model).run(None, given)[0], exact.run(None, given)[0], atol=1e-6)


def test_the_product_of_root_and_weight_stays_float32(graph: Any) -> None:
    model = graph(f"{NORM} {QUANTIZED}")
    norm_weights.apply(model)
    (made,) = [node for node in model.graph if node.op_type == "Mul" and node.inputs[1].name == "weight"]
    assert str(made.name).endswith(norms.PARTS)


@pytest.mark.parametrize("body", [f"{NORM} {TWICE}", LAYER_SCALE])
def test_other_products_stay(body: str, graph: Any) -> None:
    assert norm_weights.apply(graph(body)) == 0
