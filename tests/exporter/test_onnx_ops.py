"""What an operator of the graph stands for, computed: each against transformers' or PyTorch's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from transformers.models.llama import modeling_llama
from vlmc.errors import VlmcError
from vlmc.exporter import onnx_ops


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_rotation_is_that_of_llama() -> None:
    query, key = torch.randn(1, 4, 5, 16), torch.randn(1, 2, 5, 16)
    angles = torch.randn(1, 5, 8).repeat(1, 1, 2)
    found = onnx_ops.rotate(query, key, angles.cos(), angles.sin())
    for mine, theirs in zip(
        found, modeling_llama.apply_rotary_pos_emb(query, key, angles.cos(), angles.sin()), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_the_rms_norm_is_that_of_llama() -> None:
    module = modeling_llama.LlamaRMSNorm(24, eps=0.1)
    module.weight.data.uniform_(-2, 2)
    x = torch.randn(2, 3, 24)
    torch.testing.assert_close(onnx_ops.rms_norm(module, x), module(x))


def test_attention_groups_its_heads_and_scales() -> None:
    query, key, value = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    mask = torch.rand(1, 1, 3, 5) < 0.7
    mask[..., 0] = True
    found, _ = onnx_ops.attention(nn.Module(), query, key, value, mask, scaling=0.3)
    scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.3
    expected = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ value.repeat_interleave(2, 1)
    torch.testing.assert_close(found, expected.transpose(1, 2))
    plain, _ = onnx_ops.attention(nn.Module(), query, query, query, None)
    torch.testing.assert_close(plain.transpose(1, 2), functional.scaled_dot_product_attention(query, query, query))


@pytest.mark.parametrize("name", onnx_ops.MORE)
def test_attention_that_does_more_is_refused(name: str) -> None:
    query = torch.randn(1, 4, 3, 8)
    onnx_ops.attention(nn.Module(), query, query, query, None, **{name: None}, dropout=0.0)
    with pytest.raises(VlmcError, match=f"does more than vlmc follows.*{name}"):
        onnx_ops.attention(nn.Module(), query, query, query, None, **{name: torch.zeros(4)})


@settings(max_examples=30, deadline=None, derandomize=True)
@given(start=st.integers(0, 6), length=st.integers(1, 4))
def test_a_query_sees_the_keys_up_to_itself(start: int, length: int) -> None:
    mask = onnx_ops.causal_mask(torch.tensor([start]), length, torch.zeros(1, 1, 10, 1))
    assert mask.shape == (1, 1, length, start + length)
    for query in range(length):
        assert mask[0, 0, query].tolist() == [key <= start + query for key in range(start + length)]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    start=st.integers(0, 6), length=st.integers(1, 4), prefix=st.integers(0, 9) | st.none(), window=st.integers(0, 9)
)
def test_a_prefix_is_seen_by_all_and_a_window_ends_at_the_query(
    start: int, length: int, prefix: int | None, window: int
) -> None:
    given_prefix = None if prefix is None else torch.tensor([prefix])
    mask = onnx_ops.causal_mask(torch.tensor([start]), length, torch.zeros(1, 1, 10, 1), given_prefix, window)
    for query in range(length):
        place = start + query
        near = [key <= place and (not window or place - key < window) for key in range(start + length)]
        assert mask[0, 0, query].tolist() == [seen or key < (prefix or 0) for key, seen in enumerate(near)]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(start=st.integers(0, 6), length=st.integers(1, 4))
def test_scattering_writes_at_the_index_and_nowhere_else(start: int, length: int) -> None:
    past, update = torch.zeros(1, 2, 10, 3), torch.ones(1, 2, length, 3)
    written = onnx_ops.tensor_scatter(past, update, torch.tensor([start]))
    assert written is past
    assert written[0, 0, :, 0].tolist() == [float(start <= place < start + length) for place in range(10)]


def test_the_cache_gives_out_the_filled_part() -> None:
    past = [torch.zeros(1, 2, 10, 3) for _ in range(4)]
    cache = onnx_ops.static_cache(past, torch.tensor([4]), 2)
    keys, values = cache.update(torch.ones(1, 2, 2, 3), torch.ones(1, 2, 2, 3), 1)
    assert keys.shape == values.shape == (1, 2, 6, 3)
    assert past[2][0, 0, :, 0].tolist() == [0, 0, 0, 0, 1, 1, 0, 0, 0, 0]
    assert not past[0].any()


def test_what_is_compiled_computes_and_emits_nothing() -> None:
    class Block(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return onnx_ops.attention(self, x, x, x, None)[0]

    x = torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(Block(), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), Block()(x))


def test_transformers_modules_are_left_as_they_were() -> None:
    block = nn.Sequential(modeling_llama.LlamaRMSNorm(4))
    before = modeling_llama.apply_rotary_pos_emb
    with onnx_ops.canonical_operators(block):
        assert "forward" in vars(block[0])
    assert "forward" not in vars(block[0])
    assert modeling_llama.apply_rotary_pos_emb is before
