"""GroupQueryAttention on a shared cache is the canonical attention on a scattered one, at every length."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vlmc.artifact import Artifact, KvContract
from vlmc.engines.passes import group_query_attention
from vlmc.runtime.backends import onnxruntime as backend
from vlmc.runtime.backends.onnxruntime import OnnxDecoder, OnnxRunner

TOLERANCE = 1e-4  # logits are of the size of 5; float32 sums in another order differ by about 1e-6


@pytest.fixture(scope="module")
def decoders(tiny: Artifact, tmp_path_factory: pytest.TempPathFactory) -> tuple[OnnxDecoder, OnnxDecoder]:
    """The canonical decoder and the rewritten one."""
    kv = tiny.manifest.kv
    model = ir.load(tiny.graph("decoder"))
    assert group_query_attention.apply(model, kv) == 2
    path = tmp_path_factory.mktemp("gqa") / "model.onnx"
    ir.save(model, path, external_data="model.onnx.data")
    embed = OnnxRunner(backend.session(tiny.graph("embed_tokens"), {}, 1))
    sizes = (kv.layers, kv.kv_heads, kv.head_dim, kv.capacity)
    return (
        OnnxDecoder(backend.session(tiny.graph("decoder"), {}, 1), KvContract("scatter", *sizes), embed),
        OnnxDecoder(backend.session(path, {}, 1), KvContract("shared", *sizes), embed),
    )


def embeds(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(1, length, 64)).astype(np.float32)


def assert_same(decoders: tuple[OnnxDecoder, OnnxDecoder]) -> None:
    canonical, rewritten = decoders
    np.testing.assert_allclose(rewritten.logits(), canonical.logits(), atol=TOLERANCE)


def test_a_prompt_many_steps_and_a_second_shorter_prompt(decoders: tuple[OnnxDecoder, OnnxDecoder]) -> None:
    for length in (60, 7):  # the second finds the first one's keys in the cache
        for decoder in decoders:
            decoder.prefill(embeds(length))
        assert_same(decoders)
        for token in range(30, 70):
            for decoder in decoders:
                decoder.feed(token)
            assert_same(decoders)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(length=st.integers(1, 128), data=st.data())
def test_every_length_up_to_the_last_place_of_the_cache(
    length: int, data: st.DataObject, decoders: tuple[OnnxDecoder, OnnxDecoder]
) -> None:
    steps = data.draw(st.integers(0, min(6, 128 - length)) | st.just(min(6, 128 - length)))
    for decoder in decoders:
        decoder.prefill(embeds(length, seed=length))
    assert_same(decoders)
    for token in range(steps):
        for decoder in decoders:
            decoder.feed(token)
        assert_same(decoders)


def test_the_cache_is_one_buffer_and_its_tables_cover_it(tiny: Artifact, operators: Any) -> None:
    model = ir.load(tiny.graph("decoder"))
    group_query_attention.apply(model, tiny.manifest.kv)
    counts = operators(model)
    assert counts["GroupQueryAttention"] == 2
    assert not {"Attention", "TensorScatter", "RotaryEmbedding", "Cos", "Sin", "LessOrEqual"} & counts.keys()
    names = [value.name for value in model.graph.inputs]
    assert {"seqlens_k", "total_sequence_length"} <= set(names)
    assert not {"position_ids", "write_index"} & set(names)
    before = [spec.name for spec in tiny.manifest.components["decoder"].outputs]
    assert [value.name for value in model.graph.outputs] == before
    assert model.graph.initializers["rotary.cos"].shape == (128, 8)


def test_a_graph_without_a_cache_stays(tiny: Artifact, operators: Any) -> None:
    model = ir.load(tiny.graph("vision_encoder"))
    before = operators(model)
    assert group_query_attention.apply(model, tiny.manifest.kv) == 0
    assert operators(model) == before
