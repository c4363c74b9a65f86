"""A decoder that looks up its own embeddings and chooses its own token answers as one that is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from vlmc.artifact import Artifact
from vlmc.engines.passes import constant, insert, token_loop, two_segment_attention


@pytest.fixture
def looped(tiny: Artifact) -> Callable[..., ir.Model]:
    """looped(change=…): the decoder with embed_tokens inside, which `change` was applied to before."""

    def make(change: Callable[[ir.Model], None] = lambda _: None) -> ir.Model:
        decoder, embed = (ir.load(tiny.graph(name)) for name in ("decoder", "embed_tokens"))
        change(embed)
        two_segment_attention.apply(decoder, tiny.manifest.kv)
        count = len(embed.graph)
        assert token_loop.apply(decoder, embed) == count
        return decoder

    return make


@pytest.fixture
def table(tiny: Artifact) -> np.ndarray:
    """Embeddings (vocabulary, hidden) as embed_tokens gives them."""
    session = ort.InferenceSession(str(tiny.graph("embed_tokens")), providers=["CPUExecutionProvider"])
    ids = np.arange(tiny.manifest.vocab_size)[None]
    return np.asarray(session.run(None, {"input_ids": ids})[0][0])


def test_ids_and_rows_may_be_mixed(tiny: Artifact, looped: Any, steps: Any, table: np.ndarray, close: Any) -> None:
    """Image features between tokens; the rows that ids stand in front of hold no numbers at all."""
    ids = np.array([[3, -1, 0, -1, -1, 335, 7]])
    rows = np.random.default_rng(0).normal(size=(1, 7, 64)).astype(np.float32)
    expected = steps(ir.load(tiny.graph("decoder")), tiny.manifest.kv)(np.where(ids[..., None] >= 0, table[ids], rows))
    rows[ids >= 0] = np.nan
    close(steps(looped(), tiny.manifest.kv)(rows, ids)["logits"], expected["logits"])


def test_each_token_fed_back_gives_the_canonical_tokens(
    tiny: Artifact, looped: Any, steps: Any, table: np.ndarray
) -> None:
    canonical, loop = (steps(model, tiny.manifest.kv) for model in (ir.load(tiny.graph("decoder")), looped()))
    prompt = np.random.default_rng(1).normal(size=(1, 11, 64)).astype(np.float32)
    expected, found = [int(canonical(prompt)["logits"].argmax())], [loop(prompt)["next_token"]]
    for _ in range(20):
        expected.append(int(canonical(table[None, expected[-1:]])["logits"].argmax()))
        found.append(loop(np.zeros((1, 1, 64), np.float32), found[-1])["next_token"])
    assert [token.shape for token in found] == [(1, 1)] * 21
    assert [token.dtype for token in found] == [np.int32] * 21
    assert [int(token) for token in np.ravel(found)] == expected


def test_whatever_embed_tokens_does_is_done(tiny: Artifact, looped: Any, steps: Any, table: np.ndarray) -> None:
    """Gemma's embeddings are scaled."""

    def scale(embed: ir.Model) -> None:
        gather = embed.graph.outputs[0].producer()
        assert gather is not None
        embed.graph.outputs[0].name = "unscaled"
        factor = constant(embed.graph, "factor", np.array(3, np.float32))
        embed.graph.append(ir.node("Mul", [gather.outputs[0], factor], name="scaled"))
        output = embed.graph[-1].outputs[0]
        output.name, output.shape, output.type = "inputs_embeds", gather.outputs[0].shape, gather.outputs[0].type
        embed.graph.outputs[0] = output

    ids = np.array([[5, 6]])
    expected = steps(looped(), tiny.manifest.kv)(3 * table[ids])["logits"]
    np.testing.assert_allclose(
        steps(looped(scale), tiny.manifest.kv)(np.zeros((1, 2, 64), np.float32), ids)["logits"], expected, atol=1e-4
    )


def test_names_of_the_two_graphs_do_not_meet(looped: Any) -> None:
    """embed_tokens has a constant and a value that are called as the decoder's are."""

    def collide(embed: ir.Model) -> None:
        embed.graph.initializers["weight"].name = "model.norm.weight"
        node = embed.graph[0]
        node.name = "model.norm"
        insert(node, "Identity", [node.inputs[0]], "lm_head")

    model = looped(collide)
    names = [value.name for node in model.graph for value in node.outputs] + list(model.graph.initializers)
    assert len(names) == len(set(names))
    assert list(model.graph.initializers["embed_tokens.model.norm.weight"].shape) == [336, 64]
    assert list(model.graph.initializers["model.norm.weight"].shape) == [64]


def test_inputs_and_outputs_that_come_and_stay(tiny: Artifact, looped: Any) -> None:
    spec, model = tiny.manifest.components["decoder"], looped()
    inputs, outputs = ([value.name for value in side] for side in (model.graph.inputs, model.graph.outputs))
    assert inputs == [*(tensor.name for tensor in spec.inputs), "input_ids"]
    assert outputs == [*(tensor.name for tensor in spec.outputs), "next_token"]
    assert model.graph.inputs[-1].dtype == model.graph.outputs[-1].dtype == ir.DataType.INT32
    assert [str(size) for size in model.graph.inputs[-1].shape] == ["1", "length"]
