"""Attention over two segments is the canonical attention over one, and only reads its cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vlmc.artifact import Artifact
from vlmc.engines.passes import HIDDEN, constant, insert, two_segment_attention
from vlmc.errors import VlmcError

CAPACITY = 128  # of the fixture `tiny`
Pair = tuple[Any, Any]


@pytest.fixture
def lowered(tiny: Artifact) -> ir.Model:
    model = ir.load(tiny.graph("decoder"))
    assert two_segment_attention.apply(model, tiny.manifest.kv) == 2
    return model


@pytest.fixture(scope="module")
def decoders(tiny: Artifact, steps: Callable[..., Any]) -> Pair:
    """The canonical decoder and the rewritten one."""
    model = ir.load(tiny.graph("decoder"))
    two_segment_attention.apply(model, tiny.manifest.kv)
    return steps(ir.load(tiny.graph("decoder")), tiny.manifest.kv), steps(model, tiny.manifest.kv)


def embeds(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(1, length, 64)).astype(np.float32)


def garbage(shape: tuple[int, ...]) -> np.ndarray:
    """The largest numbers there are, of both signs: products of them are infinite or no number at all."""
    return np.random.default_rng(0).choice([-1, 1], shape) * np.finfo(np.float32).max


@settings(max_examples=20, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 60) | st.just(1), min_size=1, max_size=6))
def test_prompts_and_steps_of_any_length_at_any_place(lengths: list[int], decoders: Pair, close: Any) -> None:
    canonical, rewritten = decoders
    canonical.restart()
    rewritten.restart(garbage)
    for seed, length in enumerate(lengths):
        if canonical.place + length > CAPACITY:
            break
        expected, found = (decoder(embeds(length, seed)) for decoder in decoders)
        close(found["logits"], expected["logits"])
        assert found["logits"].argmax() == expected["logits"].argmax()


def test_the_last_place_of_the_cache(decoders: Pair, close: Any) -> None:
    for decoder in decoders:
        decoder.restart()
        decoder(embeds(CAPACITY - 1))
    expected, found = (decoder(embeds(1, seed=1))["logits"] for decoder in decoders)
    close(found, expected)


@pytest.mark.parametrize("length", [1, 9])
def test_what_unwritten_places_hold_does_not_count(length: int, decoders: Pair) -> None:
    rewritten = decoders[1]
    logits = []
    for fill in (np.zeros, garbage):
        rewritten.restart(fill)
        logits.append([rewritten(embeds(length))["logits"], rewritten(embeds(1))["logits"]])
    np.testing.assert_array_equal(*logits)


def test_the_place_in_the_cache_decides_what_is_seen_and_not_position_ids(decoders: Pair, close: Any) -> None:
    for decoder in decoders:
        decoder.restart()
    for length in (6, 1):
        expected, found = (decoder(embeds(length), shift=11)["logits"] for decoder in decoders)
        close(found, expected)


def test_a_hidden_score_is_finite_in_float16_and_gets_no_share() -> None:
    assert np.isfinite(np.float16(HIDDEN))
    assert np.exp(np.float32(HIDDEN)) == 0


def test_scores_are_scaled_by_the_width_of_a_head_where_the_graph_says_nothing(
    tiny: Artifact, decoders: Pair, steps: Callable[..., Any], close: Any
) -> None:
    kv, model = tiny.manifest.kv, ir.load(tiny.graph("decoder"))
    for node in model.graph:
        if node.op_type == "Attention":
            assert node.attributes.pop("scale").as_float() == pytest.approx(kv.head_dim**-0.5)
    two_segment_attention.apply(model, kv)
    decoders[0].restart()
    rewritten = steps(model, kv)
    rewritten.restart()
    expected, found = (decoder(embeds(7))["logits"] for decoder in (decoders[0], rewritten))
    close(found, expected)


def test_present_is_the_new_keys_and_values_alone(lowered: ir.Model, decoders: Pair) -> None:
    shapes = {value.name: list(value.shape) for value in [*lowered.graph.inputs, *lowered.graph.outputs]}  # type: ignore[arg-type]
    assert shapes["past_key_values.1.value"] == [1, 2, CAPACITY, 16]
    assert [str(size) for size in shapes["present.1.value"]] == ["1", "2", "length", "16"]
    decoders[1].restart()
    assert decoders[1](embeds(5))["present.0.key"].shape == (1, 2, 5, 16)


def test_the_cache_is_only_read_by_products_and_no_key_is_repeated(lowered: ir.Model, operators: Any) -> None:
    for value in lowered.graph.inputs:
        if str(value.name).startswith("past_key_values."):
            (node,) = (use.node for use in value.uses() if use.node.op_type != "Shape")
            if node.op_type == "Transpose":
                ((node, _),) = node.outputs[0].uses()
            assert node.op_type == "MatMul"
    assert not {"Attention", "TensorScatter", "Tile", "Expand"} & operators(lowered).keys()


def test_inputs_and_outputs_keep_their_names_and_order(tiny: Artifact, lowered: ir.Model) -> None:
    spec = tiny.manifest.components["decoder"]
    assert [value.name for value in lowered.graph.inputs] == [tensor.name for tensor in spec.inputs]
    assert [value.name for value in lowered.graph.outputs] == [tensor.name for tensor in spec.outputs]


def test_any_mask_and_keys_that_two_layers_read(tiny: Artifact, steps: Callable[..., Any], close: Any) -> None:
    """Each layer hides other keys, shows others behind the query, and the second reads what the first one wrote."""
    random = np.random.default_rng(3)

    def changed() -> ir.Model:
        model = ir.load(tiny.graph("decoder"))
        first, second = (node for node in model.graph if node.op_type == "Attention")
        positions = next(value for value in model.graph.inputs if value.name == "position_ids")
        axis = constant(model.graph, "batch", np.array([0]))
        for node, table in zip((first, second), tables, strict=True):
            rows = insert(node, "Squeeze", [positions, axis], f"{node.name}.rows").outputs[0]
            known = constant(model.graph, f"{node.name}.table", table[None, None])
            mask = insert(node, "Gather", [known, rows], f"{node.name}.mask", axis=2).outputs[0]
            mask.type = ir.TensorType(ir.DataType.BOOL)
            node.replace_input_with(3, mask)
        for position in (1, 2):
            second.replace_input_with(position, first.inputs[position])
        return model

    places, prefix = np.arange(CAPACITY), 5
    reach = (places <= places[:, None]) | ((places < prefix) & (places[:, None] < prefix))
    tables = [(random.random(reach.shape) < 0.5) & reach | np.eye(CAPACITY, dtype=bool) for _ in range(2)]
    rewritten = changed()
    assert two_segment_attention.apply(rewritten, tiny.manifest.kv) == 2
    both = [steps(model, tiny.manifest.kv) for model in (changed(), rewritten)]
    both[1].restart(garbage)
    for seed, length in enumerate((9, 1, 4, 1)):
        expected, found = (decoder(embeds(length, seed))["logits"] for decoder in both)
        close(found, expected)


def test_an_attention_that_does_more_is_refused_by_name(tiny: Artifact) -> None:
    model = ir.load(tiny.graph("decoder"))
    node = next(node for node in model.graph if node.op_type == "Attention")
    node.attributes["softcap"] = ir.AttrFloat32("softcap", 50.0)
    with pytest.raises(VlmcError, match=f"softcap of {node.name}"):
        two_segment_attention.apply(model, tiny.manifest.kv)
    del node.attributes["softcap"]
    node.resize_inputs(3)
    with pytest.raises(VlmcError, match=f"{node.name} has no boolean mask"):
        two_segment_attention.apply(model, tiny.manifest.kv)


def test_a_graph_without_a_cache_stays(tiny: Artifact, operators: Any) -> None:
    model = ir.load(tiny.graph("vision_encoder"))
    before = operators(model)
    assert two_segment_attention.apply(model, tiny.manifest.kv) == 0
    assert operators(model) == before
