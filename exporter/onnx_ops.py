"""The standard ONNX operators that vlmc wants in its graphs, each with the PyTorch code that does the same.

While `torch.onnx.export` traces, each function emits its operator (ONNX opset 23/24) through torch's symbolic
operators; otherwise it computes. `canonical_operators()` puts them where transformers' modules would trace to
dozens of small nodes. transformers' attention and mask interfaces are the door for attention.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from ..errors import VlmcError

IMPLEMENTATION = "vlmc"  # the name under which transformers finds attention() and its mask
MORE = ("softcap", "s_aux", "position_bias")  # what transformers' models hand over that changes the scores


def exporting() -> bool:
    """Whether a graph is being exported; PyTorch 2.11 says so of torch.compile too."""
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def _emit(operator: str, inputs: list[Tensor], attributes: dict[str, Any], like: Tensor, version: int) -> Tensor:
    return torch.onnx.ops.symbolic(operator, inputs, attributes, dtype=like.dtype, shape=like.shape, version=version)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **further: object,
) -> tuple[Tensor, None]:
    """Attention-23. query (batch, heads, length, dim), key and value (batch, kv_heads, keys, dim), boolean mask
    broadcastable to (batch, heads, length, keys); returns (batch, length, heads, dim). A model that asks for more, as
    capped scores (Gemma 2) or sinks (gpt-oss), is a VlmcError, for the parity ladder has the same on both sides."""
    if asked := [name for name in MORE if further.get(name) is not None]:
        raise VlmcError(
            "The model's attention does more than vlmc follows",
            found=", ".join(asked),
            expected="scores that are scaled and masked and nothing else",
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if exporting():
        inputs = [query, key, value] + ([] if attention_mask is None else [attention_mask])
        output = _emit("Attention", inputs, {"scale": scale}, query, 23)
    else:
        output = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
    return output.transpose(1, 2).contiguous(), None


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """RotaryEmbedding-23 on queries and keys (batch, heads, length, dim); cos and sin (batch, length, dim), whose two
    halves are equal. Stands in for transformers' apply_rotary_pos_emb (RoFormer, arXiv:2104.09864, half-split form)."""
    half = cos.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]
    return rotary(q, cos, sin), rotary(k, cos, sin)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RotaryEmbedding-23 on x (batch, heads, length, dim), turned by cos and sin (batch, length, dim / 2)."""
    if exporting():
        return _emit("RotaryEmbedding", [x, cos, sin], {}, x, 23)
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def rms_norm(module: nn.Module, x: Tensor) -> Tensor:
    """RMSNormalization-23 over the last axis, with the module's weight and epsilon."""
    weight = module.weight
    epsilon = float(getattr(module, "variance_epsilon", 0.0) or getattr(module, "eps", 1e-6))
    assert isinstance(weight, Tensor)
    if exporting():
        return _emit("RMSNormalization", [x, weight], {"axis": -1, "epsilon": epsilon}, x, 23)
    return functional.rms_norm(x, (x.shape[-1],), weight, epsilon)


def is_rms_norm(module: nn.Module) -> bool:
    """Whether a graph has the module as one RMSNormalization: by transformers' names, for each model has its own."""
    return type(module).__name__.endswith("RMSNorm")


def tensor_scatter(past: Tensor, update: Tensor, write_index: Tensor) -> Tensor:
    """TensorScatter-24 on axis 2: update (1, kv_heads, length, dim) written into past (1, kv_heads, capacity, dim) at
    write_index (1,). Outside of export it writes in place, as every engine does."""
    if exporting():
        return _emit("TensorScatter", [past, update, write_index], {"axis": 2}, past, 24)
    if fixed_shapes(past):
        return past.index_copy_(2, write_index + torch.arange(update.shape[2], device=past.device), update)
    start = int(write_index)
    past[:, :, start : start + update.shape[2]] = update
    return past


def fixed_shapes(past: Tensor) -> bool:
    """Whether attention goes over the whole capacity, hidden part and all: in a graph, and on a GPU, where asking for
    the position would make the host wait. Elsewhere only the filled part is read, so PyTorch is no slower than it has
    to be."""
    return exporting() or past.is_cuda


class StaticLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers is not followed
    """One layer of a KV cache of fixed capacity, as transformers' decoders ask for it."""

    def __init__(self, key: Tensor, value: Tensor, write_index: Tensor, length: int) -> None:
        super().__init__()
        self.keys, self.values = key, value
        self.write_index = write_index
        self.end = None if fixed_shapes(key) else int(write_index) + length
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys = tensor_scatter(self.keys, key_states, self.write_index)
        self.values = tensor_scatter(self.values, value_states, self.write_index)
        if self.end is None:
            return self.keys, self.values
        return self.keys[:, :, : self.end], self.values[:, :, : self.end]

    def lazy_initialization(self, *_: Any, **__: Any) -> None:
        """Nothing to do: the buffers were given."""

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return int(self.keys.shape[2])

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return int(self.keys.shape[2]), 0


def static_cache(past: list[Tensor], write_index: Tensor, length: int) -> Cache:
    """A transformers Cache over the buffers key0, value0, key1, … of shape (1, kv_heads, capacity, dim)."""
    pairs = zip(past[::2], past[1::2], strict=True)
    return Cache(layers=[StaticLayer(key, value, write_index, length) for key, value in pairs])


def causal_mask(
    write_index: Tensor, length: int, past: Tensor, prefix_length: Tensor | None = None, window: int = 0
) -> Tensor:
    """Boolean (1, 1, length, keys): query i, at position write_index + i, sees the keys up to itself. keys is the
    capacity of `past` (1, kv_heads, capacity, dim) with fixed shapes and the filled part otherwise.

    prefix_length (1,): the keys before it are seen by every query. window: how many keys a query sees, itself
    included; 0 means all."""
    keys = past.shape[2] if fixed_shapes(past) else int(write_index) + length
    query = write_index[:, None] + torch.arange(length, device=write_index.device)
    if prefix_length is None and not window:
        return (torch.arange(keys, device=write_index.device)[None, None] <= query[:, :, None])[:, None]
    key, query = torch.arange(keys, device=write_index.device)[None, None], query[:, :, None]
    seen = key <= query
    if window:
        seen = seen & (key > query - window)
    if prefix_length is not None:
        seen = seen | (key < prefix_length)
    return seen[:, None]


AttentionInterface.register(IMPLEMENTATION, attention)
AttentionMaskInterface.register(IMPLEMENTATION, lambda *_, attention_mask=None, **__: attention_mask)


@contextlib.contextmanager
def canonical_operators(component: nn.Module) -> Iterator[None]:
    """While open, the component's RMS norms and rotary embeddings go through this module."""
    with contextlib.ExitStack() as stack:
        for module in component.modules():
            if is_rms_norm(module):
                stack.enter_context(mock.patch.object(module, "forward", rms_norm.__get__(module)))
            if type(module).__name__.endswith("Attention"):
                source = __import__(type(module).__module__, fromlist=["_"])
                if hasattr(source, "apply_rotary_pos_emb"):
                    stack.enter_context(mock.patch.object(source, "apply_rotary_pos_emb", rotate))
        yield
