"""A decoder that makes several tokens at once gives the answer of one that makes them singly, and never too many."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vlmc.artifact import Artifact
from vlmc.runtime.session import Inputs, Session, open_session

FLOAT = dict.fromkeys(("vision_encoder", "embed_tokens", "decoder"), "onnxruntime-fp32")


class Scripted:
    """Gives the tokens of a list, `stride` at a time; asking for more than the cache holds is an error."""

    def __init__(self, tokens: list[int], stride: int, capacity: int) -> None:
        self._tokens, self.stride, self.capacity = tokens, stride, capacity
        self._given, self._position = 0, 0

    def prefill(self, inputs_embeds: Any, *_: Any, **__: Any) -> int:
        self._given, self._position = 1, inputs_embeds.shape[1]
        return self._tokens[0]

    def decode(self, count: int) -> list[int]:
        assert 0 < count <= self.stride
        self._position += count
        assert self._position <= self.capacity, "the cache overflows"
        self._given += count
        return self._tokens[self._given - count : self._given]


@pytest.fixture(scope="module")
def session(built: Artifact) -> Session:
    return open_session(Artifact(built.root), "cpu", FLOAT, threads=1)


@given(
    stride=st.integers(1, 9),
    capacity=st.integers(4, 30),
    most=st.integers(1, 40),
    end=st.integers(0, 40),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_stride_does_not_change_the_answer(
    session: Session, stride: int, capacity: int, most: int, end: int
) -> None:
    eos = session.artifact.manifest.prompt.eos_token_ids[0]
    tokens = [eos if index == end else eos + 1 + index for index in range(80)]
    ids = np.full(4, eos + 1)
    session.decoder = Scripted(tokens, stride, capacity)  # type: ignore[assignment]
    answer = list(session.generate(Inputs(None, ids), most))
    room = capacity - len(ids)  # every further token but the last is written to the cache
    assert answer == tokens[: min(most, room + 1, end)]
    assert session.timings.tokens == len(answer)
    assert len(session.timings.decode) >= max(len(answer) - 1, 0)
