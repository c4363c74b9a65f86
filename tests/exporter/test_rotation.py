"""A rotation that would change for longer texts is held at its first angles, and the cache ends where it would."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from vlmc.errors import VlmcError
from vlmc.exporter import rotation

SIZES: Any = {"hidden_size": 32, "num_attention_heads": 2, "max_position_embeddings": 64}


def rotary(kind: str) -> Any:
    """transformers' own; both have other angles from the 33rd or 65th place on."""
    if kind == "longrope":
        factors = {"short_factor": [1.5] * 8, "long_factor": [9.0] * 8}
        parameters = {"rope_type": kind, "rope_theta": 1e4} | factors
        return Phi3RotaryEmbedding(
            Phi3Config(**SIZES, pad_token_id=0, rope_parameters=parameters, original_max_position_embeddings=32)
        )
    parameters = {"rope_type": kind, "rope_theta": 1e4} | ({"factor": 2.0} if kind == "dynamic" else {})
    return LlamaRotaryEmbedding(LlamaConfig(**SIZES, rope_parameters=parameters))


@pytest.mark.parametrize(("kind", "most"), [("dynamic", 64), ("longrope", 32)])
def test_the_first_angles_are_transformers_own(kind: str, most: int) -> None:
    theirs, hidden, places = rotary(kind), torch.zeros(1, 1, 32), torch.arange(most)[None]
    ours = rotation.steady(theirs)
    assert ours is not theirs
    for found, expected in zip(ours(hidden, places), theirs(hidden, places), strict=True):
        torch.testing.assert_close(found, expected)
    longer = torch.arange(most + 1)[None]
    assert not torch.allclose(ours(hidden, longer)[0], theirs(hidden, longer)[0])
    assert {part.dtype for part in ours(hidden.half(), places)} == {torch.float16}


def test_what_does_not_change_stays_transformers_module() -> None:
    theirs = rotary("default")
    assert rotation.steady(theirs) is theirs


@pytest.mark.parametrize(
    ("parameters", "most"),
    [
        ({"rope_type": "dynamic"}, 64),
        ({"rope_type": "longrope", "original_max_position_embeddings": 32}, 32),
        ({"rope_type": "longrope"}, 64),
    ],
)
def test_a_cache_ends_where_the_angles_would_change(parameters: dict[str, Any], most: int) -> None:
    text = SimpleNamespace(rope_parameters=parameters, max_position_embeddings=64)
    rotation.check(text, most)
    with pytest.raises(VlmcError, match=rf"KV cache of {most + 1} positions.*--capacity {most} or less"):
        rotation.check(text, most + 1)


@pytest.mark.parametrize("parameters", [None, {}, *({"rope_type": kind} for kind in rotation.STEADY)])
def test_other_rotations_end_none(parameters: Any) -> None:
    rotation.check(SimpleNamespace(rope_parameters=parameters, max_position_embeddings=64), 10**6)


def test_one_that_nobody_compared_is_refused() -> None:
    text = SimpleNamespace(rope_parameters={"rope_type": "proportional"}, max_position_embeddings=64)
    with pytest.raises(VlmcError, match=r"rope_type proportional.*default or linear"):
        rotation.check(text, 8)
