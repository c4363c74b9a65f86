"""The table of embeddings: what it holds, in which width, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from vlmc.artifact import Artifact
from vlmc.engines.builders import numpy as builder
from vlmc.errors import VlmcError
from vlmc.exporter import golden
from vlmc.profiles.device import load_device
from vlmc.runtime.backends import numpy as backend

SPEC: Any = None


def job(folder: Path) -> Any:
    return SimpleNamespace(folder=folder)


def scaled(factor: float) -> ir.Model:
    """A table of four rows, looked up and multiplied, as Gemma's embeddings are."""
    table = ir.tensor(np.arange(12, dtype=np.float32).reshape(4, 3), name="table")
    weight = ir.Value(name="table", const_value=table, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((4, 3)))
    number = ir.tensor(np.array(factor, np.float32), name="factor")
    constant = ir.Value(name="factor", const_value=number, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(()))
    ids = ir.Value(name="input_ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape((1, "length")))
    gather = ir.node("Gather", [weight, ids])
    product = ir.node("Mul", [gather.outputs[0], constant])
    graph = ir.Graph([ids], product.outputs, nodes=[gather, product], initializers=[weight, constant])
    return ir.Model(graph, ir_version=10)


def test_rows_are_the_models_embeddings(tiny: Artifact, tmp_path: Path) -> None:
    built = builder.build(ir.load(tiny.graph("embed_tokens")), job(tmp_path))
    runner = backend.load_runner(SPEC, tmp_path / built.file, threads=1)
    arrays = golden.read(tiny)[1]
    image = tiny.manifest.prompt.image_token
    embeds = runner.run({"input_ids": arrays["0.input_ids"][None]})["inputs_embeds"]
    assert (embeds.dtype, embeds.shape) == (np.float32, arrays["0.inputs_embeds"].shape)
    same = np.isclose(embeds, arrays["0.inputs_embeds"]).all(-1)[0]
    assert same.any() and image  # the others are the picture's


@pytest.mark.parametrize(("factor", "width"), [(2.0, np.float16), (0.1, np.float32)])
def test_the_table_is_float16_where_that_is_exact(factor: float, width: type, tmp_path: Path) -> None:
    built = builder.build(scaled(factor), job(tmp_path))
    table = np.load(tmp_path / built.file)
    assert table.dtype == width
    np.testing.assert_array_equal(table, (np.arange(12).reshape(4, 3) * np.float32(factor)).astype(np.float32))


def test_embeddings_that_are_no_table_are_refused(tiny: Artifact, tmp_path: Path) -> None:
    with pytest.raises(VlmcError, match="no table"):
        builder.build(ir.load(tiny.graph("vision_encoder")), job(tmp_path))
    assert "look-up" in builder.refuses("decoder", "fp32", load_device("orin"))


def test_a_file_that_is_no_table_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "table.npy").write_bytes(b"nothing")
    with pytest.raises(VlmcError, match="no table of embeddings"):
        backend.load_runner(SPEC, tmp_path / "table.npy", threads=1)
