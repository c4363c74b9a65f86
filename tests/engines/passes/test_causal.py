"""Which decoders a lowering may take for plain causal ones: real exports of the tiny model under other masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import pytest
from torch import Tensor
from vlmc.artifact import Artifact, KvSpec
from vlmc.engines.passes import causal, group_query_attention
from vlmc.exporter import graph, onnx_ops
from vlmc.exporter.family import Components, Decoder, PrefixDecoder


def windowed(width: int) -> type[Decoder]:
    class Windowed(Decoder):
        def forward(
            self, inputs_embeds: Tensor, position_ids: Tensor, write_index: Tensor, logits_index: Tensor, past: Any
        ) -> Any:
            mask = onnx_ops.causal_mask(write_index, inputs_embeds.shape[1], past[0], window=width)
            return self.attend(inputs_embeds, position_ids, write_index, logits_index, past, mask)

    return Windowed


@pytest.fixture(scope="module")
def exported(tiny: Artifact, tiny_components: Components) -> Callable[[type[Decoder]], ir.Model]:
    """exported(kind): the tiny model's decoder as one of that kind."""

    def export(kind: type[Decoder]) -> ir.Model:
        plain = tiny_components.decoder
        decoder = kind(plain.model, plain.lm_head).eval()  # type: ignore[arg-type]
        spec = tiny.manifest.components["embed_tokens"]
        return graph.export_component("decoder", decoder, graph.decoder_signature(decoder, spec, tiny.manifest.kv))

    return export


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (PrefixDecoder, "a mask that depends on prefix_length"),
        (windowed(127), "hides earlier keys"),
    ],
)
def test_another_mask_is_named_and_its_decoder_left_alone(
    kind: type[Decoder], says: str, exported: Callable[..., ir.Model], tiny: Artifact, operators: Any
) -> None:
    model, kv = exported(kind), tiny.manifest.kv
    assert says in causal.other_than_causal(causal.attentions(model.graph), kv)
    before = operators(model)
    assert group_query_attention.apply(model, kv) == 0
    assert operators(model) == before


def test_a_window_as_wide_as_the_cache_hides_nothing(exported: Callable[..., ir.Model], tiny: Artifact) -> None:
    model = exported(windowed(128))
    assert causal.other_than_causal(causal.attentions(model.graph), tiny.manifest.kv) == ""
    assert group_query_attention.apply(model, tiny.manifest.kv) == 2


def test_keys_of_an_odd_width_and_a_rotation_of_its_own_stay(tiny: Artifact) -> None:
    model = ir.load(tiny.graph("decoder"))
    found = causal.attentions(model.graph)
    assert "multiple of 16" in group_query_attention.inexpressible(found, KvSpec(2, 2, 8, 128))
    for node in model.graph:
        if node.op_type == "RotaryEmbedding" and "layers.1" not in str(node.name):
            node.attributes["rotary_embedding_dim"] = ir.AttrInt64("rotary_embedding_dim", 8)
    assert "part of its channels" in group_query_attention.inexpressible(found, tiny.manifest.kv)


def test_a_cache_that_two_layers_share_stays(tiny: Artifact) -> None:
    model = ir.load(tiny.graph("decoder"))
    first, second = causal.attentions(model.graph)
    for position in (1, 2):
        second.replace_input_with(position, first.inputs[position])
    assert "another layer wrote" in causal.other_than_causal([first, second], tiny.manifest.kv)
