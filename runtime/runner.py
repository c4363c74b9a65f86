"""The contract that every backend and every PyTorch baseline fulfils, so that all are measured by one clock."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Runner(Protocol):
    """One loaded component without state: `vision_encoder` or `embed_tokens`."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name for inputs by name; shapes and dtypes as in the component's TensorSpecs."""


class Decoder(Protocol):
    """A loaded decoder with its KV cache and its token embeddings; batch 1, greedy choice.

    `capacity` is the number of positions that the cache holds.
    """

    capacity: int

    def prefill(self, inputs_embeds: NDArray[np.float32]) -> int:
        """Forgets all, reads the prompt's embeddings (1, length, hidden) and returns the first token's id."""

    def decode(self, count: int) -> list[int]:
        """The next `count` token ids, each fed back in turn; the token before them is the last one returned."""

    def logits(self) -> NDArray[np.float32]:
        """Logits (vocabulary,) of the last chosen token, for comparing engines."""
