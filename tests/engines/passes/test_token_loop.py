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


def test_what_else_embed_tokens_gives_follows_its_embeddings(
    tiny: Artifact, steps: Any, table: np.ndarray, close: Any
) -> None:
    """A further output (1, length, 2, 32) that the decoder adds, as Gemma 3n's: looked up, or given in a prompt."""
    decoder, embed = (ir.load(tiny.graph(name)) for name in ("decoder", "embed_tokens"))
    looked_up = embed.graph.outputs[0].producer()
    assert looked_up is not None
    sizes = constant(embed.graph, "sizes", np.array([1, -1, 2, 32]))
    embed.graph.append(ir.node("Reshape", [looked_up.outputs[0], sizes], name="more"))
    more = ir.Value(name="more", shape=ir.Shape([1, "length", 2, 32]), type=ir.TensorType(ir.DataType.FLOAT))
    output = embed.graph[-1].outputs[0]
    output.name, output.shape, output.type = more.name, more.shape, more.type
    embed.graph.outputs.append(output)
    add(decoder, more, flat=(1, -1, 64))
    token_loop.apply(decoder, embed)

    ids = np.array([[3, -1, -1, 335]])
    rows, others = (np.random.default_rng(seed).normal(size=(1, 4, 64)).astype(np.float32) for seed in (0, 1))
    known = ids[..., None] >= 0
    expected = steps(ir.load(tiny.graph("decoder")), tiny.manifest.kv)(np.where(known, 2 * table[ids], rows + others))
    rows[ids >= 0] = others[ids >= 0] = np.nan
    found = steps(decoder, tiny.manifest.kv)(rows, ids, more=others.reshape(1, 4, 2, 32))
    close(found["logits"], expected["logits"])


def test_of_several_positions_those_of_ids_are_places_behind_the_offset(
    tiny: Artifact, steps: Any, table: np.ndarray, close: Any
) -> None:
    """M-RoPE: a prompt says its positions, and what is fed back stands where the runtime's offset puts it."""
    decoder, embed = (ir.load(tiny.graph(name)) for name in ("decoder", "embed_tokens"))
    graph = decoder.graph
    plain = next(value for value in graph.inputs if value.name == "position_ids")
    several = ir.Value(name="position_ids", shape=ir.Shape([3, 1, "length"]), type=plain.type)
    readers = [use for use in plain.uses() if use.node.op_type != "Shape"]
    first = next(node for node in graph if any(node is use.node for use in readers))
    row = insert(first, "Gather", [several, constant(graph, "row", np.array(2))], "third", axis=0).outputs[0]
    ir.convenience.replace_all_uses_with(plain, row)
    graph.inputs[graph.inputs.index(plain)] = several
    first.graph.sort()  # type: ignore[union-attr]
    token_loop.apply(decoder, embed)
    (offset,) = (value for value in graph.inputs if value.name == token_loop.OFFSET)
    assert (list(offset.shape or ()), offset.dtype) == ([1], ir.DataType.INT64)

    canonical, loop = (steps(model, tiny.manifest.kv) for model in (ir.load(tiny.graph("decoder")), decoder))
    prompt = np.random.default_rng(2).normal(size=(1, 6, 64)).astype(np.float32)
    third = np.array([[0, 1, 1, 2, 2, 3]])
    given = np.stack((third * 7, third + 40, third))
    expected = canonical(prompt, position_ids=third)
    found = loop(prompt, position_ids=given, position_offset=np.array([99]))  # no id asks for it
    close(found["logits"], expected["logits"])
    nothing = np.zeros_like(given[..., :2])
    for ids in ([[5, 9]], [[300]]):
        count = len(ids[0])
        expected = canonical(table[np.array(ids)], shift=-2)
        found = loop(
            np.zeros((1, count, 64), np.float32),
            np.array(ids),
            position_ids=nothing[..., :count],
            position_offset=np.array([-2]),
        )
        close(found["logits"], expected["logits"])


def add(decoder: ir.Model, more: ir.Value, flat: tuple[int, ...]) -> None:
    """The decoder with a new input that is added to its embeddings."""
    graph = decoder.graph
    embeds = next(value for value in graph.inputs if value.name == "inputs_embeds")
    readers = [use for use in embeds.uses() if use.node.op_type != "Shape"]
    first = next(node for node in graph if any(node is use.node for use in readers))
    given = ir.Value(name=more.name, shape=more.shape, type=more.type)
    graph.inputs.append(given)
    rows = insert(first, "Reshape", [given, constant(graph, "flat", np.array(flat))], "more.flat").outputs[0]
    total = insert(first, "Add", [embeds, rows], "more.sum").outputs[0]
    total.shape, total.type = embeds.shape, embeds.type
    for use in readers:
        use.node.replace_input_with(use.idx, total)


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
